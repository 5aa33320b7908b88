"""Sweep: which candidate plans are tried, scored on validation prompts.

Knows: the bench that scores a plan, the race of the screening, random bands, finalists. Does not know:
which trial is chosen (`selection` does), how trials are kept, or anything of the test prompts.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property

import pandas as pd
import torch

from interp_ablate.candidates import Candidate, Fits, Trial
from interp_ablate.directions import Directions
from interp_ablate.edits import Add, Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.executors import Executor
from interp_ablate.expressions import ExpressionScorer
from interp_ablate.journal import Journal
from interp_ablate.model import Model, PromptLike
from interp_ablate.scores import (
    Empty,
    Evidence,
    FirstTokenKL,
    Length,
    OwnWords,
    Repetition,
    TargetLogOdds,
    generate_together,
)
from interp_ablate.selection import bootstrap_interval

Source = tuple[int, str, str]  # layer, point, position of a direction


# Where bands are drawn from: strengths, centres and widths as fractions of the depth.
_ATTENTION, _MLP = (0.6, 2.2), (0.0, 1.4)
_CENTRE, _WIDTH = (0.45, 0.95), (0.25, 1.5)
N_BANDS = 8
# Fits: how many directions, how many layers apart at least, and the multiples of the edit tried.
N_FITS, FIT_DISTANCE = 1, 3
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
N_FINALISTS = 4
# Prompts a side and candidates of each rung of the screening, which ranks directions and selects no plan.
# With 60 candidates and 32 prompts that is 0.23 of all on all (benchmarks/screening.py).
RUNGS = ((3, 10**9), (12, 14), (32, 3))
KL_LEVEL = 0.8  # the KL limit is held against the upper end of this interval (90%, one-sided)


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
        generate_together([self.positive, self.negative])
        self.own_words = OwnWords(expression)

    @property
    def n_prompts(self) -> int:
        """Of the longer side."""
        return max(len(self.positive.rows), len(self.negative.rows))

    def first(self, n: int) -> Bench:
        """The same bench over `n` prompts of each side: enough to rank by, at part of the cost.

        The first ones; of the positive those first whose own answers express the behaviour, which alone tell
        what becomes of it (`OwnWords`).
        """
        expressed = self.expression.score_texts(self.positive.texts).bool().tolist()
        telling = sorted(range(len(expressed)), key=lambda i: not expressed[i])[:n]
        small = copy.copy(self)
        for known in ("repetition", "baseline"):
            small.__dict__.pop(known, None)
        small.positive, small.negative = self.positive.part(sorted(telling)), self.negative.first(n)
        return small

    @cached_property
    def repetition(self) -> float:
        """Repetition of the unedited model's answers to all prompts."""
        return _repetition(self.positive, self.negative)

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
        on_positive, on_negative = self.under(plan)
        found = {**self._soft_scores(on_positive), **bounded_kl(on_negative, self.negative)}
        return found | self.text_scores(on_positive, on_negative) if generate else found

    def objectives(self, plan: Plan | None) -> dict[str, float]:
        """What a search makes small, at the least cost: answers to positive prompts, KL on negative ones.

        `repetition` and `length` are those of the answers to positive prompts.
        """
        return self.objectives_of([plan])[0]

    def objectives_of(self, plans: Sequence[Plan | None]) -> list[dict[str, float]]:
        """`objectives` of several plans, whose answers are written in one batch."""
        sides = [self.under(plan) for plan in plans]
        generate_together([on_positive for on_positive, _ in sides])
        return [self._objectives(*both) for both in sides]

    def _objectives(self, on_positive: Evidence, on_negative: Evidence) -> dict[str, float]:
        return {
            "expression_rate": float(self.expression(on_positive, self.positive).mean()),
            **bounded_kl(on_negative, self.negative),
            "repetition": float(Repetition()(on_positive, self.positive).mean()),
            "length": float(Length()(on_positive, self.positive).mean()),
            "empty": float(Empty()(on_positive, self.positive).mean()),
        }

    def beside(self, plan: Plan | None) -> dict[str, float]:
        """What `objectives` leaves out: own words, and what answers to negative prompts say."""
        on_positive, on_negative = self.under(plan)
        return {
            "own_words": self._soft_scores(on_positive)["own_words"],
            "negative_expression_rate": float(self.expression(on_negative, self.negative).mean()),
            "negative_repetition": float(Repetition()(on_negative, self.negative).mean()),
        }

    def under(self, plan: Plan | None) -> tuple[Evidence, Evidence]:
        """The positive and the negative prompts under a plan (None: the baselines); nothing is run yet."""
        if plan is None:
            return self.positive, self.negative
        return self.positive.under(plan), self.negative.under(plan)

    def text_scores(self, on_positive: Evidence, on_negative: Evidence) -> dict[str, float]:
        """What the answers say: the expression rate, repetition and length of all answers."""
        generate_together([on_positive, on_negative])
        lengths = [
            float(Length()(on, base).mean())
            for on, base in ((on_positive, self.positive), (on_negative, self.negative))
        ]
        return {
            "expression_rate": float(self.expression(on_positive, self.positive).mean()),
            "negative_expression_rate": float(self.expression(on_negative, self.negative).mean()),
            "repetition": _repetition(on_positive, on_negative),
            "length": sum(lengths) / 2,
            "empty": float(Empty()(on_positive, self.positive).mean()),
        }

    def addition(self, plan: Plan) -> float:
        """Target log-odds on negative prompts under an addition: run from its layer on."""
        return float(self.target(self.negative.under(plan), self.negative).mean())


def bounded_kl(evidence: Evidence, baseline: Evidence) -> dict[str, float]:
    """First-token KL, and the upper end of its interval: what a limit is held against."""
    kl = FirstTokenKL()(evidence, baseline).numpy()
    return {"kl": float(kl.mean()), "kl_high": bootstrap_interval(kl, level=KL_LEVEL)[1]}


def _repetition(positive: Evidence, negative: Evidence) -> float:
    """Mean over the answers to both sides' prompts."""
    both = [Repetition()(side, side) for side in (positive, negative)]
    return float(torch.cat(both).mean())


def merit(rows: pd.DataFrame) -> pd.Series:
    """How much of the behaviour a screened plan removes for the KL it costs; higher is better."""
    gain = (rows["own_words_baseline"] - rows["own_words"]).clip(lower=0)
    return gain / (0.1 + rows["kl"])


def screen(
    bench: Bench,
    candidates: Sequence[Candidate],
    score: Callable[[Bench, Sequence[Candidate]], list[Trial]],
    *,
    rungs: Sequence[tuple[int, int]] = RUNGS,
) -> pd.DataFrame:
    """Race the candidates: all on a few prompts a side, the best of them on more, and so on.

    Args:
        score: scores candidates on a bench of the first prompts (`run_trials`).
        rungs: (prompts a side, how many candidates go on to it); the first takes them all. One that has
            no more prompts than the one before it is left out.

    Returns one row a candidate, of the last rung that it reached; those of the last rung come first.
    The idea is that of successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943).
    """
    alive = list(candidates)
    tables: list[pd.DataFrame] = []
    for prompts, most in growing(rungs, bench.n_prompts):
        if not alive:
            break
        small = bench.first(prompts)
        trials = score(small, [replace(c, prompts=prompts) for c in alive[:most]])
        table = to_frame(trials, small)
        out = [] if not tables else tables[-1].iloc[len(trials) :]
        order = merit(table).where(table["status"] == "ok", -math.inf)
        places = order.sort_values(ascending=False, kind="stable").index
        tables.append(
            pd.concat([table.loc[places], *([out] if len(out) else [])], ignore_index=True)
        )
        whole = [trials[i] for i in places if trials[i].status == "ok"]
        alive = [replace(trial.candidate, prompts=None) for trial in whole]
    return tables[-1]


def growing(rungs: Sequence[tuple[int, int]], n_prompts: int) -> list[tuple[int, int]]:
    """The rungs where there are so many prompts."""
    found: list[tuple[int, int]] = []
    for prompts, most in rungs:
        here = min(prompts, n_prompts)
        if not found or here > found[-1][0]:
            found.append((here, most))
    return found


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
    # what few prompts say is not compared with what more prompts say of those that went on
    rungs = rows["prompts"].fillna(math.inf)
    order = (
        rows.assign(merit=merit(rows), rung=rungs)
        .sort_values(["rung", "merit"], ascending=False, kind="stable")
        .index[:n]
    )
    return [
        (int(r["layer"]), str(r["point"]), str(r["position"]))
        for _, r in rows.loc[order].iterrows()
    ]


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


def fitted(source: Source, name: str) -> list[Candidate]:
    """Multiples of the edit that was fitted along a direction and is kept under a name."""
    return [
        Candidate(*source, stage="refine", operation="fitted", fit=name, scale=scale)
        for scale in SCALES
    ]


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
    bench: Bench, directions: Directions, candidate: Candidate, fits: Fits | None = None
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


SCORES = (
    "behaviour",
    "own_words",
    "addition",
    "kl",
    "kl_high",
    "expression_rate",
    "negative_expression_rate",
    "repetition",
    "length",
    "empty",
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
        rows.append({"trial": i, **place, **scores, **tail})
    frame = pd.DataFrame(rows)
    if bench is not None:
        for name, value in bench.baseline.items():
            frame[name] = value
    return frame
