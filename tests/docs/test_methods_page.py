"""The code on the page of methods runs, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

import interp_ablate
from interp_ablate import scoring
from interp_ablate.models.load import from_hf
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.scoring.expressions import ExpressionScorer

ROOT = Path(__file__).parents[2]


def test_its_snippets_run_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    text = text.split("## Before the methods below")[1]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 14
    hf, tokenizer = tiny(eos_token_id=None)
    with torch.no_grad():
        hf.lm_head.weight.mul_(4)
    model = from_hf(hf, tokenizer, backend="bridge")
    monkeypatch.setattr(interp_ablate, "load_model", lambda name: model)
    # every answer of a random model expresses it
    monkeypatch.setattr(
        scoring, "expression_scorer", lambda name: ExpressionScorer((), patterns=("",))
    )
    whole = ContrastSet.split
    monkeypatch.setattr(ContrastSet, "split", lambda self, *sizes: whole(self, 12, 4, 4))
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        block = block.replace(
            "split.validation, max_kl=None", "split.validation, max_kl=None, depth=1"
        )
        exec(compile(block, f"docs/methods.md, snippet {number + 1}", "exec"), namespace)
        if "plan" in namespace:
            with model.applied(namespace["plan"]):
                edited = model.logits(["who are you?"])
            assert (edited - model.logits(["who are you?"])).abs().max() > 1e-3, block
    assert len(namespace["by_layer"]) == model.n_layers and len(namespace["cone"].vectors) == 2
