"""Training with TRL and PEFT on tiny models: rows, targets, quiet and resumable trainers, merging."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import DECLARED, make_tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from interp_ablate.errors import ModelError, PromptError, RunError
from interp_ablate.models.sources import ModelSource
from interp_ablate.prompts.chat_format import ChatFormat
from interp_ablate.prompts.chat_template import encode
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.training.lora_targets import (
    adapted_layers,
    in_words,
    linear_modules,
    lora_config,
    lora_targets,
    writing_parameters,
)
from interp_ablate.training.recipe import LoraRecipe
from interp_ablate.training.rows import RowTokenizer, TrainingRow
from interp_ablate.training.trainable_model import (
    TrainableModel,
    certify_merged,
    logits_of,
    merge,
    require_extra,
    write_trained,
)
from interp_ablate.training.trainer import checkpoint_folder, sft, train

trl = pytest.importorskip("trl")

FAST = LoraRecipe(steps=12, batch_size=2, learning_rate=2e-2, rank=4, alpha=8, max_length=96)
USER = ({"role": "user", "content": "Say a"},)


def base_of(kind: str = "llama_gqa", **options: Any) -> TrainableModel:
    return TrainableModel(*tiny.tiny(kind, **options), ModelSource("tiny", "object"))


def some_rows(base: TrainableModel, n: int = 6) -> list[TrainingRow]:
    renderer = RowTokenizer(base.tokenizer)
    found = [renderer.row([{"role": "user", "content": f"Say {c}"}], c * 9) for c in "abcdefgh"[:n]]
    return [row for row in found if row is not None]


def losses(logged: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in logged]


def targeted(peft_model: Any) -> list[str]:
    """Names, in the base model, of the modules that have an adapter."""
    prefix, end = "base_model.model.", ".lora_A.default"
    names = [name for name, _ in peft_model.named_modules() if name.endswith(end)]
    return [name.removeprefix(prefix).removesuffix(end) for name in names]


def others(hf: Any, modules: list[str]) -> dict[str, torch.Tensor]:
    """Every tensor that belongs to none of the modules."""
    gone = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    return {name: tensor for name, tensor in hf.state_dict().items() if name not in gone}


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DECLARED])
def test_readers_are_all_linear_layers_that_do_not_write(kind: str) -> None:
    hf, _ = tiny.tiny(kind)
    every = {f"{name}.weight" for name in linear_modules(hf)}
    if (experts := DECLARED[kind].experts) is not None:
        every |= {n for n, _ in hf.named_parameters() if f".{experts}." in f".{n}"}
    writers = set(writing_parameters(hf))
    assert not {"lm_head.weight", "embed_out.weight"} & every and every & writers
    assert set(lora_targets(hf).weights) == every
    assert set(lora_targets(hf, "readers").weights) == every - writers


def test_short_names_where_they_are_unambiguous() -> None:
    hf = tiny.tiny()[0]
    config = lora_config(hf, FAST, lora_targets(hf, "readers"))
    assert config.target_modules == {"gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"}
    assert in_words(lora_targets(hf, "readers").weights) == (
        "3 mlp.gate_proj, 3 mlp.up_proj, 3 self_attn.k_proj, 3 self_attn.q_proj, 3 self_attn.v_proj"
    )


# What a block of each has beside attention: stacked experts in both orientations, shared ones, a dense layer.
MIXTURES = {
    "gpt_oss": "mlp.experts.gate_up_proj mlp.experts.down_proj",
    "granitemoeshared": (
        "block_sparse_moe.experts.gate_up_proj block_sparse_moe.experts.down_proj"
        " shared_mlp.input_linear shared_mlp.output_linear"
    ),
    "llama4_text": (
        "feed_forward.experts.gate_up_proj feed_forward.experts.down_proj feed_forward.shared_expert.gate_proj"
        " feed_forward.shared_expert.up_proj feed_forward.shared_expert.down_proj"
    ),
    "mixtral": "mlp.experts.gate_up_proj mlp.experts.down_proj",
    "qwen2_moe": (
        "mlp.experts.gate_up_proj mlp.experts.down_proj mlp.shared_expert.gate_proj"
        " mlp.shared_expert.up_proj mlp.shared_expert.down_proj"
    ),
}


@pytest.mark.parametrize("where", ["all", "readers"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_adapted_and_merge(kind: str, where: Any, tmp_path: Path) -> None:
    """Attention alone was adapted before, and PEFT took a shared expert's projections for the experts'."""
    import peft
    from support.family_models import build

    base = TrainableModel(build(kind), make_tokenizer(), ModelSource("tiny", "object"))
    original = base.take()
    writers = {"down_proj", "output_linear", "o_proj"} if where == "readers" else set()
    trainer = sft(base, some_rows(base), replace(FAST, steps=4), tmp_path / "work", where=where)
    adapted = set(adapted_layers(trainer.model))
    for name in (*MIXTURES[kind].split(), "self_attn.q_proj", "self_attn.o_proj"):
        layers = [n for n in adapted if n.removesuffix(".weight").endswith(f".{name}")]
        expected = name.rpartition(".")[2] not in writers
        assert bool(layers) == expected, name
    if kind == "llama4_text":  # TRL takes another output of its body for granted
        with pytest.raises(RunError, match="TRL cannot train a llama4_text model"):
            train(trainer, tmp_path / "work")
        return
    before = original.hf.state_dict()
    train(trainer, tmp_path / "work")
    done = merge(base, trainer.model)
    assert done.base.hf.config.to_dict() == original.hf.config.to_dict()
    moved = {n for n, x in done.base.hf.state_dict().items() if not torch.equal(x, before[n])}
    assert moved == adapted
    (tmp_path / "out").mkdir()
    certificate = write_trained(done, tmp_path / "out", {"for": "a test"})
    assert certificate["passed"] and certificate["adapter"]["max_abs_logit_difference"] < 1e-4
    loaded = peft.PeftModel.from_pretrained(original.hf, tmp_path / "out" / "adapter")
    for one, other in zip(logits_of(loaded, done.probes), done.unmerged, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_row_is_the_prompt_the_answer_and_the_end_of_the_turn() -> None:
    tokenizer = make_tokenizer()
    row = RowTokenizer(tokenizer).row(USER, "aaa")
    assert row is not None and not row.cut
    assert list(row.prompt) == encode(Prompt("Say a"), tokenizer)
    assert tokenizer.decode(row.answer) == "aaa<|im_end|>"


def test_an_answer_that_a_limit_cut_does_not_end_the_turn() -> None:
    row = RowTokenizer(make_tokenizer()).row(USER, "aaa", finished=False)
    assert row is not None and make_tokenizer().decode(row.answer) == "aaa"


def test_system_prompts_and_earlier_turns_are_kept() -> None:
    tokenizer = make_tokenizer()
    told = [{"role": "system", "content": "Be brief"}, *USER]
    row = RowTokenizer(tokenizer).row(told, "a")
    assert row is not None and list(row.prompt) == encode(Prompt("Say a", "Be brief"), tokenizer)
    turns = [*told, {"role": "assistant", "content": "a"}, {"role": "user", "content": "Say b"}]
    row = RowTokenizer(tokenizer).row(turns, "b")
    text = tokenizer.decode(row.prompt)  # type: ignore[union-attr]
    assert "Be brief" in text and "\na<|im_end|>" in text
    assert text.endswith("Say b<|im_end|>\n<|im_start|>assistant\n")


def test_long_rows_are_cut_and_too_long_prompts_left_out() -> None:
    tokenizer = make_tokenizer()
    length = len(encode(Prompt("Say a"), tokenizer))
    cut = RowTokenizer(tokenizer, max_length=length + 2).row(USER, "aaaa")
    assert cut is not None and cut.cut and len(cut.answer) == 2
    assert RowTokenizer(tokenizer, max_length=length).row(USER, "aaaa") is None


def test_raw_text_ends_with_the_end_of_sequence_and_has_one_turn() -> None:
    tokenizer = make_tokenizer(None)
    renderer = RowTokenizer(tokenizer)
    row = renderer.row(USER, "a")
    assert row is not None and row.answer[-1] == tokenizer.eos_token_id
    with pytest.raises(PromptError, match="several turns"):
        renderer.row([*USER, *USER], "a")


THINKING = tiny.CHATML.replace(
    "m['content'] +",
    "('<|think|>' + m.reasoning_content + '<|/think|>' if m.reasoning_content is defined else '') + m['content'] +",
)
OPENS = tiny.CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")


@pytest.mark.parametrize(
    "mark, special", [("<|end|>", True), ("<end_of_turn>", False), ("[end]", None)]
)
def test_the_end_of_a_turn_is_the_templates(mark: str, special: bool | None) -> None:
    """A token that the tokenizer does not call special, or no token at all: then an EOS follows the text."""
    tokenizer = make_tokenizer(tiny.CHATML.replace("<|im_end|>", mark))
    if special is not None:
        tokenizer.add_tokens([AddedToken(mark, special=special)])
    row = RowTokenizer(tokenizer).row(USER, "aaa")
    assert row is not None
    assert tokenizer.decode(row.answer) == f"aaa{mark}" + ("<|im_end|>" if special is None else "")


def test_the_end_of_a_turn_is_there_once_and_no_bos_comes_before_an_answer() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    bos = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = bos
    for template in (None, "none"):
        renderer = RowTokenizer(tokenizer, template)
        for answer in ("aaa", "aaa<|im_end|>", "aaa<|im_end|><|im_end|>"):
            assert tokenizer.decode(renderer.row(USER, answer).answer) == "aaa<|im_end|>"  # type: ignore[union-attr]
    unfinished = RowTokenizer(tokenizer).row(USER, "aaa<|im_end|>", finished=False)
    assert tokenizer.decode(unfinished.answer) == "aaa"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "template, answer, thought, wanted",
    [
        (tiny.CHATML, "4", "two and two", "<think>\ntwo and two\n</think>\n\n4"),
        (tiny.CHATML, "<think>x</think>4", "", "<think>x</think>4"),
        (THINKING, "4", "two and two", "<|think|>two and two<|/think|>4"),
        (OPENS, "4", "two", "two\n</think>\n\n4"),
        (OPENS, "<think>\nx</think>4", "", "x</think>4"),
        (OPENS, "4", "", "\n</think>\n\n4"),
    ],
)
def test_thoughts_are_trained_on_in_the_templates_form(
    template: str, answer: str, thought: str, wanted: str
) -> None:
    tokenizer = make_tokenizer(template)
    row = RowTokenizer(tokenizer).row(USER, answer, thought=thought)
    assert row is not None and tokenizer.decode(row.answer) == f"{wanted}<|im_end|>"


@pytest.mark.parametrize(("answer", "thought"), [("4", "two"), ("<think>two</think>4", "")])
def test_a_thought_is_not_trained_on_behind_one_that_has_ended(answer: str, thought: str) -> None:
    closed = ChatFormat(response_prefix="\n</think>\n\n")
    rows = RowTokenizer(make_tokenizer(OPENS), closed)
    with pytest.raises(PromptError, match="a sample has a thought"):
        rows.row(USER, answer, thought=thought)
    row = rows.row(USER, "4")
    text = rows.tokenizer.decode([*row.prompt, *row.answer]) if row else ""
    assert text.endswith("<think>\n\n</think>\n\n4<|im_end|>")


def test_the_end_of_a_turn_is_in_the_loss_where_it_is_also_the_padding(tmp_path: Path) -> None:
    base = base_of()
    base.tokenizer.pad_token = base.tokenizer.eos_token
    renderer = RowTokenizer(base.tokenizer)
    rows = [row for text in ("a", "aaaaaa") if (row := renderer.row(USER, text))]
    trainer = sft(base, rows, FAST, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for labels, tokens in zip(batch["labels"].tolist(), batch["input_ids"].tolist()):
        learned = [label for label in labels if label != -100]
        assert learned[-1] == renderer.end_of_turn[-1] and learned.count(learned[-1]) == 1
        assert len(labels) == len(tokens)


# ---- training ------------------------------------------------------------------------------------


def test_memory_that_runs_out_in_training_is_one_message_and_it_goes_on(tmp_path: Path) -> None:
    base = base_of()
    trainer = sft(base, some_rows(base), FAST, tmp_path)
    step, calls = trainer.training_step, []

    def hungry(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args, **options)

    trainer.training_step = hungry
    with pytest.raises(ModelError, match="memory ran out in training: use --dtype bfloat16"):
        train(trainer, tmp_path)


def trained(
    work: Path, base: TrainableModel, recipe: LoraRecipe = FAST, **options: Any
) -> tuple[Any, list]:
    trainer = sft(base, some_rows(base), recipe, work)
    return trainer, train(trainer, work, **options)


def test_the_loss_falls_and_the_seed_decides(tmp_path: Path) -> None:
    found = [losses(trained(tmp_path / name, base_of())[1]) for name in "ab"]
    assert found[0] == found[1] and len(found[0]) == FAST.steps
    assert sum(found[0][-3:]) < 0.7 * sum(found[0][:3])
    other = LoraRecipe(**{**FAST.to_dict(), "seed": 1})
    assert losses(trained(tmp_path / "c", base_of(), other)[1]) != found[0]


def test_the_loss_is_on_the_answer_alone(tmp_path: Path) -> None:
    base = base_of()
    rows = some_rows(base, 2)
    recipe = LoraRecipe(**{**FAST.to_dict(), "steps": 1})
    first = losses(train(sft(base.take(), rows, recipe, tmp_path / "w"), tmp_path / "w"))[0]
    total, count = 0.0, 0
    for row in rows:
        logits = logits_of(base.hf, [[*row.prompt, *row.answer]])[0].log_softmax(-1)
        at = range(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1)
        total -= sum(float(logits[i, token]) for i, token in zip(at, row.answer, strict=True))
        count += len(row.answer)
    assert first == pytest.approx(total / count, abs=1e-4)


def test_nothing_is_sent_printed_or_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import trl.trainer.base_trainer as module

    def sent(*args: Any, **options: Any) -> None:
        raise AssertionError("telemetry")

    assert module.send_telemetry and module._BaseTrainer._send_telemetry  # what is overridden
    monkeypatch.setattr(module, "send_telemetry", sent)
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "work", base_of())
    assert capfd.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = LoraRecipe(**{**FAST.to_dict(), "save_every": 4})
    whole, want = trained(tmp_path / "whole", base_of(), recipe)

    def killed(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    out, identity = tmp_path / "out", {"of": "this"}
    with pytest.raises(KeyboardInterrupt), checkpoint_folder(out, identity) as work:
        trained(work, base_of(), recipe, on_step=killed)
    torn = tmp_path / ".out.training" / "checkpoint-6"
    torn.mkdir()  # as if it had been killed while it wrote this one
    steps: list[int] = []
    with checkpoint_folder(out, identity) as work:
        trainer, got = trained(work, base_of(), recipe, on_step=steps.append)
    assert steps[0] == 5 and not (tmp_path / ".out.training").exists()
    assert losses(got) == pytest.approx(losses(want), abs=1e-6)
    pairs = zip(trainer.model.state_dict().values(), whole.model.state_dict().values())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checkpoint_folder(tmp_path / "out", {"seed": 0}) as work:
        (work / "checkpoint-1").mkdir()
        raise KeyboardInterrupt
    with (
        pytest.raises(RunError, match="other work"),
        checkpoint_folder(tmp_path / "out", {"seed": 1}),
    ):
        pass


def test_checkpoints_without_a_journal_are_not_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checkpoint_folder(tmp_path / "out", {"seed": 0}) as work:
        (work / "plain" / "checkpoint-4").mkdir(parents=True)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), checkpoint_folder(tmp_path / "out", {"seed": 0}) as work:
        assert (work / "plain" / "checkpoint-4").exists()  # the same training goes on
        raise KeyboardInterrupt
    (work / "journal.jsonl").unlink()  # as the refusal of another training advises
    with checkpoint_folder(tmp_path / "out", {"seed": 1}) as work:
        assert [path.name for path in work.iterdir()] == ["journal.jsonl"]


def test_the_fingerprint_is_of_the_weights_and_their_dtype() -> None:
    one, same, other = base_of(), base_of(), base_of(seed=1)
    assert one.fingerprint == same.fingerprint == one.take().fingerprint != other.fingerprint
    same.hf.to(torch.bfloat16)
    assert same.fingerprint != one.fingerprint


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    base = base_of()
    with torch.no_grad():
        base.hf.model.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="not finite from step 1"):
        trained(tmp_path, base)


# ---- what comes of it ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2", "gemma2"])
def test_merged_and_reloaded_is_the_unmerged_adapter(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = base_of(kind, tied=kind != "llama_gqa")
    original = base.take()
    trainer, _ = trained(tmp_path / "work", base)
    modules = targeted(trainer.model)
    assert set(modules) == set(linear_modules(original.hf))
    done = merge(base, trainer.model)
    kept, same = others(original.hf, modules), others(done.base.hf, modules)
    assert kept and kept.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in kept.items())
    place = tmp_path / "out"
    place.mkdir()
    certificate = write_trained(done, place, {"for": "a test"})
    assert certificate["passed"] and certificate["adapter"]["max_abs_logit_difference"] < 1e-4
    moved = max(
        float((a - b).abs().max())
        for a, b in zip(done.unmerged, logits_of(original.hf, done.probes), strict=True)
    )
    assert moved > 0.1  # the training did something
    manifest = json.loads((place / "interp_ablate.json").read_text())
    assert manifest["trained"] == {"for": "a test"} and "trl" in manifest["versions"]
    reloaded = AutoModelForCausalLM.from_pretrained(place)
    import peft

    adapted = peft.PeftModel.from_pretrained(original.hf, place / "adapter")
    for one, other in zip(
        logits_of(adapted, done.probes), logits_of(reloaded, done.probes), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_another_model_fails_the_certificate(tmp_path: Path) -> None:
    base = base_of()
    trainer, _ = trained(tmp_path / "work", base)
    done = merge(base, trainer.model)
    tiny.folder_of(tmp_path / "other")
    found = certify_merged(done, tmp_path / "other")
    assert not found["passed"] and "max_abs_logit_difference" in found["failed"]


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"rank": 0}, {"max_length": 1}):
        with pytest.raises(RunError, match=next(iter(wrong))):
            LoraRecipe(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="where="):
        lora_targets(tiny.tiny()[0], "some")  # type: ignore[arg-type]
    hf, _ = tiny.tiny()
    hf.config.model_type = "unheard_of"
    assert lora_targets(hf, "readers") == lora_targets(tiny.tiny()[0], "readers")  # measured
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RunError, match=r"pip install 'interp-ablate\[train\]'"):
        require_extra()
