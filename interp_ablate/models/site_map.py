"""The sites that one loaded model has.

Knows: hook points by site, which points an architecture lacks. Does not know: plans, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from torch import nn

from interp_ablate.errors import ModelError
from interp_ablate.models.architectures import writer_points
from interp_ablate.models.backends.backend import Backend
from interp_ablate.sites import POINTS, RESIDUAL_POINTS, Point, Site, sites_of


class SiteMap:
    """The sites of one model, over its backend; `model_name` is for messages."""

    def __init__(self, backend: Backend, model_name: str) -> None:
        self._backend, self._model_name = backend, model_name
        self.n_layers: int = backend.tl.cfg.n_layers

    def hook_point(self, site: Site) -> nn.Module:
        """The TransformerLens HookPoint of a site.

        Raises:
            ModelError: a layer beyond the last, or a site this architecture does not have.
        """
        if site.layer >= self.n_layers:
            raise ModelError(
                f"no layer {site.layer}: {self._model_name} has layers 0 to {self.n_layers - 1}"
            )
        point = self._backend.hook_point(site)
        if point is None:
            points = [p for p in POINTS if self._backend.hook_point(Site(0, p)) is not None]
            raise ModelError(
                f"{self._model_name} ({self._backend.name}) has no site {site}; its points are "
                f"{', '.join(points)} (blocks that run attention and MLP in parallel have no resid_mid)"
            )
        return point

    @cached_property
    def writers(self) -> tuple[Site, ...]:
        """See `Model.writers`."""
        points = writer_points(
            pos_embed=self._backend.hook_point(Site(0, "pos_embed")) is not None,
            post_norm=self._backend.post_norm_gain(Site(0, "attn_proj")) is not None,
        )
        return sites_of(points, range(self.n_layers))

    @property
    def residual_points(self) -> tuple[Point, ...]:
        """See `Model.residual_points`."""
        return tuple(p for p in RESIDUAL_POINTS if self._backend.hook_point(Site(0, p)) is not None)

    def first_block(self, sites: Iterable[Site]) -> int:
        """The first block that must run for the sites to hold what they hold in a whole pass.

        The number of layers for no sites; 0 for the embedding, and for every site of a HookedTransformer,
        which runs whole passes only.

        Raises:
            ModelError: a site that the model does not have.
        """
        first = self.n_layers
        for site in sites:
            self.hook_point(site)
            first = min(first, self._backend.first_block(site))
        return first
