"""`persona screen`: samples of chat data along a direction.

Knows: flags and what is printed. Does not know: how samples are scored.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import ModelSettings, load
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.datasets.screening_settings import MEASURES, ScreeningSettings
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Screen(ModelSettings):
    """Which data are read along which direction, and what is flagged."""

    folder: str = setting(help="persona folder", positional=True)
    data: str = setting(
        help="JSONL, JSON, parquet or datasets folder of prompts and answers; or planted:NAME, a bundled mixture",
        positional=True,
    )
    out: str = setting(help="folder of the results")
    threshold: str | None = setting(
        None,
        "above it samples are flagged: a value (1.5), or a quantile (q0.99) of --reference or else of the data; "
        "default q0.99 with a reference, q0.9 without",
    )
    reference: str | None = setting(None, "samples known to be clean", metavar="FILE")
    by: str | None = setting(
        None,
        "difference: minus the own answer's projection; adjusted (default): minus the part of it that a "
        "least-squares line over all samples explains",
        choices=MEASURES,
    )
    direction: str = setting(
        "readout",
        "readout: along which the trait shows in text, of the layer that reads best; steering: the one that "
        "`persona steer` adds, as published",
        choices=("readout", "steering"),
    )
    layer: int | None = setting(None, "that direction of another layer")
    layout: str | None = setting(None, "of DATA, where its keys fit several")
    labels: str | None = setting(
        None, "true or false in every row: how well are they found?", metavar="FIELD"
    )


add = adding(Screen, ScreeningSettings, FigureSettings)


def run(args: Namespace) -> int:
    """Project every sample, and print and write which are flagged."""
    from interp_ablate.datasets.labelled_mixtures import data_and_label, read_labels
    from interp_ablate.datasets.screening import Threshold, save_summary, screen_file
    from interp_ablate.datasets.screening_measure import measure_samples, summarise_file
    from interp_ablate.persona.persona import load_persona
    from interp_ablate.plots.monitoring import save_screening

    screen, settings = settings_from(args, Screen), settings_from(args, ScreeningSettings)
    figures = figure_settings(args)
    persona = load_persona(screen.folder)
    direction = _asked_direction(persona, screen.direction, screen.layer)
    (data, field), layout = data_and_label(screen.data, screen.labels), screen.layout
    threshold = Threshold.parse(screen.threshold or ("q0.99" if screen.reference else "q0.9"))
    contents = summarise_file(data, layout=layout)
    labels = None if field is None else read_labels(data, field, layout=layout)
    clean = summarise_file(screen.reference, layout=layout) if screen.reference else None
    out, by = Path(screen.out), screen.by or settings.measure
    settings.check_measure(by)
    model = load(screen, screen.model or persona.model)
    persona.check(model)

    def measured(path: Any, store: str, total: int) -> Any:
        return measure_samples(
            model, direction, path, out / store, settings=settings, layout=layout, total=total
        )

    reference = measured(screen.reference, "reference.jsonl", clean.samples) if clean else None
    table = measured(data, "scores.jsonl", contents.samples)
    slope = None
    if settings.own:
        table, reference, slope = _adjusted(table, reference)
    screened = screen_file(
        table, data, out, by=by, threshold=threshold, reference=reference, layout=layout
    )
    figure = save_screening(
        table, out / "figures" / figures.named("screening.png"), dpi=figures.dpi, by=by, threshold=screened.threshold,
        trait=persona.name, labels=labels, reference=reference,
    )  # fmt: skip
    summary = {
        **screened.summary,
        "slope": slope,
        "data": screen.data,
        "trait": persona.name,
        "model": model.source.name,
        "site": str(direction.site),
        "direction": direction.fingerprint,
        "method": direction.method,
        "settings": asdict(settings),
        "with_earlier_rounds": contents.rounds,
        "without_an_answer": contents.unanswered,
    }
    if labels is not None:
        tokens = settings.response_tokens
        checked = _check(screen, tokens, persona, model, direction, data, table, labels)
        summary["check"] = checked.to_dict("records")
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


def _adjusted(table: Any, reference: Any) -> tuple[Any, Any, float]:
    """Both tables adjusted by one slope: the reference's, if there is one."""
    from interp_ablate.datasets.screening_measure import baseline_adjusted, baseline_slope

    slope = baseline_slope(table if reference is None else reference)
    adjusted = None if reference is None else baseline_adjusted(reference, slope)
    return baseline_adjusted(table, slope), adjusted, slope


def _check(
    screen: Screen, response_tokens: int | None, persona: Any, model: Any, direction: Any,
    data: Any, table: Any, labels: Any,
) -> Any:  # fmt: skip
    """How well the projections, and other scores, find what is labelled."""
    from interp_ablate.activations.pooling import project_responses
    from interp_ablate.datasets.labelled_mixtures import (
        bag_of_words,
        check_screening,
        rollout_texts,
    )
    from interp_ablate.scoring.registry import make_scorer

    baselines: dict[str, Any] = {}
    for name, other in (("readout", persona.readout_direction), ("steering", persona.direction)):
        if other.method != direction.method:
            baselines[f"projection, {name} direction, layer {other.site.layer}"] = partial(
                project_responses, model, direction=other, response_tokens=response_tokens
            )
    if persona.trait.scorer is not None and not persona.trait.scorer.startswith("judge:"):
        baselines[persona.trait.scorer] = make_scorer(persona.trait.scorer)
    texts = rollout_texts(Path(screen.folder) / "rollouts.jsonl")
    if all(texts):
        baselines["bag of words of the persona's rollouts"] = bag_of_words(*texts)
    return check_screening(
        model, direction, data, table, labels, baselines=baselines, layout=screen.layout,
        response_tokens=response_tokens,
    )  # fmt: skip


def _print_screening(summary: dict[str, Any], trait: str) -> None:
    threshold = summary["threshold"]
    of = {"value": "", "data": " of the data itself", "reference": " of the reference"}[
        threshold["of"]
    ]
    print(f"read along {summary['method']} at {summary['site']}")
    print(
        f"{summary['samples']} samples, {summary['flagged']} flagged: {summary['by']} on {trait!r} above "
        f"{threshold['value']:.3f}" + (f" ({threshold['asked']}{of})" if of else "")
    )
    if threshold["of"] == "data":
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
