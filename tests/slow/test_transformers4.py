"""The real transformers 4 on our exports: it loads them, tokenizer too, and computes what transformers 5 computes.

Needs the environment that `make .venv-transformers4/.ready` builds, or INTERP_ABLATE_TRANSFORMERS4 with the path of
such an environment's python.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_older_transformers import ROPES, rope_config
from tiny import DECLARED, make, rows_of, tiny, unit
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from interp_ablate import Ablate, Add, Plan, Site, load_model
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.export.older_transformers import CHECKED_TYPES, CHECKED_VERSION
from interp_ablate.models.load import from_hf

ROOT = Path(__file__).parents[2]
PYTHON = Path(
    os.environ.get("INTERP_ABLATE_TRANSFORMERS4", ROOT / ".venv-transformers4/bin/python")
)
pytestmark = [
    pytest.mark.transformers4,
    pytest.mark.skipif(
        not PYTHON.is_file(),
        reason=f"no transformers 4 environment at {PYTHON}: run `make test-transformers4`, which builds it once, or "
        "set INTERP_ABLATE_TRANSFORMERS4 to the python of an environment with torch and transformers 4",
    ),
]
ROWS = rows_of(9, 40)
TEXTS = ("Hello, how are you?", " two  spaces", "<|im_start|>user\nHi<|im_end|>\n", "Café 12 + 30")
MESSAGES = [{"role": "user", "content": "Hi"}]


def in_transformers_4(folders: dict[str, dict[str, Any]], place: Path) -> dict[str, Any]:
    """What the runner found in each folder; "logits" holds each row's."""
    job = {"out": str(place / "logits.npz"), "folders": folders}
    done = subprocess.run(
        [PYTHON, ROOT / "tests/support/transformers4_runner.py"],
        input=json.dumps(job, default=str),
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1",
             "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["version"] == CHECKED_VERSION
    with np.load(job["out"]) as arrays:
        for name, found in result["folders"].items():
            rows = folders[name]["rows"]
            found["logits"] = [torch.from_numpy(arrays[f"{name}/{i}"]) for i in range(len(rows))]
    return result["folders"]


@torch.no_grad()
def in_transformers_5(folder: Path, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    hf = AutoModelForCausalLM.from_pretrained(folder)
    return [hf(torch.tensor([list(row)])).logits[0].float() for row in rows]


def check(folders: dict[str, Path], place: Path, *, texts: Sequence[str] = ()) -> dict[str, Any]:
    jobs = {name: {"folder": f, "rows": ROWS, "texts": texts} for name, f in folders.items()}
    found = in_transformers_4(jobs, place)
    for name, folder in folders.items():
        assert not found[name]["lacking"], (name, found[name]["lacking"])
        for got, want in zip(found[name]["logits"], in_transformers_5(folder, ROWS)):
            torch.testing.assert_close(
                got, want, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    return found


def test_the_types_that_cards_name(tmp_path: Path) -> None:
    """Every declared architecture, from memory and as a stream."""
    assert {make(kind).hf_config.model_type for kind in DECLARED} == set(CHECKED_TYPES)
    folders = {}
    for kind in DECLARED:
        model = make(kind)
        export_checkpoint(
            model, Plan((Ablate(unit(), model.writers),)), tmp_path / kind, prompts=ROWS
        )
        folders[kind] = tmp_path / kind
        streamed = tmp_path / f"{kind}-streamed"
        export_folder(tmp_path / kind, Plan((Ablate(unit(1), model.writers),)), streamed)
        folders[streamed.name] = streamed
        tied = make(kind, tied=True)
        plan = Plan((Ablate(unit(), tied.writers),))
        export_checkpoint(tied, plan, tmp_path / f"{kind}-tied", prompts=ROWS)
        folders[f"{kind}-tied"] = tmp_path / f"{kind}-tied"
    check(folders, tmp_path)


def test_rotary_positions_of_every_kind(tmp_path: Path) -> None:
    folders = {}
    for name in ROPES:
        kind, config = rope_config(name)
        model = from_hf(*tiny(kind, **config))
        export_checkpoint(model, None, tmp_path / name, prompts=ROWS)
        folders[name] = tmp_path / name
        if kind in DECLARED:
            export_folder(tmp_path / name, Plan(), tmp_path / f"{name}-streamed")
            folders[f"{name}-streamed"] = tmp_path / f"{name}-streamed"
    check(folders, tmp_path)


def test_the_demos_model_with_its_tokenizer(tmp_path: Path, bundled_model: str) -> None:
    """KL was 0.11 nats a token, and the tokenizer did not load."""
    model = load_model(bundled_model)
    plan = Plan(
        (Ablate(torch.randn(576, generator=torch.Generator().manual_seed(1)), model.writers),)
    )
    export_checkpoint(model, plan, tmp_path / "demo")
    rows = model.encode_all(["Hello, how are you today?", "Why do leaves change colour in autumn?"])
    job = {"folder": tmp_path / "demo", "rows": rows, "texts": TEXTS, "messages": MESSAGES}
    found = in_transformers_4({"demo": job}, tmp_path)["demo"]
    assert not found["lacking"] and found["dtype"] == "torch.float32"
    for got, want in zip(found["logits"], in_transformers_5(tmp_path / "demo", rows)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    tokenizer: Any = model.tokenizer
    assert found["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert found["rendered"] == rendered
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "demo")
    assert [again(text)["input_ids"] for text in TEXTS] == found["tokens"]
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_additions_and_baked_biases(tmp_path: Path) -> None:
    model = make("llama_gqa", tied=True)
    plan = Plan((Add(unit(), Site(1, "resid_post"), coefficient=2.0),))
    export_checkpoint(model, plan, tmp_path / "baked", prompts=ROWS)
    check({"baked": tmp_path / "baked"}, tmp_path)


def _tokenizers() -> dict[str, tuple[str, Any]]:
    """name -> (kind of model, tokenizer of transformers 5); with special tokens, with a token in front or none."""
    plain: Any = tiny()[1]
    inner = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    adding = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    bytes_ = {token: i for i, token in enumerate(names)}
    pieces = {
        t: i
        for i, t in enumerate(["<unk>", "<s>", "</s>", *map("<0x{:02X}>".format, range(256)), "▁"])
    }
    of_gemma = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *list(pieces)[3:]])}
    return {
        "plain": ("llama_gqa", plain),
        "adding": ("llama_gqa", adding),
        "llama": ("llama_gqa", LlamaTokenizer(vocab=pieces, merges=[])),
        "llama_bos": ("llama_gqa", LlamaTokenizer(vocab=pieces, merges=[], add_bos_token=True)),
        "qwen2": ("qwen2", Qwen2Tokenizer(vocab=bytes_, merges=[])),
        "gemma": ("gemma", GemmaTokenizer(vocab=of_gemma, merges=[])),
    }


def test_tokenizers(tmp_path: Path) -> None:
    """Special tokens of every kind, and a token in front where tokenizer.json says so and only there."""
    jobs, tokenizers = {}, _tokenizers()
    for name, (kind, tokenizer) in tokenizers.items():
        model = from_hf(tiny(kind)[0], tokenizer)
        export_checkpoint(model, None, tmp_path / name, prompts=ROWS)
        jobs[name] = {"folder": tmp_path / name, "rows": [], "texts": TEXTS}
        if kind in ("llama_gqa", "gemma"):  # the same from a folder that transformers 5 wrote
            source = tmp_path / f"{name}-source"
            model.tokenizer.save_pretrained(source)  # type: ignore[union-attr]
            tiny(kind)[0].save_pretrained(source)
            export_folder(source, Plan(), tmp_path / f"{name}-streamed")
            jobs[f"{name}-streamed"] = {**jobs[name], "folder": tmp_path / f"{name}-streamed"}
    for name, found in in_transformers_4(jobs, tmp_path).items():
        tokenizer = tokenizers[name.removesuffix("-streamed")][1]
        again: Any = AutoTokenizer.from_pretrained(jobs[name]["folder"])
        for bare in (False, True):
            want = [tokenizer(text, add_special_tokens=not bare)["input_ids"] for text in TEXTS]
            assert found["bare" if bare else "tokens"] == want, (name, found["tokenizer"])
            assert [again(t, add_special_tokens=not bare)["input_ids"] for t in TEXTS] == want, name
        assert found["inputs"] == ["attention_mask", "input_ids"]
        assert found["special"] == sorted(map(str, tokenizer.all_special_tokens))
        assert again.extra_special_tokens == tokenizer.extra_special_tokens
