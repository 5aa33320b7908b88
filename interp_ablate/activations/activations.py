"""Containers of collected activations: values of every prompt, and their moments.

Knows: shapes, positions, masked means. Does not know: how a model is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_ablate.display import html_table
from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.models.batches import Batch
from interp_ablate.precision import all_finite, to_float64
from interp_ablate.sites import Site, SiteLike

if TYPE_CHECKING:
    import pandas as pd
    import xarray

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
    prompts: tuple[str, ...] = field(default=(), compare=False)
    """The prompts' texts, where they are known."""
    tokens: tuple[tuple[str, ...], ...] = field(default=(), compare=False)
    """For each prompt the token that each position reads, as text; "" for a mean over tokens."""

    def __repr__(self) -> str:
        n_prompts, n_positions, n_sites, d_model = self.values.shape
        return (
            f"Activations({n_prompts} prompts x {n_positions} positions x {n_sites} sites x d_model {d_model}, "
            f"{str(self.values.dtype).removeprefix('torch.')})"
        )

    def _repr_html_(self) -> str:
        labels = self.label_names
        rows = (
            (
                "prompts",
                len(self.values),
                f"{labels.count('positive')} positive" if any(labels) else "",
            ),
            ("positions", len(self.positions), ", ".join(self.positions)),
            ("sites", len(self.sites), f"{self.sites[0]} to {self.sites[-1]}"),
            ("d_model", self.values.shape[-1], str(self.values.dtype)),
        )
        return html_table(("axis", "size", "what"), rows, caption=repr(self))

    @property
    def label_names(self) -> list[str]:
        """positive or negative for each prompt; "" where the prompts were no ContrastSet."""
        return label_names(self.labels, len(self.values))

    def tokens_at(self, position: Position) -> list[str]:
        """The text of the token that a position reads, a prompt each; "" where that is not known."""
        place = self.positions.index(str(position))
        return [row[place] for row in self.tokens] or [""] * len(self.values)

    def to_frame(self) -> pd.DataFrame:
        """A row for each prompt, position and site, with the index prompt, label, position, layer, point; a column a
        dimension of the stream."""
        import pandas as pd

        names = self.label_names
        index = pd.MultiIndex.from_tuples(
            [
                (i, names[i], position, site.layer, site.point)
                for i in range(len(self.values))
                for position in self.positions
                for site in self.sites
            ],
            names=("prompt", "label", "position", "layer", "point"),
        )
        return pd.DataFrame(as_numpy(self.values).reshape(len(index), -1), index=index)

    def to_xarray(self) -> xarray.DataArray:
        """The values with named axes: prompt, position, site, d_model; label, layer and point as coordinates.

        Raises:
            InterpAblateError: xarray is not installed.
        """
        xarray = xarray_or_error()
        coordinates = {
            "position": list(self.positions),
            "site": [str(site) for site in self.sites],
            "label": ("prompt", self.label_names),
            "layer": ("site", [site.layer for site in self.sites]),
            "point": ("site", [site.point for site in self.sites]),
        }
        axes = ("prompt", "position", "site", "d_model")
        return xarray.DataArray(as_numpy(self.values), coordinates, axes, name="activation")

    def at(self, site: SiteLike, position: Position = -1) -> Float[Tensor, "prompt d_model"]:
        """Activations at one site and position.

        Raises:
            InterpAblateError: a site or position that was not collected.
        """
        site = Site.parse(site)
        if site not in self.sites or str(position) not in self.positions:
            what = f"positions {', '.join(self.positions)}"
            raise no_activations(f"{site}[{position}]", self.sites, what)
        return self.values[:, self.positions.index(str(position)), self.sites.index(site)]


def label_names(labels: Bool[Tensor, " prompt"] | None, n_prompts: int) -> list[str]:
    """positive or negative for each prompt; "" without labels."""
    if labels is None:
        return [""] * n_prompts
    return ["positive" if label else "negative" for label in labels.tolist()]


def no_activations(place: str, sites: Sequence[Site], what: str) -> InterpAblateError:
    """The error for a place that was not collected."""
    return InterpAblateError(
        f"no activations at {place}: collected were {len(sites)} sites from {sites[0]} to {sites[-1]}, {what}"
    )


def xarray_or_error() -> Any:
    """The module xarray.

    Raises:
        InterpAblateError: it is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise InterpAblateError(
            "to_xarray needs xarray: pip install 'interp-ablate[xarray]'"
        ) from error
    return xarray


def as_numpy(values: Tensor) -> np.ndarray:
    """The values as NumPy has them, which knows no bfloat16."""
    return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()


def check_finite(
    values: Tensor, place: str = "", *, error: type[InterpAblateError] = ModelError
) -> None:
    """Refuse NaN and infinity in activations, as `error`; `place` says where they are."""
    if not all_finite(values):
        raise error(
            f"NaN or infinity in the activations{place}: float16 overflows on many models; use --dtype "
            "bfloat16 or float32"
        )


def check_captured(captured: Mapping[Site, Tensor], sites: Sequence[Site]) -> None:
    """Refuse sites that no pass went through.

    Raises:
        ModelError: names the first.
    """
    dead = [str(site) for site in sites if site not in captured]
    if dead:
        raise ModelError(
            f"the model has a hook point at {dead[0]}, and no pass goes through it: collect another site"
        )


def stacked(captured: Mapping[Site, Tensor], sites: Sequence[Site], dim: int) -> Tensor:
    """What was captured at several sites as one tensor on the CPU, the sites along a new axis.

    Layers may be on several devices: everything meets on the first site's, and is copied once.

    Raises:
        ModelError: a site whose hook point no pass went through.
    """
    check_captured(captured, sites)
    device = captured[sites[0]].device
    return torch.stack([captured[site].to(device) for site in sites], dim).cpu()


def masked_mean(
    x: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the masked positions of each row, float64."""
    wide = to_float64(x)
    weights = mask.to(wide)
    return torch.einsum("bpd,bp->bd", wide, weights) / weights.sum(1, keepdim=True)


def response_lengths(batch: Batch, starts: Sequence[int]) -> Int[Tensor, " batch"]:
    """How many tokens the response of each row has; `starts`: where each row's begins, of all rows that are read.

    The prompt can end before that: a thought of the model, which is generated too, stands between.
    """
    begins = torch.tensor([starts[i] for i in batch.index])
    return batch.row_lengths - begins.to(batch.row_lengths)


def response_mean(
    x: Float[Tensor, "batch pos d_model"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the response of each row, its last so many tokens, float64. Rows end at the last column."""
    width = x.shape[1]
    border = width - lengths[:, None]
    return masked_mean(x, torch.arange(width, device=x.device)[None] >= border)
