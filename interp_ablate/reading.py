"""Reading: the directions along which a trait shows in text, from answers with their scores.

Knows: the slope of activations on scores, how well a layer reads answers to questions it has not seen, the
choice of the layer. Does not know: steering, how answers were made or scored, what will be read.

What steers best need not read best. The difference in means of a filtered set knows two sides and no degrees;
where a model follows its system prompts weakly, one of them is small and mostly neutral, and the difference
points along whatever else tells the sides apart. The slope uses every answer by its degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.activations import RESPONSE_MEAN
from interp_ablate.correlation import overall
from interp_ablate.directions import ZERO_TOLERANCE, Direction
from interp_ablate.listeners import Listener, Silent
from interp_ablate.model import Model
from interp_ablate.pooling import POOLED_ROWS, response_activations
from interp_ablate.prompts import Prompt
from interp_ablate.rollouts import COHERENT, FEWEST, Answer
from interp_ablate.sites import Site

METHOD = "score_slope"
COLUMNS = ("layer", "site", "norm", "r", "r_low", "r_high", "answers", "questions", "chosen")


@dataclass(frozen=True, eq=False)
class TraitReading:
    """A direction a layer, and a row each (COLUMNS): r of projection and score on unseen questions.

    `chosen` is the site with the highest r; None, with `why`, where no direction could be had.
    """

    directions: tuple[Direction, ...]
    rows: list[dict[str, Any]]
    chosen: Site | None
    why: str = ""


def score_slope(
    activations: Float[Tensor, "answer d_model"],
    scores: Float[Tensor, " answer"],
    site: Site,
    *,
    source: str = "",
) -> Direction | None:
    """The direction in which activations move with the score: their covariance, no label or side needed.

    `raw` is the least-squares change from one standard deviation of the score below its mean to one above.
    None where the scores or the activations do not vary. For two scores alone it is the difference in means
    of the two sets, of which Belrose 2023 says why it, and no discriminant, is what a model writes.
    """
    x, y = activations.double(), scores.double()
    x, y = x - x.mean(0), y - y.mean()
    deviation = float(y.pow(2).mean().sqrt())
    if deviation <= 1e-9 * max(1.0, float(scores.abs().max())):
        return None
    change = 2 * (y @ x) / len(y) / deviation
    norm = float(change.norm())
    if norm <= ZERO_TOLERANCE * float(activations.double().norm(dim=1).mean()):
        return None
    return Direction(change, norm, site, RESPONSE_MEAN, METHOD, source=source)


def fit_reading(
    model: Model,
    answers: Sequence[Answer],
    sites: Sequence[Site],
    *,
    coherent: float = COHERENT,
    fewest: int = 2 * FEWEST,
    source: str = "",
    listener: Listener | None = None,
) -> TraitReading:
    """At every site the slope of the answers' mean activations on their scores, and the site that reads best.

    Used are all coherent answers with a score, on whichever side of a threshold. They are read as a data
    set is read: after the bare question, without the system prompt under which they were written. A site is
    judged by Pearson's r between projection and score over all answers, each projected on the slope of the
    answers to the other questions, centred by their mean; its interval is a bootstrap over questions.

    Raises:
        DirectionError: NaN or infinity in the activations.
    """
    listener = listener or Silent()
    usable = [
        replace(answer, prompt=Prompt(answer.prompt.text))
        for answer in answers
        if answer.tokens and answer.score is not None and (answer.coherence or 0.0) >= coherent
    ]
    questions = np.array([answer.prompt.text for answer in usable])
    scores = torch.tensor([answer.score or 0.0 for answer in usable], dtype=torch.float64)
    if len(usable) < fewest or len(set(questions.tolist())) < 2:
        there = f"{len(usable)} coherent answers with a score to {len(set(questions.tolist()))} questions"
        return TraitReading(
            (), [], None, f"{there}; at least {fewest} are needed, and 2 questions to judge it on"
        )
    listener.start("reading", len(usable))
    x = response_activations(
        model, usable, sites, batch_size=POOLED_ROWS, on_batch=listener.advance
    )
    listener.finish()
    found, rows = [], []
    for s, site in enumerate(sites):
        direction = score_slope(x[:, s], scores, site, source=source)
        seen = _unseen(x[:, s], scores, questions, site)
        if direction is None or seen is None:
            continue
        r = overall(seen, scores.numpy(), questions, kind="question")
        found.append(direction)
        rows.append(
            {
                "layer": site.layer, "site": str(site), "norm": direction.norm, "r": r.r,
                "r_low": r.low, "r_high": r.high, "answers": len(usable),
                "questions": len(set(questions.tolist())), "chosen": False,
            }
        )  # fmt: skip
    known = [(row["r"], -i) for i, row in enumerate(rows) if row["r"] is not None]
    if not known:
        return TraitReading(
            (), [], None, "the scores do not vary, or nothing in the activations does"
        )
    best = -max(known)[1]  # the earlier of equals
    rows[best]["chosen"] = True
    return TraitReading(tuple(found), rows, found[best].site)


def _unseen(
    x: Float[Tensor, "answer d_model"],
    scores: Float[Tensor, " answer"],
    questions: np.ndarray,
    site: Site,
) -> np.ndarray | None:
    """Each answer's projection on the slope of the other questions' answers; None where there is none."""
    found = np.empty(len(x))
    for question in np.unique(questions):
        out = torch.from_numpy(questions == question)
        slope = score_slope(x[~out], scores[~out], site)
        if slope is None:
            return None
        centred = x[out].double() - x[~out].double().mean(0)
        found[out.numpy()] = (centred @ slope.vector).numpy()
    return found
