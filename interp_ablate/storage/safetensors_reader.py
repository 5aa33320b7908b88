"""Tensor files: safetensors folders read tensor by tensor, never loaded and never believed.

Knows: safetensors headers, shards and their index, bytes on disk. Does not know: plans, models, which
tensor means what; how a folder is written (`tensor_copy` does).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage.incoming_files import incoming_bytes, shortened
from interp_ablate.storage.safetensors_header import (
    DTYPES,
    MAX_HEADER,
    TensorFile,
    TensorInfo,
    json_object,
    read_bytes,
    read_tensor_file,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK = 2 << 20  # bytes of a block of rows (or one row): its float32 copy stays in a cache
HEADER_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A local Hugging Face folder as tensors on disk: a frozen view, made by `open`."""

    folder: Path
    files: tuple[TensorFile, ...]
    tensors: dict[str, TensorInfo]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of `model.safetensors`, or of the shards that the index names; check all.

        Other .safetensors files (consolidated ones, adapters) are not the model and are ignored. Names
        in the index must be plain file names: no separator, no `..`. The files themselves may be
        symbolic links to anywhere, because the hub's own cache is made of such links and whoever
        made the folder made them; a downloaded index is text that a stranger wrote.

        Raises:
            ExportError: no safetensors, or a header or an index that does not describe the files.
        """
        folder = Path(folder)
        index = _read_index(folder)
        names = [SINGLE] if index is None else list(dict.fromkeys(index["weight_map"].values()))
        files = tuple(read_tensor_file(folder / name) for name in sorted(names))
        if index is not None:
            _check_weight_map(folder, index["weight_map"], files)
        tensors = {name: info for file in files for name, info in file.tensors.items()}
        return cls(folder, files, tensors, index)

    @property
    def fingerprint(self) -> str:
        """Of the files' names, sizes, times of change and headers: cheap, and new for new contents."""
        stamps = [(file.name, *file.stamp) for file in self.files]
        return hashlib.sha256(json.dumps([stamps, self.index]).encode()).hexdigest()

    def source(self, name: str) -> TensorSource:
        """One tensor, to read whole or in blocks.

        Raises:
            ExportError: there is no such tensor.
        """
        if name not in self.tensors:
            close = get_close_matches(name, list(self.tensors), 1)
            nearest = f"; did you mean {close[0]!r}?" if close else ""
            raise ExportError(f"no tensor {name!r} in {self.folder}{nearest}")
        return TensorSource(self.tensors[name])

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of one tensor, from the header."""
        return self.source(name).info.dtype, self.source(name).info.shape

    def read(self, name: str) -> Shaped[Tensor, "*shape"]:
        """A whole tensor, in memory of its own."""
        return self.source(name).read()

    def blocks(
        self, name: str, *, max_bytes: int = BLOCK
    ) -> Iterator[tuple[slice, Shaped[Tensor, "*shape"]]]:
        """Blocks of rows, each with its place on the first axis; see `TensorSource.blocks`."""
        return self.source(name).blocks(max_bytes=max_bytes)


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a file, read by plain reads: a mapped page would count as this process's memory."""

    info: TensorInfo

    def read(self) -> Shaped[Tensor, "*shape"]:
        """The whole tensor, in memory of its own.

        Raises:
            ExportError: the file cannot be read, or was changed since its header was.
        """
        data = read_bytes(self.info.file, self.info.offset, self.info.nbytes)
        return data.view(self.info.dtype).reshape(self.info.shape)

    def blocks(self, *, max_bytes: int = BLOCK) -> Iterator[tuple[slice, Shaped[Tensor, "*shape"]]]:
        """Blocks of whole rows (of the first axis), at most `max_bytes` each or one row; any number
        of passes. A tensor without rows, or without an axis, is one block.

        Raises:
            ExportError: the file cannot be read, or was changed since its header was.
        """
        info = self.info
        if not info.nbytes or not info.shape:
            yield slice(0, info.shape[0] if info.shape else 1), self.read()
            return
        row = info.nbytes // info.shape[0]
        step = max(1, max_bytes // row)
        for first in range(0, info.shape[0], step):
            last = min(first + step, info.shape[0])
            data = read_bytes(info.file, info.offset + first * row, (last - first) * row)
            yield slice(first, last), data.view(info.dtype).reshape(-1, *info.shape[1:])


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a sharded folder, its names checked; None for a single file."""
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).exists():
            raise _no_weights(folder)
        return None
    index = json_object(incoming_bytes(path, error=ExportError, limit=MAX_HEADER), path, "content")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{path} has no weight_map: it must name the file of every tensor")
    for tensor, name in weight_map.items():
        if not is_plain(name):
            raise ExportError(
                f"{path} puts {tensor!r} into {shortened(repr(name))}: only plain names of .safetensors "
                "files in the same folder are accepted. Do not use this folder unless you know why"
            )
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise ExportError(
            f"{folder} has both {SINGLE} and {INDEX}, and programs differ in which of them is the "
            "model: remove the one that is not"
        )
    return index


def is_plain(name: Any, suffix: str = ".safetensors") -> bool:
    """True for a name of an index that stays in its folder, on any system."""
    return (
        isinstance(name, str)
        and name.endswith(suffix)
        and "\0" not in name
        and name == PurePosixPath(name).name == PureWindowsPath(name).name
    )


def _no_weights(folder: Path) -> ExportError:
    if not folder.is_dir():
        return ExportError(f"{folder} is not a folder")
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        return ExportError(
            f"{folder} has its weights as {pickles[0]}, a pickle, which is not read here. Convert it "
            "first: transformers.AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(other) writes safetensors"
        )
    return ExportError(
        f"{folder} has neither {SINGLE} nor {INDEX}: give the folder of a Hugging Face model"
    )


def _check_weight_map(
    folder: Path, weight_map: Mapping[str, str], files: Sequence[TensorFile]
) -> None:
    """The index and the shards name the same tensors in the same places."""
    place: dict[str, str] = {}
    for file in files:
        for name in file.tensors:
            if name in place:
                raise ExportError(f"{folder}: {name!r} is in {place[name]} and in {file.name}")
            place[name] = file.name
    for name in weight_map:
        if place.get(name) != weight_map[name]:
            where = f"it is in {place[name]}" if name in place else "no shard has it"
            raise ExportError(
                f"{folder / INDEX} puts {name!r} into {weight_map[name]}, but {where}: download the "
                "folder again"
            )
    unnamed = sorted(set(place) - set(weight_map))
    if unnamed:
        raise ExportError(
            f"{folder / INDEX} does not name {unnamed[0]!r} (in {place[unnamed[0]]}) and "
            f"{len(unnamed) - 1} more tensors: download the folder again"
        )
