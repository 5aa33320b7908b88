"""How costs grow: candidates and prompts of a sweep, layers of a model, prompts of `lint`, at 1x, 4x and 16x.

A candidate is an ablation everywhere, scored as the screening scores it (own words, KL, addition). Models of more
layers are random ones of SmolLM2's kind, 64 wide; each is loaded, collected from, edited and exported. The exponent is
that of the last step, from 4x to 16x: 1 is linear, less is better, as what is done once then counts for less. All of it
with one thread and with two. How a filter grows with its file is in `filtering.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import common

TIMES = [1, 4, 16]
THREADS = [1, 2]
Work = dict[int, Callable[[], Any]]


def bench_of(model: Any, split: Any) -> Any:
    from interp_ablate.evaluation.metrics import TargetLogOdds, find_target_tokens
    from interp_ablate.evaluation.outputs import ModelOutputs
    from interp_ablate.scoring.expressions import ExpressionScorer
    from interp_ablate.search.bench import ValidationBench

    sides = (split.train.positive[:32], split.train.negative[:32])
    found = find_target_tokens(*(ModelOutputs(model, side).first_logprobs for side in sides))
    return ValidationBench(
        model,
        split.validation.positive,
        split.validation.negative,
        target=TargetLogOdds(tuple(token for token, _, _ in found)),
        expression=ExpressionScorer("declining"),
    )


def sweeps(smoke: bool) -> Iterator[tuple[str, Work]]:
    """More candidates on as many prompts, and more prompts of as many candidates."""
    from interp_ablate import ContrastSet, collect, estimate_directions, load_model
    from interp_ablate.search.edit_space import EditSpace
    from interp_ablate.search.race import screening_trials
    from interp_ablate.search.trials import planned_trial, score_trial

    model = load_model("smollm2")
    each = 1 if smoke else 4
    split = ContrastSet.load("declining").split(32, TIMES[-1] * each, 1)
    bench = bench_of(model, split)
    train = collect(model, split.train)
    directions = estimate_directions(train)
    space = EditSpace(train, model.writers, saved=directions)
    trials = screening_trials(directions)
    every = [planned_trial(trial, space) for trial in trials]

    def swept(candidates: int, prompts: int) -> Callable[[], Any]:
        head, some = bench.head(prompts), every[-candidates:]
        return lambda: [score_trial(head, one) for one in some]

    yield "candidates of a sweep", {k: swept(k * (1 if smoke else 2), each) for k in TIMES}
    yield "prompts of a sweep", {k: swept(2, k * each) for k in TIMES}


def depths(place: Path, smoke: bool) -> Iterator[tuple[str, Work]]:
    """Models of 4, 16 and 64 layers, from a folder to a certified export."""
    import torch
    from transformers import AutoModelForCausalLM

    from interp_ablate import ContrastSet, Plan, collect, estimate_directions, load_model
    from interp_ablate.edits import Ablate
    from interp_ablate.export import export_checkpoint
    from interp_ablate.models.sources import load_hf, resolve

    bare, tokenizer = load_hf(resolve("smollm2"), dtype=torch.float32, device=torch.device("cpu"))
    config = bare.config
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    whole, n = ContrastSet.load("declining"), 4 if smoke else 32
    contrast = ContrastSet.from_texts(whole.positive[:n], whole.negative[:n])
    models: dict[int, Any] = {}
    for k in TIMES:
        config.update({**sizes, "num_key_value_heads": 2, "num_hidden_layers": 4 * k})
        for part in (AutoModelForCausalLM.from_config(config), tokenizer):
            part.save_pretrained(place / str(k))
        models[k] = load_model(str(place / str(k)))
    read = {k: collect(model, contrast) for k, model in models.items()}
    plans = {
        k: Plan((Ablate(estimate_directions(read[k])["blocks.2.hook_resid_post"], model.writers),))
        for k, model in models.items()
    }

    def edited(k: int) -> Any:
        with models[k].applied(plans[k]):
            return models[k].logits(list(contrast.positive))

    def exported(k: int) -> Any:
        shutil.rmtree(place / "out", ignore_errors=True)
        return export_checkpoint(models[k], plans[k], place / "out")

    parts: dict[str, Callable[[int], Any]] = {
        "load": lambda k: load_model(str(place / str(k))),
        "collect": lambda k: collect(models[k], contrast),
        "directions": lambda k: estimate_directions(read[k]),
        "a pass under a plan": edited,
        "export": exported,
    }
    for name, part in parts.items():
        yield (
            f"layers: {name}",
            {k: lambda k=k, part=part: part(k) for k in TIMES},  # type: ignore[misc]
        )


def linted(smoke: bool) -> Iterator[tuple[str, Work]]:
    """Sets of prompts that differ in a few words each."""
    from interp_ablate import ContrastSet
    from interp_ablate.prompts import lint

    def of(n: int) -> Callable[[], Any]:
        sides = (
            [f"{verb} the {i % 997} of {i // 997} and {i * 7919 % 10007} now" for i in range(n)]
            for verb in ("order", "name")
        )
        contrast = ContrastSet.from_texts(*sides)
        return lambda: lint(contrast)

    yield "prompts of lint", {k: of(k * (20 if smoke else 2000)) for k in TIMES}


def measured(work: Work, rounds: int) -> dict[int, float]:
    """Median seconds at each size, in turn, after one warm-up at the smallest."""
    work[TIMES[0]]()
    seconds: dict[int, list[float]] = {k: [] for k in work}
    for _ in range(rounds):
        for k, do in work.items():
            start = time.perf_counter()
            do()
            seconds[k].append(time.perf_counter() - start)
    return {k: statistics.median(values) for k, values in seconds.items()}


def rows_of(args: argparse.Namespace, place: Path) -> Iterator[dict[str, Any]]:
    import torch

    parts = sweeps(args.smoke), depths(place, args.smoke), linted(args.smoke)
    for what, work in chain.from_iterable(parts):
        for threads in THREADS:
            torch.set_num_threads(threads)
            seconds = measured(work, args.rounds)
            one, four, sixteen = (seconds[k] for k in TIMES)
            yield {
                "grows": what,
                "threads": threads,
                "seconds": [round(each, 4) for each in seconds.values()],
                "times": [round(four / one, 2), round(sixteen / one, 2)],
                "exponent": round(math.log(sixteen / four, TIMES[2] / TIMES[1]), 2),
            }


def main() -> None:
    args = common.arguments(__doc__)
    if args.smoke:
        TIMES[:], THREADS[:] = (1, 2, 3), (2,)
    print("\ngrowth")
    print(f"  what grows, {TIMES[0]}x, {TIMES[1]}x and {TIMES[2]}x       threads    seconds                      ratios          exponent")  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for row in rows_of(args, Path(name)):
            one, four, sixteen = row["seconds"]
            print(f"  {row['grows']:<28}{row['threads']:7d}{one:16.3f}{four:8.3f}{sixteen:8.3f}{row['times'][0]:8.2f}{row['times'][1]:8.2f}{row['exponent']:10.2f}", flush=True)  # fmt: skip
            rows.append(row)
    print(json.dumps({"benchmark": "scaling", "rows": rows}))


if __name__ == "__main__":
    main()
