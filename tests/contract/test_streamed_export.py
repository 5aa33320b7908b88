"""Streamed exports: from folder to folder, tensor by tensor; the same bytes as from memory; killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DECLARED, N_LAYERS, folder_of, rows_of, shared, unit
from transformers import AutoModelForCausalLM

from interp_ablate import Ablate, Add, Plan, Site, everywhere, export_checkpoint, load_model
from interp_ablate.errors import ExportError, InterpAblateError
from interp_ablate.export.checkpoint import export_folder
from interp_ablate.storage.safetensors_reader import Checkpoint

PLAN = Plan((Ablate(unit(), everywhere(N_LAYERS)),))
ROWS = rows_of(9, 14)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def logits_of(folder: Path) -> list[torch.Tensor]:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [hf(torch.tensor([row])).logits[0] for row in ROWS]


@pytest.mark.parametrize("kind", DECLARED)
def test_a_streamed_folder_is_the_hooked_model(kind: str, tied: bool, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a", kind, tied=tied)
    model = shared(kind, tied=tied)
    plan = Plan((Ablate(unit(k=2), model.writers, strength=0.9),))
    export_folder(source, plan, tmp_path / "b")
    with model.applied(plan):
        hooked = [model.logits([row], keep=len(row))[0] for row in ROWS]
    for want, got, plain in zip(hooked, logits_of(tmp_path / "b"), logits_of(source)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert (want - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_streaming_and_certifying_write_the_same(tmp_path: Path, dtype: str) -> None:
    source = folder_of(tmp_path / "a", dtype=dtype)
    export_checkpoint(load_model(source), PLAN, tmp_path / "b", prompts=ROWS)
    export_folder(source, PLAN, tmp_path / "c")
    assert weights_of(tmp_path / "b") == weights_of(tmp_path / "c")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {path.name for path in (tmp_path / "c").iterdir()} == names
    assert json.loads((tmp_path / "c" / "certificate.json").read_text())["passed"] is None


def test_layout_metadata_and_what_is_untouched_stay(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a")
    (source / "LICENSE").write_text("free")
    plan = Plan((Ablate(unit(), Site(1, "mlp_out")),))
    manifest = export_folder(source, plan, tmp_path / "b")
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "b")
    assert [f.name for f in before.files] == [f.name for f in after.files] and len(before.files) > 2
    assert before.index == after.index
    assert [f.metadata for f in before.files] == [f.metadata for f in after.files]
    differ = {n for n in before.tensors if not torch.equal(before.read(n), after.read(n))}
    assert differ == {"model.layers.1.mlp.down_proj.weight"} == set(manifest["edited"])
    same = sum(
        x == y for x, y in zip(weights_of(source).values(), weights_of(tmp_path / "b").values())
    )
    assert same == len(before.files)  # all but one shard, and the index
    assert (tmp_path / "b" / "LICENSE").read_text() == "free"
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        one, two = (json.loads((p / name).read_text()) for p in (source, tmp_path / "b"))
        assert one == {key: value for key, value in two.items() if key in one}
        assert set(two) - set(one) <= {"rope_theta", "torch_dtype"}  # for transformers 4


def test_untied_and_with_new_biases(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a")
    plan = Plan(
        (Ablate(unit(), Site(0, "embed")), Add(unit(), Site(0, "resid_post"), coefficient=2))
    )
    export_folder(source, plan, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["mlp_bias"] is True
    tensors = {
        k: v for f in (tmp_path / "b").glob("*.safetensors") for k, v in load_file(f).items()
    }
    torch.testing.assert_close(tensors["model.layers.0.mlp.down_proj.bias"], 2 * unit().float())
    assert not tensors["model.layers.1.mlp.down_proj.bias"].any()
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == len(
        list(source.glob("*.safetensors"))
    )
    model = shared(tied=True)
    with model.applied(plan):
        for row, got in zip(ROWS, logits_of(tmp_path / "b")):
            want = model.logits([row], keep=len(row))[0]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_head_that_differs_from_its_tied_embedding_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a", tied=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ExportError, match=r"there is a lm_head\.weight of its own that differs"):
        export_folder(source, PLAN, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# --------------------------------------------------------------------------------- kills

KILLED = """
import os, sys
from pathlib import Path
import torch
from interp_ablate import Plan
from interp_ablate.export.checkpoint import export_folder
from interp_ablate.export import checkpoint

plan, source, out, countdown = Plan.load(sys.argv[1]), sys.argv[2], sys.argv[3], [int(sys.argv[4])]
def dying(function):
    def call(*args, **options):
        countdown[0] -= 1
        if countdown[0] < 0:
            os._exit(9)
        return function(*args, **options)
    return call
for name in ("edited_blocks", "edited_tensor", "write_documents", "write_source_files", "_new_tensor"):
    setattr(checkpoint, name, dying(getattr(checkpoint, name)))
export_folder(source, plan, out)
"""


def killed(plan: Path, source: Path, out: Path, after: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, plan, source, out, str(after)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, 9), done.stderr
    return done.returncode


@pytest.mark.parametrize("after", (0, 3, 7, 8, 9))
def test_killed_it_leaves_nothing_that_looks_finished_and_goes_on(
    tmp_path: Path, after: int
) -> None:
    source, out, file = folder_of(tmp_path / "a"), tmp_path / "b", tmp_path / "plan.json"
    PLAN.save(file)
    export_folder(source, PLAN, tmp_path / "whole")
    assert killed(file, source, out, after) == 9
    assert not out.exists()
    export_folder(source, PLAN, out)
    assert weights_of(out) == weights_of(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "plan.json", "whole"}


def test_another_plan_does_not_take_up_what_a_kill_left(tmp_path: Path) -> None:
    source, out, file = folder_of(tmp_path / "a"), tmp_path / "b", tmp_path / "plan.json"
    PLAN.save(file)
    assert killed(file, source, out, 7) == 9
    other = Plan((Ablate(unit(1), everywhere(N_LAYERS)),))
    export_folder(source, other, out)
    export_folder(source, other, tmp_path / "whole")
    assert weights_of(out) == weights_of(tmp_path / "whole")


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("spoil", "reason"),
    (
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (
            lambda f: _reconfigure(f, model_type="bert"),
            "has no tensor|transformers cannot load",
        ),
        (lambda f: _reconfigure(f, hidden_size=64), "d_model 32, the checkpoint 64"),
        (lambda f: _reconfigure(f, num_hidden_layers=2), "there are 2 layers"),
        (lambda f: next(iter(f.glob("*.safetensors"))).write_bytes(b"\\xff" * 9), "safetensors"),
        (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "no safetensors|safetensors"),
    ),
    ids=("no config", "broken config", "architecture", "d_model", "layers", "header", "no weights"),
)
def test_a_source_that_cannot_be_edited(tmp_path: Path, spoil: Any, reason: str) -> None:
    source = folder_of(tmp_path / "a")
    spoil(source)
    with pytest.raises(InterpAblateError, match=reason):
        export_folder(source, PLAN, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _reconfigure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a")
    index = source / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    name = next(iter(data["weight_map"]))
    data["weight_map"][name] = "../../etc/passwd"
    index.write_text(json.dumps(data))
    with pytest.raises(ExportError, match="passwd"):
        export_folder(source, PLAN, tmp_path / "b")


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.int8, torch.uint8))
def test_quantized_tensors_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    source = folder_of(tmp_path / "a")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {n: t.to(dtype) if "_proj.weight" in n else t for n, t in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"only float64, float32, bfloat16 and float16"):
        export_folder(source, PLAN, tmp_path / "b")
    _reconfigure(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ExportError, match=r"no .*_scale_inv|which is no part of that"):
        export_folder(source, PLAN, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_writer_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a")
    name = "model.layers.1.mlp.down_proj.weight"
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = tensors[name].T.contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"shape \(48, 32\); a linear writer"):
        export_folder(source, PLAN, tmp_path / "b")
