"""Comparison of two models, or of one without and with a plan: a table of before and after with intervals.

Knows: the rows that two measured sides make. Does not know: how a part is measured or drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.evaluation.harness import Tasks, TaskScore
from interp_ablate.evaluation.measures import EvaluationConfig
from interp_ablate.evaluation.metrics import answer_metrics
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.perplexity import (
    Corpus,
    document_start,
    perplexity_rows,
    whole_documents,
)
from interp_ablate.evaluation.results import (
    FORMAT,
    ComparisonRow,
    Evaluation,
    Unit,
    paired_row,
)
from interp_ablate.evaluation.side import MeasuredParts, Side
from interp_ablate.models.model import Model, check_model, model_of
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.stats.intervals import AT_LEAST_0, Estimate, mean_estimate
from interp_ablate.storage.jsonl_log import JsonlLog

logger = logging.getLogger(__name__)
PART = {"part": str, "key": object, "value": object}  # a line of what is measured


def evaluate(
    before: Model | Callable[[], Model],
    after: Model | Callable[[], Model] | None = None,
    *,
    plan: Plan | None = None,
    measures: EvaluationConfig | None = None,
    out: str | Path | None = None,
    on_part: Callable[[str], None] = logger.info,
) -> Evaluation:
    """Measure two models, or one without and with a plan, on the same text, prompts and items.

    Models can be given as functions that load them: one whole model is then in memory at a time, and of the first
    are kept its log-probabilities along its answers (float32, on the CPU: prompts x tokens x vocabulary).

    Args:
        after: default: `before`, under the plan.
        plan: applied to `after` while it is measured, as hooks.
        out: folder; parts that it holds already (of the same models and settings) are not measured again.
        on_part: called with the name of each part as it begins.

    Raises:
        RunError: nothing to compare; a folder of other models or settings; what text, prompts, scorers
            and tasks raise.
        PlanError: a plan that does not fit `after`.
        ModelError: prompts and answers do not fit into a model's positions.
        InterpAblateError: NaN or infinity in the logits.
    """
    for given in (before, *([] if after is None else [after])):
        check_model(given, loaders=True)
    if after is None and plan is None:
        raise RunError("nothing to compare: give a second model, or a plan")
    config = (measures or EvaluationConfig()).limited()
    tasks = Tasks(config.task_folders) if config.tasks else None
    keys = {name: tasks.identity(name) for name in config.tasks} if tasks else {}
    before = before if after is not None else model_of(before)
    # the second is looked at first, and loaded again when the first has been measured
    second = Side("after", before if after is None else after, plan, config)
    second.release()
    sides = (Side("before", before, None, config), second)
    identity = {**{side.which: side.identity for side in sides}, **config.identity}
    evaluator = _Evaluator(sides, config)
    with _opened(out, identity, on_part) as parts:
        for side in sides:
            evaluator.measure(side, parts, tasks, keys)
            side.release()
    evaluator.tabulate(keys)
    scorers = [scorer.identity for scorer in config.scorers]
    names = {side.which: {"name": side.source, **side.identity} for side in sides}
    evaluation = evaluator.evaluation({**identity, **names, "tasks": keys, "scorers": scorers})
    if out is not None:
        evaluation.save(out)
    return evaluation


@contextmanager
def _opened(
    out: str | Path | None, identity: dict[str, Any], on_part: Callable[[str], None]
) -> Iterator[MeasuredParts]:
    if out is None:
        yield MeasuredParts(None, [], on_part)
        return
    log = JsonlLog(
        Path(out) / "measured.jsonl",
        identity,
        kind="record of what is measured",
        format=FORMAT,
        lost="its part is measured again",
        shape=PART,
    )
    with log.open() as lines:
        yield MeasuredParts(log, lines, on_part)


class _Evaluator:
    """Has both sides measured, and collects the rows, items and notes of what they have."""

    def __init__(self, sides: tuple[Side, Side], config: EvaluationConfig) -> None:
        self.sides, self.config = sides, config
        self.rows: list[ComparisonRow] = []
        self.notes: list[str] = []
        self.items: list[dict[str, Any]] = []
        self.texts: list[dict[str, Any]] = []
        self.same_tokens = sides[0].has_vocabulary_of(sides[1])
        self.context = min(config.context, *(side.longest for side in sides))
        self.stride = config.stride
        if self.context < config.context:  # a model takes no more
            self.stride = min(config.stride, max(1, self.context // 2))

    def measure(
        self, side: Side, parts: MeasuredParts, tasks: Tasks | None, keys: dict[str, Any]
    ) -> None:
        """Every part of one side; the second's KL is from the first's answers."""
        first = side is self.sides[0]
        if self.config.text:
            side.measure_text(parts, self.context, self.stride)
        side.measure_answers(
            parts,
            compared=first and self.same_tokens,
            reference=self.sides[0] if self.same_tokens and not first else None,
        )
        if tasks is not None:
            side.measure_tasks(parts, tasks, keys)

    def tabulate(self, tasks: Iterable[str]) -> None:
        """Rows, items and notes of what both sides have."""
        if not self.same_tokens:
            self.notes.append(
                "The two tokenizers differ: no KL; numbers a token stand side by side without a difference."
            )
        if self.config.text:
            self.text(self.config.text)
        for name, prompts in self.config.prompts.items():
            self.answers(name, prompts)
        for name in tasks:
            self.task(name)

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
        before, after = (side.losses for side in self.sides)
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
        starts = "; ".join(dict.fromkeys(document_start(side.tokenizer) for side in self.sides))
        other = " The two count other tokens: no difference a token."
        self.notes.append(
            f"Text: {len(corpus.documents)} documents, {sum(x.tokens for x in before)} tokens counted, in "
            f"windows of at most {self.context} tokens, {self.stride} apart, each token once. {starts}. Intervals over "
            + ("windows." if same else "documents.")
            + (other if self.same_tokens and not same else "")
            + (
                ""
                if with_bytes
                else " No bits a byte: a tokenizer does not say which text a token is."
            )
        )

    def answers(self, name: str, prompts: tuple[Prompt, ...]) -> None:
        """Scores of both models' answers, their repetition and length, and the KL along the first's."""
        before, after = (side.outputs[name] for side in self.sides)
        both, texts = (before, after), [prompt.text for prompt in prompts]

        def add(measure: str, unit: Unit, values: Sequence[Sequence], comparable: bool) -> None:
            self.rows.append(paired_row(measure, name, unit, *values, comparable=comparable))
            self._add_items(measure, name, texts, *values)

        for scorer in self.config.scorers:
            scores = [side.scores[scorer.name, name] for side in self.sides]
            listed = scorer.name.removeprefix("expressions:")
            if listed != scorer.name:
                shares = [[None if x is None else x / 100 for x in side] for side in scores]
                add(f"{listed} expressions", "share", shares, True)
            else:
                add(scorer.name, "score", scores, True)
        if self.same_tokens:
            kls = self.sides[1].kls[name]
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

    def task(self, name: str) -> None:
        """Every metric of a task."""
        for before, after in zip(*(side.task_scores[name] for side in self.sides)):
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
