"""`run` from its flags to a certified export, for every dtype and device, on a tiny model: a table of what ran.

    python tests/support/device_table.py

The devices are the CPU, a pretend one (`pretend_device`), and two pretend ones that the layers are spread over, where
fits go without gradients (torch counts one device of a kind that is made in Python).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import device_commands
import pretend_device
import torch

from interp_ablate.cli.main import main

DEVICES = {"CPU": "cpu", "pretend device": "pretend:0", "two pretend devices": "auto"}


def row(place: Path, dtype: str, device: str) -> str:
    """Exit status, the certificate's verdict and how far the export's logits are from the hooks'."""
    out, backward = place / f"{dtype}-{device}", torch.Tensor.backward
    flags = [
        *device_commands.FEW,
        "--sites",
        "resid_pre,resid_mid,resid_post",
        "--dtype",
        dtype,
        "--device",
        device,
    ]
    if device == "auto":
        torch.Tensor.backward = lambda loss: None  # type: ignore[method-assign]
    try:
        with nullcontext() if device == "cpu" else pretend_device.on(), redirect_stdout(sys.stderr):
            status = main(["--quiet", "run", "--model", "model", *flags, "--out", str(out)])
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    if status != 0:
        return f"exit {status}"
    certificate = json.loads((out / "export" / "certificate.json").read_text(encoding="utf-8"))
    verdict = "certified" if certificate["passed"] else "not certified"
    return f"{verdict}, logits within {certificate['max_abs_logit_difference']:.1e}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(device_commands.inputs(Path(folder)))
        lines = ["| dtype | " + " | ".join(DEVICES) + " |", "|---" * (1 + len(DEVICES)) + "|"]
        for dtype in ("float32", "bfloat16", "float16"):
            cells = [row(Path(folder), dtype, device) for device in DEVICES.values()]
            lines.append("| " + " | ".join([dtype, *cells]) + " |")
    print("\n".join(lines))
