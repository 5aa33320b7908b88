"""The proposer of `run`: a race of directions, random bands along the best, multiples of a fitted edit.

Knows: the order of trials, and which become finalists. Does not know: how a trial is scored or kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from interp_ablate.directions.direction_set import Directions
from interp_ablate.search.edit_space import (
    COMPONENT_SCALES,
    KERNEL,
    PLAIN,
    DirectionKey,
    kernel_ranges,
)
from interp_ablate.search.race import (
    Score,
    layers_apart,
    race_directions,
    rank_directions,
    screening_trials,
)
from interp_ablate.search.trials import Trial

N_BANDS = 8
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
N_FINALISTS = 4


@dataclass(frozen=True)
class ScreenedGrid:
    """A fixed list of trials over directions, each part of it along what the part before found."""

    directions: Directions
    """Of one method; each is screened."""
    n_layers: int
    n_prompts: int
    """Validation prompts of a side."""
    fit: Callable[[DirectionKey], str | None]
    """Fits an edit from a direction on and returns its name; None where there is nothing to fit."""
    max_kl: float
    seed: int = 0

    def propose(self, score: Score) -> tuple[pd.DataFrame, list[Trial]]:
        """Have every trial scored; the table of the race, and the trials after it with the finalists last."""
        screened = race_directions(self.n_prompts, screening_trials(self.directions), score)
        sources = rank_directions(screened)
        trials = score("bands of strengths", bands(sources, self.n_layers, seed=self.seed))
        for source in layers_apart(sources):
            name = self.fit(source)
            if name is None:
                break
            trials += score(f"fitted, layer {source[0]}", fitted(name))
        return screened, trials + score("finalists", finalists(trials, max_kl=self.max_kl))


def bands(sources: Sequence[DirectionKey], n_layers: int, *, seed: int) -> list[Trial]:
    """Random bands along the promising directions: what partial strength does without any fitting."""
    rng = random.Random(seed)
    return [_drawn(rng, sources, n_layers) for _ in range(N_BANDS)]


def _drawn(rng: random.Random, sources: Sequence[DirectionKey], n_layers: int) -> Trial:
    layer, point, position = rng.choice(list(sources))
    kernel = {}
    for name in KERNEL:
        low, high = kernel_ranges(n_layers)[name]
        if name == "width":
            kernel[name] = round(math.exp(rng.uniform(math.log(low), math.log(high))), 2)
        else:
            kernel[name] = round(rng.uniform(low, high), 2 if name.endswith("_layer") else 3)
    place = {"method": PLAIN, "layer": layer, "point": point, "position": position}
    return Trial({"edit": "band", **place, **kernel}, "refine")


def fitted(name: str) -> list[Trial]:
    """Multiples of the fitted edit that is kept under a name."""
    return [
        Trial({"edit": "fitted", "fit": name, **dict.fromkeys(COMPONENT_SCALES, scale)}, "refine")
        for scale in SCALES
    ]


def finalists(trials: Sequence[Trial], *, max_kl: float) -> list[Trial]:
    """The plans whose text is generated: the best within the KL limit, or else those nearest to it."""
    ok = [trial for trial in trials if trial.status == "ok"]
    inside = [trial for trial in ok if _kl_high(trial) <= max_kl]
    best = sorted(inside, key=lambda trial: trial.scores["unedited_answer_logprob"])
    best = best or sorted(ok, key=_kl_high)
    return [as_finalist(trial) for trial in best[:N_FINALISTS]]


def _kl_high(trial: Trial) -> float:
    return trial.scores.get("kl_high", math.inf)


def as_finalist(trial: Trial) -> Trial:
    """The same plan, to be scored by all that is measured on validation prompts."""
    return Trial(trial.params, "finalist")
