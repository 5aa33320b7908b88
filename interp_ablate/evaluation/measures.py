"""The settings of an evaluation: texts, prompts, tasks and scorers.

Knows: the choice and its checks. Does not know: models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_ablate.errors import RunError
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.readers import bundled_names, is_one_side, read_side
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.settings import MAX_NEW_TOKENS, setting

if TYPE_CHECKING:
    from interp_ablate.evaluation.perplexity import Corpus


def read_prompts(spec: str | Path, *, seed: int = 0) -> dict[str, tuple[Prompt, ...]]:
    """Read lists of prompts to be answered, by name.

    A bundled contrast set's name stands for the test part of its split, which made no direction and no
    choice in a run with default sizes and the same `seed`; another contrast set (see `ContrastSet.load`) for all of its
    prompts, side by side; a text file with a prompt a line, or a table without labels, for one list.

    Raises:
        PromptError: nothing there, or something that cannot be read.
    """
    name, path = str(spec), Path(spec)
    if name not in bundled_names() and is_one_side(path):
        prompts = read_side(path)
        return {path.stem: tuple(prompts)}
    contrast = ContrastSet.load(spec)
    if name in bundled_names():
        contrast = contrast.split(seed=seed).test
    return {
        f"{contrast.name}, positive": contrast.positive,
        f"{contrast.name}, negative": contrast.negative,
    }


def _bundled_text() -> Corpus:
    from interp_ablate.evaluation.perplexity import read_corpus  # which needs torch

    return read_corpus()


@dataclass(frozen=True)
class EvaluationConfig:
    """The parts of an evaluation and their settings; give nothing for a part to leave it out."""

    text: Corpus | None = field(default_factory=lambda: _bundled_text())
    """Text whose perplexity is measured."""
    prompts: Mapping[str, tuple[Prompt, ...]] = field(
        default_factory=lambda: read_prompts("declining")
    )
    """Lists of prompts that both models answer, by name."""
    scorers: tuple[TextScorer, ...] = ()
    """They score the answers, 0 to 100."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness."""
    task_folders: tuple[str | Path, ...] = setting(
        (),
        "where tasks are looked for first; tasks are code: give folders that you trust",
        flag="tasks-folder",
        repeat=True,
        metavar="DIR",
    )
    max_new_tokens: int = setting(MAX_NEW_TOKENS, "tokens of an answer (greedy), at most")
    context: int = setting(512, "tokens a window of text")
    stride: int = setting(256, "tokens between windows")
    limit: int | None = setting(None, "documents, prompts a list, items a task, at most")
    chat: bool = setting(False, "items go through the chat template", flag="tasks-chat")

    def limited(self) -> EvaluationConfig:
        """With `limit` applied to text and prompts.

        Raises:
            RunError: nothing to measure; a limit or a number of new tokens below 1; two scorers of one name.
        """
        if not (self.text or self.prompts or self.tasks):
            raise RunError("nothing to measure: give text, prompts or tasks")
        if self.max_new_tokens < 1:
            raise RunError(f"max_new_tokens={self.max_new_tokens}: an answer has at least 1")
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names):
            raise RunError(f"two scorers have one name: {', '.join(names)}")
        if self.limit is None:
            return self
        if self.limit < 1:
            raise RunError(f"--limit {self.limit}: at least 1")
        text = self.text and replace(self.text, documents=self.text.documents[: self.limit])
        return replace(
            self, text=text, prompts={k: v[: self.limit] for k, v in self.prompts.items()}
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the numbers depend on, but for models, scorers and tasks."""
        sides = {
            name: hashlib.sha256(json.dumps([p.parts for p in side]).encode()).hexdigest()
            for name, side in self.prompts.items()
        }
        return {
            "text": self.text and self.text.fingerprint,
            "prompts": sides,
            "max_new_tokens": self.max_new_tokens,
            "context": self.context,
            "stride": self.stride,
            "limit": self.limit,
            "chat": self.chat,
        }
