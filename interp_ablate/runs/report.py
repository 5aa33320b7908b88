"""The HTML report of a run: one self-contained page with its result in plain words, tables and figures.

The page's layout is `data/templates/report.html.j2`; every text of a model or a prompt passes through its
autoescaping. The page loads nothing, and runs one script, its own, that its policy names by hash and nobody needs.

Knows: the files of a run folder, and which split each number is from. Does not know: any model, how a number was
measured, or how a figure is drawn.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.runs.report_answers import answer_groups, first_pairs
from interp_ablate.runs.report_charts import RunTables, alt_texts, report_charts
from interp_ablate.runs.report_choice import choice_told, objective_rows
from interp_ablate.runs.report_claims import (
    duration,
    ends_text,
    headline,
    is_number,
    number,
    objects,
    part_of,
    plain,
    rate,
    span_text,
    tiles,
)
from interp_ablate.search.trial_table import COLUMNS, read_trials
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.tables import read_json, read_table

logger = logging.getLogger(__name__)

TOP_TRIALS = 400

_STAGE_OF = {
    "run.json": "run",
    "directions.json": "directions",
    "projections.csv": "directions",
    "trials.csv": "sweep",
    "selected.json": "run",
    "generations.jsonl": "run",
    "figures/*.png": "plot",
    "export/certificate.json": "run",
}
_CONCEPT_STAGE_OF = {
    **{name: stage for name, stage in _STAGE_OF.items() if stage in ("run", "directions", "plot")},
    "attribution.csv": "run",
    "layer_effects.csv": "run",
}
# File name -> heading and caption; the order of the page. Several positions add `_at_<position>`.
_FIGURES = {
    "before_after": (
        "Before and after",
        "How often generated answers express the behaviour, before and after the chosen plan, by "
        "the side of control directions treated the same way. Test split: prompts that "
        "neither made nor chose the direction.",
    ),
    "projections": (
        "Projections of both sets",
        "Each prompt's activation projected on the direction of its own site, set beside set in "
        "each layer; the bars are medians. Values are centred and divided by the layer's pooled "
        "standard deviation, since the stream grows with depth. Validation split, unless the "
        "figure says otherwise.",
    ),
    "separation": (
        "Separation by layer",
        "How well the projections tell the two sets apart, as d′ and as AUC. Held-out prompts. The "
        "grey band is of directions of shuffled labels. A direction that separates well need not be one the model uses: see the sweep.",
    ),
    "cosine_similarity": (
        "Similarity of the directions",
        "Cosine between the directions of every pair of sites in forward order. A block of high "
        "cosines is one direction carried through several layers. Train split.",
    ),
    "attribution": (
        "What writes the direction",
        "The difference of both sets' means along the direction, as the sum of what the embeddings, heads, "
        "experts and MLPs wrote before it. Validation split.",
    ),
    "attribution_map": (
        "What writes the direction, by layer and head",
        "The same terms by place. Validation split.",
    ),
    "layer_effects": (
        "Effects by layer",
        "Each layer's direction ablated or added: log-odds and KL of the next token. Validation split.",
    ),
    "sweep": (
        "The sweep",
        "Each site's direction, ablated everywhere at full strength (behaviour, damage) and added "
        "at its own site, as changes from the unedited model on the same prompts. Hatched: fewer prompts; grey: "
        "failed or not tried; star: the chosen plan's direction. Validation split.",
    ),
    "pareto": (
        "Behaviour against damage",
        "Every finished trial beside the unedited model; on the green line nothing scored on as many prompts is "
        "better on both counts. The behaviour is measured on positive prompts, the damage on negative ones. Validation split.",
    ),
}
# Key of selected.json's test report -> name, prompts, whether it is a rate.
_MEASURES = (
    ("behaviour_before", "behaviour expressed, unedited", "positive", True),
    ("behaviour_after", "behaviour expressed, ablated", "positive", True),
    ("negative_before", "behaviour expressed, unedited", "negative", True),
    ("negative_after", "behaviour expressed, ablated", "negative", True),
    ("addition_after", "behaviour expressed, added", "negative", True),
    ("kl_first_token", "KL to the unedited model, first token (nats)", "negative", False),
    ("kl_continuation", "KL over the baseline's continuation (nats a token)", "negative", False),
    ("perplexity_before", "perplexity, unedited", "negative", False),
    ("perplexity_after", "perplexity, ablated", "negative", False),
    ("repetition_before", "repetition of generated text, unedited", "generated", False),
    ("repetition_after", "repetition of generated text, ablated", "generated", False),
    ("positive_empty_before", "empty answers, unedited", "positive", True),
    ("positive_empty_after", "empty answers, ablated", "positive", True),
    ("positive_no_answer_after", "thoughts without an answer, ablated", "positive", True),
    ("length_before", "length of generated text, unedited (tokens)", "generated", False),
    ("length_after", "length of generated text, ablated (tokens)", "generated", False),
)
_TRIAL_COLUMNS = {
    "trial": "trial",
    "stage": "stage",
    "site": "direction of",
    "edit": "edit",
    "target_log_odds": "behaviour (log-odds)",
    "kl": "KL (nats)",
    "addition": "addition (log-odds)",
    "expression_rate": "expressed",
    "attention_strength": "attention strength",
    "attention_layer": "at layer",
    "mlp_strength": "MLP strength",
    "mlp_layer": "at layer",
    "width": "width",
    "repetition": "repetition",
    "length": "length",
    "seconds": "seconds",
}


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the run folder from what it holds; say what is missing.

    The file is written beside its place and renamed when whole.

    Raises:
        RunError: no such folder, one that cannot be written, or a corrupt file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(
            f"no run folder at {folder}: make one with `interp-ablate run --out {folder}`"
        )
    page = _render(_context(folder))
    path = folder / "report.html"
    # A model can emit half a surrogate pair, which UTF-8 has no bytes for.
    write_atomic(path, page.encode("utf-8", "replace"))
    logger.info("wrote %s", path)
    return path


def _render(context: Mapping[str, Any]) -> str:
    """The page's text. A key that a file lacks reads as None in every filter."""
    from jinja2 import Environment, Undefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for show in (rate, number, duration, plain):
        environment.filters[show.__name__] = lambda value, show=show: show(
            None if isinstance(value, Undefined) else value
        )
    script = _template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = {"page_css": _template("page.css"), "script": script, "script_hash": f"sha256-{digest}"}
    return environment.from_string(_template("report.html.j2")).render({**context, **page})


def _template(name: str) -> str:
    return bundled("templates", name).read_text(encoding="utf-8")


def _context(folder: Path) -> dict[str, Any]:
    """Everything the template shows, as plain data."""
    run = read_json(folder / "run.json") or {}
    selected = read_json(folder / "selected.json")
    certificate = read_json(folder / "export" / "certificate.json")
    directions = read_json(folder / "directions.json") or {}
    configuration = part_of(run, "configuration")
    test, limits = part_of(selected, "test"), part_of(selected, "limits")
    tables = RunTables.read(folder)
    generations, trials = answer_groups(folder), _trials(folder, selected, configuration)
    behaviour = str(
        part_of(run, "contrast").get("name") or configuration.get("contrast") or "the behaviour"
    )
    model = part_of(run, "model").get("name") or configuration.get("model")
    estimated = {**directions, **part_of(run, "directions")}
    concept = bool(run.get("concept"))
    return {
        "title": behaviour[:1].upper() + behaviour[1:] + (f" in {model}" if model else ""),
        "model": part_of(run, "model"),
        "contrast": part_of(run, "contrast"),
        "concept": concept,
        "behaviour": behaviour,
        "headline": headline(behaviour, configuration, selected, certificate, concept=concept),
        "tiles": tiles(test, certificate, configuration),
        "results": [*_results(test), *objective_rows(test)],
        "controls": [
            {**control, "span": ends_text(control.get("interval"), as_rate=True)}
            for control in objects(test.get("controls"))
        ],
        "plans": _plans(selected),
        "trial": part_of(selected, "trial"),
        "rule": (selected or {}).get("rule"),
        "choice": choice_told(run, selected or {}),
        "limits": limits and {**limits, "removed": part_of(limits, "removed")},
        "advice": str(limits.get("relax") or (selected or {}).get("relax") or ""),
        "has_plan": bool((selected or {}).get("plan")),
        "figures": _figures(folder, alt_texts(tables)),
        "charts": report_charts(tables),
        "trials": trials,
        "estimators": _estimators(folder),
        "target_tokens": objects(run.get("target_tokens")),
        "n_directions": estimated.get("count", len(estimated.get("directions") or [])),
        "left_out": part_of(estimated, "left_out"),
        "certificate": certificate,
        "generations": generations,
        "first_pairs": first_pairs(generations or []),
        "configuration": configuration,
        "versions": part_of(run, "versions"),
        "made_by": _made_by(run),
        "stages": [
            (str(name), stage.get("seconds") if isinstance(stage, Mapping) else stage)
            for name, stage in part_of(run, "stages").items()
        ],
        "notes": [str(note) for note in run.get("notes") or []],
        "missing": [
            (n, stage)
            for n, stage in (_CONCEPT_STAGE_OF if run.get("concept") else _STAGE_OF).items()
            if not any(folder.glob(n))
        ],
    }


def _made_by(run: Mapping[str, Any]) -> list[tuple[int, str]]:
    """How many trials were made by which versions, by what differs from the run's; empty where nothing does."""
    makers = objects(run.get("trials_made_by"))
    every = [part_of(maker, "versions") for maker in makers]
    known = [*every, part_of(run, "versions")]
    differ = [k for k in known[-1] if len({one.get(k) for one in known}) > 1]
    return [
        (maker.get("trials", 0), ", ".join(f"{k} {one.get(k, 'none')}" for k in differ))
        for maker, one in zip(makers, every)
        if differ
    ]


def _results(test: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "prompts": prompts,
            "value": (rate if as_rate else number)(test.get(key)),
            "interval": span_text(test, key, as_rate=as_rate),
        }
        for key, name, prompts, as_rate in _MEASURES
        if test.get(key) is not None
    ]


def _plans(selected: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The edits of the ablation and of the addition plan, without their vectors."""
    plans = []
    for key, name in (("plan", "Ablation"), ("addition_plan", "Addition")):
        edits = objects(part_of(selected, key).get("edits"))
        rows = [
            {
                "op": edit.get("op", "?"),
                "amount": _amount(edit),
                "sites": _places(edit.get("sites") or []),
                "positions": edit.get("positions", "all"),
                "label": edit.get("label", ""),
            }
            for edit in edits
        ]
        if rows:
            plans.append({"name": name, "edits": rows})
    return plans


def _amount(edit: Mapping[str, Any]) -> str:
    amounts: list[str] = []
    for key in ("strength", "coefficient", "value", "angle"):
        amount = edit.get(key)
        if isinstance(amount, (list, tuple)) and amount:
            amounts.append(f"{key} {number(min(amount))} to {number(max(amount))}, one a site")
        elif amount is not None and not (key == "value" and amounts and amount == 0):
            amounts.append(f"{key} {number(amount)}")
    return "; ".join(amounts) or "–"


def _places(sites: list[Any]) -> str:
    if len(sites) <= 3:
        return ", ".join(map(str, sites))
    return f"{len(sites)} sites, {sites[0]} to {sites[-1]}"


def _figures(folder: Path, alts: Mapping[str, str]) -> list[dict[str, str]]:
    """Every PNG of the run as a data URI: the ones with a caption first, in the page's order."""
    order = list(_FIGURES)
    figures = []
    for path in sorted((folder / "figures").glob("*.png")):
        if path.name.startswith("."):
            continue
        stem, _, position = path.stem.partition("_at_")
        heading, caption = _FIGURES.get(stem, (path.stem.replace("_", " "), ""))
        content = path.read_bytes()
        if not content.startswith(b"\x89PNG"):
            raise RunError(
                f"{path} is not a PNG: delete it and run `interp-ablate plot {folder}` again"
            )
        place = order.index(stem) if stem in order else len(order)
        figures.append(
            {
                "order": f"{place:03d} {path.name}",
                "heading": heading + (f", position {position}" if position else ""),
                "caption": caption,
                "alt": alts.get(path.stem)
                or heading + (f", position {position}" if position else ""),
                "uri": "data:image/png;base64," + base64.b64encode(content).decode("ascii"),
            }
        )
    return sorted(figures, key=lambda figure: figure["order"])


def _trials(
    folder: Path, selected: Mapping[str, Any] | None, configuration: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The best trials as rows of text, and what failed; None where there is no table."""
    if not (folder / "trials.csv").exists():
        return None
    frame = read_trials(folder / "trials.csv")
    chosen = (
        str(part_of(selected, "trial").get("trial", "")) if (selected or {}).get("plan") else ""
    )
    finished = frame[frame["status"] == "ok"]
    limit = configuration.get("max_kl")
    within = finished["kl"] <= float(limit) if is_number(limit) else finished["kl"].notna()
    ranked = finished.assign(_outside=~within).sort_values(["_outside", "target_log_odds"])
    is_chosen = ranked["trial"].astype(str) == chosen
    top = pd.concat([ranked[is_chosen], ranked[~is_chosen]]).head(TOP_TRIALS)
    top = top.assign(
        site=[f"{row.layer:g}.{row.point}" + (f" [{row.position}]" if row.position else "")
              for row in top.itertuples()]
    )  # fmt: skip
    columns = [
        name for name in (*_TRIAL_COLUMNS, *frame.columns.difference(COLUMNS, sort=False))
        if name in top and not top[name].isna().all() and not (top[name] == "").all()
    ]  # fmt: skip
    rows = [
        {
            "chosen": str(row["trial"]) == chosen,
            "outside": bool(row["_outside"]),
            "cells": [
                (rate if name == "expression_rate" else number)(row[name]) for name in columns
            ],
        }
        for _, row in top.iterrows()
    ]
    failed = frame[frame["status"] == "failed"]
    reasons = failed["reason"].value_counts().to_dict() if "reason" in failed else {}
    return {
        "heads": [_TRIAL_COLUMNS.get(name, name) for name in columns],
        "rows": rows,
        "total": len(frame),
        "failed": len(failed),
        "reasons": {reason or "no reason given": count for reason, count in reasons.items()},
        "limit": limit,
    }


def _estimators(folder: Path) -> dict[str, Any] | None:
    """Every estimator's direction at one site, on the same validation prompts; None without a table."""
    path = folder / "estimators.csv"
    if not path.exists():
        return None
    columns = ("estimator", "auc", "d_prime", "cosine", "left_out", "site", "position")
    table = read_table(path, columns, numbers=("auc", "d_prime", "cosine"))
    rows = table.to_dict("records")
    return (
        {"rows": rows, "site": rows[0]["site"], "position": rows[0]["position"]} if rows else None
    )
