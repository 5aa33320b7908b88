"""Directions: what an estimator found at one site, and how well it separates.

Knows: difference in means, its controls (random, shuffled labels), separation on held-out prompts,
saving and loading. Does not know: how activations were obtained, or what will be done along a direction.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

# A difference of means shorter than this fraction of the activations' own norm is rounding, not signal.
ZERO_TOLERANCE = 1e-6


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
    """AUC and d' of projections under the labels (True = positive)."""
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


def random_direction(like: Direction, *, seed: int) -> Direction:
    """A uniformly random direction of the same norm at the same site: a control."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like.vector), generator=generator, dtype=torch.float64)
    return Direction(vector, like.norm, like.site, like.position, "random", source=f"seed {seed}")


@dataclass(frozen=True)
class Directions:
    """Directions by site and position, with the sites that were left out and why.

    Iterates over its directions in forward order; `directions[site]` or `directions[site, position]`
    looks one up.
    """

    items: tuple[Direction, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    source: str = ""

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Site | tuple[Site, str]) -> Direction:
        site, position = key if isinstance(key, tuple) else (key, None)
        for item in self.items:
            if item.site == site and position in (None, item.position):
                return item
        reason = self.left_out.get(f"{site}[{position or '-1'}]")
        known = sorted({str(item.site) for item in self.items})
        raise DirectionError(
            f"no direction at {site}"
            + (f" and position {position}" if position else "")
            + (f": {reason}" if reason else f"; there are {len(known)}, such as {known[:3]}")
        )

    def where(self, keep: Iterable[Site]) -> Directions:
        """Only the directions at the given sites."""
        wanted = set(keep)
        return replace(self, items=tuple(item for item in self.items if item.site in wanted))

    def save(self, path: str | Path) -> None:
        """Write `path` (.safetensors: one float64 row a direction) and `path` with .json (the rest)."""
        from safetensors.torch import save

        path = Path(path)
        vectors = torch.stack([item.vector for item in self.items])
        records = [
            {
                "site": str(item.site),
                "position": item.position,
                "method": item.method,
                "norm": item.norm,
                "auc": item.separation.auc if item.separation else None,
                "d_prime": item.separation.d_prime if item.separation else None,
                "source": item.source,
            }
            for item in self.items
        ]
        payload = {
            "format": "interp_ablate.directions/1",
            "source": self.source,
            "d_model": vectors.shape[1],
            "directions": records,
            "left_out": self.left_out,
        }
        _replace_file(path, save({"directions": vectors}, metadata={"format": "pt"}))
        _replace_file(path.with_suffix(".json"), json.dumps(payload, indent=1).encode())

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
        except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
            raise DirectionError(
                f"cannot read directions from {path} and {path.with_suffix('.json').name}: {error}. "
                "Both are written by `interp-ablate directions`; run it again"
            ) from error
        if len(records) != len(vectors):
            raise DirectionError(
                f"{path} holds {len(vectors)} vectors but its JSON describes {len(records)}: "
                "the two files are of different runs; run `interp-ablate directions` again"
            )
        items = tuple(_from_record(record, vector) for record, vector in zip(records, vectors))
        return cls(items, payload["left_out"], payload["source"])


def _from_record(record: dict, vector: Float[Tensor, " d_model"]) -> Direction:
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
    object.__setattr__(direction, "vector", vector)  # the stored unit vector, bit for bit
    return direction


def _replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cosine_similarities(
    directions: Sequence[Direction],
) -> Float[Tensor, "site site"]:
    """Cosine of every pair of directions."""
    vectors = torch.stack([item.vector for item in directions])
    return vectors @ vectors.T
