"""Rows of tokens: prompts and their responses as a model reads them, and what each token of a row is.

Knows: responses given or written by the model, which tokens the template wrote, the text that each token adds. Does not
know: activations, or directions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.messages import is_chat, message_of
from interp_ablate.prompts.prompt import Prompt, PromptLike, as_prompt, as_prompts
from interp_ablate.settings import MAX_NEW_TOKENS

TokenPart = Literal["template", "prompt", "thought", "response"]


@dataclass(frozen=True)
class Token:
    """One token of a model's input or answer."""

    id: int
    text: str
    """What it adds to the text of the tokens before it: "" until a character of several tokens is whole."""
    part: TokenPart
    """Written by the chat template, in a message of the prompt, in a thought before the response, or in the response."""


# ---- prompts and responses -------------------------------------------------------------------


def flattened(
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
) -> tuple[list[PromptLike], Bool[Tensor, " prompt"] | None]:
    """Prompts as one list, and for a contrast set True for its positive ones, which come first."""
    if isinstance(prompts, ContrastSet):
        both: list[PromptLike] = [*prompts.positive, *prompts.negative]
        return both, torch.arange(len(both)) < len(prompts.positive)
    return as_prompts(prompts), None


def answers_apart(
    prompts: Sequence[PromptLike], responses: Sequence[str] | None
) -> tuple[list[PromptLike], Sequence[str] | None]:
    """Chats that end with the assistant's message as the chats before it, and these messages as their responses.

    Raises:
        InterpAblateError: there are other responses; only some of the prompts end with an answer.
    """
    chats: list[list[Any]] = [list(prompt) if is_chat(prompt) else [] for prompt in prompts]  # type: ignore[arg-type]
    last = [message_of(chat[-1], "the chat's last message") if chat else None for chat in chats]
    answers = [each.content for each in last if each is not None and each.role == "assistant"]
    if not answers:
        return list(prompts), responses
    if responses is not None:
        raise InterpAblateError(
            "the chat ends with an answer, and a response is given besides: leave one out"
        )
    if len(answers) < len(last):
        raise InterpAblateError(
            f"{len(answers)} of {len(last)} prompts are chats that end with an answer: give all of them one, or none"
        )
    return [chat[:-1] for chat in chats], answers


def after_prompts(
    model: Model,
    prompts: Sequence[PromptLike],
    rows: Sequence[Sequence[int]],
    responses: Sequence[str] | None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> tuple[list[list[int]], list[list[int]]]:
    """What is between each prompt and its response (a thought), and the response: given, or the model's own.

    Raises:
        InterpAblateError: another number of responses than of prompts.
        ModelError: responses, which are text, for a model without a tokenizer.
    """
    if responses is None:
        written = model.generate(prompts, max_new_tokens=max_new_tokens)
        return [list(g.lead) for g in written], [list(g.tokens) for g in written]
    if len(responses) != len(rows):
        raise InterpAblateError(f"{len(responses)} responses for {len(rows)} prompts")
    if model.tokenizer is None:
        raise ModelError("responses are text: the model was wrapped without a tokenizer")
    ends = [
        list(model.tokenizer(response, add_special_tokens=False)["input_ids"])
        for response in responses
    ]
    return [model.thinking.before(row) if end else [] for row, end in zip(rows, ends)], ends


def tokens_of(
    model: Model, prompt: PromptLike, start: list[int], lead: list[int], end: list[int]
) -> tuple[Token, ...]:
    """The tokens of a prompt, of a thought and of a response, as one row with their texts and parts."""
    row = [*start, *lead, *end]
    pieces = token_pieces(row, decoder(model))
    parts: list[TokenPart] = [
        *prompt_parts(model, prompt, start, pieces[: len(start)]),
        *["thought" for _ in lead],  # type: ignore[list-item]
        *["response" for _ in end],  # type: ignore[list-item]
    ]
    return tuple(map(Token, row, pieces, parts))


# ---- the text of tokens ----------------------------------------------------------------------


def decoder(model: Model) -> Callable[[Sequence[int]], str]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return lambda ids: "".join(f"[{i}]" for i in ids)
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def token_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to that of the tokens before it; together they are the whole text.

    A token that ends inside a character adds nothing; the token that completes it adds the character.
    A token is decoded after the last whole piece, so that a tokenizer which strips the first space of a
    text keeps those inside.
    """
    pieces, start, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[start:shown]), decode(ids[start:end])
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        pieces.append(text[len(before) :] if whole else "")
        if whole:
            start, shown = shown, end
    return pieces


def prompt_parts(
    model: Model, prompt: PromptLike, row: Sequence[int], pieces: Sequence[str]
) -> list[TokenPart]:
    """For each token of a prompt, whether the template wrote it.

    The prompt is rendered again with a mark in place of every text; what stands around the marks is the
    template's. A prompt of token ids has no texts: its special tokens count as the template's.
    """
    spans = None
    if isinstance(prompt, (str, Prompt)) or is_chat(prompt):
        skeleton = decoder(model)(model.encode(_marked(as_prompt(prompt))))
        spans = _between(re.split(_MARK, skeleton), "".join(pieces))
    if spans is None:
        special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
        return ["template" if i in special else "prompt" for i in row]
    parts: list[TokenPart] = []
    begin = 0
    for piece in pieces:
        end = begin + max(len(piece), 1)  # without text of its own: it belongs to what comes next
        inside = any(begin < last and end > first for first, last in spans)
        parts.append("prompt" if inside else "template")
        begin += len(piece)
    return parts


_MARK = r"Qz\d+zQ"


def _marked(prompt: Prompt) -> Prompt:
    """The prompt with a mark in place of every text that is not blank."""
    count = itertools.count()

    def mark(content: str) -> str:
        return f"Qz{next(count)}zQ" if content.strip() else content

    return Prompt(
        mark(prompt.text),
        None if prompt.system is None else mark(prompt.system),
        tuple(replace(message, content=mark(message.content)) for message in prompt.history),
    )


def _between(literals: list[str], text: str) -> list[tuple[int, int]] | None:
    """Where in the text the parts between the literals are; None where it does not consist of them."""
    first, *middle, last = literals if len(literals) > 1 else ("", "")
    if len(literals) < 2 or not (text.startswith(first) and text.endswith(last)):
        return None
    spans, begin, stop = [], len(first), len(text) - len(last)
    for literal in middle:
        at = text.find(literal, begin, stop)
        if at < 0:
            return None
        spans.append((begin, at))
        begin = at + len(literal)
    return [*spans, (begin, stop)] if begin <= stop else None
