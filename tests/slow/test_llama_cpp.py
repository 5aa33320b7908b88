"""The real llama.cpp on our files: control vectors move its logits as the hooked model's move, and exported
models compute and write what transformers does.

Needs the environment that `make .venv-llama/.ready` builds (llama-cpp-python, compiled), or
INTERP_ABLATE_LLAMA with the path of such an environment's python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf import LLAMA3, pre_tokenizer, reconfigure, saved, sentencepiece_folder
from tiny import N_LAYERS, editing, forward, rows_of, unit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from interp_ablate import Ablate, Add, Plan, Site, everywhere, load_model
from interp_ablate.export.checkpoint import export_checkpoint
from interp_ablate.export.control_vector import write_control_vector
from interp_ablate.export.gguf import export_gguf
from interp_ablate.export.gguf_tokenizer import PRE_TOKENIZERS
from interp_ablate.export.lora import export_lora
from interp_ablate.models.sources import resolve

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("INTERP_ABLATE_LLAMA", ROOT / ".venv-llama/bin/python"))
pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(
        not PYTHON.is_file(),
        reason=f"no llama.cpp environment at {PYTHON}: run `make test-llama`, which builds it once, or set "
        "INTERP_ABLATE_LLAMA to the python of an environment with llama-cpp-python",
    ),
]
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I bake bread?",
    "Explain gravity to a child.",
    "Give me three names for a cat.",
    "What is 12 + 30?",
    "Tell me a story about a lighthouse in 1890.",
    "Why is the sky blue?",
)


def llama(model: Path | str, out: Path | None = None, **job: Any) -> dict[str, Any]:
    """What llama_runner found; "logits" holds each run's, all rows' positions one after the other."""
    job |= {"model": str(model), "out": out and str(out)}
    done = subprocess.run(
        [PYTHON, ROOT / "tests/support/llama_runner.py"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if out:
        with np.load(out) as arrays:
            result["logits"] = {
                run["name"]: torch.from_numpy(
                    np.concatenate(
                        [arrays[f"{run['name']}/{i}"] for i, _ in enumerate(run["rows"])]
                    )
                )
                for run in job["runs"]
            }
    return result


def misfit(change: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((change - wanted).norm() / wanted.norm())


# -------------------------------------------------------------------------- adapters

CONVERTER = PYTHON.parents[1] / "llama.cpp/convert_lora_to_gguf.py"


@pytest.mark.parametrize("tied", ("untie", "skip-embedding"))
@pytest.mark.parametrize("kind", ("llama", "qwen2", "mistral"))
def test_an_adapter_through_llama_cpps_own_converter(tmp_path: Path, kind: str, tied: Any) -> None:
    """With the embedding among its targets and without it, llama.cpp computes what the hooks compute."""
    base = tmp_path / "base"
    saved(base, kind)
    export_gguf(base, tmp_path / "m.gguf", dtype="f32")
    model = load_model(base)
    plan = Plan((Ablate(unit(1), model.writers, strength=0.7),))
    certificate = export_lora(model, plan, tmp_path / "lora", tied=tied)
    done = subprocess.run(
        [
            sys.executable,
            CONVERTER,
            "--base",
            base,
            "--outfile",
            tmp_path / "lora.gguf",
            tmp_path / "lora",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(5, 9)
    runs = [
        {"name": "plain", "rows": rows},
        {"name": "lora", "rows": rows, "lora": str(tmp_path / "lora.gguf")},
    ]
    got = llama(tmp_path / "m.gguf", tmp_path / "l.npz", runs=runs)["logits"]
    sites = model.writers if tied == "untie" else model.writers[1:]
    with model.applied(Plan((Ablate(unit(1), sites, strength=0.7),))):
        want = torch.cat([model.logits([row], keep=len(row))[0] for row in rows])
    torch.testing.assert_close(got["lora"], want, rtol=0, atol=1e-4)
    assert float((got["lora"] - got["plain"]).abs().max()) > 0.1
    assert ("cost_of_skipped_embedding" in certificate) == (tied != "untie")


# -------------------------------------------------------------------------- control vectors


def test_a_control_vector_on_a_tiny_model_is_exact(tmp_path: Path) -> None:
    """In float32 nothing is left of the difference; vectors at every block that can have one."""
    hf = saved(tmp_path)
    export_gguf(tmp_path, tmp_path / "m.gguf", dtype="f32")
    plan = Plan(
        (
            Add(unit(1), Site(1, "resid_post"), coefficient=3),
            Add(unit(2), [Site(1, "mlp_out"), Site(2, "mlp_out")], coefficient=-2),
            Add(unit(3), Site(2, "resid_pre")),
        )
    )
    write_control_vector(plan, tmp_path / "v.gguf", model_hint="llama", n_layers=N_LAYERS)
    rows = rows_of(5, 9)
    runs = [
        {"name": "plain", "rows": rows},
        {"name": "added", "rows": rows, "control_vector": str(tmp_path / "v.gguf")},
        {"name": "half", "rows": rows, "control_vector": str(tmp_path / "v.gguf"), "scale": 0.5},
    ]
    got = llama(tmp_path / "m.gguf", tmp_path / "l.npz", runs=runs)["logits"]
    halved = Plan(
        tuple(Add(e.vectors[0], e.sites, coefficient=[a / 2 for a in e.amounts]) for e in plan)
    )
    for name, used in (("plain", Plan()), ("added", plan), ("half", halved)):
        want = torch.cat([forward(hf, row, editing(used)) for row in rows])
        torch.testing.assert_close(got[name], want, rtol=0, atol=1e-4)
    assert float((got["added"] - got["plain"]).abs().max()) > 0.5


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_model("smollm2")


def vector_at(layer: int, size: float) -> Plan:
    vector = torch.randn(576, generator=torch.Generator().manual_seed(1))
    return Plan((Add(vector, Site(layer, "resid_post"), coefficient=size / float(vector.norm())),))


def changes(
    smollm2: Any, gguf: Path | str, plans: dict[str, Plan], tmp_path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """How each plan moves the logits: of the hooked model, and of llama.cpp with its control vector."""
    rows = smollm2.encode_all(PROMPTS[:3])

    def hooked() -> torch.Tensor:
        return torch.cat([smollm2.logits([row], keep=len(row))[0].float() for row in rows])

    runs: list[dict[str, Any]] = [{"name": "plain", "rows": rows}]
    ours, plain = {}, hooked()
    for name, plan in plans.items():
        file = tmp_path / f"{name}.gguf"
        write_control_vector(plan, file, model_hint="llama", n_layers=smollm2.n_layers)
        runs.append({"name": name, "rows": rows, "control_vector": str(file)})
        with smollm2.applied(plan):
            ours[name] = hooked() - plain
    logits = llama(gguf, tmp_path / "l.npz", runs=runs)["logits"]
    return ours, {name: logits[name] - logits["plain"] for name in plans}


def test_smollm2s_own_gguf_moves_as_the_hooked_model_does(smollm2: Any, tmp_path: Path) -> None:
    """Q4_1 as it is published: llama.cpp rounds activations to 8 bits there, which leaves noise."""
    plans = {str(layer): vector_at(layer, 100.0) for layer in (9, 10, 11)}
    ours, theirs = changes(smollm2, resolve("smollm2").path or "", plans, tmp_path)
    for name, change in theirs.items():
        pair = torch.stack([change.flatten(), ours[name].flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.99, name
        assert misfit(change, ours[name]) < 0.1, name
    for other in ("9", "11"):  # the numbering: a neighbouring block fits far worse
        assert misfit(theirs["10"], ours[other]) > 4 * misfit(theirs["10"], ours["10"])


def test_smollm2_in_float32_moves_by_the_same_numbers(smollm2: Any, tmp_path: Path) -> None:
    """The same model without quantized kernels: what was noise above is gone."""
    export_checkpoint(smollm2, None, tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "m.gguf", dtype="f32")
    last = smollm2.n_layers - 1
    plans = {str(layer): vector_at(layer, 20.0) for layer in (1, 10, last)}
    ours, theirs = changes(smollm2, tmp_path / "m.gguf", plans, tmp_path)
    for name, change in theirs.items():
        assert misfit(change, ours[name]) < 1e-3, name


# ----------------------------------------------------------------------------------- models


def agrees(folder: Path, hf: Any) -> dict[str, Any]:
    """llama.cpp's logits of the folder's float32 GGUF are the model's, at every position."""
    rows = rows_of(3, 20, 33)
    report = export_gguf(folder, folder / "m.gguf", dtype="f32")
    runs = [{"name": "a", "rows": rows}]
    got = llama(folder / "m.gguf", folder / "l.npz", runs=runs)["logits"]["a"]
    with torch.no_grad():
        want = torch.cat([hf(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    return report


def test_tiny_models_compute_the_same(tmp_path: Path, kind: str, tied: bool) -> None:
    agrees(tmp_path, saved(tmp_path, kind, tied=tied))


def test_biases_everywhere(tmp_path: Path) -> None:
    report = agrees(tmp_path, saved(tmp_path, attention_bias=True, mlp_bias=True))
    assert sum(name.endswith(".bias") for name in report["tensors"]) == 7 * N_LAYERS


@pytest.mark.parametrize(
    "rope", [{"rope_type": "llama3", **LLAMA3}, {"rope_type": "linear", "factor": 4.0}]
)
def test_scaled_rotary_embeddings(tmp_path: Path, rope: dict[str, Any]) -> None:
    saved(tmp_path, head_dim=32)
    reconfigure(tmp_path, rope_parameters={**rope, "rope_theta": 500.0})
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    agrees(tmp_path, hf)
    reconfigure(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    row = torch.tensor(rows_of(33))
    with torch.no_grad():
        assert float((plain(row).logits - hf(row).logits).abs().max()) > 1e-2  # it matters


def test_an_edited_checkpoint_writes_the_same_text(smollm2: Any, tmp_path: Path) -> None:
    """Float16 in llama.cpp against the float32 folder in transformers: 8 prompts, 32 greedy tokens."""
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    plan = Plan((Ablate(vector, everywhere(smollm2.n_layers)),))
    export_checkpoint(smollm2, plan, tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "m.gguf")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    runs = [{"name": "a", "rows": rows, "max_new_tokens": 32}]
    found = llama(tmp_path / "m.gguf", tmp_path / "l.npz", runs=runs, texts=texts)
    assert found["texts"] == rows  # its own tokenizer gives the same tokens
    wrote = [tokenizer.decode(row) for row in found["runs"]["a"]]
    assert wrote == [tokenizer.decode(row) for row in greedy(hf, rows)]
    with torch.no_grad():
        want = torch.cat([hf(torch.tensor([row])).logits[0] for row in rows])
    assert float((found["logits"]["a"] - want).abs().max()) < 0.2  # of a spread of 8
    unedited = smollm2.generate(list(PROMPTS), max_new_tokens=32)
    assert [g.text for g in unedited] != wrote  # the edit shows in the text


def greedy(hf: Any, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    for row in rows:
        given = torch.tensor([list(row)])
        mask = torch.ones_like(given)
        out = hf.generate(given, attention_mask=mask, max_new_tokens=32, do_sample=False)
        new = out[0, len(row) :].tolist()
        yield new[:-1] if new[-1] == hf.generation_config.eos_token_id else new


# ------------------------------------------------------------------------------- tokenizers

TEXTS = (
    "Hello world",
    "  two spaces, then 12345 and 3.14159\n\n\tand   a tab\r\n",
    "I'll say it's 'RE-tried', WE'VE 100000 of them!!!...",
    "naïve café, Ωmega, 你好世界, 🙂🙂 and a\u00a0no-break space",
    "<|im_start|>user\nthe cat<|im_end|>\n",
    "x=1;y=[2,33,444];  # a comment\n    return x_y",
)


def trained(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one of the declared pre-tokenizers, trained on the texts themselves."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[name][1]))
    inner.pre_tokenizer = pre_tokenizer(name)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*TEXTS, "it's the 12345 100000 3.14 we've I'll"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_give_the_same_tokens(tmp_path: Path, name: str) -> None:
    saved(tmp_path, vocab_size=430)
    tokenizer = trained(name)
    tokenizer.save_pretrained(tmp_path)
    export_gguf(tmp_path, tmp_path / "m.gguf")
    tokens = llama(tmp_path / "m.gguf", texts=TEXTS)["texts"]
    assert tokens == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_sentencepiece_gives_the_same_tokens(tmp_path: Path) -> None:
    pieces = sentencepiece_folder(tmp_path)
    export_gguf(tmp_path, tmp_path / "m.gguf")
    texts = [text for text in TEXTS if "<|" not in text] + ["the cat sat on the dog"]
    tokens = llama(tmp_path / "m.gguf", texts=[*texts, "a<|user|>"])["texts"]
    assert tokens[:-1] == [[1, *pieces.Encode(text)] for text in texts]
    assert tokens[-1][-1] == 318
