"""A sweep over layers: every number is what a plan applied by hand gives, and the plot draws it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tiny import N_LAYERS, forward, shared, tiny

from interp_ablate import ContrastSet, Direction, Site, collect, estimate_directions, layer_sweep
from interp_ablate.errors import DirectionError, RunError
from interp_ablate.plots.layers import layer_effects
from interp_ablate.search.by_layer import COLUMNS

TRAIN = ContrastSet.from_texts(
    [f"order {i} dogs" for i in range(6)], [f"why {i}?" for i in range(6)]
)
HELD_OUT = ContrastSet.from_texts(
    [f"order {i} cats" for i in range(6)], [f"how {i}?" for i in range(6)]
)


@pytest.fixture(scope="module")
def directions():  # type: ignore[no-untyped-def]
    return estimate_directions(collect(shared(), TRAIN))


def length_of(text: str) -> float:
    return float(len(text))


@pytest.fixture(scope="module")
def frame(directions) -> pd.DataFrame:  # type: ignore[no-untyped-def]
    return layer_sweep(shared(), directions, HELD_OUT, ("ablate", "add", "patch"), n_shuffled=2)


def kl_by_hand(prompts, edit) -> list[float]:  # type: ignore[no-untyped-def]
    """KL of the first token from the unedited model, with a plain forward pass and an edit of its own."""
    hf, kls = tiny()[0], []
    for prompt in prompts:
        row = shared().encode(prompt)
        before = forward(hf, row)[-1].double().log_softmax(-1)
        after = forward(hf, row, edit)[-1].double().log_softmax(-1)
        kls.append(float((before.exp() * (before - after)).sum()))
    return kls


def test_the_rows_are_what_was_asked_for(frame: pd.DataFrame) -> None:
    assert list(frame.columns) == list(COLUMNS)
    kl = frame[frame["score"] == "kl_first_token"]
    assert len(kl) == N_LAYERS * (3 + 3 + 1) and set(kl["point"]) == {"resid_post"}
    assert set(kl[kl["edit"] == "add"]["on"]) == {"negative"}
    assert set(kl[kl["edit"] != "add"]["on"]) == {"positive"}
    assert (kl["n"] == 6).all() and (kl["n_shuffled"] == 2).all()
    assert (kl["change_low"] <= kl["change"]).all() and (kl["change"] <= kl["change_high"]).all()
    assert (kl["shuffled_low"] <= kl["shuffled_high"]).all()


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_every_edit_equals_a_plain_forward_pass(
    frame: pd.DataFrame, directions, layer: int
) -> None:  # type: ignore[no-untyped-def]
    site = Site(layer, "resid_post")
    item = directions[site]
    r, raw = item.vector.float(), item.raw.float()
    negatives = collect(shared(), HELD_OUT).at(site)[6:].double() @ item.vector
    writers = set(shared().writers)
    later = {w for w in writers if site < w}
    n_later = 1 + len(later)

    def without(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ r)[..., None] * r

    edits = {
        ("ablate", "site"): lambda s, x: without(x) if s == site else x,
        ("ablate", "writers"): lambda s, x: without(x) if s in writers else x,
        ("ablate", "from"): lambda s, x: without(x) if s == site or s in later else x,
        ("add", "site"): lambda s, x: x + raw if s == site else x,
        ("add", "writers"): lambda s, x: x + raw / len(writers) if s in writers else x,
        ("add", "from"): lambda s, x: x + raw / n_later if s == site or s in later else x,
        ("patch", "site"): lambda s, x: (
            without(x) + float(negatives.mean()) * r if s == site else x
        ),
    }
    for (edit, where), change in edits.items():
        prompts = HELD_OUT.negative if edit == "add" else HELD_OUT.positive
        rows = frame[
            (frame["layer"] == layer) & (frame["edit"] == edit) & (frame["where"] == where)
            & (frame["score"] == "kl_first_token")
        ]  # fmt: skip
        want = kl_by_hand(prompts, change)
        assert rows["change"].item() == pytest.approx(np.mean(want), abs=2e-5)


def test_scores_of_ones_own_and_a_single_direction(directions) -> None:  # type: ignore[no-untyped-def]
    item = directions[Site(1, "resid_mid")]
    frame = layer_sweep(
        shared(),
        item,
        HELD_OUT,
        ("ablate",),
        scores={"length": length_of},
        where=("site",),
        n_shuffled=0,
    )
    assert len(frame) == 1 and frame["point"].item() == "resid_mid"
    assert np.isnan(frame["shuffled_low"].item()) and frame["n_shuffled"].item() == 0
    alone = shared().generate([*HELD_OUT.positive])
    assert frame["baseline"].item() == pytest.approx(np.mean([len(g.text) for g in alone]))


def test_what_cannot_be_swept_is_refused(directions) -> None:  # type: ignore[no-untyped-def]
    for options in (
        {"edits": ("erase",)},
        {"edits": ()},
        {"edits": "ablate"},
        {"where": ("here",)},
        {"n_shuffled": -1},
    ):
        with pytest.raises(RunError, match=r"give one or several|from 0"):
            layer_sweep(shared(), directions, HELD_OUT, **options)  # type: ignore[arg-type]
    with pytest.raises(DirectionError, match="no direction at mlp_out"):
        layer_sweep(shared(), directions, HELD_OUT, point="mlp_out")
    with pytest.raises(DirectionError, match="none"):
        layer_sweep(shared(), (), HELD_OUT)


def test_the_plot_shows_the_changes(frame: pd.DataFrame) -> None:
    ax = layer_effects(frame, Figure().add_subplot(), score="kl_first_token", edit="ablate")
    rows = frame[(frame["score"] == "kl_first_token") & (frame["edit"] == "ablate")]
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_array_equal(
        lines["at all writers"].get_ydata(), rows[rows["where"] == "writers"]["change"]
    )
    said = " ".join((ax.texts[0].get_text() + ax.get_ylabel()).split())
    assert "n = 6" in said and "nats" in said and "2 directions of shuffled labels" in said
    one = frame.assign(shuffled_low=frame["shuffled_high"], n_shuffled=1)
    ax = layer_effects(one, Figure().add_subplot(), score="kl_first_token", edit="ablate")
    ends = [line for line in ax.lines if line.get_marker() == "_"]  # a bar without height is no bar
    assert len(ends) == 2 * rows["where"].nunique()
    assert "a direction of shuffled labels" in " ".join(ax.texts[0].get_text().split())
    with pytest.raises(RunError, match="no rows of nothing"):
        layer_effects(frame, Figure().add_subplot(), score="nothing")
    with pytest.raises(RunError, match="lack"):
        layer_effects(frame.drop(columns="n"), Figure().add_subplot())


def test_a_direction_keeps_its_own_position() -> None:
    item = Direction(torch.ones(32), 1.0, Site(1, "resid_post"), "-2")
    frame = layer_sweep(shared(), item, HELD_OUT, ("patch",), n_shuffled=1)
    assert frame["n_shuffled"].max() == 1 and np.isfinite(frame["change"]).all()


def test_a_rate_that_every_prompt_changes_alike_has_an_interval() -> None:
    """12 of 12 answers flipped is the strongest evidence there is: it had no interval, and 10 of 12 crossed 0."""
    from interp_ablate.search.by_layer import _bounds_of_change, _changes
    from interp_ablate.stats.intervals import UNBOUNDED, clopper_pearson

    yes, no = np.full(12, 100.0), np.zeros(12)
    low, _ = clopper_pearson(12, 12)
    for bounds in ((-100.0, 100.0), UNBOUNDED):  # a text scorer; a function that gives 0 and 100
        changes = _changes(yes, [no], bounds)
        assert changes["change_low"] == -100 and changes["change_high"] == pytest.approx(
            -200 * low + 100
        )
        most = _changes(np.append(yes[:10], no[:2]), [no], bounds)
        assert -100 < most["change_low"] < most["change"] < most["change_high"] < 0
    nothing = _changes(
        np.full(12, 0.3), [np.full(12, 0.7)], UNBOUNDED
    )  # what else it can be is not known
    assert np.isnan(nothing["change_low"])
    assert _bounds_of_change(length_of) == UNBOUNDED
