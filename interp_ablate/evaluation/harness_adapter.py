"""A `Model` under a plan as a language model of lm-evaluation-harness.

Knows: how the library's requests are answered by our forward passes. Does not know: tasks and scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from interp_ablate.edits.conditional import refuse_conditions
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.evaluation.metrics import chosen_logprobs
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.model import Model
from interp_ablate.prompts.chat_template import apply_template

# Whole distributions of every answer token are held for so many requests at a time.
REQUESTS = 32

ContextContinuation = tuple[Sequence[int], Sequence[int]]


def longest(model: Model) -> int:
    """The number of tokens that the model takes at once."""
    limits = [getattr(model.hf_config, "max_position_embeddings", None)]
    if model.backend == "hooked" or limits == [None]:
        limits.append(model.tl.cfg.n_ctx)
    return min(limit for limit in limits if limit)


def loglikelihoods(
    model: Model, pairs: Sequence[ContextContinuation], *, plan: Plan | None = None
) -> list[tuple[float, bool]]:
    """The log-probability (nats) of each pair's continuation after its context, and whether it is the greedy one.

    Contexts that do not fit are cut at their start. Continuations of one token after the same context share
    a forward pass. Positions of the continuation count as generated, for plans that tell.

    Raises:
        RunError: a continuation longer than the model's context.
        InterpAblateError: NaN or infinity in the logits.
    """
    most = longest(model)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for number, (context, end) in enumerate(pairs):
        if len(end) > most:
            raise RunError(f"a continuation of {len(end)} tokens: {model.source.name} takes {most}")
        fitting = tuple(context)[-(most + 1 - len(end)) :]
        groups.setdefault((fitting, tuple(end[:-1])), []).append(number)
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    order = sorted(groups, key=lambda key: -len(key[0]) - len(key[1]))
    for start in range(0, len(order), REQUESTS):
        keys = order[start : start + REQUESTS]
        ends = [list(pairs[groups[key][0]][1]) for key in keys]
        outputs = ModelOutputs(model, [list(key[0]) for key in keys], plan)
        for key, logprobs in zip(keys, outputs.continuation_logprobs(ends, batch_size=REQUESTS)):
            greedy = logprobs.argmax(-1).tolist()
            for number in groups[key]:
                end = list(pairs[number][1])
                total = float(chosen_logprobs(logprobs, end).sum())
                scores[number] = (total, greedy == end)
    return scores


def _generations(
    model: Model, plan: Plan | None, requests: Sequence[tuple[str, dict[str, Any]]], encode: Any
) -> list[str]:
    """Texts up to the first stop string, for (context, options) as the library asks for them."""
    texts = [""] * len(requests)
    by_options: dict[tuple[int, float], list[int]] = {}
    for number, (_, options) in enumerate(requests):
        new = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
        heat = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
        by_options.setdefault((new, heat), []).append(number)
    for (new, heat), numbers in by_options.items():
        room = max(1, longest(model) - new)
        rows = [encode(requests[number][0])[-room:] for number in numbers]
        for start in range(0, len(rows), REQUESTS):  # what is generated from NaN looks like text
            ModelOutputs(model, rows[start : start + REQUESTS], plan).first_logprobs  # noqa: B018
        with model.applied(plan):
            written = model.generate(rows, max_new_tokens=new, temperature=heat)
        for number, generation in zip(numbers, written):
            until = requests[number][1].get("until") or []
            text = generation.text
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            texts[number] = text
    return texts


def _encoder(model: Model) -> Callable[..., list[int]]:
    """Text as the library's own Hugging Face wrapper encodes it: with a BOS where the tokenizer adds one."""
    tokenizer = model.tokenizer
    prefix = tokenizer.decode(_prefix(model))

    def encode(text: str, add_special_tokens: bool | None = None) -> list[int]:
        special = not text.startswith(prefix) if add_special_tokens is None else add_special_tokens
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    return encode


def _prefix(model: Model) -> int:
    tokenizer = model.tokenizer
    if tokenizer is None or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None):
        raise RunError(
            f"{model.source.name} has no tokenizer with a BOS or EOS token: tasks need one"
        )
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def as_harness_lm(model: Model, plan: Plan | None) -> Any:
    """A `Model` under a plan as an LM of the library: its public base class, no Hugging Face wrapper.

    (The wrapper calls the checkpoint's own forward pass: there is none below a HookedTransformer, and it
    cannot tell which positions a plan's `prompt` and `generated` are.)
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    encode, prefix = _encoder(model), _prefix(model)

    class Answering(TemplateLM):
        tokenizer = model.tokenizer
        tokenizer_name = model.source.name
        eot_token_id = model.tokenizer.eos_token_id
        prefix_token_id = prefix
        max_length = longest(model)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return encode(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, end) for _, context, end in requests]
            return loglikelihoods(model, pairs, plan=plan)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            refuse_conditions(plan, "the likelihood of whole texts", model.plans.conditions)
            totals = []
            for request in requests:
                tokens = encode(request.args[0], False)
                windows = get_rolling_token_windows(tokens, prefix, self.max_length, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(math.fsum(x for x, _ in loglikelihoods(model, pairs, plan=plan)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return _generations(model, plan, [request.args for request in requests], encode)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            text = apply_template(
                chat_history,
                model.tokenizer,
                template=model.chat_format,
                open_ended=add_generation_prompt,
                continued=not add_generation_prompt,
            )
            return text + model.chat_format.response_prefix if add_generation_prompt else text

    return Answering()
