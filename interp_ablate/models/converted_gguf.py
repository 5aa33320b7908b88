"""A bundled GGUF file converted once: the folder of float32 weights that later loads read instead.

Parsing and dequantizing the file takes longer than all the rest of a load. The folder is kept in the user's cache
(`$INTERP_ABLATE_CACHE`, else `$XDG_CACHE_HOME/interp_ablate`, else `~/.cache/interp_ablate`; empty to keep none)
under a hash of the file's bytes and of the versions that read it. It is kept only if it loads as the very same model.

Knows: places, keys, what must be equal. Does not know: how a file or a folder is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from interp_ablate.errors import InterpAblateError
from interp_ablate.storage.atomic_files import hash_file, remove, temporary_folder, write_atomic
from interp_ablate.storage.incoming_files import incoming_json
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)

VARIABLE = "INTERP_ABLATE_CACHE"
_MADE = "converted.json"  # sizes and times of the files: what was changed since is not believed
_LIBRARIES = ("transformers", "tokenizers", "gguf")


def converted_folder(gguf: Path) -> Path | None:
    """The place of a file's conversion, made or not; None where the user keeps no cache or the file cannot be read."""
    place = os.environ.get(VARIABLE)
    if place == "":
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        digest = hashlib.sha256(json_text([1, *map(version, _LIBRARIES)]).encode())
        hash_file(digest, gguf)
    except (OSError, RuntimeError):  # no home, no such file
        return None
    folder = Path(place) if place else Path(home) / "interp_ablate"
    return folder.absolute() / "converted" / f"{gguf.stem}-{digest.hexdigest()[:16]}"


def is_whole(folder: Path) -> bool:
    """True if every file is as it was when the folder was made."""
    try:
        return bool(incoming_json(folder / _MADE) == _files(folder))
    except (OSError, ValueError):
        return False


def keep(folder: Path, model: Any, tokenizer: Any, load: Callable[[Path], tuple[Any, Any]]) -> None:
    """Write a model and its tokenizer to `folder`, if what `load` then reads is equal to them in every bit.

    Whatever forbids it (a full disk, a home that cannot be written) is logged: the cache is a convenience.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.name, folder.parent) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            if not _equal((model, tokenizer), load(Path(place))):
                logger.info("%s is converted anew each time: its copy loads differently", folder)
                return
            write_atomic(Path(place, _MADE), json_text(_files(Path(place))))
            _replace(Path(place), folder)
    except (OSError, InterpAblateError) as error:
        logger.info("%s is not kept: %s", folder, error)


def _replace(place: Path, folder: Path) -> None:
    """The files of `place` become `folder`; another process's whole one stays."""
    if not is_whole(folder):
        remove(folder)
        os.replace(place, folder)
        place.mkdir()  # its owner removes it


def _files(folder: Path) -> dict[str, list[int]]:
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(folder.iterdir())
        if file.name != _MADE
    }


def _equal(made: tuple[Any, Any], read: tuple[Any, Any]) -> bool:
    (model, tokenizer), (other, its_tokenizer) = made, read
    tensors, others = (dict(m.state_dict()) for m in (model, other))
    return (
        type(model) is type(other)
        and tensors.keys() == others.keys()
        and all(t.dtype == others[n].dtype and t.equal(others[n]) for n, t in tensors.items())
        and _fields(model.config) == _fields(other.config)
        and _fields(model.generation_config) == _fields(other.generation_config)
        and type(tokenizer) is type(its_tokenizer)
        and tokenizer.backend_tokenizer.to_str() == its_tokenizer.backend_tokenizer.to_str()
        and tokenizer.special_tokens_map == its_tokenizer.special_tokens_map
        and tokenizer.chat_template == its_tokenizer.chat_template
        and tokenizer.model_max_length == its_tokenizer.model_max_length
        and tokenizer.padding_side == its_tokenizer.padding_side
    )


def _fields(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
