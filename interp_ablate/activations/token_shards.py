"""Shards: activations of tokens as safetensors files in one folder, which grow prompt by prompt and are read lazily.

Knows: files, their size, which prompts are in which. Does not know: tokens' texts, or any model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.errors import InterpAblateError
from interp_ablate.precision import all_finite
from interp_ablate.settings import FloatDtype
from interp_ablate.sites import Site
from interp_ablate.storage.atomic_files import atomic_path
from interp_ablate.storage.incoming_files import check_file

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Shards:
    """Where activations of tokens are streamed to, and in which form."""

    folder: str | Path
    dtype: FloatDtype | None = None
    """Of the values on disk; default: the model's."""
    max_bytes: int = 256 << 20
    """Of a file, at most, unless one prompt alone takes more. About three times as much memory is used."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, *get_args(FloatDtype)) or self.max_bytes < 1:
            raise InterpAblateError(
                f"Shards(dtype={self.dtype!r}, max_bytes={self.max_bytes}): accepted are the dtypes "
                f"{', '.join(get_args(FloatDtype))}, and 1 byte or more"
            )


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """The activations of some prompts' tokens, one prompt after another: tensors, or a file of them."""

    prompts: tuple[int, ...]
    values: Mapping[Site, Tensor] | Path

    def at(self, site: Site) -> Float[Tensor, "token d_model"]:
        """The values at a site; those of a file are mapped to memory, and read when they are used.

        Raises:
            InterpAblateError: the file is gone or damaged.
        """
        if not isinstance(self.values, Path):
            return self.values[site]
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.values, "pt") as file:
                values = file.get_tensor(str(site))
        except (SafetensorError, OSError) as error:
            raise _damaged(self.values, error) from error
        if not (values.is_floating_point() and all_finite(values)):
            raise _damaged(self.values, f"NaN, infinity or whole numbers at {site}")
        return values


def _damaged(path: Path, error: object) -> InterpAblateError:
    return InterpAblateError(
        f"corrupt shard {path}: {error}. Delete this file and collect into the folder again"
    )


@dataclass
class ShardWriter:
    """Writes what is added as shards of a folder, each whole or not at all.

    A shard is named after its prompts and says in its header which request it is of.
    """

    folder: Path
    request: str
    max_bytes: int
    _prompts: list[int] = field(default_factory=list)
    _parts: dict[Site, list[Tensor]] = field(default_factory=dict)
    _held: int = 0

    def add(self, prompt: int, parts: Mapping[Site, Tensor]) -> None:
        """Take the activations of one prompt's tokens, [token, d_model] at each site."""
        size = sum(part.nbytes for part in parts.values())
        if self._prompts and self._held + size > self.max_bytes:
            self.flush()
        self._prompts.append(prompt)
        for site, part in parts.items():
            self._parts.setdefault(site, []).append(part)
        self._held += size

    def flush(self) -> None:
        """Write what is held.

        Raises:
            InterpAblateError: the place cannot be written, or the disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._prompts:
            return
        prompts = " ".join(map(str, self._prompts))
        path = self.folder / f"shard-{hashlib.sha256(prompts.encode()).hexdigest()[:16]}{SUFFIX}"
        tensors = {str(site): torch.cat(parts) for site, parts in self._parts.items()}
        metadata = {"request": self.request, "prompts": prompts}
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:  # a full disk is a SafetensorError
            raise InterpAblateError(
                f"cannot write {path}: {error}. Free space and collect again, which goes on from the shards that "
                "are whole, or choose another folder"
            ) from error
        self._prompts, self._parts, self._held = [], {}, 0


def read_shards(
    folder: Path, request: str, sites: Sequence[Site], lengths: Sequence[int], *, strict: bool
) -> tuple[TokenBlock, ...]:
    """The shards of a folder that are of this request, without a prompt that another one has.

    Args:
        lengths: each prompt's number of tokens.
        strict: refuse a damaged file; else it is removed, to be written again.

    Raises:
        InterpAblateError: a damaged file; prompts that no shard has.
    """
    blocks: list[TokenBlock] = []
    seen: set[int] = set()
    for path in sorted(folder.glob(f"shard-*{SUFFIX}")):
        try:
            prompts = _prompts_in(path, request, sites, lengths)
        except InterpAblateError:
            if strict:
                raise
            path.unlink(missing_ok=True)
            continue
        if not seen.issuperset(prompts):
            seen.update(prompts)
            blocks.append(TokenBlock(prompts, path))
    if strict and len(seen) < len(lengths):
        raise InterpAblateError(
            f"{folder} lacks the activations of {len(lengths) - len(seen)} of {len(lengths)} prompts: a shard is "
            f"gone. Collect into the folder again"
        )
    return tuple(blocks)


def _prompts_in(
    path: Path, request: str, sites: Sequence[Site], lengths: Sequence[int]
) -> tuple[int, ...]:
    """The prompts of a shard, whose header holds what it must.

    Raises:
        InterpAblateError: it does not.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path, InterpAblateError)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("request") != request:
                raise _damaged(path, "it is of another collection")
            prompts = tuple(map(int, about["prompts"].split()))
            n_tokens = sum(lengths[prompt] for prompt in prompts)
            shapes = {tuple(file.get_slice(str(site)).get_shape()) for site in sites}
    except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
        raise _damaged(path, error) from error
    if min(prompts, default=-1) < 0 or len(shapes) != 1 or {s[:1] for s in shapes} != {(n_tokens,)}:
        raise _damaged(path, f"shapes {shapes} for {n_tokens} tokens")
    return prompts
