"""COSMIC on tiny models: scores against plain Hugging Face passes, exact inversions, limits, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import N_LAYERS, editing, forward, shared, source_of, unit
from torch import Tensor

from interp_ablate import (
    Ablate,
    Add,
    ContrastSet,
    Direction,
    Plan,
    Site,
    collect,
    estimate_directions,
)
from interp_ablate.directions.direction import random_direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.errors import RunError
from interp_ablate.search.concept_inversion import cosmic
from interp_ablate.sites import sites_of

WORDS = ("dog", "cat", "cow", "hen", "owl", "fox", "elk", "ant")
PAIRS = ContrastSet.from_texts(
    [f"bring the {word} now" for word in WORDS], [f"why is the {word}?" for word in WORDS]
)
ENDS = sites_of(("resid_post",), range(N_LAYERS))


def directions() -> Directions:
    return estimate_directions(collect(shared(), PAIRS, ENDS))


def means_by_hand(prompts: Any, plan: Plan | None) -> Tensor:
    """Mean activation of the last token at every layer's end, from plain forward passes of the HF model."""
    hf, found = source_of("llama_gqa"), []
    edit = editing(plan) if plan else lambda site, x: x
    for row in shared().encode_all(list(prompts)):
        seen: dict[int, Tensor] = {}

        def watched(site: Site, x: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            changed = edit(site, x)
            if site.point == "resid_post":
                seen[site.layer] = changed[0, -1].double()
            return changed

        forward(hf, row, watched)
        found.append(torch.stack([seen[layer] for layer in range(N_LAYERS)]))
    return torch.stack(found).mean(0)


def cosine(a: Tensor, b: Tensor) -> float:
    first, second = a.numpy(), b.numpy()
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_scores_are_their_definition(share: float) -> None:
    items = directions()
    found = cosmic(shared(), items, PAIRS, share=share, depth=1, max_kl=None)
    unedited = [means_by_hand(side, None) for side in (PAIRS.positive, PAIRS.negative)]
    alike = [cosine(p, n) for p, n in zip(*unedited)]
    count = max(int(share * N_LAYERS), 1)
    assert found.layers == tuple(sorted(np.argsort(alike)[:count].tolist()))
    judged = list(found.layers)
    towards = [each[judged].mean(0) for each in unedited]
    for row in found.table.itertuples():
        item = items[Site(row.layer, row.point)]
        everywhere = [Site(0, "embed"), *sites_of(("attn_out", "mlp_out"), range(N_LAYERS))]
        ablated = means_by_hand(PAIRS.positive, Plan((Ablate(item, everywhere),)))[judged].mean(0)
        added = means_by_hand(PAIRS.negative, Plan((Add(item, item.site),)))[judged].mean(0)
        assert row.ablated == pytest.approx(cosine(ablated, towards[1]), abs=1e-5)
        assert row.added == pytest.approx(cosine(added, towards[0]), abs=1e-5)
        assert row.score == row.ablated + row.added and math.isnan(row.kl)
    best = found.table.iloc[0]
    assert best.score == found.table.score.max()
    assert found.direction is items[Site(int(best.layer), best.point)]


def test_the_raw_direction_added_at_the_judging_layer_inverts_the_concept_exactly() -> None:
    found = cosmic(shared(), directions(), PAIRS, depth=1, max_kl=None)
    [layer] = found.layers
    row = found.table[found.table.layer == layer].iloc[0]
    assert row.added == pytest.approx(1, abs=1e-6)


def test_a_direction_of_the_concept_wins_over_random_ones_of_its_length() -> None:
    items = directions()
    chance = [random_direction(item, seed=seed) for item in items for seed in range(3)]
    found = cosmic(shared(), [*chance, *items], PAIRS, depth=1, max_kl=None)
    assert found.direction.method == "difference_in_means"
    by_method = found.table.groupby("method").score.mean()
    assert by_method["difference_in_means"] > by_method["random"]


def test_layers_beyond_the_depth_and_costly_ablations_are_left_out() -> None:
    items = directions()
    found = cosmic(shared(), items, PAIRS, depth=0.7, max_kl=None)
    beyond = found.table[found.table.left_out != ""]
    assert set(beyond.layer) == {n for n in range(N_LAYERS) if n >= int(0.7 * N_LAYERS)}
    assert beyond.score.isna().all() and found.direction.site.layer not in set(beyond.layer)
    free = cosmic(shared(), items, PAIRS, depth=1, max_kl=None)
    costs = {}
    rows = shared().encode_all(list(PAIRS.negative))
    for item in items:
        plain = shared().logits(rows)[:, -1].double().log_softmax(-1)
        with shared().applied(Plan((Ablate(item, shared().writers),))):
            edited = shared().logits(rows)[:, -1].double().log_softmax(-1)
        costs[item.site.layer] = float((plain.exp() * (plain - edited)).sum(-1).mean())
    limit = (costs[free.direction.site.layer] + min(costs.values())) / 2
    assert min(costs.values()) < limit < costs[free.direction.site.layer]
    within = cosmic(shared(), items, PAIRS, depth=1, max_kl=limit)
    assert costs[within.direction.site.layer] <= limit
    first = within.table.iloc[0]
    assert first.layer == free.direction.site.layer and "nats, more than" in first.left_out
    assert first.kl == pytest.approx(costs[int(first.layer)], rel=1e-3)
    better = within.table.iloc[: within.table.layer.tolist().index(within.direction.site.layer)]
    assert (better.left_out != "").all()  # the first one within the limit was taken


def test_one_place_under_two_names_is_tried_once() -> None:
    both = Directions(
        (
            Direction(unit(), 1.0, Site(0, "resid_post")),
            Direction(unit(), 1.0, Site(1, "resid_pre")),
        )
    )
    assert len(cosmic(shared(), both, PAIRS, depth=1, max_kl=None).table) == 1


def test_what_cannot_be_chosen_from_is_refused() -> None:
    items = directions()
    for name in ("share", "depth"):
        for value in (0, 1.5, math.nan, True):
            with pytest.raises(RunError, match=f"{name} is more than 0 and at most 1"):
                cosmic(shared(), items, PAIRS, **{name: value})
    with pytest.raises(RunError, match="max_kl is above 0"):
        cosmic(shared(), items, PAIRS, max_kl=0)
    with pytest.raises(RunError, match="there is none"):
        cosmic(shared(), Directions(()), PAIRS)
    with pytest.raises(RunError, match=r"none of 1 candidates.*beyond 0.5 of the depth"):
        cosmic(shared(), items.where([ENDS[-1]]), PAIRS, depth=0.5)
    with pytest.raises(RunError, match=r"none of .* nats, more than 1e-12"):
        cosmic(shared(), items, PAIRS, depth=1, max_kl=1e-12)
