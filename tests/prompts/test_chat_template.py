"""Rendering: templates with and without a system role, one BOS, the tokens after the instruction."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from interp_ablate.errors import PromptError
from interp_ablate.prompts import template_process
from interp_ablate.prompts.chat_template import apply_template, encode, render, suffix_length
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.template_process import TemplateProcess

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] + '<|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}"
)
WITH_BOS = "{{ '<s>' }}" + CHATML
NO_SYSTEM = (
    "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] | trim + '<|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model ' }}{% endif %}"
)
IGNORES_SYSTEM = (
    "{% for m in messages if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% endfor %}"
)


def make_tokenizer(template: str | None = None, *, eos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens, BOS put in front (and EOS behind) of text with special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|start|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|start|>", "<|end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def test_render_with_and_without_a_template() -> None:
    prompt = Prompt("Hello?", "Be kind.")
    chat = render(prompt, make_tokenizer(CHATML))
    assert chat.templated
    assert (
        chat.text
        == "<|start|>system Be kind.<|end|> <|start|>user Hello?<|end|> <|start|>assistant "
    )
    plain = "Be kind.\n\nHello?"
    for tokenizer, template in ((make_tokenizer(), None), (make_tokenizer(CHATML), "none")):
        raw = render(prompt, tokenizer, template=template)
        assert (raw.text, raw.templated) == (plain, False)
    given = render(Prompt("Hello?"), make_tokenizer(), template=CHATML, response=" Oh\n")
    assert given.text == "<|start|>user Hello?<|end|> <|start|>assistant  Oh\n"
    assert render(Prompt("a", ""), make_tokenizer(CHATML)).text.startswith(
        "<|start|>system <|end|>"
    )
    assert render(Prompt("a", ""), make_tokenizer()).text == "a"


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_a_system_prompt_that_the_template_refuses_is_folded(template: str) -> None:
    tokenizer = make_tokenizer(template)
    text = render(Prompt("Hello?", "Be kind."), tokenizer).text
    assert "Be kind.\n\nHello?" in text and text.count("Hello?") == 1
    assert render(Prompt("Hello?", ""), tokenizer) == render(Prompt("Hello?"), tokenizer)


@pytest.mark.parametrize("template", ["{{ undefined.x.y }}", "{% if %}", "constant text"])
def test_a_bad_template(template: str) -> None:
    with pytest.raises(PromptError, match="chat template"):
        render(Prompt("Hello?", "Be kind."), make_tokenizer(), template=template)


@pytest.mark.parametrize("template", [None, CHATML, WITH_BOS, NO_SYSTEM])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("text", ["Hello?", "<s>Hello?", "<s>"])
def test_never_a_second_bos_nor_an_eos(template: str | None, eos: bool, text: str) -> None:
    tokenizer = make_tokenizer(template, eos=eos)
    ids = encode(Prompt(text, "Be kind." if text == "Hello?" else None), tokenizer)
    assert ids[:2] != [0, 0] and ids[-1] != 1
    assert (ids[0] == 0) is (template != CHATML)
    assert all(type(i) is int for i in ids)


def test_encode_is_the_rendered_text() -> None:
    tokenizer = make_tokenizer(CHATML, eos=True)
    prompt = Prompt("Hi", "Be kind.")
    assert tokenizer.decode(encode(prompt, tokenizer)) == render(prompt, tokenizer).text
    assert tokenizer.decode(encode(prompt, tokenizer, template="none")) == "<s>Be kind.\n\nHi"
    assert str(tokenizer.decode(encode(prompt, tokenizer, response="Yes</s>"))).endswith(" Yes</s>")
    # An EOS that the caller wrote stays; only what the tokenizer appends goes.
    assert encode(prompt, tokenizer, template="none", response="</s>")[-1] == 1


def test_no_token_at_all() -> None:
    def empty(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] if add_special_tokens else []}

    with pytest.raises(PromptError, match="made no token"):
        encode(Prompt("x"), empty)


def test_suffix_length() -> None:
    tokenizer = make_tokenizer(CHATML)
    suffix = tokenizer("<|end|> <|start|>assistant ", add_special_tokens=False)["input_ids"]
    assert suffix_length(tokenizer) == len(suffix) == 13
    assert suffix_length(tokenizer, system="Be kind.") == 13
    assert suffix_length(tokenizer, template="none") == suffix_length(make_tokenizer()) == 1
    assert suffix_length(make_tokenizer(), template=IGNORES_SYSTEM, system="Be kind.") == 8
    for text in ("one", "Another one?"):
        assert encode(Prompt(text), tokenizer)[-13:] == suffix


PARTS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{{ '<|end|> ' }}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>Who?</think>Hello"},
    {"role": "user", "content": "Bye"},
]


def test_a_template_that_iterates_over_content_parts() -> None:
    tokenizer = make_tokenizer(PARTS)
    text = render(Prompt("Hello?", "Be kind."), tokenizer).text
    assert text == "<|start|>system Be kind.<|end|> <|start|>user Hello?<|end|> "
    # a template that only prints what it is given is not handed a list
    printed = render(
        Prompt("Hi", "Be kind."), make_tokenizer(), template="{{ messages[-1].content }}"
    )
    assert printed.text == "Be kind.\n\nHi"


def test_a_chat_is_a_prompt() -> None:
    """Every turn is in it; a template may leave out the thoughts of earlier answers, and no other words."""
    prompt = Prompt.from_messages([{"role": "system", "content": "Be kind."}, *CHAT])
    assert (prompt.text, prompt.system, len(prompt.history)) == ("Bye", "Be kind.", 2)
    text = render(prompt, make_tokenizer(CHATML)).text
    assert "system Be kind.<|end|> <|start|>user Hi" in text and text.count("<|start|>") == 5
    assert render(prompt, make_tokenizer(NO_SYSTEM)).text.startswith(
        "<s><|start|>user Be kind.\n\nHi"
    )
    forgetful = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    assert "Who?" not in render(prompt, make_tokenizer(forgetful)).text
    with pytest.raises(PromptError, match="drops 'Be kind"):
        render(prompt, make_tokenizer(IGNORES_SYSTEM))
    with pytest.raises(PromptError, match="a conversation of several turns"):
        render(prompt, make_tokenizer())


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "list of messages"),
        ("Hi", "list of messages"),
        ([{"role": "wizard", "content": "x"}], "'wizard' is not known"),
        ([{"role": "user", "content": 3}], "text, or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only text parts"),
        (CHAT[:2], "ends with the assistant's message"),
        ([{"role": "user", "content": " "}], "empty prompt"),
    ],
)
def test_what_is_no_chat(messages: object, match: str) -> None:
    with pytest.raises(PromptError, match=match):
        Prompt.from_messages(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ messages[9].content.x }}", "{{ messages | map('nope') }}", ALTERNATING],
)
def test_a_template_that_fails_in_any_way_is_one_message(template: str) -> None:
    """Jinja's errors and Python's, and a refusal of two turns of one role."""
    twice = Prompt.from_messages([CHAT[0], CHAT[0]])
    with pytest.raises(PromptError, match="the chat template cannot render 'Hi'"):
        render(twice, make_tokenizer(), template=template)


def test_a_template_that_writes_the_date() -> None:
    dated = "{{ strftime_now('%d %b %Y') + '. ' }}" + CHATML
    tokenizer = make_tokenizer(dated)
    assert encode(Prompt("Hi"), tokenizer) == encode(Prompt("Hi"), tokenizer)
    assert suffix_length(tokenizer) == 13


@pytest.mark.parametrize("text", ["\u200b", " \u200b\ufeff\n", "\x00", "\u3000"])
def test_a_prompt_that_nobody_can_see(text: str) -> None:
    with pytest.raises(PromptError, match="empty prompt"):
        Prompt(text)


@pytest.mark.parametrize("text", ["<|end|>", "<s>", "<|start|><|end|>"])
def test_a_prompt_of_special_tokens_only(text: str) -> None:
    tokenizer = make_tokenizer(CHATML)
    ids = encode(Prompt(text), tokenizer)
    assert tokenizer.decode(ids) == f"<|start|>user {text}<|end|> <|start|>assistant "
    assert encode(Prompt(text), make_tokenizer(), template="none")


def test_no_bos_token_at_all() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer.decode(encode(Prompt("Hi", "Be kind."), tokenizer)) == "Be kind.\n\nHi"


# --------------------------------------------------------- templates are somebody else's programs

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 3500000000 }}",
    "doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "a wide field": "{{ '%3000000000d' % 1 }}",
    "a filter": "{{ 'a' | center(3000000000) }}",
    "nested lists": "{% set n = namespace(l=['a']) %}{% for i in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "division": "{{ 1 / 0 }}",
    "a method": "{{ messages[0].nothing() }}",
    "an attribute": "{{ ''.__class__.__mro__ }}",
    "much text": "{{ 'a' * 90000000 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    render(Prompt("Hello?"), make_tokenizer(CHATML))  # the process is there
    monkeypatch.setattr("interp_ablate.prompts.template_process.TIME_LIMIT", 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PromptError, match="chat template"):
        render(Prompt("Hello?"), make_tokenizer(HOSTILE[name]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    assert render(Prompt("Hello?"), make_tokenizer(CHATML)).templated  # and others are rendered


@pytest.mark.parametrize("name", ["a product", "a wide field", "doubling"])
def test_memory_is_looked_at_where_the_kernel_does_not_limit_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS and Windows: before, 3.5 GB were taken there."""
    code = template_process._CODE.replace(
        "from {0}", "import resource; resource.setrlimit = print; from {0}"
    )
    monkeypatch.setattr(template_process, "_CODE", code)
    renderer, looked = TemplateProcess(), [0.0]

    def memory(pid: int) -> float:
        looked.append(psutil.Process(pid).memory_info().rss)
        return looked[-1]

    monkeypatch.setattr(template_process, "_memory", memory)
    try:
        with pytest.raises(PromptError, match="more memory than 1 GiB"):
            renderer.render(HOSTILE[name], [{"role": "user", "content": "Hi"}], {})
        assert (
            max(looked) - looked[1] > template_process.MEMORY_LIMIT
        )  # that was why, and not the time
        assert max(looked) - looked[1] < 2.5 * template_process.MEMORY_LIMIT
        assert renderer.render("{{ 1 + 1 }}", [{"role": "user", "content": "Hi"}], {}) == "2"
    finally:
        renderer.stop()


def test_the_process_renders_what_the_tokenizer_does() -> None:
    tokenizer = make_tokenizer(
        WITH_BOS + "{{ eos_token }}{{ strftime_now('%Y') }}{{ x is defined }}"
    )
    messages = [
        {"role": "system", "content": "Ünï ' \" \\ \n", "name": None},
        {"role": "user", "content": "Hello?\u2028", "tool_calls": [{"function": {"name": "f"}}]},
    ]
    for open_ended in (True, False):
        plain = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_ended
        )
        assert apply_template(messages, tokenizer, open_ended=open_ended) == plain
    assert isinstance(plain, str) and "</s>" in plain


def test_threads_and_forks_share_the_process() -> None:
    tokenizer = make_tokenizer(CHATML)
    texts = [f"prompt {i}" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        rendered = list(pool.map(lambda text: render(Prompt(text), tokenizer).text, texts))
    assert all(text in one for text, one in zip(texts, rendered, strict=True))


def test_several_templates_by_name() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"rag": WITH_BOS, "tool_use": CHATML}
    for template in (None, "ragg"):
        with pytest.raises(PromptError, match=r"rag, tool_use.*--template NAME"):
            render(Prompt("Hello?"), tokenizer, template=template)
    assert render(Prompt("Hello?"), tokenizer, template="rag").text.startswith("<s><|start|>user")
    assert render(Prompt("Hello?"), tokenizer, template=IGNORES_SYSTEM).text.startswith("[INST]")
    tokenizer.chat_template = {"default": CHATML, "rag": WITH_BOS}
    assert render(Prompt("Hello?"), tokenizer).text.startswith("<|start|>user")
