"""Sweep: which candidate plans are tried, scored on validation prompts.

Knows: the bench that scores a plan, screening, random bands, fitted strengths, finalists. Does not know:
which trial is chosen (`selection` does), how trials are kept, or anything of the test prompts.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property

import pandas as pd
import torch

from interp_ablate.candidates import Candidate, Trial
from interp_ablate.directions import Direction, Directions
from interp_ablate.edits import Add, Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.journal import Journal
from interp_ablate.model import Model, PromptLike
from interp_ablate.scores import (
    Evidence,
    ExpressionScorer,
    FirstTokenKL,
    Length,
    OwnWords,
    Repetition,
    TargetLogOdds,
)
from interp_ablate.selection import bootstrap_interval

Source = tuple[int, str, str]  # layer, point, position of a direction


class Bench:
    """The validation prompts with their baselines: scores any plan the same way."""

    def __init__(
        self,
        model: Model,
        positive: Sequence[PromptLike],
        negative: Sequence[PromptLike],
        *,
        target: TargetLogOdds,
        expression: ExpressionScorer,
        new_tokens: int = 32,
    ) -> None:
        self.model, self.target, self.expression = model, target, expression
        self.positive = Evidence(model, positive, new_tokens=new_tokens)
        self.negative = Evidence(model, negative, new_tokens=new_tokens)
        self.new_tokens = new_tokens

        self.own_words = OwnWords(expression)

    def first(self, n: int) -> Bench:
        """The same bench over the first `n` prompts of each side: enough to rank by, at part of the cost."""
        small = copy.copy(self)
        for known in ("negative_repetition", "baseline"):
            small.__dict__.pop(known, None)
        small.positive, small.negative = self.positive.first(n), self.negative.first(n)
        return small

    @cached_property
    def negative_repetition(self) -> float:
        """Repetition of the unedited model's answers to negative prompts."""
        return float(Repetition()(self.negative, self.negative).mean())

    @cached_property
    def baseline(self) -> dict[str, float]:
        """The unedited model's own soft scores, under the names the trials' table uses."""
        soft = self._soft_scores(self.positive)
        addition = float(self.target(self.negative, self.negative).mean())
        return {**{f"{k}_baseline": v for k, v in soft.items()}, "addition_baseline": addition}

    def _soft_scores(self, on_positive: Evidence) -> dict[str, float]:
        """Target log-odds and own words from one pass over prompts and their answers' first tokens."""
        logprobs = self.own_words.logprobs(on_positive, self.positive)
        first = torch.stack([rows[0] for rows in logprobs])
        return {
            "behaviour": float(self.target.of_logprobs(first).mean()),
            "own_words": float(self.own_words.of_logprobs(logprobs, self.positive).mean()),
        }

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        """Means over prompts: behaviour and KL under the plan; with `generate` also text scores."""
        on_positive = Evidence(self.model, self.positive.rows, plan, new_tokens=self.new_tokens)
        on_negative = Evidence(self.model, self.negative.rows, plan, new_tokens=self.new_tokens)
        kl = FirstTokenKL()(on_negative, self.negative).numpy()
        found = {
            **self._soft_scores(on_positive),
            "kl": float(kl.mean()),
            "kl_high": bootstrap_interval(kl, level=KL_LEVEL)[1],
        }
        if generate:
            found["expression_rate"] = float(self.expression(on_positive, self.positive).mean())
            some = on_negative.first(SCREENING_PROMPTS)
            found["repetition"] = float(Repetition()(some, some).mean())
            found["length"] = float(Length()(some, some).mean())
        return found

    def addition(self, plan: Plan) -> float:
        """Target log-odds on negative prompts under an addition."""
        evidence = Evidence(self.model, self.negative.rows, plan)
        return float(self.target(evidence, self.negative).mean())


def promising(screened: pd.DataFrame, *, n: int = 8) -> list[Source]:
    """The (layer, point, position) of the screened directions worth refining, the best first.

    The ones that lower the behaviour most for the KL they cost, among those whose addition raises the
    target log-odds of negative prompts above the unedited model's.

    Raises:
        RunError: every screened trial failed.
    """
    rows = screened[screened["status"] == "ok"]
    if rows.empty:
        reasons = [reason for reason in screened["reason"] if reason]
        raise RunError(
            f"none of the {len(screened)} screened directions could be scored"
            + (f"; the first failed with: {reasons[0]}" if reasons else "")
        )
    raised = rows[rows["addition"] > rows["addition_baseline"]]
    rows = raised if len(raised) else rows
    gain = (rows["own_words_baseline"] - rows["own_words"]).clip(lower=0)
    order = (gain / (0.1 + rows["kl"])).sort_values(ascending=False, kind="stable").index[:n]
    return [
        (int(r["layer"]), str(r["point"]), str(r["position"]))
        for _, r in rows.loc[order].iterrows()
    ]


# Where bands are drawn from: strengths, centres and widths as fractions of the depth.
_ATTENTION, _MLP = (0.6, 2.2), (0.0, 1.4)
_CENTRE, _WIDTH = (0.45, 0.95), (0.25, 1.5)
N_BANDS = 8
# Fits: how many directions, how many layers apart at least, and the multiples of the strengths tried.
N_FITS, FIT_DISTANCE = 1, 3
SCALES = (0.8, 0.9, 1.0, 1.1, 1.15, 1.2, 1.3)
# Share of the KL limit that a fit may spend on training prompts; validation prompts cost more.
FIT_BUDGET = 0.45
N_FINALISTS = 4
SCREENING_PROMPTS = 12  # a side; screening ranks directions, it selects no plan
KL_LEVEL = 0.8  # the KL limit is held against the upper end of this interval (90%, one-sided)


def _drawn(rng: random.Random, sources: Sequence[Source], n_layers: int) -> Candidate:
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


def bands(sources: Sequence[Source], n_layers: int, *, seed: int) -> list[Candidate]:
    """Random bands along the promising directions: what partial strength does without any fitting."""
    rng = random.Random(seed)
    return [_drawn(rng, sources, n_layers) for _ in range(N_BANDS)]


def spread(sources: Sequence[Source]) -> list[Source]:
    """The first few sources that are some layers apart: neighbours hold nearly the same direction."""
    chosen: list[Source] = []
    for source in sources:
        if all(abs(source[0] - other[0]) >= FIT_DISTANCE for other in chosen):
            chosen.append(source)
    return chosen[:N_FITS]


def fitted(
    source: Source,
    directions: Directions,
    done: Mapping[str, Trial],
    fit: Callable[[Direction, float], tuple[float, ...]],
    *,
    max_kl: float,
) -> list[Candidate]:
    """Multiples of the strengths fitted along one direction; not fitted again if the journal has them.

    Args:
        fit: from a direction and a KL budget to a strength for every writer.
    """
    budget = FIT_BUDGET * max_kl
    base = Candidate(*source, stage="refine", operation="fitted", budget=budget)
    wanted = [replace(base, scale=scale) for scale in SCALES]
    known = [done[c.key].candidate.strengths for c in wanted if c.key in done]
    strengths = (
        known[0] if known else fit(directions[base.site, base.position, base.method], budget)
    )
    return [replace(candidate, strengths=strengths) for candidate in wanted]


def _best(trials: Iterable[Trial], max_kl: float) -> list[Trial]:
    inside = [t for t in trials if t.status == "ok" and t.scores["kl_high"] <= max_kl]
    return sorted(inside, key=lambda t: t.scores["own_words"])


def finalists(trials: Sequence[Trial], *, max_kl: float) -> list[Candidate]:
    """The candidates whose text is generated: the best within the KL limit, or nearest to it."""
    best = _best(trials, max_kl)
    if not best:
        ok = [trial for trial in trials if trial.status == "ok"]
        best = sorted(ok, key=lambda t: t.scores["kl_high"])
    return [replace(trial.candidate, stage="finalist") for trial in best[:N_FINALISTS]]


def run_trials(
    bench: Bench,
    directions: Directions,
    candidates: Sequence[Candidate],
    journal: Journal,
    done: dict[str, Trial],
    *,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Score every candidate that the journal does not hold yet; returns them all, in order.

    A candidate whose scores are not finite, or that breaks the model, is recorded as failed with the
    reason and can never be chosen.
    """
    found = []
    for candidate in candidates:
        trial = done.get(candidate.key)
        if trial is None:
            trial = _run_trial(bench, directions, candidate)
            journal.append(trial)
            done[candidate.key] = trial
        found.append(trial)
        if on_trial:
            on_trial(trial)
    return found


def _run_trial(bench: Bench, directions: Directions, candidate: Candidate) -> Trial:
    start = time.perf_counter()
    try:
        direction = directions[candidate.site, candidate.position, candidate.method]
        plan = candidate.plan(direction, bench.model.writers)
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


SCORES = (
    "behaviour",
    "own_words",
    "addition",
    "kl",
    "kl_high",
    "expression_rate",
    "repetition",
    "length",
)


def to_frame(trials: Sequence[Trial], bench: Bench | None = None) -> pd.DataFrame:
    """Trials as a table, one row each, in order; missing scores are NaN.

    With the bench, the unedited model's scores stand beside (`behaviour_baseline`,
    `own_words_baseline`, `addition_baseline`).
    """
    rows = []
    for i, trial in enumerate(trials):
        scores = {name: trial.scores.get(name, math.nan) for name in SCORES}
        tail = {"status": trial.status, "reason": trial.reason, "seconds": round(trial.seconds, 3)}
        place = asdict(trial.candidate)
        place["strengths"] = json.dumps(place["strengths"]) if place["strengths"] else ""
        rows.append({"trial": i, **place, **scores, **tail})
    frame = pd.DataFrame(rows)
    if bench is not None:
        for name, value in bench.baseline.items():
            frame[name] = value
    return frame
