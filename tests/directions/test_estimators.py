"""Estimators on synthetic data with known answers, in float64; signs, norms, scales and what is refused."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from interp_ablate.activations.activations import Activations
from interp_ablate.directions.adjustments import interpolated, winsorized
from interp_ablate.directions.direction import Direction, orthogonalized, separation
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.discriminants import lda, logistic
from interp_ablate.directions.estimators import ESTIMATORS, comparison, estimate_with
from interp_ablate.directions.leace_eraser import Eraser, leace
from interp_ablate.directions.mean_difference import difference_in_means, estimate_directions
from interp_ablate.directions.subspaces import Subspace, pca, subspace
from interp_ablate.edits.kinds import Ablate
from interp_ablate.errors import DirectionError, InterpAblateError
from interp_ablate.sites import Site

D = 12
SITE = Site(3, "resid_mid")
SEEDS = range(3)
NAMES = tuple(ESTIMATORS)
READING: tuple[Callable[..., Direction], ...] = (lda, logistic)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_sets(seed: int, n: int = 30, m: int = 25, d: int = D) -> tuple[Tensor, Tensor]:
    """Correlated noise, some dimensions larger than others, and means apart along a random vector."""
    mix = draw(seed + 900, d, d) * torch.linspace(0.3, 3, d, dtype=torch.float64)
    return draw(seed, n, d) @ mix + draw(seed + 50, d), draw(seed + 100, m, d) @ mix


def found(method: str, positive: Tensor, negative: Tensor) -> Direction:
    item = ESTIMATORS[method](positive, negative, SITE)
    assert item is not None
    return item


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def gap(positive: Tensor, negative: Tensor) -> Tensor:
    return positive.double().mean(0) - negative.double().mean(0)


def shuffled(values: Tensor, seed: int) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


# --------------------------------------------------------------------------------- of every estimator


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_positives_project_higher_and_the_norm_is_the_gap_of_the_means(
    method: str, seed: int
) -> None:
    positive, negative = two_sets(seed)
    item = found(method, positive, negative)
    assert item.method == method and item.vector.dtype == torch.float64
    assert float(item.vector.norm()) == pytest.approx(1, abs=1e-12)
    along = float(gap(positive, negative) @ item.vector)
    assert along > 0 and item.norm == pytest.approx(along, rel=1e-10)
    # coefficient 1 moves the negative mean to where the positive one projects
    moved = (negative + item.raw).mean(0) @ item.vector
    assert float(moved) == pytest.approx(float(positive.mean(0) @ item.vector), rel=1e-9)
    back = found(method, negative, positive)
    assert_close(back.raw, -item.raw, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", NAMES)
def test_a_scale_of_the_stream_scales_the_norm_alone(method: str) -> None:
    positive, negative = two_sets(0)
    item = found(method, positive, negative)
    for scale in (1e-6, 7.0, 1e5):
        scaled = found(method, positive * scale, negative * scale)
        assert_close(scaled.vector, item.vector, rtol=1e-6, atol=1e-7)
        assert scaled.norm == pytest.approx(item.norm * scale, rel=1e-6)


@pytest.mark.parametrize("method", NAMES)
def test_what_both_sets_share_changes_nothing(method: str) -> None:
    positive, negative = two_sets(1)
    item, shift = found(method, positive, negative), 100 * draw(5, D)
    shifted = found(method, positive + shift, negative + shift)
    assert_close(shifted.vector, item.vector, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", NAMES)
def test_prompts_in_another_order(method: str) -> None:
    positive, negative = two_sets(2, 20, 20)
    item = found(method, positive, negative)
    together = found(method, shuffled(positive, 3), shuffled(negative, 3))
    assert_close(together.vector, item.vector, rtol=1e-6, atol=1e-7)
    apart = found(method, shuffled(positive, 3), shuffled(negative, 4))
    if method == "pca":  # which are pairs is what it is about
        assert cosine(apart.vector, item.vector) < 0.999999
    else:
        assert_close(apart.vector, item.vector, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_float64(method: str, dtype: torch.dtype) -> None:
    positive, negative = (values.to(dtype) for values in two_sets(0))
    item = found(method, positive, negative)
    same = found(method, positive.double(), negative.double())
    assert torch.equal(item.vector, same.vector) and item.norm == same.norm


@pytest.mark.parametrize("method", [*NAMES, "leace", "subspace"])
def test_place_and_source_are_kept(method: str) -> None:
    makers: dict[str, Callable[..., Any]] = {**ESTIMATORS, "leace": leace, "subspace": subspace}
    more = {"rank": 2} if method == "subspace" else {}
    item = makers[method](*two_sets(0), SITE, position="-2", source="here", **more)
    assert (item.site, item.position, item.source) == (SITE, "-2", "here")
    assert item.method == method and str(SITE) in item.name and "[-2]" in item.name


@pytest.mark.parametrize("method", [*NAMES, "leace", "subspace"])
def test_the_same_input_gives_the_same_bits(method: str) -> None:
    makers: dict[str, Callable[..., Any]] = {**ESTIMATORS, "leace": leace, "subspace": subspace}
    more = {"rank": 3} if method == "subspace" else {}
    first, second = (makers[method](*two_sets(0), SITE, **more) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    other = makers[method](*two_sets(1), SITE, **more)
    elsewhere = makers[method](*two_sets(0), Site(4, "resid_mid"), **more)
    assert len({first.fingerprint, other.fingerprint, elsewhere.fingerprint}) == 3


# --------------------------------------------------------------------------------- refusals

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pca": lambda p, n: pca(p, n, SITE),
    "lda": lambda p, n: lda(p, n, SITE),
    "logistic": lambda p, n: logistic(p, n, SITE),
    "leace": lambda p, n: leace(p, n, SITE),
    "subspace": lambda p, n: subspace(p, n, SITE, rank=2),
}


@pytest.mark.parametrize("method", CALLS)
def test_nan_empty_sets_and_other_widths_are_refused(method: str) -> None:
    positive, negative = two_sets(0)
    broken = positive.clone()
    broken[4, 2] = math.nan
    for bad, part in (
        ((broken, negative), r"positive .*prompts \[4\].*dtype"),
        ((positive, broken), r"negative .*prompts \[4\].*dtype"),
        ((positive[:0], negative), "at least one prompt"),
        ((positive, negative[0]), r"accepted is \[prompt, d_model\]"),
        ((positive, negative[:, :-1]), f"d_model differs at .*: {D} against {D - 1}"),
        ((positive, positive), "difference in means is zero.*use another place"),
    ):
        with pytest.raises(DirectionError, match=part):
            CALLS[method](*bad)


@pytest.mark.parametrize("method", ["lda", "logistic", "leace"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_covariance_needs_two_prompts_a_side(method: str, side: int) -> None:
    sets = list(two_sets(0))
    sets[side] = sets[side][:1]
    numbers = ("1 positive and 25 negative", "30 positive and 1 negative")[side]
    with pytest.raises(
        DirectionError, match=f"{method} .*{numbers}.*give more prompts, or use diff"
    ):
        CALLS[method](*sets)
    sets[side] = two_sets(0)[side][:2]
    CALLS[method](*sets)


@pytest.mark.parametrize("method", ["lda", "logistic", "leace"])
def test_prompts_without_spread_have_no_covariance(method: str) -> None:
    one, other = draw(0, 1, D).expand(5, D), draw(1, 1, D).expand(4, D)
    with pytest.raises(DirectionError, match=r"one and the same activation .*difference_in_means"):
        CALLS[method](one, other)
    CALLS[method](one, other + draw(2, 4, D))  # the spread of one set is enough


@pytest.mark.parametrize("method", CALLS)
def test_dimensions_that_never_change_are_no_trouble(method: str) -> None:
    """Zeros, constants, a constant per set, and a dimension 1000 times the others."""
    positive, negative = two_sets(0, 8, 6)
    for values in (positive, negative):
        values[:, 0], values[:, 1] = 0, 5
        values[:, 2] *= 1000
    positive[:, 3], negative[:, 3] = 1, -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        item = CALLS[method](positive, negative)
    for name in ("vector", "vectors", "write", "read"):
        part = vars(item).get(name)
        if part is not None:
            assert torch.isfinite(part).all() and float(part[..., :2].abs().max()) < 1e-12


# --------------------------------------------------------------------------------- PCA, subspaces


def test_pca_keeps_the_mean_difference_that_centring_takes_away() -> None:
    """Differences of 5 along one axis whatever the pair, and of 2 either way along another."""
    along, across = torch.eye(D, dtype=torch.float64)[:2]
    negative = draw(0, 40, D)
    signs = torch.tensor([1.0, -1.0]).double().repeat(20)
    differences = 5 * along + 2 * signs[:, None] * across
    item = pca(negative + differences, negative, SITE)
    assert_close(item.vector, along, rtol=0, atol=1e-12)
    assert item.norm == pytest.approx(5, abs=1e-12)
    centred = differences - differences.mean(0)
    other = torch.linalg.svd(centred).Vh[0]
    assert abs(float(other @ across)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_pca_is_the_axis_with_the_largest_sum_of_squares(seed: int) -> None:
    positive, negative = two_sets(seed, 20, 20)
    differences = (positive - negative).numpy()
    _, vectors = np.linalg.eigh(differences.T @ differences)
    item = pca(positive, negative, SITE)
    assert abs(cosine(item.vector, torch.from_numpy(vectors[:, -1].copy()))) > 1 - 1e-12
    mean = difference_in_means(positive, negative, SITE)
    assert mean is not None and abs(cosine(item.vector, mean.vector)) < 1 - 1e-6


def test_pca_pairs_the_first_of_both_and_takes_the_means_of_all() -> None:
    positive, negative = two_sets(0, 20, 12)
    item, cut = pca(positive, negative, SITE), pca(positive[:12], negative, SITE)
    assert_close(item.vector.abs(), cut.vector.abs(), rtol=1e-12, atol=1e-12)
    assert item.norm == pytest.approx(float((gap(positive, negative) @ item.vector).abs()))
    assert item.norm != pytest.approx(cut.norm, rel=1e-6)
    swapped = pca(negative, positive, SITE)
    assert_close(swapped.raw, -item.raw, rtol=1e-9, atol=1e-9)


def test_pca_of_one_pair_is_their_difference() -> None:
    positive, negative = two_sets(0, 1, 1)
    assert_close(pca(positive, negative, SITE).raw, (positive - negative)[0], rtol=1e-12, atol=0)


def test_pca_without_an_axis_or_a_sign_is_refused() -> None:
    same = draw(0, 4, D)
    with pytest.raises(DirectionError, match=r"first 4 positive .*pair by pair.*equal size"):
        pca(torch.cat([same, draw(1, 3, D) + 4]), same, SITE)
    axes = torch.eye(D, dtype=torch.float64)
    with pytest.raises(DirectionError, match=r"first two principal axes .*same length.*`subspace`"):
        pca(axes[:2] * 3, torch.zeros(2, D).double(), SITE)
    pairs = torch.stack([axes[0] + 9 * axes[1], axes[0] - 9 * axes[1]])
    with pytest.raises(DirectionError, match=r"pca at .*orthogonal to the difference in means"):
        pca(pairs, torch.zeros(2, D).double(), SITE)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_subspace_starts_with_the_mean_difference(rank: int) -> None:
    positive, negative = two_sets(0, 20, 20)
    item = subspace(positive, negative, SITE, rank=rank)
    mean = difference_in_means(positive, negative, SITE)
    assert mean is not None and item.rank == rank and item.method == "subspace"
    assert_close(item.vectors[0], mean.vector, rtol=0, atol=1e-12)
    assert_close(item.vectors @ item.vectors.T, torch.eye(rank).double(), rtol=0, atol=1e-13)
    # the next rows: what holds most of the differences once the first is gone (equal sizes: centred)
    differences = positive - negative
    projected = np.eye(D) - np.outer(mean.vector, mean.vector)
    _, vectors = np.linalg.eigh(projected @ np.cov(differences.numpy().T) @ projected)
    for row, vector in zip(item.vectors[1:], vectors.T[::-1]):
        assert abs(cosine(row, torch.from_numpy(vector.copy()))) > 1 - 1e-10
        assert float(row[row.abs().argmax()]) > 0
    deeper = subspace(positive, negative, SITE, rank=rank + 1)
    assert_close(deeper.vectors[:rank], item.vectors, rtol=0, atol=1e-12)


def test_a_subspace_is_what_ablate_takes() -> None:
    positive, negative = two_sets(0, 20, 20)
    item = subspace(positive, negative, SITE, rank=3)
    edit = Ablate(item.vectors, SITE)
    assert_close(edit.vectors, item.vectors, rtol=0, atol=1e-12)
    left = edit.map_at(SITE)(positive) @ item.vectors.T
    assert float(left.abs().max()) < 1e-12
    assert float((positive @ item.vectors.T).abs().max()) > 1


def test_a_rank_that_is_not_there() -> None:
    positive, negative = two_sets(0, 4, 6)
    # 4 pairs span 4 directions; the means of unequal sets are no combination of them
    assert subspace(positive, negative, SITE, rank=5).rank == 5
    with pytest.raises(DirectionError, match=r"4 paired differences .*span 5 .*rank 6 needs more"):
        subspace(positive, negative, SITE, rank=6)
    assert subspace(positive, negative[:4], SITE, rank=4).rank == 4
    with pytest.raises(DirectionError, match="rank 4 at most"):
        subspace(positive, negative[:4], SITE, rank=5)
    wide = two_sets(0, 40, 40)
    assert subspace(*wide, SITE, rank=D).rank == D
    with pytest.raises(DirectionError, match=f"rank {D} at most"):
        subspace(*wide, SITE, rank=D + 1)
    for bad in (0, -1, 1.5, True, "2", None):
        with pytest.raises(DirectionError, match="a rank is an integer from 1; got"):
            subspace(positive, negative, SITE, rank=bad)  # type: ignore[arg-type]


def test_only_orthonormal_rows_make_a_subspace() -> None:
    for bad, part in (
        (torch.ones(2, D), "not orthonormal"),
        (2 * torch.eye(3, D), "not orthonormal"),
        (torch.full((1, D), math.nan), "not orthonormal and finite"),
        (torch.ones(D), r"\[k, d_model\]"),
        (torch.ones(0, D), r"\(0, 12\)"),
    ):
        with pytest.raises(DirectionError, match=part):
            Subspace(bad, SITE)
    item = Subspace(torch.eye(2, D), SITE, source="s")
    assert item.vectors.dtype == torch.float64
    with pytest.raises(FrozenInstanceError):
        item.source = "other"  # type: ignore[misc]


# --------------------------------------------------------------------------------- LDA, logistic


def test_lda_finds_what_fisher_would_and_the_means_do_not() -> None:
    """A Gaussian of known covariance: the inverse covariance times the difference, within sampling."""
    spread = torch.linspace(0.5, 3, D).double()
    rotation = torch.linalg.qr(draw(7, D, D)).Q
    shift = draw(8, D)
    positive = draw(0, 8000, D) * spread @ rotation.T + shift
    negative = draw(1, 8000, D) * spread @ rotation.T
    answer = rotation @ ((rotation.T @ shift) / spread.square())
    item = lda(positive, negative, SITE)
    assert cosine(item.vector, answer) > 0.999
    assert cosine(gap(positive, negative), answer) < 0.9
    some = positive[:500], negative[:500]
    for read in READING:  # they read better than the means do
        other = separation_of(read(*some, SITE).vector, *some)
        assert other > separation_of(gap(*some), *some) + 0.05


def separation_of(vector: Tensor, positive: Tensor, negative: Tensor) -> float:
    values = torch.cat([positive, negative])
    return separation(values @ vector, torch.arange(len(values)) < len(positive)).auc


@pytest.mark.parametrize("d", [D, 60])
def test_lda_is_ledoit_and_wolfs_covariance_of_each_set(d: int) -> None:
    from sklearn.covariance import ledoit_wolf

    positive, negative = two_sets(0, 20, 30, d)
    total = 0
    for values, share in ((positive, 0.4), (negative, 0.6)):
        scale = values.numpy().std(0)
        total = total + share * ledoit_wolf(values.numpy() / scale)[0] * np.outer(scale, scale)
    answer = np.linalg.solve(total, gap(positive, negative).numpy())
    assert cosine(lda(positive, negative, SITE).vector, torch.from_numpy(answer)) > 1 - 1e-10


@pytest.mark.parametrize("method", ["lda", "logistic"])
def test_units_of_a_dimension_do_not_matter_to_a_reader(method: str) -> None:
    """Coordinates scaled by s: what reads the same thing has its coefficients divided by s."""
    positive, negative = two_sets(0)
    units = torch.logspace(-3, 3, D).double()
    item = found(method, positive, negative)
    scaled = found(method, positive * units, negative * units)
    back = scaled.vector * units
    assert cosine(back, item.vector) > 1 - 1e-9
    assert cosine(scaled.vector, item.vector) < 0.99


@pytest.mark.parametrize(("n", "d", "C"), [(30, D, 1.0), (30, D, 0.01), (12, 40, 1.0), (30, D, 10)])
def test_logistic_is_the_penalized_optimum_over_all_dimensions(n: int, d: int, C: float) -> None:
    """Fitted by Newton in the span of the prompts; scipy minimizes over every dimension."""
    from scipy.optimize import minimize

    positive, negative = two_sets(0, n, n - 3, d)
    rows = torch.cat([positive, negative]).numpy()
    features = (rows - rows.mean(0)) / rows.std(0)
    signs = np.where(np.arange(len(rows)) < n, 1.0, -1.0)

    def loss(given: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (features @ given[:-1] + given[-1])
        pull = -C * signs / (1 + np.exp(margins))
        value = given[:-1] @ given[:-1] / 2 + C * np.logaddexp(0, -margins).sum()
        return value, np.append(given[:-1] + pull @ features, pull.sum())

    options = {"maxiter": 5000, "gtol": 1e-9}
    best = minimize(loss, np.zeros(d + 1), jac=True, method="BFGS", options=options).x
    item = logistic(positive, negative, SITE, C=C)
    assert cosine(item.vector, torch.from_numpy(best[:-1] / rows.std(0))) > 1 - 1e-10


def test_a_strong_penalty_leaves_the_standardized_mean_difference() -> None:
    positive, negative = two_sets(0)
    variance = torch.cat([positive, negative]).var(0)
    limit = gap(positive, negative) / variance
    assert cosine(logistic(positive, negative, SITE, C=1e-7).vector, limit) > 1 - 1e-9
    assert cosine(logistic(positive, negative, SITE).vector, limit) < 0.99
    for bad in (0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(DirectionError, match="C is a positive number"):
            logistic(positive, negative, SITE, C=bad)  # type: ignore[arg-type]


def test_a_fit_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_ablate.directions.discriminants.LOGISTIC_STEPS", 1)
    with (
        warnings.catch_warnings(),
        pytest.raises(
            DirectionError, match="did not converge in 1 steps with C=1: give a smaller C"
        ),
    ):
        warnings.simplefilter("ignore")
        logistic(*two_sets(0), SITE)


# --------------------------------------------------------------------------------- LEACE

SIZES = [(40, 30, D), (9, 7, 40), (400, 150, D)]  # more prompts than dimensions, fewer, uneven


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_after_leace_no_linear_probe_finds_the_label(
    n: int, m: int, d: int, shrinkage: bool
) -> None:
    from sklearn.linear_model import LogisticRegression

    positive, negative = two_sets(0, n, m, d)
    eraser = leace(positive, negative, SITE, shrinkage=shrinkage)
    rows, labels = torch.cat([positive, negative]), torch.arange(n + m) < n
    clean = eraser(rows)
    before, after = gap(positive, negative), gap(clean[:n], clean[n:])
    assert float(after.norm()) < 1e-10 * float(before.norm())
    crossed = (clean - clean.mean(0)).T @ (labels.double() - labels.double().mean())
    assert float(crossed.abs().max()) < 1e-9
    losses = []
    for values in (rows, clean):
        probe = LogisticRegression(tol=1e-10, max_iter=5000).fit(values.numpy(), labels.numpy())
        chance = probe.predict_proba(values.numpy())[:, 1]
        taken = np.where(labels.numpy(), chance, 1 - chance)
        losses.append(-float(np.log(taken).mean()))
    share = n / (n + m)
    constant = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert losses[1] == pytest.approx(constant, abs=1e-8)
    assert losses[0] < constant - 0.02
    for read in READING:
        with pytest.raises(DirectionError, match="difference in means is zero"):
            read(clean[:n], clean[n:], SITE)


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_the_eraser_is_the_packages_own(n: int, m: int, d: int, shrinkage: bool) -> None:
    from concept_erasure import LeaceEraser

    positive, negative = two_sets(1, n, m, d)
    rows, labels = torch.cat([positive, negative]), torch.arange(n + m) < n
    theirs = LeaceEraser.fit(rows, labels.double(), shrinkage=shrinkage)
    mine = leace(positive, negative, SITE, shrinkage=shrinkage)
    fresh = draw(5, 20, d)
    for values in (rows, fresh):
        assert_close(mine(values), theirs(values), rtol=0, atol=1e-8)
    assert_close(mine.centre, rows.mean(0), rtol=0, atol=1e-12)
    projection = torch.eye(d).double() - torch.outer(mine.write, mine.read)
    assert_close(projection, theirs.P, rtol=0, atol=1e-8)
    changed = leace(positive, negative, SITE, shrinkage=not shrinkage)
    assert cosine(changed.read, mine.read) < 1 - 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_leace_writes_the_mean_difference_and_reads_through_the_covariance(seed: int) -> None:
    positive, negative = two_sets(seed)
    eraser = leace(positive, negative, SITE, shrinkage=False)
    mean = gap(positive, negative)
    assert_close(eraser.write, mean / mean.norm(), rtol=0, atol=1e-10)
    covariance = torch.cat([positive, negative]).T.cov()
    assert cosine(eraser.read, torch.linalg.solve(covariance, mean)) > 1 - 1e-10
    assert float(eraser.read @ eraser.write) == pytest.approx(1, abs=1e-12)
    x = draw(3, 4, 5, D)
    once = eraser(x)
    assert_close(eraser(once), once, rtol=0, atol=1e-10)
    assert float(((once - eraser.centre) @ eraser.read).abs().max()) < 1e-10
    assert_close(eraser(eraser.centre), eraser.centre, rtol=0, atol=0)
    assert float((once - x).abs().max()) > 0.1
    difference = (once - x).reshape(-1, D)
    assert int(torch.linalg.matrix_rank(difference, rtol=1e-8)) == 1
    assert eraser.method == "leace"


def test_leace_moves_the_stream_least_of_all_that_erase() -> None:
    positive, negative = two_sets(0, 300, 300)
    rows, mean = torch.cat([positive, negative]), gap(positive, negative)
    eraser = leace(positive, negative, SITE, shrinkage=False)
    least = float((eraser(rows) - rows).square().sum())
    for seed in range(20):
        read = eraser.read + 0.1 * draw(seed, D)
        other = replace(eraser, read=read / (read @ eraser.write))
        changed = other(rows)
        assert float(gap(changed[:300], changed[300:]).norm()) < 1e-10 * float(mean.norm())
        assert float((changed - rows).square().sum()) > least


def test_leace_does_not_depend_on_scale_or_shift() -> None:
    """The package adds absolute epsilons: at 1e-6 they would decide about the shrinkage."""
    positive, negative = two_sets(0, 9, 7, 40)
    eraser = leace(positive, negative, SITE)
    for scale, shift in ((1e-6, 0.0), (1e4, 3e5)):
        other = leace(positive * scale + shift, negative * scale + shift, SITE)
        assert_close(other.read, eraser.read, rtol=1e-6, atol=1e-7)
        assert_close(other.write, eraser.write, rtol=1e-6, atol=1e-7)
        assert_close(other.centre, eraser.centre * scale + shift, rtol=1e-9, atol=1e-12)
    swapped = leace(negative, positive, SITE)
    assert_close(swapped.write, -eraser.write, rtol=1e-9, atol=1e-9)
    assert_close(swapped.read, -eraser.read, rtol=1e-8, atol=1e-8)


def test_a_weak_concept_is_erased_too() -> None:
    """Below the package's default tolerance of 0.01 nothing would be taken out."""
    positive, negative = draw(0, 5000, 3), draw(1, 5000, 3)
    positive = positive - gap(positive, negative) + torch.tensor([0.005, 0, 0])
    eraser = leace(positive, negative, SITE)
    left = gap(eraser(positive), eraser(negative))
    assert float(left.norm()) < 1e-12 < 0.004 < float(gap(positive, negative).norm())


def test_a_shrunk_covariance_that_is_not_positive_is_refused() -> None:
    """Rows of a Hadamard matrix are more alike in all dimensions than any sample: the rule overshoots."""
    from scipy.linalg import hadamard

    rows = torch.from_numpy(hadamard(8)[:, 1:5].copy()).double()
    rows[:, 0] *= 1.05
    positive, negative = rows[rows[:, 0] > 0], rows[rows[:, 0] < 0]
    with pytest.raises(DirectionError, match=r"of 2.1: .* not positive.*or shrinkage=False"):
        leace(positive, negative, SITE)
    eraser = leace(positive, negative, SITE, shrinkage=False)
    assert float(gap(eraser(positive), eraser(negative)).norm()) < 1e-12


def test_an_eraser_keeps_the_dtype_and_the_input() -> None:
    eraser = leace(*two_sets(0), SITE)
    x = draw(3, 4, D).to(torch.bfloat16)
    kept = x.clone()
    assert eraser(x).dtype == torch.bfloat16 and torch.equal(x, kept)
    assert_close(eraser(x).double(), eraser(x.double()), rtol=1e-2, atol=1e-2)


def test_what_is_no_projection_is_no_eraser() -> None:
    unit = torch.eye(D).double()[0]
    good = Eraser(unit, unit, unit, SITE)
    for changes, part in (
        ({"read": 2 * unit}, r"read \. write = 1; here it is 2"),
        ({"read": unit * math.nan}, "finite"),
        ({"centre": unit * math.inf}, "finite"),
        ({"write": torch.ones(D - 1).double()}, r"each have the shape \[d_model\]"),
        ({"write": unit[None], "read": unit[None], "centre": unit[None]}, r"\(1, 12\)"),
    ):
        with pytest.raises(DirectionError, match=part):
            replace(good, **changes)
    with pytest.raises(FrozenInstanceError):
        good.source = "other"  # type: ignore[misc]


def test_without_the_package_leace_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    with pytest.raises(DirectionError, match=r"pip install 'interp-ablate\[leace\]'"):
        leace(*two_sets(0), SITE)


# --------------------------------------------------------------------------------- over all sites

SITES = (Site(0, "resid_pre"), Site(0, "resid_post"), Site(1, "resid_post"))


def activations(seed: int, n: int = 16, m: int = 14, **changes: Any) -> Activations:
    """Labels mixed through the prompts; the means are apart along dimension 1 + the site's index."""
    labels = shuffled(torch.arange(n + m) < n, seed)
    values = draw(seed, n + m, 2, len(SITES), D) * torch.linspace(1, 0.2, D).double()
    for index in range(len(SITES)):
        values[labels, :, index, 1 + index] += 2
    return replace(Activations(values, SITES, ("-2", "-1"), labels), **changes)


@dataclass(frozen=True)
class Bare:
    """The least that `HasActivations` asks for."""

    inner: Activations

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.inner.sites

    @property
    def positions(self) -> tuple[str, ...]:
        return self.inner.positions

    @property
    def labels(self) -> Tensor | None:
        return self.inner.labels

    def at(self, site: Site, position: str = "-1") -> Tensor:
        return self.inner.at(site, position)


@pytest.mark.parametrize("method", NAMES)
def test_every_site_and_position_is_estimated_and_measured(method: str) -> None:
    train, held_out = activations(0), activations(1)
    result = estimate_with(method, train, Bare(held_out), source="model x")
    places = [(site, position) for site in SITES for position in ("-2", "-1")]
    assert [(item.site, item.position) for item in result] == places
    assert result.source == "model x" and not result.left_out
    assert train.labels is not None and held_out.labels is not None
    for item in result:
        values = train.at(item.site, item.position)
        alone = found(method, values[train.labels], values[~train.labels])
        assert_close(item.raw, alone.raw, rtol=1e-12, atol=1e-12)
        assert item.method == method and item.source == "model x"
        projections = held_out.at(item.site, item.position) @ item.vector
        measured = separation(projections, held_out.labels)
        assert item.separation is not None and item.separation.auc == measured.auc > 0.6
        assert item.separation.d_prime == pytest.approx(measured.d_prime, rel=1e-9)
    assert all(item.separation is None for item in estimate_with(method, train))


def test_difference_in_means_is_estimate_directions_own() -> None:
    train, held_out = activations(0), activations(1)
    plain = estimate_directions(train, held_out, source="s")
    mine = estimate_with("difference_in_means", train, held_out, source="s")
    assert [item.fingerprint for item in mine] == [item.fingerprint for item in plain]
    assert [item.separation for item in mine] == [item.separation for item in plain]


def test_only_the_sites_asked_for_in_forward_order() -> None:
    train = activations(0)
    result = estimate_with("pca", train, sites=[SITES[2], SITES[0]])
    assert [item.site for item in result.of("pca")] == [SITES[0]] * 2 + [SITES[2]] * 2
    with pytest.raises(
        DirectionError, match=r"no activations at blocks.7.hook_resid_mid: collected"
    ):
        estimate_with("pca", train, sites=[Site(7, "resid_mid")])
    with pytest.raises(DirectionError, match="no site has a direction of pca; no site was given"):
        estimate_with("pca", train, sites=[])


def test_where_nothing_can_be_estimated_the_reason_is_kept(tmp_path: Any) -> None:
    train = activations(0)
    assert train.labels is not None
    train.values[:, 1, 0] = 1.0  # one activation whatever the prompt
    train.values[:, 0, 2] = torch.where(train.labels, 2.0, 1.0)[:, None]  # no spread in the sets
    result = estimate_with("lda", train)
    assert len(result) == 4
    assert set(result.left_out) == {f"{SITES[0]}[-1]", f"{SITES[2]}[-2]"}
    with pytest.raises(
        DirectionError, match=r"no direction at .*: the difference in means is zero"
    ):
        result[SITES[0], "-1"]
    with pytest.raises(DirectionError, match="one and the same activation"):
        result[SITES[2], "-2"]
    assert len(estimate_with("difference_in_means", train)) == 5
    result.save(tmp_path / "found.safetensors")
    again = Directions.load(tmp_path / "found.safetensors")
    assert [item.fingerprint for item in again] == [item.fingerprint for item in result]


def test_bad_activations_are_refused() -> None:
    train, held_out = activations(0), activations(1)
    with pytest.raises(
        DirectionError, match=r"'leace': accepted are difference_in_means, pca, lda"
    ):
        estimate_with("leace", train)
    for pair in (
        (activations(0, labels=None), held_out),
        (train, activations(1, labels=None)),
    ):
        with pytest.raises(DirectionError, match="collect a ContrastSet"):
            estimate_with("pca", *pair)
        with pytest.raises(DirectionError, match="collect a ContrastSet"):
            comparison(*pair, SITES[0])
    narrow = activations(1, values=held_out.values[..., :-1])
    with pytest.raises(
        DirectionError, match=f"d_model differs at .*: {D} in training, {D - 1} held"
    ):
        estimate_with("pca", train, narrow)
    broken = activations(0)
    broken.values[3, 0, 1, 2] = (
        math.nan
    )  # not one place left out: nothing of this run can be trusted
    with pytest.raises(DirectionError, match="NaN or infinity"):
        estimate_with("lda", broken)
    alone = activations(0, 1, 1)
    with pytest.raises(
        DirectionError, match=r"no site has a direction of lda; .*two prompts a side"
    ):
        estimate_with("lda", alone)
    one_set = activations(0, labels=torch.ones(30, dtype=torch.bool))
    with pytest.raises(DirectionError, match=r"negative activations .*at least one prompt"):
        estimate_with("pca", one_set)


def test_the_comparison_lists_every_estimator() -> None:
    train, held_out = activations(0), activations(1)
    table = comparison(train, held_out, SITES[1], "-2").set_index("estimator")
    assert list(table.index) == [
        "difference_in_means",
        "difference_in_means_orthogonalized",
        "pca",
        "lda",
        "logistic",
        "leace_write",
        "leace_read",
    ]
    assert train.labels is not None and held_out.labels is not None
    values, held = train.at(SITES[1], "-2"), held_out.at(SITES[1], "-2")
    positive, negative = values[train.labels], values[~train.labels]
    mean = difference_in_means(positive, negative, SITE)
    assert mean is not None
    eraser = leace(positive, negative, SITE)
    vectors = {name: found(name, positive, negative).vector for name in NAMES}
    vectors["difference_in_means_orthogonalized"] = orthogonalized(mean, negative.mean(0)).vector
    vectors["leace_write"], vectors["leace_read"] = eraser.write, eraser.read / eraser.read.norm()
    for name, vector in vectors.items():
        row, measured = table.loc[name], separation(held @ vector, held_out.labels)
        assert row.auc == pytest.approx(measured.auc) and row.left_out == ""
        assert row.d_prime == pytest.approx(measured.d_prime, rel=1e-6)
        assert row.cosine == pytest.approx(cosine(vector, mean.vector), abs=1e-8)
        assert row.norm == pytest.approx(float(vector @ mean.raw), rel=1e-6)
    assert table.cosine["difference_in_means"] == pytest.approx(1, abs=1e-12)
    assert table.cosine["leace_write"] == pytest.approx(1, abs=1e-10)
    assert table.cosine["leace_read"] < 0.999
    by_number = comparison(train, held_out, SITES[1], -1).set_index("estimator")
    default = comparison(train, held_out, SITES[1]).set_index("estimator")
    assert by_number.equals(default) and not by_number.equals(table)


def test_an_estimator_of_another_package(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ten-line package: it is estimated with, listed in the comparison, and named where it fails."""
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[interp_ablate.estimators]\nmedians = outside_estimators:medians\n"
    )
    module = tmp_path / "outside_estimators.py"
    module.write_text(
        "from interp_ablate.directions import Direction\n"
        "def medians(positive, negative, site, *, position='-1', source=''):\n"
        "    gap = positive.double().median(0).values - negative.double().median(0).values\n"
        "    return Direction(gap, float(gap.norm()), site, position, 'medians', source=source)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    train, held_out = activations(0), activations(1)
    result = estimate_with("medians", train, held_out, source="s")
    assert len(result) == 6 and {item.method for item in result} == {"medians"}
    assert all(item.separation is not None for item in result)
    table = comparison(train, held_out, SITES[1]).set_index("estimator")
    assert table.auc["medians"] > 0.6 and table.left_out["medians"] == ""
    with pytest.raises(DirectionError, match=r"'mean': accepted are .*logistic, medians"):
        estimate_with("mean", train)
    (info / "entry_points.txt").write_text("[interp_ablate.estimators]\nlost = outside_gone:it\n")
    with pytest.raises(InterpAblateError, match="outside registers 'lost'"):
        estimate_with("lost", train)


def test_the_comparison_keeps_the_rows_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    table = comparison(activations(0, 1, 8), activations(1), SITES[0]).set_index("estimator")
    assert table.auc.notna().to_dict() == {
        "difference_in_means": True,
        "difference_in_means_orthogonalized": True,
        "pca": True,
        "lda": False,
        "logistic": False,
        "leace_write": False,
        "leace_read": False,
    }
    assert "two prompts a side" in table.left_out["lda"]
    assert "pip install" in table.left_out["leace_read"]
    same = activations(0)
    same.values[:] = 1.0
    with pytest.raises(DirectionError, match="difference in means is zero"):
        comparison(same, activations(1), SITES[0])


# --------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0, 0.01])
@pytest.mark.parametrize("d", [1, 2, 50, 301])
def test_winsorizing_clips_each_vector_at_its_own_quantile(quantile: float, d: int) -> None:
    values = draw(0, 4, 3, d) * torch.tensor([1.0, 10.0, 0.0]).double()[:, None]
    before = values.clone()
    clipped = winsorized(values, quantile)
    assert torch.equal(values, before) and clipped is not values
    limits = np.quantile(values.abs().numpy(), quantile, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        clipped.numpy(), np.clip(values.numpy(), -limits, limits), rtol=1e-12
    )
    if quantile == 1:
        assert torch.equal(clipped, values)
    elif d == 301:
        assert not torch.equal(clipped, values)


def test_winsorizing_by_default_takes_half_a_percent() -> None:
    values = torch.arange(1.0, 1002.0).double()
    values[-3] *= -1
    clipped = winsorized(values)
    assert torch.equal(clipped[:996], values[:996])
    assert clipped[996:].tolist() == [996, 996, -996, 996, 996]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_winsorizing_keeps_the_dtype(dtype: torch.dtype) -> None:
    values = draw(0, 6, 200).to(dtype)
    clipped = winsorized(values, 0.9)
    assert clipped.dtype == dtype
    wide = winsorized(values.double(), 0.9)
    assert_close(clipped.double(), wide, rtol=1e-2, atol=1e-3)
    assert torch.equal(clipped != values, wide != values.double())


def test_winsorizing_lets_the_other_dimensions_decide() -> None:
    positive, negative = two_sets(0, 30, 30, 300)
    noisy = [values.clone() for values in (positive, negative)]
    for values, seed in zip(noisy, (7, 8)):
        values[:, 5] = 1e5 + 1e4 * draw(seed, 30)
    mean = gap(positive, negative)
    mean[5] = 0
    assert cosine(gap(*noisy), mean) < 0.1
    assert cosine(gap(*(winsorized(values) for values in noisy)), mean) > 0.8


def test_only_finite_floats_have_outliers() -> None:
    for bad, part in (
        (torch.tensor(1.0), r"\[..., d_model\]"),
        (torch.ones(3, 0), r"\(3, 0\)"),
        (torch.ones(3, 4, dtype=torch.long), "torch.int64"),
        (torch.tensor([1.0, math.nan]), "NaN or infinity"),
        (torch.tensor([1.0, math.inf]), "NaN or infinity"),
    ):
        with pytest.raises(DirectionError, match=part):
            winsorized(bad)


def test_quantiles_that_mean_nothing() -> None:
    values = draw(0, 3, D)
    for bad in (0, -0.1, 1.01, math.nan, True, "0.9", 99.5):
        with pytest.raises(DirectionError, match="a quantile is more than 0 and at most 1"):
            winsorized(values, bad)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------- between layers


def ladder() -> Directions:
    """Layer k points along axis k with norm 10 k; at -2 and for pca elsewhere."""
    axes = torch.eye(D).double()
    rows = [Direction(axes[k], 10.0 * k + 1, Site(k, "resid_post"), source="run") for k in range(4)]
    rows += [replace(item, vector=-item.vector, position="-2") for item in rows]
    rows += [replace(item, vector=axes[5], method="pca") for item in rows[:4]]
    rows += [Direction(axes[6], 3.0, Site(2, "resid_mid")), Direction(axes[6], 3.0, SITE)]
    return Directions(tuple(rows), {"blocks.4.hook_resid_post[-1]": "it was too dull"})


@pytest.mark.parametrize(
    ("layer", "nearest"), [(1.25, 1), (1.5, 2), (1.75, 2), (2.5, 3), (0.1, 0), (2.999, 3)]
)
def test_between_two_layers_the_direction_turns(layer: float, nearest: int) -> None:
    item = interpolated(ladder(), layer, "resid_post")
    low, share = math.floor(layer), layer - math.floor(layer)
    expected = torch.zeros(D).double()
    expected[low], expected[low + 1] = 1 - share, share
    assert_close(item.vector, expected / expected.norm(), rtol=0, atol=1e-12)
    assert item.norm == pytest.approx(10 * layer + 1)
    assert (item.site, item.position) == (Site(nearest, "resid_post"), "-1")
    assert item.method == "difference_in_means" and item.separation is None
    assert item.source == f"run layer {layer:g}"


def test_a_whole_layer_is_its_own() -> None:
    ladder_ = ladder()
    for layer in (0, 2, 3, 2.0):
        site = Site(int(layer), "resid_post")
        assert interpolated(ladder_, layer, "resid_post") is ladder_[site]


def test_which_of_several_directions_at_a_site() -> None:
    axes = torch.eye(D).double()
    other = interpolated(ladder(), 1.5, "resid_post", position="-2")
    assert_close(other.vector, -(axes[1] + axes[2]) / math.sqrt(2), rtol=0, atol=1e-12)
    assert other.position == "-2"
    principal = interpolated(ladder(), 1.5, "resid_post", method="pca")
    assert_close(principal.vector, axes[5], rtol=0, atol=1e-12)
    assert principal.method == "pca"
    middle = interpolated(ladder(), 2.5, "resid_mid")
    assert middle.site == Site(3, "resid_mid") and middle.norm == 3


def test_layers_between_which_there_is_nothing() -> None:
    for bad in (-0.5, math.nan, math.inf, True, "1.5", None):
        with pytest.raises(DirectionError, match="a fractional layer is a finite number from 0"):
            interpolated(ladder(), bad, "resid_post")  # type: ignore[arg-type]
    with pytest.raises(DirectionError, match=r"blocks.4.hook_resid_post.*it was too dull"):
        interpolated(ladder(), 3.5, "resid_post")
    with pytest.raises(DirectionError, match=r"no direction at any resid_pre.*there are 14"):
        interpolated(ladder(), 1.5, "resid_pre")
    with pytest.raises(DirectionError, match="no direction at any resid_post, method lda"):
        interpolated(ladder(), 1.5, "resid_post", method="lda")
    first = ladder()[Site(0, "resid_post")]
    opposite = replace(first, vector=-first.vector, site=Site(1, "resid_post"))
    with pytest.raises(DirectionError, match=r"point in opposite ways.*use a whole layer"):
        interpolated(Directions((first, opposite)), 0.5, "resid_post")
    interpolated(Directions((first, opposite)), 0.4, "resid_post")


def test_a_site_whose_activations_are_constant_has_no_direction() -> None:
    """The last token of the template, before the first block: every estimator says so in the same words."""
    same = torch.ones(4, 6).double()
    for call in (
        lambda: leace(same, same, SITES[0]),
        lambda: subspace(same, same, SITES[0], rank=2),
        lambda: pca(same, same, SITES[0]),
        lambda: lda(same, same, SITES[0]),
        lambda: logistic(same, same, SITES[0]),
    ):
        with pytest.raises(
            DirectionError, match="sees the same activation whatever the prompt says"
        ):
            call()
    assert difference_in_means(same, same, SITES[0]) is None
