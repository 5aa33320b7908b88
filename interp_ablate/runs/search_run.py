"""A search in a run folder, from directions to the chosen plan's test numbers.

Knows: what is prepared, which trials become finalists, the files that are left. Does not know: what a parameter
means, how trials survive a kill, or flags.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.final_test import choose_and_test
from interp_ablate.runs.fits import FIT_ROUNDS, load_fitted_edits
from interp_ablate.runs.kept_plans import plans_of_trials
from interp_ablate.runs.rounds_in_time import RoundsInTime
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.search_objectives import identity_of, objective_scores
from interp_ablate.runs.search_settings import SearchSettings
from interp_ablate.runs.stages import do_stage
from interp_ablate.runs.trial_session import TrialSession, trial_session
from interp_ablate.search.edit_space import (
    LAYERS,
    POINT,
    DirectionKey,
    initial_params,
    parameter_space,
    plan_of,
)
from interp_ablate.search.gradient_fit import NothingToFitError
from interp_ablate.search.grid import as_finalist
from interp_ablate.search.objective_scores import ObjectiveScores
from interp_ablate.search.objectives import Objective, leading, meets, parse_conditions
from interp_ablate.search.optuna_proposer import OptunaProposer
from interp_ablate.search.race import (
    layers_apart,
    race_directions,
    rank_directions,
    screening_trials,
)
from interp_ablate.search.selection import pareto_front, spread_out
from interp_ablate.search.trial_table import read_trials, to_frame
from interp_ablate.search.trials import Trial
from interp_ablate.settings import DECODED_ROWS
from interp_ablate.sites import Site

MOST_RACED = 12  # layers that are raced: the search draws others between them
RUNGS = ((3, MOST_RACED), (12, 6), (32, 3))  # prompts a side, and how many layers come so far
N_SOURCES = 3  # promising layers that bands start at
N_FRONT = 24  # finalists of the front, at most
N_STRONG = 6  # finalists beside the front
AT_ONCE = 3  # trials whose answers are written in one batch
LEAST_SECONDS = 60.0  # of trials, whatever the preparation took


def run_search(
    run: Run,
    search: SearchSettings,
    objectives: ObjectiveScores | None = None,
    fit_rounds: Mapping[str, int] | None = None,
) -> None:
    """Search plans and test the best; the same call again goes on where it was.

    A call with more trials or minutes goes on after the last one of the calls before, with the draws that one long
    search would have made.

    Args:
        objectives: those of the settings, where they are made already (`objective_scores`).
        fit_rounds: of a search that is repeated, how many rounds each of its fits had.

    Raises:
        RunError: a search of other settings in this folder, another process that works in it, or no plan that
            could be scored.
    """
    begin = time.monotonic()
    objectives = objectives or objective_scores(run, search)
    run.check_export()
    do_stage(run, "directions")
    with trial_session(run, search) as session:
        run.bench.score_by(objectives)
        settings = {"control": search.control, "sampler": search.sampler}
        _check_same_search(session, settings | {"objectives": identity_of(objectives)})
        screened, layers = _prepared(session, search, begin, fit_rounds)
        fits = load_fitted_edits(run.out / "fits") if search.fits else {}
        _check_same_search(session, {"fits": sorted(fits)})
        session.space.fits = fits
        trials = _searched(session, search, layers, begin)
        chosen = _finalists(trials, objectives.objectives, run.configuration.max_kl, 0.5 / _n(run))
        finalists = session.score("finalists", chosen)
        table = session.write_table(screened, [*trials, *finalists])
    own = table.iloc[len(table) - len(finalists) :]
    for path in plans_of_trials(run.out):
        path.unlink()  # an earlier call's, whose numbers are others now
    for number, trial in zip(own["trial"], finalists):
        plan_of(trial.params, session.space).save(run.out / "plans" / f"{number}.json")
    choose_and_test(run, own, search=search, tried=trials)
    run.discard_after("evaluate")


def _n(run: Run) -> int:
    """Positive validation prompts."""
    return len(run.bench.positive.rows)


def _searched(
    session: TrialSession, search: SearchSettings, layers: Sequence[float], begin: float
) -> list[Trial]:
    """The search's trials, drawn and scored; how long they took and why they ended is kept in the folder.

    Args:
        begin: when this call began its preparation.
    """
    run, state = session.run, session.run.state["search"]
    batch_size = max(1, min(AT_ONCE, DECODED_ROWS // _n(run)))
    # the rounds of the first call: draws depend on them
    state["round_size"] = state.get("round_size", batch_size * session.n_workers)
    proposer = OptunaProposer(
        parameter_space(session.space),
        fixed=_fixed(session, search),
        initial=initial_params(session.space, layers),
        sampler=search.sampler,  # type: ignore[arg-type]
        seed=run.configuration.seed,
        round_size=state["round_size"],
        objectives=run.bench.objectives.objectives,
    )
    logged = [trial for trial in session.log.done.values() if trial.stage == "search"]
    clock = SearchClock(run, begin, sum(trial.seconds for trial in logged) / session.n_workers)
    objectives = run.bench.objectives.objectives
    conditions = parse_conditions(search.stop_at, objectives) if search.stop_at else ()

    def ends(trial: Trial) -> bool:
        return bool(conditions) and trial.status == "ok" and meets(conditions, trial.scores)

    with run.step("search", search.trials) as advance:

        def score(some: Sequence[Trial]) -> list[Trial]:
            done = session.run_trials(some, advance, batch_size=batch_size)
            clock.keep()
            return done

        trials = proposer.propose(
            score,
            logged,
            n_trials=search.trials,
            seconds=clock.left(60 * search.minutes),
            until=ends,
        )
    clock.keep()
    met = [trial.number for trial in trials if ends(trial)]
    enough = search.trials is not None and len(trials) >= search.trials
    run.record(
        search_settings=asdict(search),
        search_end={
            "trials": len(trials),
            "minutes": search.minutes,
            "by": "stop_at" if met else "trials" if enough else "minutes",
            "stop_at": search.stop_at,
            "met_by": met,
        },
    )
    return trials


class SearchClock:
    """The wall time of a search over all of its calls, kept in the folder after every round.

    Args:
        begin: when this call began its preparation, which is over now.
        in_trials: seconds of the trials before, for a folder that does not say.
    """

    def __init__(self, run: Run, begin: float, in_trials: float) -> None:
        self.run, self.last = run, begin
        search = run.state["search"]
        search["trial_seconds"] = search.get("trial_seconds", in_trials)
        self._add(time.monotonic(), "seconds")

    def keep(self) -> None:
        """Add the time since the last call to what the folder holds."""
        self._add(time.monotonic(), "seconds", "trial_seconds")

    def _add(self, now: float, *names: str) -> None:
        search = self.run.state["search"]
        for name in names:
            search[name] = search.get(name, 0.0) + now - self.last
        self.last = now
        self.run.save()

    def left(self, seconds: float) -> float:
        """Of so many seconds for the whole search; trials get a minute at least, over all calls."""
        search = self.run.state["search"]
        return max(seconds - search["seconds"], LEAST_SECONDS - search["trial_seconds"])


def _fixed(session: TrialSession, search: SearchSettings) -> dict[str, Any]:
    """Parameters that all trials of the search share."""
    place = {"point": POINT, "position": session.space.position}
    return place | ({"control": search.control} if search.control else {})


def _check_same_search(session: TrialSession, settings: dict[str, Any]) -> None:
    """Keep the settings of the folder's search; one that has trials of other settings is refused with what differs.

    Raises:
        RunError: the folder has a search of other settings.
    """
    run = session.run
    before = run.state.get("search", {}) if _has_begun(session) else {}
    differ = [name for name in settings if name in before and before[name] != settings[name]]
    if differ:
        listed = "; ".join(f"{n}: {before[n]!r} there, {settings[n]!r} now" for n in differ)
        raise RunError(
            f"{run.out} holds another search ({listed}). Choose another --out, or delete the folder"
        )
    run.record(search=run.state.get("search", {}) | settings)
    run.save()


def _prepared(
    session: TrialSession,
    search: SearchSettings,
    begin: float,
    fit_rounds: Mapping[str, int] | None,
) -> tuple[pd.DataFrame | None, list[float]]:
    """The screening's table and the best layers first; the fitted edits are in the folder, if there is time for them.

    A control screens nothing and begins at the middle layers.
    """
    run, depth = session.run, session.run.model.n_layers - 1
    screened = None
    middle = session.space.nearest_layer(0.7 * depth)
    sources: list[DirectionKey] = [(middle, POINT, session.space.position)]
    layers = [0.5 * depth, 0.7 * depth, 0.9 * depth]
    if search.control is None:
        screened = race_directions(
            run.bench.n_prompts, _screening(session), session.score, rungs=RUNGS
        )
        sources = rank_directions(screened)
        layers = [float(layer) for layer, _, _ in sources[:N_SOURCES]]
    rounds = RoundsInTime(
        run, search.minutes, begin, _first_round(screened), _decided(session, fit_rounds)
    )
    for source in layers_apart(sources) if search.fits else ():
        try:
            run.fitter.fit(source, _start(session, source), rounds)
        except NothingToFitError as error:
            run.note(str(error))
    return screened, layers


def _first_round(screened: pd.DataFrame | None) -> float:
    """Seconds that the first round of a fit may take: a step takes about as long as a direction on the most prompts.

    A quarter more, for the answers to training prompts. 0 where nothing was screened.
    """
    if screened is None:
        return 0.0
    last = screened[screened["prompts"] == screened["prompts"].max()]
    return 1.25 * FIT_ROUNDS[0][0] * float(last["seconds"].median())


def _decided(session: TrialSession, given: Mapping[str, int] | None) -> Callable[[str], int | None]:
    """From the name of a fit to its rounds, where they are decided: given, or kept, for good once trials have begun."""
    kept = session.run.state["search"].get("fit_rounds", {})
    if given is not None:
        return given.get
    if _has_begun(session):
        return lambda name: kept.get(name, 0)
    return lambda name: kept.get(name) or None


def _has_begun(session: TrialSession) -> bool:
    return any(each.stage == "search" for each in session.log.done.values())


def _start(session: TrialSession, source: DirectionKey) -> Any:
    """Where a fit begins: at the screened direction, or at the control's at that layer."""
    layer, point, position = source
    site = Site(layer, point)  # type: ignore[arg-type]
    if session.space.control:
        return session.space.directions(MAIN_METHOD)[site]
    return session.run.directions[site, position, MAIN_METHOD]


def _screening(session: TrialSession) -> list[Trial]:
    """Some of the layers a plan of the search may take, evenly apart, at full strength: neighbours are much alike."""
    from_layer = LAYERS[0] * (session.run.model.n_layers - 1)
    main = session.run.directions.of(MAIN_METHOD)
    at_point = [d for d in main if d.site.point == POINT]
    deep = [d for d in at_point if d.site.layer >= from_layer]
    some = sorted(deep or at_point, key=lambda d: d.site.layer)
    return screening_trials(some[:: -(-len(some) // MOST_RACED)])


def _finalists(
    trials: Sequence[Trial], objectives: Sequence[Objective], max_kl: float, tolerance: float
) -> list[Trial]:
    """The plans of the front, and the strongest within the limits.

    Raises:
        RunError: no plan could be scored.
    """
    ok = [trial for trial in trials if trial.status == "ok"]
    if not ok:
        reasons = [trial.reason for trial in trials if trial.reason]
        raise RunError(
            "no plan of the search could be scored"
            + (f"; the first failed with: {reasons[0]}" if reasons else ": give it more --minutes")
        )
    table = to_frame(ok)
    front = spread_out(pareto_front(table, objectives=objectives), objectives, N_FRONT)
    rows = [*front.index, *_strongest(table, objectives, max_kl, tolerance).index]
    return list({as_finalist(ok[i]).key: as_finalist(ok[i]) for i in rows}.values())


def _strongest(
    table: pd.DataFrame, objectives: Sequence[Objective], max_kl: float, tolerance: float
) -> pd.DataFrame:
    """Trials within the limits that are best by the leading objective, those nearest to the KL limit first.

    A weaker plan with the same rate beats them in the front, and is likelier to fail on other prompts.
    """
    inside = table[table["kl_high"] <= max_kl]
    for each in objectives:
        excess = inside[each.column].map(each.excess)
        inside = inside[excess <= 0]
    if inside.empty:
        return inside
    lead = leading(objectives)
    cost = -inside[lead.column] if lead.maximize else inside[lead.column]
    return inside[cost <= cost.min() + tolerance].nlargest(N_STRONG, "kl")


def summary(run: Run) -> str:
    """The finalists of the folder's search as text, a line a plan."""
    trials = read_trials(run.out / "trials.csv")
    numbers = [int(path.stem) for path in plans_of_trials(run.out) if path.stem.isdecimal()]
    lines = ["trial  rate    KL      repetition"]
    for _, row in trials[trials["trial"].isin(numbers)].sort_values("expression_rate").iterrows():
        lines.append(
            f"{int(row['trial']):5d}  {row['expression_rate']:.3f}   {row['kl']:.4f}  {row['repetition']:.3f}"
        )
    return "\n".join(lines)
