"""A model's outputs on prompts, under a plan or without one: first-token probabilities and answers.

Knows: how outputs are computed once and shared. Does not know: what they are scored by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.display import html_table, shortened
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, NotFiniteError
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.residual_cache import ResidualCache
from interp_ablate.models.thinking import Generation
from interp_ablate.prompts.messages import is_chat
from interp_ablate.prompts.prompt import Prompt, PromptLike, as_prompt, as_prompts, text_of_prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.settings import MAX_NEW_TOKENS


class ModelOutputs:
    """The outputs of a model on some prompts under a plan (None: unedited), computed when first read.

    They are the outputs of the model as it is when this is made: inside another plan, under that one too. First
    read under other plans, weights or hooks they are refused; what has been computed stays as it is.
    `generations` can also be filled from outside: from another batch, or from disk.
    """

    def __init__(
        self,
        model: Model,
        prompts: PromptLike | Sequence[PromptLike],
        plan: Plan | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int | None = None,
    ) -> None:
        check_model(model)
        self.model, self.prompts, self.plan = model, tuple(as_prompts(prompts)), plan
        self.rows = model.encode_all(self.prompts)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        # outputs of the same prompts without the plan, whose residual cache serves here
        self._unedited: ModelOutputs | None = None
        self._state = model.state
        self._first_logprobs: Float[Tensor, "prompt d_vocab"] | None = None
        self._generations: list[Generation] | None = None
        self._answer_logprobs: list[Float[Tensor, "pos d_vocab"]] | None = None

    def __repr__(self) -> str:
        plan = "unedited" if self.plan is None else repr(self.plan)
        ready = "with answers" if self.has_generations else "nothing generated yet"
        return f"ModelOutputs({len(self.prompts)} prompts, {shortened(plan, 160)}, {ready})"

    def _repr_html_(self) -> str:
        """The answers that are there; nothing is computed for a look."""
        answers = (
            [g.text for g in self._generations] if self._generations else [""] * len(self.rows)
        )
        rows = list(zip(map(text_of_prompt, self.prompts), answers))[:20]
        return html_table(("prompt", "answer"), rows, caption=repr(self))

    def with_plan(self, plan: Plan | None) -> ModelOutputs:
        """The same prompts under a plan.

        Its first-token scores run from the first block on that the plan's edits reach; the stream that
        enters there is cached in one pass of the unedited model, when it is first needed.
        """
        outputs = self.fresh(plan)
        outputs._unedited = self
        return outputs

    def fresh(self, plan: Plan | None) -> ModelOutputs:
        """The same prompts under a plan, with nothing computed and no cache of the stream."""
        return self._of(range(len(self.rows)), plan)

    def answered(self) -> ModelOutputs:
        """Outputs of the model as it is now (in float32, say) along the answers that are there."""
        outputs = self.fresh(self.plan)
        outputs.generations = self.generations
        return outputs

    def _of(self, index: Sequence[int], plan: Plan | None) -> ModelOutputs:
        rows = [self.rows[i] for i in index]
        outputs = ModelOutputs(
            self.model, rows, plan, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        outputs.prompts = tuple(self.prompts[i] for i in index)
        return outputs

    @cached_property
    def residual_cache(self) -> ResidualCache:
        """The unedited model's residual stream on these prompts (`Model.cache_residuals`), whatever the plan.

        Raises:
            PlanError: a plan is applied to the model now.
        """
        return self.model.cache_residuals(self.rows)

    def _usable_cache(self) -> ResidualCache | None:
        """The unedited outputs' residual cache, if passes under this plan can start late."""
        if self._unedited is None or self.plan is None:
            return None
        # an outer plan edits the model: its residual stream is not the unedited one
        if not self.model.site_map.first_block(self.plan.sites) or self.model.plans.is_edited:
            return None
        return self._unedited.residual_cache

    def head(self, n: int) -> ModelOutputs:
        """The outputs on the first `n` prompts; what is computed already is kept."""
        return self.subset(range(min(n, len(self.rows))))

    def subset(self, index: Sequence[int]) -> ModelOutputs:
        """The outputs on some of the prompts, by their indices; what is computed already is kept."""
        part = self._of(index, self.plan)
        part._unedited, part._state = self._unedited, self._state
        if self._first_logprobs is not None:
            part._first_logprobs = self._first_logprobs[list(index)]
        if self._generations is not None:
            part._generations = [self._generations[i] for i in index]
        return part

    def require_state(self) -> None:
        """Refuse to compute outputs of another model than these were made of.

        Raises:
            PlanError: other plans are applied than when this was made.
            InterpAblateError: weights were edited since, or hooks came or went.
        """
        self.model.plans.require(self._state[0], "these ModelOutputs were made")
        if self.model.state != self._state:
            raise InterpAblateError(
                "weights of the model, or hooks in it, have changed since these ModelOutputs were made: read "
                "them before, or make new ones of the model as it is now"
            )

    def _under_plan(self) -> Any:
        self.require_state()
        return self.model.applied(self.plan)

    @property
    def first_logprobs(self) -> Float[Tensor, "prompt d_vocab"]:
        """Log-probabilities of the first token after the prompt, float32; see `require_answer_next`.

        Raises:
            InterpAblateError: NaN or infinity among the logits.
        """
        if self._first_logprobs is None:
            cache = self._usable_cache()
            with self._under_plan():
                logits = self.model.logits(
                    self.rows, batch_size=self.batch_size, residual_cache=cache
                )
            logprobs = logits[:, -1].float().log_softmax(-1)
            self._first_logprobs = _finite(logprobs, "first-token logits")
        return self._first_logprobs

    def require_answer_next(self) -> None:
        """Refuse first-token scores where what follows a prompt is no answer.

        Raises:
            InterpAblateError: the chat format opens a thought; with the options that close it.
        """
        if self.has_model and any(map(self.model.thinking.is_opened, self.rows)):
            why = self.model.thinking.no_answer_next("the chat format opens a thought")
            raise InterpAblateError(why)

    @property
    def generations(self) -> list[Generation]:
        """Greedy answers of at most `max_new_tokens` tokens."""
        if self._generations is None:
            with self._under_plan():
                self._generations = self.model.generate(
                    self.rows, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
                )
        return self._generations

    @generations.setter
    def generations(self, answers: list[Generation]) -> None:
        self._generations = answers

    @property
    def has_generations(self) -> bool:
        """True once the answers have been generated or filled in."""
        return self._generations is not None

    @property
    def exchanges(self) -> list[PromptResponse]:
        """The prompts with their answers, as text scorers take them.

        Raises:
            InterpAblateError: a prompt that was given as token ids.
        """
        exchanges = []
        for each, text in zip(self.prompts, self.texts, strict=True):
            if not (isinstance(each, (str, Prompt)) or is_chat(each)):
                raise InterpAblateError(
                    "prompts of token ids have no text to score: give texts, Prompts or chats"
                )
            exchanges.append(PromptResponse(as_prompt(each), text))
        return exchanges

    @property
    def texts(self) -> list[str]:
        """The answers' texts."""
        return [generation.text for generation in self.generations]

    def continuation_logprobs(
        self,
        continuations: Sequence[Sequence[int]],
        *,
        leads: Sequence[Sequence[int]] | None = None,
        batch_size: int = 8,
    ) -> list[Float[Tensor, "pos d_vocab"]]:
        """Log-probabilities at every token of given continuations (teacher-forced), a tensor a prompt.

        Args:
            continuations: token ids, one sequence a prompt.
            leads: tokens between each prompt and its continuation, such as a thought.

        Raises:
            InterpAblateError: NaN or infinity among the logits.
        """
        # the last token is not fed: what follows it is not asked for
        before = leads or [()] * len(self.rows)
        rows = [
            [*row, *lead, *end[:-1]] for row, lead, end in zip(self.rows, before, continuations)
        ]
        logprobs: list[Tensor] = [torch.empty(0)] * len(rows)
        with self._under_plan():
            for batch, logits, _ in self.model.stream(
                rows,
                keep=max(1, *(len(end) for end in continuations)),
                prompt_lengths=[len(row) for row in self.rows],
                batch_size=batch_size,
            ):
                assert logits is not None
                for i, row in zip(batch.index, logits):
                    at_continuation = row[len(row) - len(continuations[i]) :]
                    logprobs[i] = _finite(
                        at_continuation.float().log_softmax(-1), "continuation logits"
                    )
        return logprobs

    def answer_logprobs(self, index: Sequence[int]) -> list[Float[Tensor, "pos d_vocab"]]:
        """Log-probabilities along its own answers to some of the prompts, by their indices."""
        if self._answer_logprobs is not None:
            return [self._answer_logprobs[i] for i in index]
        answers = [self.generations[i] for i in index]
        return self.subset(index).continuation_logprobs(
            [answer.tokens for answer in answers], leads=[answer.lead for answer in answers]
        )

    @property
    def has_model(self) -> bool:
        """False for outputs that were kept `without_model`."""
        return "model" in vars(self)

    def without_model(self, *, logprobs: bool = True) -> ModelOutputs:
        """The same outputs, all computed now and kept on the CPU: to compare others with when this model is gone.

        Args:
            logprobs: keep log-probabilities, of the first token and along the answers; False: the answers alone.
        """
        kept = copy.copy(self)
        kept._generations, kept._unedited = self.generations, None
        kept.__dict__.pop("residual_cache", None)
        del kept.model
        if logprobs:
            kept._first_logprobs = self.first_logprobs.cpu()
            kept._answer_logprobs = [torch.empty(0)] * len(self.rows)
            for part in answered_parts(self.generations):
                for i, along in zip(part, self.answer_logprobs(part)):
                    kept._answer_logprobs[i] = along.cpu()
        return kept


def answered_parts(generations: Sequence[Generation]) -> Iterator[list[int]]:
    """Indices of answers with tokens, a few at a time: every token's whole distribution is held."""
    for start in range(0, len(generations), 8):
        part = range(start, min(start + 8, len(generations)))
        if answered := [i for i in part if generations[i].tokens]:
            yield answered


def _finite(values: Tensor, what: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise NotFiniteError(
            f"{what} hold NaN or infinity: the plan broke the model, or its dtype did"
        )
    return values


def generate_outputs_together(
    outputs: Sequence[ModelOutputs], *, settled: Callable[[str], bool] | None = None
) -> None:
    """Generate the answers of several outputs of one model in one batch, each under its own plan.

    Decoding is bound by memory: many rows cost little more than few. Answers that are there stay.
    With `settled` those are cut whose text so far it is true of (`Model.generate`): for scores that know enough then.

    Raises:
        InterpAblateError: outputs of two models, or with different `max_new_tokens`.
    """
    waiting = [each for each in outputs if not each.has_generations]
    if len({(each.max_new_tokens, id(each.model)) for each in waiting}) > 1:
        raise InterpAblateError(
            "what is generated together has one model and one number of new tokens"
        )
    if not waiting:
        return
    for each in waiting:
        each.require_state()
    rows = [row for each in waiting for row in each.rows]
    plans = [each.plan for each in waiting for _ in each.rows]
    model, first = waiting[0].model, waiting[0]
    with model.applied_each(plans):
        answers = iter(
            model.generate(
                rows,
                max_new_tokens=first.max_new_tokens,
                batch_size=first.batch_size,
                settled=settled,
            )
        )
    for each in waiting:
        each.generations = [next(answers) for _ in each.rows]
