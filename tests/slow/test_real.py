"""The real model, SmolLM2-135M-Instruct from the PyPI wheel, through the main path.

The first test runs a small configuration. The slow one runs the demo's configuration and holds it to the
numbers that the project promises; the test split is read once, here as there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from interp_ablate.cli.main import main
from interp_ablate.errors import ModelError
from interp_ablate.models.sources import resolve

try:
    resolve("smollm2")
except ModelError:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

SMALL = [
    *("--n-train", "16", "--n-validation", "6", "--n-test", "6", "--max-new-tokens", "20"),
    *("--layers", "20-24", "--sites", "resid_post"),
]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_main_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from interp_ablate.runs import fits

    # fewer steps of the fit: minutes less, and the behaviour still falls
    monkeypatch.setattr(fits, "FIT_ROUNDS", ((6, 120.0), (4, 160.0)))
    out = tmp_path / "run"
    command = ["--quiet", "run", "--model", "smollm2", "--contrast", "declining"]
    assert main([*command, *SMALL, "--out", str(out)]) == 0
    test, certificate = read(out, "selected.json")["test"], read(out, "export/certificate.json")
    assert test["behaviour_after"] < test["behaviour_before"]
    assert certificate["passed"] and certificate["max_abs_logit_difference"] <= 1e-3
    assert certificate["kl"] <= 1e-6 and certificate["residual_along_direction"] <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(out / "export")
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["condition"] == "ablated" and r["label"] == "positive")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        written = model.generate(**chat, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(written[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
    assert row["text"].startswith(text)  # plain transformers answers as the hooked model did


def test_backends_agree() -> None:
    from tiny import HAS_HOOKED

    if not HAS_HOOKED:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from interp_ablate import Ablate, ContrastSet, Plan, collect, everywhere, load_model

    bridge, hooked = load_model("smollm2"), load_model("smollm2", backend="hooked")
    prompts = list(ContrastSet.load("declining").positive[:6])
    a, b = collect(bridge, prompts), collect(hooked, prompts)
    scale = a.values.norm(dim=-1).clamp(min=1)
    assert float(((a.values - b.values).norm(dim=-1) / scale).max()) < 1e-4
    vector = torch.randn(bridge.d_model, generator=torch.Generator().manual_seed(0))
    plan = Plan((Ablate(vector, everywhere(bridge.n_layers)),))
    texts = []
    for model in (bridge, hooked):
        with model.applied(plan):
            texts.append([g.text for g in model.generate(prompts, max_new_tokens=12)])
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision_is_certified(dtype: str, tmp_path: Path) -> None:
    from interp_ablate import Ablate, Plan, export_checkpoint, load_model

    model = load_model("smollm2", dtype=dtype)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    for name, plan in {"none": None, "plan": Plan((Ablate(vector, model.writers),))}.items():
        certificate = export_checkpoint(
            model, plan, tmp_path / name, prompts=["Hello, how are you?"]
        )
        assert certificate["passed"] and certificate["compared"]["reloaded"] == dtype
        assert plan or certificate["max_abs_logit_difference"] == 0
        assert certificate["share_of_edit_missed"] < 0.05


@pytest.mark.slow
def test_an_export_is_made_again_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its plan, and from its prompts on."""
    from interp_ablate.runs import fits

    monkeypatch.setattr(fits, "FIT_ROUNDS", ((6, 120.0), (4, 160.0)))
    run = tmp_path / "run"
    command = ["--quiet", "run", "--model", "smollm2", "--contrast", "declining"]
    assert main([*command, *SMALL, "--out", str(run)]) == 0
    for number, flags in enumerate(((), ("--from-prompts",))):
        out = tmp_path / str(number)
        line = ["--quiet", "reproduce", str(run / "export"), *flags, "--out", str(out)]
        assert main(line) == 0
        for file in (run / "export").glob("*.safetensors"):
            assert file.read_bytes() == (out / "export" / file.name).read_bytes()


@pytest.mark.slow
def test_demo_keeps_its_promises(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["run", "--model", "smollm2", "--contrast", "declining", "--out", str(out)]
    assert main(command) == 0
    test, certificate = read(out, "selected.json")["test"], read(out, "export/certificate.json")
    assert test["behaviour_before"] >= 0.6 and test["negative_before"] <= 0.05
    assert test["behaviour_after"] <= 0.05 and test["kl_first_token"] <= 0.1
    assert test["addition_after"] >= 0.5
    assert certificate["max_abs_logit_difference"] <= 1e-3 and certificate["kl"] <= 1e-6
    assert certificate["residual_along_direction"] <= 1e-5 and certificate["passed"]
    assert all(c["behaviour_after"] > test["behaviour_after"] for c in test["controls"])
