"""A checkpoint's tokenizer files as the GGUF keys that llama.cpp tokenizes with.

Knows: byte-level BPE and SentencePiece, and llama.cpp's names of pre-tokenizers. Does not know: weights, configs, or
how the rest of the file is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_ablate.errors import ExportError
from interp_ablate.storage.incoming_files import incoming_object

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


# llama.cpp's name -> (the steps of tokenizer.json's pre_tokenizer, its model's ignore_merges), read from
# the regular expressions in llama.cpp's src/llama-vocab.cpp and the tokenizer.json files of GPT-2,
# SmolLM2, Llama 3 and Qwen 2.
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_byte_level(use_regex=True)], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)], False),
    "llama-bpe": ([_split(_LETTERS + r"\p{N}{1,3}" + _REST), _byte_level(use_regex=False)], True),
    "qwen2": ([_split(_LETTERS + r"\p{N}" + _REST), _byte_level(use_regex=False)], False),
}
# Text that a SentencePiece model must not change: llama.cpp composes and collapses nothing.
_PROBE = "\ufb01  \uff12 x"
# Qwen 2 composes characters (NFC) before it splits; llama.cpp leaves them as they come.
_NORMALIZERS: tuple[dict[str, Any] | None, ...] = (None, {"type": "NFC"})
# Defaults of what a pre-tokenizer step leaves out; trim_offsets changes no token.
_STEP_DEFAULTS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": True, "use_regex": True},
    "Split": {"invert": False},
}


def add_tokenizer(writer: GGUFWriter, folder: Path, n_vocab: int) -> dict[str, Any]:
    """Add everything about the tokenizer of a checkpoint folder; `n_vocab` rows are in its embedding.

    Returns `model` ("gpt2" or "llama"), `pre`, `add_bos`, `n_tokens` and `special_ids`.

    Raises:
        ExportError: no tokenizer files, a kind llama.cpp's writers do not know, more tokens than
            embedding rows.
    """
    config = _read_json(folder / "tokenizer_config.json", default={})
    fast = _read_json(folder / "tokenizer.json", default=None)
    byte_level = fast is not None and _is_byte_level(fast)
    if byte_level:
        summary = _add_byte_level(writer, fast, n_vocab)
    elif (folder / "tokenizer.model").is_file():
        summary = _add_sentencepiece(writer, folder, config, n_vocab)
    else:
        kind = "no tokenizer.json" if fast is None else f"a tokenizer.json of {_kind(fast)}"
        raise ExportError(
            f"{folder} has {kind} and no tokenizer.model: a GGUF file is written from a byte-level BPE "
            "tokenizer.json or a SentencePiece tokenizer.model. Put the base model's tokenizer files there"
        )
    return {**summary, **_add_special(writer, folder, n_vocab, byte_level=byte_level)}


def _read_json(path: Path, *, default: Any) -> Any:
    if not path.is_file():
        return default
    return incoming_object(path, error=ExportError, unique=False)


def _kind(fast: dict[str, Any]) -> str:
    model = fast.get("model", {})
    fallback = " with byte fallback" if model.get("byte_fallback") else ""
    return f"type {model.get('type')}{fallback}"


def _is_byte_level(fast: dict[str, Any]) -> bool:
    model = fast.get("model", {})
    return model.get("type") == "BPE" and not model.get("byte_fallback")


def pre_tokenizer_name(fast: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.json.

    Raises:
        ExportError: one that is not in PRE_TOKENIZERS, with its steps.
    """
    pre = fast.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    plain = [_plain_step(step) for step in steps]
    ignore_merges = bool(fast["model"].get("ignore_merges"))
    names = [name for name, form in PRE_TOKENIZERS.items() if form == (plain, ignore_merges)]
    if not names:
        raise ExportError(
            "llama.cpp's name for this pre-tokenizer is not declared: "
            f"{json.dumps(plain, ensure_ascii=False)}, ignore_merges {ignore_merges}. Declared are "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    if fast.get("normalizer") not in _NORMALIZERS:
        raise ExportError(
            f"tokenizer.json normalizes text ({json.dumps(fast['normalizer'])}), which llama.cpp does not "
            "do for byte-level BPE; accepted are none and NFC"
        )
    return names[0]


def _plain_step(step: dict[str, Any]) -> dict[str, Any]:
    filled = {**_STEP_DEFAULTS.get(step.get("type", ""), {}), **step}
    return {key: value for key, value in filled.items() if key != "trim_offsets"}


def _add_byte_level(writer: GGUFWriter, fast: dict[str, Any], n_vocab: int) -> dict[str, Any]:
    from gguf import TokenType

    pre = pre_tokenizer_name(fast)
    if not fast["model"].get("merges"):
        raise ExportError(
            "tokenizer.json is byte-level BPE without merges, which llama.cpp refuses to load"
        )
    entries = {
        i: (token, int(TokenType.NORMAL)) for token, i in fast["model"].get("vocab", {}).items()
    }
    for added in fast.get("added_tokens", []):
        entries[added["id"]] = (added["content"], int(_added_type(added)))
    tokens, types = _filled(entries, n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return {"model": "gpt2", "pre": pre, "n_tokens": len(entries)}


def _added_type(added: dict[str, Any]) -> Any:
    from gguf import TokenType

    return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED


def _filled(entries: dict[int, tuple[str, int]], n_vocab: int) -> tuple[list[str], list[int]]:
    """One token for each row of the embedding; rows without one are unused placeholders."""
    from gguf import TokenType

    _fits(max(entries, default=-1), n_vocab)
    whole = [entries.get(i, (f"[PAD{i}]", int(TokenType.UNUSED))) for i in range(n_vocab)]
    return [token for token, _ in whole], [kind for _, kind in whole]


def _fits(last: int, n_vocab: int) -> None:
    if last >= n_vocab:
        raise ExportError(
            f"the tokenizer has a token with id {last}, but the embedding {n_vocab} rows: these tokenizer "
            "files are another model's"
        )


def _add_sentencepiece(
    writer: GGUFWriter, folder: Path, config: dict[str, Any], n_vocab: int
) -> dict[str, Any]:
    from gguf import SentencePieceVocab

    try:
        vocab = SentencePieceVocab(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"cannot read {folder / 'tokenizer.model'}: {error}. It needs the sentencepiece package"
        ) from error
    pieces = vocab.sentencepiece_tokenizer
    if pieces.Decode(pieces.Encode(_PROBE)) != _PROBE:
        raise ExportError(
            f"{folder / 'tokenizer.model'} normalizes text ({_PROBE!r} comes back as "
            f"{pieces.Decode(pieces.Encode(_PROBE))!r}), which llama.cpp does not do: no exact form"
        )
    entries: dict[int, tuple[str, int]] = {}
    scores = [-10000.0] * n_vocab  # of placeholders: never the best merge
    for i, (text, score, kind) in enumerate(vocab.all_tokens()):
        _fits(i, n_vocab)
        entries[i] = (text.decode(), int(kind))
        scores[i] = score
    for key, added in config.get("added_tokens_decoder", {}).items():
        i = int(key)
        _fits(i, n_vocab)
        if entries.get(i, ("", 0))[0] == added["content"] and not added.get("special"):
            continue
        entries[i] = (added["content"], int(_added_type(added)))
        scores[i] = -1000.0
    tokens, types = _filled(entries, n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    prefix = pieces.Encode("a", out_type=str)[0].startswith("\u2581")
    writer.add_add_space_prefix(prefix)
    return {"model": "llama", "pre": "default", "n_tokens": len(entries)}


def _add_special(
    writer: GGUFWriter, folder: Path, n_vocab: int, *, byte_level: bool
) -> dict[str, Any]:
    """Ids of the special tokens, merges, the chat template, and whether a text begins with BOS."""
    from gguf import SpecialVocab

    try:
        special = SpecialVocab(folder, load_merges=byte_level, n_vocab=n_vocab)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"cannot read the special tokens in {folder}: {error}") from error
    # Written in any case: what a reader assumes without the key differs from pre-tokenizer to pre-tokenizer.
    add = special.add_special_token
    add.setdefault("bos", not byte_level)  # SentencePiece Llama tokenizers begin with BOS
    add.setdefault("eos", False)
    add["bos"] = add["bos"] and "bos" in special.special_token_ids
    special.add_to_gguf(writer, quiet=True)
    return {"add_bos": add["bos"], "special_ids": dict(special.special_token_ids)}
