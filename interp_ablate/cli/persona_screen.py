"""`persona screen`: samples of chat data along a direction.

Knows: flags and what is printed. Does not know: how samples are scored.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import load, model_flags


def _screen_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="persona folder")
    parser.add_argument(
        "data",
        help="JSONL, JSON, parquet or datasets folder of prompts and answers; or planted:NAME, a "
        "bundled mixture",
    )
    parser.add_argument("--out", required=True, help="folder of the results")
    model_flags(parser)
    parser.add_argument(
        "--threshold",
        help="above it samples are flagged: a value (1.5), or a quantile (q0.99) of --reference or else "
        "of the data; default q0.99 with a reference, q0.9 without",
    )
    parser.add_argument("--reference", metavar="FILE", help="samples known to be clean")
    parser.add_argument(
        "--no-own",
        action="store_true",
        help="projection alone: do not answer the prompts with the model itself",
    )
    parser.add_argument("--max-new-tokens", type=int, help="of the model's own answer (default 64)")
    parser.add_argument(
        "--response-tokens", type=int, help="of a sample's answer, the first so many (default: all)"
    )
    parser.add_argument(
        "--by",
        choices=("projection", "difference", "adjusted"),
        help="difference: minus the own answer's projection; adjusted (default): minus the part of it that "
        "a least-squares line over all samples explains",
    )
    parser.add_argument(
        "--direction",
        choices=("readout", "steering"),
        default="readout",
        help="readout (default): along which the trait shows in text, of the layer that reads best; steering: "
        "the one that `persona steer` adds, as published",
    )
    parser.add_argument("--layer", type=int, help="that direction of another layer")
    parser.add_argument("--layout", help="of DATA, where its keys fit several")
    parser.add_argument(
        "--labels", metavar="FIELD", help="true or false in every row: how well are they found?"
    )
    parser.set_defaults(work=_screen)


# ---- screen -------------------------------------------------------------------------------------------


def _screen(args: argparse.Namespace) -> int:
    from interp_ablate.datasets.labelled_mixtures import read_labels
    from interp_ablate.datasets.screening import save_summary, screen_file
    from interp_ablate.datasets.screening_measure import summarise_file
    from interp_ablate.persona.persona import load_persona
    from interp_ablate.plots.screening import save_screening

    persona = load_persona(args.folder)
    direction = _asked_direction(persona, args.direction, args.layer)
    data, field, threshold, settings = _what(args)
    held, layout = summarise_file(data, layout=args.layout), args.layout
    labels = None if field is None else read_labels(data, field, layout=layout)
    clean = summarise_file(args.reference, layout=layout) if args.reference else None
    out, by = Path(args.out), args.by or settings.measure
    settings.check_measure(by)
    model = load(args, args.model or persona.model)
    persona.check(model)

    def measured(path: Any, store: str, total: int) -> Any:
        return _measure(args, (model, direction, path, out / store, settings), total)

    reference = measured(args.reference, "reference.jsonl", clean.samples) if clean else None
    table = measured(data, "scores.jsonl", held.samples)
    table, reference, slope = _adjusted(table, reference, settings)
    found = screen_file(
        table, data, out, by=by, threshold=threshold, reference=reference, layout=layout
    )
    figure = save_screening(
        table, out / "figures" / "screening.png", by=by, threshold=found.threshold,
        trait=persona.name, labels=labels, reference=reference,
    )  # fmt: skip
    told = _told(args, persona, model, direction, settings, held)
    summary = {**found.summary, "slope": slope, **told}
    if labels is not None:
        summary["check"] = _check(args, persona, model, direction, (data, table, labels))
    save_summary(summary, out)
    _print_screening(summary, persona.name)
    print(f"ranked: {out / 'ranked.csv'}; figure: {figure}")
    return 0


def _asked_direction(persona: Any, kind: str, layer: int | None) -> Any:
    """The persona's direction for reading, or the one that steers; of another layer, if one is given."""
    from interp_ablate.sites import Site

    chosen = persona.readout_direction if kind == "readout" else persona.direction
    if kind == "readout" and chosen is persona.direction:
        readout = persona.details.get("readout") or {}
        why = readout.get("why_not") or "it was not made by `persona extract`"
        print(
            f"note: read along the steering direction, for there is none for reading text: {why}",
            file=sys.stderr,
        )
    if layer is None:
        return chosen
    site = Site(layer, chosen.site.point)
    return persona.directions[site, chosen.position, chosen.method]


def _adjusted(table: Any, reference: Any, settings: Any) -> tuple[Any, Any, float | None]:
    """Both tables adjusted by one slope: the reference's, if there is one."""
    from interp_ablate.datasets.screening_measure import baseline_adjusted, baseline_slope

    if not settings.own:
        return table, reference, None
    slope = baseline_slope(table if reference is None else reference)
    return (
        baseline_adjusted(table, slope),
        None if reference is None else baseline_adjusted(reference, slope),
        slope,
    )


def _what(args: argparse.Namespace) -> tuple[Any, str | None, Any, Any]:
    """The data, the field of its labels, the threshold, and what is measured."""
    from interp_ablate.datasets.labelled_mixtures import data_and_label
    from interp_ablate.datasets.screening import Threshold
    from interp_ablate.datasets.screening_settings import ScreeningSettings

    data, field = data_and_label(args.data, args.labels)
    threshold = Threshold.parse(args.threshold or ("q0.99" if args.reference else "q0.9"))
    names = ("max_new_tokens", "response_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return data, field, threshold, ScreeningSettings(own=not args.no_own, **given)


def _measure(args: argparse.Namespace, what: tuple[Any, ...], total: int) -> Any:
    from interp_ablate.datasets.screening_measure import measure_samples

    model, direction, path, store, settings = what
    done = 0
    shown = sys.stderr.isatty() and not args.quiet

    def tell(n: int) -> None:
        nonlocal done
        done += n
        if shown:
            end = "\n" if done == total else "\r"
            print(f"{path}: {done} of {total} samples", end=end, file=sys.stderr, flush=True)

    return measure_samples(
        model, direction, path, store, settings=settings, layout=args.layout, on_rows=tell
    )


def _told(
    args: argparse.Namespace, persona: Any, model: Any, direction: Any, settings: Any, held: Any
) -> Any:
    from dataclasses import asdict

    return {
        "data": str(args.data),
        "trait": persona.name,
        "model": model.source.name,
        "site": str(direction.site),
        "direction": direction.fingerprint,
        "method": direction.method,
        "settings": asdict(settings),
        "with_earlier_rounds": held.rounds,
        "without_an_answer": held.unanswered,
    }


def _check(
    args: argparse.Namespace,
    persona: Any,
    model: Any,
    direction: Any,
    screened: tuple[Any, Any, Any],
) -> list[dict[str, Any]]:
    from interp_ablate.activations.projections import project_responses
    from interp_ablate.datasets.screening_check import bag_of_words, check_screening, rollout_texts
    from interp_ablate.scoring.registry import make_scorer

    data, table, labels = screened
    baselines: dict[str, Any] = {}
    for name, other in (("readout", persona.readout_direction), ("steering", persona.direction)):
        if other.method != direction.method:
            baselines[f"projection, {name} direction, layer {other.site.layer}"] = partial(
                project_responses, model, direction=other, response_tokens=args.response_tokens
            )
    if persona.trait.scorer is not None and not persona.trait.scorer.startswith("judge:"):
        baselines[persona.trait.scorer] = make_scorer(persona.trait.scorer)
    texts = rollout_texts(Path(args.folder) / "rollouts.jsonl")
    if all(texts):
        baselines["bag of words of the persona's rollouts"] = bag_of_words(*texts)
    found = check_screening(
        model,
        direction,
        data,
        table,
        labels,
        baselines=baselines,
        layout=args.layout,
        response_tokens=args.response_tokens,
    )
    return found.to_dict("records")


def _print_screening(summary: dict[str, Any], trait: str) -> None:
    asked = summary["threshold"]
    of = {"value": "", "data": " of the data itself", "reference": " of the reference"}[asked["of"]]
    print(f"read along {summary['method']} at {summary['site']}")
    print(
        f"{summary['samples']} samples, {summary['flagged']} flagged: {summary['by']} on {trait!r} above "
        f"{asked['value']:.3f}" + (f" ({asked['asked']}{of})" if of else "")
    )
    if asked["of"] == "data":
        print("note: a quantile of the data itself flags its share whatever is in the data")
    if summary["unscored"]:
        print(f"{summary['unscored']} samples without a value are in unscored.*")
    if summary["with_earlier_rounds"]:
        n = summary["with_earlier_rounds"]
        print(
            f"note: {n} samples have earlier rounds; the last answer was read after its own prompt"
        )
    for row in summary.get("check", []):
        missing = f", {row['missing']} without a value" if row["missing"] else ""
        print(
            f"{row['score']:<42} AUC {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}] "
            f"(n = {row['n']}{missing})"
        )
