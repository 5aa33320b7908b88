"""Command line, monitoring and data screening: persona monitor, persona screen.

Knows: the flags of these commands and what they print. Does not know: how anything is computed. Heavy
imports happen inside the commands.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import load, model_flags, trait_scorer
from interp_ablate.cli.persona_screen import _screen_flags
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.errors import RunError


def add_commands(commands: Any) -> None:
    """Adds the commands of this file to the parser's."""
    _monitor_flags(
        commands.add_parser(
            "monitor", help="does the projection before the first word foretell the trait?"
        )
    )
    _screen_flags(
        commands.add_parser("screen", help="which samples of a training set carry the trait?")
    )


def _monitor_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="persona folder")
    model_flags(parser)
    parser.add_argument(
        "--systems", metavar="FILE", help="system prompts, weakest first; a line each"
    )
    parser.add_argument("--questions", type=int, help="of the trait's evaluation questions (all)")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer (default 48)")
    parser.add_argument("--scorer", help="default: the trait's own")
    parser.add_argument("--out", help="default: the persona folder")
    parser.add_argument(
        "--prompt", help="instead: stream one answer, each token with its projection"
    )
    parser.add_argument("--system", help="system prompt of --prompt")
    parser.add_argument(
        "--coefficient", type=float, help="with --prompt: steer by so much; 0 does not (default)"
    )
    parser.set_defaults(work=_monitor)


# ---- monitor ------------------------------------------------------------------------------------------


def _monitor(args: argparse.Namespace) -> int:
    from interp_ablate.persona.monitoring import monitor_trait, read_graded
    from interp_ablate.persona.persona import load_persona
    from interp_ablate.persona.settings import SamplingConfig
    from interp_ablate.plots.monitoring import save_monitoring

    persona = load_persona(args.folder)
    if args.prompt is not None:
        return _stream(args, persona)
    out = Path(args.out or args.folder)
    scorer = trait_scorer(args.scorer, persona.trait, out)
    systems = None if args.systems is None else read_graded(args.systems)
    questions = asked_questions(args, persona)
    given = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    found = monitor_trait(
        load(args, args.model or persona.model),
        persona,
        out / "monitoring.jsonl",
        scorer=scorer,
        systems=systems,
        questions=questions,
        sampling=SamplingConfig(temperature=0.0, **given),
        listener=ProgressBars(quiet=args.quiet),
    )
    found.save(out)
    figure = save_monitoring(found, out / "figures" / "monitor.png")
    _print_monitoring(found)
    print(f"table: {out / 'monitor.csv'}; figure: {figure}")
    return 0


def asked_questions(args: argparse.Namespace, persona: Any) -> Any:
    """The first --questions of the trait's evaluation questions; all without the flag.

    Raises:
        RunError: fewer than one, or more than there are.
    """
    there = persona.trait.evaluation_questions
    if args.questions is not None and not 1 <= args.questions <= len(there):
        raise RunError(f"--questions {args.questions}: the trait has 1 to {len(there)}")
    return there[: args.questions]


def _print_monitoring(found: Any) -> None:
    scored = len(found.table) - found.no_verdict
    systems = found.table["level"].nunique()
    print(f"{scored} answers with a score under {systems} system prompts")
    if found.no_verdict:
        print(f"{found.no_verdict} answers without a score are left out")
    for name, text in (
        ("overall", "r over all answers"),
        ("within", "within system prompts"),
        ("across", "across their means"),
    ):
        chance = found.control[name]
        said = "undefined" if chance is None else f"{chance:.2f}"
        print(f"{text:<22} {getattr(found, name)}; random directions: |r| below {said} in 95%")


def _stream(args: argparse.Namespace, persona: Any) -> int:
    from contextlib import nullcontext

    from interp_ablate.plots.monitoring import tokens_figure
    from interp_ablate.prompts.prompt import Prompt

    model = load(args, args.model or persona.model)
    persona.check(model)
    amount = args.coefficient or 0.0
    steered = model.applied(persona.plan(amount)) if amount else nullcontext()
    limit = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    seen = []
    with steered:
        prompt = Prompt(args.prompt, args.system)
        for token, projection in model.monitor(prompt, persona.direction, **limit):
            print(f"{projection:+8.3f}  {token.text!r}", flush=True)
            seen.append((token, projection))
    if not seen:
        raise RunError("the model ended its answer at once: there is no token to look at")
    mean = sum(projection for _, projection in seen) / len(seen)
    print(f"{mean:+8.3f}  mean of {len(seen)} tokens at {persona.direction.site}")
    title = f"{args.prompt}" + (f"  (steered, coefficient {amount:g})" if amount else "")
    path = Path(args.out or args.folder) / "figures" / "tokens.png"
    print(f"figure: {tokens_figure({title: seen}, path)}")
    return 0
