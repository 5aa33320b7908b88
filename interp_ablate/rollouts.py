"""Rollouts: answers of a model to many prompts, under system prompts or plans, scored, stored and filtered.

Knows: batches whose answers do not depend on when a run was interrupted, the file that they go to as they
are finished, scores beside them, coherence without a judge, the filter and what it removed.
Does not know: traits' files, directions, layers (`persona` does), or any scorer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from interp_ablate.edits import Plan
from interp_ablate.errors import InterpAblateError, PromptError, RunError
from interp_ablate.exchanges import Exchange, TextScorer
from interp_ablate.lines import Lines
from interp_ablate.listeners import Listener, Silent
from interp_ablate.model import Model
from interp_ablate.prompts import Prompt
from interp_ablate.scores import Evidence, chosen_logprobs, repetition
from interp_ablate.traits import Trait

FORMAT = "interp_ablate.rollouts/1"
THRESHOLD, COHERENT = 50.0, 50.0  # of the trait's score and of coherence, as published
FEWEST = 8  # answers a side below which a difference of means says little
# Perplexities between which coherence falls from 100 to 0, on a logarithmic scale.
FLUENT, BROKEN = 10.0, 1000.0
_SCORED_AT_A_TIME, _READ_AT_A_TIME = 16, 8


@dataclass(frozen=True)
class Sampling:
    """How answers are written; what is sampled depends on every one of these.

    At temperature 0 answers are greedy and the seed means nothing; the published rollouts have temperature 1,
    at which a small model rambles. `batch_size` counts answers that are written together, all with the
    same system prompt.

    Raises:
        InterpAblateError: no tokens, no rows, a negative temperature.
    """

    new_tokens: int = 48
    temperature: float = 0.7
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.new_tokens < 2 or self.batch_size < 1 or not 0 <= self.temperature < math.inf:
            raise InterpAblateError(
                "answers need at least 2 new tokens, a batch of at least 1 and a temperature from 0; got "
                f"{self.new_tokens}, {self.batch_size} and {self.temperature}"
            )


@dataclass(frozen=True)
class Job:
    """One answer to be had: what it is for (plain data), the prompt, and the plan it is written under."""

    key: dict[str, Any]
    prompt: Prompt
    plan: Plan | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a job: its tokens (without the end token), its text, and its scores from 0 to 100.

    A score is None where there is no verdict; an empty answer has none, and coherence 0.
    """

    key: dict[str, Any]
    prompt: Prompt
    tokens: tuple[int, ...]
    text: str
    finished: bool
    score: float | None = None
    coherence: float | None = None

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.prompt, self.text)


def rollout_jobs(trait: Trait, questions: Sequence[str], *, samples: int = 1) -> list[Job]:
    """Every question under every system prompt of both sides, `samples` times.

    Raises:
        InterpAblateError: no questions, or fewer than one sample.
    """
    if not questions or samples < 1:
        raise InterpAblateError(
            f"{len(questions)} questions, {samples} samples of each: at least 1 of both are needed"
        )
    return [
        Job(
            {"side": side, "pair": pair, "question": number, "sample": sample},
            Prompt(question, system),
        )
        for side, systems in (("positive", trait.positive), ("negative", trait.negative))
        for pair, system in enumerate(systems)
        for number, question in enumerate(questions)
        for sample in range(samples)
    ]


# ---- answering -----------------------------------------------------------------------------------


def answer_all(
    model: Model,
    jobs: Sequence[Job],
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    sampling: Sampling | None = None,
    listener: Listener | None = None,
) -> list[Answer]:
    """Answer every job and score the answers; what `path` holds of them already is not done again.

    Answers are stored batch by batch, scores some answers at a time. A batch that was interrupted is
    written again whole, from its own seed, so that the answers are those of an uninterrupted run. Another
    scorer scores the stored answers.

    Args:
        coherence: a scorer of how coherent an answer is; without one `fluency` under the unedited model.

    Raises:
        RunError: `path` holds answers to other jobs, of another model or sampling; see `Lines`.
        InterpAblateError: a scorer that gives something else than numbers from 0 to 100, one an answer.
    """
    listener, sampling = listener or Silent(), sampling or Sampling()
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
        _with_verdicts(store.written[number], scores[number], coherent[number])
        for number in range(len(jobs))
    ]


def _with_verdicts(answer: Answer, score: float | None, coherence: float | None) -> Answer:
    return replace(answer, score=score, coherence=coherence if answer.text.strip() else 0.0)


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[int]]:
    """Numbers of jobs that are answered together: neighbours with one system prompt, which run as one prefix."""
    for _, group in groupby(range(len(jobs)), key=lambda number: jobs[number].prompt.system):
        numbers = list(group)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _generate(
    model: Model, jobs: Sequence[Job], batch: Sequence[int], sampling: Sampling
) -> list[Any]:
    digest = hashlib.sha256(f"{sampling.seed} {batch[0]}".encode()).digest()
    plans = [jobs[number].plan for number in batch]
    under: AbstractContextManager[Any] = (
        model.applied_each(plans) if any(plan is not None for plan in plans) else nullcontext()
    )
    with under:
        return model.generate(
            [jobs[number].prompt for number in batch],
            max_new_tokens=sampling.new_tokens,
            temperature=sampling.temperature,
            seed=int.from_bytes(digest[:4], "big"),
            batch_size=len(batch),
        )


@dataclass(eq=False)
class _Store:
    """The file of one set of jobs: answers by number, and verdicts by scorer."""

    model: Model
    jobs: Sequence[Job]
    path: Path
    sampling: Sampling
    written: dict[int, Answer] = field(default_factory=dict)
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
        self.lines = Lines(
            self.path,
            identity,
            kind="answer file",
            format=FORMAT,
            lost="its answer is written again",
        )

    def read(self, kept: Iterable[dict[str, Any]]) -> None:
        for place, line in enumerate(kept, 2):
            try:
                number = _take(line, self.written, self.verdicts)
                if number is not None:
                    job = self.jobs[number]
                    self.written[number] = replace(
                        self.written[number], key=job.key, prompt=job.prompt
                    )
            except _NO_LINE as error:
                raise self.lines.corrupt(place, repr(error)) from error

    def write(self, batch: Sequence[int], generations: Sequence[Any]) -> None:
        for number, found in zip(batch, generations, strict=True):
            if number in self.written:  # of a batch that was interrupted between its lines
                continue
            job = self.jobs[number]
            answer = Answer(job.key, job.prompt, found.tokens, found.text, found.finished)
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


def verdict_key(what: str, identity: Mapping[str, Any]) -> str:
    """What a verdict's line says it is by: "score" or "coherence", and a hash of the scorer's identity."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return f"{what}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


# What `_take` raises of a line that is neither an answer nor verdicts.
_NO_LINE = (KeyError, IndexError, TypeError, ValueError, PromptError)


def _take(
    line: dict[str, Any],
    written: dict[int, Answer],
    verdicts: dict[tuple[str, int], float | None],
) -> int | None:
    """Put a line's answer, whose number is returned, or its verdicts to the others."""
    if "answer" not in line:
        for number, value in zip(line["scored"], line["values"], strict=True):
            verdicts[line["by"], number] = value
        return None
    number = int(line["answer"])
    asked = Prompt(line["question"], line["system"])
    written[number] = Answer(
        line["key"], asked, tuple(line["tokens"]), line["text"], line["finished"]
    )
    return number


def read_answers(
    path: str | Path, *, scorer: Mapping[str, Any], coherence: Mapping[str, Any]
) -> list[Answer]:
    """The answers of a file with the verdicts of these two scorers (their identities), and of no others.

    A last line that was never finished is left out; nothing is written.

    Raises:
        RunError: no such file, a corrupt line (its number), no verdict of one of the scorers.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunError(
            f"cannot read rollouts from {path}: {error.strerror}. `interp-ablate persona extract` "
            "writes them"
        ) from error
    written: dict[int, Answer] = {}
    verdicts: dict[tuple[str, int], float | None] = {}
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if number > 1:
                _take(line, written, verdicts)
            elif line["format"] != FORMAT:
                raise ValueError(f"the format is {line['format']!r}; accepted is {FORMAT!r}")
        except _NO_LINE as error:
            raise RunError(f"{path}, line {number}: not a line of rollouts ({error!r})") from error
    by = verdict_key("score", scorer), verdict_key("coherence", coherence)
    lacking = set(by) - {name for name, _ in verdicts}
    if lacking and any(answer.text.strip() for answer in written.values()):
        raise RunError(
            f"{path} holds no verdicts of the scorers that are asked for ({', '.join(sorted(lacking))}): "
            "it is of another persona, or its scoring was never finished; extract the persona again"
        )
    return [
        _with_verdicts(answer, *(verdicts.get((name, number)) for name in by))
        for number, answer in sorted(written.items())
    ]


def kept_answers(path: str | Path, made_of: Mapping[str, Any] | None) -> Kept:
    """What made a persona's vectors: its rollouts, judged and filtered as its `made_of` says.

    Raises:
        RunError: as `read_answers`; a persona that does not say what it is made of.
    """
    try:
        told = dict(made_of or {})
        by = {name: told[name] for name in ("scorer", "coherence")}
        limits = {name: told["settings"][name] for name in ("threshold", "coherent")}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the persona of {path} does not say how its rollouts were judged and filtered ({error!r} is "
            "missing): extract it again"
        ) from error
    return keep_expressing(read_answers(path, **by), **limits, fewest=0)


def _scores(
    store: _Store, what: str, scorer: TextScorer, listener: Listener
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


def _fluency(store: _Store, model: Model, listener: Listener) -> dict[int, float | None]:
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


def fluency(model: Model, answers: Sequence[Answer]) -> list[float]:
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
        evidence = Evidence(model, [answers[i].prompt for i in part])
        ends = [answers[i].tokens for i in part]
        for i, end, logprobs in zip(part, ends, evidence.continuation_logprobs(ends)):
            surprise = -float(chosen_logprobs(logprobs, end).mean())
            likely = (math.log(BROKEN) - surprise) / (math.log(BROKEN) - math.log(FLUENT))
            found[i] = 100 * (1 - repetition(end)) * min(1.0, max(0.0, likely))
    return found


# ---- the filter -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """The answers of both sides that passed, and for each side how many came, stayed and went, and why."""

    positive: tuple[Answer, ...]
    negative: tuple[Answer, ...]
    counts: dict[str, dict[str, int]]

    def __str__(self) -> str:
        return "; ".join(f"{side}: {said(counts)}" for side, counts in self.counts.items())


def said(counts: dict[str, int]) -> str:
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


def keep_expressing(
    answers: Sequence[Answer],
    *,
    threshold: float = THRESHOLD,
    coherent: float = COHERENT,
    fewest: int = FEWEST,
) -> Kept:
    """Answers under positive prompts that show the trait, and negative ones that do not, all coherent.

    Kept: score >= threshold under the positive prompts, < threshold under the negative ones, coherence >=
    `coherent` in both. Each answer is judged alone (the published code drops a pair where one of the two
    fails). Answers without a verdict are dropped and counted.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

    Raises:
        RunError: fewer than `fewest` are left on a side, with what was removed and what to do.
    """
    counts: dict[str, dict[str, int]] = {}
    kept: dict[str, list[Answer]] = {"positive": [], "negative": []}
    for side in ("positive", "negative"):
        tally = counts[side] = {"answers": 0, "kept": 0, **dict.fromkeys(_REASONS, 0)}
        for answer in answers:
            if answer.key["side"] != side:
                continue
            why = _why_not(answer, side, threshold, coherent)
            tally["answers"] += 1
            tally[why or "kept"] += 1
            if why is None:
                kept[side].append(answer)
    short = [side for side, found in kept.items() if len(found) < fewest]
    if short:
        raise RunError(_too_few(short[0], counts[short[0]], fewest, threshold))
    return Kept(tuple(kept["positive"]), tuple(kept["negative"]), counts)


def _why_not(answer: Answer, side: str, threshold: float, coherent: float) -> str | None:
    if not answer.text.strip() or not answer.tokens:
        return "empty"
    if answer.score is None or answer.coherence is None:
        return "no_verdict"
    if (answer.score >= threshold) != (side == "positive"):
        return "score"
    return None if answer.coherence >= coherent else "coherence"


def _too_few(side: str, counts: dict[str, int], fewest: int, threshold: float) -> str:
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
        f"too few answers under the {side} system prompts: {said(counts)}; at least {fewest} are needed. "
        f"Give more --questions or --samples; {advice}"
    )
