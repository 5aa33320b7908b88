"""Directions: what an estimator found at one site, and how well it separates.

Knows: difference in means, its controls (random, shuffled labels), separation on held-out prompts,
saving and loading. Does not know: how activations were obtained, or what will be done along a direction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.errors import DirectionError
from interp_ablate.files import write_whole
from interp_ablate.sites import Site

# A difference of means shorter than this fraction of the activations' own norm is rounding, not signal.
ZERO_TOLERANCE = 1e-6
FORMAT = "interp_ablate.directions/1"


@dataclass(frozen=True)
class Separation:
    """How well projections on a direction tell the two sets apart.

    `auc` is the probability that a positive prompt projects higher than a negative one (ties count
    half). `d_prime` is the distance of the two means in units of the pooled standard deviation.
    """

    auc: float
    d_prime: float


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector of the residual stream with the site, position and method it came from.

    `raw` (unit vector times `norm`) is the estimator's own result: the difference in means, whose
    addition with coefficient 1 moves the negative mean onto the positive one.
    """

    vector: Float[Tensor, " d_model"]
    norm: float
    site: Site
    position: str = "-1"
    method: str = "difference_in_means"
    separation: Separation | None = None
    source: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        vector = torch.as_tensor(self.vector)
        if vector.ndim != 1:
            raise DirectionError(
                f"a direction has one axis (d_model); this one has shape {tuple(vector.shape)}"
            )
        vector = vector.detach().to("cpu", torch.float64)
        length = float(vector.norm())
        if not (length > 0 and torch.isfinite(vector).all()):
            raise DirectionError(
                f"the direction at {self.site} is {'zero' if length == 0 else 'not finite'}: "
                "nothing can be ablated or added along it"
            )
        object.__setattr__(self, "vector", vector / length)

    @property
    def raw(self) -> Float[Tensor, " d_model"]:
        """The estimator's result before it was scaled to unit length."""
        return self.vector * self.norm

    @property
    def name(self) -> str:
        """Readable label: method, hook name and position."""
        return f"{self.method}@{self.site}[{self.position}]"

    @property
    def fingerprint(self) -> str:
        """sha256 of the vector, its norm and where it came from."""
        digest = hashlib.sha256(self.vector.numpy().tobytes())
        digest.update(json.dumps([self.norm, str(self.site), self.position, self.method]).encode())
        return digest.hexdigest()


def _check_two_sets(
    positive: Float[Tensor, "prompt d_model"], negative: Float[Tensor, "prompt d_model"], site: Site
) -> None:
    for label, values in (("positive", positive), ("negative", negative)):
        if values.ndim != 2 or not len(values):
            raise DirectionError(
                f"{label} activations at {site} have shape {tuple(values.shape)}; "
                "accepted is [prompt, d_model] with at least one prompt"
            )
        if not torch.isfinite(values).all():
            rows = (~torch.isfinite(values).all(-1)).nonzero().flatten().tolist()
            raise DirectionError(
                f"{label} activations at {site} hold NaN or infinity (prompts {rows[:5]}): "
                "check the model's dtype; float16 often overflows, bfloat16 or float32 do not"
            )
    if positive.shape[1] != negative.shape[1]:
        raise DirectionError(
            f"d_model differs at {site}: {positive.shape[1]} against {negative.shape[1]}"
        )


def difference_in_means(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    *,
    position: str = "-1",
    method: str = "difference_in_means",
    source: str = "",
) -> Direction | None:
    """Mean of the positive activations minus mean of the negative ones, in float64.

    Returns None where the difference is zero to rounding: the site sees the same activation whatever
    the prompt (the last template token at the first layer), so it carries no direction.
    Source: Arditi et al. 2024, https://arxiv.org/abs/2406.11717; Belrose 2023 on why the mean difference.

    Raises:
        DirectionError: NaN, empty sets, or shapes that do not fit.
    """
    _check_two_sets(positive, negative, site)
    means = [values.double().mean(0) for values in (positive, negative)]
    difference = means[0] - means[1]
    norm = float(difference.norm())
    if norm <= ZERO_TOLERANCE * max(float(mean.norm()) for mean in means):
        return None
    return Direction(difference, norm, site, position, method, source=source)


def separation(
    projections: Float[Tensor, " prompt"], labels: Bool[Tensor, " prompt"]
) -> Separation:
    """AUC and d' of projections under the labels (True = positive).

    Raises:
        DirectionError: NaN or infinity, labels that are not one bool a projection, or only one set.
    """
    if labels.dtype != torch.bool or labels.shape != projections.shape or labels.ndim != 1:
        raise DirectionError(
            f"separation needs one bool a projection (True = positive); got {labels.dtype} of shape "
            f"{tuple(labels.shape)} for projections of shape {tuple(projections.shape)}"
        )
    if not torch.isfinite(projections).all():
        raise DirectionError(
            "projections hold NaN or infinity: check the model's dtype; float16 often overflows, "
            "bfloat16 or float32 do not"
        )
    positive, negative = projections[labels].double(), projections[~labels].double()
    if not len(positive) or not len(negative):
        raise DirectionError("separation needs prompts of both sets")
    pairs = positive[:, None] - negative[None, :]
    auc = float(((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean())
    gap = float(positive.mean() - negative.mean())
    degrees = max(len(positive) + len(negative) - 2, 1)
    squares = sum(float((group - group.mean()).square().sum()) for group in (positive, negative))
    spread = (squares / degrees) ** 0.5
    return Separation(
        auc, gap / spread if spread > 0 else float("inf") * (gap or 0.0) if gap else 0.0
    )


def estimate_directions(
    train: HasActivations, held_out: HasActivations | None = None, *, source: str = ""
) -> Directions:
    """Difference in means at every site and position, each also orthogonalized to the negative mean.

    Args:
        train: labelled activations (`collect` over a ContrastSet).
        held_out: labelled activations of other prompts; with them every direction carries how well it
            separates prompts that did not make it.
        source: what identifies model and prompts, kept with the result.

    Raises:
        DirectionError: activations without labels, or no site with a direction at all.
    """
    if train.labels is None or (held_out is not None and held_out.labels is None):
        raise DirectionError("directions need labels: collect a ContrastSet, not a list of prompts")
    found, left_out = [], {}
    for site in train.sites:
        for position in train.positions:
            values = train.at(site, position)
            positive, negative = values[train.labels], values[~train.labels]
            first = difference_in_means(positive, negative, site, position=position, source=source)
            if first is None:
                left_out[f"{site}[{position}]"] = (
                    "the difference in means is zero: this place sees the same activation whatever the "
                    "prompt says"
                )
                continue
            both = [first]
            try:
                both.append(orthogonalized(first, negative.double().mean(0)))
            except DirectionError as error:
                left_out[f"{site}[{position}] orthogonalized"] = str(error)
            for item in both:
                if held_out is not None and held_out.labels is not None:
                    projections = held_out.at(site, position).double() @ item.vector
                    item = replace(item, separation=separation(projections, held_out.labels))
                found.append(item)
    if not found:
        raise DirectionError(
            "no site has a direction: the two sets give the same activations everywhere. Are the "
            "prompts the same, or the positions before the instruction?"
        )
    return Directions(tuple(found), left_out, source)


def random_direction(like: Direction, *, seed: int) -> Direction:
    """A uniformly random direction of the same norm at the same site: a control."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like.vector), generator=generator, dtype=torch.float64)
    return Direction(vector, like.norm, like.site, like.position, "random", source=f"seed {seed}")


class HasActivations(Protocol):
    """What `estimate_directions` needs of `activations.Activations`."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def positions(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> Bool[Tensor, " prompt"] | None: ...

    def at(self, site: Site, position: str = "-1") -> Float[Tensor, "prompt d_model"]: ...


@dataclass(frozen=True)
class Directions:
    """Directions by site, position and method, with the sites that were left out and why.

    Iterates over its directions in forward order; `directions[site]`, `directions[site, position]` or
    `directions[site, position, method]` looks one up (the first that fits).
    """

    items: tuple[Direction, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    source: str = ""

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Site | tuple[Site, str] | tuple[Site, str, str]) -> Direction:
        site, position, method = (*(key if isinstance(key, tuple) else (key,)), None, None)[:3]
        for item in self.items:
            if (
                item.site == site
                and position in (None, item.position)
                and method in (None, item.method)
            ):
                return item
        place = f"{site}[{position or '-1'}]"
        reason = self.left_out.get(place)
        if reason is None and method is not None and method.endswith("_orthogonalized"):
            reason = self.left_out.get(f"{place} orthogonalized")
        alike = [item for item in self.items if method in (None, item.method)]
        known = sorted({str(item.site) for item in alike})
        raise DirectionError(
            f"no direction at {site}"
            + (f", position {position}" if position else "")
            + (f", method {method}" if method else "")
            + (f": {reason}" if reason else f"; there are {len(known)} sites, such as {known[:3]}")
        )

    def of(self, method: str) -> Directions:
        """Only the directions of one method."""
        return replace(self, items=tuple(item for item in self.items if item.method == method))

    def where(self, keep: Iterable[Site]) -> Directions:
        """Only the directions at the given sites."""
        wanted = set(keep)
        return replace(self, items=tuple(item for item in self.items if item.site in wanted))

    def save(self, path: str | Path) -> None:
        """Write `path` (.safetensors: one float64 row a direction) and `path` with .json (the rest).

        Raises:
            DirectionError: nothing to write, or a place that cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        if not self.items:
            raise DirectionError(
                f"there is no direction to write to {path}: estimate some, or keep a site and method that has one"
            )
        vectors = torch.stack([item.vector for item in self.items])
        records = [to_record(item) for item in self.items]
        payload = {
            "format": FORMAT,
            "source": self.source,
            "d_model": vectors.shape[1],
            "directions": records,
            "left_out": self.left_out,
        }
        content = save({"directions": vectors}, metadata={"format": "pt"})
        write_whole(path, content, error=DirectionError)
        write_whole(path.with_suffix(".json"), json.dumps(payload, indent=1), error=DirectionError)

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read what `save` wrote.

        Raises:
            DirectionError: a missing, truncated or foreign file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        try:
            vectors = load_file(path)["directions"]
            payload = json.loads(path.with_suffix(".json").read_text())
            records = payload["directions"]
            if payload["format"] != FORMAT:
                raise DirectionError(f"the format is {payload['format']!r}; accepted is {FORMAT!r}")
            described = [len(records), payload["d_model"]]
            if list(vectors.shape) != described:
                raise DirectionError(
                    f"there are {len(vectors)} vectors but its JSON describes {len(records)} (shapes "
                    f"{list(vectors.shape)} and {described}): the files are of different runs"
                )
            items = tuple(from_record(record, vector) for record, vector in zip(records, vectors))
            return cls(items, payload["left_out"], payload["source"])
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            raise DirectionError(
                f"cannot read directions from {path} and {path.with_suffix('.json').name}: {why}. "
                "Both are written by `interp-ablate directions`; run it again"
            ) from error


def to_record(item: Direction) -> dict[str, Any]:
    """Everything about a direction but its vector, as plain data."""
    return {
        "site": str(item.site),
        "position": item.position,
        "method": item.method,
        "norm": float(item.norm),
        "auc": item.separation.auc if item.separation else None,
        "d_prime": item.separation.d_prime if item.separation else None,
        "source": item.source,
    }


def from_record(record: dict[str, Any], vector: Float[Tensor, " d_model"]) -> Direction:
    """The direction that `to_record` described, its stored unit vector bit for bit.

    Raises:
        DirectionError: a vector that is not a unit vector in float64.
    """
    found = None if record["auc"] is None else Separation(record["auc"], record["d_prime"])
    direction = Direction(
        vector,
        record["norm"],
        Site.parse(record["site"]),
        record["position"],
        record["method"],
        found,
        source=record["source"],
    )
    if vector.dtype != torch.float64 or not torch.allclose(
        direction.vector, vector, rtol=0, atol=1e-12
    ):
        raise DirectionError(f"the vector at {direction.site} is not a unit vector in float64")
    object.__setattr__(direction, "vector", vector)  # the stored unit vector, bit for bit
    return direction


def cosine_similarities(
    directions: Sequence[Direction],
) -> Float[Tensor, "site site"]:
    """Cosine of every pair of directions."""
    vectors = torch.stack([item.vector for item in directions])
    return vectors @ vectors.T


def orthogonalized(direction: Direction, against: Float[Tensor, " d_model"]) -> Direction:
    """The direction without its component along another vector (the negative set's mean activation).

    What both sets share is left alone by such an edit, so that it costs less on other prompts; a zero
    `against` takes nothing away. Two Gram-Schmidt passes, for rounding. Source: "projected
    abliteration" (Lai 2025, on Hugging Face).

    Raises:
        DirectionError: nothing is left but rounding: the direction is parallel to `against`.
    """
    wide = against.double()
    length = float(wide.norm())
    unit = wide / length if length > 0 else wide
    rest = direction.raw
    for _ in range(2):
        rest = rest - (rest @ unit) * unit
    if float(rest.norm()) <= ZERO_TOLERANCE * direction.norm:
        raise DirectionError(
            f"nothing is left of the direction at {direction.site}[{direction.position}]: it is "
            "parallel to what it is orthogonalized against (the negative set's mean activation); use "
            f"the plain {direction.method}"
        )
    return Direction(
        rest,
        float(rest.norm()),
        direction.site,
        direction.position,
        f"{direction.method}_orthogonalized",
        source=direction.source,
    )
