"""How the cost of a sweep grows with candidates and with prompts: 1x, 2x and 4x of each.

A candidate is an ablation everywhere, scored as the screening scores it (own words, KL, addition). Time per
candidate and prompt should not rise; with prompts it falls a little, for their shared prefix is run
once a candidate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import common

TIMES = (1, 2, 4)


def base_of(args: argparse.Namespace) -> tuple[int, int]:
    """Candidates and prompts a side at 1x."""
    return (1, 2) if args.smoke else (4, 8)


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


def swept(bench: Any, planned: Sequence[Any]) -> float:
    from interp_ablate.search.trials import score_trial

    start = time.perf_counter()
    for each in planned:
        score_trial(bench, each)
    return time.perf_counter() - start


def main() -> None:
    args = common.arguments(__doc__)
    from interp_ablate import ContrastSet, collect, estimate_directions, load_model
    from interp_ablate.search.edit_space import EditSpace
    from interp_ablate.search.race import screening_trials
    from interp_ablate.search.trials import planned_trial

    model = load_model("smollm2")
    candidates, prompts = base_of(args)
    split = ContrastSet.load("declining").split(args.prompts, TIMES[-1] * prompts, 1)
    bench = bench_of(model, split)
    train = collect(model, split.train)
    directions = estimate_directions(train)
    space = EditSpace(train, model.writers, saved=directions)
    trials = screening_trials(directions)
    every = [planned_trial(trial, space) for trial in trials]
    # from the middle on: where the direction was read does not matter for the time
    some = every[len(every) // 2 :]
    sizes = [("candidates", k * candidates, prompts) for k in TIMES]
    sizes += [("prompts", candidates, k * prompts) for k in TIMES]
    seconds: dict[tuple[str, int, int], list[float]] = {size: [] for size in sizes}
    swept(bench, some[:1])  # warm-up
    for _ in range(args.rounds):
        for size in sizes:
            seconds[size].append(swept(bench.head(size[2]), some[: size[1]]))
    print("\nscaling of a sweep")
    print("  grows        candidates  prompts a side   seconds  ms a candidate-prompt   x 1x")
    rows = []
    for size, values in seconds.items():
        what, n, each = size
        first = seconds[what, candidates, prompts]
        ratio = statistics.median(value / one for value, one in zip(values, first))
        middle = statistics.median(values)
        # a candidate's prompts: positive, negative, and negative under addition
        share = 1000 * middle / (n * 3 * each)
        print(f"  {what:<12} {n:10d} {each:15d} {middle:9.2f} {share:22.1f} {ratio:6.2f}")
        rows.append(
            {
                "grows": what,
                "candidates": n,
                "prompts": each,
                "seconds": round(middle, 3),
                "ms_per_candidate_prompt": round(share, 2),
                "ratio": round(ratio, 3),
            }
        )
    print(json.dumps({"benchmark": "scaling", "rows": rows}))


if __name__ == "__main__":
    main()
