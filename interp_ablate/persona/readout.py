"""Readout: the directions along which a trait shows in text, from answers with their scores.

The direction that steers best need not read best. The difference in means of a filtered set has two sides and
no degrees. Where a model follows its system prompts weakly, one side is small and mostly neutral, and the
difference points along whatever else tells the sides apart. The slope uses every answer by its degree.

Knows: the slope of activations on scores, and how well a layer reads answers to unseen questions. Does not
know: steering, or how answers were made and scored.
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
from interp_ablate.jobs.bars import Bars, Progress
from interp_ablate.models.model import Model, check_model
from interp_ablate.persona.rollouts import Rollout
from interp_ablate.persona.settings import MIN_ANSWERS, MIN_COHERENCE
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.sites import Site, SiteLike, as_sites
from interp_ablate.stats.correlation import overall

METHOD = "score_slope"
COLUMNS = ("layer", "site", "norm", "r", "r_low", "r_high", "answers", "questions", "chosen")


@dataclass(frozen=True, eq=False)
class TraitReadout:
    """A direction for reading text at each layer, and how well it reads answers to unseen questions."""

    directions: tuple[Direction, ...]
    rows: list[dict[str, Any]]
    """A row a direction (COLUMNS); r is the correlation of projection and score."""
    chosen: Site | None
    """The candidate with the highest r; None where no direction could be had, or none beats chance."""
    why: str = ""
    """Why nothing is chosen."""

    def to_dict(self) -> dict[str, Any]:
        """The choice and the rows, as `persona.json` has them."""
        site = str(self.chosen) if self.chosen else None
        return {"site": site, "why_not": self.why or None, "layers": self.rows}


def score_slope(
    activations: Float[Tensor, "answer d_model"],
    scores: Float[Tensor, " answer"],
    site: Site,
    *,
    source: str = "",
) -> Direction | None:
    """Fit the direction in which activations move with the score: their covariance.

    `raw` is the least-squares change from one standard deviation of the score below its mean to one above.
    None where the scores or the activations do not vary. With only two different scores it lies along the
    difference in means of the two sets. Belrose 2023 (https://blog.eleuther.ai/diff-in-means/) shows why a
    model is edited along that difference, and not along a discriminant.
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
    sites: Sequence[SiteLike],
    *,
    candidates: Collection[SiteLike] | None = None,
    min_coherence: float = MIN_COHERENCE,
    min_answers: int = 2 * MIN_ANSWERS,
    source: str = "",
    listener: Progress | None = None,
) -> TraitReadout:
    """Fit the slope of the answers' mean activations on their scores at every site, and choose the best reader.

    Used are all coherent answers with a score, on whichever side of a threshold. They are read as a data
    set is read: after the bare question, without the system prompt under which they were written. A site is
    judged by Pearson's r between projection and score over all answers, each projected on the slope of the
    answers to the other questions, centred by their mean; its interval is a jackknife over questions. The
    highest r of several candidates is a little too good. Where its interval holds 0, nothing is chosen.

    Args:
        candidates: of the sites, those that may be chosen; default: all.

    Raises:
        DirectionError: NaN or infinity in the activations.
    """
    check_model(model)
    sites, listener = as_sites(sites), listener or Bars()
    usable = _usable(answers, min_coherence)
    questions = np.array([answer.prompt.text for answer in usable])
    n_questions = len(set(questions.tolist()))
    if len(usable) < min_answers or n_questions < 2:
        why = (
            f"{len(usable)} coherent answers with a score to {n_questions} questions; at least {min_answers} "
            "are needed, and 2 questions to judge it on"
        )
        return TraitReadout((), [], None, why)
    scores = torch.tensor([answer.score for answer in usable], dtype=torch.float64)
    listener.start("readout", len(usable))
    x = response_activations(
        model, usable, sites, batch_size=POOLED_ROWS, on_batch=listener.advance
    )
    listener.finish()
    directions, rows = [], []
    for s, site in enumerate(sites):
        direction = score_slope(x[:, s], scores, site, source=source)
        if direction is not None:
            directions.append(direction)
            rows.append(
                _row(direction, _unseen(x[:, s], scores, questions, site), scores, questions)
            )
    chosen, why = _choose(
        rows, {str(site) for site in (sites if candidates is None else as_sites(candidates))}
    )
    if chosen is not None:
        rows[chosen]["chosen"] = True
    best = None if chosen is None else directions[chosen].site
    return TraitReadout(tuple(directions), rows, best, why)


def _usable(answers: Sequence[Rollout], min_coherence: float) -> list[Rollout]:
    """Coherent answers with a score, without the system prompts under which they were written."""
    return [
        replace(answer, prompt=Prompt(answer.prompt.text))
        for answer in answers
        if answer.tokens and answer.score is not None and answer.coherence is not None
        if answer.coherence >= min_coherence
    ]


def _row(
    direction: Direction,
    projections: np.ndarray,
    scores: Float[Tensor, " answer"],
    questions: np.ndarray,
) -> dict[str, Any]:
    """The correlation of unseen answers' projections with their scores, over answers with a projection."""
    has = np.isfinite(projections)
    r = overall(projections[has], scores.numpy()[has], {"question": questions[has]})
    return {
        "layer": direction.site.layer, "site": str(direction.site), "norm": direction.norm, "r": r.r,
        "r_low": r.low, "r_high": r.high, "answers": int(has.sum()),
        "questions": len(set(questions[has].tolist())), "chosen": False,
    }  # fmt: skip


def _choose(rows: Sequence[dict[str, Any]], candidates: Collection[str]) -> tuple[int | None, str]:
    """The row with the highest r, the earlier of equals; None, with the reason, where it may be chance."""
    rated = [
        (row["r"], -i)
        for i, row in enumerate(rows)
        if row["site"] in candidates and row["r"] is not None and row["r_low"] is not None
    ]
    if not rated:
        return None, "the scores do not vary enough, or nothing in the activations does"
    best = -max(rated)[1]
    row = rows[best]
    if row["r_low"] > 0:
        return best, ""
    best_r = f"r = {row['r']:.2f} [{row['r_low']:.2f}, {row['r_high']:.2f}] at layer {row['layer']}"
    return None, f"no layer reads the scores of unseen questions' answers: the best has {best_r}"


def _unseen(
    x: Float[Tensor, "answer d_model"],
    scores: Float[Tensor, " answer"],
    questions: np.ndarray,
    site: Site,
) -> np.ndarray:
    """Each answer's projection on the slope of the other questions' answers; NaN where there is none."""
    projections = np.full(len(x), np.nan)
    for question in np.unique(questions):
        out = torch.from_numpy(questions == question)
        slope = score_slope(x[~out], scores[~out], site)
        if slope is None:
            continue
        centred = x[out].double() - x[~out].double().mean(0)
        projections[out.numpy()] = (centred @ slope.vector).numpy()
    return projections
