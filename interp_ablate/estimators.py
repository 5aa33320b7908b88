"""Estimators beside difference in means: PCA, rank-k subspaces, LDA, logistic regression, LEACE.

Knows: which of them say what a model writes and which only tell two sets apart, signs, norms, outliers,
directions between layers, and one table that compares them. Does not know: models, or any edit.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.directions import (
    ZERO_TOLERANCE,
    Direction,
    Directions,
    HasActivations,
    difference_in_means,
    orthogonalized,
    separation,
)
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Point, Site

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# Axes whose lengths differ by less than this fraction are one another's equals: none of them is first.
TIE_TOLERANCE = 1e-9
# Fits that stop before this gradient, or this many steps, are refused.
LOGISTIC_TOLERANCE, LOGISTIC_STEPS = 1e-8, 1000
# A whitened cross-covariance below this is rounding. The package's own 0.01 leaves weak concepts in.
LEACE_TOLERANCE = 1e-9
_NOTHING = (
    "the difference in means is zero: this place sees the same activation whatever the prompt says"
)


class Estimator(Protocol):
    """What `ESTIMATORS` holds: two labelled sets at one site to a direction there."""

    def __call__(
        self,
        positive: Float[Tensor, "prompt d_model"],
        negative: Float[Tensor, "prompt d_model"],
        site: Site,
        *,
        position: str = ...,
        source: str = ...,
    ) -> Direction | None: ...


# ---- what an estimator gives when it is no single direction --------------------------------------


@dataclass(frozen=True, eq=False)
class Subspace:
    """Orthonormal rows [k, d_model] that span what was found at one site; `Ablate(it.vectors, ...)`.

    Raises:
        DirectionError: rows that are not finite, not orthonormal, or more than d_model.
    """

    vectors: Float[Tensor, "k d_model"]
    site: Site
    position: str = "-1"
    method: str = "subspace"
    source: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        vectors = torch.as_tensor(self.vectors).detach().to("cpu", torch.float64)
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise DirectionError(
                f"a subspace has shape [k, d_model]; this one has shape {tuple(vectors.shape)}"
            )
        gram = vectors @ vectors.T
        if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-8):
            raise DirectionError(
                f"the rows of the subspace at {self.site} are not orthonormal and finite: make it "
                "with `subspace`, or take torch.linalg.qr of its transpose first"
            )
        object.__setattr__(self, "vectors", vectors)

    @property
    def rank(self) -> int:
        """How many directions it spans."""
        return len(self.vectors)

    @property
    def name(self) -> str:
        """Readable label: method, rank, hook name and position."""
        return f"{self.method}{self.rank}@{self.site}[{self.position}]"

    @property
    def fingerprint(self) -> str:
        """sha256 of the vectors and where they came from."""
        return _fingerprint([self.vectors], [str(self.site), self.position, self.method])


@dataclass(frozen=True, eq=False)
class Eraser:
    """x -> x - write * (read . (x - centre)), where read . write = 1: an oblique projection, rank 1.

    `write` (unit length) is what is taken out of the stream, `read` says how much of it is there, and
    `centre` is the point that stays where it is. Applied twice it changes nothing more.

    Raises:
        DirectionError: parts of different shapes, not finite, or with read . write other than 1.
    """

    write: Float[Tensor, " d_model"]
    read: Float[Tensor, " d_model"]
    centre: Float[Tensor, " d_model"]
    site: Site
    position: str = "-1"
    method: str = "leace"
    source: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        parts = {
            name: torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float64)
            for name in ("write", "read", "centre")
        }
        shapes = {tuple(part.shape) for part in parts.values()}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise DirectionError(
                "an eraser's write, read and centre each have the shape [d_model]; these have "
                f"{[tuple(part.shape) for part in parts.values()]}"
            )
        finite = all(bool(torch.isfinite(part).all()) for part in parts.values())
        if not finite or abs(float(parts["read"] @ parts["write"]) - 1) > 1e-8:
            raise DirectionError(
                f"the eraser at {self.site} is no projection: its parts must be finite with "
                f"read . write = 1; here it is {float(parts['read'] @ parts['write'])!r}"
            )
        for name, part in parts.items():
            object.__setattr__(self, name, part)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A new tensor without the concept, computed in float64 and returned in the dtype of `x`."""
        wide = x.double()
        amount = (wide - self.centre.to(x.device)) @ self.read.to(x.device)
        return (wide - amount[..., None] * self.write.to(x.device)).to(x.dtype)

    @property
    def name(self) -> str:
        """Readable label: method, hook name and position."""
        return f"{self.method}@{self.site}[{self.position}]"

    @property
    def fingerprint(self) -> str:
        """sha256 of the three vectors and where they came from."""
        parts = [self.write, self.read, self.centre]
        return _fingerprint(parts, [str(self.site), self.position, self.method])


def _fingerprint(tensors: list[Tensor], words: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(words).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- what the estimators share -------------------------------------------------------------------


def _wide(values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt d_model"]:
    return values.detach().to("cpu", torch.float64)


def _means_of(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    position: str,
) -> Direction:
    """The difference in means, which gives every estimator its checks, its sign and its norm."""
    found = difference_in_means(positive, negative, site, position=position)
    if found is None:
        raise DirectionError(f"no direction at {site}[{position}]: {_NOTHING}; use another place")
    return found


def _signed(
    vector: Float[Tensor, " d_model"], means: Direction, method: str, source: str
) -> Direction:
    """The direction along which positives project higher; its norm is the gap of the means along it."""
    unit = Direction(vector, 1.0, means.site, means.position, method).vector
    along = float(unit @ means.raw)
    if abs(along) <= ZERO_TOLERANCE * means.norm:
        raise DirectionError(
            f"{method} at {means.site}[{means.position}] is orthogonal to the difference in means: the "
            "two sets project alike on it, so that it has no sign; use difference_in_means"
        )
    unit = unit if along > 0 else -unit
    return Direction(unit, abs(along), means.site, means.position, method, source=source)


def _paired_differences(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> Float[Tensor, "pair d_model"]:
    pairs = min(len(positive), len(negative))
    first = _wide(positive[:pairs])
    differences = first - _wide(negative[:pairs])
    if float(differences.norm()) <= ZERO_TOLERANCE * float(first.norm()):
        raise DirectionError(
            f"the first {pairs} positive and negative activations at {means.site}[{means.position}] "
            "are the same pair by pair: there is nothing to find axes of. Give sets of equal size "
            "whose i-th prompts differ, or use difference_in_means"
        )
    return differences


def _check_spread(
    method: str,
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> None:
    """A covariance needs two prompts a side, and prompts that differ.

    Raises:
        DirectionError: one prompt a side, or no spread within the sets.
    """
    if min(len(positive), len(negative)) < 2:
        raise DirectionError(
            f"{method} estimates a covariance, which takes two prompts a side or more; got "
            f"{len(positive)} positive and {len(negative)} negative at {means.site}"
            f"[{means.position}]: give more prompts, or use difference_in_means"
        )
    sets = [_wide(values) for values in (positive, negative)]
    spread = max(float((values - values.mean(0)).norm()) for values in sets)
    if spread <= ZERO_TOLERANCE * means.norm:
        raise DirectionError(
            f"{method} estimates a covariance, and the prompts of each set give one and the same "
            f"activation at {means.site}[{means.position}]: use difference_in_means there"
        )


def _standardized(
    positive: Float[Tensor, "prompt d_model"], negative: Float[Tensor, "prompt d_model"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All prompts with mean 0 and variance 1 in every dimension, labels, and the scale of each.

    A direction found in this space is one of the stream when it is divided by the scale.
    """
    from sklearn.preprocessing import StandardScaler

    rows = torch.cat([_wide(positive), _wide(negative)]).numpy()
    labels = (torch.arange(len(rows)) < len(positive)).numpy()
    scaler = StandardScaler()
    return scaler.fit_transform(rows), labels, scaler.scale_


# ---- estimators ----------------------------------------------------------------------------------


def pca(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    *,
    position: str = "-1",
    source: str = "",
) -> Direction:
    """First principal axis of the paired differences, uncentred, with positives on its higher side.

    The i-th negative activation is taken from the i-th positive one; of sets of different size the
    first min(n) of each are paired. The differences are not centred, which would take away the mean
    difference, the very thing that is looked for. `norm` is the gap of the two means (of all prompts)
    along the axis, so that adding with coefficient 1 moves one mean past the other as far as they are
    apart. Sets whose i-th prompts have nothing to do with each other give an axis of their noise too.
    Source: Zou et al. 2023, https://arxiv.org/abs/2310.01405.

    Raises:
        DirectionError: NaN, empty sets, shapes that do not fit, equal pairs, two axes of equal length, or
            an axis orthogonal to the difference in means, which has no sign.
    """
    means = _means_of(positive, negative, site, position)
    _, lengths, axes = torch.linalg.svd(
        _paired_differences(positive, negative, means), full_matrices=False
    )
    if len(lengths) > 1 and float(lengths[0] - lengths[1]) <= TIE_TOLERANCE * float(lengths[0]):
        raise DirectionError(
            f"the first two principal axes at {site}[{position}] are of the same length: neither is "
            "the first. Give more prompts, use difference_in_means, or `subspace` with rank 2"
        )
    return _signed(axes[0], means, "pca", source)


def subspace(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    *,
    rank: int,
    position: str = "-1",
    source: str = "",
) -> Subspace:
    """The unit mean difference, and rank - 1 principal axes of what it leaves of the paired differences.

    Pairs are made as in `pca`. The axes are those of the differences without their component along the
    mean difference, longest first; of an axis the largest coordinate is positive.

    Raises:
        DirectionError: as `pca`; a rank that is no integer from 1, or more than the differences span.
    """
    try:
        wanted = 0 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        wanted = 0
    if wanted < 1:
        raise DirectionError(f"a rank is an integer from 1; got {rank!r}")
    means = _means_of(positive, negative, site, position)
    rows = means.vector[None]
    if wanted > 1:
        differences = _paired_differences(positive, negative, means)
        rest = differences - (differences @ means.vector)[:, None] * means.vector
        _, lengths, axes = torch.linalg.svd(rest, full_matrices=False)
        axes = axes[lengths > ZERO_TOLERANCE * float(differences.norm())]
        if wanted > 1 + len(axes):
            raise DirectionError(
                f"the {len(differences)} paired differences at {site}[{position}] span {1 + len(axes)} "
                f"directions with the mean difference; rank {wanted} needs more prompts, or rank "
                f"{1 + len(axes)} at most"
            )
        axes = axes[: wanted - 1]
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        rows = torch.cat([rows, axes * largest.sign()])
    basis, triangle = torch.linalg.qr(rows.T)  # orthogonal to the last bit, signs as they were
    found = (basis * triangle.diagonal().sign()).T.contiguous()
    return Subspace(found, site, position, source=source)


def lda(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    *,
    position: str = "-1",
    source: str = "",
) -> Direction:
    """Fisher's discriminant: the mean difference through the inverse covariance within the sets.

    A direction to read with: it weighs down what varies within the sets, and so tells them apart best,
    but it is not what the model writes; ablating it leaves most of the mean difference in place. The
    covariance is shrunk by Ledoit and Wolf's rule (scikit-learn, solver "lsqr", shrinkage "auto"), set by
    set on standardized dimensions, which makes it invertible with fewer prompts than dimensions.
    `norm` is the gap of the means along it. Time grows with the cube of d_model (5 s at 2048).
    Source: Fisher 1936; Ledoit and Wolf 2004, "A well-conditioned estimator".

    Raises:
        DirectionError: NaN, shapes that do not fit, no difference in means, fewer than two prompts a side,
            or no spread within the sets.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    means = _means_of(positive, negative, site, position)
    _check_spread("lda", positive, negative, means)
    features, labels, scale = _standardized(positive, negative)
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels)
    return _signed(torch.from_numpy(fitted.coef_[0] / scale), means, "lda", source)


def logistic(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    *,
    position: str = "-1",
    source: str = "",
    C: float = 1.0,
) -> Direction:
    """Logistic regression on standardized dimensions, its coefficients mapped back to the stream.

    A direction to read with, as `lda`: how to tell the sets apart, not what the model writes. The penalty
    is |w|^2 / 2 beside C times the sum of the prompts' losses (scikit-learn; C 1 is its default), on
    dimensions of variance 1, so that a smaller C comes closer to the standardized mean difference.
    Fitted in the span of the prompts, which changes nothing but the time. `norm` as in `lda`.

    Raises:
        DirectionError: as `lda`; a C that is not positive and finite; a fit that did not converge.
    """
    from sklearn.linear_model import LogisticRegression

    if isinstance(C, bool) or not isinstance(C, Real) or not 0 < C < math.inf:
        raise DirectionError(f"C is a positive number, smaller for a stronger penalty; got {C!r}")
    means = _means_of(positive, negative, site, position)
    _check_spread("logistic", positive, negative, means)
    features, labels, scale = _standardized(positive, negative)
    # An L2 penalty keeps the coefficients in the span of the rows: fit in at most n coordinates.
    left, lengths, axes = torch.linalg.svd(torch.from_numpy(features), full_matrices=False)
    spanned = lengths > TIE_TOLERANCE * lengths[0]
    inside, axes = (left * lengths)[:, spanned].numpy(), axes[spanned]
    model = LogisticRegression(
        C=float(C), solver="newton-cholesky", tol=LOGISTIC_TOLERANCE, max_iter=LOGISTIC_STEPS
    ).fit(inside, labels)
    if int(model.n_iter_[0]) >= LOGISTIC_STEPS:
        raise DirectionError(
            f"logistic at {site}[{position}] did not converge in {LOGISTIC_STEPS} steps with C={C:g}: "
            "give a smaller C (a stronger penalty)"
        )
    found = torch.from_numpy(model.coef_[0]) @ axes / torch.from_numpy(scale)
    return _signed(found, means, "logistic", source)


def leace(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    *,
    position: str = "-1",
    source: str = "",
    shrinkage: bool = True,
) -> Eraser:
    """Least-squares concept erasure (package `concept-erasure`): no linear probe finds the label after it.

    For two sets it has rank 1. It writes along the difference in means, as directional ablation does, and
    reads along that difference through the inverse covariance of all prompts; of all affine maps that
    make the two means coincide it moves activations least. With shrinkage (the package's: optimal linear
    shrinkage towards a multiple of the identity, Bodnar et al. 2014) that least is measured by the shrunk
    covariance, and with fewer prompts than dimensions it is what keeps `read` from fitting these
    prompts' noise; without it the pseudo-inverse is used. The means coincide either way. The
    package's trace constraint is off: it would mix in a map that leaves the concept in. Time and memory
    grow with the cube and the square of d_model (4 s at 2048).
    Source: Belrose et al. 2023, https://arxiv.org/abs/2306.03819.

    Raises:
        DirectionError: as `lda`; a covariance estimate that is not positive; the package is missing.
    """
    fitter = _leace_fitter()
    means = _means_of(positive, negative, site, position)
    _check_spread("leace", positive, negative, means)
    rows = torch.cat([_wide(positive), _wide(negative)])
    labels = (torch.arange(len(rows)) < len(positive)).double()
    centre = rows.mean(0)
    scaled = (rows - centre) / (rows - centre).square().mean().sqrt()  # its epsilons are absolute
    options = {"shrinkage": shrinkage, "constrain_cov_trace": False, "svd_tol": LEACE_TOLERANCE}
    fitted = fitter.fit(scaled, labels, **options).eraser
    left, right = fitted.proj_left[:, 0], fitted.proj_right[0]
    remaining = means.raw - left * (right @ means.raw)
    if not float(remaining.norm()) <= ZERO_TOLERANCE * means.norm:
        raise DirectionError(
            f"LEACE at {site}[{position}] leaves a difference in means of {float(remaining.norm()):.3g} "
            f"of {means.norm:.3g}: its covariance estimate is not positive. Give more prompts, or "
            f"shrinkage={not shrinkage}"
        )
    write = left / left.norm() * (right @ means.raw).sign()
    return Eraser(write, right / (right @ write), centre, site, position, source=source)


def _leace_fitter() -> Any:
    try:
        from concept_erasure import LeaceFitter
    except ImportError as error:
        raise DirectionError(
            "LEACE needs the package concept-erasure, which is not installed: "
            "pip install 'interp-ablate[leace]'"
        ) from error
    return LeaceFitter


ESTIMATORS: dict[str, Estimator] = {
    "difference_in_means": difference_in_means,
    "pca": pca,
    "lda": lda,
    "logistic": logistic,
}


# ---- over all sites, and side by side ------------------------------------------------------------


def estimate_with(
    method: str,
    train: HasActivations,
    held_out: HasActivations | None = None,
    *,
    sites: Iterable[Site] | None = None,
    source: str = "",
) -> Directions:
    """One estimator of `ESTIMATORS` at every site and position; where it finds nothing, the reason.

    Args:
        train: labelled activations (`collect` over a ContrastSet).
        held_out: labelled activations of other prompts; with them every direction carries how well it
            separates prompts that did not make it.
        sites: only these, of those collected; default: all.

    Raises:
        DirectionError: an unknown method; activations without labels, with NaN or of another d_model; no
            site with a direction at all.
    """
    if method not in ESTIMATORS:
        raise DirectionError(
            f"unknown estimator {method!r}: accepted are {', '.join(ESTIMATORS)} (subspace and leace "
            "give more than one direction: call them for one site)"
        )
    labels = _labels_of(train)
    held_labels = None if held_out is None else _labels_of(held_out)
    found, left_out = [], {}
    for site in _chosen(sites, train.sites):
        for position in train.positions:
            values, place = train.at(site, position), f"{site}[{position}]"
            positive, negative = values[labels], values[~labels]
            if difference_in_means(positive, negative, site) is None:  # NaN and bad shapes raise
                left_out[place] = _NOTHING
                continue
            try:
                item = ESTIMATORS[method](
                    positive, negative, site, position=position, source=source
                )
            except DirectionError as error:
                left_out[place] = str(error)
                continue
            if item is not None and held_out is not None and held_labels is not None:
                item = _measured(item, held_out.at(site, position), held_labels)
            if item is not None:
                found.append(item)
    if not found:
        first = next(iter(left_out.items()), ("no site was given", "give one or more"))
        raise DirectionError(f"no site has a direction of {method}; {first[0]}: {first[1]}")
    return Directions(tuple(found), left_out, source)


def _labels_of(activations: HasActivations) -> Bool[Tensor, " prompt"]:
    if activations.labels is None:
        raise DirectionError("directions need labels: collect a ContrastSet, not a list of prompts")
    return activations.labels


def _chosen(sites: Iterable[Site] | None, there: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites asked for, in the order in which they were collected."""
    if sites is None:
        return there
    wanted = set(sites)
    unknown = sorted(str(site) for site in wanted - set(there))
    if unknown:
        raise DirectionError(
            f"no activations at {unknown[0]}: collected were {len(there)} sites"
            + (f" from {there[0]} to {there[-1]}" if there else "")
        )
    return tuple(site for site in there if site in wanted)


def _measured(
    item: Direction, values: Float[Tensor, "prompt d_model"], labels: Bool[Tensor, " prompt"]
) -> Direction:
    if values.shape[1] != len(item.vector):
        raise DirectionError(
            f"d_model differs at {item.site}: {len(item.vector)} in training, {values.shape[1]} held "
            "out; collect both with the same model"
        )
    return replace(item, separation=separation(_wide(values) @ item.vector, labels.cpu()))


# What `comparison` lists: an estimator and its rows.
COMPARED: dict[str, tuple[str, ...]] = {
    "difference_in_means": ("difference_in_means",),
    "difference_in_means_orthogonalized": ("difference_in_means_orthogonalized",),
    "pca": ("pca",),
    "lda": ("lda",),
    "logistic": ("logistic",),
    "leace": ("leace_write", "leace_read"),
}


def comparison(
    train: HasActivations, held_out: HasActivations, site: Site, position: str | int = "-1"
) -> pd.DataFrame:
    """One row an estimator: AUC and d' on held-out prompts, cosine to the difference in means, norm.

    `norm` is the gap of the training means along the unit direction. An estimator that cannot be had here
    (too few prompts, a package that is missing) keeps its row, with NaN and the reason in `left_out`. The
    row leace_write is the difference in means again: what LEACE adds is what it reads along.

    Raises:
        DirectionError: activations without labels, with NaN or of another d_model; no difference in means.
    """
    import pandas as pd

    labels, held_labels = _labels_of(train), _labels_of(held_out)
    place = str(position)
    values, held = train.at(site, place), held_out.at(site, place)
    means = _means_of(values[labels], values[~labels], site, place)
    rows = []
    for name, item, reason in _side_by_side(values[labels], values[~labels], means):
        row: dict[str, Any] = {"estimator": name, "left_out": reason}
        if item is not None:
            measured = _measured(item, held, held_labels).separation
            assert measured is not None
            cosine = float(item.vector @ means.vector)
            norm = float(item.vector @ means.raw)
            row.update(auc=measured.auc, d_prime=measured.d_prime, cosine=cosine, norm=norm)
        rows.append(row)
    columns = ["estimator", "auc", "d_prime", "cosine", "norm", "left_out"]
    return pd.DataFrame(rows, columns=columns)


def _side_by_side(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> list[tuple[str, Direction | None, str]]:
    """Every row's name and direction, or None and the reason."""
    rows: list[tuple[str, Direction | None, str]] = []
    for method, names in COMPARED.items():
        try:
            made = _rows_of(method, positive, negative, means)
        except DirectionError as error:
            rows.extend((name, None, str(error)) for name in names)
        else:
            rows.extend((name, item, "") for name, item in zip(names, made, strict=True))
    return rows


def _rows_of(
    method: str,
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> list[Direction | None]:
    site, position = means.site, means.position
    if method == "difference_in_means_orthogonalized":
        return [orthogonalized(means, _wide(negative).mean(0))]
    if method == "leace":
        eraser = leace(positive, negative, site, position=position)
        parts = zip(COMPARED[method], (eraser.write, eraser.read), strict=True)
        return [_signed(part, means, name, "") for name, part in parts]
    return [ESTIMATORS[method](positive, negative, site, position=position)]


# ---- outliers, and layers between layers ---------------------------------------------------------


def winsorized(
    values: Float[Tensor, "*batch d_model"], quantile: float = 0.995
) -> Float[Tensor, "*batch d_model"]:
    """Every vector's coordinates clipped to the given quantile of their own absolute values.

    A few massive dimensions dominate the means of some models; abliteration tools clip them before they
    take means. The quantile is interpolated between order statistics, as numpy's is. Returns a new
    tensor of the same dtype; quantile 1 changes nothing.

    Raises:
        DirectionError: no float tensor with an axis d_model; NaN or infinity; a quantile not in (0, 1].
    """
    _check_values(values)
    if isinstance(quantile, bool) or not isinstance(quantile, Real) or not 0 < quantile <= 1:
        raise DirectionError(
            f"a quantile is more than 0 and at most 1 (1 clips nothing); got {quantile!r}"
        )
    place = float(quantile) * (values.shape[-1] - 1)
    below = math.floor(place)
    top = values.abs().topk(values.shape[-1] - below, dim=-1).values.double()
    lower = top[..., -1:]
    upper = top[..., -2:-1] if top.shape[-1] > 1 else lower
    limit = (lower + (upper - lower) * (place - below)).to(values.dtype)
    return values.clamp(-limit, limit)


@dataclass(frozen=True)
class MassiveDimension:
    """A dimension of the stream with its mean absolute activation, and how many medians that is."""

    index: int
    mean_abs: float
    ratio: float


def massive_dimensions(
    values: Float[Tensor, "*batch d_model"], *, factor: float = 20.0
) -> tuple[MassiveDimension, ...]:
    """Dimensions whose mean |x| is at least `factor` times the median dimension's, largest first.

    Such dimensions decide means, norms and cosines. `winsorized` clips them. Of single activations Sun et
    al. 2024 (https://arxiv.org/abs/2402.17762) call massive what is 1000 times the median; a mean
    over prompts is less.

    Raises:
        DirectionError: no float tensor with an axis d_model; NaN or infinity; a factor not above 1.
    """
    _check_values(values)
    if isinstance(factor, bool) or not isinstance(factor, Real) or not 1 < factor < math.inf:
        raise DirectionError(f"a factor is a number above 1; got {factor!r}")
    sizes = values.double().abs().reshape(-1, values.shape[-1]).mean(0)
    middle = float(sizes.quantile(0.5))
    found = [
        MassiveDimension(index, size, size / middle if middle else math.inf)
        for index, size in enumerate(sizes.tolist())
        if size > 0 and size >= factor * middle
    ]
    return tuple(sorted(found, key=lambda item: (-item.mean_abs, item.index)))


def _check_values(values: Tensor) -> None:
    if values.ndim == 0 or 0 in values.shape or not values.is_floating_point():
        raise DirectionError(
            f"activations are a float tensor [..., d_model]; got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    if not torch.isfinite(values).all():
        raise DirectionError(
            "activations hold NaN or infinity: check the model's dtype; float16 often overflows, "
            "bfloat16 or float32 do not"
        )


def interpolated(
    directions: Directions,
    layer: float,
    point: Point,
    *,
    position: str | None = None,
    method: str | None = None,
) -> Direction:
    """The unit direction at a fractional layer: between those of the two layers around it, renormalized.

    The norm is interpolated too; the site is the nearest layer's (halves go up). A whole layer gives its
    own direction unchanged; in between there is no separation, which nobody has measured.

    Args:
        position, method: which of several at a site; default: of the first direction at this point.

    Raises:
        DirectionError: a layer that is no finite number from 0, or around which a direction is missing;
            neighbours that point in opposite ways.
    """
    if isinstance(layer, bool) or not isinstance(layer, Real) or not 0 <= layer < math.inf:
        raise DirectionError(f"a fractional layer is a finite number from 0; got {layer!r}")
    layer = float(layer)
    sites = [Site(number, point) for number in (math.floor(layer), math.ceil(layer))]
    lower, upper = (_looked_up(directions, site, position, method) for site in sites)
    share = layer - sites[0].layer
    if share == 0:
        return lower
    vector = (1 - share) * lower.vector + share * upper.vector
    if float(vector.norm()) <= ZERO_TOLERANCE:
        raise DirectionError(
            f"the directions at {sites[0]} and {sites[1]} point in opposite ways: there is none "
            f"between them at layer {layer:g}; use a whole layer"
        )
    return Direction(
        vector,
        (1 - share) * lower.norm + share * upper.norm,
        sites[math.floor(share + 0.5)],
        lower.position,
        lower.method,
        source=f"{lower.source} layer {layer:g}".strip(),
    )


def _looked_up(
    directions: Directions, site: Site, position: str | None, method: str | None
) -> Direction:
    at_point = [
        item
        for item in directions
        if item.site.point == site.point
        and position in (None, item.position)
        and method in (None, item.method)
    ]
    if not at_point:
        raise DirectionError(
            f"no direction at any {site.point}"
            + (f", position {position}" if position else "")
            + (f", method {method}" if method else "")
            + f": there are {len(directions)} at {sorted({item.site.point for item in directions})}"
        )
    return directions[site, at_point[0].position, at_point[0].method]
