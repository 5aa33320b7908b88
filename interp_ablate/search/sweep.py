"""Sweep: which candidate plans are tried, scored on validation prompts.

Knows: the bench that scores a plan, the race of the screening, random bands, finalists. Does not know:
which trial is chosen (`selection` does), how trials are kept, or anything of the test prompts.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from interp_ablate.directions.direction_set import Directions
from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError
from interp_ablate.jobs.executors import Executor
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.candidates import Candidate, DirectionKey, Fits, Trial
from interp_ablate.search.journal import Journal

# Where bands are drawn from: strengths, centres and widths as fractions of the depth.
_ATTENTION, _MLP = (0.6, 2.2), (0.0, 1.4)
_CENTRE, _WIDTH = (0.45, 0.95), (0.25, 1.5)
N_BANDS = 8
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
N_FINALISTS = 4


def _drawn(rng: random.Random, sources: Sequence[DirectionKey], n_layers: int) -> Candidate:
    low, high = (math.log(w) for w in _WIDTH)
    return Candidate(
        *rng.choice(list(sources)),
        stage="refine",
        operation="band",
        attention_strength=round(rng.uniform(*_ATTENTION), 3),
        attention_layer=round(rng.uniform(*_CENTRE) * n_layers, 2),
        mlp_strength=round(rng.uniform(*_MLP), 3),
        mlp_layer=round(rng.uniform(*_CENTRE) * n_layers, 2),
        width=round(math.exp(rng.uniform(low, high)) * n_layers, 2),
    )


def bands(sources: Sequence[DirectionKey], n_layers: int, *, seed: int) -> list[Candidate]:
    """Random bands along the promising directions: what partial strength does without any fitting."""
    rng = random.Random(seed)
    return [_drawn(rng, sources, n_layers) for _ in range(N_BANDS)]


def fitted(source: DirectionKey, name: str) -> list[Candidate]:
    """Multiples of the edit that was fitted along a direction and is kept under a name."""
    return [
        Candidate(*source, stage="refine", operation="fitted", fit=name, scale=scale)
        for scale in SCALES
    ]


def _best(trials: Iterable[Trial], max_kl: float) -> list[Trial]:
    inside = [t for t in trials if t.status == "ok" and t.scores["kl_high"] <= max_kl]
    return sorted(inside, key=lambda t: t.scores["unedited_answer_logprob"])


def finalists(trials: Sequence[Trial], *, max_kl: float) -> list[Candidate]:
    """The candidates whose text is generated: the best within the KL limit, or nearest to it."""
    best = _best(trials, max_kl)
    if not best:
        ok = [trial for trial in trials if trial.status == "ok"]
        best = sorted(ok, key=lambda t: t.scores["kl_high"])
    return [replace(trial.candidate, stage="finalist") for trial in best[:N_FINALISTS]]


def run_trials(
    bench: ValidationBench,
    directions: Directions,
    candidates: Sequence[Candidate],
    journal: Journal,
    done: dict[str, Trial],
    *,
    fits: Fits | None = None,
    executor: Executor[Candidate, Trial] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Score every candidate that the journal does not hold yet; returns them all, in order.

    A candidate whose scores are not finite, or that breaks the model, is recorded as failed with the
    reason and can never be chosen. The journal is written here only, whoever scored the trial.

    Args:
        executor: scores candidates elsewhere (see `experiment.make_worker`); by default it is done here.
    """
    todo = list({each.key: each for each in candidates if each.key not in done}.values())
    if executor is None:
        results = ((each, run_trial(bench, directions, each, fits)) for each in todo)
    else:
        results = executor.run(todo)  # type: ignore[assignment]
    for candidate in candidates:
        if on_trial and candidate.key in done:
            on_trial(done[candidate.key])
    for candidate, trial in results:
        journal.append(trial)
        done[candidate.key] = trial
        if on_trial:
            on_trial(trial)
    return [done[candidate.key] for candidate in candidates]


def run_trial(
    bench: ValidationBench, directions: Directions, candidate: Candidate, fits: Fits | None = None
) -> Trial:
    """Score one candidate; what breaks the model, or its numbers, is a failed trial with the reason."""
    start = time.perf_counter()
    try:
        direction = directions[candidate.site, candidate.position, candidate.method]
        plan = candidate.plan(direction, bench.model.writers, fits)
        scores = bench.score(plan, generate=candidate.stage == "finalist")
        if candidate.stage == "screen":
            scores["addition"] = bench.addition(Plan((Add(direction, direction.site),)))
    except InterpAblateError as error:
        return Trial(candidate, {}, time.perf_counter() - start, "failed", str(error))
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if bad:
        reason = f"not finite: {', '.join(bad)}"
        kept = {name: value for name, value in scores.items() if name not in bad}
        return Trial(candidate, kept, time.perf_counter() - start, "failed", reason)
    return Trial(candidate, scores, time.perf_counter() - start)
