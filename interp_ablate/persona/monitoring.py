"""Monitoring: how well the projection of a prompt's last token foretells the trait in the answer.

The projection of each token as it is generated is `Model.monitor`.

Knows: graded system prompts, correlations, and random directions as the control. Does not know: how a persona
is extracted, or how answers are made and scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction import Direction, random_directions
from interp_ablate.errors import PromptError, RunError
from interp_ablate.jobs.bars import Progress
from interp_ablate.models.model import Model, check_model
from interp_ablate.persona.persona import Persona
from interp_ablate.persona.rollouts import Rollout, RolloutRequest, run_rollouts
from interp_ablate.persona.settings import GREEDY, SamplingConfig
from interp_ablate.persona.traits import Trait
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.stats.correlation import (
    Correlation,
    across,
    centred_by,
    overall,
    pearson,
    within,
)
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.incoming_files import incoming_text, parse_json
from interp_ablate.storage.strict_json import json_text

COLUMNS = ("level", "question", "projection", "score", "coherence", "system", "text", "answer")
CONTROLS = 200  # random directions
# Put before a pair's negative prompt (first half, strongest first) and its positive one (second half).
STRENGTHS = (
    "In every single sentence, to the utmost degree: ",
    "",
    "For the most part: ",
    "Just a little, and only where it fits: ",
)


def graded_prompts(trait: Trait, *, pair: int = 0) -> tuple[str, ...]:
    """Eight system prompts from the trait's strongest opposite to its strongest form.

    One pair of the trait's own prompts, each in four strengths (STRENGTHS). Source of the idea, with prompts
    written one by one: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

    Raises:
        PromptError: the trait has no such pair.
    """
    if not 0 <= pair < len(trait.positive):
        raise PromptError(
            f"no pair {pair}: {trait.name} has the pairs 0 to {len(trait.positive) - 1}"
        )
    against = [strength + trait.negative[pair] for strength in STRENGTHS]
    towards = [strength + trait.positive[pair] for strength in reversed(STRENGTHS)]
    return (*against, *towards)


def read_graded(path: str | Path) -> tuple[str, ...]:
    """System prompts from a file, weakest first: a .json list of texts, or a text file with one a line.

    Raises:
        PromptError: an unreadable file, a blank or repeated prompt, fewer than two.
    """
    path = Path(path)
    try:
        text = incoming_text(path)
        if path.suffix == ".json":
            prompts = parse_json(text)
        else:
            lines = [line.strip() for line in text.splitlines()]
            prompts = [line for line in lines if line and not line.startswith("# ")]
    except ValueError as error:
        raise PromptError(f"cannot read system prompts from {path}: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(x, str) and x.strip() for x in prompts):
        raise PromptError(f"{path}: expected a list of texts, none of them blank")
    if len(prompts) < 2 or len(set(prompts)) < len(prompts):
        raise PromptError(
            f"{path} has {len(prompts)} system prompts, {len(set(prompts))} different ones: at least two, "
            "each once, from the weakest to the strongest"
        )
    return tuple(prompts)


@dataclass(frozen=True, eq=False)
class Monitoring:
    """Correlations of prompts' projections with the trait scores of their answers (`monitor_trait`)."""

    table: pd.DataFrame
    """A row an answer (COLUMNS)."""
    overall: Correlation
    within: Correlation
    """Within system prompts."""
    across: Correlation
    """Across the means of system prompts."""
    control: dict[str, float | None]
    """The 95th percentile of |r| of CONTROLS random directions at the same site, for each correlation."""
    no_verdict: int
    """Answers without a score, which are in no correlation."""
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the table, as JSON."""
        names = ("overall", "within", "across")
        return {
            **{name: asdict(getattr(self, name)) for name in names},
            "control": self.control,
            "answers": len(self.table),
            "no_verdict": self.no_verdict,
            **self.details,
        }

    def save(self, folder: str | Path) -> None:
        """Write monitor.csv and monitor.json.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = Path(folder)
        write_atomic(folder / "monitor.csv", self.table.to_csv(index=False))
        text = json_text(self.to_dict(), indent=1) + "\n"
        write_atomic(folder / "monitor.json", text)


def monitor_trait(
    model: Model,
    persona: Persona,
    store: str | Path,
    *,
    scorer: TextScorer,
    systems: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
    sampling: SamplingConfig = GREEDY,
    listener: Progress | None = None,
) -> Monitoring:
    """Correlate projections of prompts' last tokens on the persona's direction with the answers' scores.

    Every question under every system prompt, answered once (greedily by default) under whatever plan is
    applied. Answers and scores are kept in `store` and not made again when the call is repeated.

    Args:
        systems: graded from the trait's opposite to the trait; default: `graded_prompts`.
        questions: default: the trait's evaluation questions, which made no vector.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

    Raises:
        DirectionError: the persona is of a model of another shape.
        RunError: no answer has a score; a store of other answers.
    """
    check_model(model)
    persona.check(model)
    systems = graded_prompts(persona.trait) if systems is None else tuple(systems)
    questions = persona.trait.evaluation_questions if questions is None else tuple(questions)
    requests = [
        RolloutRequest({"level": level, "question": number}, Prompt(question, system))
        for level, system in enumerate(systems)
        for number, question in enumerate(questions)
    ]
    answers = run_rollouts(
        model, requests, store, scorer=scorer, sampling=sampling, listener=listener
    )
    site = persona.direction.site
    stream = (
        collect(model, [request.prompt for request in requests], [site], (-1,)).at(site).double()
    )
    table = _table(answers, (stream @ persona.direction.vector).numpy())
    details = {
        "trait": persona.name,
        "model": model.source.name,
        "site": str(site),
        "direction": persona.direction.fingerprint,
        "scorer": scorer.name,
        "scorer_identity": scorer.identity,
        "sampling": asdict(sampling),
        "systems": list(systems),
        "questions": len(questions),
    }
    return correlate(table, stream, persona.direction, details=details)


def _table(answers: Sequence[Rollout], projections: np.ndarray) -> pd.DataFrame:
    rows = []
    for a, projection in zip(answers, projections.tolist(), strict=True):
        numbers = (a.key["level"], a.key["question"], projection, a.score, a.coherence)
        rows.append((*numbers, a.prompt.system, a.prompt.text, a.text))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({"score": float, "coherence": float})


def correlate(
    table: pd.DataFrame,
    stream: torch.Tensor,
    direction: Direction,
    *,
    details: dict[str, Any] | None = None,
) -> Monitoring:
    """Compute the three correlations of a table, and those of random directions.

    Args:
        stream: the activations [row, d_model] that were projected.

    Raises:
        RunError: no row has a score.
    """
    scored = table["score"].notna().to_numpy()
    if not scored.any():
        raise RunError(
            f"none of the {len(table)} answers has a score: the scorer gave no verdict on any"
        )
    rows = table[scored]
    y, groups = rows["score"].to_numpy(float), rows["level"].to_numpy()
    questions = rows["question"].to_numpy()
    x = rows["projection"].to_numpy(float)
    controls = torch.stack([each.vector for each in random_directions(direction, CONTROLS)], 1)
    noise = (stream.cpu().double()[torch.tensor(scored)] @ controls).numpy()
    strength: dict[str, list[float]] = {"overall": [], "within": [], "across": []}
    own_y = centred_by(y, groups)
    for column in noise.T:
        own = centred_by(column, groups)
        each = (pearson(column, y), pearson(own, own_y), across(column, y, groups))
        for name, correlation in zip(strength, each):
            if correlation.r is not None:
                strength[name].append(abs(correlation.r))
    control = {
        name: float(np.quantile(values, 0.95)) if values else None
        for name, values in strength.items()
    }
    return Monitoring(
        table,
        overall(x, y, {"system prompt": groups, "question": questions}),
        within(x, y, groups, {"question": questions}),
        across(x, y, groups),
        control,
        int((~scored).sum()),
        details or {},
    )
