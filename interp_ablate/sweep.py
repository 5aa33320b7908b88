"""Sweep: candidate plans, scored on validation prompts, one journal line a finished trial.

Knows: what a candidate is, which grids are tried, the journal and how a killed sweep goes on.
Does not know: which trial is best (`selection` does), or anything of the test prompts.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    Repetition,
    TargetLogOdds,
)
from interp_ablate.selection import bootstrap_interval
from interp_ablate.sites import Site

Operation = Literal["ablate", "band"]
Stage = Literal["screen", "refine"]
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

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        """Means over prompts: behaviour and KL under the plan; with `generate` also text scores."""
        on_positive = Evidence(self.model, self.positive.rows, plan, new_tokens=self.new_tokens)
        on_negative = Evidence(self.model, self.negative.rows, plan, new_tokens=self.new_tokens)
        kl = FirstTokenKL()(on_negative, self.negative).numpy()
        found = {
            "behaviour": float(self.target(on_positive, self.positive).mean()),
            "kl": float(kl.mean()),
            "kl_high": bootstrap_interval(kl)[1],
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
        Candidate(item.site.layer, item.site.point, item.position) for item in distinct(directions)
    ]


def refinements(screened: pd.DataFrame, n_layers: int, *, sources: int = 4) -> list[Candidate]:
    """Bands of partial strength along the most promising screened directions.

    Promising: the ones that lower the behaviour most for the KL they cost, among those whose addition
    raises it above the unedited negative prompts' score. Grids of strengths, centres and widths are
    stated as fractions of the depth, so that they mean the same on any model.
    """
    rows = screened[screened["status"] == "ok"]
    raised = rows[rows["addition"] > rows["addition_baseline"]]
    rows = raised if len(raised) else rows
    gain = (rows["behaviour_baseline"] - rows["behaviour"]).clip(lower=0)
    order = (gain / (0.05 + rows["kl"])).sort_values(ascending=False, kind="stable").index
    found = []
    for _, row in rows.loc[order[:sources]].iterrows():
        layer = int(row["layer"])
        for attention, mlp, centre, width in GRID:
            found.append(
                Candidate(
                    layer,
                    str(row["point"]),
                    str(row["position"]),
                    "refine",
                    "band",
                    attention,
                    float(min(layer, n_layers - 1)),
                    mlp,
                    round(centre * n_layers, 1),
                    round(width * n_layers, 1),
                )
            )
    return found


# attention strength, MLP strength, MLP centre / depth, width / depth
GRID: tuple[tuple[float, float, float, float], ...] = tuple(
    (attention, mlp, centre, width)
    for attention, mlp in ((1.0, 0.5), (1.2, 0.9))
    for centre in (0.57, 0.83)
    for width in (0.3, 0.5)
)


class Journal:
    """Finished trials on disk: a header line that says what was swept, then one JSON line a trial.

    Raises:
        RunError: another configuration's journal, a corrupt line (its number), or one in use by another
            process.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = Path(path), identity

    @contextmanager
    def open(self) -> Iterator[dict[str, Trial]]:
        """Finished trials by candidate key; `append` works inside the block, in one process at a time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+b")  # noqa: SIM115  (closed below)
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
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def append(self, trial: Trial) -> None:
        """Record a finished trial; on disk when this returns."""
        try:
            self._write(trial.to_dict())
        except OSError as error:
            raise RunError(f"cannot write the journal {self.path}: {error.strerror}") from error


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
    direction = directions[candidate.site, candidate.position]
    try:
        plan = candidate.plan(direction, bench.model.n_layers)
        scores = bench.score(plan, generate=candidate.stage == "refine")
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


def to_frame(trials: Sequence[Trial], bench: Bench | None = None) -> pd.DataFrame:
    """Trials as a table, one row each, in order; missing scores are NaN.

    With the bench, the unedited model's scores stand beside (`behaviour_baseline`,
    `addition_baseline`).
    """
    score_names = (
        "behaviour",
        "addition",
        "kl",
        "kl_high",
        "expression_rate",
        "repetition",
        "length",
    )
    rows = []
    for i, trial in enumerate(trials):
        scores = {name: trial.scores.get(name, math.nan) for name in score_names}
        tail = {"status": trial.status, "reason": trial.reason, "seconds": round(trial.seconds, 3)}
        rows.append({"trial": i, **asdict(trial.candidate), **scores, **tail})
    frame = pd.DataFrame(rows)
    if bench is not None:
        frame["behaviour_baseline"] = float(bench.target(bench.positive, bench.positive).mean())
        frame["addition_baseline"] = float(bench.target(bench.negative, bench.negative).mean())
    return frame
