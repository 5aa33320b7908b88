"""The league played: every method fitted and judged on every behaviour and seed, finished work never done again.

Knows: the order of work, what is kept on disk. Does not know: what a method does, statistics, or pages.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from interp_ablate.activations.activations import Activations
from interp_ablate.activations.collection import collect
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, OutOfMemoryError, RunError
from interp_ablate.jobs.bars import bar
from interp_ablate.league.behaviours import LeagueBehaviour
from interp_ablate.league.entry import check_behaviours, split_of
from interp_ablate.league.fitted import Detector, FittedMethod
from interp_ablate.league.journal import Key, LeagueJournal, Record
from interp_ablate.league.measures import DIGITS, SIDES, Side, TestBench
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.settings import LeagueSettings
from interp_ablate.league.task import POINT, LeagueTask
from interp_ablate.models.batches import telling_of_memory
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet, Split
from interp_ablate.prompts.prompt import Prompt, normalised
from interp_ablate.search.derived_edits import strength_at_kl
from interp_ablate.settings import DECODED_ROWS
from interp_ablate.sites import sites_of
from interp_ablate.storage.atomic_files import check_folder

JOURNAL, PLANS, ACTIVATIONS = "league.jsonl", "plans", "activations"
POSITIONS = ("-1", "-2", "-3", "-4")
# The KLs that plans are made for, as shares of the limit: a curve's points beside the unedited model.
RUNGS = (1 / 27, 1 / 9, 1 / 3, 1.0)
FIRST_STRENGTH = 0.3


@dataclass(eq=False)
class Fixture:
    """One behaviour and seed: its task, its test prompts, what has been measured of them."""

    model: Model
    behaviour: LeagueBehaviour
    seed: int
    settings: LeagueSettings
    out: Path

    @cached_property
    def split(self) -> Split:
        """The prompts of the three parts."""
        return split_of(self.behaviour, self.settings, self.seed)

    def key(self, kind: str, *parts: object) -> Key:
        """The journal's key of a piece of work."""
        place = (self.behaviour.name, self.behaviour.fingerprint[:16], str(self.seed))
        return (kind, *place, *map(str, parts))

    def plan_file(self, method: str, side: Side, rung: int) -> Path:
        """Where a plan of a fitted method is kept."""
        name = re.sub(r"\W+", "_", self.behaviour.name)
        folder = f"{name}-{self.behaviour.fingerprint[:8]}-{self.seed}"
        return self.out / PLANS / folder / re.sub(r"\W+", "_", method) / f"{side}-{rung}.json"

    @cached_property
    def _collected(self) -> Activations:
        """Activations of all of the behaviour's prompts, collected once for all seeds."""
        contrast = self.behaviour.contrast
        sites = sites_of((POINT,), range(self.model.n_layers))
        return collect(self.model, contrast, sites, POSITIONS, cache=self.out / ACTIVATIONS)

    def activations(self, part: ContrastSet) -> Activations:
        """The activations of one part's prompts, positive ones first."""
        whole, rows = self.behaviour.contrast, {}
        for i, prompt in enumerate(whole.positive + whole.negative):
            rows[prompt] = i
        index = [rows[prompt] for prompt in part.positive + part.negative]
        labels = torch.arange(len(index)) < len(part.positive)
        found = self._collected
        return Activations(found.values[index], found.sites, found.positions, labels)

    @cached_property
    def task(self) -> LeagueTask:
        """What the methods are given, with what they share computed: no method's clock runs meanwhile."""
        task = LeagueTask(
            model=self.model,
            behaviour=self.behaviour.name,
            train=self.split.train,
            validation=self.split.validation,
            activations=self.activations(self.split.train),
            held_out=self.activations(self.split.validation),
            scorer=self.behaviour.scorer,
            seed=self.seed,
            seconds=self.settings.seconds,
            max_kl=self.settings.max_kl,
            max_new_tokens=self.settings.max_new_tokens,
        )
        task.prepare()
        return task

    @cached_property
    def bench(self) -> TestBench:
        """The test prompts, with the unedited model's answers."""
        assert self.behaviour.scorer is not None
        return TestBench(
            self.model,
            self.split.test,
            self.behaviour.scorer,
            max_new_tokens=self.settings.max_new_tokens,
        )

    def limit(self, side: Side) -> float:
        """Up to which KL a side is compared."""
        return self.settings.max_kl if side == "removal" else self.settings.max_kl_induction


def play(
    model: Model,
    behaviours: Sequence[LeagueBehaviour],
    methods: Sequence[LeagueMethod],
    settings: LeagueSettings,
    out: Path,
) -> dict[Key, Record]:
    """Fit and judge every method on every behaviour and seed; what the folder's journal has is not done again.

    A seed is finished on all behaviours before the next begins.

    Raises:
        RunError: a behaviour that cannot be played (`check_behaviours`); the folder is of something else, holds a
            league of other rules or another model, is in use, or cannot be written.
    """
    check_behaviours(behaviours, settings, model)
    pairs = [(behaviour, seed) for seed in settings.seed_numbers for behaviour in behaviours]
    check_folder(out)
    if (out / "run.json").exists():
        raise RunError(f"{out} is a run folder: choose another --out for a league")
    journal = LeagueJournal(out / JOURNAL, {"model": model.fingerprint, **settings.rules})
    with journal.open(), bar("league", len(pairs) * len(methods)) as advance:
        for behaviour, seed in pairs:
            fixture = Fixture(model, behaviour, seed, settings, out)
            for method in methods:
                _fit(journal, fixture, method)
                if fixture.behaviour.scorer is None:
                    advance(1)
            if fixture.behaviour.scorer is not None:
                _judge(journal, fixture, methods)
                advance(len(methods))
        return dict(journal.done)


def _fit(journal: LeagueJournal, fixture: Fixture, method: LeagueMethod) -> None:
    """Fit one method, and keep its plans and its scores of the test prompts."""
    key = fixture.key("fit", method.name)
    if key in journal.done:
        return
    task = _shared(journal, fixture)
    test = fixture.activations(fixture.split.test)

    def do() -> list[Record]:
        task.begin()
        start = time.monotonic()
        try:
            with telling_of_memory(f"while {method.name} was fitted"):
                fitted = method.fit(task)
            seconds = time.monotonic() - start
            pairs = [digest_of(prompt) for prompt in fixture.split.test.positive]
            values = _detection(fitted, test) | {"about": dict(fitted.about), "pairs": pairs}
            if task.scorer is not None:
                values["plans"] = {side: _ladder(fixture, method, fitted, side) for side in SIDES}
        except InterpAblateError as error:
            return [_failed(key, start, error)]
        return [Record(key, values, seconds)]

    journal.work([key], do)


def _failed(key: Key, start: float, error: InterpAblateError) -> Record:
    """The record of what came to nothing; where memory ran out, another process tries again."""
    final = not isinstance(error, OutOfMemoryError)
    return Record(key, {}, time.monotonic() - start, str(error), final)


def _shared(journal: LeagueJournal, fixture: Fixture) -> LeagueTask:
    """The task, after the work that all methods share; its seconds are a record of their own."""
    start, key = time.monotonic(), fixture.key("shared")
    task = fixture.task
    if key not in journal.done:
        journal.finish(Record(key, {}, time.monotonic() - start))
    return task


def digest_of(prompt: Prompt) -> str:
    """A prompt's name in records: the same prompt has the same under every seed."""
    return hashlib.sha256(normalised(prompt).encode()).hexdigest()[:12]


def _detection(fitted: FittedMethod, test: Activations) -> dict[str, Any]:
    """Where the method detects, and its scores of the test prompts: the positive ones first."""
    detector = Detector.of(fitted.detection)
    scores = torch.as_tensor(detector.score(test.at(detector.site, detector.position)))
    if scores.shape != (len(test.values),) or not torch.isfinite(scores).all():
        raise InterpAblateError(
            f"a detector gives one finite score a prompt; got {tuple(scores.shape)} for {len(test.values)} prompts"
        )
    rounded = [float(f"{float(score):.{DIGITS + 2}g}") for score in scores]
    return {"site": str(detector.site), "position": detector.position, "scores": rounded}


def _ladder(
    fixture: Fixture, method: LeagueMethod, fitted: FittedMethod, side: Side
) -> list[dict[str, float]]:
    """Plans at ever larger KLs of the validation prompts, each saved: their strengths and those KLs."""
    family = fitted.removal if side == "removal" else fitted.induction
    rungs: list[dict[str, float]] = []
    start = FIRST_STRENGTH
    for share in RUNGS if family is not None else ():
        assert family is not None
        found = strength_at_kl(
            family,
            share * fixture.limit(side),
            fixture.task.kl,
            start=start,
            greatest=fitted.greatest_strength,
        )
        if found is None or any(rung["strength"] == found[1] for rung in rungs):
            continue
        plan, strength = found
        plan.save(fixture.plan_file(method.name, side, len(rungs)))
        rungs.append({"strength": strength, "share": share})
        start = strength * 3**0.5  # a KL grows about with the square of a strength
    return rungs


def _judge(journal: LeagueJournal, fixture: Fixture, methods: Sequence[LeagueMethod]) -> None:
    """The test prompts under every kept plan, several plans a batch."""
    unedited = fixture.key("unedited")
    if unedited not in journal.done:
        journal.work([unedited], lambda: [_unedited(fixture, unedited)])
    at_once = max(1, DECODED_ROWS // fixture.settings.n_test)
    while waiting := list(_pending(journal, fixture, methods)):
        keys = journal.together([key for key, *_ in waiting], at_once)
        journal.work(keys, partial(_scored, fixture, waiting[: len(keys)]))


def _unedited(fixture: Fixture, key: Key) -> Record:
    start = time.monotonic()
    test = fixture.split.test
    prompts = {
        side: [digest_of(prompt) for prompt in part]
        for side, part in (("removal", test.positive), ("induction", test.negative))
    }
    return Record(key, {**fixture.bench.unedited(), "prompts": prompts}, time.monotonic() - start)


Pending = tuple[Key, Path, Side]


def _pending(
    journal: LeagueJournal, fixture: Fixture, methods: Sequence[LeagueMethod]
) -> Iterator[Pending]:
    """The plans of fitted methods that have not been judged."""
    for method in methods:
        fit = journal.done[fixture.key("fit", method.name)]
        for side in SIDES:
            for rung in range(len(fit.values.get("plans", {}).get(side, []))):
                key = fixture.key("plan", method.name, side, rung)
                if key not in journal.done:
                    yield key, fixture.plan_file(method.name, side, rung), side


def _scored(fixture: Fixture, batch: Sequence[Pending]) -> list[Record]:
    """The records of a batch; where the batch fails, each of its plans alone."""
    start = time.monotonic()
    try:
        with telling_of_memory("while plans were judged"):
            numbers = fixture.bench.under([(Plan.load(path), side) for _, path, side in batch])
    except InterpAblateError as error:
        if len(batch) == 1:
            return [_failed(batch[0][0], start, error)]
        return [record for each in batch for record in _scored(fixture, [each])]
    share = (time.monotonic() - start) / len(batch)
    return [Record(key, values, share) for (key, *_), values in zip(batch, numbers, strict=True)]
