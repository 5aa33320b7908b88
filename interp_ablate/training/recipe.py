"""The numbers of a LoRA training, with their defaults and help.

Knows: the recipe and its checks. Does not know: data or models. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.settings import setting


@dataclass(frozen=True)
class LoraRecipe:
    """The numbers of a training run.

    Rank 32, alpha 64 and rank-stabilized scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) are those of
    Chen et al. 2025 (https://arxiv.org/abs/2507.21509), who train an epoch of some thousand samples at a learning
    rate of 1e-5. The default rate is for the few steps that show an effect on a small model.

    Raises:
        RunError: a number that cannot be.
    """

    steps: int = setting(60, "optimizer steps")
    batch_size: int = setting(4, "rows a step")
    learning_rate: float = setting(1e-4, "of AdamW")
    rank: int = setting(32, "of the LoRA")
    alpha: int = setting(64, "of the LoRA")
    rslora: bool = setting(True, "scale the adapter by alpha / rank, not by alpha / sqrt(rank)")
    max_length: int = setting(
        512, "tokens of a row: a longer answer is cut, a prompt that leaves no room is left out"
    )
    seed: int = setting(0, "of the order of rows, of the adapter, of sampling")
    save_every: int = setting(20, "steps between checkpoints, from which a killed run goes on")
    gradient_checkpointing: bool = setting(False, "less memory, slower")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "alpha", "save_every"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)}: it is at least 1")
        if not (0 < self.learning_rate < 1):
            raise RunError(f"learning_rate={self.learning_rate}: accepted is above 0 and below 1")
        if self.max_length < 2:
            raise RunError(f"max_length={self.max_length}: a row has a prompt and an answer")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


RECIPE = LoraRecipe()
