"""Preference pairs for healing: read from a file, or made of the original's and the edited model's answers.

Knows: pairs and their token rows. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.datasets.chat_reader import read_preferences
from interp_ablate.errors import RunError
from interp_ablate.models.model import Model
from interp_ablate.models.thinking import Generation
from interp_ablate.prompts.messages import Message
from interp_ablate.prompts.prompt import Prompt, normalised
from interp_ablate.training.recipe import AnswerConfig
from interp_ablate.training.rows import RowTokenizer, TrainingRow
from interp_ablate.training.trainable_model import TrainableModel


@dataclass(frozen=True)
class Response:
    """An answer."""

    text: str
    finished: bool = True
    """It ended by itself; otherwise a limit of tokens cut it."""
    thought: str = ""
    """What was thought before it, under a key of its own."""

    @property
    def as_dict(self) -> dict[str, str]:
        """The answer as a message."""
        thought = {"reasoning_content": self.thought} if self.thought else {}
        return {"role": "assistant", "content": self.text, **thought}


@dataclass(frozen=True)
class PreferencePair:
    """A conversation open for an answer, the answer to prefer and the one not to."""

    messages: tuple[dict[str, Any], ...]
    chosen: Response
    rejected: Response

    def to_dict(self) -> dict[str, Any]:
        """A row as TRL, axolotl (`chat_template.default`) and `read_pairs` take it."""
        return {
            "prompt": list(self.messages),
            "chosen": [self.chosen.as_dict],
            "rejected": [self.rejected.as_dict],
            "finished": {"chosen": self.chosen.finished, "rejected": self.rejected.finished},
        }


def read_pairs(path: str | Path) -> list[PreferencePair]:
    """The preferences of a file, each with one chosen and one rejected answer.

    Raises:
        RowFileError: a file or row that cannot be used, with its line; two answers that say the same.
        RunError: an answer of several messages, with its row; no preferences at all.
    """
    pairs = []
    for row in read_preferences(path):
        sides = [_one_answer(side, path, row.number) for side in (row.chosen, row.rejected)]
        ended = row.raw.get("finished")
        ended = ended if isinstance(ended, Mapping) else {}
        messages = tuple(message.as_dict for message in row.prompt)
        chosen, rejected = (
            Response(side.content, bool(ended.get(name, True)), side.thought)
            for name, side in zip(("chosen", "rejected"), sides)
        )
        pairs.append(PreferencePair(messages, chosen, rejected))
    if not pairs:
        raise RunError(f"{path} holds no preference")
    return pairs


def _one_answer(side: Sequence[Message], path: str | Path, number: int) -> Message:
    if len(side) != 1 or side[0].role != "assistant" or side[0].calls_tools:
        came = ", ".join("calls of tools" if m.calls_tools else m.role for m in side)
        raise RunError(
            f"{path}, row {number}: chosen and rejected are one answer of the assistant in words each; here "
            f"one is {came}. Put what comes before into the prompt, or remove the row"
        )
    return side[0]


def make_pairs(
    original: TrainableModel, edited: TrainableModel, prompts: Sequence[Prompt], how: AnswerConfig
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Prefer the original's answers to the edited model's; also count the answers that were of no use.

    Answers are sampled: samples of the original are what its KL is about, greedy answers are not. Two equal
    answers teach nothing and are left out, and so are blank ones. Thoughts stay before their answers; one that
    never ended has no answer.

    Raises:
        RunError: no pair is left.
    """
    repeated = [prompt for prompt in prompts for _ in range(how.samples)]

    def answers(model: Model) -> list[Generation]:
        return model.generate(
            repeated,
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            seed=how.seed,
            batch_size=how.batch_size,
        )

    sides = [base.measured(answers) for base in (original, edited)]
    counts = {"answers": len(repeated), "same": 0, "blank": 0, "no_answer": 0, "used": 0}
    pairs = []
    for prompt, chosen, rejected in zip(repeated, *sides, strict=True):
        if chosen.answer is None or rejected.answer is None:
            counts["no_answer"] += 1
        elif not chosen.answer.strip() or not rejected.answer.strip():
            counts["blank"] += 1
        elif chosen.answer == rejected.answer:
            counts["same"] += 1
        else:
            responses = (
                Response(g.answer or "", g.finished, g.thought) for g in (chosen, rejected)
            )
            pairs.append(PreferencePair(tuple(prompt.messages), *responses))
    counts["used"] = len(pairs)
    if not pairs:
        raise RunError(
            f"the two models answer alike ({counts}): there is nothing to heal, or both are one model"
        )
    return pairs, counts


def exclude_held_out(
    prompts: Sequence[Prompt], held_out: Sequence[Prompt]
) -> tuple[list[Prompt], int]:
    """The prompts that are not among the held-out ones, and how many were."""
    excluded = {normalised(prompt) for prompt in held_out}
    others = [prompt for prompt in prompts if normalised(prompt) not in excluded]
    if not others:
        raise RunError("every prompt for preferences is held out for the report: give others")
    return others, len(prompts) - len(others)


def pair_rows(
    pairs: Sequence[PreferencePair], renderer: RowTokenizer
) -> tuple[list[tuple[TrainingRow, TrainingRow]], dict[str, int]]:
    """Tokens of both answers of every pair, and how many prompts were too long and answers cut.

    Raises:
        RunError: no pair is left.
    """
    rows, counts = [], {"pairs": len(pairs), "used": 0, "prompts_too_long": 0, "answers_cut": 0}
    for pair in pairs:
        both = [
            renderer.row(
                pair.messages, response.text, thought=response.thought, finished=response.finished
            )
            for response in (pair.chosen, pair.rejected)
        ]
        if both[0] is None or both[1] is None:
            counts["prompts_too_long"] += 1
            continue
        counts["answers_cut"] += both[0].cut + both[1].cut
        rows.append((both[0], both[1]))
    counts["used"] = len(rows)
    if not rows:
        raise RunError(
            f"no preference is left to train on: {counts}. Give a larger --max-length, or shorter prompts"
        )
    return rows, counts
