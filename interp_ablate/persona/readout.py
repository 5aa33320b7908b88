"""Reading: the directions along which a trait shows in text, from answers with their scores.

Knows: the slope of activations on scores, how well a layer reads answers to questions it has not seen, the
choice of the layer. Does not know: steering, how answers were made or scored, what will be read.

What steers best need not read best. The difference in means of a filtered set knows two sides and no degrees;
where a model follows its system prompts weakly, one of them is small and mostly neutral, and the difference
points along whatever else tells the sides apart. The slope uses every answer by its degree.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.activations.activations import RESPONSE_MEAN
from interp_ablate.activations.pooling import POOLED_ROWS, response_activations
from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction
from interp_ablate.jobs.progress import NoProgress, Progress
from interp_ablate.models.model import Model
from interp_ablate.persona.answers import Rollout
from interp_ablate.persona.settings import COHERENT, FEWEST
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.sites import Site
from interp_ablate.stats.correlation import overall

METHOD = "score_slope"
COLUMNS = ("layer", "site", "norm", "r", "r_low", "r_high", "answers", "questions", "chosen")


@dataclass(frozen=True, eq=False)
class TraitReadout:
    """A direction a layer, and a row each (COLUMNS): r of projection and score on unseen questions.

    `chosen` is the candidate with the highest r; None, with `why`, where no direction could be had, or none
    reads better than chance.
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
    None where the scores or the activations do not vary. Where there are two scores alone it is along the
    difference in means of the two sets (and as long, if they are of one size), of which Belrose 2023 says why
    it, and no discriminant, is what a model writes.
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


def fit_readout(
    model: Model,
    answers: Sequence[Rollout],
    sites: Sequence[Site],
    *,
    candidates: Collection[Site] | None = None,
    coherent: float = COHERENT,
    fewest: int = 2 * FEWEST,
    source: str = "",
    listener: Progress | None = None,
) -> TraitReadout:
    """At every site the slope of the answers' mean activations on their scores, and the candidate that reads best.

    Used are all coherent answers with a score, on whichever side of a threshold. They are read as a data
    set is read: after the bare question, without the system prompt under which they were written. A site is
    judged by Pearson's r between projection and score over all answers, each projected on the slope of the
    answers to the other questions, centred by their mean; its interval is a bootstrap over questions. The
    highest r of several candidates is a little too good. Where its interval holds 0, nothing is chosen.

    Args:
        candidates: of the sites, those that may be chosen; default: all.

    Raises:
        DirectionError: NaN or infinity in the activations.
    """
    listener = listener or NoProgress()
    usable = [
        replace(answer, prompt=Prompt(answer.prompt.text))
        for answer in answers
        if answer.tokens
        and answer.score is not None
        and answer.coherence is not None
        and answer.coherence >= coherent
    ]
    questions = np.array([answer.prompt.text for answer in usable])
    scores = torch.tensor([answer.score or 0.0 for answer in usable], dtype=torch.float64)
    if len(usable) < fewest or len(set(questions.tolist())) < 2:
        there = f"{len(usable)} coherent answers with a score to {len(set(questions.tolist()))} questions"
        return TraitReadout(
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
        if direction is None:
            continue
        seen = _unseen(x[:, s], scores, questions, site)
        there = np.isfinite(seen)
        r = overall(seen[there], scores.numpy()[there], questions[there], kind="question")
        found.append(direction)
        rows.append(
            {
                "layer": site.layer, "site": str(site), "norm": direction.norm, "r": r.r,
                "r_low": r.low, "r_high": r.high, "answers": int(there.sum()),
                "questions": len(set(questions[there].tolist())), "chosen": False,
            }
        )  # fmt: skip
    chosen, why = _choose(
        rows, {str(site) for site in (sites if candidates is None else candidates)}
    )
    if chosen is not None:
        rows[chosen]["chosen"] = True
    return TraitReadout(tuple(found), rows, None if chosen is None else found[chosen].site, why)


def _choose(rows: Sequence[dict[str, Any]], candidates: Collection[str]) -> tuple[int | None, str]:
    """The row with the highest r, the earlier of equals; None, with the reason, where it may be chance."""
    known = [
        (row["r"], -i)
        for i, row in enumerate(rows)
        if row["site"] in candidates and row["r"] is not None and row["r_low"] is not None
    ]
    if not known:
        return None, "the scores do not vary enough, or nothing in the activations does"
    best = -max(known)[1]
    row = rows[best]
    if row["r_low"] > 0:
        return best, ""
    said = f"r = {row['r']:.2f} [{row['r_low']:.2f}, {row['r_high']:.2f}] at layer {row['layer']}"
    return None, f"no layer reads the scores of unseen questions' answers: the best has {said}"


def _unseen(
    x: Float[Tensor, "answer d_model"],
    scores: Float[Tensor, " answer"],
    questions: np.ndarray,
    site: Site,
) -> np.ndarray:
    """Each answer's projection on the slope of the other questions' answers; NaN where there is none."""
    found = np.full(len(x), np.nan)
    for question in np.unique(questions):
        out = torch.from_numpy(questions == question)
        slope = score_slope(x[~out], scores[~out], site)
        if slope is None:
            continue
        centred = x[out].double() - x[~out].double().mean(0)
        found[out.numpy()] = (centred @ slope.vector).numpy()
    return found
