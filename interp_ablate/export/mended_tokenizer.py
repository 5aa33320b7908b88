"""The tokenizer.json of an export where the source's has the regex that Mistral's were published with by mistake.

What was measured was tokenized with the right one (`models/sources.py` asks transformers for it). A copy of the
file would be read with the wrong one by whoever does not ask.

Knows: which types have the fault, transformers' own mending. Does not know: weights, plans, other files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interp_ablate.errors import ExportError
from interp_ablate.models.model_files import CONFIG, read_config, transformers_reads
from interp_ablate.models.sources import MISTRAL_TYPES
from interp_ablate.storage.incoming_files import incoming_json, parse_json
from interp_ablate.storage.strict_json import json_text

TOKENIZER = "tokenizer.json"


def mended_tokenizer(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's tokenizer.json with the right regex; None where the file has no such fault.

    Raises:
        ModelError: a tokenizer that transformers cannot load.
    """
    path = folder / TOKENIZER
    if not path.is_file() or not (folder / CONFIG).is_file():
        return None
    if read_config(folder).get("model_type") not in MISTRAL_TYPES:
        return None
    own, right = (_pre_tokenizer(folder, mended) for mended in (False, True))
    if own == right:
        return None
    content = incoming_json(path, error=ExportError, unique=False)
    return {**content, "pre_tokenizer": right}


def _pre_tokenizer(folder: Path, mended: bool) -> Any:
    from transformers import AutoTokenizer

    with transformers_reads(f"the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, fix_mistral_regex=mended
        )
    inner = getattr(tokenizer, "backend_tokenizer", None)
    state = None if inner is None else inner.pre_tokenizer
    return None if state is None else parse_json(state.__getstate__(), unique=False)


def mend_copy(source: Path, folder: Path) -> None:
    """Write the right tokenizer.json where the source's, which was copied, has the fault."""
    content = mended_tokenizer(source)
    if content is not None:
        path = folder / TOKENIZER
        path.unlink()  # it may be a link
        path.write_text(json_text(content), encoding="utf-8")
