"""One side of an evaluation: a model under a plan, in memory while it is measured, and what was measured of it.

Knows: each part's measure, and which of them a folder holds already. Does not know: the other side, but for its
answers, or how two sides become rows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.harness import Tasks, TaskScore
from interp_ablate.evaluation.harness_adapter import longest
from interp_ablate.evaluation.measures import EvaluationConfig
from interp_ablate.evaluation.metrics import divergences
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.perplexity import WindowLoss, corpus_losses
from interp_ablate.models.float32 import in_float32
from interp_ablate.models.model import Model, model_of
from interp_ablate.models.rendering import rendering, require_room
from interp_ablate.models.thinking import Generation
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.storage.json_shapes import NONE, NUMBER, misfit
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.strict_json import as_read_back

# Shapes of what parts have measured: of a window of text, of an answer, of a number a prompt.
_LOSS: Any = {"document": int, "tokens": int, "nats": NUMBER, "bytes": (NONE, int)}
_ANSWER: Any = {
    **dict.fromkeys(("text", "thought"), str), "tokens": [int], "lead": [int], "finished": bool, "answer": (NONE, str),
}  # fmt: skip
_VALUE: Any = (NONE, bool, *NUMBER)


class MeasuredParts:
    """Values of parts by name and by what else they depend on; kept on disk where there is a folder."""

    def __init__(
        self, log: JsonlLog | None, lines: list[dict[str, Any]], on_part: Callable[[str], None]
    ) -> None:
        self.log, self.lines, self.on_part = log, lines, on_part

    def stored(self, name: str, key: Any = None) -> dict[str, Any] | None:
        """The part's line, if it has been measured."""
        key = as_read_back(key)
        for line in self.lines:
            if line.get("part") == name and line.get("key") == key:
                return line
        return None

    def of(
        self, name: str, measure: Callable[[], Any], key: Any = None, *, shape: Any = object
    ) -> Any:
        """The part's value as plain data: the stored one, else what `measure` returns.

        Raises:
            RunError: a stored one of another shape (see `json_shapes`), with its line.
        """
        line = self.stored(name, key)
        place = misfit(line["value"], shape, "value") if line is not None else None
        if line is not None and place is not None and self.log is not None:
            number = self.lines.index(line) + 2
            raise self.log.corrupt(number, f"its {place} is not there, or of another kind")
        if line is None:
            self.on_part(name)
            line = as_read_back({"part": name, "key": key, "value": measure()})
            if self.log is not None:
                self.log.append(line)
            self.lines.append(line)
        return line["value"]


class Side:
    """A model, the plan it is under, and its numbers. What a function loads is in memory while it is measured.

    Raises:
        ModelError, PlanError: prompts with their answers, or the plan, do not fit the model.
    """

    def __init__(
        self,
        which: str,
        model: Model | Callable[[], Model],
        plan: Plan | None,
        config: EvaluationConfig,
    ) -> None:
        self.which, self.plan, self.config = which, plan, config
        self._load = None if isinstance(model, Model) else model
        self._model: Model | None = model_of(model)
        model = self.model
        for prompts in config.prompts.values():
            require_room(model, prompts, config.max_new_tokens)
        if plan is not None:
            with model.applied(plan):
                model.logits([[0]])
        self.source, self.tokenizer = model.source.name, model.tokenizer
        self.d_vocab, self.longest = model.tl.cfg.d_vocab, longest(model)
        self.identity = {
            "weights": model.fingerprint,
            "plan": plan and plan.fingerprint,
            "rendering": rendering(model),
        }
        self.losses: list[WindowLoss] = []
        self.outputs: dict[str, ModelOutputs] = {}
        self.scores: dict[tuple[str, str], list[float | None]] = {}
        self.task_scores: dict[str, list[TaskScore]] = {}
        self.kls: dict[str, dict[str, list[float | None]]] = {}
        """The KL from another side's answers, by list of prompts and metric."""

    @property
    def name(self) -> str:
        return self.source + (" + plan" if self.plan is not None else "")

    @property
    def model(self) -> Model:
        """The model, loaded again if it was released."""
        if self._model is None:
            assert self._load is not None
            self._model = self._load()
        return self._model

    def release(self) -> None:
        """Give the memory back, where the model can be loaded again."""
        if self._load is not None:
            self._model = None
            gc.collect()  # hook points hold each other

    def has_vocabulary_of(self, other: Side) -> bool:
        """Whether a token is the same text on both sides."""
        if self.tokenizer is other.tokenizer:
            return True
        if None in (self.tokenizer, other.tokenizer) or self.d_vocab != other.d_vocab:
            return False
        return self.tokenizer.get_vocab() == other.tokenizer.get_vocab()

    # ---- parts ---------------------------------------------------------------------------------------

    def measure_text(self, parts: MeasuredParts, context: int, stride: int) -> None:
        """The losses of the text's windows."""
        corpus = self.config.text
        assert corpus is not None

        def measure() -> list[dict[str, Any]]:
            losses = corpus_losses(
                self.model, corpus, plan=self.plan, context=context, stride=stride
            )
            return [asdict(loss) for loss in losses]

        lines = parts.of(f"text, {self.which}", measure, [context, stride], shape=[_LOSS])
        self.losses = [WindowLoss(**line) for line in lines]

    def measure_answers(
        self, parts: MeasuredParts, *, compared: bool, reference: Side | None = None
    ) -> None:
        """Answers to every list of prompts and their scores, and with a reference the KL along its answers.

        Args:
            compared: this side's answers are such a reference.
        """
        for name, prompts in self.config.prompts.items():
            outputs = self._answered(parts, name, prompts)
            for scorer in self.config.scorers:
                part = f"{scorer.name} of the answers to {name}, {self.which}"
                scores = parts.of(
                    part,
                    lambda s=scorer, o=outputs: s(o.exchanges),  # type: ignore[misc]
                    scorer.identity,
                    shape=[_VALUE] * len(prompts),
                )
                self.scores[scorer.name, name] = scores
            if reference is not None:
                before = reference.outputs[name]
                self.kls[name] = parts.of(
                    _kl_part(name),
                    lambda a=outputs, b=before: _divergences(a, b),  # type: ignore[misc]
                    shape={"*": [_VALUE] * len(prompts)},
                )
            self.outputs[name] = outputs
            if self._load is not None:
                needed = compared and parts.stored(_kl_part(name)) is None
                with in_float32(self.model.tl) if needed else nullcontext():
                    self.outputs[name] = outputs.answered().without_model(logprobs=needed)

    def _answered(
        self, parts: MeasuredParts, name: str, prompts: tuple[Prompt, ...]
    ) -> ModelOutputs:
        outputs = ModelOutputs(
            self.model, prompts, self.plan, max_new_tokens=self.config.max_new_tokens
        )

        def measure() -> list[Any]:
            outputs.first_logprobs  # noqa: B018  (what is generated from NaN looks like text)
            return [asdict(generation) for generation in outputs.generations]

        answers = parts.of(
            f"answers to {name}, {self.which}", measure, shape=[_ANSWER] * len(prompts)
        )
        outputs.generations = [
            Generation(**{**each, "tokens": tuple(each["tokens"]), "lead": tuple(each["lead"])})
            for each in answers
        ]
        return outputs

    def measure_tasks(self, parts: MeasuredParts, tasks: Tasks, keys: Mapping[str, Any]) -> None:
        """Every metric of every task."""
        for name, key in keys.items():

            def measure(name: str = name) -> list[dict[str, Any]]:
                limit, chat = self.config.limit, self.config.chat
                scores = tasks.run(name, self.model, self.plan, limit=limit, chat=chat)
                return [score.to_dict() for score in scores]

            lines = parts.of(f"task {name}, {self.which}", measure, key)
            self.task_scores[name] = [TaskScore.from_dict(line) for line in lines]


def _kl_part(name: str) -> str:
    return f"KL divergences on {name}"


def _divergences(after: ModelOutputs, before: ModelOutputs) -> dict[str, list[float | None]]:
    """`divergences` with both models' weights in float32 (`in_float32`), along the answers that are there."""
    if not before.has_model:
        with in_float32(after.model.tl):
            return divergences(after.answered(), before)
    with in_float32(before.model.tl), in_float32(after.model.tl):
        return divergences(after.answered(), before.answered())
