"""Edits of chosen layers, and the direction of a behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny import N_LAYERS, editing, forward, rows_of, shared, source_of, unit
from torch.testing import assert_close

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.edits.presets import ablate_layers, add_to_layers, layers_of
from interp_ablate.errors import DirectionError, PlanError, PromptError
from interp_ablate.evaluation.metrics import FirstTokenKL
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.search import find_direction as layer_edits
from interp_ablate.search.find_direction import Behaviour, find_direction
from interp_ablate.sites import Site


class Letters:
    """Share of letters a to m: a random model's text has some of everything."""

    name, identity = "letters", {"kind": "letters"}

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        found: list[float | None] = []
        for exchange in exchanges:
            text = exchange.answer
            share = sum("a" <= c <= "m" for c in text.lower()) / len(text) if text else None
            found.append(None if share is None else 100 * share)
        return found


class Unimpressed(Letters):
    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        return [50.0] * len(exchanges)


# --------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, range(10)),
        (3, [3]),
        (-1, [9]),
        (range(2, 5), [2, 3, 4]),
        ([5, 1, -2], [1, 5, 8]),
        ("4", [4]),
        ("2-4", [2, 3, 4]),
        (" 2 - 4 ", [2, 3, 4]),
        ("20%-80%", range(2, 9)),
        ("0%-100%", range(10)),
        ("55%", [5]),
        ("3-100%", range(3, 10)),
    ],
)
def test_ways_to_name_layers(layers: Any, expected: Any) -> None:
    assert layers_of(10, layers) == tuple(expected)


@pytest.mark.parametrize(
    ("layers", "part"),
    [
        (10, r"\[10\]: the model has 0 to 9"),
        (-11, "0 to 9"),
        ([], "no layers"),
        ([1, 1], "named twice"),
        ([1, -9], "named twice"),
        ([True], "no layers"),
        ([1.5], "no layers"),
        ("4-2", "no layers"),
        ("2-12", r"\[10, 11, 12\]"),
        ("a-b", "cannot read layers"),
        ("20%-80", "0 to 9"),
        ("", "cannot read layers"),
    ],
)
def test_layers_that_are_none(layers: Any, part: str) -> None:
    with pytest.raises(PlanError, match=part):
        layers_of(10, layers)


# --------------------------------------------------------------------------------- plans


def direction(layer: int = 1) -> Direction:
    return Direction(unit(1), 3.0, Site(layer, "resid_post"))


def test_ablating_layers_is_ablating_what_they_write() -> None:
    model, one = shared(), direction()
    plan = ablate_layers(model, one, [1, 2], strength=0.5)
    assert plan == Plan(
        (Ablate(one, [s for s in model.writers if s.layer in (1, 2)], strength=0.5),)
    )
    assert Site(0, "embed") not in ablate_layers(model, one).sites
    assert ablate_layers(model, one, 0).sites == (Site(0, "attn_out"), Site(0, "mlp_out"))
    post_norm = shared("gemma2")
    assert {s.point for s in ablate_layers(post_norm, one).sites} == {"attn_proj", "mlp_proj"}


def test_ablating_inputs_is_what_a_wrapped_decoder_layer_does() -> None:
    """Against the blocks' own modules with their input changed, as a wrapper around them would."""
    model, one = shared(), direction()
    plan = ablate_layers(model, one, range(1, N_LAYERS), inputs=True)
    [row] = rows_of(12)
    with model.applied(plan):
        found = model.logits([row])[0]
    hf = source_of("llama_gqa")
    r = one.vector.float()
    handles = [
        hf.model.layers[i].register_forward_pre_hook(
            lambda module, args, kwargs: (
                (args[0] - (args[0] @ r)[..., None] * r, *args[1:]),
                kwargs,
            ),
            with_kwargs=True,
        )
        for i in range(1, N_LAYERS)
    ]
    try:
        with torch.no_grad():
            expected = hf(torch.tensor([row])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    assert_close(found[-1], expected, atol=1e-4, rtol=1e-4)
    assert (expected - forward(hf, row)[-1]).abs().max() > 0.01


def test_adding_to_layers() -> None:
    model, one = shared(), direction(1)
    plan = add_to_layers(model, one, coefficient=2)
    assert plan == Plan((Add(one, Site(1, "resid_pre"), coefficient=2),))
    several = add_to_layers(model, one, [0, 2], point="resid_post", positions="generated")
    assert several.sites == (Site(0, "resid_post"), Site(2, "resid_post"))
    assert [edit.positions for edit in several] == ["generated"]
    [row] = rows_of(9)
    with model.applied(plan):
        found = model.logits([row])[0, -1]
    assert_close(
        found, forward(source_of("llama_gqa"), row, editing(plan))[-1], atol=1e-4, rtol=1e-4
    )


# --------------------------------------------------------------------------------- a behaviour


def contrast() -> ContrastSet:
    """Enough prompts that a random model tells apart."""
    sides = [
        tuple(Prompt(f"{word} number {i * 7 % 31} {tail}") for i in range(14))
        for word, tail in (("Please order", "now!"), ("explain", "to me"))
    ]
    return ContrastSet("own", *sides, source="test")


def test_the_direction_of_a_behaviour_by_what_it_does_to_text() -> None:
    model, behaviour = shared(eos_token_id=None), Behaviour(contrast(), Letters())
    found = find_direction(
        model, behaviour, layers=None, prompts=(8, 4, 1), max_new_tokens=10, max_kl=50.0
    )
    table = found.table
    assert list(table["layer"]) == list(range(N_LAYERS)) and behaviour.name == "own"
    assert found.direction.site.layer == found.choice.row["layer"]  # type: ignore[index]
    split = behaviour.contrast.split(8, 4, 1, seed=0)
    for each in found.directions:  # measured again, one by one
        row = table[table["site"] == str(each.site)].iloc[0]
        plans = Plan((Ablate(each, model.writers),)), Plan((Add(each, each.site),))
        sides = split.validation.positive, split.validation.negative
        for name, prompts, plan in zip(("ablated", "added"), sides, plans):
            with model.applied(plan):
                answers = model.generate(prompts, max_new_tokens=10)
            scores = Letters()([PromptResponse(p, a.text) for p, a in zip(prompts, answers)])
            assert row[name] == pytest.approx(fmean(s for s in scores if s is not None))
        kl = FirstTokenKL()(ModelOutputs(model, sides[1], plans[0]), ModelOutputs(model, sides[1]))
        assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
    raising = table[table["added"] > table["added_baseline"]]
    lowest = raising["ablated"].min()
    ties = raising[raising["ablated"] <= lowest + 2]
    assert found.direction.site.layer == ties.sort_values("kl").iloc[0]["layer"]


def test_no_direction_is_said_with_the_reason() -> None:
    model = shared(eos_token_id=None)
    options: dict[str, Any] = {"layers": 1, "prompts": (8, 4, 1), "max_new_tokens": 4}
    with pytest.raises(DirectionError, match="none of 1 directions raises the score"):
        find_direction(model, Behaviour(contrast(), Unimpressed()), **options)
    with pytest.raises(DirectionError, match=r"within a KL of 1e-12.*candidates would pass"):
        all_layers = {**options, "layers": None, "max_kl": 1e-12, "max_new_tokens": 10}
        find_direction(model, Behaviour(contrast(), Letters()), **all_layers)
    with pytest.raises(PromptError):
        find_direction(model, Behaviour(contrast(), Letters()), prompts=(64, 16, 32))


def test_the_test_part_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [tuple(Prompt(f"{word} {i} now") for i in range(44)) for word in ("order", "explain")]
    own, seen = ContrastSet("own", *sides, source="test"), set[Prompt]()
    real = layer_edits.collect

    def collect(model: Any, part: ContrastSet, sites: Any) -> Any:
        seen.update((*part.positive, *part.negative))
        return real(model, part, sites)

    monkeypatch.setattr(layer_edits, "collect", collect)
    with pytest.raises(DirectionError):
        options: dict[str, Any] = {"layers": 1, "prompts": (8, 4, 32), "max_new_tokens": 2}
        find_direction(shared(), Behaviour(own, Unimpressed()), **options)
    test = own.split(1, 1, 32).test
    assert len(seen) == 24 and not seen & {*test.positive, *test.negative}
