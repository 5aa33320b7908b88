"""Shared by the benchmarks: the real model twice (bare HF, and ours), prompts, paired timing.

Ratios are measured side by side in one run, A B A B ..., so that a machine whose speed drifts doesn't
decide them. Run with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def arguments(description: str, **more: dict[str, Any]) -> argparse.Namespace:
    """`more`: further flags by name, as keywords of add_argument."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run at all?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64, help="prompts a side")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    found = parser.parse_args()
    if found.smoke:
        found.rounds, found.prompts = 1, 4
    return found


def models() -> tuple[Any, Any, Any]:
    """(bare HF model, its tokenizer, our Model on the Bridge), in separate memory."""
    from interp_ablate import load_model
    from interp_ablate.models.sources import check_device, load_hf, resolve, torch_dtype

    source = resolve("smollm2")
    bare, tokenizer = load_hf(source, dtype=torch_dtype("float32"), device=check_device("cpu"))
    return bare, tokenizer, load_model("smollm2")


def prompts(n: int) -> list[Any]:
    from interp_ablate import ContrastSet

    contrast = ContrastSet.load("declining")
    return [*contrast.positive[:n], *contrast.negative[:n]]


def paired(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function, each called once a round in turn, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(name: str, seconds: dict[str, list[float]], base: str, **facts: Any) -> None:
    """A table, and one JSON line: medians, and the median of the ratios round by round."""
    print(f"\n{name}")
    ratios = {}
    for key, values in seconds.items():
        pairs = [value / other for value, other in zip(values, seconds[base])]
        ratios[key] = statistics.median(pairs)
        spread = f"{min(pairs):.2f}-{max(pairs):.2f}"
        print(f"  {key:<34} {statistics.median(values):8.2f} s   x{ratios[key]:.2f}  ({spread})")
    medians = {key: round(statistics.median(values), 4) for key, values in seconds.items()}
    rounded = {key: round(value, 4) for key, value in ratios.items()}
    print(json.dumps({"benchmark": name, "median_seconds": medians, "ratios": rounded, **facts}))
