"""CPU seconds of a trial of a search and of a gradient fit, part by part, on the real model.

A trial is what `search` scores: answers to the positive validation prompts, first-token KL on the negative
ones. Its parts are run one after the other, for one plan and for three that share a batch. A fit's parts are those
of one gradient step (each term forward and back) and what a round asks for before it: answers under the edit.

CPU time of one thread (`time.process_time`) is what is printed, because it says the same on a machine that is
busy; give two versions in turn (PYTHONPATH) to compare them. Medians over the rounds.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import common

SITE = "blocks.21.hook_resid_post"
Parts = dict[str, list[float]]


def timed(parts: Parts, name: str, function: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = function()
    parts.setdefault(name, []).append(time.process_time() - start)
    return result


def plans_of(model: Any, direction: Any, n: int) -> list[Any]:
    """Bands of strengths along a direction, as a search draws them."""
    from interp_ablate.edits.plan import band

    depth = model.n_layers - 1
    return [
        band(
            direction,
            model.n_layers,
            attention=(1.0 + 0.1 * i, 0.7 * depth),
            mlp=(0.5, 0.7 * depth),
            width=0.6 * depth,
        )
        for i in range(n)
    ]


def trial(parts: Parts, bench: Any, plans: list[Any]) -> None:
    """The parts of `ValidationBench.objectives_of`."""
    from interp_ablate.evaluation.metrics import first_token_kl
    from interp_ablate.evaluation.outputs import generate_outputs_together

    n = len(plans)
    sides = [bench.outputs_under(plan) for plan in plans]
    answers = functools.partial(generate_outputs_together, [positive for positive, _ in sides])
    timed(parts, f"answers, {n} together", answers)
    for _, negative in sides:
        timed(
            parts,
            "first-token KL",
            lambda negative=negative: first_token_kl(negative, bench.negative),
        )


def step(parts: Parts, model: Any, direction: Any, data: Any) -> None:
    """The terms of one step of `fit_edit`, at the strengths that it begins with."""
    import torch

    from interp_ablate.search import gradient_fit as fit

    sites = model.writers
    read, write = (direction.vector.float().clone().requires_grad_() for _ in range(2))
    strengths = torch.full((len(sites),), fit.START, requires_grad=True)
    terms = {
        "expressing answers": lambda some: fit._unedited_answer_logprob(model, some).mean(),
        "unwanted passages": lambda some: fit._unwanted(model, some),
        "KL of other answers": lambda some: fit._kl(model, some),
    }
    some = data.some(0)
    with model.plans.fitting_erasure(read, write, sites, strengths):
        for name, term in terms.items():
            if name == "unwanted passages" and not some.passages:
                continue
            loss = timed(parts, f"{name}, forward", functools.partial(term, some))
            timed(parts, f"{name}, back", loss.backward)


def main() -> None:
    args = common.arguments(__doc__)
    import torch

    from interp_ablate import (
        Ablate,
        ContrastSet,
        Plan,
        Site,
        collect,
        estimate_directions,
        load_model,
    )
    from interp_ablate.evaluation.metrics import TargetLogOdds
    from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
    from interp_ablate.scoring.expressions import expression_scorer
    from interp_ablate.search.bench import ValidationBench
    from interp_ablate.search.gradient_fit import N_KEPT, START, fit_data

    torch.set_num_threads(1)
    n = args.prompts
    model, split = load_model("smollm2"), ContrastSet.load("declining").split(n, max(2, n // 2), 1)
    train, held_out = split.train, split.validation
    (direction,) = estimate_directions(collect(model, train, sites=[Site.parse(SITE)]))
    expression = expression_scorer(None, contrast="declining")
    bench = ValidationBench(
        model,
        held_out.positive,
        held_out.negative,
        target=TargetLogOdds((0,)),
        expression=expression,
    )
    bench.negative.first_logprobs, bench.negative.residual_cache  # noqa: B018 - once a run, no trial's
    edit = Plan((Ablate(direction, model.writers, strength=START),))
    parts: dict[str, Parts] = {"trial": {}, "fit": {}}
    unedited = [
        ModelOutputs(model, train.positive, max_new_tokens=32),
        ModelOutputs(model, train.negative, max_new_tokens=N_KEPT),
    ]
    for _ in range(args.rounds):
        for together in (1, 3):
            trial(parts["trial"], bench, plans_of(model, direction, together))
        under = [ModelOutputs(model, side.prompts, edit, max_new_tokens=32) for side in unedited]
        answers = functools.partial(generate_outputs_together, under)
        timed(parts["fit"], f"answers under the edit, {len(under[0].rows)} a side", answers)
        data = fit_data(*unedited, expression).with_loops(under)
        step(parts["fit"], model, direction, data)
    medians = {
        what: {name: round(statistics.median(seconds), 3) for name, seconds in each.items()}
        for what, each in parts.items()
    }
    for what, each in medians.items():
        print(f"\n{what}, CPU seconds of one thread")
        for name, seconds in each.items():
            print(f"  {name:<44} {seconds:8.2f}")
    gradient = sum(s for name, s in medians["fit"].items() if "forward" in name or "back" in name)
    print(f"  {'a gradient step':<44} {gradient:8.2f}")
    facts = {"prompts": n, "rounds": args.rounds, "gradient_step": round(gradient, 3)}
    print(json.dumps({"benchmark": "trials", "cpu_seconds": medians, **facts}))


if __name__ == "__main__":
    main()
