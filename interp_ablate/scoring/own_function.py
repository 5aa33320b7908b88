"""A function of one's own as a scorer: `FILE.py:NAME`, from an answer (or a prompt and an answer) to 0..100.

Such a file is code. It is loaded only where a person named it, never because a file of another's names it.

Knows: loading and calling the function. Does not know: other scorers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.scoring.exchange import (
    ExplainingScorer,
    PromptResponse,
    Verdict,
    required_arguments,
)

_SPEC = re.compile(r"(?P<file>.+\.py):(?P<minus>-?)(?P<name>\w+)")


def is_own_function(spec: str) -> bool:
    """Whether a scorer's spec names a function in a file."""
    return _SPEC.fullmatch(spec) is not None


@dataclass(frozen=True)
class FunctionScorer(ExplainingScorer):
    """A function `(answer)` or `(prompt, answer)`, both texts, that gives a number from 0 to 100, or None."""

    function: Callable[..., Any]
    label: str
    digest: str
    """sha256 of the file."""
    takes_prompt: bool

    @property
    def name(self) -> str:
        return self.label

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "function", "name": self.label.rpartition(":")[2], "sha256": self.digest}

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        return [self._verdict(each) for each in exchanges]

    def _verdict(self, exchange: PromptResponse) -> Verdict:
        texts = (exchange.prompt.text, exchange.answer) if self.takes_prompt else (exchange.answer,)
        try:
            value = self.function(*texts)
            if value is None:
                return Verdict(None, "no score given")
            score = float(value)
        except Exception as error:
            raise RunError(f"{self.label} failed on an answer: {error!r}") from error
        if not (math.isfinite(score) and 0 <= score <= 100):
            raise RunError(
                f"{self.label} gave {value!r:.60}: a score is a number from 0 to 100, or None"
            )
        return Verdict(score)


def own_function(spec: str) -> tuple[FunctionScorer, bool]:
    """The function that `FILE.py:NAME` names, and whether a - before the name reverses it.

    Raises:
        RunError: no such file or function, a file that fails to load, or a function of other arguments.
    """
    match = _SPEC.fullmatch(spec)
    assert match is not None
    path, name = Path(match["file"]), match["name"]
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        loaded = importlib.util.spec_from_file_location(f"scorer_{digest[:16]}", path)
        assert loaded is not None and loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        loaded.loader.exec_module(module)
    except Exception as error:
        raise RunError(f"cannot load the scorer {spec}: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RunError(f"{path} has no function {name!r}: give FILE.py:NAME")
    try:
        needed = required_arguments(function)
    except (TypeError, ValueError) as error:
        raise RunError(f"{spec} cannot be called with texts: {error}") from error
    if len(needed) not in (1, 2):
        raise RunError(
            f"{spec} takes {len(needed)} arguments ({', '.join(needed)}): a scorer takes an answer, or a prompt and "
            "an answer"
        )
    label = f"{path.name}:{name}"
    return FunctionScorer(function, label, digest, len(needed) == 2), bool(match["minus"])
