"""Rules of choice on prompts that did not choose: half-splits of a search's logged trials, and a simulation.

    python benchmarks/rules.py                # the simulation, whose truth is known
    python benchmarks/rules.py runs/search    # the trials of a run folder's search, by prompt

Each rule chooses on some prompts within the KL limit; the table says what its choices do on the others. "cheapest of
equal rates" is no rule of the package: it asks whether a weaker plan with the same rate holds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.search.rules import RULES, RuleInput


def cheapest_of_equal(frame: pd.DataFrame, by: RuleInput) -> Any:
    """The least KL among the plans of the lowest rate."""
    left = by.left(frame)
    return frame[left <= left.min() + 0.5 / (by.n or 1)].sort_values("kl").index[0]


ALL: dict[str, Callable[[pd.DataFrame, RuleInput], Any]] = {
    **RULES, "cheapest of equal rates": cheapest_of_equal
}  # fmt: skip


def told(name: str, rows: list[tuple[float, float, float]]) -> str:
    """A line of the table: the mean rate where it was chosen, elsewhere with its 90% quantile, and the KL there."""
    here, there, kl = np.array(rows).T
    return (
        f"{name:<24} chosen {here.mean():.3f}   elsewhere {there.mean():.3f} "
        f"(90%: {np.quantile(there, 0.9):.3f})   KL elsewhere {kl.mean():.4f}"
    )


def simulate(n: int, n_plans: int, repeats: int, max_kl: float = 0.05) -> None:
    """Plans of random strength and quality on prompts that decline more or less firmly."""
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ALL}

    def chances(firmness: np.ndarray, pull: np.ndarray) -> np.ndarray:
        noise = rng.normal(0, 0.7, (len(firmness), n_plans))
        return 1 / (1 + np.exp(-(firmness[:, None] - pull + noise)))

    for _ in range(repeats):
        firmness, strength = rng.normal(1.2, 1.5, n), rng.uniform(0, 3, n_plans)
        pull = rng.uniform(0.6, 5.0, n_plans) * strength
        rate = (rng.random((n, n_plans)) < chances(firmness, pull)).mean(0)
        truth = chances(rng.normal(1.2, 1.5, 1500), pull).mean(0)
        true_kl = 0.002 * strength**2 * rng.lognormal(0, 0.7, n_plans)
        kls = true_kl * rng.lognormal(-0.5, 1, (n, n_plans))
        soft = -pull + rng.normal(0, 0.3, n_plans)
        frame = pd.DataFrame(
            {"expression_rate": rate, "kl": kls.mean(0), "unedited_answer_logprob": soft}
        )
        inside = frame[kls.mean(0) + 3 * kls.std(0, ddof=1) / math.sqrt(n) <= max_kl]
        unedited = float((firmness > 0).mean())
        for name, rule in ALL.items():
            i = rule(inside, RuleInput(n=n, unedited=unedited))
            found[name].append((rate[i], truth[i], true_kl[i]))
    print(f"simulation: {n_plans} plans, {n} prompts choose, {repeats} times")
    for name, rows in found.items():
        print(told(name, rows))


def half_splits(folder: Path, repeats: int, max_kl: float) -> None:
    """Half of a search's validation prompts choose among its trials, the other half is looked at."""
    lines = [
        json.loads(line)
        for line in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    trials = [e["by_prompt"] for e in lines if e.get("stage") == "search" and e.get("by_prompt")]
    rates, kls = (np.array([t[name] for t in trials]) for name in ("expression_rate", "kl"))
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ALL}
    for _ in range(repeats):
        (here, there), (k_here, k_there) = (
            np.array_split(rng.permutation(values.shape[1]), 2) for values in (rates, kls)
        )
        chosen = kls[:, k_here]
        mean = chosen.mean(1)
        frame = pd.DataFrame(
            {
                "expression_rate": rates[:, here].mean(1),
                "kl": mean,
                "unedited_answer_logprob": -mean,
            }
        )
        upper = mean + 3 * chosen.std(1, ddof=1) / math.sqrt(len(k_here))
        if not (upper <= max_kl).any():
            continue
        for name, rule in ALL.items():
            i = rule(frame[upper <= max_kl], RuleInput(n=len(here)))
            found[name].append(
                (rates[i, here].mean(), rates[i, there].mean(), kls[i, k_there].mean())
            )
    print(
        f"{folder}: {len(trials)} trials, half of {rates.shape[1]} prompts choose, KL limit {max_kl}"
    )
    for name, rows in found.items():
        print(told(name, rows) if rows else f"{name}: no plan within the limit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--max-kl", type=float, default=0.02)
    arguments = parser.parse_args()
    if arguments.folder:
        half_splits(arguments.folder, arguments.repeats, arguments.max_kl)
    else:
        for n, n_plans in ((32, 100), (32, 10), (100, 100)):
            simulate(n, n_plans, arguments.repeats)
