"""Every public plot: it takes axes or makes its own, gives them back, says n and units, and is written in three formats."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import interp_ablate.plots as door
from interp_ablate.errors import RunError
from interp_ablate.plots import style
from interp_ablate.plots.run_figures import RUN_FIGURES, save_figures
from interp_ablate.runs.report_charts import RunTables, alt_texts
from interp_ablate.search.by_layer import COLUMNS as LAYER_SWEEP_COLUMNS
from interp_ablate.stats.correlation import Correlation
from tests.plots.test_plots import (
    TEST,
    make_directions,
    make_projections,
    make_run,
    make_tokens,
    make_trials,
)

LAYERS = range(4)


def attribution() -> pd.DataFrame:
    rows = [
        {"term": f"L{layer}{kind}", "kind": kind, "layer": layer, "module": module, "index": 0,
         "difference": layer - 1.5, "low": layer - 2.0, "high": layer - 1.0, "n": 12}
        for layer in LAYERS for kind, module in (("head", "attn"), ("mlp", "mlp"))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def beside() -> pd.DataFrame:
    head = {"first": "own", "null_low": -0.1, "null_high": 0.1}
    return pd.DataFrame([{**head, "second": f"feature {i}", "cosine": i / 4} for i in LAYERS])


def evaluation() -> pd.DataFrame:
    rows = []
    for measure, unit in (("expressions", "share"), ("perplexity", "perplexity"), ("KL", "nats")):
        row: dict[str, Any] = {"measure": measure, "on": "prompts", "unit": unit, "n": 12}
        for name, value in (("before", 0.6), ("after", 0.4), ("difference", -0.2)):
            row |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
        rows.append(row)
    return pd.DataFrame(rows)


def mean(value: float, n: int = 12) -> dict[str, Any]:
    return {"mean": value, "interval": [value - 0.01, value + 0.01], "n": n}


HEALED = {
    "measured": {
        name: {"behaviour": mean(rate), "kl_first_token": mean(kl), "kl_continuation": mean(0.2 - kl)}
        for name, rate, kl in (("original", 0.7, 0.0), ("edited", 0.0, 0.03), ("healed", 0.06, 0.05))
    },
    "healed_minus_edited": {
        "behaviour": {"mean": 0.06, "interval": [0.01, 0.11]},
        "kl_first_token": {"mean": 0.02, "interval": [0.01, 0.03]},
        "kl_continuation": {"mean": -0.02, "interval": [-0.03, -0.01]},
    },
}  # fmt: skip
TRAINED = {
    "conditions": {name: {"score": mean(40), "projection": mean(1)} for name in ("before", "plain")}
}


def persona_table(**columns: Any) -> pd.DataFrame:
    ends = {f"{value}_{end}": 40.0 for value in ("score", "coherence") for end in ("low", "high")}
    row = {
        "condition": "persona",
        "score": 50.0,
        "coherence": 80.0,
        "answers": 12,
        "questions": 12,
        "chosen": "False",
        **ends,
    }
    return pd.DataFrame([{**row, **{k: v[i] for k, v in columns.items()}} for i in range(3)])


def readout() -> pd.DataFrame:
    head = {
        "r": 0.5,
        "r_low": 0.3,
        "r_high": 0.6,
        "answers": 24,
        "questions": 12,
        "chosen": "False",
    }
    return pd.DataFrame([{"layer": layer, **head} for layer in LAYERS])


def layer_sweep_rows() -> pd.DataFrame:
    head = dict.fromkeys(LAYER_SWEEP_COLUMNS, 0.1)
    names = {
        "point": "resid_post",
        "edit": "ablate",
        "where": "site",
        "score": "kl_first_token",
        "on": "positive",
    }
    return pd.DataFrame([{**head, **names, "layer": i, "n": 12, "n_shuffled": 3} for i in LAYERS])


def monitored() -> Any:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"level": [0, 1] * 6, "projection": rng.normal(size=12), "score": rng.normal(size=12)}
    )
    r = Correlation(0.5, 0.1, 0.8, 12, "bootstrap")
    return SimpleNamespace(
        table=table, overall=r, within=r, across=r, no_verdict=0, details={"site": "blocks.3.hook_resid_post"},
        control={"overall": 0.3, "within": 0.3, "across": None},
    )  # fmt: skip


def trials() -> pd.DataFrame:
    frame = make_trials(4, n_refine=8)
    return frame.assign(edit="band", expression_rate=0.5, positive_repetition=0.1)


TOKENS = [(SimpleNamespace(text=f" w{i}"), float(i)) for i in range(5)]
EXAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "attribution_bars": (attribution(), {}),
    "attribution_map": (attribution(), {}),
    "before_after": (TEST, {}),
    "cosines_beside": (beside(), {}),
    "cosine_similarity": (make_directions(4), {}),
    "evaluation_changes": (evaluation(), {}),
    "evaluation_divergences": (evaluation(), {}),
    "evaluation_shares": (evaluation(), {}),
    "layer_effects": (layer_sweep_rows(), {}),
    "monitoring_scatter": (monitored(), {}),
    "pareto": (trials(), {"n": 32}),
    "projections": (make_projections(4).query("point == 'resid_mid'"), {}),
    "readout_by_layer": (readout(), {}),
    "recovery_cost": (HEALED, {}),
    "screening_histogram": (np.linspace(0, 3, 12), {"threshold": 2.0}),
    "search_front": (trials(), {"n": 32}),
    "separation_by_layer": (make_directions(4), {}),
    "steering_by_layer": (persona_table(layer=[1, 2, 3], coefficient=[1, 1, 1]), {}),
    "steering_curve": (persona_table(coefficient=[-1, 0, 1]), {}),
    "sweep_heatmap": (trials(), {"value": "target_log_odds"}),
    "token_heatmap": (make_tokens(8, 3), {}),
    "token_strip": (TOKENS, {"title": "an answer", "limit": 3.0}),
    "trait_after_training": (TRAINED, {}),
}  # fmt: skip
# what a value is of: on an axis, or on the bar of the colours
UNIT = re.compile(
    r"nats|log-odds|SDs|percent|share|units? of|unit of|0 to 100|cosine|Pearson|lengths|projection|at the site",
    re.I,
)


def test_the_registry_has_every_public_plot():
    takes_axes = {
        name
        for name in door.__all__
        if callable(getattr(door, name))
        and "ax" in inspect.signature(getattr(door, name)).parameters
    }
    assert takes_axes == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_plot_takes_axes_says_n_and_units_and_is_written(name: str, tmp_path: Path) -> None:
    draw, (data, options) = getattr(door, name), EXAMPLES[name]
    assert inspect.signature(draw).parameters["ax"].default is None
    figure = Figure(figsize=(7.8, 4.0), dpi=30)
    ax = figure.add_subplot()
    assert draw(data, ax, **options) is ax
    texts = [text.get_text() for text in ax.texts]
    assert re.search(r"\bn = \d", " ".join(texts)), f"{name} says no n: {texts}"
    labels = [label for each in figure.axes for label in (each.get_xlabel(), each.get_ylabel())]
    assert any(UNIT.search(text) for text in [*labels, *texts]), f"{name} has no unit: {labels}"
    assert ax.get_title(loc="left")
    for form in style.FORMATS:
        assert style.save_figure(figure, tmp_path / f"{name}.{form}").stat().st_size > 500


def test_a_plot_without_axes_makes_its_own() -> None:
    from matplotlib import pyplot

    for name, (data, options) in EXAMPLES.items():
        ax = getattr(door, name)(data, **options)
        assert isinstance(ax, Axes) and pyplot.fignum_exists(ax.get_figure().number), name
        pyplot.close("all")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_plot_that_fails_leaves_no_figure_open(name: str) -> None:
    """Whatever it is given: nothing, no rows, text or infinities for numbers; what is said of a table is ours."""
    from matplotlib import pyplot

    data, options = EXAMPLES[name]
    bad: list[Any] = [None, 3, {}, pd.DataFrame()]
    if isinstance(data, pd.DataFrame):
        numbers = list(data.select_dtypes("number"))
        bad += [data.assign(**dict.fromkeys(numbers, value)) for value in ("x", math.inf, math.nan)]
    failed = 0
    for given in bad:
        try:
            getattr(door, name)(given, **options)
        except Exception:
            failed += 1
            assert not pyplot.get_fignums()
        pyplot.close("all")
    assert failed


@pytest.mark.parametrize("value", [math.inf, math.nan, 10**20, 1.5, "x"])
def test_layers_and_counts_are_whole_numbers(value: Any) -> None:
    for name, column in (
        ("attribution_bars", "n"), ("attribution_map", "layer"), ("attribution_map", "index"),
        ("layer_effects", "layer"), ("readout_by_layer", "layer"), ("steering_by_layer", "layer"),
        ("steering_curve", "questions"), ("sweep_heatmap", "layer"), ("projections", "layer"),
    ):  # fmt: skip
        data, options = EXAMPLES[name]
        changed = data.assign(**{column: value})
        if name == "attribution_map" and column == "layer" and value != value:
            continue  # an embedding's
        with pytest.raises(RunError, match=f"under {column}, where a whole number belongs"):
            getattr(door, name)(changed, Figure().add_subplot(), **options)


def test_every_figure_of_the_report_says_what_is_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    attribution().to_csv(run / "attribution.csv", index=False)
    layer_sweep_rows().to_csv(run / "layer_effects.csv", index=False)
    (run / "circuit").mkdir()
    beside().to_csv(run / "circuit" / "beside.csv", index=False)
    more = trials().assign(stage="search")
    pd.concat([pd.read_csv(run / "trials.csv"), more]).to_csv(run / "trials.csv", index=False)
    stems = {path.stem for path in save_figures(run, dpi=20)}
    assert stems >= {
        "attribution",
        "beside",
        "attribution_map",
        "layer_effects",
        "search",
        "sweep",
        "tokens",
    }
    alts = alt_texts(RunTables.read(run))
    assert stems - set(alts) == set()
    assert all(len(text) > 40 for text in alts.values())
    assert len(RUN_FIGURES) == 11  # a new one is added above


@pytest.mark.parametrize(
    ("measure", "said", "worse"),
    [("kl_first_token", "0.050, worse", True), ("kl_continuation", "0.150, better", False),
     ("behaviour", "0.06, worse", True)],
)  # fmt: skip
def test_what_healing_made_worse_is_drawn_as_worse(measure: str, said: str, worse: bool) -> None:
    ax = door.recovery_cost(HEALED, Figure().add_subplot(), measure=measure)
    assert said in [text.get_text() for text in ax.texts]
    assert (ax.lines[-1].get_color() == style.POSITIVE) is worse
    unclear = {**HEALED, "healed_minus_edited": {measure: {"mean": 0.0, "interval": [-1, 1]}}}
    ax = door.recovery_cost(unclear, Figure().add_subplot(), measure=measure)
    assert "no clear change" in ax.texts[-2].get_text() + ax.texts[-1].get_text()
    unknown = {"measured": HEALED["measured"]}
    ax = door.recovery_cost(unknown, Figure().add_subplot(), measure=measure)
    assert not any("," in text.get_text() for text in ax.texts if "n =" not in text.get_text())
