"""A search in a run folder, from directions to the chosen plan's test numbers.

Knows: what is prepared, which trials become finalists, the files that are left. Does not know: what a parameter
means, how trials survive a kill, or flags.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.final_test import choose_and_test
from interp_ablate.runs.fits import load_fitted_edits
from interp_ablate.runs.run_folder import Run
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
from interp_ablate.search.optuna_proposer import OBJECTIVES, OptunaProposer
from interp_ablate.search.race import (
    layers_apart,
    race_directions,
    rank_directions,
    screening_trials,
)
from interp_ablate.search.selection import pareto_front
from interp_ablate.search.trial_table import read_trials, to_frame
from interp_ablate.search.trials import Trial
from interp_ablate.settings import DECODED_ROWS
from interp_ablate.sites import Site

N_SOURCES = 3  # promising layers that bands start at
N_STRONG = 6  # finalists beside the front
AT_ONCE = 3  # trials whose answers are written in one batch
LEAST_SECONDS = 60.0  # of trials, whatever the preparation took


def run_search(run: Run, search: SearchSettings) -> None:
    """Search plans and test the best; the same call again goes on where it was.

    Raises:
        RunError: a search of other settings in this folder, another process that works in it, or no plan that
            could be scored.
    """
    begin = time.monotonic()
    run.check_export()
    do_stage(run, "directions")
    with trial_session(run, control=search.control) as session:
        _check_same_search(session, {"control": search.control, "sampler": search.sampler})
        screened, layers = _prepared(session, search)
        fits = load_fitted_edits(run.out / "fits") if search.fits else {}
        _check_same_search(session, {"fits": sorted(fits)})
        session.space.fits = fits
        n_positive = len(run.bench.positive.rows)
        batch_size = max(1, min(AT_ONCE, DECODED_ROWS // n_positive))
        proposer = OptunaProposer(
            parameter_space(session.space),
            fixed=_fixed(session, search),
            initial=initial_params(session.space, layers),
            sampler=search.sampler,  # type: ignore[arg-type]
            seed=run.configuration.seed,
            round_size=batch_size * session.n_workers,
        )
        seconds = 60 * search.minutes - (time.monotonic() - begin)
        with run.step("search", search.trials) as advance:
            trials = proposer.propose(
                lambda some: session.run_trials(some, advance, batch_size=batch_size),
                [trial for trial in session.log.done.values() if trial.stage == "search"],
                n_trials=search.trials,
                seconds=max(seconds, LEAST_SECONDS),
            )
        chosen = _finalists(trials, run.configuration.max_kl, 0.5 / n_positive)
        finalists = session.score("finalists", chosen)
        table = session.write_table(screened, [*trials, *finalists])
    own = table.iloc[len(table) - len(finalists) :]
    for path in (run.out / "plans").glob("*.json"):
        path.unlink()  # an earlier call's, whose numbers are others now
    for number, trial in zip(own["trial"], finalists):
        plan_of(trial.params, session.space).save(run.out / "plans" / f"{number}.json")
    choose_and_test(run, own, control=search.control)
    run.discard_after("evaluate")


def _fixed(session: TrialSession, search: SearchSettings) -> dict[str, Any]:
    """Parameters that all trials of the search share."""
    place = {"point": POINT, "position": session.space.position}
    return place | ({"control": search.control} if search.control else {})


def _check_same_search(session: TrialSession, settings: dict[str, Any]) -> None:
    """Keep the settings of the folder's search; one that has trials of other settings is refused with what differs.

    Raises:
        RunError: the folder has a search of other settings.
    """
    run, begun = session.run, any(each.stage == "search" for each in session.log.done.values())
    before = run.state.get("search", {}) if begun else {}
    differ = [name for name in settings if name in before and before[name] != settings[name]]
    if differ:
        listed = "; ".join(f"{n}: {before[n]!r} there, {settings[n]!r} now" for n in differ)
        raise RunError(
            f"{run.out} holds another search ({listed}). Choose another --out, or delete the folder"
        )
    run.record(search=run.state.get("search", {}) | settings)
    run.save()


def _prepared(
    session: TrialSession, search: SearchSettings
) -> tuple[pd.DataFrame | None, list[float]]:
    """The screening's table and the best layers first; the fitted edits are in the folder.

    A control screens nothing and begins at the middle layers.
    """
    run, depth = session.run, session.run.model.n_layers - 1
    screened = None
    middle = min(session.space.layers, key=lambda layer: abs(layer - 0.7 * depth))
    sources: list[DirectionKey] = [(middle, POINT, session.space.position)]
    layers = [0.5 * depth, 0.7 * depth, 0.9 * depth]
    if search.control is None:
        screened = race_directions(run.bench.n_prompts, _screening(session), session.score)
        sources = rank_directions(screened)
        layers = [float(layer) for layer, _, _ in sources[:N_SOURCES]]
    for source in layers_apart(sources) if search.fits else ():
        try:
            run.fitter.fit(source, _start(session, source))
        except NothingToFitError as error:
            run.note(str(error))
    return screened, layers


def _start(session: TrialSession, source: DirectionKey) -> Any:
    """Where a fit begins: at the screened direction, or at the control's at that layer."""
    layer, point, position = source
    site = Site(layer, point)  # type: ignore[arg-type]
    if session.space.control:
        return session.space.directions(MAIN_METHOD)[site]
    return session.run.directions[site, position, MAIN_METHOD]


def _screening(session: TrialSession) -> list[Trial]:
    """The layers a plan of the search may take, at full strength."""
    from_layer = LAYERS[0] * (session.run.model.n_layers - 1)
    main = session.run.directions.of(MAIN_METHOD)
    at_point = [d for d in main if d.site.point == POINT]
    deep = [d for d in at_point if d.site.layer >= from_layer]
    return screening_trials(deep or at_point)


def _finalists(trials: Sequence[Trial], max_kl: float, tolerance: float) -> list[Trial]:
    """The plans of the front, and the strongest within the KL limit.

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
    front = pareto_front(table, objectives=OBJECTIVES)
    rows = [*front.index, *_strongest(table, max_kl, tolerance).index]
    return list({as_finalist(ok[i]).key: as_finalist(ok[i]) for i in rows}.values())


def _strongest(table: pd.DataFrame, max_kl: float, tolerance: float) -> pd.DataFrame:
    """Trials within the KL limit that leave the least of the behaviour, those nearest to the limit first.

    A weaker plan with the same rate beats them in the front, and is likelier to fail on other prompts.
    """
    inside = table[table["kl_high"] <= max_kl]
    if inside.empty:
        return inside
    least = inside["expression_rate"].min() + tolerance
    return inside[inside["expression_rate"] <= least].nlargest(N_STRONG, "kl")


def summary(run: Run) -> str:
    """The finalists of the folder's search as text, a line a plan."""
    trials = read_trials(run.out / "trials.csv")
    numbers = [int(path.stem) for path in (run.out / "plans").glob("*.json")]
    lines = ["trial  rate    KL      repetition"]
    for _, row in trials[trials["trial"].isin(numbers)].sort_values("expression_rate").iterrows():
        lines.append(
            f"{int(row['trial']):5d}  {row['expression_rate']:.3f}   {row['kl']:.4f}  {row['repetition']:.3f}"
        )
    return "\n".join(lines)
