"""What lies beside a model's weights: which files an export takes along, and which an audit has to refuse.

The list is of what travels, not of what does not: a format of weights that nobody has thought of stays behind.

Knows: names of tokenizer, template, processor and licence files. Does not know: weights, plans, or who reads the files.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from interp_ablate.errors import ExportError
from interp_ablate.export.mended_tokenizer import mend_copy
from interp_ablate.export.older_transformers import tokenizer_for_both
from interp_ablate.storage.incoming_files import incoming_json
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
# Files beside the weights that change what a model does, and have to be there if they are in the source.
BEHAVIOUR_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "tekken.json", "normalizer.json", "bpe.codes", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "image_processor_config.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # folder of a tokenizer with several templates
# Code of a model that brings its own, vocabularies in formats of their own, and the terms of use.
_TRAVELS = re.compile(
    rf"{TEMPLATES}/[^/]+\.jinja|[^/]+\.(py|tiktoken)|tokenizer\.model\.v\d+[^/]*|"
    r"(licen[cs]es?|notices?|legal)/([^/]+/)*([^/.]+|[^/]+\.(txt|md|pdf|rst|html?))|"  # folders of terms, as REUSE has one
    r"([^/]*[-_])?((UN)?LICEN[CS]E|NOTICE|COPYING|COPYRIGHT|POLICY|TERMS|EULA|ACCEPTABLE_USE|ATTRIBUTION)[^./]*"
    r"(\.(txt|md|pdf|rst|html?|rtf|(apache|mit|bsd|mpl|gpl)[-.\d]*))?",
    re.IGNORECASE,
)
# Files that nobody loads into a model. Any other that was not checked may be weights.
_INERT = (
    ".md", ".rst", ".txt", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".html", ".csv", ".tsv",
    ".jsonl", ".json", ".jinja", ".py", ".yaml", ".yml", ".toml", ".log", ".gitattributes", ".gitignore",
)  # fmt: skip
_LARGE = 64 << 20  # bytes: no text beside a model is as large
_ADAPTER = re.compile(r"(.*/)?adapter_config\.json|.+\.index\.json")


def travels(name: str) -> bool:
    """True for a file that an export takes along, by its path inside the source's folder."""
    return name in BEHAVIOUR_FILES or _TRAVELS.fullmatch(name) is not None


def may_be_weights(path: Path, name: str) -> bool:
    """True for a file that could hold weights, or point at some: whatever is not known to be something else."""
    if travels(name) and not name.endswith(".safetensors"):
        return False
    known = (path.suffix or path.name).lower() in _INERT and path.stat().st_size <= _LARGE
    return not known or _ADAPTER.fullmatch(name) is not None


def copy_side_files(source: Path, folder: Path, *, own: Collection[str]) -> list[str]:
    """Copy what travels, and return the names of what does not; hidden files (.env, .cache) are not named.

    The tokenizer's configuration is written so that transformers 4 reads it too, and the tokenizer without the
    faulty regex of Mistral's.

    Args:
        own: names of the source's files that the export writes itself: weights, config, card.
    """
    left_out = []
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name in own:
            continue
        parts = [p for p in sorted(file.rglob("*")) if not p.is_dir()] if file.is_dir() else [file]
        for part in parts:
            name = part.relative_to(source).as_posix()
            if part.is_file() and travels(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(part, folder / name)
            elif f"{file.name}/" not in left_out:
                left_out.append(f"{file.name}/" if file.is_dir() else file.name)
    mend_copy(source, folder)
    spell_tokenizer(folder)
    if left_out:
        logger.warning(
            "left behind in %s, because nothing here edits or checks them: %s",
            source,
            ", ".join(left_out),
        )
    return left_out


def spell_tokenizer(folder: Path) -> None:
    """Write a folder's tokenizer_config.json again where transformers 4 would not read it as 5 does."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    config = incoming_json(path, error=ExportError)
    spelled = spelled_tokenizer(config, folder)
    if spelled != config:
        path.unlink()  # it may be a link
        path.write_text(json_text(spelled, indent=1, ensure_ascii=False), encoding="utf-8")


def spelled_tokenizer(config: Any, folder: Path) -> Any:
    """The content of a folder's tokenizer_config.json as an export has it."""
    path = folder / "tokenizer.json"
    tokenizer = incoming_json(path, error=ExportError, unique=False) if path.is_file() else None
    return tokenizer_for_both(config, tokenizer) if isinstance(config, dict) else config
