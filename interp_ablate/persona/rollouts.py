"""Rollouts: answers of a model to many prompts, under system prompts or plans, scored and stored.

Knows: batches that an interruption does not change, the file of answers and verdicts, coherence without a
judge. Does not know: what the answers are for, or any scorer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, PromptError, RunError
from interp_ablate.evaluation.metrics import chosen_logprobs, repetition
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.jobs.bars import Bars, Progress
from interp_ablate.models.model import Model
from interp_ablate.models.rendering import rendering, require_room
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.persona.traits import Trait
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import (
    AT_A_TIME,
    UNANSWERED,
    PromptResponse,
    TextScorer,
    Verdict,
    verdicts_of,
)
from interp_ablate.storage.incoming_files import MAX_LOG, incoming_bytes, parse_json
from interp_ablate.storage.json_shapes import ROLLOUTS, misfit
from interp_ablate.storage.jsonl_log import JsonlLog

logger = logging.getLogger(__name__)

FORMAT = "interp_ablate.rollouts/1"


@dataclass(frozen=True)
class RolloutRequest:
    """One answer to be written."""

    key: dict[str, Any]
    """The purpose of the answer, as plain data: its condition or side, the question's number, ..."""
    prompt: Prompt
    plan: Plan | None = None


@dataclass(frozen=True)
class Rollout:
    """The answer to a request."""

    key: dict[str, Any]
    prompt: Prompt
    tokens: tuple[int, ...]
    """Without the end token."""
    text: str
    finished: bool
    score: float | None = None
    """0 to 100; None where there is no verdict, as for every empty answer."""
    coherence: float | None = None
    """0 to 100; None where there is no verdict, and 0 for an empty answer."""
    thought: str = ""
    lead: tuple[int, ...] = ()
    """The tokens between prompt and answer: those of the thought, with its tags."""

    @property
    def exchange(self) -> PromptResponse:
        return PromptResponse(self.prompt, self.text)


def with_verdicts(answer: Rollout, score: float | None, coherence: float | None) -> Rollout:
    return replace(answer, score=score, coherence=coherence if answer.text.strip() else 0.0)


def verdict_key(what: str, identity: Mapping[str, Any]) -> str:
    """The name of a scorer in the lines of its verdicts: `what` and a hash of the scorer's identity."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return f"{what}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


# Raised by `take_line` for a line that is neither an answer nor verdicts.
BROKEN_LINE = (KeyError, IndexError, TypeError, ValueError, PromptError)


def take_line(
    line: dict[str, Any],
    written: dict[int, Rollout],
    verdicts: dict[tuple[str, int], float | None],
) -> int | None:
    """Add a line's answer, whose number is returned, to `written`, or its verdicts to `verdicts`."""
    if (place := misfit(line, ROLLOUTS)) is not None:
        raise ValueError(f"its {place} is not there, or of another kind")
    if "answer" not in line:
        for number, value in zip(line["scored"], line["values"], strict=True):
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"the score {value} is none from 0 to 100")
            verdicts[line["by"], number] = value
        return None
    written[line["answer"]] = Rollout(
        line["key"], Prompt(line["question"], line["system"]), tuple(line["tokens"]), line["text"], line["finished"],
        thought=line.get("thought", ""), lead=tuple(line.get("lead", ())),
    )  # fmt: skip
    return int(line["answer"])


def read_answers(
    path: str | Path, *, scorer: Mapping[str, Any], coherence: Mapping[str, Any]
) -> list[Rollout]:
    """Read the answers of a file, with the verdicts of the scorers of these identities.

    A last line that was never finished is left out; nothing is written.

    Raises:
        RunError: no such file, a corrupt line (its number), no verdict of one of the scorers.
    """
    path = Path(path)
    if not path.exists():
        raise RunError(f"no rollouts at {path}: `interp-ablate persona extract` writes them")
    lines = incoming_bytes(path, limit=MAX_LOG).split(b"\n")[:-1]
    written: dict[int, Rollout] = {}
    verdicts: dict[tuple[str, int], float | None] = {}
    for number, text in enumerate(lines, 1):
        try:
            line = parse_json(text, finite=True)
            if number > 1:
                take_line(line, written, verdicts)
            elif line["format"] != FORMAT:
                raise ValueError(f"the format is {line['format']!r}; accepted is {FORMAT!r}")
        except BROKEN_LINE as error:
            raise RunError(f"{path}, line {number}: not a line of rollouts ({error!r})") from error
    by = verdict_key("score", scorer), verdict_key("coherence", coherence)
    lacking = set(by) - {name for name, _ in verdicts}
    if lacking and any(answer.text.strip() for answer in written.values()):
        raise RunError(
            f"{path} holds no verdicts of the scorers that are asked for ({', '.join(sorted(lacking))}): "
            "it is of another persona, or its scoring was never finished; extract the persona again"
        )
    return [
        with_verdicts(answer, *(verdicts.get((name, number)) for name in by))
        for number, answer in sorted(written.items())
    ]


# Perplexities between which coherence falls from 100 to 0, on a logarithmic scale.
FLUENT, BROKEN = 10.0, 1000.0
FLUENCY = {"fluency": [FLUENT, BROKEN]}  # what verdicts of `fluency` are kept under
_READ_AT_A_TIME = 8


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


def run_rollouts(
    model: Model,
    requests: Sequence[RolloutRequest],
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    sampling: SamplingConfig | None = None,
    listener: Progress | None = None,
    replace_other: bool = False,
) -> list[Rollout]:
    """Answer every request and score the answers; what `path` holds of them already is not done again.

    Answers are stored batch by batch, scores some answers at a time. A batch that was interrupted is
    written again whole, from its own seed, so that the answers are those of an uninterrupted run. Another
    scorer scores the stored answers.

    Args:
        coherence: a scorer of how coherent an answer is; without one `fluency` under the unedited model.
        replace_other: answers to other requests give way; by default they are refused.

    Raises:
        RunError: `path` holds answers to other requests, of another model or sampling; see `JsonlLog`.
        ModelError: prompts and answers do not fit into the model's positions.
        InterpAblateError: a scorer that gives something else than numbers from 0 to 100, one an answer.
    """
    listener, sampling = listener or Bars(), sampling or SamplingConfig()
    require_room(model, [request.prompt for request in requests], sampling.max_new_tokens)
    store = _Store(model, requests, Path(path), sampling, replace_other)
    with store.log.open() as lines:
        store.read(lines)
        listener.start("answers", len(requests))
        listener.advance(len(store.written))
        for batch in _batches(requests, sampling.batch_size):
            if any(number not in store.written for number in batch):
                store.write(batch, _generate(model, requests, batch, sampling))
                listener.advance(len(batch))
        listener.finish()
        scores = store.verdicts_of("score", scorer.identity, _by_scorer(scorer), listener)
        coherences = (
            store.verdicts_of("coherence", FLUENCY, partial(_fluencies, model), listener)
            if coherence is None
            else store.verdicts_of("coherence", coherence.identity, _by_scorer(coherence), listener)
        )
    return [
        with_verdicts(store.written[number], scores[number], coherences[number])
        for number in range(len(requests))
    ]


def _batches(requests: Sequence[RolloutRequest], size: int) -> Iterator[list[int]]:
    """Numbers of requests that are answered together: neighbours with one system prompt, one shared prefix."""
    for _, group in groupby(range(len(requests)), key=lambda i: requests[i].prompt.system):
        numbers = list(group)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _generate(
    model: Model, requests: Sequence[RolloutRequest], batch: Sequence[int], sampling: SamplingConfig
) -> list[Any]:
    digest = hashlib.sha256(f"{sampling.seed} {batch[0]}".encode()).digest()
    plans = [requests[number].plan for number in batch]
    under: AbstractContextManager[Any] = (
        model.applied_each(plans) if any(plan is not None for plan in plans) else nullcontext()
    )
    with under:
        return model.generate(
            [requests[number].prompt for number in batch],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=int.from_bytes(digest[:4], "big"),
            batch_size=len(batch),
        )


@dataclass(eq=False)
class _Store:
    """The file of one set of requests: answers by number, and verdicts by scorer."""

    model: Model
    requests: Sequence[RolloutRequest]
    path: Path
    sampling: SamplingConfig
    replace_other: bool
    written: dict[int, Rollout] = field(default_factory=dict)
    verdicts: dict[tuple[str, int], float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        asked = [
            [r.key, r.prompt.system, r.prompt.text, r.plan.fingerprint if r.plan else None]
            for r in self.requests
        ]
        outer = self.model.active_plan
        identity = {
            "jobs": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "model": self.model.fingerprint,
            "rendering": rendering(self.model, [r.prompt for r in self.requests]),
            "sampling": asdict(self.sampling),
            "plan": outer.fingerprint if len(outer) else None,
        }
        self.log = JsonlLog(
            self.path, identity, kind="answer file", format=FORMAT, lost="its answer is written again",
            replace=self.replace_other,
        )  # fmt: skip

    def read(self, lines: Iterable[dict[str, Any]]) -> None:
        for place, line in enumerate(lines, 2):
            try:
                number = take_line(line, self.written, self.verdicts)
                if number is not None:
                    key, prompt = self.requests[number].key, self.requests[number].prompt
                    self.written[number] = replace(self.written[number], key=key, prompt=prompt)
            except BROKEN_LINE as error:
                raise self.log.corrupt(place, repr(error)) from error

    def write(self, batch: Sequence[int], generations: Sequence[Any]) -> None:
        for number, new in zip(batch, generations, strict=True):
            if number in self.written:  # the batch was interrupted between its lines
                continue
            key, prompt = self.requests[number].key, self.requests[number].prompt
            answer = Rollout(
                key, prompt, new.tokens, new.text, new.finished, thought=new.thought, lead=new.lead
            )
            own = {"thought": answer.thought, "lead": list(answer.lead)} if answer.lead else {}
            self.log.append(
                {
                    "answer": number, "key": key, "system": prompt.system,
                    "question": prompt.text, "text": answer.text, "tokens": list(answer.tokens),
                    "finished": answer.finished, **own,
                }
            )  # fmt: skip
            self.written[number] = answer

    def verdicts_of(
        self,
        what: str,
        identity: Mapping[str, Any],
        score: Callable[[list[Rollout]], Iterator[tuple[int, Verdict]]],
        listener: Progress,
    ) -> dict[int, float | None]:
        """Verdicts on all answers by their number; those with text and no verdict yet are scored now.

        Verdicts are stored some at a time, as they come.
        """
        by, numbers = verdict_key(what, identity), range(len(self.requests))
        waiting = [
            number
            for number in numbers
            if self.written[number].text.strip() and (by, number) not in self.verdicts
        ]
        if waiting:
            listener.start(what, len(waiting))
        why: Counter[str] = Counter()
        verdicts = score([self.written[number] for number in waiting])
        while part := dict(islice(verdicts, AT_A_TIME)):
            why.update(v.why or "no reason given" for v in part.values() if v.score is None)
            scores = {waiting[i]: v.score for i, v in part.items() if v.why != UNANSWERED}
            values = list(scores.values())
            reasons = {waiting[i]: v.why for i, v in part.items() if v.score is None}
            more = {"why": reasons} if reasons else {}
            self.log.append({"scored": list(scores), "by": by, "values": values, **more})
            self.verdicts.update({(by, number): value for number, value in scores.items()})
            listener.advance(len(part))
        if waiting:
            listener.finish()
        if why:
            counts = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
            logger.warning(
                "%s: no verdict on %d of %d answers: %s", what, why.total(), len(waiting), counts
            )
        return {number: self.verdicts.get((by, number)) for number in numbers}


def _by_scorer(scorer: TextScorer) -> Callable[[list[Rollout]], Iterator[tuple[int, Verdict]]]:
    """The scorer over answers; its values are checked."""

    def score(answers: list[Rollout]) -> Iterator[tuple[int, Verdict]]:
        for number, verdict in verdicts_of(scorer, [answer.exchange for answer in answers]):
            if verdict.score is not None and not 0 <= verdict.score <= 100:
                raise InterpAblateError(
                    f"the scorer {scorer.name!r} gave {verdict.score}: a scorer gives one number from 0 to "
                    "100, or None, an answer"
                )
            yield number, verdict

    return score


def _fluencies(model: Model, answers: list[Rollout]) -> Iterator[tuple[int, Verdict]]:
    for start in range(0, len(answers), AT_A_TIME):
        values = fluency(model, answers[start : start + AT_A_TIME])
        yield from ((number, Verdict(value)) for number, value in enumerate(values, start))


def fluency(model: Model, answers: Sequence[Rollout]) -> list[float]:
    """Estimate coherence from 0 to 100 without a judge: how likely the model finds the answer, less its loops.

    100 * (1 - share of repeated 3-grams) * f, where f falls from 1 at perplexity 10 (or less) to 0 at 1000
    on a logarithmic scale; perplexity of the answer's tokens after its own prompt. It says whether a
    text is fluent, not whether it answers the question; for a steered answer give the unedited model.
    An empty answer has 0.

    Raises:
        InterpAblateError: NaN or infinity in the logits.
    """
    coherences = [0.0] * len(answers)
    with_tokens = [i for i, answer in enumerate(answers) if answer.tokens]
    for start in range(0, len(with_tokens), _READ_AT_A_TIME):
        part = with_tokens[start : start + _READ_AT_A_TIME]
        outputs = ModelOutputs(model, [answers[i].prompt for i in part])
        ends, leads = zip(*((answers[i].tokens, answers[i].lead) for i in part))
        for i, end, logprobs in zip(part, ends, outputs.continuation_logprobs(ends, leads=leads)):
            surprise = -float(chosen_logprobs(logprobs, end).mean())
            likely = (math.log(BROKEN) - surprise) / (math.log(BROKEN) - math.log(FLUENT))
            coherences[i] = 100 * (1 - repetition(end)) * min(1.0, max(0.0, likely))
    return coherences
