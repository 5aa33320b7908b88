"""Screening: the exact sweep's choice of direction for less, by racing and by gradient.

Every distinct difference-in-means direction of a bundled contrast set is ablated everywhere and scored on
all validation prompts (own words, KL, and addition, as `sweep` screens); `sweep.merit` ranks. Against that:

- the race: `sweep.screen` with its RUNGS, and without the last of them;
- by gradient: with g the gradient of a score at a writer's output x, ablating a unit direction d with
  strength s changes the score by -s sum (g.d)(x.d) to first order: -(d^T M d), with M the sum of g x^T over
  writers and positions, from one forward and backward pass for all directions. KL has no first order at
  strength 0; its second is half the variance of the first-order change of log p(y), y drawn from the
  model (the Fisher information), from some more backward passes. "halfway" takes both
  gradients at strength 0.5 of the candidates' mean direction instead. "path" adds up first-order steps
  along each own direction, for the third that "at 0" likes best, on a few prompts.

Costs are prompts run forward; a backward pass counts 2. An estimate chooses by scoring its first
CHECKED directions exactly. What a choice owes to the order of the prompts is told by races over shuffled
prompts, from the exact sweep's scores by prompt.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import common

CONTRASTS = ("declining", "sentiment", "language")
CHECKED = 10
SAMPLES = 4  # tokens drawn for the second order of KL
HALF = 0.5
PATH = (0.25, 0.75)  # strengths, midpoints of equal steps
PATH_PROMPTS = 4
GRADIENT_ROWS = 8  # a batch, with its graph
SHUFFLES = 200
SIDES = 3  # passes of a prompt index: positive, negative, negative under addition


@dataclass(frozen=True)
class Ground:
    """A contrast set's validation bench, its distinct directions, and their candidates."""

    model: Any
    bench: Any
    directions: Any
    items: list[Any]
    candidates: list[Any]

    @property
    def prompts(self) -> int:
        return len(self.bench.positive.rows)


def ground_of(model: Any, name: str, args: Any) -> Ground:
    from interp_ablate import ContrastSet, collect, errors, estimate_directions
    from interp_ablate.evaluation.metrics import TargetLogOdds, find_target_tokens
    from interp_ablate.evaluation.outputs import ModelOutputs
    from interp_ablate.scoring.expression_lists import EXPRESSIONS_OF_CONTRAST
    from interp_ablate.scoring.expressions import ExpressionScorer
    from interp_ablate.search.bench import ValidationBench
    from interp_ablate.search.candidates import distinct, screening

    n = 4 if args.smoke else 32
    split = ContrastSet.load(name).split(args.prompts, n, 1)
    sides = (split.train.positive[:32], split.train.negative[:32])
    first = [ModelOutputs(model, side).first_logprobs for side in sides]
    try:
        target = [token for token, _, _ in find_target_tokens(*first)]
    except errors.InterpAblateError:  # only the published rule reads it
        target = [int((first[0].exp().mean(0) - first[1].exp().mean(0)).argmax())]
    bench = ValidationBench(
        model,
        split.validation.positive,
        split.validation.negative,
        target=TargetLogOdds(tuple(target)),
        expression=ExpressionScorer(EXPRESSIONS_OF_CONTRAST[name]),
    )
    bench.baseline  # noqa: B018  (everyone starts with it)
    directions = estimate_directions(collect(model, split.train)).of("difference_in_means")
    items = distinct(directions)
    step = 12 if args.smoke else 1
    return Ground(model, bench, directions, items[::step], screening(directions)[::step])


# ---- the exact sweep, kept by prompt -----------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Scores by candidate and prompt, and which positive prompts' own answers express the behaviour."""

    unedited_answer_logprob: Any
    kl: Any
    behaviour: Any
    addition: Any
    unedited_answer_logprob_before: Any
    expressed: Any
    seconds: float
    passes: int

    def merits(
        self, positive: Sequence[int] | None = None, negative: Sequence[int] | None = None
    ) -> Any:
        """`sweep.merit` of every candidate by some prompts of each side (all by default)."""
        import pandas as pd

        from interp_ablate.search.race import removal_per_kl

        every = range(self.kl.shape[1])
        first = list(every if positive is None else positive)
        some = list(every if negative is None else negative)
        telling = [i for i in first if self.expressed[i]] or first
        rows = pd.DataFrame(
            {"unedited_answer_logprob": self.unedited_answer_logprob[:, telling].mean(1)}
        )
        rows["unedited_answer_logprob_baseline"] = float(
            self.unedited_answer_logprob_before[telling].mean()
        )
        rows["kl"] = self.kl[:, some].mean(1)
        return removal_per_kl(rows)


def answers_of(bench: Any) -> list[list[int]]:
    """What `OwnWords` forces: the first tokens of the unedited model's answers."""
    n = bench.unedited_answer_logprob.tokens
    return [list(generation.tokens)[:n] or [0] for generation in bench.positive.generations]


def unedited_answer_logprob(bench: Any, evidence: Any) -> tuple[Any, Any]:
    """Log-probability of every prompt's own answer, and the first token's distribution."""
    import torch

    from interp_ablate.evaluation.metrics import chosen_logprobs

    logprobs = bench.unedited_answer_logprob.logprobs(evidence, bench.positive)
    values = [chosen_logprobs(r, end).sum() for r, end in zip(logprobs, answers_of(bench))]
    return torch.stack(values), torch.stack([rows[0] for rows in logprobs])


def exact_sweep(ground: Ground) -> Exact:
    import torch

    from interp_ablate import Add, Plan
    from interp_ablate.evaluation.metrics import FirstTokenKL
    from interp_ablate.evaluation.outputs import ModelOutputs

    model, bench = ground.model, ground.bench
    found: dict[str, list[Any]] = {
        "unedited_answer_logprob": [],
        "kl": [],
        "behaviour": [],
        "addition": [],
    }
    start = time.perf_counter()
    for item, candidate in zip(ground.items, ground.candidates):
        positive, negative = bench.outputs_under(candidate.plan(item, model.writers))
        words, first = unedited_answer_logprob(bench, positive)
        added = ModelOutputs(model, bench.negative.rows, Plan((Add(item, item.site),)))
        found["unedited_answer_logprob"].append(words)
        found["behaviour"].append(bench.target.of_logprobs(first))
        found["kl"].append(FirstTokenKL()(negative, bench.negative))
        found["addition"].append(bench.target(added, bench.negative))
    seconds = time.perf_counter() - start
    tables = {name: torch.stack(rows).double().numpy() for name, rows in found.items()}
    return Exact(
        **tables,
        unedited_answer_logprob_before=unedited_answer_logprob(bench, bench.positive)[0]
        .double()
        .numpy(),
        expressed=bench.expression.score_texts(bench.positive.texts).bool().numpy(),
        seconds=seconds,
        passes=len(ground.items) * SIDES * ground.prompts,
    )


def by_arditi(ground: Ground, exact: Exact) -> str:
    """What the published rule would take from the same scores; limits relaxed to the unedited model's."""
    import pandas as pd

    from interp_ablate.search.selection import arditi

    sites = [item.site for item in ground.items]
    rows = pd.DataFrame({"site": map(str, sites), "layer": [site.layer for site in sites]})
    for name in ("behaviour", "addition", "kl"):
        rows[name] = getattr(exact, name).mean(1)
    least = min(0.0, ground.bench.baseline["addition_baseline"])
    for max_kl in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        limits = {"max_kl": max_kl, "min_addition": least}
        choice = arditi(rows, n_layers=ground.model.n_layers, **limits)
        if choice.row:
            return f"{choice.row['site']} (KL <= {max_kl:g})"
    return "none"


# ---- the race --------------------------------------------------------------------------------------------


def passes_of(rungs: Sequence[tuple[int, int]], n: int) -> int:
    """Prompts run by a race of n candidates."""
    return sum(SIDES * prompts * min(most, n) for prompts, most in rungs)


def rungs_of(ground: Ground) -> list[tuple[int, int]]:
    """RUNGS, as far as there are prompts."""
    from interp_ablate.search.race import RUNGS, usable_rungs

    return usable_rungs(RUNGS, ground.prompts)


def raced(ground: Ground) -> list[dict[str, Any]]:
    """`sweep.screen`, and what it would have chosen without its last rung."""
    from interp_ablate.search.race import race_directions, removal_per_kl
    from interp_ablate.search.sweep import run_trial
    from interp_ablate.search.trial_table import to_frame

    best, seconds = [], []

    def score(small: Any, candidates: Any) -> Any:
        start = time.perf_counter()
        trials = [run_trial(small, ground.directions, candidate) for candidate in candidates]
        seconds.append(time.perf_counter() - start)
        table = to_frame(trials, small)
        best.append(str(trials[int(removal_per_kl(table).idxmax())].candidate.site))
        return trials

    rungs = rungs_of(ground)
    race_directions(ground.bench, ground.candidates, score, rungs=rungs)
    return [
        {
            "name": name,
            "choice": best[len(some) - 1],
            "passes": passes_of(some, len(ground.candidates)),
            "seconds": sum(seconds[: len(some)]),
        }
        for name, some in (("race", rungs), ("race, without its last rung", rungs[:-1]))
    ]


def simulated(
    exact: Exact, rungs: Sequence[tuple[int, int]], alive: Sequence[int]
) -> dict[str, float]:
    """The race over shuffled prompts: how often the exact best wins, and what is lost where it doesn't."""
    whole = exact.merits()
    best, regrets = int(whole.idxmax()), []
    hits = 0
    for seed in range(SHUFFLES):
        order = list(range(exact.kl.shape[1]))
        random.Random(seed).shuffle(order)
        telling = sorted(order, key=lambda i: not exact.expressed[i])
        places = list(alive)
        for prompts, most in rungs:
            merits = exact.merits(telling[:prompts], order[:prompts])
            places = sorted(places[:most], key=lambda i: -merits[i])
        hits += places[0] == best
        regrets.append(1 - whole[places[0]] / whole[best])
    regrets.sort()
    return {
        "exact_best": hits / SHUFFLES,
        "regret": statistics.mean(regrets),
        "regret_95": regrets[int(0.95 * SHUFFLES) - 1],
    }


# ---- by gradient -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Scores to differentiate: prompt rows and, from a batch's logits, scores [k, batch] of each."""

    rows: list[list[int]]
    lengths: list[int]
    keep: int
    scores: Callable[[Sequence[int], Any], Any]
    k: int = 1

    @property
    def passes(self) -> int:
        return len(self.rows) * (1 + 2 * self.k)

    def first(self, n: int) -> Target:
        return Target(self.rows[:n], self.lengths[:n], self.keep, self.scores, self.k)


def unedited_answer_logprob_target(bench: Any) -> Target:
    """Log-probability of the expressing answers."""
    import torch

    expressed = bench.expression.score_texts(bench.positive.texts).bool().tolist()
    some = [i for i, yes in enumerate(expressed) if yes] or list(range(len(expressed)))
    answers = [answers_of(bench)[i] for i in some]
    prompts = [bench.positive.rows[i] for i in some]

    def scores(index: Sequence[int], logits: Any) -> Any:
        found = []
        for i, row in zip(index, logits):
            end = torch.tensor(answers[i])
            logprobs = row[-len(end) - 1 : -1].float().log_softmax(-1)
            found.append(logprobs.gather(-1, end[:, None]).sum())
        return torch.stack(found)[None]

    rows = [prompt + end for prompt, end in zip(prompts, answers)]
    return Target(rows, [len(p) for p in prompts], max(map(len, answers)) + 1, scores)


def drawn_target(bench: Any) -> Target:
    """log p of first tokens drawn from the unedited model."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def scores(index: Sequence[int], logits: Any) -> Any:
        logprobs = logits[:, -1].float().log_softmax(-1)
        drawn = torch.multinomial(logprobs.detach().exp(), SAMPLES, True, generator=generator)
        return logprobs.gather(-1, drawn).T

    rows = bench.negative.rows
    return Target(rows, [len(row) for row in rows], 1, scores, SAMPLES)


def kl_target(bench: Any) -> Target:
    from interp_ablate.evaluation.metrics import kl_divergence

    reference = bench.negative.first_logprobs

    def scores(index: Sequence[int], logits: Any) -> Any:
        return kl_divergence(reference[list(index)], logits[:, -1].float().log_softmax(-1))[None]

    rows = bench.negative.rows
    return Target(rows, [len(row) for row in rows], 1, scores)


def effects(model: Any, target: Target, units: Any, along: Any, strength: float) -> Any:
    """d(score)/d(strength) of ablating each unit direction at all writers: [k, prompt, candidate].

    Taken where the direction `along` is ablated with a strength (below 1) already.
    """
    import torch

    # a row that starts with another token: no prefix is shared, every position is in the graph
    apart = [target.rows[0][0] + 1, *target.rows[0][1:]]
    strengths = torch.full((len(model.writers),), float(strength), requires_grad=True)
    found = torch.zeros(target.k, len(target.rows), len(units))

    def held(x: Any, batch: Any) -> Any:
        x.retain_grad()
        return x

    stream = model.stream(
        [apart, *target.rows],
        keep=target.keep,
        prompt_lengths=[target.lengths[0], *target.lengths],
        capture=dict.fromkeys(model.writers, held),
        batch_size=GRADIENT_ROWS,
    )
    with model.plans.fitting_erasure(along, along, model.writers, strengths):
        for batch, logits, captured in stream:
            real = [place for place, i in enumerate(batch.index) if i]
            if not real:
                continue
            index = [batch.index[place] - 1 for place in real]
            for k, scores in enumerate(target.scores(index, logits[real])):
                scores.sum().backward(retain_graph=k + 1 < target.k)
                for x in captured.values():
                    found[k, index] -= _products(x, units, along, strength)[real]
                    x.grad = None
    return found.double()


def _products(x: Any, units: Any, along: Any, strength: float) -> Any:
    """Sum over positions of (g.d)(x.d), x as it was before the edit."""
    grad, edited = x.grad, x.detach()
    before = edited + strength / (1 - strength) * (edited @ along)[..., None] * along
    return ((grad @ units.T) * (before @ units.T)).sum(1)


@dataclass(frozen=True)
class Estimate:
    """What an estimate says of every candidate (NaN: nothing), and what it took."""

    name: str
    gain: Any
    kl: Any
    passes: int
    seconds: float
    checked: int = CHECKED
    removal_per_kl: Any = field(init=False)

    def __post_init__(self) -> None:
        merit = self.gain.clip(0) / (0.1 + self.kl.clip(0))
        object.__setattr__(self, "merit", merit)

    @property
    def order(self) -> list[int]:
        """Candidates, the best first; those that nothing is said of are left out."""
        import numpy as np

        known = [i for i in range(len(self.merit)) if np.isfinite(self.merit[i])]
        # among those without any gain, the gain itself
        return sorted(known, key=lambda i: (-self.merit[i], -self.gain[i]))


def at_zero(ground: Ground, units: Any) -> Estimate:
    start = time.perf_counter()
    words, drawn = unedited_answer_logprob_target(ground.bench), drawn_target(ground.bench)
    gain = -effects(ground.model, words, units, units[0], 0.0).mean((0, 1))
    kl = effects(ground.model, drawn, units, units[0], 0.0).square().mean((0, 1)) / 2
    seconds = time.perf_counter() - start
    passes = words.passes + drawn.passes
    return Estimate("gradient at 0", gain.numpy(), kl.numpy(), passes, seconds)


def halfway(ground: Ground, units: Any) -> Estimate:
    start = time.perf_counter()
    mean = units.mean(0)
    mean = mean / mean.norm()
    words, kl = unedited_answer_logprob_target(ground.bench), kl_target(ground.bench)
    found = [effects(ground.model, t, units, mean, HALF).mean((0, 1)).numpy() for t in (words, kl)]
    seconds = time.perf_counter() - start
    passes = words.passes + kl.passes
    return Estimate("gradient halfway", -found[0], found[1], passes, seconds)


def path(ground: Ground, units: Any, before: Estimate) -> Estimate:
    """First-order steps along each own direction, for the best third of an estimate."""
    import numpy as np

    start = time.perf_counter()
    some = before.order[: max(len(units) // 3, 1)]
    targets = [
        t(ground.bench).head(PATH_PROMPTS) for t in (unedited_answer_logprob_target, kl_target)
    ]
    found = np.full((2, len(units)), np.nan)
    for i in some:
        for row, target in enumerate(targets):
            steps = [effects(ground.model, target, units[[i]], units[i], s).mean() for s in PATH]
            found[row, i] = float(sum(steps)) / len(PATH)
    seconds = time.perf_counter() - start + before.seconds
    passes = before.passes + len(some) * len(PATH) * sum(target.passes for target in targets)
    return Estimate("gradient path, best third", -found[0], found[1], passes, seconds, 5)


# ---- side by side ----------------------------------------------------------------------------------------


def correlation(estimated: Any, exact: Any) -> float | None:
    """Spearman's, over the candidates that have an estimate; None where there is none."""
    import numpy as np
    import pandas as pd

    known = np.isfinite(estimated)
    ranks = [pd.Series(values[known]).rank() for values in (estimated, exact)]
    found = float(ranks[0].corr(ranks[1]))
    return round(found, 3) if np.isfinite(found) else None


def judged(estimate: Estimate, exact: Exact) -> dict[str, Any]:
    """How an estimate ranks, and the choice by the exact scores of its first few."""
    merits = exact.merits().to_numpy()
    best = [int(i) for i in merits.argsort()[::-1]]
    telling = exact.expressed if exact.expressed.any() else ~exact.expressed
    gain = -exact.unedited_answer_logprob[:, telling].mean(1)
    order = estimate.order
    checked = order[: estimate.checked]
    choice = max(checked, key=lambda i: merits[i])
    each = exact.passes // len(merits)
    return {
        "name": f"{estimate.name}, {len(checked)} scored",
        "spearman": correlation(estimate.merit, merits),
        "spearman_own_words": correlation(estimate.gain, gain),
        "spearman_kl": correlation(estimate.kl, exact.kl.mean(1)),
        "top5_in": {k: len({*best[:5]} & {*order[:k]}) for k in (5, 10, 20)},
        "place_of_best": order.index(best[0]) + 1 if best[0] in order else None,
        "index": choice,
        "passes": estimate.passes + len(checked) * each,
        "gradient_passes": estimate.passes,
        "seconds": estimate.seconds + len(checked) * exact.seconds / len(merits),
    }


def simulations(exact: Exact, estimate: Estimate, ground: Ground) -> list[dict[str, Any]]:
    """Races over shuffled prompts, of all candidates and of those that the gradient likes."""
    n, every = ground.prompts, list(range(len(ground.items)))
    rungs = rungs_of(ground)
    some = rungs[1][0]
    schemes = [
        ("race", 0, rungs, every),
        ("race, without its last rung", 0, rungs[:-1], every),
        ("race, wider", 0, [rungs[0], (some, 16), (n, 3)], every),
        ("gradient, 20, race", estimate.passes, [(some, 20), (n, 3)], estimate.order[:20]),
        ("gradient, 10", estimate.passes, [(n, 10)], estimate.order[:10]),
    ]
    return [
        {"name": name, "passes": extra + passes_of(r, len(alive)), **simulated(exact, r, alive)}
        for name, extra, r, alive in schemes
    ]


def show(name: str, exact: Exact, rows: list[dict], simulated: list[dict]) -> None:
    print(f"\nscreening: {name} ({exact.passes} prompt passes, {exact.seconds:.1f} s exactly)")
    print(
        f"  {'':<38} choice                   same  regret   cost  seconds  spearman  top 5 in 5/10/20"
    )
    for row in rows:
        print(
            f"  {row['name']:<38} {row['choice']:<24} {'yes' if row['same'] else 'no':<5}"
            f" {row['regret']:6.3f} {row['cost']:6.3f} {row['seconds_share']:8.3f}"
            + (
                f"  {row['spearman']!s:>8}  {'/'.join(map(str, row['top5_in'].values()))}"
                if "spearman" in row
                else ""
            )
        )
    print(f"  over {SHUFFLES} orders of the prompts:     cost   exact best   mean regret   95%")
    for row in simulated:
        print(
            f"    {row['name']:<32} {row['passes'] / exact.passes:6.3f} {row['exact_best']:10.2f}"
            f" {row['regret']:12.3f} {row['regret_95']:8.3f}"
        )


def compared(model: Any, name: str, args: Any) -> dict[str, Any]:
    """One contrast set: the exact sweep, the race, the estimates."""
    import torch

    ground = ground_of(model, name, args)
    exact = exact_sweep(ground)
    merits = exact.merits()
    sites = [str(item.site) for item in ground.items]
    best = int(merits.idxmax())
    units = torch.stack([item.vector for item in ground.items]).float()
    zero = at_zero(ground, units)
    estimates = [zero, halfway(ground, units), path(ground, units, zero)]
    rows = raced(ground) + [judged(estimate, exact) for estimate in estimates]
    for row in rows:
        index = row.pop("index", None)
        row["choice"] = row.get("choice", None if index is None else sites[index])
        regret = 1 - merits[sites.index(row["choice"])] / merits[best]
        row |= {
            "same": row["choice"] == sites[best],
            "regret": round(float(regret), 4),
            "cost": round(row["passes"] / exact.passes, 4),
            "seconds": round(row["seconds"], 2),
            "seconds_share": round(row["seconds"] / exact.seconds, 4),
        }
    races = simulations(exact, zero, ground)
    show(name, exact, rows, races)
    print(
        f"  exact choice by merit {sites[best]}, by the published rule {by_arditi(ground, exact)}"
    )
    return {
        "exact": {
            "choice": sites[best],
            "merit": round(float(merits[best]), 3),
            "kl": round(float(exact.kl[best].mean()), 4),
            "arditi": by_arditi(ground, exact),
            "candidates": len(sites),
            "passes": exact.passes,
            "seconds": round(exact.seconds, 2),
        },
        "methods": rows,
        "shuffled": races,
    }


def main() -> None:
    args = common.arguments(__doc__, contrast={"action": "append", "choices": CONTRASTS})
    names = args.contrast or CONTRASTS
    from interp_ablate import load_model

    model = load_model("smollm2")
    for name in names[: 1 if args.smoke else None]:
        found = compared(model, name, args)
        print(json.dumps({"benchmark": f"screening: {name}", **found}), flush=True)


if __name__ == "__main__":
    main()
