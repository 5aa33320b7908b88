"""The filter of rollouts: coherent answers that express the trait on the side that asks for it.

Knows: thresholds, and what each of them removed. Does not know: models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.persona.answers import Rollout, read_answers
from interp_ablate.persona.settings import MIN_ANSWERS, MIN_COHERENCE, THRESHOLD


def kept_answers(path: str | Path, made_of: Mapping[str, Any] | None) -> FilteredRollouts:
    """The rollouts that made a persona's vectors, scored and filtered as its `made_of` says.

    Raises:
        RunError: as `read_answers`; a persona that does not say what it is made of.
    """
    try:
        origin = dict(made_of or {})
        scorers = {name: origin[name] for name in ("scorer", "coherence")}
        limits = {name: origin["settings"][name] for name in ("threshold", "min_coherence")}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the persona of {path} does not say how its rollouts were judged and filtered ({error!r} is "
            "missing): extract it again"
        ) from error
    return filter_rollouts(read_answers(path, **scorers), **limits, min_answers=0)


@dataclass(frozen=True)
class FilteredRollouts:
    """The answers of both sides that passed the filter."""

    positive: tuple[Rollout, ...]
    negative: tuple[Rollout, ...]
    counts: dict[str, dict[str, int]]
    """For each side, how many `answers` there were, how many were `kept`, and how many each reason removed."""

    def __str__(self) -> str:
        return "; ".join(
            f"{side}: {describe_counts(counts)}" for side, counts in self.counts.items()
        )


def describe_counts(counts: dict[str, int]) -> str:
    """The counts of one side in words."""
    removed = ", ".join(
        f"{n} {_REASONS[why]}" for why, n in counts.items() if why in _REASONS and n
    )
    return f"{counts['kept']} of {counts['answers']} kept" + (f" ({removed})" if removed else "")


_REASONS = {
    "empty": "empty",
    "no_verdict": "without a verdict",
    "score": "on the wrong side of the threshold",
    "coherence": "incoherent",
}


def filter_rollouts(
    rollouts: Sequence[Rollout],
    *,
    threshold: float = THRESHOLD,
    min_coherence: float = MIN_COHERENCE,
    min_answers: int = MIN_ANSWERS,
) -> FilteredRollouts:
    """Keep answers that show the trait under positive prompts, and answers without it under negative ones.

    Kept: score >= threshold under the positive prompts, < threshold under the negative ones, coherence >=
    `min_coherence` in both. Each answer is judged alone (the published code drops a pair where one of the two
    fails). Answers without a verdict are dropped and counted.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

    Raises:
        RunError: fewer than `min_answers` are left on a side, with what was removed and what to do.
    """
    counts: dict[str, dict[str, int]] = {}
    kept: dict[str, list[Rollout]] = {"positive": [], "negative": []}
    for side in ("positive", "negative"):
        tally = counts[side] = {"answers": 0, "kept": 0, **dict.fromkeys(_REASONS, 0)}
        for answer in (each for each in rollouts if each.key["side"] == side):
            why = _why_not(answer, side, threshold, min_coherence)
            tally["answers"] += 1
            tally[why or "kept"] += 1
            if why is None:
                kept[side].append(answer)
    short = [side for side, answers in kept.items() if len(answers) < min_answers]
    if short:
        raise RunError(_too_few(short[0], counts[short[0]], min_answers, threshold))
    return FilteredRollouts(tuple(kept["positive"]), tuple(kept["negative"]), counts)


def _why_not(answer: Rollout, side: str, threshold: float, min_coherence: float) -> str | None:
    if not answer.text.strip() or not answer.tokens:
        return "empty"
    if answer.score is None or answer.coherence is None:
        return "no_verdict"
    if (answer.score >= threshold) != (side == "positive"):
        return "score"
    return None if answer.coherence >= min_coherence else "coherence"


def _too_few(side: str, counts: dict[str, int], min_answers: int, threshold: float) -> str:
    most = max(_REASONS, key=lambda why: counts[why])
    wanted = "at or above" if side == "positive" else "below"
    advice = {
        "empty": "the model says nothing: is it a chat model, and its chat template its own?",
        "no_verdict": "the scorer gave no verdict: try another --scorer",
        "score": (
            f"few answers under the {side} system prompts score {wanted} {threshold:g}: read them in the "
            "rollouts, then use a model that follows its system prompt, plainer system prompts, another "
            "--scorer, or another --threshold"
        ),
        "coherence": "the answers are incoherent: lower --temperature, or use another model",
    }[most]
    return (
        f"too few answers under the {side} system prompts: {describe_counts(counts)}; at least {min_answers} are needed. "
        f"Give more --extraction-questions or --samples; {advice}"
    )
