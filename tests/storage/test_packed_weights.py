"""Packed weights: what the formats' own libraries make of the files that they packed, bit by bit; the rest in words."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from support.packed import KINDS, gptq, int_quantized, pack_quantized, words

from interp_ablate.errors import ExportError
from interp_ablate.storage.dequantized_checkpoint import DequantizedCheckpoint, dequantized
from interp_ablate.storage.packed_weights import unpacked
from interp_ablate.storage.safetensors_reader import Checkpoint

# By library and version: a file that it packed (zlib, base85), and the digest of the numbers that it unpacks.
BY_LIBRARIES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("packed_by_libraries.json").read_text(encoding="utf-8")
)
WEIGHT = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).half()


def stored(place: Path, parts: dict[str, torch.Tensor], about: Any) -> DequantizedCheckpoint:
    save_file({f"a.{end}": part for end, part in parts.items()}, place / "model.safetensors")
    return dequantized(Checkpoint.open(place), about)


@pytest.mark.parametrize("case", BY_LIBRARIES)
def test_numbers_are_those_of_the_library(case: str, tmp_path: Path) -> None:
    made = BY_LIBRARIES[case]
    (tmp_path / "model.safetensors").write_bytes(zlib.decompress(base64.b85decode(made["file"])))
    checkpoint = dequantized(Checkpoint.open(tmp_path), made["quantization_config"])
    assert [*checkpoint.tensors] == ["l.weight"]
    dtype, shape = checkpoint.describe("l.weight")
    assert (str(dtype), [*shape]) == (f"torch.{made['dtype']}", made["shape"])
    read = checkpoint.read("l.weight")
    assert (read.dtype, read.shape) == (dtype, shape)
    assert hashlib.sha256(read.view(torch.uint8).numpy().tobytes()).hexdigest() == made["sha256"]
    blocks = [block for _, block in checkpoint.blocks("l.weight", max_bytes=100)]
    assert len(blocks) > 1 and torch.equal(torch.cat(blocks), read)


def test_a_zero_point_of_nothing_borrows_from_the_next_in_a_word(tmp_path: Path) -> None:
    """The first version of GPTQ takes one off every zero point of a word at once: 0 is stored as the highest code."""
    for case in (case for case in BY_LIBRARIES if "GPTQ" in case and "zero points" in case):
        file = load(zlib.decompress(base64.b85decode(BY_LIBRARIES[case]["file"])))
        bits = BY_LIBRARIES[case]["quantization_config"]["bits"]
        assert (
            unpacked(file["l.qzeros"], bits) == 2**bits - 1
        ).any()  # the library's digest is of such
    weight = WEIGHT.abs()
    weight[::2] *= -1  # every other output has its zero point at one end
    parts, numbers = gptq(sym=False)(weight)
    about = {**KINDS["gptq"][0], "sym": False}
    assert (unpacked(parts["qzeros"], 4) == 15).any()
    assert torch.equal(stored(tmp_path, parts, about).read("a.weight"), numbers)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_words(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpacked(words(codes, bits), bits).long(), codes)


def test_sizes_that_are_no_multiple_of_a_word(tmp_path: Path) -> None:
    parts, numbers = pack_quantized(sym=False, size=37)(WEIGHT[:13, :37])
    got = stored(tmp_path, parts, KINDS["pack-quantized of zero points"][0]).read("a.weight")
    assert torch.equal(got, numbers)


def test_bits_of_some_modules_by_pattern(tmp_path: Path) -> None:
    parts, numbers = gptq(bits=8)(WEIGHT)
    about = {**KINDS["gptq"][0], "dynamic": {"+:.*a.*": {"bits": 8}, "-:b": {}}}
    assert torch.equal(stored(tmp_path, parts, about).read("a.weight"), numbers)


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, int_quantized(WEIGHT)[0], KINDS["int-quantized"][0])
    assert [*checkpoint.tensors] == ["a.weight"]
    assert {*checkpoint.parts["a.weight"]} == {"a.weight", "a.weight_scale", "a.input_scale"}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another layout": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "other bits": ("gptq", {"bits": 8}, "bits 4, and read here is 8"),
    "3 bits": ("gptq", {"bits": 3, "dynamic": {"a": {"bits": 3}}}, "bits 3"),
    "rotated": ("gptq", {"rotation": "hadamard"}, "rotation 'hadamard'"),
    "gemv": ("awq", {"version": "GEMV"}, "version 'gemv'"),
    "gemv by another key": ("awq", {"version": None, "checkpoint_format": "gemv_fast"}, "gemv_fast"),
    "nvfp4": ("pack-quantized", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack"),
    "one of several": ("pack-quantized", {"format": "mixed-precision", "config_groups": {"a": {"format": "marlin-24", "weights": {"num_bits": 4}}}}, "format 'marlin-24'"),
    "sparse": ("pack-quantized", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "a transform": ("pack-quantized", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    "a cache": ("float-quantized", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "bits that do not fit": ("pack-quantized", {"config_groups": {"a": {"weights": {"num_bits": 2}}}}, "do not fit each other"),
    "values of another kind": ("pack-quantized", {"config_groups": [3]}, "none of that"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_variants_are_refused_before_codes_are_read(case: str, tmp_path: Path) -> None:
    kind, changes, said = REFUSED[case]
    about, packer = KINDS[kind]
    parts = packer(WEIGHT)[0]
    if case == "3 bits":
        parts["qweight"] = parts["qweight"][:9].clone()
    with pytest.raises(ExportError, match=said):
        stored(tmp_path, parts, {**about, **changes})


@pytest.mark.parametrize(
    ("kind", "end", "change"),
    (
        ("gptq", "scales", None),
        ("gptq", "qzeros", lambda t: t[:1].clone()),
        ("gptq", "g_idx", lambda t: t.float()),
        ("awq", "scales", lambda t: t[:, :32].clone()),
        ("awq", "qweight", lambda t: t.short()),
        ("pack-quantized", "weight_shape", lambda t: t * 1000),
        ("pack-quantized", "weight_scale", lambda t: t[:, :2].clone().repeat(1, 32)),
        ("pack-quantized of zero points", "weight_g_idx", lambda t: t[1:].clone()),
        ("pack-quantized of zero points", "weight_zero_point", lambda t: t[1:].clone()),
        ("pack-quantized of zero points", "weight_zero_point", None),
        ("float-quantized", "weight_scale", lambda t: t[:, 0].clone()),
    ),
)
def test_parts_that_do_not_fit_are_named(kind: str, end: str, change: Any, tmp_path: Path) -> None:
    about, packer = KINDS[kind]
    parts = packer(WEIGHT)[0]
    part = parts.pop(end)
    if change is not None:
        parts[end] = change(part)
    with pytest.raises(ExportError, match=r"a\.(q?weight|scales)"):
        stored(tmp_path, parts, about)


def test_codes_beside_their_weight(tmp_path: Path) -> None:
    parts = {**gptq()(WEIGHT)[0], "weight": WEIGHT}
    with pytest.raises(ExportError, match=r"a\.weight is stored as"):
        stored(tmp_path, parts, KINDS["gptq"][0])


def test_groups_and_zero_points_that_cannot_be(tmp_path: Path) -> None:
    parts, _ = gptq(sym=False)(WEIGHT)
    with pytest.raises(ExportError, match=r"a\.qweight has zero points .* symmetric"):
        stored(tmp_path, parts, KINDS["gptq"][0]).read("a.weight")
    parts["g_idx"] += 1
    about = {**KINDS["gptq"][0], "sym": False}
    with pytest.raises(ExportError, match=r"a\.qweight has a g_idx .* other groups than its 3"):
        stored(tmp_path, parts, about).read("a.weight")
