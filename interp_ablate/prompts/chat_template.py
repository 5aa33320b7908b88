"""Rendering: how a prompt becomes a model's input through a tokenizer's chat template.

Knows: chat templates with and without a system role, raw text, that templated text holds its special
tokens already, and how many template tokens follow the instruction.
Does not know: any model, and which tokenizer it has before it: a tokenizer is whatever behaves like
one of Hugging Face's; transformers is never imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp_ablate.errors import PromptError
from interp_ablate.prompts.prompt import Prompt, quote

# Anything with `chat_template`, `apply_chat_template` and `__call__(text, add_special_tokens=)`.
Tokenizer = Any


@dataclass(frozen=True)
class Rendered:
    """A model's input as text; `templated` says that special tokens are already in it."""

    text: str
    templated: bool


def render(
    prompt: Prompt, tokenizer: Tokenizer, *, template: str | None = None, response: str = ""
) -> Rendered:
    """A prompt as the model's input, ready for the answer; `response` follows verbatim.

    `template` is None (the tokenizer's chat template, or raw text where it has none), "none" (raw
    text), or the Jinja text of a chat template. A template that refuses or drops the system role
    gets the system text at the start of the user turn, before a blank line; raw text likewise.

    Raises:
        PromptError: the template fails, or drops the prompt's text.
    """
    folded = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
    if template == "none" or (template is None and not getattr(tokenizer, "chat_template", None)):
        return Rendered(folded + response, templated=False)
    user = {"role": "user", "content": prompt.text}
    text: str | None = None
    if prompt.system is not None:
        messages = [{"role": "system", "content": prompt.system}, user]
        text, _ = _apply_template(messages, tokenizer, template)
        if text is not None and (prompt.system.strip() not in text or _lost(prompt, text)):
            text = None
    if text is None:
        text, reason = _apply_template([{"role": "user", "content": folded}], tokenizer, template)
        if text is None:
            raise PromptError(
                f"the chat template cannot render {quote(prompt)}: {reason}; mend it, or pass "
                'template="none" for raw text'
            )
    if _lost(prompt, text):
        raise PromptError(
            f"the chat template dropped the prompt {quote(prompt)} and gave {text[:60]!r}: it "
            'must be Jinja text that writes the content of `messages`; "none" stands for raw text'
        )
    return Rendered(text + response, templated=True)


def _lost(prompt: Prompt, text: str) -> bool:
    return prompt.text.strip() not in text


def _apply_template(
    messages: list[dict[str, str]], tokenizer: Tokenizer, template: str | None
) -> tuple[str | None, str]:
    """The rendered text, or None and the template's complaint."""
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        return None, f"{type(error).__name__}: {error}"
    return str(text), ""


def encode(
    prompt: Prompt, tokenizer: Tokenizer, *, template: str | None = None, response: str = ""
) -> list[int]:
    """Token ids of the rendered prompt, with one BOS at most and open at the end.

    Templated text holds its special tokens already and gets no others. Raw text gets those that
    the tokenizer puts in front; what it would append (an EOS, a SEP) is left out, because
    the answer is still to come.

    Raises:
        PromptError: see `render`; or nothing is left after tokenization.
    """
    rendered = render(prompt, tokenizer, template=template, response=response)
    plain = list(tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
    if not plain:
        raise PromptError(f"the tokenizer made no token of {quote(prompt)}: remove the prompt")
    if rendered.templated:
        return plain
    ids = list(tokenizer(rendered.text, add_special_tokens=True)["input_ids"])
    starts = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
    start = next(starts, None)
    if start is not None:
        ids = ids[: start + len(plain)]
    bos = getattr(tokenizer, "bos_token_id", None)
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


# Different in length, first and last characters, so that only the template is common to all.
_INSTRUCTIONS = ("Name a colour", "What is seven times eight?", "Hi!", "Write about rain.", "x = 1")


def suffix_length(
    tokenizer: Tokenizer, *, template: str | None = None, system: str | None = None
) -> int:
    """How many tokens follow the instruction in a rendered prompt, at least 1.

    Positions -1 .. -suffix_length are then the same tokens for every prompt, "after the
    instruction"; in raw text nothing follows, and position -1 is the prompt's own last token.

    Raises:
        PromptError: see `encode`.
    """
    encoded = [encode(Prompt(text, system), tokenizer, template=template) for text in _INSTRUCTIONS]
    length = 0
    while length < min(map(len, encoded)) and len({ids[-1 - length] for ids in encoded}) == 1:
        length += 1
    return max(1, length)
