"""Rendering: how a prompt becomes a model's input through a tokenizer's chat template.

Knows: chat templates with and without a system role, raw text, that templated text holds its special
tokens already, and how many template tokens follow the instruction.
Does not know: any model, and which tokenizer it has before it: a tokenizer is whatever behaves like
one of Hugging Face's; transformers is never imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp_ablate.errors import PromptError
from interp_ablate.prompts.chat_format import TemplateLike, as_chat_format
from interp_ablate.prompts.messages import THOUGHT_KEYS
from interp_ablate.prompts.prompt import Prompt, quote
from interp_ablate.prompts.template_process import RENDERER, TemplateFailed
from interp_ablate.prompts.thoughts import split_thought
from interp_ablate.settings import suggestion

# Anything with `chat_template`, `apply_chat_template` and `__call__(text, add_special_tokens=)`.
Tokenizer = Any


@dataclass(frozen=True)
class Rendered:
    """A model's input as text; `templated` says that special tokens are already in it."""

    text: str
    templated: bool


def render(
    prompt: Prompt, tokenizer: Tokenizer, *, template: TemplateLike = None, response: str = ""
) -> Rendered:
    """A prompt as the model's input, ready for the answer; `response` follows verbatim.

    `template` is a chat format, or the template of one: None (the tokenizer's chat template, or raw text where it
    has none), "none" (raw text), Jinja text, or the name of one of the tokenizer's. The prompt's own
    variables and response prefix go before the format's. A template that refuses or drops the system role
    gets the system text at the start of the first user turn, before a blank line; raw text likewise.

    Raises:
        PromptError: the template fails, or drops a text; turns before the prompt without a template, or variables.
    """
    chat_format = as_chat_format(template)
    if prompt.template_args:
        args = {**chat_format.template_args, **prompt.template_args}
        chat_format = replace(chat_format, template_args=args)
    own = prompt.response_prefix
    response = (chat_format.response_prefix if own is None else own) + response
    if not has_template(tokenizer, chat_format):
        if chat_format.template_args:
            raise PromptError(_NO_TEMPLATE.format(", ".join(chat_format.template_args)))
        if prompt.history:
            raise PromptError(
                f"the prompt {quote(prompt)} ends a conversation of several turns, which only a chat template "
                "can write, and the model has none: give --template, or prompts of one turn"
            )
        folded = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
        return Rendered(folded + response, templated=False)
    text = render_messages(prompt.messages, tokenizer, template=chat_format)
    return Rendered(text + response, templated=True)


_NO_TEMPLATE = "{} is set for a chat template, and prompts go to the model as raw text: leave it out, or give --template"


def check_format(tokenizer: Tokenizer, template: TemplateLike) -> None:
    """Refuse, before any work, a chat format that does not fit the tokenizer.

    Raises:
        PromptError: see `template_text`; variables that the template does not have.
    """
    args = as_chat_format(template).template_args
    if has_template(tokenizer, template):
        _check_known(args, template_text(tokenizer, template))
    elif args:
        raise PromptError(_NO_TEMPLATE.format(", ".join(args)))


def _check_known(args: Mapping[str, Any], text: str) -> None:
    """Refuse a variable that is nowhere in a template: it would change nothing, without a word."""
    unknown = next((name for name in args if not re.search(rf"\b{re.escape(name)}\b", text)), None)
    if unknown is not None:
        words = sorted(set(re.findall(r"\b[a-z]\w*_\w+\b", text)))
        raise PromptError(
            f"the chat template does not read the variable {unknown!r}{suggestion(unknown, words)}: leave it "
            "out, or name one that the template has"
        )


def has_template(tokenizer: Tokenizer, template: TemplateLike) -> bool:
    """True if prompts go through a chat template, False for raw text."""
    text = as_chat_format(template).template
    return text != "none" and bool(text or getattr(tokenizer, "chat_template", None))


def render_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    template: TemplateLike = None,
    open_ended: bool = True,
) -> str:
    """The text of a chat, open for the assistant's answer or (not `open_ended`) with its last turn ended.

    Templates differ in what they take: tried are the messages as they are, with contents as lists of
    parts, and both with the system text at the start of the first user turn.

    Raises:
        PromptError: none of these gives a text with every message in it.
    """
    reason = ""
    for way in _ways(messages):
        text, failure = _apply_template(way, tokenizer, template, open_ended)
        lost = None if text is None else _lost(messages, text)
        if text is not None and lost is None:
            return text
        reason = reason or failure or f"it drops {lost!r:.80} and gives {str(text)[:60]!r}"
    roles = ", ".join(str(message["role"]) for message in messages)
    last = messages[-1]["content"]
    raise PromptError(
        f"the chat template cannot render {last if len(last) <= 80 else last[:77] + '...'!r} ({roles}): "
        f"{reason}. It must be Jinja text that writes every one of `messages`; mend the template or the "
        'prompt, or pass template="none" for raw text'
    )


def _ways(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same chat in the forms that templates take, the plain one first."""
    plain = [dict(message) for message in messages]
    forms = [plain]
    users = [i for i, message in enumerate(plain) if message["role"] == "user"]
    if plain[0]["role"] == "system" and users:
        system, first = plain[0]["content"], plain[users[0]]
        text = f"{system}\n\n{first['content']}" if system else first["content"]
        forms.append([{**m, "content": text} if m is first else m for m in plain[1:]])
    for form in forms:
        yield form
        yield [{**m, "content": _parts(m["content"])} for m in form]


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _lost(messages: Sequence[Mapping[str, Any]], text: str) -> str | None:
    """The first message's text that is not in the rendered one, or the first tool that is called.

    Templates may drop the thoughts of earlier answers, and no other words. A list of parts written as
    Python shows it is none.
    """
    for message in messages:
        content = str(message["content"])
        words = split_thought(content)[1] if message["role"] == "assistant" else content
        if words.strip() not in text or str(_parts(content)) in text:
            return words
        for call in message.get("tool_calls") or ():
            name = str((call.get("function") or call).get("name", ""))
            if name not in text:
                return name
    return None


def _apply_template(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, template: TemplateLike, open_ended: bool
) -> tuple[str | None, str]:
    """The rendered text, or None and the template's complaint."""
    try:
        return apply_template(messages, tokenizer, template=template, open_ended=open_ended), ""
    except TemplateFailed as failure:
        return None, str(failure)


def apply_template(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    template: TemplateLike = None,
    open_ended: bool = True,
    continued: bool = False,
) -> str:
    """What `tokenizer.apply_chat_template` gives as text, from a process with limits of time and memory.

    Args:
        continued: the last message goes on, and is not ended.

    Raises:
        TemplateFailed: with the template's own complaint.
        PromptError: it did not end; see `check_format`.
    """
    args, text = as_chat_format(template).template_args, template_text(tokenizer, template)
    _check_known(args, text)
    said = [{k: v for k, v in message.items() if v is not None} for message in messages]
    variables = {
        **dict(getattr(tokenizer, "special_tokens_map", {})),
        **args,
        "add_generation_prompt": open_ended,
        "continue_final_message": continued,
    }
    return RENDERER.render(text, said, variables)


def template_text(tokenizer: Tokenizer, template: TemplateLike) -> str:
    """The Jinja text behind a chat format's template: a text of its own, a name of the tokenizer's, or None.

    Raises:
        PromptError: the tokenizer has several by name, and neither `template` nor "default" is one of them.
    """
    own, template = getattr(tokenizer, "chat_template", None), as_chat_format(template).template
    named: Mapping[str, str] = own if isinstance(own, Mapping) else {}
    if template in named or (template is None and "default" in named):
        return named[template or "default"]
    if named and (template is None or "{" not in template):
        what = "none is called default" if template is None else f"none is called {template!r}"
        raise PromptError(
            f"the model has several chat templates, {', '.join(sorted(named))}, and {what}: name one of them, "
            "as in --template NAME (template=NAME), or give a Jinja text"
        )
    return str(template or own)


def encode(
    prompt: Prompt, tokenizer: Tokenizer, *, template: TemplateLike = None, response: str = ""
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


_MARK, _THOUGHT = "interp ablate", "some reasons"


def probed(tokenizer: Tokenizer, template: TemplateLike, answer: Mapping[str, str] | None) -> str:
    """A short chat through the template, with this answer or open for one; "" where there is none."""
    turns: list[dict[str, str]] = [{"role": "user", "content": "Hi"}]
    if answer is not None:
        turns.append({"role": "assistant", **answer})
    if not has_template(tokenizer, template):
        return ""
    try:
        return render_messages(turns, tokenizer, template=template, open_ended=answer is None)
    except PromptError:
        return ""  # a template for prompts alone


def thought_form(tokenizer: Tokenizer, template: TemplateLike) -> tuple[str, str] | None:
    """What a template writes before and after a thought in front of an answer; None where it writes none."""
    written = dict.fromkeys(THOUGHT_KEYS, _THOUGHT)
    text = probed(tokenizer, template, {"content": _MARK, **written})
    before = probed(tokenizer, template, None)
    start, thought, end = text.removeprefix(before).partition(_MARK)[0].partition(_THOUGHT)
    return (start, end) if thought and text.startswith(before) else None


# Different in length, first and last characters, so that only the template is common to all.
_INSTRUCTIONS = ("Name a colour", "What is seven times eight?", "Hi!", "Write about rain.", "x = 1")


def suffix_length(
    tokenizer: Tokenizer, *, template: TemplateLike = None, system: str | None = None
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
