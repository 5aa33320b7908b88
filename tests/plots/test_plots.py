"""Pictures: what each draws, what it refuses, and that a run folder becomes PNG files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from interp_ablate.directions.direction import Direction, Separation
from interp_ablate.directions.direction_set import Directions
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.plots import run_figures, style
from interp_ablate.plots.directions import (
    PROJECTION_COLUMNS,
    cosine_similarity,
    projections,
    separation_by_layer,
    standardised_projections,
)
from interp_ablate.plots.evaluation import before_after
from interp_ablate.plots.run_figures import save_figures
from interp_ablate.plots.tokens import token_heatmap
from interp_ablate.plots.trials import pareto, search_front, sweep_heatmap
from interp_ablate.search.trial_table import TRIAL_COLUMNS
from interp_ablate.sites import Point, Site
from interp_ablate.storage.tables import read_lines

POINTS: tuple[Point, ...] = ("resid_pre", "resid_mid", "resid_post")
ALL_FIGURES = {
    "projections.png", "separation.png", "cosine_similarity.png", "sweep.png", "pareto.png",
    "before_after.png", "tokens.png",
}  # fmt: skip


def strength(layer: int, point: str, n_layers: int = 30) -> float:
    """How far apart the two sets are, in SDs: rising in the middle, a little lower at the end."""
    depth = (layer + POINTS.index(point) / 3) / n_layers
    return 0.4 + 5.5 * math.exp(-(((depth - 0.68) / 0.24) ** 2))


def make_projections(n_layers: int = 30, n: int = 32, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    blocks = []
    for layer in range(n_layers):
        for point in POINTS:
            if (layer, point) == (0, "resid_pre"):
                continue  # left out: a zero difference
            scale = 0.5 * 1.22**layer
            for split, count in (("train", 2 * n), ("validation", n)):
                for label, sign in (("positive", 0.5), ("negative", -0.5)):
                    values = rng.normal(sign * strength(layer, point, n_layers), 1, count)
                    if label == "positive":
                        values -= 2.5 * (rng.random(count) < 0.1)  # some requests look answerable
                    blocks.append(
                        pd.DataFrame(
                            {
                                "layer": layer,
                                "point": point,
                                "split": split,
                                "label": label,
                                "prompt": [f"p{index}" for index in range(count)],
                                "projection": scale * (values + 3),
                            }
                        )
                    )
    return pd.concat(blocks, ignore_index=True)


def make_directions(n_layers: int = 30, d_model: int = 48, seed: int = 0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(d_model, generator=generator, dtype=torch.float64)
    items = []
    for layer in range(n_layers):
        for point in POINTS:
            vector = vector + 0.3 * torch.randn(d_model, generator=generator, dtype=torch.float64)
            gap = strength(layer, point, n_layers)
            auc = 0.5 * (1 + math.erf(gap / 2))
            if (layer, point) != (0, "resid_pre"):
                items.append(
                    Direction(
                        vector,
                        0.4 * 1.2**layer,
                        Site(layer, point),
                        separation=Separation(auc, gap),
                    )
                )
    return Directions(tuple(items), {"blocks.0.hook_resid_pre[-1]": "the difference is zero"})


def make_trials(n_layers: int = 30, n_refine: int = 120, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(n_layers):
        for point in POINTS:
            gap = strength(layer, point, n_layers)
            rows.append(
                {
                    "stage": "screen", "layer": layer, "point": point, "operation": "ablate",
                    "target_log_odds": 3 - 2.2 * gap + rng.normal(0, 0.6),
                    "addition": -7 + 1.9 * gap + rng.normal(0, 0.6),
                    "kl": float(np.exp(rng.normal(-1.6 + 0.25 * gap, 0.5))),
                }
            )  # fmt: skip
    for _ in range(n_refine):
        power = rng.random()
        rows.append(
            {
                "stage": "refine", "layer": 25, "point": "resid_mid", "operation": "band",
                "attention_strength": 0.4 + power, "attention_layer": rng.integers(15, 29),
                "mlp_strength": 0.3 + power, "mlp_layer": rng.integers(10, 29),
                "width": rng.integers(4, 20), "addition": 3.0,
                "target_log_odds": 3 - 13 * power ** 0.5 + rng.normal(0, 1.3),
                "kl": float(np.exp(-4.4 + 3.2 * power + rng.normal(0, 0.6))),
            }
        )  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.insert(0, "trial", range(len(frame)))
    frame = frame.assign(
        position="-1", status="ok", reason="", seconds=0.9, repetition=np.nan, length=np.nan,
        expression_rate=np.nan, target_log_odds_baseline=2.0, addition_baseline=-6.0, prompts=np.nan,
    )  # fmt: skip
    screen = frame["stage"] == "screen"
    few = screen & (frame["layer"] % 3 != 0)
    frame.loc[screen, "prompts"] = 32.0
    frame.loc[few, ["prompts", "target_log_odds_baseline", "addition_baseline"]] = [3.0, 0.5, -4.0]
    finalists = frame[frame["stage"] == "refine"].nsmallest(8, "target_log_odds").index
    frame.loc[finalists, "expression_rate"] = np.linspace(0, 0.2, len(finalists))
    failed = frame.index[[0, min(44, len(frame) - 1)]]
    frame.loc[failed, ["target_log_odds", "addition", "kl"]] = np.nan
    frame.loc[failed, "status"] = "failed"
    frame.loc[failed, "reason"] = "no direction: the difference is zero"
    return frame


TEST: dict[str, Any] = {
    "behaviour_before": 0.81, "behaviour_after": 0.02, "negative_before": 0.0,
    "negative_after": 0.0, "addition_after": 0.72, "kl_first_token": 0.04,
    "intervals": {
        "behaviour_before": [0.69, 0.91], "behaviour_after": [0.0, 0.06],
        "negative_before": [0, 0], "addition_after": [0.58, 0.84], "kl_first_token": [0.02, 0.07],
    },
    "n": {"positive": 32, "negative": 30},
    "controls": [
        {"name": "random 0", "behaviour_after": 0.66, "kl_first_token": 0.1},
        {"name": "random 1", "behaviour_after": 0.75, "kl_first_token": 0.08},
        {"name": "shuffled labels", "behaviour_after": 0.7, "kl_first_token": 0.05},
    ],
}  # fmt: skip


def make_run(folder: Path, n_layers: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    make_projections(n_layers, n=32 if n_layers > 3 else 6).to_csv(
        folder / "projections.csv", index=False
    )
    make_directions(n_layers).save(folder / "directions.safetensors")
    make_tokens(12, n_layers).to_csv(folder / "tokens.csv", index=False)
    trials = make_trials(n_layers)
    trials.to_csv(folder / "trials.csv", index=False)
    good = trials[(trials["status"] == "ok") & (trials["kl"] <= 0.1)]
    chosen = json.loads(good.loc[good["target_log_odds"].idxmin()].to_json())
    selected = {"plan": {"format": "x", "edits": []}, "trial": chosen, "test": TEST}
    (folder / "selected.json").write_text(json.dumps(selected))
    (folder / "run.json").write_text(json.dumps({"configuration": {"max_kl": 0.1}}))
    return folder


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels and no layout engine, which is most of the time: what is drawn is the same."""
    monkeypatch.setattr(
        style, "new_figure", lambda *, height, width=8: Figure(figsize=(width, height), dpi=30)
    )


@pytest.fixture
def ax():
    return Figure().add_subplot()


def lines_of(ax, label: str):
    return next(line for line in ax.lines if line.get_label() == label)


def everything_said(ax) -> str:
    texts = [
        ax.get_title(loc="left"),
        ax.get_xlabel(),
        ax.get_ylabel(),
        *(t.get_text() for t in ax.texts),
    ]
    legend = ax.get_legend()
    texts += [t.get_text() for t in legend.get_texts()] if legend else []
    return " | ".join(" ".join(text.split()) for text in texts)


# Projections


def test_projections_draw_distributions_of_the_validation_split(ax):
    frame = make_projections(4)
    rows = frame[frame["point"] == "resid_mid"]
    assert projections(rows, ax) is ax
    assert len(ax.collections) == 16  # dots and a box of quartiles, a layer and set
    dots = [c for c in ax.collections if len(c.get_offsets()) == 32]
    drawn = np.sort(dots[0].get_offsets()[:, 1])
    first = rows[(rows["layer"] == 0) & (rows["split"] == "validation")]
    np.testing.assert_allclose(drawn, np.sort(standardised_projections(first)[0]))
    said = everything_said(ax)
    assert "resid_mid" in said and "pooled SDs" in said
    assert "validation split, n = 32 positive + 32 negative prompts" in said and "quartiles" in said


def test_projections_of_many_prompts_are_half_violins(ax):
    frame = make_projections(4, n=60)
    projections(frame[frame["point"] == "resid_mid"], ax)
    assert len(ax.collections) == 8 and "quartiles" not in everything_said(ax)


def test_projections_read_alike_however_large_the_stream_is(ax):
    frame = make_projections(4)
    rows = frame[frame["point"] == "resid_mid"]
    projections(rows, ax)
    other = projections(
        rows.assign(projection=rows["projection"] * 1e4 + 7e5), Figure().add_subplot()
    )
    assert other.get_ylim() == pytest.approx(ax.get_ylim(), rel=1e-6)


def test_the_gap_of_a_pair_is_its_d_prime():
    frame = make_projections(4)
    frame = frame[(frame["split"] == "train") & (frame["point"] == "resid_mid")]
    rows = frame[frame["layer"] == 2]
    groups = [rows["projection"][rows["label"] == name] for name in ("negative", "positive")]
    spread = math.sqrt(np.mean([group.var() for group in groups]))
    negative, positive = standardised_projections(rows)
    expected = (groups[1].mean() - groups[0].mean()) / spread
    assert positive.mean() - negative.mean() == pytest.approx(expected)


@pytest.mark.parametrize("column", [c for c in PROJECTION_COLUMNS if c != "split"])
def test_projections_name_a_missing_column(ax, column):
    with pytest.raises(RunError, match=f"column {column}"):
        projections(make_projections(1).drop(columns=column), ax)


def test_projections_refuse_mixed_points_and_positions(ax):
    frame = make_projections(2)
    with pytest.raises(RunError, match="resid_mid"):
        projections(frame, ax)
    one = frame[frame["point"] == "resid_mid"]
    both = pd.concat([one.assign(position="-1"), one.assign(position="-2")])
    with pytest.raises(RunError, match="position"):
        projections(both, ax)


def test_projections_without_rows_or_known_labels(ax):
    frame = make_projections(2)
    frame = frame[frame["point"] == "resid_mid"]
    with pytest.raises(RunError, match="no projections"):
        projections(frame.iloc[:0], ax)
    with pytest.raises(RunError, match="no projections"):
        projections(frame.assign(projection=np.nan), ax)
    with pytest.raises(RunError, match="unknown labels"):
        projections(frame.assign(label="other"), ax)


def test_projections_survive_constants_one_prompt_one_label_and_nan(ax):
    def row(layer, label, value):
        return {"layer": layer, "point": "resid_post", "split": "validation", "label": label,
                "prompt": "p", "projection": value}  # fmt: skip

    rows = [row(0, "positive", 2.0), row(0, "negative", 2.0)]  # the same constant
    rows += [row(1, "positive", 3.0), row(1, "negative", 1.0)]  # constants that differ
    rows += [row(2, "positive", 5.0)]  # one label only
    rows += [row(3, "positive", value) for value in (1.0, np.nan, 2.0)]
    rows += [row(3, "negative", -1.0)]
    projections(pd.DataFrame(rows), ax)
    assert np.isfinite(ax.get_ylim()).all()
    ax.figure.canvas.draw()


def test_a_far_outlier_does_not_flatten_the_rest(ax):
    frame = make_projections(4, n=100)
    frame = frame[frame["point"] == "resid_mid"].reset_index(drop=True)
    place = frame.index[frame["split"] == "validation"][0]
    frame.loc[place, "projection"] += 1e4
    projections(frame, ax)
    assert "1 values beyond the frame" in everything_said(ax)
    assert max(ax.get_ylim()) < 40


def test_projections_fall_back_to_the_split_there_is_and_say_so(ax):
    frame = make_projections(2)
    train = frame[(frame["split"] == "train") & (frame["point"] == "resid_mid")]
    projections(train, ax)
    assert "train split" in everything_said(ax)


# Directions


@pytest.mark.parametrize("measure", ["d_prime", "auc"])
def test_separation_has_one_line_a_site_kind(ax, measure):
    directions = make_directions(6)
    separation_by_layer(directions, ax, measure=measure)
    line = lines_of(ax, "resid_mid")
    assert list(line.get_xdata()) == list(range(6))
    wanted = [
        getattr(directions[Site(layer, "resid_mid")].separation, measure) for layer in range(6)
    ]
    assert list(line.get_ydata()) == wanted
    assert [line.get_label() for line in ax.lines[:2]] == ["resid_mid", "resid_post"]
    assert "n = 12 directions" in everything_said(ax)


def test_separation_stands_before_the_band_of_its_controls(ax):
    rows = [
        {"layer": layer, "point": point, "position": "-1", "control": i, "auc": 0.5 + 0.1 * i,
         "d_prime": i - 1.0 + layer, "positive": 9, "negative": 7}
        for layer in range(6) for point in POINTS for i in range(3)
    ]  # fmt: skip
    separation_by_layer(make_directions(6), ax, controls=pd.DataFrame(rows))
    band = ax.collections[0].get_paths()[0].vertices
    at_two = band[band[:, 0] == 2][:, 1]
    # of layer 2 are drawn resid_mid and resid_post, and not resid_pre of layer 3, which is the latter again
    assert (at_two.min(), at_two.max()) == (1.0, 3.0)
    said = everything_said(ax).replace("\n", " ")
    assert "n = 9 positive + 7 negative" in said and "3 shuffles of the labels" in said
    with pytest.raises(RunError, match=r"lack the columns? .*control"):
        separation_by_layer(make_directions(2), ax, controls=pd.DataFrame({"layer": [0]}))


def test_one_place_of_the_stream_is_drawn_once():
    every = [(layer, point, "-1") for layer in range(3) for point in POINTS]
    drawn = style.drawn_places(every)
    assert drawn[1, "resid_pre", "-1"] is None and drawn[2, "resid_pre", "-1"] is None
    assert drawn[0, "resid_pre", "-1"] == (-1, "resid_post", "-1")  # nothing else shows it
    assert all(drawn[p] == p for p in every if p[1] != "resid_pre")
    some = style.drawn_places(
        [(2, "resid_pre", "-1"), (2, "resid_post", "-1"), (1, "resid_post", "-2")]
    )
    assert some[2, "resid_pre", "-1"] == (
        1,
        "resid_post",
        "-1",
    )  # the other position is another place
    alone = [(layer, "resid_pre", "-1") for layer in range(3)]
    assert style.drawn_places(alone) == {place: place for place in alone}
    rows = pd.DataFrame(every, columns=["layer", "point", "position"]).assign(number=range(9))
    kept = style.distinct_rows(rows)
    assert list(kept["number"]) == [0, 1, 2, 4, 5, 7, 8] and kept["layer"].iloc[0] == -1


def test_the_stream_before_layer_0_has_a_name(ax):
    style.set_layer_axis(ax, [-1, 0, 1])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["pre 0", "0", "1"]


def test_a_long_caption_is_broken_and_not_squeezed():
    figure = Figure(figsize=(7.8, 3.0), layout="constrained")
    ax = figure.add_subplot()
    style.finish_axes(ax, "title", "word " * 60, "layer", "units")
    figure.savefig(io.BytesIO())
    assert ax.get_position().width > 0.8
    assert all(len(line) < 100 for line in ax.texts[0].get_text().split("\n"))


def test_separation_tells_positions_apart_and_leaves_gaps_at_infinity(ax):
    vector = torch.ones(4)
    items = [
        Direction(vector, 1.0, Site(layer, "resid_post"), position, separation=Separation(1.0, d))
        for position in ("-1", "-2")
        for layer, d in enumerate((1.0, math.inf, 2.0))
    ]
    separation_by_layer(items, ax)
    first, second = (lines_of(ax, f"resid_post at {where}") for where in ("-1", "-2"))
    assert first.get_linestyle() != second.get_linestyle()
    assert np.isnan(first.get_ydata()[1])


def test_separation_needs_some(ax):
    item = Direction(torch.ones(4), 1.0, Site(0, "resid_post"))
    for nothing in ([], [item]):
        with pytest.raises(RunError, match="no direction has a separation"):
            separation_by_layer(nothing, ax)
    with pytest.raises(RunError, match="unknown measure"):
        separation_by_layer([item], ax, measure="accuracy")  # type: ignore[arg-type]


@pytest.mark.parametrize("plot", [separation_by_layer, cosine_similarity])
def test_a_mixture_of_estimators_is_refused(plot, ax):
    vectors, site = torch.eye(4), Site(0, "resid_post")
    both = [Direction(vectors[i], 1.0, site, method=name) for i, name in enumerate(("lda", "pca"))]
    with pytest.raises(RunError, match=r"directions are of lda, pca: pass directions.of\('lda'\)"):
        plot(both, ax)


def test_cosine_is_a_matrix_in_forward_order(ax):
    directions = make_directions(5)
    shuffled = list(directions)[::-1]
    cosine_similarity(shuffled, ax)
    once = [
        d for d in directions if d.site.point != "resid_pre"
    ]  # that of layer 0 is left out anyhow
    vectors = torch.stack([item.vector for item in once])
    drawn = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(drawn, (vectors @ vectors.T).numpy(), atol=1e-12)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2", "3", "4"]
    assert list(ax.get_xticks()) == [0, 2, 4, 6, 8]
    assert "n = 10 sites" in everything_said(ax)


def test_cosine_of_several_positions_and_of_none(ax):
    one = list(make_directions(2))
    moved = [Direction(d.vector, d.norm, d.site, "-2") for d in one]
    cosine_similarity(moved + one, ax)
    assert "positions -1, -2" in everything_said(ax)
    assert len(ax.lines) == 2  # the borders of the blocks
    with pytest.raises(RunError, match="no directions"):
        cosine_similarity([], Figure().add_subplot())


# Trials


@pytest.mark.parametrize("value", ["target_log_odds", "kl", "addition"])
def test_heatmap_puts_each_change_in_its_cell(ax, value):
    trials = make_trials(5)
    sweep_heatmap(trials, ax, value=value)
    grid = np.ma.filled(ax.images[0].get_array(), np.nan)
    screen = trials[trials["stage"] == "screen"].set_index(["layer", "point"])
    before = 0.0 if value == "kl" else screen.loc[(3, "resid_mid"), f"{value}_baseline"]
    # resid_pre of layer 0, which failed, has a row of its own; those of the others are the resid_post before
    assert grid.shape == (6, 2)
    assert grid[4, 0] == screen.loc[(3, "resid_mid"), value] - before
    assert np.isnan(grid[0]).all()
    assert "10 of 12 sites" in everything_said(ax)
    assert "n = 32, 3 ///" in everything_said(ax)
    hatched = {
        (round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in ax.patches if p.get_hatch()
    }
    assert hatched == {(layer + 1, column) for layer in (1, 2, 4) for column in (0, 1)}
    if value != "kl":
        low, high = ax.images[0].get_clim()
        assert low == -high  # the unedited model is in the middle of the colours


def test_the_same_effect_on_few_and_on_all_prompts_looks_the_same(ax):
    trials = make_trials(2, n_refine=0).assign(status="ok", kl=0.1, addition=0.0)
    trials["target_log_odds"] = trials["target_log_odds_baseline"] - 1.5
    sweep_heatmap(trials, ax, value="target_log_odds")
    assert np.unique(ax.images[0].get_array().compressed()).tolist() == [-1.5]
    with pytest.raises(RunError, match="column target_log_odds_baseline"):
        sweep_heatmap(trials.drop(columns="target_log_odds_baseline"), ax, value="target_log_odds")


def test_heatmap_marks_the_chosen_plan_and_no_other(ax):
    trials = make_trials(5)
    sweep_heatmap(trials, ax, value="target_log_odds")
    assert not ax.lines  # the strongest effect may be a broken model's
    chosen = {"layer": 3, "point": "resid_pre", "position": "-1"}
    sweep_heatmap(trials, ax, value="target_log_odds", selected=chosen)
    star = lines_of(ax, "the chosen plan's direction")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1, 3)  # resid_post of layer 2


def test_heatmap_has_a_column_for_each_position(ax):
    trials = make_trials(2, n_refine=0)
    both = pd.concat([trials, trials.assign(position=-2)])
    sweep_heatmap(both, ax, value="kl")
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels[0] == "resid_mid\n-1" and labels[-1] == "resid_post\n-2"


def test_heatmap_of_failures_only_is_blank(ax):
    trials = make_trials(3).assign(status="failed", target_log_odds=np.nan, kl=np.nan)
    for value in ("target_log_odds", "kl"):
        sweep_heatmap(trials, Figure().add_subplot(), value=value)
    sweep_heatmap(trials, ax, value="target_log_odds")
    assert "0 of 8 sites" in everything_said(ax)
    ax.figure.canvas.draw()


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_heatmap_of_equal_or_zero_kl(ax, kl):
    sweep_heatmap(make_trials(3).assign(kl=kl, status="ok"), ax, value="kl")
    ax.figure.canvas.draw()


def test_trials_refuse_what_they_cannot_draw(ax):
    trials = make_trials(2)
    with pytest.raises(RunError, match="unknown value"):
        sweep_heatmap(trials, ax, value="loss")  # type: ignore[arg-type]
    with pytest.raises(RunError, match="no screening trials"):
        sweep_heatmap(trials[trials["stage"] == "refine"], ax, value="kl")
    with pytest.raises(RunError, match="unknown point 'middle'"):
        sweep_heatmap(trials.assign(point="middle"), ax, value="kl")
    with pytest.raises(RunError, match="no finished trials"):
        pareto(trials.assign(status="failed"), ax)
    for column in TRIAL_COLUMNS:
        with pytest.raises(RunError, match=f"column {column}"):
            pareto(trials.drop(columns=column), ax)
        with pytest.raises(InterpAblateError, match=f"column {column}"):
            sweep_heatmap(trials.drop(columns=column), ax, value="kl")


def test_no_trial_on_all_prompts_beats_the_pareto_front(ax):
    trials = make_trials()
    pareto(trials, ax)
    front = np.column_stack(lines_of(ax, "Pareto front").get_data())
    whole = trials[(trials["status"] == "ok") & trials["prompts"].isna()]
    good = whole.assign(change=whole["target_log_odds"] - 2.0)[["kl", "change"]].to_numpy()
    for kl, behaviour in front:
        better = (good <= (kl, behaviour)).all(1) & (good < (kl, behaviour)).any(1)
        assert not better.any()
    for point in good:  # and every trial is on it or beaten by one on it
        assert (front <= point).all(1).any()


def test_pareto_counts_what_it_leaves_out_and_marks_the_choice(ax):
    trials = make_trials()
    trials.loc[trials.index[-1], "kl"] = np.nan
    chosen = {"trial": 7, "kl": 0.04, "target_log_odds": -8.0, "target_log_odds_baseline": 2.0}
    pareto(trials, ax, selected=chosen, max_kl=0.1, n=40)
    said = everything_said(ax).replace("\n", " ")
    assert "n = 40 prompts a side" in said and "207 of 210 trials; 3 failed or NaN" in said
    assert "limit: KL 0.1" in said and "finalist" in said
    assert "one site's direction, n = 3 " in said and "strengths per layer, n = 40 " in said
    star = lines_of(ax, "chosen: trial 7")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.04, -10.0)
    assert ax.get_xscale() == "log"
    unedited = lines_of(ax, "unedited model (KL 0)")
    assert unedited.get_ydata() == [0.0] or list(unedited.get_ydata()) == [0.0]
    beyond = lines_of(ax, "Pareto front, over the limit")
    assert beyond.get_linestyle() == ":" and min(beyond.get_xdata()) > 0.1
    assert max(lines_of(ax, "Pareto front").get_xdata()) <= 0.1


def test_pareto_takes_a_zero_kl_and_a_choice_without_scores(ax):
    trials = make_trials(2).assign(kl=0.0, status="ok").drop(columns="expression_rate")
    pareto(trials.fillna({"target_log_odds": 0.0}), ax, selected={"trial": 1, "kl": None}, max_kl=0)
    ax.figure.canvas.draw()
    assert "chosen" not in everything_said(ax)
    with pytest.raises(RunError, match="not numbers"):
        pareto(
            make_trials(2),
            Figure().add_subplot(),
            selected={"kl": "low", "target_log_odds": 1.0, "target_log_odds_baseline": 0.0},
        )


# The test report


def test_before_after_draws_rates_controls_and_intervals(ax):
    before_after(TEST, ax)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[0] == "positive prompts, unedited" and labels[-1] == "negative prompts, added"
    assert labels[2:5] == [f"control: {c['name']}, ablated" for c in TEST["controls"]]
    values = [text.get_text() for text in ax.texts]
    assert "0.81" in values and "0.72" in values
    assert [0.69, 0.91] in [list(line.get_xdata()) for line in ax.lines]
    assert "95%" in everything_said(ax) and "n = 32 positive + 30 negative" in everything_said(ax)


def test_before_after_takes_what_there_is(ax):
    before_after({"behaviour_before": 0.5, "intervals": None, "controls": None}, ax)
    assert len(ax.get_yticklabels()) == 1 and "no intervals" in everything_said(ax)
    with pytest.raises(RunError, match="no rate to draw"):
        before_after({"kl_first_token": 0.1, "behaviour_before": math.nan}, ax)
    with pytest.raises(RunError, match="not a rate"):
        before_after({"behaviour_before": "most"}, ax)
    with pytest.raises(RunError, match="not a rate"):
        before_after({"behaviour_before": 1, "intervals": {"behaviour_before": [0.1]}}, ax)


# The folder


def test_a_run_folder_becomes_figures(tmp_path, monkeypatch):
    monkeypatch.undo()  # as a user has them
    run = make_run(tmp_path / "run", 3)
    written = save_figures(run)
    assert {path.name for path in written} == ALL_FIGURES
    assert {path.name for path in (run / "figures").iterdir()} == ALL_FIGURES  # nothing temporary
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_one_layer_draws_all_the_same(tmp_path):
    assert len(save_figures(make_run(tmp_path / "run", 1))) == len(ALL_FIGURES)


def test_pyplot_is_left_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    save_figures(make_run(tmp_path / "run", 1))
    assert plt.get_fignums() == before


def test_positions_get_a_file_each(tmp_path):
    frame = make_projections(2, n=4)
    both = pd.concat([frame.assign(position="mean of/response"), frame.assign(position=-1)])
    both.to_csv(tmp_path / "projections.csv", index=False)
    names = [path.name for path in save_figures(tmp_path)]
    assert names == ["projections.png", "projections_at_mean_of_response.png"]


@pytest.mark.parametrize(
    ("missing", "figures"),
    [
        ("projections.csv", {"projections.png"}),
        ("directions.safetensors", {"separation.png", "cosine_similarity.png"}),
        ("trials.csv", {"sweep.png", "pareto.png"}),
        ("selected.json", {"before_after.png"}),
        ("run.json", set()),
    ],
)
def test_what_has_no_data_is_skipped(tmp_path, missing, figures):
    run = make_run(tmp_path / "run", 1)
    (run / missing).unlink()
    assert {path.name for path in save_figures(run)} == ALL_FIGURES - figures


def test_a_plot_of_another_package(tmp_path, monkeypatch):
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[interp_ablate.plots]\nnorms = outside_plots:norms\n")
    (tmp_path / "outside_plots.py").write_text(
        "from interp_ablate.directions import Directions\n"
        "from interp_ablate.plots import new_figure\n"
        "def norms(folder):\n"
        "    if not (folder / 'directions.safetensors').exists():\n"
        "        return {}\n"
        "    figure = new_figure(height=3.0)\n"
        "    items = Directions.load(folder / 'directions.safetensors')\n"
        "    figure.add_subplot().plot([item.norm for item in items])\n"
        "    return {'norms.png': figure}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = make_run(tmp_path / "run", 1)
    assert {path.name for path in save_figures(run)} == ALL_FIGURES | {"norms.png"}
    (run / "directions.safetensors").unlink()
    names = {path.name for path in save_figures(run)}
    assert names == ALL_FIGURES - {"separation.png", "cosine_similarity.png"}


def test_search_front_marks_loops_the_limit_and_the_choice(ax):
    trials = pd.DataFrame(
        {
            "edit": ["band", "band", "fitted", "band"],
            "expression_rate": [0.5, 0.1, 0.2, np.nan],
            "kl": [0.01, 0.2, 0.05, 0.1],
            "positive_repetition": [0.0, 0.3, 0.0, 0.0],
        }
    )
    chosen = {"trial": 2, "kl": 0.05, "expression_rate": 0.2}
    search_front(trials, ax, repetition=0.1, selected=chosen, max_kl=0.1, unedited=0.7, n=8)
    said = everything_said(ax)
    assert "n = 8 prompts a side; 3 of 4 trials scored" in said and "limit: KL 0.1" in said
    assert list(lines_of(ax, "unedited model (KL 0)").get_ydata()) == [0.7]
    assert "kernels of strengths, positive prompts' answers repeat more (1)" in said
    front = lines_of(ax, "Pareto front")
    assert list(front.get_xdata()) == [0.01, 0.05]
    assert list(lines_of(ax, "Pareto front, over the limit").get_xdata()) == [0.2]
    assert list(lines_of(ax, "chosen: trial 2").get_ydata()) == [0.2]


def test_nothing_to_draw_yet(tmp_path):
    assert save_figures(tmp_path) == []
    make_projections(1).iloc[:0].to_csv(tmp_path / "projections.csv", index=False)
    failed = make_trials(1, n_refine=1).assign(status="failed", kl=np.nan, stage="refine")
    failed.to_csv(tmp_path / "trials.csv", index=False)
    (tmp_path / "selected.json").write_text('{"plan": null, "limits": {}}')
    assert save_figures(tmp_path) == []
    with pytest.raises(RunError, match="no run folder"):
        save_figures(tmp_path / "nowhere")


PROJECTION_HEAD = ",".join(PROJECTION_COLUMNS)
TRIAL_HEAD = ",".join(TRIAL_COLUMNS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("projections.csv", "", "projections.csv: No columns"),
        ("projections.csv", "layer,point\n", "line 1 lacks the columns split, label"),
        (
            "projections.csv",
            f'{PROJECTION_HEAD}\n0,resid_mid,train,positive,"two\nlines",1\n\n'
            "0,resid_mid,train,positive,p,much\n",
            "line 5: projection is 'much'",
        ),
        (
            "projections.csv",
            f"{PROJECTION_HEAD}\n0,resid_mid,train,positive,p,1\n0,resid_mid,tra",
            "line 3: projection is ''",
        ),
        ("projections.csv", f"{PROJECTION_HEAD}\n0,resid_mid,train,positive,p,nan\n", "line 2"),
        ("projections.csv", f"{PROJECTION_HEAD}\n1,2,3,4,5,6\n1,2,3,4,5,6,7,8\n", "line 3"),
        ("trials.csv", f"{TRIAL_HEAD}\n0,screen,x,resid_mid,-1,1,1,1,ok\n", "line 2: layer is 'x'"),
        ("trials.csv", f"{TRIAL_HEAD}\n0,screen,1,resid_mid,-1,1,1,1,\n", "line 2: its status"),
        ("trials.csv", f"{TRIAL_HEAD}\n0,screen,1,resid_mid,-1,1,1,low,ok\n", "kl is 'low'"),
        ("selected.json", '{\n"plan": ', "selected.json.*line 2"),
        ("selected.json", "[]", "selected.json holds a list"),
        ("directions.json", "{", "cannot read directions"),
    ],
)
def test_a_corrupt_file_is_named_with_its_line(tmp_path, name, content, message):
    run = make_run(tmp_path / "run", 1)
    (run / name).write_text(content)
    with pytest.raises(InterpAblateError, match=f"(?s){message}"):
        save_figures(run)


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 1)
    (run / "figures").mkdir()
    old = run / "figures" / "projections.png"
    old.write_bytes(b"old")

    def full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(RunError, match="No space left"):
        save_figures(run)
    assert [path.name for path in (run / "figures").iterdir()] == ["projections.png"]
    assert old.read_bytes() == b"old"


def test_read_lines_names_the_line(tmp_path):
    path = tmp_path / "generations.jsonl"
    assert read_lines(path) is None
    path.write_text('{"text": "a\\u2028b"}\n\n{"text": "c"}\n')
    assert [record["text"] for record in read_lines(path) or []] == ["a\u2028b", "c"]
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(RunError, match="line 2"):
        read_lines(path)


# --------------------------------------------------------------------------------- tokens


def make_tokens(n_tokens: int = 12, n_layers: int = 6) -> pd.DataFrame:
    parts = ["template"] * 3 + ["prompt"] * (n_tokens - 6) + ["response"] * 3
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "index": i, "token": "\n" if i == 2 else "$x^" if i == 4 else f" w{i}", "part": part,
            "layer": layer, "point": "resid_post", "projection": 10.0 * 2**layer + rng.normal(),
        }
        for i, part in enumerate(parts)
        for layer in range(n_layers)
    )  # fmt: skip


def test_the_token_heat_map_shows_the_values_it_was_given() -> None:
    frame = make_tokens()
    ax = token_heatmap(frame, Figure().add_subplot(), own_scale=False)
    drawn = np.asarray(ax.images[0].get_array())
    want = frame.pivot(index="layer", columns="index", values="projection").to_numpy()
    np.testing.assert_array_equal(drawn, want)
    scaled = np.asarray(token_heatmap(frame, Figure().add_subplot()).images[0].get_array())
    np.testing.assert_allclose(np.median(scaled[:, 1:], axis=1), 0, atol=1e-12)
    row = want[3, 1:] - np.median(want[3, 1:])
    np.testing.assert_allclose(scaled[3, 1:], row / np.quantile(np.abs(row), 0.98))
    assert "12 tokens (3 template, 6 prompt, 3 response) x 6 layers" in ax.texts[0].get_text()
    with pytest.raises(RunError, match="one direction a layer"):
        token_heatmap(pd.concat([frame, frame]), Figure().add_subplot())
    with pytest.raises(RunError, match="no token projections"):
        token_heatmap(frame[:0], Figure().add_subplot())


def test_a_figure_is_written_as_its_name_ends(tmp_path):
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for form, start in begins.items():
        files = []
        for name in ("a", "b"):
            figure = Figure()
            token_heatmap(make_tokens(8, 2), figure.add_subplot())
            files.append(style.save_figure(figure, tmp_path / f"{name}.{form}").read_bytes())
        assert files[0].startswith(start) and files[0] == files[1], form
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    sizes = []
    for dpi in (20, 40):
        path = style.save_figure(Figure(figsize=(2, 1)), tmp_path / "d.png", dpi=dpi)
        sizes.append(int.from_bytes(path.read_bytes()[16:20], "big"))
    assert sizes == [40, 80]
    with pytest.raises(RunError, match="png, svg, pdf"):
        style.save_figure(Figure(), tmp_path / "c.bmp")
    with pytest.raises(RunError, match="dpi"):
        style.save_figure(Figure(), tmp_path / "c.png", dpi=0)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "b", "d"}


def test_a_run_folder_in_several_formats(tmp_path):
    run = make_run(tmp_path / "run", 1)
    with pytest.raises(RunError, match="jpg"):
        save_figures(run, formats=("png", "jpg"))
    assert not (run / "figures").exists()
    written = save_figures(run, formats=("svg", "png"), dpi=20)
    assert len(written) == 2 * len(ALL_FIGURES) and {p.suffix for p in written} == {".svg", ".png"}


@pytest.mark.parametrize(
    ("file", "column", "value", "said"),
    [
        ("layer_effects.csv", "where", "there", "names there"),
        ("layer_effects.csv", "edit", "bend", "names bend"),
        ("layer_effects.csv", "layer", "1e9", "layer is '1e9'"),
        ("layer_effects.csv", "n", "inf", "under n"),
        ("layer_effects.csv", "change", "", ""),
        ("attribution.csv", "layer", "inf", "under layer"),
        ("attribution.csv", "index", "10000000000", "under index"),
        ("attribution.csv", "difference", "", ""),
    ],
)
def test_tables_of_a_run_that_were_changed(
    file: str, column: str, value: str, said: str, tmp_path: Path
) -> None:
    """One message that names the column; what has no numbers is not drawn."""
    from tests.plots.test_every_plot import attribution, layer_sweep_rows

    run = make_run(tmp_path / "run", 3)
    layer_sweep_rows().to_csv(run / "layer_effects.csv", index=False)
    attribution().to_csv(run / "attribution.csv", index=False)
    pd.read_csv(run / file).assign(**{column: value}).to_csv(run / file, index=False)
    draw = {"layer_effects.csv": run_figures._draw_layer_effects, "attribution.csv": run_figures._draw_attribution}[file]  # fmt: skip
    if not said:
        assert draw(run) == {}
        return
    with pytest.raises(RunError, match=said):
        draw(run)


def test_a_table_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    with (run / "projections.csv").open("r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(RunError, match="has 8589934592 bytes, and such a file at most"):
        run_figures._draw_projections(run)
