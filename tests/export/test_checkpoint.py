"""Exports: whole folders that plain transformers loads, certified, or nothing at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import (
    CHATML,
    HAS_HOOKED,
    N_LAYERS,
    editing,
    forward,
    make,
    rows_of,
    shared,
    tiny,
    unit,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from interp_ablate import Ablate, Plan, Site, certify, everywhere, export_checkpoint, load_model
from interp_ablate.errors import ExportError, ModelError
from interp_ablate.export import certification as verify
from interp_ablate.export import checkpoint, checkpoint_files
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.checkpoint import export_folder
from interp_ablate.export.lora import export_lora
from interp_ablate.export.model_card import SAFETY_NOTICE
from interp_ablate.export.side_files import travels
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model

PLAN = Plan((Ablate(unit(), everywhere(N_LAYERS), label="a direction"),))
NO_EMBED = Plan((Ablate(unit(), everywhere(N_LAYERS)[1:], strength=0.8),))
ROWS = rows_of(9, 14)
TEST = {
    "behaviour_before": 0.75,
    "behaviour_after": 0.0,
    "intervals": {"behaviour_after": [0, 0.1]},
}


def save_source(
    folder: Path, *, kind: str = "llama_gqa", dtype: Any = None, **options: Any
) -> Path:
    """A Hugging Face folder as people publish them: weights, tokenizer, generation config, extras."""
    hf, tokenizer = tiny(kind, tied=True)
    hf = hf.to(dtype or torch.float32)
    hf.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 0])
    hf.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("the source's own card")
    return folder


def check_loads(folder: Path, plan: Plan) -> Any:
    """Loaded with no option, it computes what the plan computes on the source."""
    hf, source = AutoModelForCausalLM.from_pretrained(folder), tiny(tied=True)[0]
    for row in ROWS:
        want = forward(source, row, editing(plan))
        torch.testing.assert_close(forward(hf, row), want, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML and tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    return hf


def nothing_beside(folder: Path) -> bool:
    return not list(folder.iterdir())


# --------------------------------------------------------------------------------- what an export is


@pytest.mark.parametrize("sharded", (False, True), ids=("one file", "sharded"))
def test_from_a_folder(tmp_path: Path, backend: str, sharded: bool) -> None:
    options = {"max_shard_size": "40KB"} if sharded else {}
    source = save_source(tmp_path / "source", **options)
    assert (source / "model.safetensors.index.json").is_file() == sharded
    model, out = load_model(source, backend=backend), tmp_path / "a" / "out"  # type: ignore[arg-type]
    certificate = export_checkpoint(model, PLAN, out, prompts=ROWS, report=TEST)
    hf = check_loads(out, PLAN)
    assert hf.config.tie_word_embeddings is False
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(hf.lm_head.weight, tiny(tied=True)[0].lm_head.weight)
    assert not torch.equal(hf.lm_head.weight, hf.model.embed_tokens.weight)
    assert (out / "LICENSE").read_text() == "free"
    for file in ("tokenizer.json", "generation_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    assert hf.generation_config.eos_token_id == [2, 0]
    assert json.loads((out / "certificate.json").read_text()) == certificate
    assert certificate["passed"] and certificate["largest_projection_left"] < 1e-5
    assert certificate["kl"] <= 1e-6 and certificate["residual_along_direction"] <= 1e-5
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    shards = [path.name for path in sorted(source.glob("*.safetensors*"))]
    assert [path.name for path in sorted(out.glob("*.safetensors*"))] == shards


def test_in_shards_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "MAX_SHARD", "40KB")
    export_checkpoint(shared(tied=True), PLAN, tmp_path / "out", prompts=ROWS)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    check_loads(tmp_path / "out", PLAN)


def test_from_memory(tmp_path: Path, backend: str) -> None:
    model = shared(backend=backend, tied=True)
    export_checkpoint(model, PLAN, tmp_path / "out", prompts=ROWS)
    hf = check_loads(tmp_path / "out", PLAN)
    assert hf.config.architectures == ["LlamaForCausalLM"] and hf.dtype == torch.float32
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_a_plan_that_leaves_the_embedding_alone_keeps_the_tie(tmp_path: Path, backend: str) -> None:
    folder = load_model(save_source(tmp_path / "source"), backend=backend)  # type: ignore[arg-type]
    for model, out in (
        (folder, tmp_path / "1"),
        (shared(backend=backend, tied=True), tmp_path / "2"),
    ):
        export_checkpoint(model, NO_EMBED, out, prompts=ROWS)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
        assert "lm_head.weight" not in load_file(out / "model.safetensors")
        hf = check_loads(out, NO_EMBED)
        assert hf.lm_head.weight is hf.model.embed_tokens.weight
        assert json.loads((out / "interp_ablate.json").read_text())["untied"] is False


def test_manifest_and_card(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(load_model(save_source(tmp_path / "s")), PLAN, out, prompts=ROWS, report=TEST)
    manifest = json.loads((out / "interp_ablate.json").read_text())
    assert Plan.from_dict(manifest["plan"]) == PLAN and manifest["test"] == TEST
    assert manifest["source"]["name"] == "s" and manifest["dtype"] == "float32"
    assert manifest["untied"] is True and "torch" in manifest["versions"]
    assert len(manifest["edited"]) == 1 + 2 * N_LAYERS
    stored = load_file(out / "model.safetensors")
    assert manifest["added"] == ["lm_head.weight"] and manifest["tied"] == "untie"
    kinds = [set(manifest[kind]) for kind in ("edited", "unchanged", "added")]
    assert set.union(*kinds) == set(stored) and sum(map(len, kinds)) == len(stored)
    card = (out / "README.md").read_text()
    assert SAFETY_NOTICE in card and "remove safety training" in card
    assert "the source's own card" not in card
    for text in ("a direction", "7 sites", "7 tensors changed", "untied", "| 0.75 |", "**passed**"):
        assert text in card


@pytest.mark.parametrize("run_in", ("float32", "bfloat16"))
def test_bfloat16_weights_stay_bfloat16(tmp_path: Path, run_in: str) -> None:
    source = save_source(tmp_path / "source", dtype=torch.bfloat16)
    model = load_model(source, dtype=run_in)
    certificate = export_checkpoint(model, PLAN, tmp_path / "out", prompts=ROWS)
    assert certificate["dtype"] == "bfloat16"
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("source", "out"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    edited = set(json.loads((tmp_path / "out" / "interp_ablate.json").read_text())["edited"])
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in edited), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_other_weight_files_of_a_source_are_not_the_model(tmp_path: Path) -> None:
    """Mistral's folders hold consolidated.safetensors beside the files that transformers reads."""
    source = save_source(tmp_path / "source")
    save_file({"layers.0.wo": torch.ones(3)}, source / "consolidated.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, source / "zz.safetensors")
    export_checkpoint(load_model(source), PLAN, tmp_path / "out", prompts=ROWS)
    assert "layers.0.wo" not in load_file(tmp_path / "out" / "model.safetensors")
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    check_loads(tmp_path / "out", PLAN)


# --------------------------------------------------------------------------------- a model edited by hand


def test_no_plan_writes_the_weights_in_memory(tmp_path: Path, backend: str) -> None:
    model = make(backend=backend, tied=True)
    r = unit().float()
    with torch.no_grad():
        weight = model.tl.blocks[1].mlp.W_out if backend == "hooked" else None
        if weight is None:
            down = model.tl.original_model.model.layers[1].mlp.down_proj
            down.weight.sub_(r[:, None] * (r @ down.weight))
        else:
            weight.sub_((weight @ r)[..., None] * r)
    certificate = export_checkpoint(model, None, tmp_path / "out", prompts=ROWS)
    assert certificate["passed"] and certificate["max_abs_logit_effect_of_plan"] == 0
    assert "no plan" in (tmp_path / "out" / "README.md").read_text()
    check_loads(tmp_path / "out", Plan((Ablate(unit(), Site(1, "mlp_out")),)))


@pytest.mark.skipif(not HAS_HOOKED, reason="no HookedTransformer in TransformerLens 4")
def test_a_users_own_hooked_transformer_needs_its_config(tmp_path: Path) -> None:
    tl = shared(backend="hooked").tl
    with pytest.raises(ExportError, match=r"Model.wrap\(..., hf_config=...\)"):
        export_checkpoint(Model.wrap(tl), PLAN, tmp_path / "out", prompts=ROWS)
    wrapped = Model.wrap(tl, hf_config=tiny()[0].config)
    assert export_checkpoint(wrapped, PLAN, tmp_path / "out", prompts=ROWS)["passed"]


# --------------------------------------------------------------------------------- whole or nothing


def test_an_existing_place_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(ExportError, match=r"out exists: choose another"):
        export_checkpoint(shared(), PLAN, out, prompts=ROWS)
    assert [p.name for p in out.iterdir()] == ["mine"]
    with pytest.raises(ExportError, match=r"no export .*they would be lost"):
        export_checkpoint(shared(), PLAN, out, prompts=ROWS, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["mine"]
    (out / "interp_ablate.json").touch()  # an export of ours
    export_checkpoint(shared(), PLAN, out, prompts=ROWS, overwrite=True)
    assert not (out / "mine").exists() and (out / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("writer", ("write_weights", "write_side_files", "write_documents"))
@pytest.mark.parametrize(
    "error",
    (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ),
    ids=("OSError", "SafetensorError"),
)
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, error: Exception
) -> None:
    def full(*args: Any, **options: Any) -> None:
        folder = args[0] if writer == "write_documents" else args[-1]
        (folder / "half").touch()
        raise error

    monkeypatch.setattr(checkpoint, writer, full)
    with pytest.raises(ExportError, match=r"cannot write .*out: .*No space left on device"):
        export_checkpoint(shared(), PLAN, tmp_path / "out", prompts=ROWS)
    assert nothing_beside(tmp_path)


def test_a_full_disk_leaves_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "interp_ablate.json").touch()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_weights", full)
    with pytest.raises(ExportError, match=r"No space left"):
        export_checkpoint(shared(), PLAN, tmp_path / "out", prompts=ROWS, overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "interp_ablate.json"]


def test_any_other_failure_leaves_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "certify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(shared(), PLAN, tmp_path / "out", prompts=ROWS)
    assert nothing_beside(tmp_path)


def test_a_file_in_the_place_of_the_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(ExportError, match=r"cannot write beside|cannot write"):
            export_checkpoint(shared(), PLAN, out, prompts=ROWS)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_corrupt_source_is_named(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    model = load_model(source)
    (source / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ExportError, match=r"model.safetensors"):
        export_checkpoint(model, PLAN, tmp_path / "out", prompts=ROWS)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- certificates


def test_a_failed_certificate_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.LIMITS, "float32", (0.0, 1e-6, 1e-5))
    with pytest.raises(
        ExportError, match=r"not the hooked model: max_abs_logit_difference .*limit 0"
    ):
        export_checkpoint(shared(), PLAN, tmp_path / "out", prompts=ROWS)
    assert nothing_beside(tmp_path)


def spoiled(folder: Path, name: str, value: float) -> Path:
    """An export with one number of one tensor changed."""
    stored = load_file(folder / "model.safetensors")
    stored[name][0, 0] += value
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", (0.5, float("nan"), float("inf")))
def test_a_spoiled_export_fails(tmp_path: Path, value: float) -> None:
    model = shared()
    export_checkpoint(model, PLAN, tmp_path / "out", prompts=ROWS)
    assert certify(model, PLAN, tmp_path / "out", prompts=ROWS)["passed"]
    name = "model.layers.1.mlp.down_proj.weight"
    found = certify(model, PLAN, spoiled(tmp_path / "out", name, value), prompts=ROWS)
    assert not found["passed"] and "max_abs_logit_difference" in found["failed"]
    assert "residual_along_direction" in found["failed"]
    assert found["worst_site"].startswith(("blocks.1", "blocks.2"))


def test_the_export_of_another_plan_fails(tmp_path: Path) -> None:
    export_checkpoint(shared(), NO_EMBED, tmp_path / "out", prompts=ROWS)
    found = certify(shared(), PLAN, tmp_path / "out", prompts=ROWS)
    assert set(found["failed"]) == set(found["limits"])


def test_a_folder_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"transformers cannot load the export"):
        certify(shared(), PLAN, tmp_path, prompts=ROWS)


# --------------------------------------------------------------------------------- what must not be lost or missed


@pytest.mark.parametrize("where", ("source", "parent"))
def test_the_source_is_never_replaced(tmp_path: Path, where: str) -> None:
    source = save_source(tmp_path / "models" / "source")
    (tmp_path / "models" / "interp_ablate.json").touch()
    (source / "interp_ablate.json").touch()
    out = source if where == "source" else tmp_path / "models"
    before = sorted(tmp_path.rglob("*"))
    model = load_model(source)
    for plan in (PLAN, None):
        with pytest.raises(ExportError, match=r"holds the source"):
            export_checkpoint(model, plan, out, prompts=ROWS, overwrite=True)
    with pytest.raises(ExportError, match=r"holds the source"):
        export_lora(model, PLAN, out, prompts=ROWS, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_model_edited_since_it_was_loaded_is_not_its_folder(tmp_path: Path, dtype: Any) -> None:
    model = load_model(save_source(tmp_path / "source", dtype=dtype))
    with torch.no_grad():
        model.hf_state_dict()["model.layers.1.mlp.up_proj.weight"].mul_(1.02)
    with pytest.raises(ExportError, match=r"up_proj.weight in memory is not what"):
        export_checkpoint(model, PLAN, tmp_path / "out", prompts=ROWS)
    assert export_checkpoint(model, None, tmp_path / "out", prompts=ROWS)["passed"]


def test_mixed_dtypes_get_the_coarsest_limits(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", dtype=torch.bfloat16)
    stored = load_file(source / "model.safetensors")
    wide = {n: t.float() if "norm" in n else t for n, t in stored.items()}
    save_file(wide, source / "model.safetensors", metadata={"format": "pt"})
    certificate = export_checkpoint(load_model(source), PLAN, tmp_path / "out", prompts=ROWS)
    assert certificate["dtype"] == "bfloat16" and certificate["passed"]


def test_templates_come_along_and_secrets_do_not(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (source / ".env").write_text("TOKEN=secret")
    export_checkpoint(load_model(source), PLAN, tmp_path / "out", prompts=ROWS)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").is_file()
    assert not (tmp_path / "out" / ".env").exists()


# --------------------------------------------------------------------------------- what travels


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        *((n, True) for n in ("LICENSE.Apache-2.0", "UNLICENSE", "EULA.txt", "COPYRIGHT", "ACCEPTABLE_USE.md")),
        *((n, True) for n in ("LICENSE", "LICENCE.md", "NOTICE", "USE_POLICY.md", "GEMMA_TERMS.html")),
        *((n, False) for n in ("LICENSE.bin", "LICENSE.pt", "terms.gguf", "policy.safetensors", "eula.npz")),
        *((n, True) for n in ("LICENSES/MIT.txt", "licenses/a/b/LICENSE", "Legal/terms.md", "notices/third_party")),
        *((n, False) for n in ("licenses/model.safetensors", "other/MIT.txt", "legal/weights.bin", "notices/.env")),
    ],
)  # fmt: skip
def test_terms_of_use_travel_and_weights_of_their_name_do_not(name: str, yes: bool) -> None:
    assert travels(name) is yes


OTHERS = (
    "flax_model.msgpack", "rust_model.ot", "tf_model.h5", "model.onnx", "model-q4.gguf", "last.ckpt", "a.npz",
    "consolidated.00.pth", "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json",
    "adapter_model.safetensors", "weights.of-tomorrow", "legal/weights.bin", "original/model.pt",
)  # fmt: skip
TAKEN = (
    "LICENSE",
    "USE_POLICY.md",
    "modeling_own.py",
    "vocab.json",
    "additional_chat_templates/rag.jinja",
    "LICENSES/Apache-2.0.txt",
    "licenses/third_party/NOTICE",
)


@pytest.mark.parametrize("how", ("memory", "streamed under a plan", "never loaded"))
def test_nothing_unedited_travels_and_it_is_said(tmp_path: Path, how: str) -> None:
    source, out = save_source(tmp_path / "source"), tmp_path / "out"
    model = load_model(source)
    for name in (*OTHERS, *TAKEN, ".env"):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_bytes(b"{}")
    if how == "never loaded":
        export_folder(source, PLAN, out)
    else:
        export_checkpoint(model, PLAN if "plan" in how else None, out, prompts=ROWS)
    assert all((out / name).read_bytes() == b"{}" for name in TAKEN)
    assert not [name for name in (*OTHERS, ".env", "legal", "original") if (out / name).exists()]
    left_out = json.loads((out / "interp_ablate.json").read_text())["left_out"]
    assert sorted(left_out) == sorted([*OTHERS[:-2], "legal/", "original/"])
    assert "`flax_model.msgpack`" in (out / "README.md").read_text()
    plan = PLAN if how != "memory" else Plan()
    assert not audit(AuditSource.of_folder(source), plan, out).problems
    for name in OTHERS:
        (source / name).unlink()


def test_a_generation_config_that_cannot_be_saved(tmp_path: Path) -> None:
    """transformers loads it and refuses to save it: temperature without sampling."""
    hf, tokenizer = tiny()
    hf.generation_config = GenerationConfig(temperature=0.7, do_sample=False, eos_token_id=[2, 0])
    with pytest.raises(ValueError):
        hf.generation_config.save_pretrained(tmp_path / "refused")
    export_checkpoint(from_hf(hf, tokenizer), None, tmp_path / "out", prompts=ROWS)
    again = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (again.temperature, again.eos_token_id) == (0.7, [2, 0])


@pytest.mark.parametrize("kind", ("mixtral", "qwen3_moe"))
def test_experts_in_files_are_one_by_one_as_published(tmp_path: Path, kind: str) -> None:
    model = make(kind)
    plan = Plan((Ablate(unit(), model.writers),))
    export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in names if name.endswith("experts.down_proj")]
    manifest = json.loads((tmp_path / "out" / "interp_ablate.json").read_text())
    assert {*manifest["edited"], *manifest["unchanged"]} == set(names)
    assert audit(AuditSource.of_model(make(kind)), plan, tmp_path / "out").passed


# --------------------------------------------------------------------------------- cases that people report

BAND = Plan((Ablate(unit(), [Site(1, "attn_out"), Site(1, "mlp_out")]),))


@pytest.mark.parametrize("what", ("streamed", "loaded", "lora", "nothing edited"))
def test_a_tie_beside_two_tensors_is_refused_whatever_is_edited(tmp_path: Path, what: str) -> None:
    """transformers 5 takes both, transformers 4 the embedding twice: one folder, two models."""
    hf, tokenizer = tiny()
    hf.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    path = tmp_path / "two" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(ExportError, match=r"tied, but there is a lm_head.weight of its own"):
        if what == "streamed":
            export_folder(tmp_path / "two", BAND, tmp_path / "out")
        elif what == "nothing edited":
            export_folder(tmp_path / "two", Plan(), tmp_path / "out")
        elif what == "loaded":
            export_checkpoint(load_model(tmp_path / "two"), BAND, tmp_path / "out")
        else:
            export_lora(load_model(tmp_path / "two"), BAND, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))
def test_tokens_added_and_a_vocabulary_padded_beyond_the_tokenizer(
    tmp_path: Path, tied: bool
) -> None:
    hf, tokenizer = tiny(tied=tied)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new1>", "<new2>"]})
    hf.resize_token_embeddings(len(tokenizer) + 7)
    model = from_hf(hf, tokenizer)
    assert export_checkpoint(model, PLAN, tmp_path / "out", prompts=ROWS)["passed"]
    assert export_lora(model, PLAN, tmp_path / "lora", prompts=ROWS)["passed"]
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("<new2>")["input_ids"] == tokenizer("<new2>")["input_ids"]
    assert again.extra_special_tokens == tokenizer.extra_special_tokens
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == len(tokenizer) + 7 == loaded.lm_head.weight.shape[0]


@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))
def test_one_model_in_memory_in_every_format_after_every_other(tmp_path: Path, tied: bool) -> None:
    """Neither an export nor its certificate leaves a trace in the model: each pair, in both orders."""
    model = make(tied=tied)
    before = {name: tensor.clone() for name, tensor in model.hf_state_dict().items()}
    kinds: dict[str, Any] = {
        "c": lambda out: export_checkpoint(model, PLAN, out, prompts=ROWS[:1]),
        "l": lambda out: export_lora(model, PLAN, out, prompts=ROWS[:1]),
        "n": lambda out: export_checkpoint(model, None, out, prompts=ROWS[:1]),
    }
    numbers: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i, kind in enumerate("cclnllcnnc"):
        certificate = kinds[kind](tmp_path / f"{i}")
        numbers[kind].append(certificate["max_abs_logit_effect_of_plan"])
        assert certificate["passed"]
    assert all(len(set(values)) == 1 for values in numbers.values())
    after = model.hf_state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_layers_that_are_offloaded_are_refused_in_words(tmp_path: Path) -> None:
    """accelerate leaves them on the meta device, without values: nothing could be exported."""
    hf, tokenizer = tiny()
    hf.save_pretrained(tmp_path / "source")
    places: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head"),
        "cpu",
    )  # fmt: skip
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source",
        device_map={**places, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    with pytest.raises((ExportError, ModelError), match="offload"):
        export_checkpoint(from_hf(offloaded, tokenizer), None, tmp_path / "out", prompts=ROWS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ("tokenizer.json", "tokenizer_config.json"))
def test_a_broken_tokenizer_is_named(tmp_path: Path, file: str) -> None:
    source = save_source(tmp_path / "source")
    (source / file).write_text("{" * 100_000)
    with pytest.raises((ExportError, ModelError), match=file):
        export_folder(source, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()
