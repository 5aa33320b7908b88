"""Conversations: several turns with a model, each answer as it is made, under a plan or without one.

Knows: the turns that were said. Does not know: where they are shown, or which plan is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from interp_ablate.edits.plan import Plan
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.messages import Message
from interp_ablate.prompts.prompt import Prompt


@dataclass
class Conversation:
    """The turns of one chat with a model; each may be answered under another plan."""

    model: Model
    system: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    turns: list[Message] = field(default_factory=list)
    """What was said so far, without the system prompt: whole turns only."""

    def __post_init__(self) -> None:
        check_model(self.model)

    def say(self, text: str, plan: Plan | None = None) -> Iterator[str]:
        """Say something, and yield the answer piece by piece; both become turns when the answer has ended.

        The plan is applied while the iterator runs, at every token of the conversation. An answer that is
        not read to its end is no turn.

        Raises:
            PromptError: an empty text, or a template that cannot render the conversation.
            ModelError: as `Model.monitor`.
            PlanError: a plan that does not fit the model.
        """
        prompt = Prompt(text, self.system, tuple(self.turns))
        pieces: list[str] = []
        with self.model.applied(plan):
            for token, _ in self.model.monitor(
                prompt,
                (),
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
            ):
                pieces.append(token.text)
                yield token.text
        self.turns += [Message("user", text), Message("assistant", "".join(pieces))]
