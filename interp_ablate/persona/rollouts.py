"""Rollouts: answers of a model to many prompts, under system prompts or plans, scored, stored and filtered.

Knows: batches whose answers do not depend on when a run was interrupted, the file that they go to as they
are finished, scores beside them, coherence without a judge, the filter and what it removed.
Does not know: traits' files, directions, layers (`persona` does), or any scorer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.metrics import chosen_logprobs, repetition
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.jobs.progress import NoProgress, Progress
from interp_ablate.models.model import Model
from interp_ablate.persona.answers import (
    BROKEN_LINE,
    FORMAT,
    Rollout,
    RolloutRequest,
    take_line,
    verdict_key,
    with_verdicts,
)
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.persona.traits import Trait
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.storage.jsonl_log import JsonlLog

# Perplexities between which coherence falls from 100 to 0, on a logarithmic scale.
FLUENT, BROKEN = 10.0, 1000.0
_SCORED_AT_A_TIME, _READ_AT_A_TIME = 16, 8


def rollout_requests(
    trait: Trait, questions: Sequence[str], *, samples: int = 1
) -> list[RolloutRequest]:
    """Every question under every system prompt of both sides, `samples` times.

    Raises:
        InterpAblateError: no questions, or fewer than one sample.
    """
    if not questions or samples < 1:
        raise InterpAblateError(
            f"{len(questions)} questions, {samples} samples of each: at least 1 of both are needed"
        )
    return [
        RolloutRequest(
            {"side": side, "pair": pair, "question": number, "sample": sample},
            Prompt(question, system),
        )
        for side, systems in (("positive", trait.positive), ("negative", trait.negative))
        for pair, system in enumerate(systems)
        for number, question in enumerate(questions)
        for sample in range(samples)
    ]


# ---- answering -----------------------------------------------------------------------------------


def run_rollouts(
    model: Model,
    jobs: Sequence[RolloutRequest],
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    sampling: SamplingConfig | None = None,
    listener: Progress | None = None,
) -> list[Rollout]:
    """Answer every job and score the answers; what `path` holds of them already is not done again.

    Answers are stored batch by batch, scores some answers at a time. A batch that was interrupted is
    written again whole, from its own seed, so that the answers are those of an uninterrupted run. Another
    scorer scores the stored answers.

    Args:
        coherence: a scorer of how coherent an answer is; without one `fluency` under the unedited model.

    Raises:
        RunError: `path` holds answers to other jobs, of another model or sampling; see `JsonlLog`.
        InterpAblateError: a scorer that gives something else than numbers from 0 to 100, one an answer.
    """
    listener, sampling = listener or NoProgress(), sampling or SamplingConfig()
    store = _Store(model, jobs, Path(path), sampling)
    with store.lines.open() as kept:
        store.read(kept)
        listener.start("answers", len(jobs))
        listener.advance(len(store.written))
        for batch in _batches(jobs, sampling.batch_size):
            if any(number not in store.written for number in batch):
                store.write(batch, _generate(model, jobs, batch, sampling))
                listener.advance(len(batch))
        listener.finish()
        scores = _scores(store, "score", scorer, listener)
        coherent = (
            _fluency(store, model, listener)
            if coherence is None
            else _scores(store, "coherence", coherence, listener)
        )
    return [
        with_verdicts(store.written[number], scores[number], coherent[number])
        for number in range(len(jobs))
    ]


def _batches(jobs: Sequence[RolloutRequest], size: int) -> Iterator[list[int]]:
    """Numbers of jobs that are answered together: neighbours with one system prompt, which run as one prefix."""
    for _, group in groupby(range(len(jobs)), key=lambda number: jobs[number].prompt.system):
        numbers = list(group)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _generate(
    model: Model, jobs: Sequence[RolloutRequest], batch: Sequence[int], sampling: SamplingConfig
) -> list[Any]:
    digest = hashlib.sha256(f"{sampling.seed} {batch[0]}".encode()).digest()
    plans = [jobs[number].plan for number in batch]
    under: AbstractContextManager[Any] = (
        model.applied_each(plans) if any(plan is not None for plan in plans) else nullcontext()
    )
    with under:
        return model.generate(
            [jobs[number].prompt for number in batch],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=int.from_bytes(digest[:4], "big"),
            batch_size=len(batch),
        )


@dataclass(eq=False)
class _Store:
    """The file of one set of jobs: answers by number, and verdicts by scorer."""

    model: Model
    jobs: Sequence[RolloutRequest]
    path: Path
    sampling: SamplingConfig
    written: dict[int, Rollout] = field(default_factory=dict)
    verdicts: dict[tuple[str, int], float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        told = [
            [j.key, j.prompt.system, j.prompt.text, j.plan.fingerprint if j.plan else None]
            for j in self.jobs
        ]
        outer = self.model.active_plan
        identity = {
            "jobs": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            "model": self.model.fingerprint,
            "template": self.model.template,
            "sampling": asdict(self.sampling),
            "plan": outer.fingerprint if len(outer) else None,
        }
        self.lines = JsonlLog(
            self.path,
            identity,
            kind="answer file",
            format=FORMAT,
            lost="its answer is written again",
        )

    def read(self, kept: Iterable[dict[str, Any]]) -> None:
        for place, line in enumerate(kept, 2):
            try:
                number = take_line(line, self.written, self.verdicts)
                if number is not None:
                    job = self.jobs[number]
                    self.written[number] = replace(
                        self.written[number], key=job.key, prompt=job.prompt
                    )
            except BROKEN_LINE as error:
                raise self.lines.corrupt(place, repr(error)) from error

    def write(self, batch: Sequence[int], generations: Sequence[Any]) -> None:
        for number, found in zip(batch, generations, strict=True):
            if number in self.written:  # of a batch that was interrupted between its lines
                continue
            job = self.jobs[number]
            answer = Rollout(job.key, job.prompt, found.tokens, found.text, found.finished)
            self.lines.append(
                {
                    "answer": number, "key": job.key, "system": job.prompt.system,
                    "question": job.prompt.text, "text": answer.text, "tokens": list(answer.tokens),
                    "finished": answer.finished,
                }
            )  # fmt: skip
            self.written[number] = answer

    def judge(self, by: str, numbers: Sequence[int], values: Sequence[float | None]) -> None:
        self.lines.append({"scored": list(numbers), "by": by, "values": list(values)})
        self.verdicts.update({(by, number): value for number, value in zip(numbers, values)})

    def waiting(self, by: str) -> list[int]:
        """Answers with text that have no verdict line of this scorer yet."""
        return [
            number
            for number in range(len(self.jobs))
            if self.written[number].text.strip() and (by, number) not in self.verdicts
        ]


def _scores(
    store: _Store, what: str, scorer: TextScorer, listener: Progress
) -> dict[int, float | None]:
    by = verdict_key(what, scorer.identity)
    waiting = store.waiting(by)
    if waiting:
        listener.start(what, len(waiting))
    for start in range(0, len(waiting), _SCORED_AT_A_TIME):
        part = waiting[start : start + _SCORED_AT_A_TIME]
        values = scorer([store.written[number].exchange for number in part])
        store.judge(by, part, _checked(values, len(part), scorer.name))
        listener.advance(len(part))
    if waiting:
        listener.finish()
    return {number: store.verdicts.get((by, number)) for number in range(len(store.jobs))}


def _checked(values: Sequence[float | None], count: int, name: str) -> list[float | None]:
    found = [None if value is None else float(value) for value in values]
    wrong = [value for value in found if value is not None and not 0 <= value <= 100]
    if len(found) != count or wrong:
        raise InterpAblateError(
            f"the scorer {name!r} gave {len(found)} scores for {count} answers"
            + (f", such as {wrong[0]}" if wrong else "")
            + ": a scorer gives one number from 0 to 100, or None, an answer"
        )
    return found


def _fluency(store: _Store, model: Model, listener: Progress) -> dict[int, float | None]:
    by = verdict_key("coherence", {"fluency": [FLUENT, BROKEN]})
    waiting = store.waiting(by)
    if waiting:
        listener.start("coherence", len(waiting))
    for start in range(0, len(waiting), _READ_AT_A_TIME):
        part = waiting[start : start + _READ_AT_A_TIME]
        answers = [store.written[number] for number in part]
        store.judge(by, part, fluency(model, answers))
        listener.advance(len(part))
    if waiting:
        listener.finish()
    return {number: store.verdicts.get((by, number)) for number in range(len(store.jobs))}


def fluency(model: Model, answers: Sequence[Rollout]) -> list[float]:
    """Coherence from 0 to 100 without a judge: how likely the model finds the answer, less its loops.

    100 * (1 - share of repeated 3-grams) * f, where f falls from 1 at perplexity 10 (or less) to 0 at 1000
    on a logarithmic scale; perplexity of the answer's tokens after its own prompt. It says whether a
    text is fluent, not whether it answers the question; for a steered answer give the unedited model.
    An empty answer has 0.

    Raises:
        InterpAblateError: NaN or infinity in the logits.
    """
    found = [0.0] * len(answers)
    with_tokens = [i for i, answer in enumerate(answers) if answer.tokens]
    for start in range(0, len(with_tokens), _READ_AT_A_TIME):
        part = with_tokens[start : start + _READ_AT_A_TIME]
        evidence = ModelOutputs(model, [answers[i].prompt for i in part])
        ends = [answers[i].tokens for i in part]
        for i, end, logprobs in zip(part, ends, evidence.continuation_logprobs(ends)):
            surprise = -float(chosen_logprobs(logprobs, end).mean())
            likely = (math.log(BROKEN) - surprise) / (math.log(BROKEN) - math.log(FLUENT))
            found[i] = 100 * (1 - repetition(end)) * min(1.0, max(0.0, likely))
    return found
