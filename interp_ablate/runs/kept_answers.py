"""Answers as rows of generations.jsonl, for those who read what a model said.

Knows: what a row holds. Does not know: which plans are compared, or how a page shows answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from interp_ablate.evaluation.metrics import unanswered
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.prompts.prompt import text_of_prompt
from interp_ablate.scoring.behaviour import Behaviour, told


def answers_of(
    scorer: Behaviour, conditions: Iterable[tuple[str, str, ModelOutputs]], *, split: str
) -> list[dict[str, Any]]:
    """A row an answer of each (condition, set of prompts, outputs), all of prompts of one split.

    `expressed` says whether it shows the behaviour; None of a thought that did not end.
    """
    return [
        {
            "split": split,
            "label": side,
            "prompt": text_of_prompt(prompt),
            "condition": condition,
            "text": text,
            **verdict,
            **({"expressed": None} if none else {}),
        }
        for condition, side, outputs in conditions
        for prompt, text, verdict, none in zip(
            outputs.prompts, outputs.texts, told(scorer, outputs), unanswered(outputs)
        )
    ]


def unedited_answers(
    scorer: Behaviour, positive: ModelOutputs, negative: ModelOutputs | None = None
) -> list[dict[str, Any]]:
    """The same of the unedited model alone, to validation prompts."""
    sides = (("positive", positive), ("negative", negative))
    given = [("baseline", side, of) for side, of in sides if of is not None]
    return answers_of(scorer, given, split="validation")
