"""Comparison of two models, or of one without and with a plan: a table of before and after with intervals.

Knows: the parts of an evaluation, and which of them a folder holds already. Does not know: how a part is
measured or drawn.
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

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.evaluation.harness import Tasks, TaskScore
from interp_ablate.evaluation.harness_adapter import longest
from interp_ablate.evaluation.measures import EvaluationConfig
from interp_ablate.evaluation.metrics import answer_metrics, divergences
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.perplexity import (
    Corpus,
    WindowLoss,
    corpus_losses,
    document_start,
    perplexity_rows,
    same_vocabulary,
    whole_documents,
)
from interp_ablate.evaluation.results import (
    FORMAT,
    ComparisonRow,
    Evaluation,
    Unit,
    paired_row,
)
from interp_ablate.models.float32 import in_float32
from interp_ablate.models.model import Model
from interp_ablate.models.rendering import rendering
from interp_ablate.models.thinking import Generation
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.stats.intervals import AT_LEAST_0, Estimate, mean_estimate
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)


def evaluate(
    before: Model,
    after: Model | None = None,
    *,
    plan: Plan | None = None,
    measures: EvaluationConfig | None = None,
    out: str | Path | None = None,
    on_part: Callable[[str], None] = logger.info,
) -> Evaluation:
    """Measure two models, or one without and with a plan, on the same text, prompts and items.

    Args:
        after: default: `before`, under the plan.
        plan: applied to `after` while it is measured, as hooks.
        out: folder; parts that it holds already (of the same models and settings) are not measured again.
        on_part: called with the name of each part as it begins.

    Raises:
        RunError: nothing to compare; a folder of other models or settings; what text, prompts, scorers
            and tasks raise.
        InterpAblateError: NaN or infinity in the logits.
    """
    if after is None and plan is None:
        raise RunError("nothing to compare: give a second model, or a plan")
    config = (measures or EvaluationConfig()).limited()
    tasks = Tasks(config.task_folders) if config.tasks else None
    keys = {name: tasks.identity(name) for name in config.tasks} if tasks else {}
    sides = (_Side("before", before, None), _Side("after", after or before, plan))
    identity = {**{side.which: side.identity for side in sides}, **config.identity}
    with _opened(out, identity, on_part) as parts:
        evaluator = _Evaluator(sides, config, parts)
        if config.text:
            evaluator.text(config.text)
        for name, prompts in config.prompts.items():
            evaluator.answers(name, prompts)
        for name, key in keys.items():
            assert tasks is not None
            evaluator.task(tasks, name, key)
    scorers = [scorer.identity for scorer in config.scorers]
    names = {side.which: {"name": side.model.source.name, **side.identity} for side in sides}
    evaluation = evaluator.evaluation({**identity, **names, "tasks": keys, "scorers": scorers})
    if out is not None:
        evaluation.save(out)
    return evaluation


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
            "weights": self.model.fingerprint,
            "plan": self.plan and self.plan.fingerprint,
            "rendering": rendering(self.model),
        }


class _MeasuredParts:
    """Values of parts by name and by what else they depend on; kept on disk where there is a folder."""

    def __init__(
        self, log: JsonlLog | None, lines: list[dict[str, Any]], on_part: Callable[[str], None]
    ) -> None:
        self.log, self.lines, self.on_part = log, lines, on_part

    def of(self, name: str, measure: Callable[[], Any], key: Any = None) -> Any:
        """The part's value as plain data: the stored one, else what `measure` returns."""
        key = json.loads(json.dumps(key))
        for line in self.lines:
            if line.get("part") == name and line.get("key") == key:
                return line["value"]
        self.on_part(name)
        line = json.loads(json_text({"part": name, "key": key, "value": measure()}))
        if self.log is not None:
            self.log.append(line)
        self.lines.append(line)
        return line["value"]


@contextmanager
def _opened(
    out: str | Path | None, identity: dict[str, Any], on_part: Callable[[str], None]
) -> Iterator[_MeasuredParts]:
    if out is None:
        yield _MeasuredParts(None, [], on_part)
        return
    log = JsonlLog(
        Path(out) / "measured.jsonl",
        identity,
        kind="record of what is measured",
        format=FORMAT,
        lost="its part is measured again",
    )
    with log.open() as lines:
        yield _MeasuredParts(log, lines, on_part)


class _Evaluator:
    """Measures the parts of an evaluation, and collects their rows, items and notes."""

    def __init__(
        self, sides: tuple[_Side, _Side], config: EvaluationConfig, parts: _MeasuredParts
    ) -> None:
        self.sides, self.config, self.parts = sides, config, parts
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

    def _add_items(
        self, measure: str, on: str, names: Sequence[str], before: Sequence, after: Sequence
    ) -> None:
        for name, b, a in zip(names, before, after):
            self.items.append({"measure": measure, "on": on, "item": name, "before": b, "after": a})

    def text(self, corpus: Corpus) -> None:
        """Perplexity and bits a byte of a corpus."""
        context = min(self.config.context, *(longest(side.model) for side in self.sides))
        stride = self.config.stride
        if context < self.config.context:  # a model takes no more
            stride = min(stride, max(1, context // 2))
        before, after = (self._losses(corpus, side, context, stride) for side in self.sides)
        # one vocabulary can still cut a text in two ways: another BOS, other merges
        cut = [[(loss.document, loss.tokens) for loss in side] for side in (before, after)]
        same = self.same_tokens and cut[0] == cut[1]
        if not same:
            before, after = whole_documents(before, after)
        with_bytes = all(loss.bytes is not None for loss in (*before, *after))
        self.rows += perplexity_rows(
            corpus.name, before, after, comparable=same, with_bytes=with_bytes
        )
        names = [f"document {loss.document + 1}" for loss in before]
        values = ([loss.nats / loss.tokens for loss in side] for side in (before, after))
        self._add_items("nats a token", corpus.name, names, *values)
        starts = "; ".join(dict.fromkeys(document_start(side.model) for side in self.sides))
        other = " The two count other tokens: no difference a token."
        self.notes.append(
            f"Text: {len(corpus.documents)} documents, {sum(x.tokens for x in before)} tokens counted, in "
            f"windows of at most {context} tokens, {stride} apart, each token once. {starts}. Intervals over "
            + ("windows." if same else "documents.")
            + (other if self.same_tokens and not same else "")
            + (
                ""
                if with_bytes
                else " No bits a byte: a tokenizer does not say which text a token is."
            )
        )

    def _losses(self, corpus: Corpus, side: _Side, context: int, stride: int) -> list[WindowLoss]:
        def measure() -> list[dict[str, Any]]:
            losses = corpus_losses(
                side.model, corpus, plan=side.plan, context=context, stride=stride
            )
            return [asdict(loss) for loss in losses]

        lines = self.parts.of(f"text, {side.which}", measure, [context, stride])
        return [WindowLoss(**line) for line in lines]

    def answers(self, name: str, prompts: tuple[Prompt, ...]) -> None:
        """Scores of both models' answers, their repetition and length, and the KL along the first's."""
        before, after = (self._answered(side, name, prompts) for side in self.sides)
        both, texts = (before, after), [prompt.text for prompt in prompts]

        def add(measure: str, unit: Unit, values: Sequence[Sequence], comparable: bool) -> None:
            self.rows.append(paired_row(measure, name, unit, *values, comparable=comparable))
            self._add_items(measure, name, texts, *values)

        for scorer in self.config.scorers:
            scores = [self._scores(scorer, *one, name) for one in zip(self.sides, both)]
            listed = scorer.name.removeprefix("expressions:")
            if listed != scorer.name:
                shares = [[None if x is None else x / 100 for x in side] for side in scores]
                add(f"{listed} expressions", "share", shares, True)
            else:
                add(scorer.name, "score", scores, True)
        if self.same_tokens:
            kls = self.parts.of(f"KL divergences on {name}", lambda: _divergences(after, before))
            for measure, metric in _DIVERGENCES.items():
                self.rows.append(_divergence_row(measure, name, kls[metric]))
                self._add_items(measure, name, texts, [None] * len(prompts), kls[metric])
        metrics = [answer_metrics(outputs) for outputs in both]
        for measure, metric, unit in _ANSWER_METRICS:
            add(measure, unit, [values[metric] for values in metrics], self.same_tokens)
        if any("no_answer" in values for values in metrics):
            none = [values.get("no_answer", [0.0] * len(prompts)) for values in metrics]
            add("thoughts without an answer", "share", none, True)
        for prompt, *pair in zip(prompts, before.texts, after.texts):
            asked = {"prompts": name, "system": prompt.system, "prompt": prompt.text}
            self.texts.append({**asked, "before": pair[0], "after": pair[1]})
        self._note_answers(name, before, after)

    def _note_answers(self, name: str, before: ModelOutputs, after: ModelOutputs) -> None:
        note = (
            f"Answers: greedy, at most {self.config.max_new_tokens} tokens, each model's own chat template. KL over "
            "answers: teacher-forced along the first model's own, of the second from the first, in nats."
        )
        if note not in self.notes:
            self.notes.append(note)
        if before.rows != after.rows and self.same_tokens:
            self.notes.append(f"{name}: the models' chat templates render the prompts differently.")

    def _answered(self, side: _Side, name: str, prompts: tuple[Prompt, ...]) -> ModelOutputs:
        outputs = ModelOutputs(
            side.model, prompts, side.plan, max_new_tokens=self.config.max_new_tokens
        )

        def measure() -> list[Any]:
            outputs.first_logprobs  # noqa: B018  (what is generated from NaN looks like text)
            return [asdict(generation) for generation in outputs.generations]

        answers = self.parts.of(f"answers to {name}, {side.which}", measure)
        outputs.generations = [
            Generation(**{**each, "tokens": tuple(each["tokens"]), "lead": tuple(each["lead"])})
            for each in answers
        ]
        return outputs

    def _scores(
        self, scorer: TextScorer, side: _Side, outputs: ModelOutputs, name: str
    ) -> list[float | None]:
        return self.parts.of(
            f"{scorer.name} of the answers to {name}, {side.which}",
            lambda: scorer(outputs.exchanges),
            scorer.identity,
        )

    def task(self, tasks: Tasks, name: str, key: dict[str, Any]) -> None:
        """Every metric of a task."""
        for before, after in zip(*(self._task_scores(tasks, name, s, key) for s in self.sides)):
            kind = "" if before.filter == "none" else f" ({before.filter})"
            self.rows.append(_task_row(before, after, f"{before.metric}{kind}"))
            if before.items and after.items:
                numbers = [str(i) for i in range(len(before.items))]
                self._add_items(
                    before.metric + kind, before.task, numbers, before.items, after.items
                )
            elif before.stderr is not None:
                self.notes.append(
                    f"{before.task}, {before.metric}: intervals from the standard errors that lm_eval "
                    "gives; the difference's as if the two were independent."
                )

    def _task_scores(
        self, tasks: Tasks, name: str, side: _Side, key: dict[str, Any]
    ) -> list[TaskScore]:
        def measure() -> list[dict[str, Any]]:
            limit, chat = self.config.limit, self.config.chat
            scores = tasks.run(name, side.model, side.plan, limit=limit, chat=chat)
            return [score.to_dict() for score in scores]

        lines = self.parts.of(f"task {name}, {side.which}", measure, key)
        return [TaskScore.from_dict(line) for line in lines]


def _divergences(after: ModelOutputs, before: ModelOutputs) -> dict[str, list[float | None]]:
    """`divergences` with both models' weights in float32 (`in_float32`), along the answers that are there."""
    with in_float32(before.model), in_float32(after.model):
        return divergences(after.answered(), before.answered())


# measures of a row by their metric
_DIVERGENCES = {"KL, first token": "kl_first_token", "KL a token over answers": "kl_continuation"}
_ANSWER_METRICS: tuple[tuple[str, str, Unit], ...] = (
    ("repeated 3-grams", "repetition", "share"),
    ("length of the answer", "length", "tokens"),
)


def _divergence_row(measure: str, on: str, values: Sequence[float | None]) -> ComparisonRow:
    counted = [value for value in values if value is not None]
    mean = mean_estimate(counted, bounds=AT_LEAST_0) if counted else None
    missing = len(values) - len(counted)
    return ComparisonRow(measure, on, "nats", len(counted), None, mean, None, missing)


def _task_row(before: TaskScore, after: TaskScore, measure: str) -> ComparisonRow:
    if before.items is not None and after.items is not None:
        rate = {*before.items, *after.items} <= {0.0, 1.0}
        unit: Unit = "share" if rate else "metric"
        return paired_row(measure, before.task, unit, before.items, after.items)

    def estimate(value: float, *errors: float | None) -> Estimate:
        if None in errors or not any(errors):  # no spread seen is no certainty
            return Estimate(value)
        width = 1.96 * math.hypot(*(error for error in errors if error is not None))
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
