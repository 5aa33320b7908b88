"""Evaluation: what an edit cost, as one table of before and after with intervals.

Knows: perplexity of text in sliding windows, what is asked of answers (scorers, KL, repetition, length),
tasks' items, paired differences and their intervals, what is measured already in a folder.
Does not know: how a forward pass, a KL or a scorer works, what a task is (`harness`), how it is drawn.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.evaluation.harness import Tasks, TaskScore
from interp_ablate.evaluation.harness_adapter import longest
from interp_ablate.evaluation.measures import EvaluationConfig
from interp_ablate.evaluation.metrics import continuation_scores, kl_divergence, repetition
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.perplexity import Corpus, WindowLoss, corpus_losses, same_vocabulary
from interp_ablate.evaluation.results import (
    FORMAT,
    ComparisonRow,
    Evaluation,
    Unit,
    paired_row,
    ratio_row,
)
from interp_ablate.models.generation import Generation
from interp_ablate.models.model import Model
from interp_ablate.prompts.chat_template import encode
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse, TextScorer
from interp_ablate.stats.intervals import Estimate, mean_estimate
from interp_ablate.storage.jsonl_log import JsonlLog

logger = logging.getLogger(__name__)


def evaluate(
    before: Model,
    after: Model | None = None,
    *,
    plan: Plan | None = None,
    measures: EvaluationConfig | None = None,
    out: str | Path | None = None,
    tell: Callable[[str], None] = logger.info,
) -> Evaluation:
    """Measure two models, or one without and with a plan, on the same text, prompts and items.

    Args:
        after: default: `before`, under the plan.
        plan: applied to `after` while it is measured, as hooks.
        out: folder; parts that it holds already (of the same models and settings) are not measured again.
        tell: told the name of each part as it begins.

    Raises:
        RunError: nothing to compare; a folder of other models or settings; what text, prompts, scorers
            and tasks raise.
        InterpAblateError: NaN or infinity in the logits.
    """
    if after is None and plan is None:
        raise RunError("nothing to compare: give a second model, or a plan")
    asked = (measures or EvaluationConfig()).limited()
    tasks = Tasks(asked.task_folders) if asked.tasks else None
    keys = {name: tasks.identity(name) for name in asked.tasks} if tasks else {}
    sides = (_Side("before", before, None), _Side("after", after or before, plan))
    identity = {**{side.which: side.identity for side in sides}, **asked.identity}
    with _opened(out, identity, tell) as parts:
        work = _Evaluator(sides, asked, parts)
        if asked.text:
            work.text(asked.text)
        for name, prompts in asked.prompts.items():
            work.answers(name, prompts)
        for name, key in keys.items():
            assert tasks is not None
            work.task(tasks, name, key)
    scorers = [scorer.identity for scorer in asked.scorers]
    found = work.evaluation({**identity, "tasks": keys, "scorers": scorers})
    if out is not None:
        found.save(out)
    return found


@dataclass(frozen=True)
class _Side:
    """A model, and the plan it is under."""

    which: str
    model: Model
    plan: Plan | None

    @property
    def name(self) -> str:
        return self.model.source.name + (" + plan" if self.plan is not None else "")

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "name": self.model.source.name,
            "weights": self.model.fingerprint,
            "plan": self.plan and self.plan.fingerprint,
            "template": self.model.template,
        }


class _Parts:
    """What is measured, by name and by what else it depends on; kept on disk where there is a folder."""

    def __init__(
        self, lines: JsonlLog | None, kept: list[dict[str, Any]], tell: Callable[[str], None]
    ) -> None:
        self.lines, self.kept, self.tell = lines, kept, tell

    def of(self, name: str, measure: Callable[[], Any], key: Any = None) -> Any:
        """The part's value as plain data: what is kept of it, else what `measure` returns."""
        key = json.loads(json.dumps(key))
        for line in self.kept:
            if line.get("part") == name and line.get("key") == key:
                return line["value"]
        self.tell(name)
        line = json.loads(json.dumps({"part": name, "key": key, "value": measure()}))
        if self.lines is not None:
            self.lines.append(line)
        self.kept.append(line)
        return line["value"]


@contextmanager
def _opened(
    out: str | Path | None, identity: dict[str, Any], tell: Callable[[str], None]
) -> Iterator[_Parts]:
    if out is None:
        yield _Parts(None, [], tell)
        return
    lines = JsonlLog(
        Path(out) / "measured.jsonl",
        identity,
        kind="record of what is measured",
        format=FORMAT,
        lost="its part is measured again",
    )
    with lines.open() as kept:
        yield _Parts(lines, kept, tell)


class _Evaluator:
    """Rows, items and notes, as the parts are measured."""

    def __init__(self, sides: tuple[_Side, _Side], asked: EvaluationConfig, parts: _Parts) -> None:
        self.sides, self.asked, self.parts = sides, asked, parts
        self.rows: list[ComparisonRow] = []
        self.notes: list[str] = []
        self.items: list[dict[str, Any]] = []
        self.texts: list[dict[str, Any]] = []
        self.same_tokens = same_vocabulary(*(side.model for side in sides))
        if not self.same_tokens:
            self.notes.append(
                "The two tokenizers differ: no KL; numbers a token stand side by side without a difference."
            )

    def evaluation(self, settings: dict[str, Any]) -> Evaluation:
        return Evaluation(
            before=self.sides[0].name,
            after=self.sides[1].name,
            rows=tuple(self.rows),
            notes=tuple(self.notes),
            settings=settings,
            items=tuple(self.items),
            answers=tuple(self.texts),
        )

    def _pairs(
        self, measure: str, on: str, names: Sequence[str], before: Sequence, after: Sequence
    ) -> None:
        for name, b, a in zip(names, before, after):
            self.items.append({"measure": measure, "on": on, "item": name, "before": b, "after": a})

    # ---- text

    def text(self, text: Corpus) -> None:
        """Perplexity and bits a byte."""
        limits = [longest(side.model) for side in self.sides]
        context = min(self.asked.context, *limits)
        stride = self.asked.stride
        if context < self.asked.context:  # a model takes no more
            stride = min(stride, max(1, context // 2))

        def losses(side: _Side) -> list[WindowLoss]:
            found = self.parts.of(
                f"text, {side.which}",
                lambda: [
                    asdict(loss)
                    for loss in corpus_losses(
                        side.model, text, plan=side.plan, context=context, stride=stride
                    )
                ],
                [context, stride],
            )
            return [WindowLoss(**each) for each in found]

        before, after = (losses(side) for side in self.sides)
        # one vocabulary can still cut a text in two ways: another BOS, other merges
        cut = [[(loss.document, loss.tokens) for loss in side] for side in (before, after)]
        same = self.same_tokens and cut[0] == cut[1]
        if not same:
            before, after = _whole_documents(before, after)
        known = all(loss.bytes is not None for loss in (*before, *after))
        for row in _text_rows(text.name, before, after, comparable=same, known=known):
            self.rows.append(row)
        names = [f"document {loss.document + 1}" for loss in before]
        self._pairs(
            "nats a token", text.name, names, *([x.nats / x.tokens for x in side] for side in (before, after))
        )  # fmt: skip
        starts = "; ".join(dict.fromkeys(_start(side.model) for side in self.sides))
        other = " The two count other tokens: no difference a token."
        self.notes.append(
            f"Text: {len(text.documents)} documents, {sum(x.tokens for x in before)} tokens counted, in "
            f"windows of at most {context} tokens, {stride} apart, each token once. {starts}. Intervals over "
            + ("windows." if same else "documents.")
            + (other if self.same_tokens and not same else "")
            + ("" if known else " No bits a byte: a tokenizer does not say which text a token is.")
        )

    # ---- answers

    def answers(self, name: str, prompts: tuple[Prompt, ...]) -> None:
        """Scores of both models' answers, their repetition and length, and the KL along the first's."""
        evidence = [self._answered(side, name, prompts) for side in self.sides]
        named = [prompt.text for prompt in prompts]

        def add(measure: str, unit: Unit, values: Sequence[Sequence], comparable: bool) -> None:
            self.rows.append(paired_row(measure, name, unit, *values, comparable=comparable))
            self._pairs(measure, name, named, *values)

        for scorer in self.asked.scorers:
            scored = [
                self._scored(scorer, side, name, e, prompts)
                for side, e in zip(self.sides, evidence)
            ]
            if scorer.name.startswith("expressions:"):
                shares = [[None if x is None else x / 100 for x in each] for each in scored]
                add(
                    f"{scorer.name.removeprefix('expressions:')} expressions", "share", shares, True
                )
            else:
                add(scorer.name, "score", scored, True)
        if self.same_tokens:
            self._divergence(name, evidence, named)
        tokens = [[g.tokens for g in e.generations] for e in evidence]
        repeated = [[repetition(t) for t in each] for each in tokens]
        lengths = [[float(len(t)) for t in each] for each in tokens]
        add("repeated 3-grams", "share", repeated, self.same_tokens)
        add("length of the answer", "tokens", lengths, self.same_tokens)
        for prompt, *texts in zip(prompts, *(e.texts for e in evidence)):
            told = {"prompts": name, "system": prompt.system, "prompt": prompt.text}
            self.texts.append({**told, "before": texts[0], "after": texts[1]})
        self._note_answers(name, evidence)

    def _note_answers(self, name: str, evidence: Sequence[ModelOutputs]) -> None:
        note = (
            f"Answers: greedy, at most {self.asked.max_new_tokens} tokens, each model's own chat template. KL over "
            "answers: teacher-forced along the first model's own, of the second from the first, in nats."
        )
        if note not in self.notes:
            self.notes.append(note)
        if evidence[0].rows != evidence[1].rows and self.same_tokens:
            self.notes.append(f"{name}: the models' chat templates render the prompts differently.")

    def _answered(self, side: _Side, name: str, prompts: tuple[Prompt, ...]) -> ModelOutputs:
        evidence = ModelOutputs(
            side.model, prompts, side.plan, max_new_tokens=self.asked.max_new_tokens
        )

        def measure() -> list[Any]:
            evidence.first_logprobs  # noqa: B018  (what is generated from NaN looks like text)
            return [[list(g.tokens), g.text, g.finished] for g in evidence.generations]

        found = self.parts.of(f"answers to {name}, {side.which}", measure)
        evidence.generations = [Generation(tuple(t), text, done) for t, text, done in found]
        return evidence

    def _scored(
        self,
        scorer: TextScorer,
        side: _Side,
        name: str,
        evidence: ModelOutputs,
        prompts: Sequence[Prompt],
    ) -> list[float | None]:
        exchanges = [PromptResponse(prompt, text) for prompt, text in zip(prompts, evidence.texts)]
        return self.parts.of(
            f"{scorer.name} of the answers to {name}, {side.which}",
            lambda: scorer(exchanges),
            scorer.identity,
        )

    def _divergence(
        self, name: str, evidence: Sequence[ModelOutputs], named: Sequence[str]
    ) -> None:
        before, after = evidence

        def measure() -> dict[str, list[float | None]]:
            first = kl_divergence(before.first_logprobs, after.first_logprobs).tolist()
            along = continuation_scores(after, before)["kl_continuation"].tolist()
            # an empty answer has no token at which the two could differ
            kept = [kl if g.tokens else None for kl, g in zip(along, before.generations)]
            return {"first": first, "along": kept}

        found = self.parts.of(f"KL on {name}", measure)
        for measured, key in (
            ("KL, first token", "first"),
            ("KL a token over answers", "along"),
        ):
            values = found[key]
            kept = [value for value in values if value is not None]
            estimate = mean_estimate(kept) if kept else None
            missing = len(values) - len(kept)
            self.rows.append(
                ComparisonRow(measured, name, "nats", len(kept), None, estimate, None, missing)
            )
            self._pairs(measured, name, named, [None] * len(values), values)

    # ---- tasks

    def task(self, tasks: Tasks, name: str, key: dict[str, Any]) -> None:
        """Every metric of a task."""

        def scores(side: _Side) -> list[TaskScore]:
            found = self.parts.of(
                f"task {name}, {side.which}",
                lambda: [
                    score.to_dict()
                    for score in tasks.run(
                        name, side.model, side.plan, limit=self.asked.limit, chat=self.asked.chat
                    )
                ],
                key,
            )
            return [TaskScore.from_dict(each) for each in found]

        for before, after in zip(*(scores(side) for side in self.sides)):
            kind = "" if before.filter == "none" else f" ({before.filter})"
            self.rows.append(_task_row(before, after, f"{before.metric}{kind}"))
            if before.items and after.items:
                numbered = [str(i) for i in range(len(before.items))]
                self._pairs(before.metric + kind, before.task, numbered, before.items, after.items)
            elif before.stderr is not None:
                self.notes.append(
                    f"{before.task}, {before.metric}: intervals from the standard errors that lm_eval "
                    "gives; the difference's as if the two were independent."
                )


def _task_row(before: TaskScore, after: TaskScore, measure: str) -> ComparisonRow:
    if before.items is not None and after.items is not None:
        rate = {*before.items, *after.items} <= {0.0, 1.0}
        unit: Unit = "share" if rate else "metric"
        return paired_row(measure, before.task, unit, before.items, after.items)

    def estimate(value: float, *errors: float | None) -> Estimate:
        known = [error for error in errors if error is not None]
        if len(known) < len(errors):
            return Estimate(value)
        width = 1.96 * math.hypot(*known)
        return Estimate(value, value - width, value + width)

    return ComparisonRow(
        measure,
        before.task,
        "metric",
        0,
        estimate(before.value, before.stderr),
        estimate(after.value, after.stderr),
        estimate(after.value - before.value, before.stderr, after.stderr),
    )


def _text_rows(
    name: str,
    before: Sequence[WindowLoss],
    after: Sequence[WindowLoss],
    *,
    comparable: bool,
    known: bool,
) -> Iterator[ComparisonRow]:
    """Perplexity a token; bits a byte where the bytes are known."""

    def column(of: str) -> list[np.ndarray]:
        return [np.array([getattr(x, of) for x in side], float) for side in (before, after)]

    nats, tokens = column("nats"), column("tokens")
    sums = [(n, t) for n, t in zip(nats, tokens)]
    yield ratio_row(
        "perplexity a token", name, "perplexity", sums[0], sums[1], comparable=comparable
    )
    if known:
        sums = [(n / math.log(2), size) for n, size in zip(nats, column("bytes"))]
        yield ratio_row("bits a byte", name, "bits", sums[0], sums[1])


def _whole_documents(*sides: Sequence[WindowLoss]) -> list[list[WindowLoss]]:
    """Sums by document, of the documents that both tokenizers have tokens to count in."""
    found = []
    shared = set.intersection(*({loss.document for loss in losses} for losses in sides))
    for losses in sides:
        whole = []
        for number in sorted(shared):
            parts = [loss for loss in losses if loss.document == number]
            sizes = [part.bytes for part in parts]
            size = None if None in sizes else sum(x for x in sizes if x is not None)
            tokens, nats = sum(part.tokens for part in parts), math.fsum(p.nats for p in parts)
            whole.append(WindowLoss(number, tokens, nats, size))
        found.append(whole)
    return found


def _start(model: Model) -> str:
    """What a document begins with."""
    row = encode(Prompt("x"), model.tokenizer, template="none")
    plain = model.tokenizer("x", add_special_tokens=False)["input_ids"]
    tokens = model.tokenizer.convert_ids_to_tokens(row[: len(row) - len(plain)])
    if not tokens:
        return "The tokenizer puts no BOS in front of text: a document's first token is not counted"
    return f"A document begins with {' '.join(tokens)}"
