"""Containers of collected activations: values of every prompt, and their moments.

Knows: shapes, positions, masked means. Does not know: how a model is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.models.batches import Batch
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site, SiteLike

RESPONSE_MEAN = "response_mean"
# every offset of the chat template's tokens after the instruction
AFTER_INSTRUCTION = "after_instruction"
Position = int | str


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of activations, in float64; exact under merging.

    Shapes are those of one prompt's activations. Source of the update: Chan, Golub and LeVeque 1979.
    """

    count: int
    mean: Float[Tensor, "position site d_model"]
    squares: Float[Tensor, "position site d_model"]

    @classmethod
    def of(cls, values: Float[Tensor, "prompt position site d_model"]) -> Moments:
        wide = to_float64(values)
        mean = wide.mean(0)
        return cls(len(values), mean, (wide - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """The moments of both groups of prompts together."""
        count = self.count + other.count
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * (other.count / count),
            self.squares + other.squares + gap.square() * (self.count * other.count / count),
        )


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of prompts at sites and positions, in the model's dtype."""

    values: Float[Tensor, "prompt position site d_model"]
    sites: tuple[Site, ...]
    positions: tuple[str, ...]
    labels: Bool[Tensor, " prompt"] | None = None
    """True for positive prompts; None where the prompts were no ContrastSet."""
    moments: Moments | None = field(default=None, compare=False)

    def at(self, site: SiteLike, position: Position = -1) -> Float[Tensor, "prompt d_model"]:
        """Activations at one site and position.

        Raises:
            InterpAblateError: a site or position that was not collected.
        """
        site = Site.parse(site)
        if site not in self.sites or str(position) not in self.positions:
            raise InterpAblateError(
                f"no activations at {site}[{position}]: collected were {len(self.sites)} sites from "
                f"{self.sites[0]} to {self.sites[-1]}, positions {', '.join(self.positions)}"
            )
        return self.values[:, self.positions.index(str(position)), self.sites.index(site)]


def check_finite(
    values: Tensor, place: str = "", *, error: type[InterpAblateError] = ModelError
) -> None:
    """Refuse NaN and infinity in activations, as `error`; `place` says where they are."""
    if not torch.isfinite(values).all():
        raise error(
            f"NaN or infinity in the activations{place}: float16 overflows on many models; use --dtype "
            "bfloat16 or float32"
        )


def stacked(captured: Mapping[Site, Tensor], sites: Sequence[Site], dim: int) -> Tensor:
    """What was captured at several sites as one tensor on the CPU, the sites along a new axis.

    Layers may be on several devices: everything meets on the first site's, and is copied once.

    Raises:
        ModelError: a site whose hook point no pass went through.
    """
    dead = [str(site) for site in sites if site not in captured]
    if dead:
        raise ModelError(
            f"the model has a hook point at {dead[0]}, and no pass goes through it: collect another site"
        )
    device = captured[sites[0]].device
    return torch.stack([captured[site].to(device) for site in sites], dim).cpu()


def masked_mean(
    x: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the masked positions of each row, float64."""
    wide = to_float64(x)
    weights = mask.to(wide)
    return torch.einsum("bpd,bp->bd", wide, weights) / weights.sum(1, keepdim=True)


def response_mean(
    x: Float[Tensor, "batch pos d_model"], batch: Batch
) -> Float[Tensor, "batch d_model"]:
    """Mean over the response of each row, float64. Rows end at the last column."""
    width = x.shape[1]
    border = width - (batch.row_lengths - batch.prompt_lengths)[:, None]
    return masked_mean(x, torch.arange(width, device=x.device)[None] >= border)
