"""LEACE: least-squares concept erasure (Belrose et al. 2023).

Knows: the eraser and its fit. Does not know: hooks or plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import ZERO_TOLERANCE, PerPrompt, fingerprint_of
from interp_ablate.directions.mean_difference import as_float64, check_spread, checked_means
from interp_ablate.errors import DirectionError
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site

# A whitened cross-covariance below this is rounding. The package's own 0.01 leaves weak concepts in.
LEACE_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Eraser:
    """x -> x - write * (read . (x - centre)), where read . write = 1: an oblique projection, rank 1.

    Applied twice it changes nothing more.

    Raises:
        DirectionError: parts of different shapes, not finite, or with read . write other than 1.
    """

    write: Float[Tensor, " d_model"]
    """Unit vector that is taken out of the stream."""
    read: Float[Tensor, " d_model"]
    """Vector whose dot product with x - centre says how much of `write` is taken out."""
    centre: Float[Tensor, " d_model"]
    """The point that stays where it is."""
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
        wide = to_float64(x)
        amount = (wide - self.centre.to(wide)) @ self.read.to(wide)
        return (wide - amount[..., None] * self.write.to(wide)).to(x)

    @property
    def name(self) -> str:
        """Readable label: method, hook name and position."""
        return f"{self.method}@{self.site}[{self.position}]"

    @property
    def fingerprint(self) -> str:
        """sha256 of the three vectors and where they came from."""
        parts = [self.write, self.read, self.centre]
        return fingerprint_of(parts, [str(self.site), self.position, self.method])


def leace(
    positive: PerPrompt,
    negative: PerPrompt,
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
    means = checked_means(positive, negative, site, position)
    check_spread("leace", positive, negative, means)
    rows = torch.cat([as_float64(positive), as_float64(negative)])
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
