"""Sweep: candidate plans, scored on validation prompts, one journal line a finished trial.

Knows: what a candidate is, which grids are tried, the journal and how a killed sweep goes on.
Does not know: which trial is best (`selection` does), or anything of the test prompts.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from interp_ablate.directions import Direction, Directions
from interp_ablate.edits import Ablate, Add, Plan, band, everywhere
from interp_ablate.errors import InterpAblateError, RunError
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
from interp_ablate.sites import Site

Operation = Literal["ablate", "band"]
Stage = Literal["screen", "refine", "finalist"]
HEADER = "interp_ablate.journal/1"


@dataclass(frozen=True)
class Candidate:
    """One plan to try: a direction by its site and position, and what is done along it.

    "ablate" is full strength at every writer of the stream; "band" gives attention and MLP outputs
    strengths that fall off linearly from a centre layer (see `edits.band`).
    """

    layer: int
    point: str
    position: str = "-1"
    method: str = "difference_in_means"
    stage: Stage = "screen"
    operation: Operation = "ablate"
    attention_strength: float | None = None
    attention_layer: float | None = None
    mlp_strength: float | None = None
    mlp_layer: float | None = None
    width: float | None = None

    @property
    def key(self) -> str:
        """Identity in the journal."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def site(self) -> Site:
        return Site(self.layer, self.point)  # type: ignore[arg-type]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Candidate:
        """From a row of the trials' table; NaN stands for None."""
        values: dict[str, Any] = {
            each.name: None if row[each.name] != row[each.name] else row[each.name]
            for each in fields(cls)
        }
        return cls(**values | {"layer": int(row["layer"]), "position": str(row["position"])})

    def plan(self, direction: Direction, n_layers: int) -> Plan:
        """The plan along a direction: the candidate's own, or a control put in its place."""
        if self.operation == "ablate":
            return Plan((Ablate(direction, everywhere(n_layers)),))
        assert self.attention_strength is not None and self.attention_layer is not None
        assert self.mlp_strength is not None and self.mlp_layer is not None
        assert self.width is not None
        return band(
            direction,
            n_layers,
            attention=(self.attention_strength, self.attention_layer),
            mlp=(self.mlp_strength, self.mlp_layer),
            width=self.width,
        )


@dataclass(frozen=True)
class Trial:
    """A finished candidate: its scores, or why it failed. One line of the journal."""

    candidate: Candidate
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        return cls(**{**data, "candidate": Candidate(**data["candidate"])})


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

    @cached_property
    def negative_repetition(self) -> float:
        """Repetition of the unedited model's answers to negative prompts."""
        return float(Repetition()(self.negative, self.negative).mean())

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        """Means over prompts: behaviour and KL under the plan; with `generate` also text scores."""
        on_positive = Evidence(self.model, self.positive.rows, plan, new_tokens=self.new_tokens)
        on_negative = Evidence(self.model, self.negative.rows, plan, new_tokens=self.new_tokens)
        kl = FirstTokenKL()(on_negative, self.negative).numpy()
        found = {
            "behaviour": float(self.target(on_positive, self.positive).mean()),
            "own_words": float(self.own_words(on_positive, self.positive).mean()),
            "kl": float(kl.mean()),
            "kl_high": bootstrap_interval(kl, level=KL_LEVEL)[1],
        }
        if generate:
            found["expression_rate"] = float(self.expression(on_positive, self.positive).mean())
            found["repetition"] = float(Repetition()(on_negative, self.negative).mean())
            found["length"] = float(Length()(on_negative, self.negative).mean())
        return found

    def addition(self, plan: Plan) -> float:
        """Target log-odds on negative prompts under an addition."""
        evidence = Evidence(self.model, self.negative.rows, plan)
        return float(self.target(evidence, self.negative).mean())


def distinct(directions: Iterable[Direction]) -> list[Direction]:
    """Directions without repeats: resid_pre of a layer is resid_post of the layer before."""
    every, found = list(directions), []
    have = {item.site for item in every}
    for item in every:
        before = Site(item.site.layer - 1, "resid_post") if item.site.layer else None
        if item.site.point == "resid_pre" and before in have:
            continue
        found.append(item)
    return found


def screening(directions: Iterable[Direction]) -> list[Candidate]:
    """One candidate a distinct direction: full ablation everywhere (and addition at its own site)."""
    return [
        Candidate(item.site.layer, item.site.point, item.position, item.method)
        for item in distinct(directions)
    ]


def promising(screened: pd.DataFrame, *, n: int = 8) -> list[tuple[int, str, str]]:
    """The (layer, point, position) of the screened directions worth refining, the best first.

    The ones that lower the behaviour most for the KL they cost, among those whose addition raises the
    target log-odds of negative prompts above the unedited model's.
    """
    rows = screened[screened["status"] == "ok"]
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
_METHODS = ("difference_in_means", "difference_in_means_orthogonalized")
N_REFINED, N_RANDOM = 96, 40
N_FINALISTS = 12
KL_LEVEL = 0.8  # the KL limit is held against the upper end of this interval (90%, one-sided)


def _drawn(rng: random.Random, sources: Sequence[tuple[int, str, str]], n_layers: int) -> Candidate:
    layer, point, position = sources[min(int(rng.expovariate(0.5)), len(sources) - 1)]
    low, high = (math.log(w) for w in _WIDTH)
    return Candidate(
        layer,
        point,
        position,
        rng.choice(_METHODS),
        "refine",
        "band",
        round(rng.uniform(*_ATTENTION), 3),
        round(rng.uniform(*_CENTRE) * n_layers, 2),
        round(rng.uniform(*_MLP), 3),
        round(rng.uniform(*_CENTRE) * n_layers, 2),
        round(math.exp(rng.uniform(low, high)) * n_layers, 2),
    )


def _mutated(
    rng: random.Random, parent: Candidate, sources: Sequence[tuple[int, str, str]], n_layers: int
) -> Candidate:
    """A neighbour: every number moves a little; now and then the direction changes too."""
    assert parent.attention_strength is not None and parent.attention_layer is not None
    assert (
        parent.mlp_strength is not None
        and parent.mlp_layer is not None
        and parent.width is not None
    )
    step = n_layers * 0.06
    child = replace(
        parent,
        attention_strength=round(max(0.1, parent.attention_strength + rng.gauss(0, 0.15)), 3),
        attention_layer=round(parent.attention_layer + rng.gauss(0, step), 2),
        mlp_strength=round(max(0.0, parent.mlp_strength + rng.gauss(0, 0.12)), 3),
        mlp_layer=round(parent.mlp_layer + rng.gauss(0, step), 2),
        width=round(parent.width * math.exp(rng.gauss(0, 0.2)), 2),
    )
    if rng.random() < 0.25:
        layer, point, position = rng.choice(list(sources))
        child = replace(child, layer=layer, point=point, position=position)
    if rng.random() < 0.15:
        child = replace(child, method=rng.choice(_METHODS))
    return child


def refine(
    bench: Bench,
    directions: Directions,
    screened: pd.DataFrame,
    journal: Journal,
    done: dict[str, Trial],
    *,
    max_kl: float,
    seed: int = 0,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Search bands of partial strength along the promising directions: random draws, then mutations.

    Parents are the trials within the KL limit in which the model gives its own expressing answers the
    least probability. Every proposal follows from the seed and the trials before it, so a resumed search
    proposes the same again and finds it in the journal.

    Raises:
        RunError: no screened trial is ok, so there is no direction to refine.
    """
    rng = random.Random(seed)
    n_layers, sources = bench.model.n_layers, promising(screened)
    if not sources:
        reason = next(iter(screened["reason"]), "there is none")
        raise RunError(
            f"no direction can be refined: all {len(screened)} screened trials failed, the first "
            f"because: {reason}. Try another dtype, other layers or other prompts"
        )
    trials: list[Trial] = []
    for i in range(N_REFINED):
        parents = _best(trials, max_kl)[:6]
        if i < N_RANDOM or not parents:
            candidate = _drawn(rng, sources, n_layers)
        else:
            parent = parents[min(int(rng.expovariate(0.7)), len(parents) - 1)]
            candidate = _mutated(rng, parent.candidate, sources, n_layers)
        trials += run_trials(bench, directions, [candidate], journal, done, on_trial=on_trial)
    return trials


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


class Journal:
    """Finished trials on disk: a header line that says what was swept, then one JSON line a trial.

    Raises:
        RunError: another configuration's journal, a corrupt line (its number), or one in use by another
            process.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(path)
        # as it will be read back: JSON makes lists of tuples
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    @contextmanager
    def open(self) -> Iterator[dict[str, Trial]]:
        """Finished trials by candidate key; `append` works inside the block, in one process at a time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: closing must not write again what failed
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed below)
        except OSError as error:
            raise RunError(f"cannot write the journal {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(
                    f"{self.path} is in use by another process: wait for it, or choose another --out"
                ) from error
            self._file = file
            yield self._read()

    def _read(self) -> dict[str, Trial]:
        self._file.seek(0)
        data = self._file.read()
        whole, _, torn = data.rpartition(b"\n")
        if torn:  # the process was killed in the middle of this line: the trial never finished
            self._file.truncate(len(data) - len(torn))
        lines = whole.split(b"\n") if whole else []
        if not lines:
            self._write({"format": HEADER, **self.identity})
            return {}
        self._check_header(self._parse(lines[0], 1))
        trials = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                trial = Trial.from_dict(self._parse(line, number))
            except (TypeError, KeyError) as error:
                raise self._corrupt(number, error) from error
            trials[trial.candidate.key] = trial
        return trials

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise self._corrupt(number, error) from error
        if not isinstance(value, dict):
            raise self._corrupt(number, "not an object")
        return value

    def _corrupt(self, number: int, why: object) -> RunError:
        return RunError(
            f"corrupt journal {self.path}, line {number}: {why}. Delete that line (its trial is run "
            "again), or the file to start over"
        )

    def _check_header(self, header: dict[str, Any]) -> None:
        if header.get("format") != HEADER:
            raise self._corrupt(1, "not a journal of this package")
        other = [k for k, v in self.identity.items() if header.get(k) != v]
        if other:
            raise RunError(
                f"{self.path} is the journal of another sweep: {', '.join(other)} differ. Choose "
                "another --out, or delete it"
            )

    def _write(self, value: dict[str, Any]) -> None:
        left = json.dumps(value).encode() + b"\n"
        try:
            while left:  # a disk that is nearly full takes a part; asked for the rest, it says why
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write the journal {self.path}: {error.strerror}. Free space and run again: "
                "finished trials are kept"
            ) from error

    def append(self, trial: Trial) -> None:
        """Record a finished trial; on disk when this returns."""
        self._write(trial.to_dict())


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
        plan = candidate.plan(direction, bench.model.n_layers)
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
        rows.append({"trial": i, **asdict(trial.candidate), **scores, **tail})
    frame = pd.DataFrame(rows)
    if bench is not None:
        frame["behaviour_baseline"] = float(bench.target(bench.positive, bench.positive).mean())
        own = bench.own_words(bench.positive, bench.positive)
        frame["own_words_baseline"] = float(own.mean())
        frame["addition_baseline"] = float(bench.target(bench.negative, bench.negative).mean())
    return frame
