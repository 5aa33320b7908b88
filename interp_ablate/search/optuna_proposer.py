"""The proposer of `search`: draws of one of Optuna's samplers, which learn from the trials before.

Knows: Optuna in memory, what the log says was drawn before. Does not know: plans, prompts, or what a score means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from interp_ablate.errors import RunError
from interp_ablate.search.objectives import Objective, parse_objectives
from interp_ablate.search.parameters import ParameterSpace
from interp_ablate.search.trials import Trial

if TYPE_CHECKING:
    import optuna

Sampler = Literal["tpe", "random", "nsga2"]


@dataclass(frozen=True)
class OptunaProposer:
    """Plans drawn from a space. The same space, sampler, seed and round give the same trials.

    Each draw has a seed of its own, made of its number: a search that was killed goes on with the draws
    that it would have made.
    """

    space: ParameterSpace
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that every trial has and that are not drawn."""
    initial: Sequence[Mapping[str, Any]] = ()
    """Parameters of the first trials; what is left out is drawn."""
    sampler: Sampler = "tpe"
    seed: int = 0
    startup: int = 10
    """Random trials before "tpe" learns; the size of a generation for "nsga2"."""
    round_size: int = 1
    """Trials that are drawn at once, without knowing of each other's scores."""
    objectives: tuple[Objective, ...] = field(default_factory=lambda: parse_objectives(()))
    """What is made small, or large. Draws within their limits come before others ("tpe" and "nsga2")."""

    def propose(
        self,
        score: Callable[[Sequence[Trial]], list[Trial]],
        logged: Sequence[Trial] = (),
        *,
        n_trials: int | None = None,
        seconds: float | None = None,
        until: Callable[[Trial], bool] = lambda _: False,
    ) -> list[Trial]:
        """Draw and score until there are enough; all trials of the search, by number.

        Args:
            score: scores trials, those that are logged too; returns them finished, in order.
            logged: finished trials of this search, whose parameters are not drawn again.
            n_trials: of the whole search, failed ones included.
            seconds: of this call; the round that is running then is finished.
            until: whether a finished trial ends the search, once its round is finished.

        Raises:
            RunError: neither a number nor seconds, no Optuna, an unknown sampler, or parameters that
                are not in the space.
        """
        if n_trials is None and seconds is None:
            raise RunError("a search without an end: give n_trials, or seconds, or both")
        draw_seed = self._samplers()
        optuna = _optuna()
        study = optuna.create_study(
            directions=["maximize" if each.maximize else "minimize" for each in self.objectives]
        )
        known = dict(enumerate(self.initial)) | {t.number: self._drawn(t) for t in logged}
        known = {n: self.space.admit(params) for n, params in known.items() if n is not None}
        n_logged = 1 + max((trial.number or 0 for trial in logged), default=-1)
        finished: list[Trial] = []
        start, ended = time.monotonic(), False
        while len(finished) < n_logged or not (
            ended or (seconds is not None and time.monotonic() - start >= seconds)
        ):
            first, last = len(finished), len(finished) + self.round_size
            if n_trials is not None:
                last = min(last, max(n_trials, n_logged))
            if first >= last:
                break
            asked = [self._ask(study, draw_seed, n, known.get(n)) for n in range(first, last)]
            trials = score([trial for _, trial in asked])
            for (drawn, _), trial in zip(asked, trials, strict=True):
                self._tell(study, drawn, trial)
            finished += trials
            ended = ended or any(map(until, trials))
        return finished

    def _drawn(self, trial: Trial) -> dict[str, Any]:
        return {name: value for name, value in trial.params.items() if name in self.space.names}

    def _ask(
        self,
        study: optuna.Study,
        draw_seed: Callable[[int], Any],
        number: int,
        params: Mapping[str, Any] | None,
    ) -> tuple[optuna.Trial, Trial]:
        if params is not None:
            study.enqueue_trial(dict(params))
        study.sampler = draw_seed(number)
        asked = study.ask()
        # NSGA-II counts a trial to a generation here, which Optuna leaves out where all is fixed
        _ = asked.relative_params
        drawn = self.space.suggest(asked)
        return asked, Trial({**drawn, **self._fixed_of(drawn)}, "search", number=number)

    def _fixed_of(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        # a fitted edit has a place of its own
        place = ("point", "position") if drawn.get("edit") == "fitted" else ()
        return {name: value for name, value in self.fixed.items() if name not in place}

    def _samplers(self) -> Callable[[int], Any]:
        """From the number of a draw to its sampler."""
        if self.startup < 0 or self.seed < 0 or self.round_size < 1:
            raise RunError(
                f"startup {self.startup}, seed {self.seed}, round_size {self.round_size}: the first two "
                "are 0 or more, the last 1 or more"
            )
        _optuna()
        import numpy as np
        from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

        startup = self.startup
        make: dict[str, Callable[[int], Any]] = {
            "tpe": lambda seed: TPESampler(seed=seed, n_startup_trials=startup),
            "random": lambda seed: RandomSampler(seed=seed),
            "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=max(2, startup)),
        }
        if self.sampler not in make:
            raise RunError(f"unknown sampler {self.sampler!r}: there are {', '.join(make)}")
        # not seed + number: the searches of neighbouring seeds would draw the same points
        return lambda number: make[self.sampler](
            int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        )

    def _tell(self, study: optuna.Study, asked: optuna.Trial, trial: Trial) -> None:
        from optuna.trial import TrialState

        columns = [each.column for each in self.objectives]
        if trial.status == "failed" or not set(columns) <= set(trial.scores):
            study.tell(asked, state=TrialState.FAIL)
            return
        values = [trial.scores[column] for column in columns]
        for each, value in zip(self.objectives, values):
            if each.limit is not None:
                asked.set_constraint(each.name, each.excess(value))
        study.tell(asked, values)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RunError(
            "a search needs Optuna, which is not installed: pip install 'interp-ablate[search]'"
        ) from error
    if int(optuna.__version__.split(".")[0]) < 5:
        raise RunError(
            f"a search needs Optuna 5 or later, this is {optuna.__version__}: "
            "pip install 'interp-ablate[search]'"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
