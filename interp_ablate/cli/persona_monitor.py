"""`persona monitor`: does the projection before the first word foretell the trait?

Knows: flags and what is printed. Does not know: how answers are made or correlated.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import (
    JudgeSettings,
    ModelSettings,
    judge_settings,
    load,
    tell_spent,
    trait_scorer,
)
from interp_ablate.cli.persona_options import asked_questions, greedy
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Monitor(ModelSettings):
    """Which persona is watched, over which answers."""

    folder: str = setting(help="persona folder", positional=True)
    systems: str | None = setting(
        None, "system prompts, weakest first; a line each", metavar="FILE"
    )
    questions: int | None = setting(None, "evaluation questions (default: all)")
    scorer: str | None = setting(None, "default: the trait's own")
    out: str | None = setting(None, "default: the persona folder")
    prompt: str | None = setting(None, "instead: stream one answer, each token with its projection")
    system: str | None = setting(None, "system prompt of --prompt", empty=True)
    coefficient: float = setting(0.0, "with --prompt: steer by so much; 0 does not")


add = adding(Monitor, (SamplingConfig, ("max_new_tokens",)), JudgeSettings, FigureSettings)


def run(args: Namespace) -> int:
    """Correlate projections with scores, or stream one answer."""
    from interp_ablate.persona.monitoring import monitor_trait, read_graded
    from interp_ablate.persona.persona import load_persona
    from interp_ablate.plots.monitoring import save_monitoring

    settings, sampling = settings_from(args, Monitor), greedy(args)
    figures = figure_settings(args)
    persona = load_persona(settings.folder)
    out = Path(settings.out or settings.folder)
    if settings.prompt is not None:
        return _stream(settings, sampling, persona, out, figures)
    scorer = trait_scorer(settings.scorer, persona.trait, out, judge_settings(args))
    systems = None if settings.systems is None else read_graded(settings.systems)
    questions = asked_questions(settings.questions, persona)
    monitoring = monitor_trait(
        load(settings, settings.model or persona.model),
        persona,
        out / "monitoring.jsonl",
        scorer=scorer,
        systems=systems,
        questions=questions,
        sampling=sampling,
        listener=ProgressBars(quiet=args.quiet),
    )
    tell_spent(args, scorer)
    monitoring.save(out)
    figure = save_monitoring(
        monitoring, out / "figures" / figures.named("monitor.png"), dpi=figures.dpi
    )
    _print_monitoring(monitoring)
    print(f"table: {out / 'monitor.csv'}; figure: {figure}")
    return 0


def _print_monitoring(monitoring: Any) -> None:
    scored = len(monitoring.table) - monitoring.no_verdict
    systems = monitoring.table["level"].nunique()
    print(f"{scored} answers with a score under {systems} system prompts")
    if monitoring.no_verdict:
        print(f"{monitoring.no_verdict} answers without a score are left out")
    for name, text in (
        ("overall", "r over all answers"),
        ("within", "within system prompts"),
        ("across", "across their means"),
    ):
        chance = monitoring.control[name]
        limit = "undefined" if chance is None else f"{chance:.2f}"
        print(
            f"{text:<22} {getattr(monitoring, name)}; random directions: |r| below {limit} in 95%"
        )


def _stream(
    settings: Monitor, sampling: SamplingConfig, persona: Any, out: Path, figures: FigureSettings
) -> int:
    from interp_ablate.plots.monitoring import tokens_figure
    from interp_ablate.prompts.prompt import Prompt

    model = load(settings, settings.model or persona.model)
    persona.check(model)
    amount = settings.coefficient
    seen, other = [], 0
    with model.applied(persona.plan(amount) if amount else None):
        prompt = Prompt(str(settings.prompt), settings.system)
        limit = sampling.max_new_tokens
        for token, projection in model.monitor(prompt, persona.direction, max_new_tokens=limit):
            if token.part == settings.read:
                print(f"{projection:+8.3f}  {token.text!r}", flush=True)
                seen.append((token, projection))
            else:
                other += 1
    if not seen and other:
        raise RunError(
            f"the model wrote {other} tokens and no {settings.read}, which is what is read (--read): raise "
            "--max-thought-tokens, or close the thought (--template-arg)"
        )
    if not seen:
        raise RunError("the model ended its answer at once: there is no token to look at")
    mean = sum(projection for _, projection in seen) / len(seen)
    beside = f"; {other} tokens beside the {settings.read} are not read" if other else ""
    print(f"{mean:+8.3f}  mean of {len(seen)} tokens at {persona.direction.site}{beside}")
    title = f"{settings.prompt}" + (f"  (steered, coefficient {amount:g})" if amount else "")
    path = out / "figures" / figures.named("tokens.png")
    print(f"figure: {tokens_figure({title: seen}, path, dpi=figures.dpi)}")
    return 0
