"""The proposer of a search: the same trials after any stop, samplers, errors; and parameters of a space."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from interp_ablate.errors import RunError
from interp_ablate.search.optuna_proposer import OptunaProposer
from interp_ablate.search.parameters import Choice, Float, Int, ParameterSpace
from interp_ablate.search.trials import Trial

pytest.importorskip("optuna")
PLANE = ParameterSpace((Float("x", 0.0, 1.0), Float("y", 0.0, 1.0)))
KERNELS = ParameterSpace(
    (
        Choice("kernel", ("none", "linear", "gaussian")),
        Int("rank", 1, 8),
        Float("width", 0.01, 10.0, log=True, when=("kernel", "linear", "gaussian")),
        Float("sharpness", 0.0, 2.0, when=("kernel", "gaussian")),
    )
)
INITIAL = ({"x": 0.5, "y": 0.5}, {"x": 0.25})


def scored(trial: Trial) -> Trial:
    params = trial.params
    if "x" in params:
        loss = (params["x"] - 0.3) ** 2 + (params["y"] - 0.6) ** 2
    else:
        loss = abs(params.get("width", 0.1) - 1) + 1 / params["rank"]
    scores = {"expression_rate": loss, "kl": 1 - loss / 2, "positive_repetition": 0.0}
    return trial.scored(scores, 0.1)


class Scoring:
    """Scores and keeps trials as a log would; stops after some."""

    def __init__(self, logged: Sequence[Trial] = (), most: int = 10**9) -> None:
        self.logged, self.most = {trial.key: trial for trial in logged}, most
        self.asked: list[Trial] = []

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        for trial in trials:
            if trial.key not in self.logged:
                if len(self.asked) == self.most:
                    raise KeyboardInterrupt
                self.asked.append(trial)
                self.logged[trial.key] = scored(trial)
        return [self.logged[trial.key] for trial in trials]


@pytest.mark.parametrize("round_size", (1, 3))
@pytest.mark.parametrize("sampler", ("tpe", "random", "nsga2"))
@pytest.mark.parametrize("space", (PLANE, KERNELS), ids=("plane", "kernels"))
def test_stopped_after_any_trial_it_goes_on_as_if_nothing_had_happened(
    space: ParameterSpace, sampler: Any, round_size: int
) -> None:
    initial = INITIAL if space is PLANE else ()
    proposer = OptunaProposer(
        space, initial=initial, sampler=sampler, startup=4, round_size=round_size
    )
    whole = Scoring()
    want = proposer.propose(whole, n_trials=14)
    assert [trial.number for trial in want] == list(range(14)) == [t.number for t in whole.asked]
    for survived in (1, 2, 5, 7, 12):
        first = Scoring(most=survived)
        with pytest.raises(KeyboardInterrupt):
            proposer.propose(first, n_trials=14)
        logged = list(first.logged.values())
        second = Scoring(logged)
        assert proposer.propose(second, logged, n_trials=14) == want
        assert first.asked + second.asked == whole.asked, "a trial was lost or repeated"
    again = Scoring(want)
    assert proposer.propose(again, want, n_trials=14) == want and not again.asked


def test_other_seeds_draw_other_points() -> None:
    drawn = [
        [trial.params for trial in OptunaProposer(PLANE, seed=seed).propose(Scoring(), n_trials=4)]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    points = [tuple(params.values()) for params in drawn[0] + drawn[2]]
    assert len(set(points)) == len(points)


def test_the_sampler_learns() -> None:
    trials = OptunaProposer(PLANE, startup=8).propose(Scoring(), n_trials=40)
    loss = [trial.scores["expression_rate"] for trial in trials]
    assert sum(loss[-15:]) < sum(loss[:15])


def test_the_first_trials_are_the_initial_ones() -> None:
    trials = OptunaProposer(PLANE, initial=INITIAL).propose(Scoring(), n_trials=3)
    assert trials[0].params == INITIAL[0] and trials[1].params["x"] == 0.25
    assert 0 <= trials[1].params["y"] <= 1


def test_initial_trials_are_a_generation_of_nsga2() -> None:
    space = ParameterSpace(tuple(Float(name, 0.0, 1.0) for name in "abcdef"))
    initial = [dict.fromkeys("abcdef", 0.5 + i / 1000) for i in range(4)]

    def score(trials: Sequence[Trial]) -> list[Trial]:
        names = ("expression_rate", "kl", "positive_repetition")
        return [t.scored(dict.fromkeys(names, sum(t.params.values())), 0.0) for t in trials]

    proposer = OptunaProposer(space, initial=initial, sampler="nsga2", startup=4)
    for child in proposer.propose(score, n_trials=8)[4:]:
        inherited = [abs(value - 0.5) < 0.01 for value in child.params.values()]
        assert sum(inherited) > 2, "children have most of their parents' values"


def test_what_all_trials_share_is_in_their_parameters() -> None:
    space = ParameterSpace((Choice("edit", ("band", "fitted")), Int("rank", 1, 8)))
    fixed = {"point": "resid_post", "position": "-1", "control": "random"}
    initial = [{"edit": "band"}, {"edit": "fitted"}]
    band, fitted = OptunaProposer(space, fixed=fixed, initial=initial).propose(
        Scoring(), n_trials=2
    )
    assert fixed.items() <= band.params.items()
    assert fitted.params["control"] == "random" and "point" not in fitted.params


def test_failed_trials_count_and_teach_nothing() -> None:
    def score(trials: Sequence[Trial]) -> list[Trial]:
        return [t.failed("it broke") if t.number == 1 else scored(t) for t in trials]

    trials = OptunaProposer(PLANE, startup=2).propose(score, n_trials=6)
    assert [trial.status for trial in trials] == ["ok", "failed", *["ok"] * 4]


def test_a_longer_log_than_asked_for_is_kept() -> None:
    scoring = Scoring()
    trials = OptunaProposer(PLANE).propose(scoring, n_trials=6)
    assert OptunaProposer(PLANE).propose(scoring, trials, n_trials=3) == trials


def test_seconds_are_of_the_call() -> None:
    def slow(trials: Sequence[Trial]) -> list[Trial]:
        time.sleep(0.1)
        return [scored(trial) for trial in trials]

    proposer = OptunaProposer(PLANE)
    trials = proposer.propose(slow, seconds=0.5)
    assert 1 <= len(trials) <= 5
    assert len(proposer.propose(slow, n_trials=1000, seconds=0.3)) <= 3
    assert proposer.propose(slow, seconds=0) == []
    scoring = Scoring(trials)
    assert proposer.propose(scoring, trials, seconds=0) == trials  # what is logged is told first
    with pytest.raises(RunError, match="n_trials, or seconds, or both"):
        proposer.propose(slow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "grid"}, "unknown sampler 'grid': there are tpe, random, nsga2"),
        ({"seed": -1}, "0 or more"),
        ({"startup": -1}, "0 or more"),
        ({"round_size": 0}, "1 or more"),
        ({"initial": [{"x": 1.5}]}, "between 0.0 and 1.0"),
        ({"initial": [{"x": "a"}]}, "number of type float"),
        ({"initial": [{"z": 1}]}, "unknown parameters: z. There are: x, y"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        OptunaProposer(PLANE, **changes).propose(Scoring(), n_trials=2)


def test_logged_trials_of_another_space_are_refused() -> None:
    logged = [Trial({"x": 3.0, "y": 0.5}, "search", number=0)]
    with pytest.raises(RunError, match=r"x = 3\.0: it lies between"):
        OptunaProposer(PLANE).propose(Scoring(logged), logged, n_trials=2)


def test_optuna_is_asked_for_when_trials_are_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    with monkeypatch.context() as patch:
        patch.setattr(optuna, "__version__", "4.9.0")
        with pytest.raises(RunError, match=r"Optuna 5 or later, this is 4\.9\.0"):
            OptunaProposer(PLANE).propose(Scoring(), n_trials=1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        with pytest.raises(RunError, match=r"pip install 'interp-ablate\[search\]'"):
            OptunaProposer(PLANE).propose(Scoring(), n_trials=1)
    code = (
        "import sys, interp_ablate.search.parameters; "
        "sys.exit(any(m in sys.modules for m in ('optuna', 'torch')))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# --------------------------------------------------------------------------------- the space


def test_a_conditional_parameter_exists_with_its_parents_value_only() -> None:
    first = {"kernel": "gaussian", "rank": 2, "width": 1, "sharpness": 0.75}
    proposer = OptunaProposer(KERNELS, initial=[first], sampler="random")
    drawn = [trial.params for trial in proposer.propose(Scoring(), n_trials=20)]
    assert {params["kernel"] for params in drawn} == {"none", "linear", "gaussian"}
    for params in drawn:
        assert ("width" in params) == (params["kernel"] != "none")
        assert ("sharpness" in params) == (params["kernel"] == "gaussian")
        assert 0.01 <= params.get("width", 1) <= 10
    assert min(params.get("width", 1) for params in drawn) < 0.1
    for bad, message in (
        ({"kernel": "linear", "sharpness": 0.5}, "sharpness exists only when kernel is 'gaussian'"),
        ({"width": 0.5}, "or give that kernel too"),
        ({"kernel": "cubic"}, r"one of \['none', 'linear', 'gaussian'\]"),
        ({"rank": 1.5}, "number of type int"),
        ({"rank": True}, "number of type int"),
    ):
        with pytest.raises(RunError, match=message):
            KERNELS.admit(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float("a", 1.0, 0.0), "a from 1.0 to 0.0: the bounds"),
        (lambda: Float("a", 0.0, math.inf), "finite"),
        (lambda: Float("a", 0.0, 1.0, log=True), "starts above 0"),
        (lambda: Choice("a", ()), "at least one"),
        (lambda: Choice("a", (1, True)), "each once"),
        (lambda: Choice("a", ((1, 2),)), "text, numbers"),  # type: ignore[arg-type]
        (lambda: ParameterSpace((Int("a", 0, 1), Int("a", 0, 2))), "two parameters are named a"),
        (
            lambda: ParameterSpace((Int("a", 0, 1, when=("b", 1)), Int("b", 0, 1))),
            "an earlier parameter",
        ),
        (
            lambda: ParameterSpace((Int("b", 0, 1), Int("a", 0, 1, when=("b", 2)))),
            "b = 2: it lies between 0 and 1",
        ),
    ],
)
def test_a_space_that_makes_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        make()
