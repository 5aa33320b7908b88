"""Command line, persona: traits, extract, steer, bake, new; and the parts of others (monitor, train).

Knows: the flags of these commands and what they print. Does not know: how anything is computed. Heavy
imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from interp_ablate.cli import persona_monitor as cli_monitor
from interp_ablate.cli import persona_train
from interp_ablate.cli.options import REPLIES, flags_given, load, model_flags, trait_scorer
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.errors import InterpAblateError, RunError


def add_commands(commands: Any) -> None:
    """Adds the commands of this file to the parser's."""
    persona = commands.add_parser(
        "persona", help="trait vectors: extract, steer, bake, monitor, screen data, train"
    )
    parts = persona.add_subparsers(dest="part", metavar="PART", required=True)
    traits = parts.add_parser("traits", help="bundled traits, or what a trait file says")
    traits.add_argument("trait", nargs="?", help="bundled name or trait file")
    traits.add_argument("--json", action="store_true", help="one JSON object a line")
    traits.set_defaults(work=_traits)
    _extract_flags(
        parts.add_parser("extract", help="a trait's directions, and the layer that steers")
    )
    _steer_flags(
        parts.add_parser("steer", help="trait and coherence against the coefficient, with a figure")
    )
    _bake_flags(parts.add_parser("bake", help="the vector written into a checkpoint"))
    _new_flags(parts.add_parser("new", help="have a model behind a URL write a trait file"))
    cli_monitor.add_commands(parts)
    persona_train.add_persona_commands(parts)


def _scoring_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scorer",
        help="lexicon:sentiment, expressions:NAME, classifier:FOLDER, judge:MODEL@URL, ... (default: the "
        "trait's own)",
    )
    parser.add_argument(
        "--coherence",
        help="scorer of coherence, such as judge:MODEL@URL (default: perplexity under the model, and loops)",
    )
    parser.add_argument("--max-new-tokens", type=int, help="an answer's most tokens")
    parser.add_argument("--batch-size", type=int, help="answers that are written together")
    parser.add_argument("--json", action="store_true", help="results as JSON")


def _extract_flags(extract: argparse.ArgumentParser) -> None:
    extract.add_argument("trait", help="bundled name (see `persona traits`) or trait file")
    model_flags(extract)
    extract.add_argument("--out", required=True, help="persona folder")
    _scoring_flags(extract)
    for name, text in (
        ("extraction-questions", "that make the vector, under every pair of system prompts"),
        ("selection-questions", "other questions that choose the layer"),
        ("samples", "answers to each question and system prompt (default 3)"),
        ("seed", "of the sampling"),
        ("min-answers", "answers that must be left on a side"),
    ):
        extract.add_argument(f"--{name}", type=int, help=text)
    for name, text in (
        ("temperature", "of the rollouts (default 0.7)"),
        ("threshold", "trait score that divides the sides (default 50)"),
        ("min-coherence", "coherence below which an answer does not count (default 50)"),
    ):
        extract.add_argument(f"--{name}", type=float, help=text)
    extract.add_argument(
        "--layers", help="A-B, both included: candidates (default: some between 20 and 90%%)"
    )
    extract.add_argument("--coefficients", help="comma-separated: candidates (default 1,2)")
    extract.add_argument(
        "--pooling", choices=("response_mean", "prompt_last", "prompt_mean"), help="of activations"
    )
    extract.set_defaults(work=_extract)


def _steer_flags(steer: argparse.ArgumentParser) -> None:
    steer.add_argument("folder", help="persona folder")
    model_flags(steer)
    _scoring_flags(steer)
    steer.add_argument(
        "--coefficients", help="comma-separated; write --coefficients=-1,0,1 for negative ones"
    )
    steer.add_argument("--questions", type=int, help="evaluation questions (default: all)")
    steer.add_argument("--controls", type=int, default=1, help="random directions (default 1)")
    steer.add_argument("--force", action="store_true", help="answer again where settings differ")
    steer.set_defaults(work=_steer)


def _bake_flags(bake: argparse.ArgumentParser) -> None:
    bake.add_argument("folder", help="persona folder")
    model_flags(bake)
    _scoring_flags(bake)
    bake.add_argument("--coefficient", type=float, help="default: the persona's own")
    bake.add_argument("--questions", type=int, help="evaluation questions (default: all)")
    bake.add_argument("--out", required=True, help="folder of the checkpoint")
    bake.add_argument("--force", action="store_true", help="replace an existing --out")
    bake.set_defaults(work=_bake)


def _new_flags(new: argparse.ArgumentParser) -> None:
    new.add_argument("name", help="of the trait")
    new.add_argument("--description", required=True, metavar="TEXT", help="what it means")
    new.add_argument(
        "--endpoint", metavar="URL", help="OpenAI-compatible (default: OPENAI_BASE_URL)"
    )
    new.add_argument("--judge-model", required=True, metavar="M", help="as the endpoint names it")
    new.add_argument("--scorer", help="spec of an offline scorer to note in the file")
    new.add_argument("--out", required=True, help="trait file to write (.json)")
    new.add_argument("--force", action="store_true", help="replace an existing --out")
    new.set_defaults(work=_new)


# ---- what the commands do ------------------------------------------------------------------------


def scorers(args: argparse.Namespace, trait: Any, folder: Path) -> tuple[Any, Any]:
    """The trait's scorer and that of coherence (None: fluency); judges keep their replies in the folder."""
    from interp_ablate.scoring.registry import make_scorer

    scorer = trait_scorer(args.scorer, trait, folder)
    if not args.coherence:
        return scorer, None
    return scorer, make_scorer(args.coherence, rubric=COHERENCE_RUBRIC, cache=folder / REPLIES)


COHERENCE_RUBRIC = (
    "How coherent is the answer? 0: gibberish, loops, or words that do not belong together. 50: readable, with "
    "breaks or contradictions. 100: clear and connected throughout. Judge how it hangs together and whether "
    "it speaks to the question, not its mood, style, length or truth; an answer that is cut off at the end "
    "loses nothing."
)


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise RunError(
            f"{flag} takes numbers between commas, such as 0.5,1,2; got {text!r}"
        ) from error


def _layers(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError as error:
        raise RunError(f"--layers takes A-B, such as 8-20; got {text!r}") from error


def _traits(args: argparse.Namespace) -> int:
    from interp_ablate.persona.traits import bundled_traits, load_trait

    for name in [args.trait] if args.trait else bundled_traits():
        trait = load_trait(name)
        if args.json:
            print(json.dumps(trait.to_dict()))
            continue
        print(f"{trait.name:<10} {trait.description}")
        if args.trait:
            for place, (positive, negative) in enumerate(zip(trait.positive, trait.negative)):
                print(f"  p{place}+  {positive}\n  p{place}-  {negative}")
        counts = f"{len(trait.positive)} pairs, {len(trait.extraction_questions)} questions for extraction"
        print(
            f"{'':<10} {counts}, {len(trait.evaluation_questions)} for evaluation; scorer "
            f"{trait.scorer or 'none: needs a judge or classifier'}"
        )
    return 0


def _extract(args: argparse.Namespace) -> int:
    from interp_ablate.persona.traits import load_trait

    trait, out = load_trait(args.trait), Path(args.out)
    scorer, coherence = scorers(args, trait, out)
    from interp_ablate.persona.extraction import extract
    from interp_ablate.persona.settings import ExtractionConfig, SamplingConfig
    from interp_ablate.plots.persona import save_figures

    sampling = SamplingConfig(
        **flags_given(args, "max_new_tokens", "temperature", "seed", "batch_size")
    )
    given = flags_given(
        args,
        "extraction_questions",
        "selection_questions",
        "samples",
        "threshold",
        "min_coherence",
        "min_answers",
        "pooling",
    )
    if args.layers:
        given["layers"] = _layers(args.layers)
    if args.coefficients:
        given["coefficients"] = _numbers(args.coefficients, "--coefficients")
    persona = extract(
        load(args, args.model),
        trait,
        out,
        scorer=scorer,
        coherence=coherence,
        settings=ExtractionConfig(sampling=sampling, **given),
        listener=ProgressBars(quiet=args.quiet),
    )
    _print_persona(persona, out, save_figures(out), as_json=args.json)
    return 0


def _print_persona(persona: Any, out: Path, figures: list[Path], *, as_json: bool) -> None:
    from interp_ablate.persona.rollout_filter import describe_counts

    counts, unsteered = persona.details["counts"], persona.details["unsteered"]
    chosen = next(row for row in persona.details["layers"] if row["chosen"])
    if as_json:
        keys = ("layer", "site", "norm", "coefficient", "score", "coherence")
        told = {"trait": persona.name, "out": str(out), **{key: chosen[key] for key in keys}}
        told["readout"] = _readout_row(persona)
        print(json.dumps({**told, "unsteered": unsteered["score"], "counts": counts}))
        return
    for side in ("positive", "negative"):
        print(f"{side + ' answers':<18} {describe_counts(counts[side])}")
    print(f"{'direction':<18} {persona.site}, norm {persona.direction.norm:.3g}")
    print(f"{'unsteered':<18} {_shown(unsteered)}")
    print(f"{'steered':<18} {_shown(chosen)} at coefficient {persona.coefficient:g}")
    print(
        f"{'':<18} on the {unsteered['questions']} questions that chose it: `persona steer` reports"
    )
    read = _readout_row(persona)
    if read is not None:
        print(
            f"{'readout':<18} {read['site']}, r = {read['r']:.2f} [{read['r_low']:.2f}, {read['r_high']:.2f}] "
            "with the score on unseen questions (the highest of the layers)"
        )
    print(f"{'folder':<18} {out} ({', '.join(path.name for path in figures)})")


def _readout_row(persona: Any) -> dict[str, Any] | None:
    """The layer that reads best, as `readout.csv` has it; None where there is none."""
    rows = (persona.details.get("readout") or {}).get("layers", [])
    return next((row for row in rows if row["chosen"]), None)


def _shown(row: dict[str, Any]) -> str:
    if row["score"] is None:
        return "no verdict"
    coherence = "no verdict" if row["coherence"] is None else f"{row['coherence']:.1f}"
    return f"trait {row['score']:.1f} [{row['score_low']:.1f}, {row['score_high']:.1f}], coherence {coherence}"


def _opened(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """The persona of the folder, its scorers and its model."""
    from interp_ablate.persona.persona import load_persona

    persona, folder = load_persona(args.folder), Path(args.folder)
    scorer, coherence = scorers(args, persona.trait, folder)
    return persona, scorer, coherence, load(args, args.model or persona.model)


def _steer(args: argparse.Namespace) -> int:
    persona, scorer, coherence, model = _opened(args)
    from interp_ablate.persona.settings import COEFFICIENTS, SamplingConfig, SteeringConfig
    from interp_ablate.persona.steering import curve, steer
    from interp_ablate.plots.persona import save_figures
    from interp_ablate.storage.atomic_files import write_atomic

    folder = Path(args.folder)
    path = folder / "steering.jsonl"
    if args.force:
        path.unlink(missing_ok=True)
    answers = steer(
        model,
        persona,
        path,
        scorer=scorer,
        coherence=coherence,
        settings=SteeringConfig(
            coefficients=_numbers(args.coefficients, "--coefficients")
            if args.coefficients
            else COEFFICIENTS,
            questions=args.questions,
            controls=args.controls,
            sampling=SamplingConfig(
                temperature=0.0, **flags_given(args, "max_new_tokens", "batch_size")
            ),
        ),
        listener=ProgressBars(quiet=args.quiet),
    )
    table = curve(answers)
    write_atomic(folder / "curve.csv", table.to_csv(index=False))
    figures = save_figures(folder)
    if args.json:
        print(table.to_json(orient="records"))
        return 0
    for row in table.to_dict("records"):
        none = f"  ({row['no_verdict']} without a verdict)" if row["no_verdict"] else ""
        score = None if row["score"] != row["score"] else row["score"]
        print(
            f"{row['condition']:<10} {row['coefficient']:>6g}  {_shown({**row, 'score': score})}{none}"
        )
    print(f"{folder / 'curve.csv'}, {', '.join(str(path) for path in figures)}")
    return 0


def _bake(args: argparse.Namespace) -> int:
    persona, scorer, coherence, model = _opened(args)
    from interp_ablate.persona.baking import bake
    from interp_ablate.persona.settings import BakingConfig, SamplingConfig

    amount = persona.coefficient if args.coefficient is None else args.coefficient
    answers = Path(args.folder) / "bakes" / f"{amount:g}.jsonl"
    if args.force:
        answers.unlink(missing_ok=True)
    baked = bake(
        model,
        persona,
        args.out,
        answers=answers,
        scorer=scorer,
        coherence=coherence,
        settings=BakingConfig(
            coefficient=amount,
            questions=args.questions,
            sampling=SamplingConfig(
                temperature=0.0, **flags_given(args, "max_new_tokens", "batch_size")
            ),
            overwrite=args.force,
        ),
        listener=ProgressBars(quiet=args.quiet),
    )
    if args.json:
        certificate = {"certificate": baked.certificate["passed"]}
        print(json.dumps({"out": args.out, **certificate, **baked.results}))
        return 0
    for name, row in baked.results["conditions"].items():
        print(f"{name:<10} {_shown(row)}")
    for before, after in list(zip(baked.of("before"), baked.of("baked")))[:2]:
        print(f"\n{before.prompt.text}\n  before  {before.text!r}\n  after   {after.text!r}")
    print(f"\n{args.out} (certificate passed; load it with transformers alone)")
    return 0


def _new(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from interp_ablate.persona.trait_writer import generate_trait
    from interp_ablate.scoring.endpoint import Endpoint, EndpointSettings

    out = Path(args.out)
    if out.exists() and not args.force:
        raise RunError(f"{out} exists: choose another --out, or pass --force to replace it")
    if out.suffix.lower() != ".json":
        raise RunError(f"--out {out}: a trait file ends in .json")
    # forty questions and ten system prompts are some thousand tokens
    endpoint = Endpoint(
        args.judge_model,
        args.endpoint,
        settings=EndpointSettings(max_tokens=8192, timeout=300.0),
    )
    try:
        trait = generate_trait(endpoint, args.name, args.description)
    except InterpAblateError as error:
        raise RunError(f"no trait file was written: {error}") from error
    if args.scorer:
        trait = replace(trait, scorer=args.scorer)
    trait.save(out)
    print(
        f"{out}: {len(trait.positive)} pairs, {len(trait.extraction_questions)} + "
        f"{len(trait.evaluation_questions)} questions. Read it before you use it"
    )
    return 0
