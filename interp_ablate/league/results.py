"""The results of a league: from the journal's records to one object, which table, figure and page are made of.

Knows: which records make which number. Does not know: statistics, drawing or Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp_ablate.league.journal import Key, Record
from interp_ablate.league.measures import SIDES, Side
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.settings import LeagueSettings
from interp_ablate.league.statistics import Sample, area_gained, mean_auc, mean_of, rank_ranges
from interp_ablate.stats.intervals import AT_LEAST_0, SHARE, Bounds, Estimate

FORMAT = "interp_ablate.league_results/2"
CHANGE: Bounds = (-1.0, 1.0)
COLUMNS = ("detection", "removal", "induction", "kl_answers", "repetition")
"""The numbers of a method; of the last two less is better."""
LESS_IS_BETTER = ("kl_answers", "repetition")
GRID = 13  # points at which mean curves are drawn


@dataclass(frozen=True)
class Judged:
    """A plan on the test prompts; one that failed counts as no effect at the KL that it was made for."""

    kl: float
    """Mean first-token KL in nats."""
    rates: Sequence[float]
    """Of the side's prompts, under the plan."""
    record: Record | None
    """None where the plan failed."""


@dataclass(frozen=True)
class Records:
    """What the journal has of the behaviours, seeds and methods that are asked for."""

    done: Mapping[Key, Record]
    behaviours: Mapping[str, str]
    """Each behaviour's name and the beginning of its fingerprint, as in the journal's keys."""
    seeds: Sequence[int]
    limits: Mapping[Side, float]

    def at(self, kind: str, behaviour: str, seed: int, *rest: object) -> Record | None:
        """One record; None where there is none, or it came to nothing."""
        key = (kind, behaviour, self.behaviours[behaviour], str(seed), *map(str, rest))
        record = self.done.get(key)
        return None if record is None or record.failed else record

    def fits(self, method: str) -> dict[tuple[str, int], Record]:
        """A method's fits by behaviour and seed, those that came to nothing too."""
        return {
            (name, seed): self.done[key]
            for name, print_ in self.behaviours.items()
            for seed in self.seeds
            if (key := ("fit", name, print_, str(seed), method)) in self.done
        }

    def failures(self, method: str) -> dict[str, str]:
        """Why a method has nothing, by behaviour."""
        return {name: fit.failed for (name, _), fit in self.fits(method).items() if fit.failed}

    def plans(self, behaviour: str, seed: int, method: str, side: Side) -> list[Judged]:
        """What a method's plans of one side did to test prompts, from the smallest KL on."""
        unedited = self.at("unedited", behaviour, seed)
        if unedited is None:
            return []
        plans = []
        for rung, made in enumerate(self._rungs(behaviour, seed, method, side)):
            record = self.at("plan", behaviour, seed, method, side, rung)
            if record is None:
                meant = made["share"] * self.limits[side]
                plans.append(Judged(meant, unedited.values[side], None))
            else:
                kl = float(np.mean(record.values["kl"]))
                plans.append(Judged(kl, record.values["rate"], record))
        return sorted(plans, key=lambda plan: plan.kl)

    def _rungs(
        self, behaviour: str, seed: int, method: str, side: Side
    ) -> Sequence[Mapping[str, float]]:
        fit = self.at("fit", behaviour, seed, method)
        return (fit.values.get("plans") or {}).get(side, []) if fit else []

    def counted(self, method: str, behaviours: Sequence[str]) -> list[int]:
        """How many plans of a method there are, and how many of them failed on the test prompts."""
        found = [
            self.at("plan", name, seed, method, side, rung) is None
            for name in behaviours
            for seed in self.seeds
            for side in SIDES
            for rung in range(len(self._rungs(name, seed, method, side)))
        ]
        return [len(found), sum(found)]

    def failed_plans(self, method: str, behaviour: str) -> list[str]:
        """Why plans of a method failed on the test prompts, each reason once."""
        places = [
            ("plan", behaviour, self.behaviours[behaviour], str(seed), method)
            for seed in self.seeds
        ]
        reasons = [r.failed for key, r in self.done.items() if key[:5] in places and r.failed]
        return list(dict.fromkeys(reasons))

    def samples(self, method: str, column: str, behaviour: str) -> list[Sample]:
        """The numbers of single prompts behind one number of the table; none where a seed has none."""
        make: Callable[..., Iterator[Sample]] = {
            "detection": self._detection,
            "removal": self._area,
            "induction": self._area,
        }.get(column, self._damage)
        found: list[Sample] = []
        for seed in self.seeds:
            of_seed = list(make(method, column, behaviour, seed))
            if not of_seed:
                return []
            found += of_seed
        return found

    def _detection(self, method: str, column: str, behaviour: str, seed: int) -> Iterator[Sample]:
        fit = self.at("fit", behaviour, seed, method)
        scores = fit.values["scores"] if fit else []
        half = len(scores) // 2  # the i-th prompts of both sides are a pair
        for i, score in enumerate(scores):
            pair = fit.values["pairs"][i % half] if fit else ""
            yield Sample(behaviour, seed, f"{behaviour} {pair}", score, i < half)

    def _area(self, method: str, column: Side, behaviour: str, seed: int) -> Iterator[Sample]:  # type: ignore[override]
        unedited = self.at("unedited", behaviour, seed)
        plans = self.plans(behaviour, seed, method, column)
        if unedited is None or not plans:
            return
        kls = [plan.kl for plan in plans]
        sign = -1.0 if column == "removal" else 1.0
        for i, base in enumerate(unedited.values[column]):
            rates = [plan.rates[i] for plan in plans]
            area = sign * area_gained(kls, rates, base, self.limits[column])
            prompt = unedited.values["prompts"][column][i]
            yield Sample(behaviour, seed, f"{behaviour} {prompt}", area)

    def _damage(self, method: str, column: str, behaviour: str, seed: int) -> Iterator[Sample]:
        unedited = self.at("unedited", behaviour, seed)
        strongest = self.nearest_limit(behaviour, seed, method)
        if unedited is None or strongest is None:
            return
        side = "induction" if column == "kl_answers" else "removal"  # whose prompts they are of
        for prompt, value in zip(unedited.values["prompts"][side], strongest.values[column]):
            yield Sample(behaviour, seed, f"{behaviour} {prompt}", value)

    def nearest_limit(self, behaviour: str, seed: int, method: str) -> Record | None:
        """The removal whose KL of test prompts is nearest to the limit; None where there is none, or it failed."""
        plans = self.plans(behaviour, seed, method, "removal")
        limit = self.limits["removal"]
        nearest = min(plans, key=lambda plan: abs(plan.kl - limit), default=None)
        return None if nearest is None else nearest.record

    def curve(self, method: str, side: Side, behaviour: str) -> list[list[float]] | None:
        """Mean rate over KL, as pairs, over the seeds; None where a seed has none."""
        grid = np.linspace(0.0, self.limits[side], GRID)
        curves = []
        for seed in self.seeds:
            unedited, plans = (
                self.at("unedited", behaviour, seed),
                self.plans(behaviour, seed, method, side),
            )
            if unedited is None or not plans:
                return None
            x = [0.0, *(plan.kl for plan in plans)]
            y = [
                float(np.mean(rates))
                for rates in (unedited.values[side], *(p.rates for p in plans))
            ]
            curves.append(np.interp(grid, x, y))
        return [[round(float(a), 6), round(float(b), 6)] for a, b in zip(grid, np.mean(curves, 0))]


def estimate_of(column: str, samples: Sequence[Sample]) -> Estimate | None:
    """The number of a column from single prompts' numbers; None of none."""
    if not samples:
        return None
    if column == "detection":
        return mean_auc(samples)
    bounds = {"kl_answers": AT_LEAST_0, "repetition": SHARE}.get(column, CHANGE)
    return mean_of(samples, bounds)


def results_of(
    records: Records,
    methods: Sequence[LeagueMethod],
    settings: LeagueSettings,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Every number of a league as JSON.

    Args:
        about: what the results say of the model and the versions.
    """
    judged = [name for name in records.behaviours if _unedited_at(records, name)]
    table: dict[str, Any] = {}
    for method in methods:
        table[method.name] = {
            "exactness": method.exactness,
            "source": method.source,
            "control": method.is_control,
            "ranks": {},
            "failed": records.failures(method.name),
            "plans": records.counted(method.name, judged),
            "failed_plans": {
                name: why for name in judged if (why := records.failed_plans(method.name, name))
            },
            "seconds": _seconds(records, method.name),
            "by_behaviour": {
                name: _numbers(records, method.name, [name]) for name in records.behaviours
            },
            "overall": _numbers(records, method.name, list(records.behaviours), judged),
            "curves": {
                side: {name: records.curve(method.name, side, name) for name in judged}
                for side in SIDES
            },
        }
    _add_ranks(table)
    return {
        "format": FORMAT,
        **about,
        "settings": settings.rules,
        "seeds": list(records.seeds),
        "behaviours": {name: _unedited(records, name) for name in records.behaviours},
        "shared_seconds": _shared_seconds(records),
        "methods": table,
    }


def _unedited_at(records: Records, behaviour: str) -> list[Record]:
    """The unedited model's records over the seeds, failed ones too; none where only prompts have the concept."""
    print_ = records.behaviours[behaviour]
    keys = [("unedited", behaviour, print_, str(seed)) for seed in records.seeds]
    return [records.done[key] for key in keys if key in records.done]


def _numbers(
    records: Records, method: str, behaviours: Sequence[str], judged: Sequence[str] | None = None
) -> dict[str, Any]:
    """Each column's estimate over behaviours; None where one of them has none."""
    numbers: dict[str, Any] = {}
    for column in COLUMNS:
        names = behaviours if column == "detection" or judged is None else judged
        parts = [records.samples(method, column, name) for name in names]
        whole = [sample for part in parts for sample in part] if all(parts) else []
        estimate = estimate_of(column, whole)
        numbers[column] = estimate and [
            None if x is None else round(x, 6) for x in estimate.to_list()
        ]
    return numbers


def _add_ranks(table: dict[str, Any]) -> None:
    """Ranks with their ranges, among the methods that are no controls and have a number."""
    for column in COLUMNS:
        there = {
            name: Estimate(*row["overall"][column])
            for name, row in table.items()
            if row["overall"][column] is not None and not row["control"]
        }
        if column in LESS_IS_BETTER:
            there = {name: _negated(e) for name, e in there.items()}
        for name, ranks in rank_ranges(there).items():
            table[name]["ranks"][column] = list(ranks)


def _negated(e: Estimate) -> Estimate:
    return Estimate(
        -e.value, None if e.high is None else -e.high, None if e.low is None else -e.low
    )


def _seconds(records: Records, method: str) -> float | None:
    """Mean seconds that a fit took."""
    fits = [fit.seconds for fit in records.fits(method).values() if not fit.failed]
    return round(float(np.mean(fits)), 1) if fits else None


def _shared_seconds(records: Records) -> float | None:
    """Mean seconds of the work that methods share, for one behaviour and seed."""
    places = [(name, seed) for name in records.behaviours for seed in records.seeds]
    found = [r.seconds for place in places if (r := records.at("shared", *place)) is not None]
    return round(float(np.mean(found)), 1) if found else None


def _unedited(records: Records, behaviour: str) -> dict[str, Any]:
    """The unedited model's rates on both sides, over the seeds, or why there are none."""
    found = _unedited_at(records, behaviour)
    failed = next((record.failed for record in found if record.failed), "")
    if failed or not found:
        return {"rates": None, "failed": failed}
    rates = [round(float(np.mean([record.values[side] for record in found])), 4) for side in SIDES]
    return {"rates": rates, "failed": ""}
