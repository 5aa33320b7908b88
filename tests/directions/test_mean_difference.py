"""Directions: estimates against numpy in float64, separation against brute force, files bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.testing import assert_close

from interp_ablate.directions.direction import (
    Direction,
    Separation,
    cosine_similarities,
    orthogonalized,
    random_direction,
    separation,
)
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.mean_difference import (
    difference_in_means,
    estimate_directions,
    shuffled_labels,
)
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

D = 16
SITE = Site(3, "resid_mid")
SEEDS = range(5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_sets(seed: int, n: int = 9, m: int = 7) -> tuple[Tensor, Tensor]:
    return draw(seed, n, D) + 2, draw(seed + 100, m, D)


# --------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_difference_in_means_is_numpys(seed: int, dtype: torch.dtype) -> None:
    positive, negative = (values.to(dtype) for values in two_sets(seed))
    found = difference_in_means(positive, negative, SITE, position="-2", source="here")
    assert found is not None
    expected = positive.double().numpy().mean(0) - negative.double().numpy().mean(0)
    np.testing.assert_allclose(found.raw.numpy(), expected, rtol=1e-12, atol=1e-14)
    assert found.norm == pytest.approx(float(np.linalg.norm(expected)), rel=1e-12)
    assert float(found.vector.norm()) == pytest.approx(1, abs=1e-14)
    assert found.vector.dtype == torch.float64
    assert (found.site, found.position, found.source) == (SITE, "-2", "here")
    assert found.name == "difference_in_means@blocks.3.hook_resid_mid[-2]"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_raw_direction_moves_one_mean_onto_the_other(seed: int) -> None:
    positive, negative = two_sets(seed)
    found = difference_in_means(positive, negative, SITE)
    back = difference_in_means(negative, positive, SITE)
    assert found is not None and back is not None
    assert_close((negative + found.raw).mean(0), positive.mean(0), rtol=1e-12, atol=1e-12)
    assert_close(back.raw, -found.raw, rtol=1e-12, atol=1e-12)
    shifted = difference_in_means(positive + 5, negative + 5, SITE)
    rows = torch.randperm(len(positive), generator=torch.Generator().manual_seed(seed))
    shuffled = difference_in_means(positive[rows], negative, SITE)
    for same in (shifted, shuffled):
        assert same is not None
        assert_close(same.raw, found.raw, rtol=1e-11, atol=1e-11)


def test_means_are_taken_in_float64() -> None:
    """4096 bfloat16 rows of 1.0 and 1.0078125 around a large mean: lost in a bfloat16 sum."""
    positive = torch.full((4096, D), 1.0078125, dtype=torch.bfloat16)
    negative = torch.full((4096, D), 1.0, dtype=torch.bfloat16)
    found = difference_in_means(positive, negative, SITE)
    assert found is not None and found.norm == 0.0078125 * math.sqrt(D)


def test_no_direction_where_the_difference_is_zero() -> None:
    same = draw(0, 1, D).float().expand(6, D)
    assert difference_in_means(same, same[:4], SITE) is None
    zero = torch.zeros(3, D)
    assert difference_in_means(zero, zero, SITE) is None
    rounding = same + 1e-8 * draw(1, 6, D)
    assert difference_in_means(rounding, same, SITE) is None
    assert difference_in_means(same + 1e-3, same, SITE) is not None
    # a tiny stream with a clear difference is signal
    assert difference_in_means(1e-9 * draw(2, 4, D), 1e-9 * draw(3, 4, D), SITE) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_activations_are_refused_with_the_prompts(bad: float, side: int) -> None:
    sets = two_sets(0)
    sets[side][4, 2] = bad
    label = ("positive", "negative")[side]
    with pytest.raises(DirectionError, match=rf"{label} .*resid_mid.*prompts \[4\].*dtype"):
        difference_in_means(*sets, SITE)


@pytest.mark.parametrize(
    ("positive", "negative", "part"),
    [
        (torch.ones(0, D), torch.ones(2, D), "at least one prompt"),
        (torch.ones(2, D), torch.ones(D), r"negative activations .*\[prompt, d_model\]"),
        (torch.ones(2, 3, D), torch.ones(2, D), "positive"),
        (torch.ones(2, D), torch.ones(2, D + 1), "16 against 17"),
    ],
)
def test_shapes_that_do_not_fit(positive: Tensor, negative: Tensor, part: str) -> None:
    with pytest.raises(DirectionError, match=part):
        difference_in_means(positive, negative, SITE)


@pytest.mark.parametrize(
    ("vector", "part"),
    [
        (torch.zeros(D), "zero"),
        (torch.full((D,), math.nan), "not finite"),
        (torch.tensor([1.0, math.inf]), "not finite"),
        (torch.ones(2, D), r"\(2, 16\)"),
        (torch.tensor(1.0), r"\(\)"),
    ],
)
def test_a_direction_is_one_finite_vector(vector: Tensor, part: str) -> None:
    with pytest.raises(DirectionError, match=part):
        Direction(vector, 1.0, SITE)


def test_a_direction_is_a_unit_vector_whatever_the_input() -> None:
    vector = draw(0, D)
    for scale in (1e-6, 1.0, 1e6):
        found = Direction(scale * vector, 2.0, SITE)
        assert_close(found.vector, vector / vector.norm(), rtol=1e-14, atol=1e-14)
        assert float(found.raw.norm()) == pytest.approx(2.0)


def test_fingerprint_is_of_what_the_direction_is() -> None:
    vector = draw(0, D)
    first = Direction(vector, 2.0, SITE)
    assert first.fingerprint == Direction(vector, 2.0, SITE, source="elsewhere").fingerprint
    others = [
        Direction(-vector, 2.0, SITE),
        Direction(vector, 2.5, SITE),
        Direction(vector, 2.0, Site(3, "resid_pre")),
        Direction(vector, 2.0, SITE, "-2"),
        Direction(vector, 2.0, SITE, method="random"),
    ]
    assert len({each.fingerprint for each in [first, *others]}) == 6


# --------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_direction_has_the_norm_and_site_and_nothing_else(seed: int) -> None:
    like = Direction(draw(777, 4096), 3.25, SITE, "-4")
    found = random_direction(like, seed=seed)
    assert found.norm == 3.25 and float(found.raw.norm()) == pytest.approx(3.25)
    assert (found.site, found.position, found.method) == (SITE, "-4", "random")
    assert torch.equal(found.vector, random_direction(like, seed=seed).vector)
    assert not torch.equal(found.vector, random_direction(like, seed=seed + 1).vector)
    assert abs(float(found.vector @ like.vector)) < 5 / math.sqrt(4096)


@pytest.mark.parametrize("seed", SEEDS)
def test_orthogonalized_has_nothing_along_and_the_rest_untouched(seed: int) -> None:
    like, against = Direction(draw(seed, D), 3.0, SITE, "-4", source="here"), 50 * draw(seed + 9, D)
    found = orthogonalized(like, against)
    unit = against / against.norm()
    assert abs(float(found.raw @ unit)) < 1e-14
    rest = like.raw - found.raw  # what was taken away lies along `against`
    assert_close(rest, (rest @ unit) * unit, rtol=1e-12, atol=1e-12)
    assert (found.site, found.position, found.source) == (SITE, "-4", "here")
    assert found.method == "difference_in_means_orthogonalized"
    assert_close(orthogonalized(found, against).raw, found.raw, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_left_of_a_parallel_direction(seed: int) -> None:
    like = Direction(draw(seed, D), 3.0, SITE)
    with pytest.raises(DirectionError, match="left"):
        orthogonalized(like, -7 * like.vector)


def test_nothing_is_taken_away_against_zero() -> None:
    like = Direction(draw(0, D), 3.0, SITE, "-4", source="here")
    found = orthogonalized(like, torch.zeros(D))
    assert_close(found.vector, like.vector, rtol=1e-15, atol=1e-15)
    assert found.norm == pytest.approx(3.0) and found.source == "here"
    assert found.method == "difference_in_means_orthogonalized"


def test_cosines() -> None:
    found = [Direction(draw(seed, D), 1.0, SITE) for seed in SEEDS]
    cosines = cosine_similarities([*found, Direction(-found[0].vector, 9.0, SITE)])
    assert_close(cosines, cosines.T)
    assert_close(cosines.diagonal(), torch.ones(6, dtype=torch.float64))
    assert float(cosines[0, 5]) == pytest.approx(-1)


# --------------------------------------------------------------------------------- separation


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (5, 8), (30, 20)])
def test_separation_against_scipy_and_brute_force(
    seed: int, ties: bool, sizes: tuple[int, int]
) -> None:
    positive, negative = draw(seed, sizes[0]) + 0.5, draw(seed + 50, sizes[1])
    if ties:
        positive, negative = positive.round(), negative.round()
    values = torch.cat([positive, negative])
    labels = torch.tensor([True] * sizes[0] + [False] * sizes[1])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    found = separation(values[order], labels[order])

    wins = [float(p > n) + 0.5 * float(p == n) for p in positive for n in negative]
    u = mannwhitneyu(positive.numpy(), negative.numpy()).statistic
    assert found.auc == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert found.auc == pytest.approx(u / (sizes[0] * sizes[1]), abs=1e-12)
    if sum(sizes) > 2:
        groups = (positive.numpy(), negative.numpy())
        squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
        pooled = math.sqrt(squares / (sum(sizes) - 2))
        if pooled > 0:
            gap = float(groups[0].mean() - groups[1].mean())
            assert found.d_prime == pytest.approx(gap / pooled, rel=1e-10, abs=1e-10)

    swapped = separation(values, ~labels)
    assert swapped.auc == pytest.approx(1 - found.auc, abs=1e-12)
    scaled = separation(7 * values + 3, labels)  # neither depends on unit or origin
    assert scaled.auc == pytest.approx(found.auc) and scaled.d_prime == pytest.approx(
        found.d_prime, rel=1e-9, abs=1e-9
    )


def test_separation_at_its_ends() -> None:
    labels = torch.tensor([True, True, False, False])
    assert separation(torch.tensor([2.0, 3.0, 0.0, 1.0]), labels).auc == 1.0
    assert separation(torch.tensor([0.0, 1.0, 2.0, 3.0]), labels).auc == 0.0
    assert separation(torch.ones(4), labels) == Separation(0.5, 0.0)
    assert separation(torch.tensor([1.0, 1.0, 0.0, 0.0]), labels) == Separation(1.0, math.inf)
    assert separation(torch.tensor([0.0, 0.0, 1.0, 1.0]), labels) == Separation(0.0, -math.inf)
    for one_sided in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(DirectionError, match="both sets"):
            separation(torch.ones(4), one_sided)


@pytest.mark.parametrize(
    ("projections", "labels"),
    [
        (torch.tensor([math.nan, 1.0, 2.0]), torch.tensor([True, False, False])),
        (torch.tensor([5.0, 1.0, 2.0, 3.0]), torch.tensor([1, 0, 0, 0])),
        (torch.tensor([1.0, math.inf]), torch.tensor([True, False])),
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False])),
        (torch.ones(2, 2), torch.tensor([[True, False], [True, False]])),
    ],
)
def test_separation_of_what_cannot_be_separated(projections: Tensor, labels: Tensor) -> None:
    with pytest.raises(DirectionError):
        separation(projections, labels)


# --------------------------------------------------------------------------------- every site at once


class Collected:
    """Stands in for `activations.Activations`."""

    def __init__(self, seed: int, labels: Tensor | None, same: Site | None = None) -> None:
        self.sites: tuple[Site, ...] = (Site(0, "resid_pre"), SITE)
        self.positions: tuple[str, ...] = ("-1", "-2")
        self.labels, self._seed, self._same = labels, seed, same

    def at(self, site: Site, position: str = "-1") -> Tensor:
        n = 8
        if site == self._same and position == "-1":
            return draw(1, 1, D).expand(n, D)
        values = draw(self._seed + 7 * self.positions.index(position) + site.layer, n, D)
        shift = draw(1000 + site.layer, D)
        return values + shift * (0 if self.labels is None else self.labels.double()[:, None])


LABELS = torch.tensor([True, False] * 4)


def test_estimates_at_every_site_and_position() -> None:
    train, held_out = Collected(0, LABELS, Site(0, "resid_pre")), Collected(50, ~LABELS)
    found = estimate_directions(train, held_out, orthogonalized_too=True, source="here")
    only = estimate_directions(train, held_out, source="here")
    assert list(found.left_out) == ["blocks.0.hook_resid_pre[-1]"]
    plain = found.of("difference_in_means")
    assert [item.fingerprint for item in only] == [item.fingerprint for item in plain]
    assert [(item.site, item.position) for item in plain] == [
        (Site(0, "resid_pre"), "-2"),
        (SITE, "-1"),
        (SITE, "-2"),
    ]
    for item in found:
        assert item.source == "here" and item.separation is not None
        projections = held_out.at(item.site, item.position) @ item.vector
        expected = separation(projections, ~LABELS)
        assert item.separation.auc == expected.auc
        assert item.separation.d_prime == pytest.approx(expected.d_prime, rel=1e-12)
    for item in plain:
        values = train.at(item.site, item.position).numpy()
        difference = values[::2].mean(0) - values[1::2].mean(0)
        np.testing.assert_allclose(item.raw.numpy(), difference, rtol=1e-12, atol=1e-12)
        negative_mean = torch.from_numpy(values[1::2].mean(0))
        other = found[item.site, item.position, "difference_in_means_orthogonalized"]
        assert abs(float(other.vector @ negative_mean)) < 1e-13
    assert all(item.separation is None for item in estimate_directions(train))


def test_estimates_need_labels_and_some_difference() -> None:
    with pytest.raises(DirectionError, match="labels"):
        estimate_directions(Collected(0, None))
    with pytest.raises(DirectionError, match="labels"):
        estimate_directions(Collected(0, LABELS), Collected(1, None))
    nothing = Collected(0, LABELS, SITE)
    nothing.sites, nothing.positions = (SITE,), ("-1",)
    with pytest.raises(DirectionError, match="no site has a direction"):
        estimate_directions(nothing)


def test_a_variant_of_which_nothing_is_left_is_left_out_and_the_plain_direction_kept() -> None:
    """The negative mean lies along the difference: positive activations are 3 times the negative."""

    class Parallel(Collected):
        def at(self, site: Site, position: str = "-1") -> Tensor:
            scale = torch.where(LABELS, 3.0, 1.0).double()
            return scale[:, None] * draw(site.layer, D)

    found = estimate_directions(Parallel(0, LABELS), Parallel(1, LABELS), orthogonalized_too=True)
    assert {item.method for item in found} == {"difference_in_means"} and len(found) == 4
    key = f"{SITE}[-2] orthogonalized"
    assert len(found.left_out) == 4 and "nothing is left" in found.left_out[key]
    with pytest.raises(DirectionError, match="nothing is left"):
        found[SITE, "-2", "difference_in_means_orthogonalized"]
    with pytest.raises(
        DirectionError, match="such as"
    ):  # another method's absence is not explained
        found[SITE, "-2", "random"]


# --------------------------------------------------------------------------------- collections


def collection() -> Directions:
    found = Separation(0.1 + 0.2, 1 / 3)
    return Directions(
        (
            Direction(draw(0, D), math.pi, Site(0, "resid_post"), "-1", separation=found),
            Direction(draw(1, D), 1e-17, Site(0, "resid_post"), "-2", "random", source="seed 1"),
            Direction(draw(2, D), 2.0, SITE, "mean", separation=Separation(1.0, math.inf)),
        ),
        {"blocks.0.hook_resid_pre[-1]": "the two means are equal"},
        "declining",
    )


def test_directions_load_equal_bit_for_bit(tmp_path: Path) -> None:
    saved, path = collection(), tmp_path / "directions.safetensors"
    more = tuple(Direction(draw(seed, D), 1.0, SITE, str(seed)) for seed in range(3, 60))
    saved = replace(saved, items=saved.items + more)  # scaled again, some would change a bit
    saved.save(path)
    loaded = Directions.load(str(path))
    assert (loaded.left_out, loaded.source, len(loaded)) == (saved.left_out, "declining", 60)
    for a, b in zip(saved, loaded, strict=True):
        assert torch.equal(a.vector, b.vector) and b.vector.dtype == torch.float64
        assert a.norm == b.norm and a.fingerprint == b.fingerprint
        for name in ("site", "position", "method", "separation", "source"):
            assert getattr(a, name) == getattr(b, name)
    files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert set(files) == {"directions.safetensors", "directions.json"}  # nothing left beside
    loaded.save(path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == files


def test_lookup_by_site_and_position() -> None:
    found = collection()
    assert [item.position for item in found] == ["-1", "-2", "mean"]
    assert found[Site(0, "resid_post")] is found.items[0]
    assert found[Site(0, "resid_post"), "-2"] is found.items[1]
    assert found[Site(0, "resid_post"), "-2", "random"] is found.items[1]
    with pytest.raises(DirectionError, match=r"position -1.*method random"):
        found[Site(0, "resid_post"), "-1", "random"]
    with pytest.raises(DirectionError, match="the two means are equal"):
        found[Site(0, "resid_pre")]
    with pytest.raises(DirectionError, match=r"position -7.*there are 2.*such as"):
        found[SITE, "-7"]
    with pytest.raises(DirectionError, match=r"blocks\.9\.hook_resid_pre.*such as"):
        found[Site(9, "resid_pre")]


def test_where_keeps_the_order_and_the_reasons() -> None:
    found = collection()
    kept = found.where([SITE, Site(8, "mlp_out")])
    assert kept.items == found.items[2:] and kept.left_out == found.left_out
    assert found.where([SITE, Site(0, "resid_post")]).items == found.items
    assert len(found.where([])) == 0
    assert found.of("random").items == found.items[1:2] and found.of("x").items == ()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    with pytest.raises(DirectionError, match="run it again"):
        Directions.load(path)
    collection().save(path)
    whole, text = path.read_bytes(), path.with_suffix(".json").read_text()
    for broken in (b"", whole[: len(whole) // 2], whole[:-1], b"\x00" * 64):
        path.write_bytes(broken)
        with pytest.raises(DirectionError, match=r"directions\.safetensors.*run it again"):
            Directions.load(path)
    path.write_bytes(whole)
    for broken_text in ("", text[:-20], "{}"):
        path.with_suffix(".json").write_text(broken_text)
        with pytest.raises(DirectionError, match=r"directions\.json"):
            Directions.load(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(DirectionError, match=r"directions\.json"):
        Directions.load(path)


def test_files_of_different_runs(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    collection().save(path)
    data = json.loads(path.with_suffix(".json").read_text())
    del data["directions"][0]
    path.with_suffix(".json").write_text(json.dumps(data))
    with pytest.raises(DirectionError, match="3 vectors but its JSON describes 2"):
        Directions.load(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: {**data, "format": "another/1"},
        lambda data: {**data, "d_model": 5},
        lambda data: [data],
        lambda data: {k: v for k, v in data.items() if k != "left_out"},
        lambda data: {**data, "directions": [{"site": "0.resid_pre"}] * 3},
        lambda data: {**data, "directions": 3},
        lambda data: {**data, "directions": [{**data["directions"][0], "site": "0.resid"}] * 3},
    ],
)
def test_json_that_does_not_describe_the_vectors(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "directions.safetensors"
    collection().save(path)
    data = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(spoil(data)))
    with pytest.raises(DirectionError, match=r"directions\.json.*run it again"):
        Directions.load(path)


def test_stored_vectors_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    collection().save(path)
    whole = load_file(path)["directions"]
    for spoiled in (2 * whole, whole.float(), whole[:, :-1], whole[0], 0 * whole):
        save_file({"directions": spoiled.contiguous()}, path)
        with pytest.raises(DirectionError, match="run it again"):
            Directions.load(path)
    path.with_suffix(".json").write_bytes(b"\xff\xfe")
    with pytest.raises(DirectionError, match="run it again"):
        Directions.load(path)


def test_no_directions_are_saved_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match="no direction to write"):
        Directions(()).save(tmp_path / "directions.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectionError, match=r"cannot write .*directions\.safetensors"):
        collection().save(tmp_path / "file" / "directions.safetensors")


def test_shuffled_labels_are_stratified() -> None:
    """A permutation leaves a part of the true direction: |cos| 0.22 on average here, and up to 0.49."""
    labels = torch.arange(40) < 20
    generator = torch.Generator().manual_seed(0)
    concept = torch.zeros(64)
    concept[0] = 6.0
    values = torch.randn(40, 64, generator=generator) + labels[:, None] * concept
    site = Site(0, "resid_pre")
    true = difference_in_means(values[labels], values[~labels], site).vector
    cosines = []
    for seed in range(30):
        null = shuffled_labels(labels, seed=seed)
        assert int(null.sum()) == 20 and int((null & labels).sum()) == 10
        direction = difference_in_means(values[null], values[~null], site).vector
        cosines.append(abs(float(direction @ true)))
    assert sum(cosines) / len(cosines) < 0.1
    uneven = torch.arange(40) < 30
    null = shuffled_labels(uneven, seed=1)
    assert int(null.sum()) == 30 and int((null & uneven).sum()) == 22
