"""Chat formats: a chat template, the values of its variables, and text that every answer starts with.

Knows: the settings and their text form. Does not know: tokenizers, or how a template is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from interp_ablate.errors import PromptError
from interp_ablate.prompts.thoughts import Tags
from interp_ablate.settings import MAX_THOUGHT_TOKENS
from interp_ablate.storage.incoming_files import parse_json

ReadPart = Literal["answer", "thought"]
_PYTHONS = {"true": True, "false": False, "none": None, "null": None}
_OURS = (
    *("messages", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "conversations"),
)
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class ChatFormat:
    """How prompts are put to a model.

    Raises:
        PromptError: a variable that the rendering itself sets.
    """

    template: str | None = None
    """Jinja text, the name of one of the tokenizer's templates, "none" (raw text); None: the tokenizer's."""
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the template, such as {"enable_thinking": False}."""
    response_prefix: str = ""
    """Text after the rendered prompt, with which every answer begins; it is a part of the prompt."""
    thought_tags: Tags | None = None
    """What stands before and after a thought; None: the template's own."""
    max_thought_tokens: int = MAX_THOUGHT_TOKENS
    """Tokens of a thought, at most, beside those of the answer."""
    read: ReadPart = "answer"
    """The part of what the model writes that is scored, averaged and compared."""

    def __post_init__(self) -> None:
        check_args(self.template_args)
        tags = self.thought_tags
        if tags is not None and (len(tags) != 2 or not all(tags)):
            raise PromptError(
                f"two tags stand around a thought, such as <think>,</think>; got {tags}"
            )
        if self.max_thought_tokens < 1 or self.read not in get_args(ReadPart):
            raise PromptError(
                f"a thought has at least 1 token, and what is read is {' or '.join(get_args(ReadPart))}; got "
                f"{self.max_thought_tokens} and {self.read!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not the usual ones, as JSON."""
        usual = {f.name: f.default for f in fields(self)} | {"template_args": {}}
        values = {name: getattr(self, name) for name in usual}
        return {name: value for name, value in values.items() if value != usual[name]}


TemplateLike = ChatFormat | str | None
"""A chat format, or the template of one."""


def as_chat_format(template: TemplateLike) -> ChatFormat:
    """A chat format as it is; a template as one that has nothing but it."""
    return template if isinstance(template, ChatFormat) else ChatFormat(template)


def described(chat_format: ChatFormat) -> dict[str, str]:
    """The settings that are not the usual ones, for a person; a Jinja text is only said to be there."""
    settings = chat_format.to_dict()
    if "{" in settings.get("template", ""):
        settings["template"] = "given as Jinja text"
    return {
        name.replace("_", " "): value
        if name == "template"
        else json.dumps(value, ensure_ascii=False)
        for name, value in settings.items()
    }


def check_args(args: Mapping[str, Any]) -> None:
    """Refuse variables that the rendering itself sets.

    Raises:
        PromptError: one of them.
    """
    ours = next((name for name in args if name in _OURS), None)
    if ours is not None:
        raise PromptError(
            f"the template variable {ours!r} is set by the rendering itself: give prompts, or --template"
        )


def parse_args(texts: Iterable[str]) -> dict[str, Any]:
    """Variables of a template from NAME=VALUE texts.

    A value is read as JSON where it is some; true, false and none in any case are no texts.

    Raises:
        PromptError: a text of another form, a name that is given twice.
    """
    args: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in args:
            raise PromptError(
                f"--template-arg takes NAME=VALUE, each name once, such as enable_thinking=false; got {text!r}"
            )
        try:
            args[name] = parse_json(value, finite=True)
        except ValueError:
            args[name] = _PYTHONS.get(value.strip().casefold(), value)
    return args


def unescaped(text: str) -> str:
    """A flag's text with line breaks: \\n, \\t and \\\\ stand for a line break, a tab and a backslash."""
    parts = iter(text.split("\\"))
    whole = next(parts)
    for part in parts:
        if part == "":  # two backslashes
            whole += "\\" + next(parts, "")
        else:
            whole += _ESCAPES.get(part[0], "\\" + part[0]) + part[1:]
    return whole
