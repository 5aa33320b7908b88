"""The report: what it says of a whole run and of a partial one, and that no text of a model acts."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from interp_ablate import report
from interp_ablate.errors import RunError

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=x>\"'&"
RUN = {
    "configuration": {
        "model": "smollm2", "backend": "bridge", "dtype": "float32", "device": "cpu",
        "contrast": "declining", "positive": None, "negative": None, "system": None,
        "sites": ["resid_pre", "resid_mid", "resid_post"], "layers": "0-29", "positions": ["-1"],
        "n_train": 64, "n_validation": 32, "n_test": 32, "seed": 0, "new_tokens": 32, "max_kl": 0.1,
    },
    "versions": {"transformer-lens": "3.9.0", "torch": "2.9.0"},
    "model": {
        "name": "SmolLM2-135M-Instruct", "kind": "llama", "backend": "bridge", "n_layers": 30,
        "d_model": 576, "dtype": "float32", "fingerprint": "ab12" * 16,
    },
    "contrast": {
        "name": "declining", "fingerprint": "cd34" * 16, "n_positive": 128, "n_negative": 128,
        "source": "bundled",
    },
    "directions": {
        "count": 89,
        "left_out": {"blocks.0.hook_resid_pre[-1]": "the same activation for every prompt"},
    },
    "target_tokens": [
        {"id": 57, "text": "I", "p_positive": 0.81, "p_negative": 0.012},
        {"id": 90, "text": " Sorry", "p_positive": 0.05, "p_negative": 0.0001},
    ],
    "stages": {"collect": {"seconds": 12.34}, "sweep": {"seconds": 305.2}},
    "notes": ["2 prompts were dropped as duplicates"],
}  # fmt: skip
TEST = {
    "behaviour_before": 0.8125, "behaviour_after": 0.03125, "negative_before": 0.0,
    "negative_after": 0.0, "addition_after": 0.71875, "kl_first_token": 0.0423,
    "kl_continuation": 0.0712, "repetition_before": 0.04, "repetition_after": 0.05,
    "length_before": 30.2, "length_after": 31.0, "perplexity_before": 9.21, "perplexity_after": 9.6,
    "intervals": {
        "behaviour_before": [0.6875, 0.9375], "behaviour_after": [0.0, 0.09375],
        "addition_after": [0.5625, 0.875], "kl_first_token": [0.02, 0.07],
    },
    "controls": [
        {"name": "random 0", "behaviour_after": 0.65625, "kl_first_token": 0.11},
        {"name": "shuffled labels", "behaviour_after": 0.75, "kl_first_token": 0.05},
    ],
}  # fmt: skip
PLAN = {
    "format": "interp_ablate.plan/1",
    "edits": [
        {
            "op": "ablate", "strength": [0.4, 1.2], "positions": "all", "vectors": [[0.125, 0.25]],
            "sites": [f"blocks.{i}.hook_attn_out" for i in range(8)], "label": "25.resid_mid",
        }
    ],
}  # fmt: skip
ADDITION = {
    "format": "interp_ablate.plan/1",
    "edits": [
        {
            "op": "add", "coefficient": 9.5, "sites": ["blocks.22.hook_resid_post"],
            "positions": "all", "vectors": [[1.0, 0.0]], "label": "22.resid_post",
        }
    ],
}  # fmt: skip
SELECTED = {
    "plan": PLAN, "addition_plan": ADDITION, "trial": {"trial": 2, "behaviour": -9.5, "kl": 0.04},
    "rule": "constrained", "test": TEST,
    "limits": {"considered": 210, "removed": {"kl > 0.1": 120, "addition < 0": 31}, "kept": 59},
}  # fmt: skip
NONE_PASSED = {
    "plan": None, "addition_plan": None, "trial": None, "rule": "constrained",
    "limits": {
        "considered": 90, "removed": {"kl > 0.1": 90}, "kept": 0,
        "relax": "the lowest KL is 0.13: try --max-kl 0.15",
    },
}  # fmt: skip
CERTIFICATE = {
    "max_abs_logit_difference": 2.6e-4, "kl": 4e-11, "residual_along_direction": 3e-7,
    "passed": True, "limits": {"max_abs_logit_difference": 1e-3, "kl": 1e-6},
}  # fmt: skip
TRIALS = """\
trial,stage,layer,point,position,operation,attention_strength,behaviour,addition,kl,\
expression_rate,status,reason,seconds
0,screen,0,resid_pre,-1,ablate,,,,,,failed,no direction here,0.1
1,screen,22,resid_mid,-1,ablate,,-11.5,3.1,0.41,,ok,,0.9
2,refine,25,resid_mid,-1,band,1.2,-9.5,3.3,0.04,0.03125,ok,,0.9
3,refine,25,resid_mid,-1,band,0.7,-9.9,3.3,0.09,,ok,,0.9
"""


def generations(text: str = "I'm sorry, but I can't do that.") -> str:
    records = [
        {"label": label, "prompt": prompt, "condition": condition, "text": text,
         "expressed": expressed}
        for label, prompt, pattern in (
            ("positive", "Order me a pizza with mushrooms.", (True, False, None)),
            ("negative", "Name three rivers of France.", (False, False, True)),
        )
        for condition, expressed in zip(report.CONDITIONS, pattern)
        if expressed is not None
    ]  # fmt: skip
    return "".join(json.dumps(record) + "\n" for record in records)


def make_run(folder: Path) -> Path:
    (folder / "figures").mkdir(parents=True)
    (folder / "export").mkdir()
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "selected.json").write_text(json.dumps(SELECTED))
    (folder / "trials.csv").write_text(TRIALS)
    (folder / "generations.jsonl").write_text(generations())
    (folder / "export" / "certificate.json").write_text(json.dumps(CERTIFICATE))
    for name in ("pareto", "before_after", "projections", "projections_at_-2", "my_own"):
        (folder / "figures" / f"{name}.png").write_bytes(PNG)
    return folder
