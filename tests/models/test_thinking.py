"""Thoughts and answers: a model that writes a known text, its parts, its budgets, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp_ablate.activations.collection import collect
from interp_ablate.activations.pooling import pooled, project_responses, response_activations
from interp_ablate.activations.token_html import tokens_html
from interp_ablate.activations.token_view import token_projections
from interp_ablate.cli import persona_monitor
from interp_ablate.cli.figures import FigureSettings
from interp_ablate.cli.main import main
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.evaluation.metrics import (
    TargetLogOdds,
    answer_kl,
    answer_metrics,
    chosen_logprobs,
    divergences,
    first_token_kl,
)
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.side_by_side import compare
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.models.thinking import Generation, Thinking
from interp_ablate.persona.rollouts import Rollout
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.prompts.chat_format import ChatFormat
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.thoughts import KNOWN_TAGS, split_thought, thought_places
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.bench import ValidationBench
from interp_ablate.sites import Site

PLAIN = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
OPENS = PLAIN.replace("assistant:' }}{% endif", "assistant:<think>' }}{% endif")
SWITCH = PLAIN.replace(
    "assistant:' }}{% endif",
    "assistant:' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}"
    "{% endif %}{% endif",
)
NONE = PLAIN + "{# nothing of thoughts #}"


@cache
def tokenizer_of(template: str, special: bool) -> Any:
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def chain(
    written: list[str], template: str = PLAIN, *, special: bool = False, **options: Any
) -> Model:
    """A model that writes these tokens one after another: each decides the next, the blocks add nothing."""
    tokenizer = tokenizer_of(template, special)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embed = torch.nn.functional.normalize(torch.randn(len(tokenizer), 256), dim=1)
        hf.model.embed_tokens.weight.copy_(embed)
        hf.lm_head.weight.zero_()
        ids = tokenizer.convert_tokens_to_ids([*written, "</s>"])
        for before, after in pairwise(ids):
            hf.lm_head.weight[after] += embed[before]
    return from_hf(hf, tokenizer, template=ChatFormat(**options))


# what ends the prompt is the first link of each chain: ":" of "assistant:", or the opened thought
THINKS = [":", "<think>", *"bcd", "</think>", *"xyz"]


@pytest.mark.parametrize("special", [False, True])
def test_a_thought_is_no_part_of_the_answer(special: bool) -> None:
    model = chain(THINKS, SWITCH, special=special)
    (one,) = model.generate(["q"])
    ids = model.tokenizer.convert_tokens_to_ids
    assert (one.text, one.answer, one.thought, one.finished) == ("xyz", "xyz", "bcd", True)
    assert one.tokens == tuple(ids([*"xyz"]))
    assert one.lead == tuple(ids(["<think>", *"bcd", "</think>"]))
    read = chain(THINKS, SWITCH, special=special, read="thought").generate(["q"])[0]
    assert (read.text, read.answer, read.thought) == ("bcd", "xyz", "bcd")
    assert read.tokens == tuple(ids([*"bcd"])) and read.lead == tuple(ids(["<think>"]))


def test_budgets_count_apart() -> None:
    def parts(**limits: int) -> tuple[str, str | None, bool]:
        model = chain(THINKS, SWITCH, max_thought_tokens=limits.get("thought", 9))
        (one,) = model.generate(["q"], max_new_tokens=limits.get("new", 9))
        return one.thought, one.answer, one.finished

    assert parts() == ("bcd", "xyz", True)
    assert parts(new=2) == ("bcd", "xy", False)
    assert parts(new=3) == ("bcd", "xyz", False)
    assert parts(thought=5, new=1) == ("bcd", "x", False)
    assert parts(thought=3) == ("bc", None, False)  # cut: there is no answer
    # a model whose template says nothing of thoughts has one budget
    (one,) = chain(THINKS, NONE).generate(["q"], max_new_tokens=6)
    assert (one.thought, one.answer) == ("bcd", "x")
    (none,) = chain([":", *"xyz"], SWITCH).generate(["q"], max_new_tokens=2)
    assert none == Generation(tuple(none.tokens), "xy", False, "", (), "xy")


def test_a_prompt_that_opens_a_thought() -> None:
    model = chain(["<think>", *"bcd", "</think>", *"xyz"], OPENS)
    assert model.thinking.opens
    assert [(g.thought, g.answer) for g in model.generate(["q", "longer"])] == [("bcd", "xyz")] * 2
    never = chain(["<think>", *"bcd"], OPENS)
    (cut,) = never.generate(["q"])
    assert (cut.thought, cut.answer, cut.text, cut.tokens) == ("bcd", None, "", ())
    closed = chain(["<think>", *"bcd", "</think>", *"xyz"], OPENS, response_prefix="</think>")
    assert not closed.thinking.thinks
    (one,) = closed.generate(["q"])
    assert (one.thought, one.answer, one.lead) == ("", "xyz", ())
    # the user's words open nothing
    plain = chain([":", *"xyz"], SWITCH)
    assert [g.answer for g in plain.generate(["what is <think>"])] == ["xyz"]
    own = Prompt("q", response_prefix="<think>")
    assert chain(THINKS[1:], SWITCH).generate([own])[0].thought == "bcd"


def test_given_tags() -> None:
    model = chain([":", "(", *"bc", ")", *"xyz"], NONE, thought_tags=("(", ")"))
    (one,) = model.generate(["q"], max_new_tokens=3)
    assert (one.thought, one.answer) == ("bc", "xyz")


@pytest.mark.parametrize(("template", "way"), [(OPENS, "response-prefix"), (SWITCH, "enable_thinking=false")])  # fmt: skip
def test_first_token_scores_are_the_answers(template: str, way: str) -> None:
    written = THINKS[1:] if template == OPENS else THINKS
    model = chain(written, template)
    message = model.thinking.no_answer_next("x")
    assert way in message
    if template == OPENS:
        outputs = ModelOutputs(model, ["q"])
        for score in (
            lambda: TargetLogOdds((5,))(outputs, outputs),
            lambda: first_token_kl(outputs, outputs),
        ):
            with pytest.raises(InterpAblateError, match="--response-prefix"):
                score()
    off = chain([*written, "</s>"], template, template_args={"enable_thinking": False}) if way.startswith("enable") else chain(written, template, response_prefix="</think>")  # fmt: skip
    outputs = ModelOutputs(off, ["q"])
    x = off.tokenizer.convert_tokens_to_ids("x")
    assert int(outputs.first_logprobs.argmax()) == x
    assert TargetLogOdds((x,))(outputs, outputs).shape == (1,)


def test_divergences_are_read_after_the_thought() -> None:
    one, other = (
        ModelOutputs(chain(chosen, SWITCH), ["q"])
        for chosen in (THINKS, [":", "<think>", *"bcd", "</think>", *"xwv"])
    )
    one.generations, other.generations  # noqa: B018
    got = divergences(other, one)
    row = [*one.rows[0], *one.generations[0].lead, *one.generations[0].tokens]
    logprobs = []
    for outputs in (one, other):
        hf = (
            outputs.model.tl.original_model
            if outputs.model.backend == "bridge"
            else outputs.model.tl
        )
        with torch.no_grad():
            logits = hf(input_ids=torch.tensor([row])).logits[0, -4:-1]
        logprobs.append(logits.double().log_softmax(-1))
    kl = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1)
    assert got["kl_first_token"][0] == pytest.approx(float(kl[0]), abs=1e-5)
    assert got["kl_continuation"][0] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert float(kl.mean()) > 1e-3


def test_a_cut_thought_is_counted_and_has_no_value() -> None:
    outputs = ModelOutputs(chain(THINKS, SWITCH, max_thought_tokens=3), ["q", "r"])
    values = answer_metrics(outputs, outputs)
    assert values["no_answer"] == [1, 1] and values["length"] == [0, 0]
    assert values["kl_continuation"] == values["kl_first_token"] == [None, None]


def test_means_over_an_answer_leave_its_thought_out() -> None:
    model = chain(THINKS, SWITCH)
    (one,) = model.generate(["q"])
    embed = model.hf_state_dict()["model.embed_tokens.weight"]
    want = embed[list(one.tokens)].double().mean(0)
    answer = Rollout({}, Prompt("q"), one.tokens, one.text, True, lead=one.lead)
    moments = pooled(model, [answer], ["blocks.1.hook_resid_post"])
    torch.testing.assert_close(moments.mean[0, 0], want, rtol=0, atol=1e-6)
    last = embed[model.encode("q")[-1]].double()
    torch.testing.assert_close(moments.mean[1, 0], last, rtol=0, atol=1e-6)
    got = collect(model, ["q"], ["blocks.1.hook_resid_post"], ["response_mean"])
    torch.testing.assert_close(got.values[0, 0, 0].double(), want, rtol=0, atol=1e-6)
    with pytest.raises(InterpAblateError, match="collect them apart"):
        collect(model, ["q"], ["blocks.1.hook_resid_post"], ["response_mean", "-1"])
    opened = chain(THINKS[1:], OPENS)
    row = opened.encode("q")
    text = opened.tokenizer.decode([*row, *opened.thinking.before(row)])
    assert text.endswith("<think>\n</think>\n\n")


def test_tokens_of_an_answer_are_read_after_its_thought() -> None:
    model = chain(THINKS, SWITCH)
    site = Site(1, "resid_post")
    (one,) = model.generate(["q"])
    view = token_projections(model, "q", Direction(torch.eye(256)[0], 1.0, site), max_new_tokens=9)
    found = collect(model, ["q"], [site], positions="response")
    for tokens in (view.tokens, found.tokens[0]):
        answer = [token.id for token in tokens if token.part == "response"]
        assert tuple(answer) == one.tokens
    thought = [token.id for token in view.tokens if token.part == "thought"]
    assert tuple(thought) == one.lead and "thought" in tokens_html(view)
    start = len(model.encode("q")) + len(one.lead)
    assert found.indices[0] == tuple(range(start, start + len(one.tokens)))
    opened = chain(THINKS[1:], OPENS)
    given = token_projections(opened, "q", view.directions, response="xyz")
    assert "".join(t.text for t in given.tokens).endswith("<think>\n</think>\n\nxyz")
    assert [t.text for t in given.tokens if t.part == "response"] == [*"xyz"]


def test_plans_of_the_prompt_end_before_the_thought() -> None:
    """A thought is generated: an edit of prompt positions and a condition of the prompt leave it out, read or written."""
    model = chain(THINKS, SWITCH)
    site = Site(1, "resid_post")
    embed = model.hf_state_dict()["model.embed_tokens.weight"]
    along = Direction(torch.eye(256)[0], 1.0, site)
    of_prompt = Add(along, Site(0, "resid_post"), coefficient=1e-3, positions="prompt")
    bare = token_projections(model, "q", along, max_new_tokens=9)
    with model.applied(of_prompt):
        view = token_projections(model, "q", along, max_new_tokens=9)
    added = (view.values - bare.values)[:, 0]
    in_prompt = torch.tensor([token.part not in ("thought", "response") for token in view.tokens])
    assert {"thought", "response"} <= {token.part for token in view.tokens}
    torch.testing.assert_close(added, 1e-3 * in_prompt.double(), rtol=0, atol=1e-7)

    # what ends the prompt is ":", what ends the thought is not
    ends = Condition(
        embed[model.encode("q")[-1]], "blocks.0.hook_resid_pre", threshold=0.9, similarity="cosine", pooled="last"
    )  # fmt: skip
    everywhere = Add(along, Site(0, "resid_post"), coefficient=1e-3)
    (one,) = model.generate(["q"])
    answer = Rollout({}, Prompt("q"), one.tokens, one.text, True, lead=one.lead)
    said = [PromptResponse(Prompt("q"), one.text)]
    reads = {
        "pooled": lambda: pooled(model, [answer], [site]).mean[0, 0, 0],
        "response_activations": lambda: response_activations(model, [answer], [site])[0, 0, 0],
        "project_responses": lambda: torch.tensor(project_responses(model, said, along)[0]),
        "response_mean": lambda: collect(model, ["q"], [site], "response_mean").values[0, 0, 0, 0],
        "response": lambda: collect(model, ["q"], [site], positions="response").at(site)[0][0, 0],
        "token_projections": lambda: token_projections(model, "q", along, max_new_tokens=9).values[-1, 0],
    }  # fmt: skip
    for name, read in reads.items():
        before = float(read())
        for plan, change in ((Conditional(everywhere, ends), 1e-3), (of_prompt, 0.0)):
            with model.applied(plan):
                assert float(read()) - before == pytest.approx(change, abs=1e-6), name


@pytest.mark.parametrize("tags", KNOWN_TAGS)
def test_every_known_pair_of_tags(tags: tuple[str, str]) -> None:
    start, end = tags
    assert split_thought(f"{start}why{end}\nyes") == ("why", "yes")
    assert split_thought(f"why{end}\nyes") == ("why", "yes")
    assert split_thought(f"{start}why") == ("why", "")
    assert split_thought("yes") == ("", "yes")
    assert split_thought("why", opened=True) == ("why", "")
    assert thought_places("yes") is None


def test_the_tags_of_a_template_that_nobody_knows() -> None:
    template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + ':' }}{% if m.reasoning_content %}"
        "{{ '{{' + m.reasoning_content + '}}' }}{% endif %}{{ m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
    )
    assert Thinking(tokenizer_of(template, False), ChatFormat()).own_tags == (("{{", "}}"),)
    assert (
        Thinking(tokenizer_of(NONE.replace("thoughts", "it"), False), ChatFormat()).own_tags == ()
    )


def test_log_probabilities_along_an_answer_follow_its_thought() -> None:
    outputs = ModelOutputs(chain(THINKS, SWITCH), ["q"])
    along = chosen_logprobs(outputs.answer_logprobs([0])[0], outputs.generations[0].tokens)
    assert bool((along > -10).all()) and len(along) == 3


@pytest.mark.parametrize("template", [SWITCH, OPENS])
def test_what_is_monitored_is_told_apart_and_has_two_limits(template: str) -> None:
    model = chain(THINKS[1:] if template == OPENS else THINKS, template)
    direction = Direction(torch.ones(256), 1.0, Site(1, "resid_post"))
    for limit, text in ((9, "xyz"), (2, "xy")):
        seen = [token for token, _ in model.monitor("q", direction, max_new_tokens=limit)]
        (one,) = model.generate(["q"], max_new_tokens=limit)
        assert tuple(t.id for t in seen if t.part == "thought") == one.lead
        assert "".join(t.text for t in seen if t.part == "answer") == one.text == text


def test_persona_monitor_shows_what_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    direction = Direction(torch.ones(256), 1.0, Site(1, "resid_post"))
    persona = SimpleNamespace(model="m", direction=direction, check=lambda model: None)
    for read, text, other in (("answer", "xyz", 5), ("thought", "bcd", 3)):
        monkeypatch.setattr(persona_monitor, "load", lambda *_: chain(THINKS, SWITCH))
        settings = persona_monitor.Monitor(folder="x", prompt="q", read=read)
        assert not persona_monitor._stream(
            settings, SamplingConfig(max_new_tokens=9), persona, tmp_path, FigureSettings()
        )
        *lines, mean, _ = capsys.readouterr().out.splitlines()
        assert text in "".join(line.split("'")[1] for line in lines)
        assert f"{other} tokens beside the {read} are not read" in mean
    monkeypatch.setattr(
        persona_monitor, "load", lambda *_: chain(THINKS, SWITCH, max_thought_tokens=3)
    )
    settings = persona_monitor.Monitor(folder="x", prompt="q")
    with pytest.raises(RunError, match="wrote 3 tokens and no answer"):
        persona_monitor._stream(
            settings, SamplingConfig(max_new_tokens=9), persona, tmp_path, FigureSettings()
        )


def test_an_answer_that_vanishes_is_no_success() -> None:
    """Of a plan under which thoughts do not end, nothing shows that the behaviour is gone."""
    model, said = chain(THINKS, SWITCH), ExpressionScorer(("x",))
    bench = ValidationBench(
        model, ["q"] * 4, ["r"] * 4, target=TargetLogOdds((5,)), expression=said, max_new_tokens=4
    )
    cut = Generation((), "", False, "bc", (8, 9), None)
    words = [Generation((6,), text, True, "", (), text) for text in ("x", "y", "y", "y")]
    plan = Plan((Ablate(torch.ones(256), Site(1, "resid_post")),))
    found = []
    for answers in (words, [*words[:2], cut, cut], [cut] * 4):
        on_positive, on_negative = bench.outputs_under(plan)
        on_positive.generations, on_negative.generations = answers, words
        found.append(bench.text_scores(on_positive, on_negative))
    assert [each["expression_rate"] for each in found] == [0.25, 0.75, 1.0]
    assert [each["no_answer"] for each in found] == [0, 0.5, 1]


def test_side_by_side_reads_the_answers_first_token_after_a_thought() -> None:
    model = chain(THINKS[1:], OPENS)
    plan = Plan((Ablate(torch.randn(256), Site(1, "resid_post")),))
    found = compare(model, ["q"], {"unedited": None, "ablated": plan}, max_new_tokens=4)
    one = ModelOutputs(model, ["q"], max_new_tokens=4)
    want = divergences(one.with_plan(plan), one)["kl_first_token"]
    assert found.scores["kl_first_token"] == {
        "unedited": pytest.approx([0.0], abs=1e-9),
        "ablated": pytest.approx(want),
    }
    assert want[0] > 0
    assert answer_kl(one, one) == pytest.approx([0.0], abs=1e-9)


def test_score_reads_the_thought_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "chat.jsonl": [
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>sorry</think>yes"}]},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes", "reasoning_content": "sorry"}]},
        ],
        "generated.jsonl": [
            {"prompt": "q", "unedited": "yes", "unedited_thought": "sorry"},
            {"prompt": "q", "unedited": "<think>sorry</think>yes"},
        ],
    }  # fmt: skip
    (tmp_path / "list.txt").write_text("sorry\n")
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        key = ["--answer", "unedited"] if name == "generated.jsonl" else []
        for read, mean in (("answer", 0.0), ("thought", 100.0)):
            arguments = [
                "score",
                str(tmp_path / name),
                "--scorer",
                f"expressions:{tmp_path / 'list.txt'}",
            ]
            assert main([*arguments, "--read", read, "--json", *key]) == 0
            line = json.loads(capsys.readouterr().out)
            assert (line["n"], line["mean"]) == (2, mean)


HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}{# <|channel|>analysis<|message|> #}"
)
CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")


def harmony_tokenizer() -> Any:
    """A tokenizer with the special tokens of gpt-oss, and its channels in the template."""
    from copy import deepcopy

    tokenizer = deepcopy(tokenizer_of(PLAIN, True))
    tokenizer.add_tokens(list(CHANNELS), special_tokens=True)
    tokenizer.chat_template = HARMONY
    return tokenizer


@pytest.mark.parametrize("several", [False, True])
def test_the_channels_of_harmony(several: bool) -> None:
    """Analysis (and what it says about tools) is the thought, the final channel the answer that is scored."""
    thinking = Thinking(harmony_tokenizer(), ChatFormat())
    analysis = "<|channel|>analysis<|message|>sorry, thinking"
    if several:
        analysis += "<|end|><|start|>assistant<|channel|>commentary<|message|>I call nothing"
    written = f"{analysis}<|end|><|start|>assistant<|channel|>final<|message|>yes"
    encode = thinking.tokenizer
    tokens = encode(written, add_special_tokens=False)["input_ids"]
    assert thinking.thinks and not thinking.opens
    one = thinking.generation(tokens, True, opened=False)
    assert (one.text, one.answer, one.finished) == ("yes", "yes", True)
    assert "sorry, thinking" in one.thought and "final" not in one.thought
    assert [*one.lead, *one.tokens] == tokens
    read = Thinking(thinking.tokenizer, ChatFormat(read="thought")).generation(
        tokens, True, opened=False
    )
    assert "sorry" in read.text and "yes" not in read.text
    cut = thinking.generation(
        encode(analysis, add_special_tokens=False)["input_ids"], False, opened=False
    )
    assert cut.answer is None and cut.text == ""
    alone = encode("<|channel|>final<|message|>yes", add_special_tokens=False)["input_ids"]
    assert thinking.generation(alone, True, opened=False).answer == "yes"
    from interp_ablate.prompts.prompt import Prompt as Asked
    from interp_ablate.scoring.exchange import PromptResponse
    from interp_ablate.scoring.expressions import ExpressionTextScorer

    scorer = ExpressionTextScorer(ExpressionScorer(("sorry",)))
    assert scorer([PromptResponse(Asked("q"), written)]) == [0.0]
