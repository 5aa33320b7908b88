"""Models of bitsandbytes: measured as they run, against transformers' own dequantized model; exported from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import logging
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.family_models import build
from support.hand_hooked import blocks_of, hand_hooked, left_along, passed, watching
from support.tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from interp_ablate import Plan
from interp_ablate.activations.collection import collect
from interp_ablate.cli.main import main
from interp_ablate.edits.kinds import Ablate
from interp_ablate.errors import ExportError, InterpAblateError, ModelError, RunError
from interp_ablate.evaluation.float32_kl import first_token_kl_floor
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.export.lora import export_lora
from interp_ablate.export.preflight import check_model_exports, check_source_exports
from interp_ablate.models import quantized_modules
from interp_ablate.models.fingerprint import ModelFingerprint
from interp_ablate.models.load import from_hf, load_model
from interp_ablate.models.model import Model
from interp_ablate.models.module_calls import recording
from interp_ablate.models.quantized_modules import packed_modules, plain_weight
from interp_ablate.models.sources import resolve
from interp_ablate.training.trainable_model import load_base

NEEDED = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
ROWS = [[*range(5, 17)], [*range(5, 14), 99, 98], [3, 4, 5]]
UNIT = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(7)), dim=0)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bit": {"load_in_8bit": True},
}  # fmt: skip


@cache
def folders(kind: str = "nf4", model_type: str = "llama", **more: Any) -> tuple[Path, Path]:
    """A folder of plain weights, and the same quantized by transformers."""
    from transformers import BitsAndBytesConfig

    place = Path(mkdtemp())
    plain, packed = place / "plain", place / "packed"
    build(model_type).save_pretrained(plain)
    config = BitsAndBytesConfig(**{**KINDS[kind], **dict(more)})
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(packed)
    for folder in (plain, packed):
        make_tokenizer().save_pretrained(folder)
    return plain, packed


def dequantized(folder: Path) -> Any:
    """The plain model that transformers makes of a quantized folder."""
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .dequantize(torch.float32)
        .eval()
    )


def everywhere(model: Model) -> Plan:
    return Plan((Ablate(UNIT.double(), model.writers),))


@NEEDED
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_transformers_dequantizes(kind: str) -> None:
    model = load_model(folders(kind)[1])
    wanted = dequantized(folders(kind)[1])
    packed = packed_modules(model.tl)
    assert len(packed) == 4 * 7
    for name, module in packed.items():
        assert torch.equal(plain_weight(module), wanted.get_parameter(f"{name}.weight"))


@NEEDED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ("llama", "gemma2", "gpt2", "olmoe", "granite"))
def test_an_ablation_everywhere_is_that_of_the_dequantized_model(
    kind: str, model_type: str
) -> None:
    """By hooks on the codes, against a model of plain weights that is hooked by hand."""
    if model_type != "llama" and kind in ("nf4 twice", "fp4"):
        pytest.skip("the kinds of 4 bit differ in their numbers only")
    plain, packed = folders(kind, model_type)
    model, wanted = load_model(packed), dequantized(packed)
    assert model.backend == "hf" and packed_modules(model.tl)
    assert model.writers == load_model(plain, backend="hf").writers
    blocks = blocks_of(wanted, ROWS[0])
    with model.applied(everywhere(model)), watching(blocks_of(model.tl.hf, ROWS[0])) as seen:
        got = [model.logits([row])[0] for row in ROWS]
    assert max(float(((x @ UNIT).abs() / x.norm(dim=-1)).max()) for x in seen) < 1e-5
    for row, logits in zip(ROWS, got):
        want, before = hand_hooked(wanted, blocks, UNIT, row)[0], passed(wanted, row)[0]
        # in 8 bit every input of a linear map is rounded too, without any plan as well
        unedited = model.logits([row])[0]
        assert logits.shape == unedited.shape == want[-1:].shape
        rounding = float((unedited - before[-1:]).abs().max())
        error = float((logits - want[-1:]).abs().max())
        assert error < max(1e-4 * float(before.std()), 2 * rounding)
        assert float((want - before)[-1:].abs().max()) > 3 * error  # the plan does something


@NEEDED
@pytest.mark.parametrize("kind", ("nf4", "8 bit"))
def test_activations_generation_and_the_floor_of_the_kl(kind: str) -> None:
    model = load_model(folders(kind)[1])
    wanted = from_hf(dequantized(folders(kind)[1]), model.tokenizer, backend="hf")
    got, want = (collect(m, ROWS, positions=(-1,)).values for m in (model, wanted))
    assert float((got - want).norm() / want.norm()) < (0.05 if kind == "8 bit" else 1e-4)
    assert len(model.generate(ROWS, max_new_tokens=3)) == 3
    half = load_model(folders(kind)[1], dtype="bfloat16")
    before = half.logits(ROWS)
    floor, dtype = first_token_kl_floor(ModelOutputs(half, ROWS))
    assert dtype == "float32" and floor < 1e-4
    assert torch.equal(half.logits(ROWS), before)


@NEEDED
def test_a_norm_preserving_ablation_reads_the_weight_behind_the_codes() -> None:
    model = load_model(folders()[1])
    wanted = from_hf(dequantized(folders()[1]), model.tokenizer, backend="hf")
    plan = Plan((Ablate(UNIT.double(), "blocks.1.hook_mlp_out", norm_preserving=True),))
    with model.applied(plan), wanted.applied(plan):
        torch.testing.assert_close(model.logits(ROWS), wanted.logits(ROWS), rtol=1e-4, atol=1e-4)


@NEEDED
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_codes_that_are_stored_as_bfloat16_are_no_weights(dtype: str) -> None:
    """As FSDP wants them: a cast of such a parameter would change every weight."""
    as_bytes, as_floats = (
        load_model(folders(**more)[1], dtype=dtype)
        for more in ({}, {"bnb_4bit_quant_storage": "bfloat16"})
    )
    assert next(iter(packed_modules(as_floats.tl).values())).weight.dtype == torch.bfloat16
    assert torch.equal(as_bytes.logits(ROWS), as_floats.logits(ROWS))
    assert as_bytes.writers == as_floats.writers
    got, want = (first_token_kl_floor(ModelOutputs(m, ROWS)) for m in (as_floats, as_bytes))
    assert got == want
    assert torch.equal(as_bytes.logits(ROWS), as_floats.logits(ROWS))


@NEEDED
def test_weights_keep_their_layout_in_every_pass() -> None:
    """Where a processor multiplies bfloat16, bitsandbytes would pack them anew and compute in bfloat16."""
    model = load_model(folders()[1])
    module = next(iter(packed_modules(model.tl).values()))
    before, weight = module.weight.data.clone(), plain_weight(module)
    with recording({"it": module}) as calls:
        model.logits(ROWS[:1])
    [call] = calls["it"]
    assert torch.equal(module.weight.data, before)
    torch.testing.assert_close(call.output, call.args[0] @ weight.T, rtol=1e-5, atol=1e-6)


@NEEDED
def test_a_fingerprint_knows_the_scales() -> None:
    model = load_model(folders()[1])
    fingerprint = ModelFingerprint(model.tl.hf)
    before = fingerprint.weights
    assert before == ModelFingerprint(load_model(folders()[1]).tl.hf).weights
    next(iter(packed_modules(model.tl).values())).weight.quant_state.absmax.mul_(1.1)
    assert fingerprint.weights != before


@NEEDED
@pytest.mark.parametrize("kind", ("nf4", "8 bit"))
def test_every_export_names_the_other_folder(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, packed = folders(kind)
    model, out = load_model(packed), tmp_path / "out"
    plan = everywhere(model)
    said = "before quantization.*export --source UNQUANTIZED"
    for export in (
        lambda: export_checkpoint(model, plan, out, prompts=ROWS),
        lambda: export_lora(model, plan, out, prompts=ROWS),
        lambda: export_folder(packed, plan, out),
        lambda: check_model_exports(model, out),
        lambda: check_source_exports(resolve(packed), out),
    ):
        with pytest.raises(ExportError, match=said):
            export()
    plan.save(tmp_path / "plan.json")
    options = ["--plan", str(tmp_path / "plan.json"), "--out", str(out)]
    for which in ("--model", "--source"):
        assert main(["--quiet", "export", which, str(packed), *options]) == 2
        error = capsys.readouterr().err
        assert "--source UNQUANTIZED" in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert main(["--quiet", "export", "--source", str(plain), *options]) == 0
    assert left_along(out, UNIT, ROWS) < 1e-5
    assert load_file(out / "model.safetensors").keys() >= load_file(plain / "model.safetensors").keys()  # fmt: skip


@NEEDED
def test_what_reads_weights_elsewhere_is_refused_in_words() -> None:
    _, packed = folders()
    for backend in ("bridge", "hooked"):
        with pytest.raises(ModelError, match=r"is quantized.*backend='hf'"):
            load_model(packed, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"is quantized.*Train the model before quantization"):
        load_base(packed)


@NEEDED
def test_a_model_in_memory() -> None:
    hf = AutoModelForCausalLM.from_pretrained(folders()[1], dtype=torch.float32)
    assert from_hf(hf, make_tokenizer()).writers == load_model(folders()[1]).writers
    used = AutoModelForCausalLM.from_pretrained(folders()[1], dtype=torch.float32).eval()
    module = used.model.layers[0].self_attn.q_proj
    module(torch.ones(1, 3, 64))
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # where the processor multiplies bfloat16
        with pytest.raises(ModelError, match=r"has packed .* anew"):
            from_hf(used, make_tokenizer())


@NEEDED
def test_no_line_for_every_call(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(folders("8 bit")[1]).logits(ROWS)
    assert not [record for record in caplog.records if "MatMul8bitLt" in record.getMessage()]


@pytest.mark.parametrize("method", ("gptq", "hqq", "bitsandbytes"))
def test_what_cannot_be_loaded_says_what_to_do(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True, "load_in_8bit": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(quantized_modules.importlib.util, "find_spec", lambda name: None)
    wanted = (
        r"pip install 'interp-ablate\[quantized\]'"
        if method == "bitsandbytes"
        else rf"is quantized \({method}\).*the weights before quantization"
    )
    with pytest.raises(ModelError, match=wanted):
        load_model(tmp_path)
    hf = build("llama")
    hf.config.quantization_config = config["quantization_config"]
    with pytest.raises(InterpAblateError, match=wanted):
        from_hf(hf, make_tokenizer())
