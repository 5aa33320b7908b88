"""Chat formats: variables of a template, response prefixes, and what is refused of them."""

from __future__ import annotations

from typing import Any

import pytest

from interp_ablate.errors import PromptError
from interp_ablate.models.loading import LoadingOptions
from interp_ablate.prompts.chat_format import ChatFormat, parse_args, unescaped
from interp_ablate.prompts.chat_template import check_format, encode, render
from interp_ablate.prompts.prompt import Prompt, distinct
from tests.prompts.test_chat_template import CHATML, make_tokenizer

SWITCH = CHATML.replace(
    "{{ '<|start|>assistant ' }}",
    "{{ '<|start|>assistant ' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
CLOSED = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("false", False), ("False", False), ("TRUE", True), ("none", None), ("null", None)),
        *(("3", 3), ("0.5", 0.5), ('"3"', "3"), ("high", "high"), ("a=b", "a=b"), ("", "")),
        *(("[1, 2]", [1, 2]), ("NaN", "NaN")),
    ],
)
def test_values_of_variables(text: str, value: Any) -> None:
    assert parse_args([f"name={text}"]) == {"name": value}


@pytest.mark.parametrize("texts", [["enable_thinking"], ["=1"], ["a b=1"], ["a=1", "a=2"]])
def test_variables_that_cannot_be_read_are_refused(texts: list[str]) -> None:
    with pytest.raises(PromptError, match="NAME=VALUE"):
        LoadingOptions(template_args=tuple(texts))


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "chat_template"])
def test_variables_of_the_rendering_itself_are_refused(name: str) -> None:
    with pytest.raises(PromptError, match=name):
        ChatFormat(template_args={name: 1})
    with pytest.raises(PromptError, match=name):
        Prompt("x", template_args={name: 1})


def test_a_variable_reaches_the_template_and_a_prefix_ends_the_prompt() -> None:
    tokenizer = make_tokenizer(SWITCH)
    plain = render(Prompt("Hello"), tokenizer).text
    off = ChatFormat(template_args={"enable_thinking": False}, response_prefix="Sure")
    assert render(Prompt("Hello"), tokenizer, template=off).text == plain + CLOSED + "Sure"
    ids = encode(Prompt("Hello"), tokenizer, template=off)
    assert tokenizer.decode(ids) == plain + CLOSED + "Sure"
    raw = ChatFormat("none", response_prefix=" Sure")
    assert render(Prompt("Hello"), tokenizer, template=raw).text == "Hello Sure"


def test_a_prompts_own_go_before_the_formats() -> None:
    tokenizer, off = make_tokenizer(SWITCH), ChatFormat(None, {"enable_thinking": False}, "Sure")
    on = Prompt("Hello", template_args={"enable_thinking": True}, response_prefix="")
    assert render(on, tokenizer, template=off) == render(Prompt("Hello"), tokenizer)
    assert len(distinct([on, Prompt("Hello")])) == 2 and on.parts != Prompt("Hello").parts
    assert len({on, Prompt("Hello")}) == 2


def test_a_variable_that_nothing_reads_is_refused_with_what_was_meant() -> None:
    tokenizer = make_tokenizer(SWITCH)
    typo = ChatFormat(template_args={"enable_thinkng": False})
    for refused in (
        lambda: check_format(tokenizer, typo),
        lambda: render(Prompt("x", template_args={"enable_thinkng": False}), tokenizer),
    ):
        with pytest.raises(PromptError, match="did you mean enable_thinking"):
            refused()
    for template in ("none", None):
        raw = ChatFormat(template, {"enable_thinking": False})
        with pytest.raises(PromptError, match="raw text"):
            check_format(make_tokenizer(), raw)


def test_flags_make_a_format() -> None:
    options = LoadingOptions(
        template="rag", template_args=("enable_thinking=false",), response_prefix=r"</think>\n\n"
    )
    format = ChatFormat("rag", {"enable_thinking": False}, "</think>\n\n")
    assert options.loading["template"] == format
    assert not {"template_args", "response_prefix"} & set(options.loading)


@pytest.mark.parametrize("text", ["a\nb\t\\", "\\n", "\\\\", "\\", "plain", "\\\n"])
def test_every_text_can_be_a_flag(text: str) -> None:
    written = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    assert unescaped(written) == text
    assert unescaped(r"\w+") == r"\w+"
