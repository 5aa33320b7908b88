"""Tensor files: byte equality with the safetensors library, hostile headers, kills and full disks."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage import safetensors_writer as tensor_copy
from interp_ablate.storage.output_folder import JOURNAL, streamed_folder
from interp_ablate.storage.safetensors_header import read_tensor_file
from interp_ablate.storage.safetensors_reader import INDEX, SINGLE, Checkpoint, TensorSource
from interp_ablate.storage.safetensors_writer import NewTensor, copy_checkpoint

ROOT = Path(__file__).parents[2]
METADATA = {"format": "pt, ü"}  # one key: the library writes several in a random order
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
    *(torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz),
    torch.float8_e5m2fnuz,
]


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bytes of a dtype; any are valid, NaN among them, except for bool."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return data.to(torch.uint8).view(dtype).reshape(shape)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def two_shards(folder: Path) -> dict[str, Tensor]:
    """A sharded folder with files beside it that are not the model."""
    folder.mkdir()
    first = {
        "embed": random_tensor(torch.bfloat16, 37, 8, seed=1),
        "a.up": random_tensor(torch.bfloat16, 6, 8, seed=2),
        "a.down": random_tensor(torch.bfloat16, 8, 6, seed=3),
        "a.gate": random_tensor(torch.float32, 5, seed=4),
    }
    second = {
        "b.up": random_tensor(torch.bfloat16, 6, 8, seed=5),
        "b.down": random_tensor(torch.bfloat16, 8, 6, seed=6),
        "b.mask": random_tensor(torch.bool, 3, seed=7),
    }
    for name, tensors in zip(SHARDS, (first, second)):
        save_file(tensors, folder / name, METADATA)
    save_file({"embed": torch.zeros(2)}, folder / "consolidated.safetensors")
    save_file({"lora_A": torch.zeros(2)}, folder / "adapter_model.safetensors")
    weight_map = dict.fromkeys(first, SHARDS[0]) | dict.fromkeys(second, SHARDS[1])
    values = {**first, **second}
    size = sum(len(raw(tensor)) for tensor in values.values())
    index = {
        "metadata": {"total_size": size, "total_parameters": 500, "made_by": "a test"},
        "weight_map": weight_map,
        "more": [1, 2],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=4))
    return values


def write_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def at(begin: int, end: int, *, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def doubled(source: TensorSource) -> Iterator[Tensor]:
    for _, block in source.blocks(max_bytes=40):
        yield (block.float() * 2).to(block.dtype)


def run_copy(
    source: Checkpoint | Path, out: Path, *, fingerprint: str = "plan", **options: Any
) -> Checkpoint:
    opened = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    overwrite = options.pop("overwrite", False)
    with streamed_folder(
        out, source=opened, fingerprint=fingerprint, overwrite=overwrite
    ) as folder:
        return copy_checkpoint(opened, folder, **{"edit": {}, **options})


def beside(folder: Path) -> Path:
    """A place to write to that is not inside a source."""
    return folder.with_name(f"{folder.name}-out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {
        "matrix": random_tensor(dtype, 5, 3),
        "scalar": random_tensor(dtype),
        "no rows": random_tensor(dtype, 0, 3),
        "no columns": random_tensor(dtype, 3, 0),
        "cube": random_tensor(dtype, 2, 3, 4, seed=1),
    }
    save_file(values, tmp_path / SINGLE, METADATA)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.index is None and checkpoint.files[0].metadata == METADATA
    assert set(checkpoint.tensors) == set(values)
    for name, value in values.items():
        info, read = checkpoint.tensors[name], checkpoint.read(name)
        assert (read.dtype, read.shape, raw(read)) == (dtype, value.shape, raw(value))
        assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(value.shape), len(raw(value)))
        blocks = [block for _, block in checkpoint.blocks(name, max_bytes=7)]
        joined = torch.cat(blocks) if value.ndim else blocks[0]
        assert joined.shape == value.shape and raw(joined) == raw(value)
    run_copy(checkpoint, beside(tmp_path), edit=dict.fromkeys(values, lambda s: [s.read()]))
    assert (beside(tmp_path) / SINGLE).read_bytes() == (tmp_path / SINGLE).read_bytes()


@pytest.mark.parametrize(
    "name, dtype, items",
    [("F8_E8M0", "float8_e8m0fnu", 4), ("F4", "float4_e2m1fn_x2", 2)],
)
def test_small_floats_of_a_newer_torch(tmp_path: Path, name: str, dtype: str, items: int) -> None:
    if dtype not in vars(torch):
        pytest.skip("this torch does not have it")
    write_file(
        tmp_path / SINGLE, {"a": at(0, 3 * items, dtype=name, shape=[3, 4])}, bytes(3 * items)
    )
    assert Checkpoint.open(tmp_path).tensors["a"].shape == (3, items)
    read = Checkpoint.open(tmp_path).read("a")
    try:
        theirs = load_file(tmp_path / SINGLE)["a"]
    except SafetensorError:  # an older library
        return
    assert read.dtype == theirs.dtype and read.shape == theirs.shape
    new = NewTensor.copy_of("b", Checkpoint.open(tmp_path).tensors["a"])
    run_copy(tmp_path, beside(tmp_path), extra=[new])
    assert load_file(beside(tmp_path) / SINGLE)["b"].shape == theirs.shape


def test_blocks_are_rows_of_at_most_the_bytes_asked_for(tmp_path: Path) -> None:
    value = random_tensor(torch.float16, 10, 4)  # 8 bytes a row
    save_file({"w": value, "pad": torch.zeros(3, dtype=torch.uint8)}, tmp_path / SINGLE)
    source = Checkpoint.open(tmp_path).source("w")
    for _ in range(2):  # any number of passes
        found = list(source.blocks(max_bytes=31))
        assert [rows for rows, _ in found] == [slice(i, min(i + 3, 10)) for i in range(0, 10, 3)]
        assert all(raw(block) == raw(value[rows]) for rows, block in found)
    assert [len(block) for _, block in source.blocks(max_bytes=1)] == [1] * 10
    first, second = source.read(), source.read()
    assert first.data_ptr() != second.data_ptr()


def test_a_sharded_folder_is_its_index(tmp_path: Path) -> None:
    values = two_shards(tmp_path / "in")
    checkpoint = Checkpoint.open(tmp_path / "in")
    assert [file.name for file in checkpoint.files] == list(SHARDS)
    assert set(checkpoint.tensors) == set(values)
    assert all(raw(checkpoint.read(name)) == raw(value) for name, value in values.items())
    with pytest.raises(ExportError, match=r"no tensor 'a\.dwn'.*did you mean 'a\.down'"):
        checkpoint.read("a.dwn")


def test_the_hub_cache_is_made_of_links(tmp_path: Path) -> None:
    values = two_shards(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in (*SHARDS, INDEX):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    checkpoint = run_copy(snapshot, tmp_path / "out")
    assert set(checkpoint.tensors) == set(values)
    for name in (*SHARDS, INDEX):
        copied = tmp_path / "out" / name
        assert not copied.is_symlink()
        assert copied.read_bytes() == (tmp_path / "blobs" / name).read_bytes()


def test_the_fingerprint_is_new_for_new_contents(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    before = Checkpoint.open(tmp_path / "in").fingerprint
    assert Checkpoint.open(tmp_path / "in").fingerprint == before
    os.utime(tmp_path / "in" / SHARDS[1], ns=(1, 1))
    assert Checkpoint.open(tmp_path / "in").fingerprint != before


# --------------------------------------------------------------------------------- headers


class Malformed(NamedTuple):
    says: str
    header: Any
    data: bytes = b""
    length: int | None = None
    only_here: bool = False  # the library accepts it


NEST = b'{"a":' + b"[" * 200_000
MALFORMED = {
    "header longer than the file": Malformed("says its header has 50 bytes", {}, length=50),
    "header longer than allowed": Malformed("at most 100000000", {}, length=100_000_001),
    "absurd length": Malformed("header has 18446744073709551615", {}, length=2**64 - 1),
    "empty header": Malformed("not readable JSON", b""),
    "not JSON": Malformed("not readable JSON", b"hello"),
    "not UTF-8": Malformed("not readable JSON", b'{"a\xff":1}'),
    "UTF-16": Malformed("not readable JSON", '{"a":1}'.encode("utf-16")),
    "half a surrogate": Malformed("not readable JSON", b'{"\\ud800":' + b"{}}"),
    "byte order mark": Malformed("not readable JSON", b"\xef\xbb\xbf{}"),
    "NaN": Malformed("NaN", b'{"a":NaN}'),
    "endless nesting": Malformed("not readable JSON", NEST),
    "a number without end": Malformed("not readable JSON", b'{"a":' + b"9" * 5000 + b"}"),
    "a list": Malformed("a JSON list", b"[]"),
    "zeros after it": Malformed("not readable JSON", b"{}\0\0"),
    "a name twice": Malformed(
        "'a' is there twice",
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        only_here=True,
    ),
    "entry is a list": Malformed("not an object", {"a": ["U8", [1], [0, 1]]}, b"x", None, True),
    "entry is text": Malformed("not an object", {"a": "U8"}),
    "metadata with a number": Malformed("__metadata__", {"__metadata__": {"a": 1}}),
    "metadata as a list": Malformed("__metadata__", {"__metadata__": []}),
    "unknown dtype": Malformed("'Q8'", {"a": at(0, 1, dtype="Q8")}, b"x"),
    "dtype torch has not": Malformed(
        "F6_E2M3", {"a": at(0, 3, dtype="F6_E2M3", shape=[4])}, b"xxx"
    ),
    "no dtype": Malformed("None", {"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"),
    "dtype is a list": Malformed("dtype", {"a": at(0, 1) | {"dtype": ["U8"]}}, b"x"),
    "no shape": Malformed("shape of 'a'", {"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"),
    "negative size": Malformed("shape of 'a'", {"a": at(0, 1, shape=[-1, -1])}, b"x"),
    "size is a fraction": Malformed("shape of 'a'", {"a": at(0, 1, shape=[1.0])}, b"x"),
    "size is a truth": Malformed("shape of 'a'", {"a": at(0, 1, shape=[True])}, b"x"),
    "size beyond counting": Malformed("shape of 'a'", {"a": at(0, 0, shape=[2**63, 0])}),
    "product beyond counting": Malformed("memory", {"a": at(0, 0, shape=[2**40, 2**40, 0])}),
    "no offsets": Malformed("data_offsets of 'a'", {"a": {"dtype": "U8", "shape": [1]}}, b"x"),
    "three offsets": Malformed("data_offsets", {"a": at(0, 1) | {"data_offsets": [0, 1, 1]}}, b"x"),
    "offsets backwards": Malformed("data_offsets", {"a": at(2, 0, shape=[2])}, b"xx"),
    "negative offset": Malformed("data_offsets", {"a": at(-1, 0, shape=[1])}, b"x"),
    "too few bytes for the shape": Malformed(
        "needs 8", {"a": at(0, 4, dtype="F32", shape=[2])}, b"abcd"
    ),
    "a terabyte in four bytes": Malformed(
        "needs 1099511627776", {"a": at(0, 4, shape=[2**40])}, b"abcd"
    ),
    "odd F4": Malformed("even", {"a": at(0, 2, dtype="F4", shape=[3])}, b"xx"),
    "overlap": Malformed("'b' overlaps 'a'", {"a": at(0, 2), "b": at(1, 3)}, b"xyz"),
    "the same bytes twice": Malformed("overlaps", {"a": at(0, 2), "b": at(0, 2)}, b"xy"),
    "hole": Malformed("'b' leaves unused bytes", {"a": at(0, 1), "b": at(2, 3)}, b"xyz"),
    "hole at the start": Malformed("'a' leaves unused", {"a": at(1, 2)}, b"xy"),
    "cut short": Malformed("3 of 76 bytes", {"a": at(0, 8)}, b"12345"),
    "beyond the end": Malformed("missing", {"a": at(0, 2**40)}, b"12345"),
    "more than described": Malformed("2 bytes at its end", {"a": at(0, 1)}, b"xyz"),
}


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_header_is_a_clear_error(tmp_path: Path, case: Malformed) -> None:
    path = write_file(tmp_path / SINGLE, case.header, case.data, case.length)
    with pytest.raises(ExportError, match=SINGLE) as error:
        Checkpoint.open(tmp_path)
    assert case.says in str(error.value) and len(str(error.value)) < 700
    try:
        load_file(path)
        accepted = True
    except (SafetensorError, TypeError):
        accepted = False
    assert accepted == case.only_here


def test_cut_short_says_how_many_bytes_of_the_file_are_missing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-150])
    with pytest.raises(ExportError, match=f"150 of {len(whole)} bytes are missing at the end"):
        Checkpoint.open(tmp_path)
    for length in (0, 7, 8, 20):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(ExportError, match="not a whole safetensors file"):
            Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "header, data",
    [
        (b"{}", b""),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}  \n\t', b"x"),
        (b'  {"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        ({"a": at(0, 1) | {"more": 3}}, b"x"),
        ({"b": at(1, 2), "e": at(1, 1, shape=[0, 2]), "a": at(0, 1)}, b"xy"),
        ({"a": at(0, 1), "e": at(0, 0), "f": at(1, 1)}, b"x"),
        ({"a": at(0, 1), "w": at(1, 5, dtype="F32", shape=[1])}, b"xabcd"),
    ],
    ids=["nothing", "spaces after", "no metadata", "more keys", "any order", "empty", "unaligned"],
)
def test_what_the_library_accepts_is_accepted(tmp_path: Path, header: Any, data: bytes) -> None:
    path = write_file(tmp_path / SINGLE, header, data)
    theirs, ours = load_file(path), Checkpoint.open(tmp_path)
    assert set(ours.tensors) == set(theirs)
    for name, value in theirs.items():
        assert ours.read(name).shape == value.shape and raw(ours.read(name)) == raw(value)
    run_copy(ours, beside(tmp_path), edit=dict.fromkeys(theirs, lambda source: [source.read()]))
    assert (beside(tmp_path) / SINGLE).read_bytes() == path.read_bytes()


def test_a_corrupted_header_never_reads_as_something_else(tmp_path: Path) -> None:
    values = {"a": random_tensor(torch.uint8, 12), "b": random_tensor(torch.float16, 3, 2)}
    path = tmp_path / SINGLE
    save_file(values, path, METADATA)
    whole, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2))):
            place = chance.randrange(int.from_bytes(whole[:8], "little") + 8)
            changed[place] = chance.choice((chance.randrange(256), *b'0123456789{}[]",:'))
        path.write_bytes(changed)
        try:
            ours = read_tensor_file(path)
        except ExportError:
            refused += 1
            continue
        theirs = load_file(path)  # raises where ours is too lenient
        assert {name: tuple(value.shape) for name, value in theirs.items()} == {
            name: info.shape for name, info in ours.tensors.items()
        }
    assert 100 < refused < 600


# --------------------------------------------------------------------------------- the index


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "..",
        "",
        "config.json",
        "a\0.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_names_in_the_index_stay_in_the_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "in"
    two_shards(folder)
    (folder / "sub").mkdir()
    for place in (tmp_path / "secret.safetensors", folder / "sub" / "model.safetensors"):
        save_file({"embed": torch.zeros(1)}, place)
    change_index(folder, lambda index: index["weight_map"].update({"embed": name}))
    with pytest.raises(ExportError, match="only plain names"):
        Checkpoint.open(folder)


INDEX_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no map": ("no weight_map", lambda index: index.pop("weight_map")),
    "empty map": ("no weight_map", lambda index: index.update(weight_map={})),
    "map is a list": ("no weight_map", lambda index: index.update(weight_map=["a"])),
    "tensor nowhere": (
        "'ghost'.*no shard has it",
        lambda index: index["weight_map"].update(ghost=SHARDS[0]),
    ),
    "tensor elsewhere": (
        f"'embed' into {SHARDS[1]}, but it is in {SHARDS[0]}",
        lambda index: index["weight_map"].update(embed=SHARDS[1]),
    ),
    "tensor unnamed": ("does not name 'embed'", lambda index: index["weight_map"].pop("embed")),
    "shard missing": (
        "model-9.safetensors: No such file",
        lambda index: index["weight_map"].update(embed="model-9.safetensors"),
    ),
}


@pytest.mark.parametrize("says, change", INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_an_index_that_does_not_fit_its_shards(
    tmp_path: Path, says: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    two_shards(tmp_path / "in")
    change_index(tmp_path / "in", change)
    with pytest.raises(ExportError, match=says):
        Checkpoint.open(tmp_path / "in")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    second = load_file(tmp_path / "in" / SHARDS[1])
    save_file({**second, "embed": torch.zeros(2)}, tmp_path / "in" / SHARDS[1])
    with pytest.raises(ExportError, match=f"'embed' is in {SHARDS[0]} and in {SHARDS[1]}"):
        Checkpoint.open(tmp_path / "in")


def test_a_folder_that_is_two_models_at_once(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    save_file({"embed": torch.zeros(2)}, tmp_path / "in" / SINGLE)
    with pytest.raises(ExportError, match="has both"):
        Checkpoint.open(tmp_path / "in")
    (tmp_path / "in" / INDEX).write_text(json.dumps({"weight_map": {"embed": SINGLE}}))
    assert set(Checkpoint.open(tmp_path / "in").tensors) == {"embed"}


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ExportError, match="not a folder"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ExportError, match=r"a pickle.*Convert it first.*save_pretrained"):
        Checkpoint.open(tmp_path)
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(ExportError, match="is not a file"):
        Checkpoint.open(tmp_path)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(ExportError, match="is not a file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"weight_map":{"a":"x","a":"y"}}', b"\xff"])
def test_an_index_that_is_not_one(tmp_path: Path, text: bytes) -> None:
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(ExportError, match="its content"):
        Checkpoint.open(tmp_path)


# --------------------------------------------------------------------------------- copying


def test_an_unedited_copy_is_the_same_bytes(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    run_copy(tmp_path / "in", tmp_path / "out")
    expected = contents(tmp_path / "in")
    del expected["consolidated.safetensors"], expected["adapter_model.safetensors"]
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))


def test_only_the_edited_tensors_change(tmp_path: Path) -> None:
    values = two_shards(tmp_path / "in")
    edit = dict.fromkeys(("embed", "b.down", "a.gate"), doubled)
    run_copy(tmp_path / "in", tmp_path / "out", edit=edit)
    expected = {n: (v.float() * 2).to(v.dtype) if n in edit else v for n, v in values.items()}
    for shard in SHARDS:
        before = {name: expected[name] for name in load_file(tmp_path / "in" / shard)}
        save_file(before, tmp_path / "expected", METADATA)
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "expected").read_bytes()
    assert raw(expected["embed"]) != raw(values["embed"])
    assert (tmp_path / "out" / INDEX).read_bytes() == (tmp_path / "in" / INDEX).read_bytes()


def test_an_edit_may_read_the_whole_tensor_and_yield_views(tmp_path: Path) -> None:
    value = random_tensor(torch.int16, 4, 6)
    save_file({"w": value}, tmp_path / SINGLE)
    run_copy(tmp_path, beside(tmp_path), edit={"w": lambda s: s.read().flip(0, 1).t().t().split(3)})
    assert torch.equal(load_file(beside(tmp_path) / SINGLE)["w"], value.flip(0, 1))


def test_new_tensors_join_the_file_of_their_neighbour(tmp_path: Path) -> None:
    values = two_shards(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    bias = torch.arange(8, dtype=torch.float32)
    extra = [
        NewTensor.copy_of("head", source.tensors["embed"], beside="b.up"),
        NewTensor("a.bias", torch.float32, (8,), "a.up", lambda: bias.split(3)),
        NewTensor("b.flag", torch.bool, (), "b.up", lambda: [torch.tensor(True)]),
        NewTensor("b.none", torch.float16, (0, 4), "b.up", lambda: []),
    ]
    written = run_copy(source, tmp_path / "out", edit={"embed": doubled}, extra=extra)
    changed = (values["embed"].float() * 2).to(torch.bfloat16)
    new = {"head": values["embed"], "a.bias": bias, "b.flag": torch.tensor(True)}
    expected = {**values, "embed": changed, **new, "b.none": torch.zeros(0, 4).half()}
    found: dict[str, Tensor] = {}
    for shard in SHARDS:
        found |= load_file(tmp_path / "out" / shard)
        with safe_open(tmp_path / "out" / shard, framework="pt") as file:
            assert file.metadata() == METADATA
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert raw(found[name]) == raw(value), name
    assert all(info.offset % info.dtype.itemsize == 0 for info in written.tensors.values())
    old = json.loads((tmp_path / "in" / INDEX).read_text())
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    added = 37 * 8 * 2 + 8 * 4 + 1
    old["metadata"]["total_size"] += added
    old["metadata"]["total_parameters"] += 37 * 8 + 8 + 1
    old["weight_map"] |= {"a.bias": SHARDS[0]} | dict.fromkeys(
        ("head", "b.flag", "b.none"), SHARDS[1]
    )
    assert index == old


def test_a_new_tensor_in_a_single_file_leaves_it_single(tmp_path: Path) -> None:
    save_file({"embed": random_tensor(torch.float16, 4, 2)}, tmp_path / SINGLE)
    new = NewTensor.copy_of("head", Checkpoint.open(tmp_path).tensors["embed"])
    run_copy(tmp_path, beside(tmp_path), edit={"embed": doubled}, extra=[new])
    assert [path.name for path in (beside(tmp_path)).iterdir()] == [SINGLE]
    found = load_file(beside(tmp_path) / SINGLE)
    assert raw(found["head"]) == raw(load_file(tmp_path / SINGLE)["embed"])
    assert raw(found["head"]) != raw(found["embed"])


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, None], ids=["other", "old", "zero"])
def test_where_the_kernel_cannot_copy_the_bytes_are_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    def refuse(*_: int) -> int:
        if error is not None:
            raise OSError(error, os.strerror(error))
        return 0

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(tensor_copy, "COPY", 64)
    two_shards(tmp_path / "in")
    run_copy(tmp_path / "in", tmp_path / "out")
    for shard in SHARDS:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "in" / shard).read_bytes()


Yield = Callable[[TensorSource], Any]
WRONG: dict[str, tuple[str, Yield]] = {
    "dtype": ("float32", lambda source: [source.read().float()]),
    "row shape": (r"\[37, 7\]", lambda source: [source.read()[:, :7]]),
    "axes": (r"\[296\]", lambda source: [source.read().reshape(-1)]),
    "too few": ("576 bytes only", lambda source: [source.read()[:36]]),
    "none": ("0 bytes only", lambda source: []),
    "too many": ("after 592 of 592", lambda source: [source.read(), source.read()[:1]]),
    "not a tensor": ("came as ndarray", lambda source: [source.read().float().numpy()]),
}


@pytest.mark.parametrize("says, produce", WRONG.values(), ids=WRONG)
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, says: str, produce: Yield) -> None:
    two_shards(tmp_path / "in")
    with pytest.raises(ExportError, match=f"'embed' is torch.bfloat16.*{says}"):
        run_copy(tmp_path / "in", tmp_path / "out", edit={"embed": produce})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_names_that_are_not_there_or_taken(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    copy = NewTensor.copy_of("head", source.tensors["embed"])
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("no tensor 'x'", {"edit": {"x": doubled}}),
        ("no tensor 'x'", {"extra": [NewTensor("h", torch.bool, (), "x", lambda: [])]}),
        ("no tensor 'x'", {"extra": [NewTensor("h", torch.bool, (), "embed", "x")]}),
        ("name that is taken", {"extra": [copy, copy]}),
        ("name that is taken", {"extra": [NewTensor.copy_of("b.up", source.tensors["embed"])]}),
        ("but copies 'embed'", {"extra": [NewTensor("h", torch.bool, (37, 8), "b.up", "embed")]}),
    ]
    for says, options in wrong:
        with pytest.raises(ExportError, match=says):
            run_copy(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_memory_holds_a_few_blocks_not_the_tensor(tmp_path: Path) -> None:
    code = """
        import os, resource, sys, time
        import torch
        from pathlib import Path
        from interp_ablate.storage import output_folder as folders, safetensors_reader as files, safetensors_writer as copying

        folders.WAITING, files.BLOCK = 4 << 20, 1 << 20
        folder, size = Path(sys.argv[1]), 96 << 20
        text = b'{"w":{"dtype":"BF16","shape":[%d,1024],"data_offsets":[0,%d]}}' % (size // 2048, size)
        with open(folder / files.SINGLE, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
        write = os.pwrite
        os.pwrite = lambda *arguments: (time.sleep(0.01), write(*arguments))[1]  # a slow disk
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def edit(source):
            for _, block in source.blocks(max_bytes=1 << 20):
                yield (block.float() + 1).to(block.dtype)

        source = files.Checkpoint.open(folder)
        with folders.streamed_folder(folder.parent / "one", source=source, fingerprint="") as out:
            copying.copy_checkpoint(source, out, edit={})
        before = peak()
        with folders.streamed_folder(folder.parent / "out", source=source, fingerprint="") as out:
            copying.copy_checkpoint(source, out, edit={"w": edit})
        written = files.Checkpoint.open(folder.parent / "out")
        assert all(bool((block == 1).all()) for _, block in written.blocks("w"))
        print(peak() - before)
    """
    (tmp_path / "in").mkdir()
    done = in_process(code, tmp_path / "in")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 48


# --------------------------------------------------------------------------------- failing


def in_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


BEFORE_THE_LAST_STEP = 36  # calls, from the first write until the hidden folder gets its name
KILLED = """
    import os, sys
    from pathlib import Path
    from interp_ablate.storage import output_folder as folders, safetensors_reader as files, safetensors_writer as copying

    folder, left = Path(sys.argv[1]), int(sys.argv[2])

    def until(function):
        def counted(*arguments):
            global left
            left -= 1
            if left < 0:
                os._exit(9)
            return function(*arguments)
        return counted

    for name in ("pwrite", "copy_file_range", "fsync", "replace"):
        setattr(os, name, until(getattr(os, name)))

    def edit(source):
        for _, block in source.blocks(max_bytes=40):
            yield (block.float() * 2).to(block.dtype)

    source = files.Checkpoint.open(folder / "in")
    with folders.streamed_folder(folder / "out", source=source, fingerprint="plan") as out:
        copying.copy_checkpoint(source, out, edit=dict.fromkeys(("embed", "b.down"), edit))
"""


@pytest.mark.parametrize("left", [0, 6, 21, 32, BEFORE_THE_LAST_STEP])
def test_a_kill_leaves_nothing_that_looks_finished_and_a_second_run_completes(
    tmp_path: Path, left: int
) -> None:
    two_shards(tmp_path / "in")
    edit = dict.fromkeys(("embed", "b.down"), doubled)
    run_copy(tmp_path / "in", tmp_path / "expected", edit=edit)
    expected = contents(tmp_path / "expected")
    assert in_process(KILLED, tmp_path, left).returncode == 9
    assert not (tmp_path / "out").exists()
    hidden = contents(tmp_path / ".out.partial")
    for name in set(hidden) & set(expected):
        assert hidden[name] == expected[name], f"{name} has its name before it is whole"
    assert (set(hidden) == {*expected, JOURNAL}) == (left == BEFORE_THE_LAST_STEP)
    run_copy(tmp_path / "in", tmp_path / "out", edit=edit)
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))


def interrupted_in(name: str, source: Checkpoint, out: Path, fingerprint: str = "plan") -> None:
    def interrupt(_: TensorSource) -> Iterator[Tensor]:
        for _ in range(1000):  # the first file is on its way to the disk, in other threads
            if (out.with_name(f".{out.name}.partial") / SHARDS[0]).exists():
                break
            time.sleep(0.01)
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run_copy(source, out, fingerprint=fingerprint, edit={"embed": doubled, name: interrupt})
    assert not out.exists()


@pytest.mark.parametrize("same", ["same plan", "other plan", "other source", "torn journal"])
def test_a_second_run_keeps_what_is_whole_only_if_nothing_changed(
    tmp_path: Path, same: str
) -> None:
    values = two_shards(tmp_path / "in")
    source, hidden = Checkpoint.open(tmp_path / "in"), tmp_path / ".out.partial"
    interrupted_in("b.down", source, tmp_path / "out")
    assert (hidden / SHARDS[0]).exists() and not (hidden / SHARDS[1]).exists()
    (hidden / "stale.json").write_text("{}")
    if same == "other source":
        os.utime(tmp_path / "in" / SHARDS[0], ns=(1, 1))
    if same == "torn journal":
        (hidden / JOURNAL).write_bytes((hidden / JOURNAL).read_bytes()[:-4])
    called: list[str] = []

    def zeros(source: TensorSource) -> Iterator[Tensor]:
        called.append(source.info.name)
        yield torch.zeros_like(source.read())

    run_copy(
        tmp_path / "in",
        tmp_path / "out",
        fingerprint="other" if same == "other plan" else "plan",
        edit={"embed": zeros, "b.down": zeros},
    )
    kept = same == "same plan"
    assert called == ["b.down"] if kept else ["embed", "b.down"]
    found = load_file(tmp_path / "out" / SHARDS[0])["embed"]
    expected = (values["embed"].float() * 2).bfloat16() if kept else torch.zeros(37, 8).bfloat16()
    assert raw(found) == raw(expected)
    assert set(contents(tmp_path / "out")) == {*SHARDS, INDEX}


@pytest.mark.parametrize("fails", [None, "pwrite", "fsync"])
def test_more_files_than_wait_for_the_disk_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str | None
) -> None:
    (tmp_path / "in").mkdir()
    names = [f"model-{i:05}-of-00011.safetensors" for i in range(1, 12)]
    for i, name in enumerate(names):
        tensors = {f"{i}.a": torch.full((9, 8), float(i)), f"{i}.b": torch.randn(9, 8)}
        save_file(tensors, tmp_path / "in" / name)
    weight_map = {f"{i}.{part}": name for i, name in enumerate(names) for part in "ab"}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "in" / INDEX).write_text(index)
    edit = {f"{i}.a": doubled for i in range(11)}
    if fails is None:
        run_copy(tmp_path / "in", tmp_path / "out", edit=edit)
        for i, name in enumerate(names):
            before, after = load_file(tmp_path / "in" / name), load_file(tmp_path / "out" / name)
            assert torch.equal(after[f"{i}.a"], torch.full((9, 8), 2.0 * i))
            assert torch.equal(after[f"{i}.b"], before[f"{i}.b"])
        return
    real, left = getattr(os, fails), [6]

    def full(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(ExportError, match="No space left on device"):
        run_copy(tmp_path / "in", tmp_path / "out", edit=edit)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_whole_file_that_was_changed_is_written_again(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    interrupted_in("b.down", source, tmp_path / "out")
    with (tmp_path / ".out.partial" / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    run_copy(source, tmp_path / "out")
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == (tmp_path / "in" / SHARDS[0]).read_bytes()


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync", "replace"])
@pytest.mark.parametrize("good", [0, 1])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, good: int
) -> None:
    two_shards(tmp_path / "in")
    source, real, left = Checkpoint.open(tmp_path / "in"), getattr(os, call), [good]

    def full(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ExportError, match=r"cannot write .*No space left on device"):
        run_copy(source, tmp_path / "out", edit=dict.fromkeys(("embed", "b.down"), doubled))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_no_file_stays_open_after_a_failure(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    for _ in range(3):
        with pytest.raises(ExportError, match="0 bytes only"):
            run_copy(tmp_path / "in", tmp_path / "out", edit={"embed": lambda source: []})
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_shards(tmp_path / "in")
    usage = tensor_copy.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tensor_copy.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ExportError, match=r"GB to write.*free space"):
        run_copy(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("change", ["touched", "shorter"])
def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, change: str) -> None:
    two_shards(tmp_path / "in")
    shard = tmp_path / "in" / SHARDS[0]

    def disturb(source: TensorSource) -> Iterator[Tensor]:
        value = source.read()
        if change == "touched":
            os.utime(shard, ns=(1, 1))
        else:
            os.truncate(shard, 200)
        yield value

    with pytest.raises(ExportError, match=r"was changed while|became shorter while"):
        run_copy(tmp_path / "in", tmp_path / "out", edit={"embed": disturb})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_error_of_the_caller_removes_the_hidden_folder(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    with (
        pytest.raises(ZeroDivisionError),
        streamed_folder(tmp_path / "out", source=source, fingerprint="") as folder,
    ):
        copy_checkpoint(source, folder, edit={})
        assert (folder.path / INDEX).exists() and not (tmp_path / "out").exists()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --------------------------------------------------------------------------------- places


def test_what_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"out exists: choose another"):
        run_copy(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ExportError, match=r"no export"):
        run_copy(tmp_path / "in", tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mine.txt").rename(tmp_path / "out" / "interp_ablate.json")
    with pytest.raises(ExportError, match="bytes only"):
        run_copy(tmp_path / "in", tmp_path / "out", overwrite=True, edit={"embed": lambda _: []})
    assert contents(tmp_path / "out") == {"interp_ablate.json": b"mine"}
    run_copy(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert set(contents(tmp_path / "out")) == {*SHARDS, INDEX}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("out", ["in", ".", "in/../in", "link"])
def test_the_source_is_never_written_over(tmp_path: Path, out: str) -> None:
    two_shards(tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = contents(tmp_path / "in")
    with pytest.raises(ExportError, match="holds the source"):
        run_copy(tmp_path / "in", tmp_path / out, overwrite=True)
    assert contents(tmp_path / "in") == before


def test_two_writers_of_one_place(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    with streamed_folder(tmp_path / "out", source=source, fingerprint="plan") as folder:
        with pytest.raises(ExportError, match="another process is writing"):
            run_copy(source, tmp_path / "out")
        copy_checkpoint(source, folder, edit={})
    assert set(contents(tmp_path / "out")) == {*SHARDS, INDEX}


def test_a_hidden_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="has no journal: remove it"):
        run_copy(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / ".out.partial") == {"mine.txt": b"mine"}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    two_shards(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write beside"):
        run_copy(tmp_path / "in", tmp_path / "file" / "out")
