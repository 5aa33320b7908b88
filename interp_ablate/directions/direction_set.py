"""A set of directions by site, method and position, and the files it is written to.

Knows: lookup, saving, loading. Does not know: how directions are estimated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.directions.direction import Direction, Separation, as_directions
from interp_ablate.display import html_table, shortened
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Point, Site, SiteLike, as_sites
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.incoming_files import check_file, incoming_object
from interp_ablate.storage.json_shapes import NONE, NUMBER
from interp_ablate.storage.strict_json import json_text

if TYPE_CHECKING:
    import pandas as pd

FORMAT, PLAIN_FORMAT = "interp_ablate.directions/1", "interp_ablate.vectors/1"
_SHAPE = {
    "format": str,
    "source": str,
    "d_model": int,
    "directions": [
        {
            **dict.fromkeys(("site", "position", "method", "source"), str),
            "norm": NUMBER,
            "auc": (NONE, *NUMBER),
            "d_prime": (NONE, str, *NUMBER),
        }
    ],
    "left_out": {"*": str},
}
VectorDtype = Literal["float64", "float32"]


@runtime_checkable
class HasActivations(Protocol):
    """The part of `activations.Activations` that an estimator reads."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def positions(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> Bool[Tensor, " prompt"] | None: ...

    def at(self, site: SiteLike, position: str = "-1") -> Float[Tensor, "prompt d_model"]: ...


@dataclass(frozen=True)
class Directions:
    """Directions by site, position and method, with the sites that were left out and why.

    Iterates over its directions in forward order; `directions[site]`, `directions[site, position]` or
    `directions[site, position, method]` looks one up (the first that fits).
    """

    items: tuple[Direction, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    """`site[position]` -> why there is no direction."""
    source: str = ""
    """What identifies the model and the prompts."""

    def __repr__(self) -> str:
        methods = ", ".join(dict.fromkeys(item.method for item in self.items)) or "none"
        layers = sorted({item.site.layer for item in self.items})
        span = f", layers {layers[0]} to {layers[-1]}" if layers else ""
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"Directions({len(self.items)} of {shortened(methods)}{span}{left_out})"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        frame["source"] = frame["source"].map(shortened)
        return html_table(list(frame.columns), frame.itertuples(index=False), caption=repr(self))

    def to_frame(self) -> pd.DataFrame:
        """A row a direction: layer, point, position, method, norm, AUC and d' (NaN where not measured), source."""
        import pandas as pd

        rows = [
            {
                "layer": item.site.layer,
                "point": item.site.point,
                "position": item.position,
                "method": item.method,
                "norm": float(item.norm),
                "auc": item.separation.auc if item.separation else math.nan,
                "d_prime": item.separation.d_prime if item.separation else math.nan,
                "source": item.source,
            }
            for item in self.items
        ]
        columns = ("layer", "point", "position", "method", "norm", "auc", "d_prime", "source")
        return pd.DataFrame(rows, columns=list(columns))

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(
        self, key: SiteLike | tuple[SiteLike, str] | tuple[SiteLike, str, str]
    ) -> Direction:
        place, position, method = (*(key if isinstance(key, tuple) else (key,)), None, None)[:3]
        site = Site.parse(place)
        for item in self.items:
            if item.site == site and item.is_of(position, method):
                return item
        place = f"{site}[{position or '-1'}]"
        reason = self.left_out.get(place)
        if reason is None and method is not None and method.endswith("_orthogonalized"):
            reason = self.left_out.get(f"{place} orthogonalized")
        alike = [item for item in self.items if method in (None, item.method)]
        sites = sorted({str(item.site) for item in alike})
        raise DirectionError(
            f"no direction at {site}"
            + (f", position {position}" if position else "")
            + (f", method {method}" if method else "")
            + (f": {reason}" if reason else f"; there are {len(sites)} sites, such as {sites[:3]}")
        )

    def of(self, method: str) -> Directions:
        """Only the directions of one method."""
        return replace(self, items=tuple(item for item in self.items if item.method == method))

    def where(self, keep: SiteLike | Iterable[SiteLike]) -> Directions:
        """Only the directions at the given sites."""
        wanted = set(as_sites(keep))
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
        write_atomic(path, content, error=DirectionError)
        write_atomic(path.with_suffix(".json"), json_text(payload, indent=1), error=DirectionError)

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
            check_file(path, DirectionError)
            vectors = load_file(path)["directions"]
            payload = incoming_object(path.with_suffix(".json"), shape=_SHAPE)
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


def as_set(given: Directions | Iterable[Direction]) -> Directions:
    """Directions as a set; one that is a set already stays as it is.

    Raises:
        DirectionError: something else than directions was given.
    """
    return given if isinstance(given, Directions) else Directions(tuple(as_directions(given)))


def one_per_layer(
    directions: Direction | Iterable[Direction], point: Point | None = None
) -> list[Direction]:
    """The first direction of each layer at one point, in forward order.

    `point`: default resid_post where there is one, else the first direction's: resid_pre of a layer is resid_post
    of the one before, and would be there twice.

    Raises:
        DirectionError: no direction, or none at that point.
    """
    items = as_directions(directions)
    points = list(dict.fromkeys(item.site.point for item in items))
    chosen = point or ("resid_post" if "resid_post" in points else next(iter(points), None))
    first: dict[Site, Direction] = {}
    for item in items:
        if item.site.point == chosen:
            first.setdefault(item.site, item)
    if not first:
        raise DirectionError(f"no direction at {chosen}: there are {', '.join(points) or 'none'}")
    return [first[site] for site in sorted(first)]


def most_separating(directions: Iterable[Direction]) -> Direction:
    """The first of the directions that best separate held-out prompts; the middle one where none was measured.

    Raises:
        DirectionError: no direction.
    """
    items = as_directions(directions)
    if not items:
        raise DirectionError("there is no direction to choose from")
    measured = [item for item in items if item.separation is not None]
    if not measured:
        return items[len(items) // 2]
    return max(measured, key=lambda item: item.separation.d_prime if item.separation else 0.0)


def to_record(item: Direction) -> dict[str, Any]:
    """Everything about a direction but its vector, as plain data."""
    d_prime: float | str | None = item.separation.d_prime if item.separation else None
    if isinstance(d_prime, float) and math.isinf(d_prime):
        d_prime = str(d_prime)  # JSON has no word for it
    return {
        "site": str(item.site),
        "position": item.position,
        "method": item.method,
        "norm": float(item.norm),
        "auc": item.separation.auc if item.separation else None,
        "d_prime": d_prime,
        "source": item.source,
    }


def separation_in(record: dict[str, Any]) -> Separation | None:
    """The separation that `to_record` wrote, if it had one."""
    return None if record["auc"] is None else Separation(record["auc"], float(record["d_prime"]))


def from_record(record: dict[str, Any], vector: Float[Tensor, " d_model"]) -> Direction:
    """The direction that `to_record` described, its stored unit vector bit for bit.

    Raises:
        DirectionError: a vector that is not a unit vector in float64.
    """
    direction = Direction(
        vector,
        record["norm"],
        Site.parse(record["site"]),
        record["position"],
        record["method"],
        separation_in(record),
        source=record["source"],
    )
    if vector.dtype != torch.float64 or not torch.allclose(
        direction.vector, vector, rtol=0, atol=1e-12
    ):
        raise DirectionError(f"the vector at {direction.site} is not a unit vector in float64")
    object.__setattr__(direction, "vector", vector)  # the stored unit vector, bit for bit
    return direction


def write_directions(
    directions: Iterable[Direction],
    path: str | Path,
    *,
    dtype: VectorDtype = "float64",
    raw: bool = False,
) -> None:
    """Plain safetensors: one unit vector [d_model] a direction, named by its site.

    Where a site has several, its name is followed by the position, `blocks.3.hook_resid_pre[-1]`, and
    where that is not enough the method comes first. The header's metadata hold norms, positions,
    methods and sources. `read_directions` gives the same directions back: in float64 bit for bit.

    Args:
        raw: write unit vector times norm, for tools that add the tensor as it is.

    Raises:
        DirectionError: nothing to write, two directions of one name, a place that cannot be written.
    """
    from safetensors.torch import save

    path, items = Path(path), as_directions(directions)
    if path.suffix != ".safetensors" or dtype not in get_args(VectorDtype) or not items:
        raise DirectionError(
            f"cannot write {len(items)} directions in {dtype} to {path}: at least one is needed, a name "
            f"that ends in .safetensors, and a dtype of {', '.join(get_args(VectorDtype))}"
        )
    to = {"float64": torch.float64, "float32": torch.float32}[dtype]
    names = _names_for(items, path)
    tensors = {
        name: (item.raw if raw else item.vector).to(to).clone() for name, item in zip(names, items)
    }
    records = {name: to_record(item) for name, item in zip(names, items)}
    about = {"format": PLAIN_FORMAT, "raw": raw, "dtype": dtype, "directions": records}
    metadata = {"format": "pt", "interp_ablate": json.dumps(about)}
    write_atomic(path, save(tensors, metadata=metadata), error=DirectionError)


def _names_for(items: list[Direction], path: Path) -> list[str]:
    """The shortest names that differ: the site, the site and position, or the method as well."""
    for names in (
        [str(item.site) for item in items],
        [f"{item.site}[{item.position}]" for item in items],
        [item.name for item in items],
    ):
        if len(set(names)) == len(names):
            return names
    twice = sorted({name for name in names if names.count(name) > 1})
    raise DirectionError(
        f"two directions of {path} have one name: {twice[:3]}. Write them to files of their own"
    )
