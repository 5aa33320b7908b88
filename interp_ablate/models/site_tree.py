"""A model's sites as a tree of text, as a notebook shows it.

Knows: which sites there are, layers that have the same ones. Does not know: what is at a site.
"""

from __future__ import annotations

from itertools import groupby

from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.models.backends.backend import SiteMap
from interp_ablate.sites import EMBEDDING_POINTS, POINTS, Point, Site


def site_tree(title: str, site_map: SiteMap, n_layers: int) -> str:
    """The sites in forward order, layers with the same points together; * marks those that write to the stream."""

    def exists(site: Site) -> bool:
        try:
            site_map.hook_point(site)
        except ModelError:
            return False
        return True

    def points_of(layer: int) -> tuple[Point, ...]:
        blocks = [point for point in POINTS if point not in EMBEDDING_POINTS]
        sites = sorted(Site(layer, point) for point in blocks)
        return tuple(site.point for site in sites if exists(site))

    try:
        writers = set(site_map.writers)
    except InterpAblateError:  # not known, or not all of them
        writers = set()
    note = (
        "* writes to the residual stream" if writers else "what writes to the stream is not known"
    )
    lines = [title, f"  {note}"]
    for point in EMBEDDING_POINTS:
        if exists(Site(0, point)):
            lines.append(f"├── {point}{' *' if Site(0, point) in writers else ''}")
    for points, group in groupby(range(n_layers), points_of):
        layers = list(group)
        span = f"layers {layers[0]} to {layers[-1]}" if layers[1:] else f"layer {layers[0]}"
        lines.append(f"├── {span}")
        for i, point in enumerate(points):
            star = " *" if Site(layers[0], point) in writers else ""
            lines.append(f"│   {'└' if i + 1 == len(points) else '├'}── {point}{star}")
    return "\n".join([*lines, "└── final norm, unembedding"])
