"""Loads exports in transformers 4 for the tests, in an environment of its own (torch and transformers only).

    python transformers4_runner.py < job.json > result.json

A job: {"out": FILE.npz, "folders": {name: {"folder": FOLDER, "rows": [[token, ...], ...], "texts": [text, ...],
"messages": [...] or null}}}. Logits of every position of every row go to FILE.npz as "<name>/<row number>"; the
result holds the texts' tokens, with and without what the tokenizer adds, and the rendered messages.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = json.load(sys.stdin)
    arrays: dict[str, np.ndarray] = {}
    result: dict = {"version": transformers.__version__, "folders": {}}
    for name, part in job["folders"].items():
        model, info = AutoModelForCausalLM.from_pretrained(part["folder"], output_loading_info=True)
        lacking = {key: sorted(map(str, names)) for key, names in info.items() if names}
        found: dict = {"class": type(model).__name__, "dtype": str(model.dtype), "lacking": lacking}
        with torch.no_grad():
            for i, row in enumerate(part["rows"]):
                arrays[f"{name}/{i}"] = model(torch.tensor([row])).logits[0].float().numpy()
        if part.get("texts"):
            tokenizer = AutoTokenizer.from_pretrained(part["folder"])
            found["tokenizer"] = type(tokenizer).__name__
            found["special"] = sorted(map(str, tokenizer.all_special_tokens))
            inputs = tokenizer(part["texts"][0], return_tensors="pt")
            found["inputs"] = sorted(inputs)
            with torch.no_grad():
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
            found["tokens"] = [tokenizer(text)["input_ids"] for text in part["texts"]]
            found["bare"] = [
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in part["texts"]
            ]
            if part.get("messages"):
                found["rendered"] = tokenizer.apply_chat_template(
                    part["messages"], tokenize=False, add_generation_prompt=True
                )
        result["folders"][name] = found
    np.savez(job["out"], **arrays)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
