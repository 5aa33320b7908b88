"""A folder with a tiny model of peaked first tokens and two files of prompts that it answers differently."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny


def write_task(place: Path, n_prompts: int = 24) -> None:
    """Write model/, yes.txt and no.txt."""
    model, tokenizer = tiny(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name, words in (("yes", "order bring fetch send"), ("no", "name list tell describe")):
        verbs = words.split()
        lines = [f"{verbs[i % 4]} number {i * 7 + 3} now" for i in range(n_prompts)]
        (place / f"{name}.txt").write_text("\n".join(lines))
