"""Sites: the places of the residual stream that can be read or written.

Knows: the points of a decoder that this package names, and what TransformerLens calls them.
Does not know: any model, tensor or hook; those are found by name in `model`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from interp_ablate.errors import InterpAblateError

Point = Literal[
    "embed",
    "pos_embed",
    "embed_bias",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "attn_proj",
    "mlp_proj",
]
POINTS: tuple[Point, ...] = get_args(Point)
RESIDUAL_POINTS: tuple[Point, ...] = ("resid_pre", "resid_mid", "resid_post")
# Where a norm follows the embeddings (BLOOM), embed and pos_embed are before it, and embed_bias is its bias.
EMBEDDING_POINTS: tuple[Point, ...] = ("embed", "pos_embed", "embed_bias")
# attn_out and mlp_out are what is added to the stream, after the norm that follows it in post-norm
# blocks (Gemma 2 and 3, OLMo 2); attn_proj and mlp_proj are the outputs of W_O and W_out themselves.
PROJECTION_POINTS: tuple[Point, ...] = ("attn_proj", "mlp_proj")
WRITER_POINTS: tuple[Point, ...] = (*EMBEDDING_POINTS, "attn_out", "mlp_out", *PROJECTION_POINTS)

MAX_LAYER = 99_999  # more than any model has

_OUTPUTS: dict[str, Point] = {"attn_proj": "attn_out", "mlp_proj": "mlp_out"}
_PROJECTIONS: dict[str, Point] = {"attn_out": "attn_proj", "mlp_out": "mlp_proj"}

# The order in which the sites of one layer are reached in a forward pass.
_ORDER: dict[str, int] = {
    "embed": 0,
    "pos_embed": 1,
    "embed_bias": 2,
    "resid_pre": 3,
    "attn_proj": 4,
    "attn_out": 5,
    "resid_mid": 6,
    "mlp_proj": 7,
    "mlp_out": 8,
    "resid_post": 9,
}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
# Points whose TransformerLens name is not hook_<point> in their block.
_OWN_NAMES: dict[str, str] = {"attn_proj": "attn.hook_out", "mlp_proj": "mlp.hook_out"}


@dataclass(frozen=True)
class Site:
    """One place in a decoder: a layer index (from 0) and a point inside that layer.

    `str(site)` is the TransformerLens hook name. The embeddings' outputs have no layer: they are
    `Site(0, "embed")`, written `hook_embed`, and `Site(0, "pos_embed")` (GPT-2's learned positions). So is
    `Site(0, "embed_bias")`, the bias of a norm that follows them.

    Raises:
        InterpAblateError: for a layer that is negative or no integer, an unknown point, or an embedding
            at a layer other than 0.
    """

    layer: int
    point: Point

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise InterpAblateError(
                f"unknown point {self.point!r}: accepted are {', '.join(POINTS)}"
            )
        try:
            if isinstance(self.layer, bool):
                raise TypeError
            object.__setattr__(self, "layer", operator.index(self.layer))
        except TypeError as error:
            raise InterpAblateError(
                f"a layer is an integer from 0; got {self.layer!r} ({type(self.layer).__name__})"
            ) from error
        if (
            self.layer < 0
            or self.layer > MAX_LAYER
            or (self.point in EMBEDDING_POINTS and self.layer != 0)
        ):
            raise InterpAblateError(
                f"no site {self.point!r} at layer {str(self.layer)[:12]}: layers count from 0 to {MAX_LAYER} at most, "
                "and the embedding is Site(0, 'embed')"
            )

    def __str__(self) -> str:
        if self.point in EMBEDDING_POINTS:
            return f"hook_{self.point}"
        return f"blocks.{self.layer}." + _OWN_NAMES.get(self.point, f"hook_{self.point}")

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the order in which a forward pass reaches the sites."""
        return (self.layer, _ORDER[self.point])

    @property
    def output(self) -> Site:
        """Where a projection reaches the stream: attn_proj's attn_out, mlp_proj's mlp_out; else itself."""
        return Site(self.layer, _OUTPUTS.get(self.point, self.point))

    @property
    def projection(self) -> Site:
        """The other way: attn_out's attn_proj, mlp_out's mlp_proj; else itself."""
        return Site(self.layer, _PROJECTIONS.get(self.point, self.point))

    @classmethod
    def parse(cls, text: SiteLike) -> Site:
        """Read `blocks.3.hook_resid_mid`, `hook_embed`, or the short forms `3.resid_mid`, `embed`.

        A `Site` is taken as it is.

        Raises:
            InterpAblateError: anything else.
        """
        if isinstance(text, Site):
            return text
        name = text if isinstance(text, str) else ""
        for point in EMBEDDING_POINTS:
            if name in (f"hook_{point}", point):
                return cls(0, point)
        for point in PROJECTION_POINTS:
            named = re.fullmatch(rf"blocks\.(\d+)\.{re.escape(_OWN_NAMES[point])}", name)
            if named:
                return cls(int(named[1]), point)
        match = _BLOCK_NAME.fullmatch(name) or re.fullmatch(r"(\d+)\.(\w+)", name)
        if match is None or match[2] not in POINTS:
            layer = text if isinstance(text, int) else 3
            raise InterpAblateError(
                f"cannot read {text!r} as a site: write a TransformerLens name such as "
                f"'blocks.{layer}.hook_resid_mid', or '{layer}.resid_post'; points are {', '.join(POINTS)}"
            )
        return cls(int(match[1]), match[2])  # type: ignore[arg-type]


SiteLike = Site | str
"""A site, or its name (see `Site.parse`)."""


def as_sites(sites: SiteLike | Iterable[SiteLike]) -> tuple[Site, ...]:
    """One site or several, each a `Site` or its name.

    Raises:
        InterpAblateError: something else.
    """
    one = isinstance(sites, (str, Site)) or not isinstance(sites, Iterable)
    return tuple(Site.parse(site) for site in ((sites,) if one else sites))  # type: ignore[arg-type, union-attr]


def sites_of(
    points: tuple[Point, ...] | list[Point], layers: range | list[int]
) -> tuple[Site, ...]:
    """Every given point at every given layer, in forward order; an embedding appears once, if asked for."""
    sites = {
        Site(0 if point in EMBEDDING_POINTS else layer, point)
        for layer in layers
        for point in points
    }
    return tuple(sorted(sites, key=lambda site: site.order))
