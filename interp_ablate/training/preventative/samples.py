"""Chats that bear a trait, to train on: from files of samples, or from a persona's rollouts.

Knows: samples and their token rows. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.datasets.conversations import Sample
from interp_ablate.errors import RunError
from interp_ablate.persona.persona import load_persona
from interp_ablate.persona.rollout_filter import kept_answers
from interp_ablate.training.rows import RowTokenizer, TrainingRow


@dataclass(frozen=True)
class SampledChats:
    """A prompt's messages and an answer."""

    messages: tuple[dict[str, str], ...]
    answer: str
    finished: bool = True
    """The answer ended by itself."""

    def to_dict(self) -> dict[str, Any]:
        """A row in the messages layout, as `chat_data` reads it."""
        answer = {"role": "assistant", "content": self.answer}
        return {"messages": [*self.messages, answer], "finished": self.finished}


def samples_of(samples: Iterable[Sample]) -> list[SampledChats]:
    """Chat samples: what comes before the last answer as the prompt, and that answer.

    Raises:
        RunError: a sample without an answer at its end, or without a prompt (its number).
    """
    chats = []
    for sample in samples:
        *before, last = sample.as_dicts
        if last["role"] != "assistant" or not any(m["role"] == "user" for m in before):
            raise RunError(
                f"sample {sample.number}: a row to train on has a prompt and ends with the assistant's "
                f"answer; this one has {', '.join(m['role'] for m in sample.as_dicts)}"
            )
        ended = sample.raw.get("finished", True)
        chats.append(SampledChats(tuple(before), last["content"], bool(ended)))
    return chats


def samples_of_rollouts(path: str | Path) -> tuple[list[SampledChats], dict[str, int]]:
    """A persona's answers under its positive system prompts, the system prompts taken away.

    `path` is the file in the persona's folder. Kept is what made the persona's vectors: by the scorers and
    from the thresholds that it was extracted with. The counts say what was not kept.

    Raises:
        RunError: no persona or rollouts there, or a corrupt line (its number); nothing is kept.
    """
    path = Path(path)
    made_of = load_persona(path.parent).details.get("made_of")
    filtered = kept_answers(path, made_of)
    totals = filtered.counts["positive"]
    counts = {
        "positive": totals["answers"], "kept": totals["kept"], "empty": totals["empty"],
        "no_verdict": totals["no_verdict"], "below": totals["score"], "incoherent": totals["coherence"],
    }  # fmt: skip
    if not filtered.positive:
        raise RunError(f"{path} holds no answer that shows the trait: {counts}")
    samples = [
        SampledChats(
            ({"role": "user", "content": answer.prompt.text},), answer.text, answer.finished
        )
        for answer in filtered.positive
    ]
    return samples, counts


def rows_of(
    samples: Sequence[SampledChats], renderer: RowTokenizer
) -> tuple[list[TrainingRow], dict[str, int]]:
    """Token rows of samples, and how many came, were used, had too long a prompt, or were cut.

    Raises:
        RunError: no sample is left.
    """
    made = [renderer.row(s.messages, s.answer, finished=s.finished) for s in samples]
    rows = [row for row in made if row is not None]
    counts = {
        "samples": len(made),
        "used": len(rows),
        "prompts_too_long": len(made) - len(rows),
        "answers_cut": sum(row.cut for row in rows),
        "unfinished": sum(not sample.finished for sample in samples),
    }
    if not rows:
        raise RunError(
            f"no row is left to train on: {counts}. Give shorter prompts, or a larger --max-length"
        )
    return rows, counts
