"""Logit lens of a direction: the tokens that it promotes and suppresses, beside random directions.

Source: nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru. The final norm's gain is measured
and folded into the direction; its scale is left out, as it is one number a token. With the matrix of a fitted
Jacobian lens, it is that lens (Gurnee et al. 2026, https://transformer-circuits.pub/2026/workspace).

Knows: the unembedding, the final norm. Does not know: what layers between the direction and the end do to it, unless
it is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.circuits.norm_gains import through_norm
from interp_ablate.directions.direction import Direction, as_direction, random_directions
from interp_ablate.errors import DirectionError, ModelError, PlanError
from interp_ablate.models.model import Model, check_model
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site

if TYPE_CHECKING:
    import pandas as pd

N_TOKENS = 48  # fixed tokens on which the final norm is measured


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The logits that a unit of a direction adds, before the final norm's scale."""

    logits: Float[Tensor, " d_vocab"]
    spread: Float[Tensor, " d_vocab"]
    """The standard deviation of each token's logit over random directions of equal norm (exact)."""
    random_largest: tuple[float, float]
    """The mean and the largest of the highest logits in SDs that random directions gave."""
    tokens: tuple[str, ...]
    direction: str

    def to_frame(self, top: int = 10) -> pd.DataFrame:
        """The tokens promoted and suppressed most: side, rank, token_id, token, logit, z.

        `z` is the logit in standard deviations of that token's logit along random directions.
        """
        import pandas as pd

        z = self.z
        rows: list[dict[str, Any]] = []
        for side, largest in (("promoted", True), ("suppressed", False)):
            for rank, i in enumerate(
                self.logits.topk(min(top, len(z)), largest=largest).indices.tolist()
            ):
                rows.append(
                    {"side": side, "rank": rank, "token_id": i, "token": self.tokens[i],
                     "logit": float(self.logits[i]), "z": float(z[i])}
                )  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def z(self) -> Float[Tensor, " d_vocab"]:
        """Each token's logit in standard deviations over random directions; about normal for a random one."""
        return self.logits / self.spread.clamp(min=1e-300)

    def __repr__(self) -> str:
        most = [self.tokens[i] for i in self.logits.topk(min(5, len(self.logits))).indices.tolist()]
        return (
            f"LogitLens({self.direction!r}: promotes {most}; largest z {float(self.z.max()):.1f}, random "
            f"directions {self.random_largest[0]:.1f} on average)"
        )


def logit_lens(
    model: Model,
    direction: Direction,
    *,
    transport: Float[Tensor, "d_model d_model"] | None = None,
    controls: int = 50,
    seed: int = 0,
) -> LogitLens:
    """The tokens that a direction promotes and suppresses if nothing between it and the unembedding changes it.

    Args:
        transport: what the layers between the direction and the last block's output do to it, as one matrix:
            `jacobians[layer]` of a TransformerLens `JacobianLens`, for a direction at that layer's resid_post.
        controls: random directions of equal norm to compare with, transported alike.

    Raises:
        DirectionError: a direction or a transport of another d_model.
        ModelError: no unembedding; something else than a norm before it.
        PlanError: a plan is applied.
    """
    check_model(model)
    if len(as_direction(direction).vector) != model.d_model:
        raise DirectionError(
            f"the direction has d_model {len(direction.vector)}, and {model.source.name} {model.d_model}"
        )
    unembedding = model.site_map.unembedding
    if unembedding is None:
        raise ModelError(f"{model.source.name} has no unembedding: there are no logits to read")
    x, y = _around_final_norm(model)
    eye = torch.eye(model.d_model, dtype=torch.float64)
    if y.shape != x.shape or (fold := through_norm(x, y, eye)) is None:
        raise ModelError(
            f"what {model.source.name} unembeds is not a norm of the last block's output: a direction "
            "has no logits of its own there"
        )
    if transport is not None:
        if tuple(transport.shape) != (model.d_model, model.d_model):
            raise DirectionError(
                f"transport has shape {tuple(transport.shape)}: give one matrix [{model.d_model}, {model.d_model}]"
            )
        fold = transport.detach().to(fold).T @ fold
    random = random_directions(direction, controls, seed=seed)
    vectors = torch.stack([direction.vector, *(each.vector for each in random)]) @ fold
    weight = to_float64(unembedding)
    logits = (weight @ vectors.to(weight).T).T.cpu()
    spread = ((weight @ fold.to(weight).T).norm(dim=1) / model.d_model**0.5).cpu()
    largest = (logits[1:] / spread.clamp(min=1e-300)).max(1).values if controls else torch.zeros(1)
    tokens = tuple(_token_text(model, i) for i in range(len(weight)))
    return LogitLens(
        logits[0], spread, (float(largest.mean()), float(largest.max())), tokens, direction.name
    )


def _token_text(model: Model, token: int) -> str:
    if model.tokenizer is None:
        return str(token)
    return str(model.tokenizer.decode([token]))


def _around_final_norm(model: Model) -> tuple[Tensor, Tensor]:
    """What the last block gave and what the unembedding read, at fixed tokens: [token, d_model] each."""
    if model.plans.is_edited:
        raise PlanError(
            "the lens is of a model without edits: leave the `with model.applied(...)` block"
        )
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(
        0, model.tl.cfg.d_vocab, (min(N_TOKENS, model.tl.cfg.n_ctx),), generator=generator
    )
    read: list[Tensor] = []
    handle = model.site_map.unembed_input.register_forward_hook(
        lambda module, args, output: read.append(output.detach())
    )
    try:
        site = Site(model.n_layers - 1, "resid_post")
        stream = model.stream(
            [row.tolist()], keep=len(row), capture={site: lambda x, batch: x}, tail=len(row)
        )
        captured = [captured[site] for _, _, captured in stream]
    finally:
        handle.remove()
    return captured[0].flatten(0, -2), read[-1].flatten(0, -2)
