"""Hostile and broken inputs: about a hundred ways in which a file that comes in can be wrong.

Each table maps a name to a function that breaks a sound thing where it lies: a model folder (`MODEL_FOLDERS`,
`SIDE_FILES` where only tokenizer and generation config are touched), a GGUF file of a model (`GGUF_FILES`), a plan
(`PLANS`), a file of a run folder (`LEFTOVERS`), or a table of rows (`ROW_FILES`). Nothing of them may be taken, and
none may end in another exception than the package's own, or run for longer than `time_limit` lets it.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Breaker = Callable[[Path], None]
DEEP = "[" * 100_000 + "]" * 100_000
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c\nsize 269060552\n"
)
INDEX = "model.safetensors.index.json"


class TookTooLong(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` inside the block when the time is up, also while a FIFO is waited for."""

    def stop(*_: object) -> None:
        raise TookTooLong(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------ how a file is broken


def text(name: str, content: str | bytes) -> Breaker:
    """Another content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def values(name: str, **changed: Any) -> Breaker:
    """Other values of a JSON object."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return change


def cut(name: str, nbytes: int) -> Breaker:
    """The last bytes missing."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-nbytes])

    return change


def fifo(name: str) -> Breaker:
    """A named pipe that nobody writes to."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def twice(name: str, key: str, value: str) -> Breaker:
    """A key two times in one object; readers differ in which they take."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text("{" + f'"{key}": {value}, ' + path.read_text().lstrip()[1:])

    return change


def nested(name: str, key: str = "more") -> Breaker:
    """One value nested 100,000 deep."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text("{" + f'"{key}": {DEEP}, ' + path.read_text().lstrip()[1:])

    return change


# ---------------------------------------------------------------------------------- folders of models

SHARD = "model-00002-of-00004.safetensors"


def _index(change: Callable[[dict[str, Any]], None]) -> Breaker:
    def broken(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return broken


def _placed(place: str) -> Breaker:
    """Every tensor of a shard at another place, where a copy of it lies."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        os.replace(folder / SHARD, outside)
        there = {"absolute": str(outside), "up": "../outside.safetensors"}[place]
        index = json.loads((folder / INDEX).read_text())
        files = index["weight_map"]
        index["weight_map"] = {n: there if f == SHARD else f for n, f in files.items()}
        (folder / INDEX).write_text(json.dumps(index))

    return change


def _tensors(change: Callable[[dict[str, Any]], None]) -> Breaker:
    def broken(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD, {"format": "pt"})
        index = json.loads((folder / INDEX).read_text())
        kept = {n: f for n, f in index["weight_map"].items() if f != SHARD}
        index["weight_map"] = {**kept, **dict.fromkeys(tensors, SHARD)}
        (folder / INDEX).write_text(json.dumps(index))

    return broken


def _header(change: Callable[[bytes], bytes]) -> Breaker:
    def broken(folder: Path) -> None:
        path = folder / SHARD
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = change(data[8 : 8 + length])
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])

    return broken


def _entries(change: Callable[[dict[str, Any]], None]) -> Breaker:
    def broken(raw: bytes) -> bytes:
        header = json.loads(raw)
        change(header)
        return json.dumps(header).encode()

    return _header(broken)


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def _repeated_header(raw: bytes) -> bytes:
    name, entry = next((n, e) for n, e in json.loads(raw).items() if n != "__metadata__")
    return b"{" + f'"{name}": {json.dumps(entry)},'.encode() + raw.lstrip()[1:]


def pickled(folder: Path, content: bytes | None = None) -> None:
    """Weights as a pickle of the Hugging Face kind, in place of safetensors."""
    tensors = {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    if content is not None:
        (folder / "pytorch_model.bin").write_bytes(content)


def _cut_pickle(folder: Path) -> None:
    pickled(folder)
    cut("pytorch_model.bin", 1000)(folder)


def _code_in_pickle(folder: Path) -> None:
    """A pickle that would run `print`."""
    pickled(folder, b"cbuiltins\nprint\n(S'run'\ntR.")


def _drop(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name] and None


def _to(part: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({n: make(t) for n, t in tensors.items() if part in n})


CONFIG = "config.json"
MODEL_FOLDERS: dict[str, Breaker] = {
    "config is empty": text(CONFIG, ""),
    "config is a list": text(CONFIG, "[1, 2]"),
    "config is cut short": cut(CONFIG, 40),
    "config is Latin-1": text(CONFIG, '{"model_type": "llamä"}'.encode("latin1")),
    "config is UTF-16": text(CONFIG, '{"model_type": "llama"}'.encode("utf-16")),
    "config is an LFS pointer": text(CONFIG, POINTER),
    "config is a FIFO": fifo(CONFIG),
    "config has a key twice": twice(CONFIG, "hidden_size", "64"),
    "config is nested deep": nested(CONFIG),
    "config has no model type": values(CONFIG, model_type=None),
    "config has an unknown model type": values(CONFIG, model_type="nonesuch"),
    "model type is a list": values(CONFIG, model_type=["llama"]),
    "10^9 layers": values(CONFIG, num_hidden_layers=10**9),
    "10^30 layers": values(CONFIG, num_hidden_layers=10**30),
    "two layers more than tensors": values(CONFIG, num_hidden_layers=5),
    "a layer fewer than tensors": values(CONFIG, num_hidden_layers=2),
    "no layers": values(CONFIG, num_hidden_layers=0),
    "negative layers": values(CONFIG, num_hidden_layers=-3),
    "layers as text": values(CONFIG, num_hidden_layers="three"),
    "layers as a list": values(CONFIG, num_hidden_layers=[3]),
    "hidden size of 10^12": values(CONFIG, hidden_size=10**12),
    "hidden size of another model": values(CONFIG, hidden_size=48, head_dim=12),
    "hidden size is null": values(CONFIG, hidden_size=None),
    "no heads": values(CONFIG, num_attention_heads=0),
    "more key heads than heads": values(CONFIG, num_key_value_heads=3),
    "10^9 heads": values(CONFIG, num_attention_heads=10**9),
    "head size of 10^9": values(CONFIG, head_dim=10**9),
    "vocabulary of 10^12": values(CONFIG, vocab_size=10**12),
    "vocabulary is negative": values(CONFIG, vocab_size=-1),
    "an unknown activation": values(CONFIG, hidden_act="nonesuch"),
    "an unknown dtype": values(CONFIG, dtype="float7"),
    "a dtype of integers": values(CONFIG, dtype="int8"),
    "rope of an unknown kind": values(CONFIG, rope_parameters={"rope_type": "x"}),
    "rope is a number": values(CONFIG, rope_parameters=3),
    "an unknown quantization": values(CONFIG, quantization_config={"quant_method": "x"}),
    "architectures of another kind": values(CONFIG, model_type="t5"),
    "code that nobody asked for": values(
        CONFIG, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.M"}
    ),
    "index is not JSON": text(INDEX, "{"),
    "index is a list": text(INDEX, "[]"),
    "index is nested deep": nested(INDEX),
    "index is a FIFO": fifo(INDEX),
    "index is an LFS pointer": text(INDEX, POINTER),
    "index without a map": text(INDEX, "{}"),
    "index with an absolute path": _placed("absolute"),
    "index with a path upwards": _placed("up"),
    "index names a file twice": twice(INDEX, "weight_map", "{}"),
    "index names a tensor that is not there": _index(
        lambda index: index["weight_map"].update({"model.layers.9.weight": SHARD})
    ),
    "index lacks a tensor": _index(lambda index: index["weight_map"].popitem() and None),
    "index maps to a number": _index(lambda index: index.update(weight_map={"a": 3})),
    "a shard is missing": lambda folder: (folder / SHARD).unlink(),
    "a shard is a FIFO": fifo(SHARD),
    "a shard is a folder": lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir())[1],
    "a shard is empty": text(SHARD, ""),
    "a shard is cut short": cut(SHARD, 100),
    "a shard is cut in its header": lambda folder: text(SHARD, (folder / SHARD).read_bytes()[:50])(
        folder
    ),
    "a shard is an LFS pointer": text(SHARD, POINTER),
    "a shard is a web page": text(SHARD, "<!DOCTYPE html><html>not found</html>"),
    "a shard has bytes behind it": lambda folder: text(
        SHARD, (folder / SHARD).read_bytes() + b"more"
    )(folder),
    "a header of 2^60 bytes": lambda folder: text(
        SHARD, struct.pack("<Q", 2**60) + (folder / SHARD).read_bytes()[8:]
    )(folder),
    "a header has a tensor twice": _header(_repeated_header),
    "a header is nested deep": _header(lambda raw: b'{"a": ' + DEEP.encode() + b"," + raw[1:]),
    "a header has an unknown dtype": _entries(lambda h: _first(h).update(dtype="F7")),
    "a header has a wrong shape": _entries(lambda h: _first(h)["shape"].append(2)),
    "a header has a negative shape": _entries(lambda h: _first(h).update(shape=[-1, -64])),
    "a header has offsets that overlap": _entries(
        lambda h: [e.update(data_offsets=[0, 4]) for n, e in h.items() if n[0] != "_"] and None
    ),
    "a tensor is missing": _tensors(_drop("down_proj")),
    "a norm is missing": _tensors(_drop("layernorm")),
    "a tensor nobody knows": _tensors(lambda t: t.update({"zzz.weight": torch.zeros(3)})),
    "a tensor of another shape": _tensors(_to("down_proj", lambda t: t[:4].clone())),
    "a tensor that is turned": _tensors(_to("down_proj", lambda t: t.T.contiguous())),
    "weights of integers": _tensors(_to("proj", lambda t: t.to(torch.int32))),
    "weights of truth values": _tensors(_to("proj", lambda t: t > 0)),
    "weights of complex numbers": _tensors(_to("proj", lambda t: t.to(torch.complex64))),
    "both a file and an index": lambda folder: save_file(
        {"a": torch.zeros(2)}, folder / "model.safetensors"
    ),
    "a pickle cut short": _cut_pickle,
    "a pickle with code": _code_in_pickle,
    "a pickle that is an LFS pointer": lambda folder: pickled(folder, POINTER.encode()),
    "no weights": lambda folder: [f.unlink() for f in folder.glob("*.safetensors*")] and None,
}  # fmt: skip

TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
SIDE_FILES: dict[str, Breaker] = {
    "tokenizer is empty": text(TOKENIZER, ""),
    "tokenizer is a list": text(TOKENIZER, "[]"),
    "tokenizer is an empty object": text(TOKENIZER, "{}"),
    "tokenizer is cut short": cut(TOKENIZER, 300),
    "tokenizer is nested deep": nested(TOKENIZER),
    "tokenizer is an LFS pointer": text(TOKENIZER, POINTER),
    "tokenizer is a FIFO": fifo(TOKENIZER),
    "tokenizer has an unknown model": values(TOKENIZER, model={"type": "Nonesuch"}),
    "tokenizer's vocabulary is a number": values(TOKENIZER, model={"type": "BPE", "vocab": 3}),
    "tokenizer's ids are text": values(
        TOKENIZER, model={"type": "BPE", "vocab": {"a": "b"}, "merges": []}
    ),
    "tokenizer merges what it has not": values(
        TOKENIZER, model={"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}
    ),
    "tokenizer config is a list": text(TOKENIZER_CONFIG, "[]"),
    "tokenizer config is cut short": cut(TOKENIZER_CONFIG, 20),
    "tokenizer config is nested deep": nested(TOKENIZER_CONFIG),
    "tokenizer config is a FIFO": fifo(TOKENIZER_CONFIG),
    "tokenizer config has a key twice": twice(TOKENIZER_CONFIG, "eos_token", '"a"'),
    "tokenizer class is a number": values(TOKENIZER_CONFIG, tokenizer_class=3),
    "tokenizer's template is a number": values(TOKENIZER_CONFIG, chat_template=3),
    "tokenizer's end is a number": values(TOKENIZER_CONFIG, eos_token=3),
    "tokenizer's padding is a list": values(TOKENIZER_CONFIG, pad_token=["a", "b"]),
    "template is a FIFO": fifo("chat_template.jinja"),
    "template is not UTF-8": text("chat_template.jinja", b"{{ '\xff' }}"),
    "special tokens are a list": text("special_tokens_map.json", "[]"),
    "added tokens are a list": text("added_tokens.json", "[3]"),
    "generation config is a list": text(GENERATION, "[]"),
    "generation config is cut short": cut(GENERATION, 30),
    "generation config is nested deep": nested(GENERATION),
    "generation config is a FIFO": fifo(GENERATION),
    "temperature is text": values(GENERATION, temperature="hot"),
    "the end's token is a float": values(GENERATION, eos_token_id=1e308),
    "the end's tokens are text": values(GENERATION, eos_token_id=["a"]),
}


# ---------------------------------------------------------------------------------------- GGUF


def gguf_of(folder: Path, out: Path) -> Path:
    """A sound GGUF file of a folder of a tiny model, whose tokenizer gets the merge that llama.cpp wants."""
    from interp_ablate.export.gguf import export_gguf

    fast = json.loads((folder / TOKENIZER).read_text())
    fast["model"]["vocab"] |= {"th": 259}
    fast["model"]["merges"] = [["t", "h"]]
    (folder / TOKENIZER).write_text(json.dumps(fast))
    export_gguf(folder, out, dtype="f32")
    return out


def _gguf(change: Callable[[bytearray], bytes | bytearray | None]) -> Breaker:
    def broken(path: Path) -> None:
        data = bytearray(path.read_bytes())
        path.write_bytes(bytes(change(data) or data))

    return broken


def _put(place: int, form: str, *numbers: int) -> Breaker:
    return _gguf(lambda data: struct.pack_into(form, data, place, *numbers))


def _key(name: str, form: str, number: int) -> Breaker:
    """Another number for a key whose value stands behind its name and type."""

    def change(data: bytearray) -> None:
        place = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4
        struct.pack_into(form, data, place, number)

    return _gguf(change)


def _tensor_info(field: str, number: int) -> Breaker:
    """Another count of axes, size, type or offset for the tensor of the embedding."""

    def change(data: bytearray) -> None:
        name = b"token_embd.weight"
        place = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
        axes = struct.unpack_from("<I", data, place)[0]
        at = {"axes": 0, "size": 4, "type": 4 + 8 * axes, "offset": 8 + 8 * axes}[field]
        struct.pack_into("<I" if field in ("axes", "type") else "<Q", data, place + at, number)

    return _gguf(change)


def _fifo_itself(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


GGUF_FILES: dict[str, Breaker] = {
    "empty": _gguf(lambda data: data[:0] + b" "),
    "four bytes": _gguf(lambda data: data[:4]),
    "not GGUF": _gguf(lambda data: b"GGML" + data[4:]),
    "an LFS pointer": lambda path: path.write_text(POINTER) and None,
    "a FIFO": _fifo_itself,
    "version 99": _put(4, "<I", 99),
    "big-endian": _put(4, ">I", 3),
    "2^60 tensors": _put(8, "<Q", 2**60),
    "ten tensors more": _gguf(
        lambda data: struct.pack_into("<Q", data, 8, struct.unpack_from("<Q", data, 8)[0] + 10)
    ),
    "2^60 keys": _put(16, "<Q", 2**60),
    "no keys": _put(16, "<Q", 0),
    "a name of 2^62 characters": _put(24, "<Q", 2**62),
    "cut in its keys": _gguf(lambda data: data[:200]),
    "cut in its tensors": _gguf(lambda data: data[:-4000]),
    "cut by one byte": _gguf(lambda data: data[:-1]),
    "10^9 layers": _key("llama.block_count", "<I", 10**9),
    "no layers": _key("llama.block_count", "<I", 0),
    "more layers than tensors": _key("llama.block_count", "<I", 5),
    "a width of 2^31": _key("llama.embedding_length", "<I", 2**31),
    "no heads": _key("llama.attention.head_count", "<I", 0),
    "a key of an unknown type": _gguf(
        lambda data: data.replace(b"llama.block_count\x04\0\0\0", b"llama.block_count\x63\0\0\0", 1)
    ),
    "an unknown architecture": _gguf(lambda data: data.replace(b"llama", b"lemma")),
    "a tensor with 2^31 axes": _tensor_info("axes", 2**31),
    "a tensor of 2^60 columns": _tensor_info("size", 2**60),
    "a tensor of an unknown type": _tensor_info("type", 77),
    "a tensor behind the end": _tensor_info("offset", 2**40),
    "a tensor is missing": _gguf(lambda data: data.replace(b"blk.1.ffn_down", b"blk.1.ffn_dowm")),
}


# ------------------------------------------------------------------------ plans, and what a run left


def _plan(**changed: Any) -> Breaker:
    def broken(path: Path) -> None:
        plan = json.loads(path.read_text())
        plan["edits"][0].update(changed)
        path.write_text(json.dumps(plan))

    return broken


def _alone(breaker: Callable[[str], Breaker]) -> Breaker:
    return lambda path: breaker(path.name)(path.parent)


PLANS: dict[str, Breaker] = {
    "empty": _alone(lambda name: text(name, "")),
    "a list": _alone(lambda name: text(name, "[]")),
    "cut short": _alone(lambda name: cut(name, 9)),
    "nested deep": _alone(nested),
    "all of it nested deep": _alone(lambda name: text(name, DEEP)),
    "Latin-1": _alone(lambda name: text(name, '{"format": "ä"}'.encode("latin1"))),
    "a FIFO": _fifo_itself,
    "a folder": lambda path: (path.unlink(), path.mkdir())[1],
    "an LFS pointer": _alone(lambda name: text(name, POINTER)),
    "edits twice": _alone(lambda name: twice(name, "edits", "[]")),
    "edits are a number": _alone(lambda name: values(name, edits=3)),
    "an edit is null": _alone(lambda name: values(name, edits=[None])),
    "strength 1e308": _plan(strength=1e308),
    "strength of 400 digits": _plan(strength=10**400),
    "strength NaN": _plan(strength=float("nan")),
    "strength as text": _plan(strength="1"),
    "sites are a number": _plan(sites=3),
    "site is not text": _plan(sites=[3]),
    "layer of 400 digits": _plan(sites=["blocks." + "9" * 400 + ".hook_attn_out"]),
    "vectors are deep": _plan(vectors=json.loads("[" * 90 + "1.0" + "]" * 90)),
    "vectors are text": _plan(vectors="abc"),
    "vectors are ragged": _plan(vectors=[[1.0], [1.0, 2.0]]),
    "vectors are NaN": _plan(vectors=[[float("nan")] * 32]),
    "positions are a list": _plan(positions=["all"]),
    "label is an object": _plan(label={"a": 1}),
}

# What a run leaves, by the way in which it is broken; for files of JSON and of JSON lines.
LEFTOVERS: dict[str, Breaker] = {
    "empty": _alone(lambda name: text(name, "")),
    "cut short": _alone(lambda name: cut(name, 25)),
    "nested deep": _alone(lambda name: text(name, '{"a": ' + DEEP + "}\n")),
    "a list": _alone(lambda name: text(name, "[]\n")),
    "an object without its fields": _alone(lambda name: text(name, "{}\n")),
    "not UTF-8": _alone(lambda name: text(name, b'{"a": "\xff"}\n')),
    "a FIFO": _fifo_itself,
}


def bomb(path: Path, megabytes: int) -> Path:
    """One line of JSON, compressed: a few hundred kilobytes that become `megabytes`."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(megabytes):
            file.write(b"a" * 2**20)
        file.write(b'"}\n')
    return path
