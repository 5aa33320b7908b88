"""The settings of a healing, with their defaults and help.

Knows: the numbers and their checks. Does not know: models or data. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from interp_ablate.errors import RunError
from interp_ablate.settings import setting

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


DEFAULTS = HealingConfig()
