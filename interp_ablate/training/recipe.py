"""The numbers of a LoRA training and of a healing, with their defaults and help.

Knows: the recipe, the settings and their checks. Does not know: data or models. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

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


PreserveEdit = Literal["freeze-writers", "reproject", "none"]
# For the original's answers against the edited model's: little preference, much KL (measured; docs/recovery.md).
OWN_ANSWERS: dict[str, Any] = {"beta": 0.1, "kl_weight": 10.0}


@dataclass(frozen=True)
class HealingConfig:
    """The settings of learning from preferences, and of preserving the edit.

    Raises:
        RunError: a number that cannot be.
    """

    preserve_edit: PreserveEdit = setting(
        "freeze-writers",
        "train only what reads the stream, so that every edited tensor stays bit for bit (freeze-writers); or all "
        "linear layers, and put what they write through the edit (reproject), or not (none)",
        choices=get_args(PreserveEdit),
    )
    # With the original's answers preferred to the edited model's, beta = 1 is the value at which the loss is least
    # for the original itself.
    beta: float = setting(0.1, "DPO's: the smaller, the further from the edited model")
    sft_weight: float = setting(0.0, "of the loss on chosen answers, beside DPO's")
    kl_weight: float = setting(
        0.0,
        "of the KL a token (nats) to the original on chosen answers "
        f"({OWN_ANSWERS['kl_weight']:g} with --make-preferences)",
    )

    def __post_init__(self) -> None:
        if self.preserve_edit not in get_args(PreserveEdit):
            raise RunError(
                f"preserve_edit={self.preserve_edit!r}: accepted are {', '.join(get_args(PreserveEdit))}"
            )
        if not self.beta > 0 or self.sft_weight < 0 or self.kl_weight < 0:
            raise RunError(
                "beta is above 0, the weights of other losses from 0; got "
                f"{self.beta}, {self.sft_weight} and {self.kl_weight}"
            )


@dataclass(frozen=True)
class AnswerConfig:
    """The settings of answers that become preferences; what is sampled depends on all of them."""

    max_new_tokens: int = setting(40, "tokens of an answer that is made, at most")
    samples: int = setting(1, "answers a prompt that are made")
    temperature: float = 1.0
    seed: int = setting(0, "of the sampling")
    batch_size: int = 32
    """Prompts that are answered together."""


HEALING = HealingConfig()
