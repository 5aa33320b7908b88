"""The condition of a conditional edit, chosen on validation prompts: direction, threshold and side of it.

Knows: similarities of validation prompts, F1. Does not know: what is done where the condition is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.directions.direction import Direction, as_directions
from interp_ablate.edits.conditional import CONDITION_POINTS, Condition, Pooled, Similarity
from interp_ablate.errors import DirectionError, PlanError
from interp_ablate.models.batches import Batch
from interp_ablate.models.forward import Capture
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.contrast_set import ContrastSet, as_contrast
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.sites import Site


@dataclass(frozen=True)
class ConditionChoice:
    """The condition that tells validation prompts apart best, and how well; the numbers are of the prompts that chose it."""

    condition: Condition
    f1: float
    """The harmonic mean of precision and recall, of the positive prompts."""
    recall: float
    """The share of positive prompts that meet the condition."""
    false_rate: float
    """The share of negative prompts that meet it."""


def condition_activations(
    model: Model, prompts: Sequence[PromptLike], conditions: Sequence[Condition]
) -> list[Float[Tensor, "prompt d_model"]]:
    """For each condition the pooled activations of the prompts that it judges, float32 or wider, on the CPU."""
    rows = model.encode_all(prompts)
    found: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in conditions]

    def reader(site: Site) -> Capture:
        here = [i for i, condition in enumerate(conditions) if condition.site == site]

        def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
            for i in here:
                pooled = conditions[i].pool(x, batch.mask.bool()).detach().cpu()
                for place, row in zip(batch.index, pooled):
                    found[i][place] = row
            return x[:0]

        return read

    capture = {site: reader(site) for site in {condition.site for condition in conditions}}
    whole = max(map(len, rows))  # no token is run for several prompts at once: each is read whole
    for _ in model.stream(rows, keep=0, tail=whole, capture=capture):  # type: ignore[arg-type]
        pass
    return [torch.stack(each) for each in found]


def best_condition(
    model: Model,
    validation: ContrastSet,
    directions: Direction | Iterable[Direction],
    *,
    similarity: Similarity = "projected",
    pooled: Pooled = "mean",
) -> ConditionChoice:
    """The condition of highest F1 on validation prompts, over directions (each at its own site), thresholds and sides.

    The positive prompts are those that shall meet it. Thresholds lie half-way between neighbouring similarities; of
    equal F1 the one with the widest gap around it is taken, relative to the spread. This is the grid search of the
    paper, over all thresholds that differ. The directions must come from other prompts, and how good the condition is
    must be measured on a third set: its numbers here are of the prompts that chose it. Directions at resid_mid are left
    out where there are others, as no condition is read there.
    Source: Lee et al. 2024, https://arxiv.org/abs/2409.05907, appendix C.2.

    Raises:
        DirectionError: no direction; similarities that are all the same, or not finite.
        PlanError: no direction at resid_pre or resid_post, or one at a site where an applied plan writes.
        ModelError: a site that the model lacks.
    """
    check_model(model)
    given = as_directions(directions)
    options: dict[str, Any] = {"threshold": 0.0, "similarity": similarity, "pooled": pooled}
    # of several those where a condition can be read; where none is, the first one says why
    readable = [each for each in given if each.site.point in CONDITION_POINTS] or given
    conditions = [Condition(direction, **options) for direction in readable]
    if not conditions:
        raise DirectionError("best_condition needs one or more directions; got none")
    if written := [str(each.site) for each in conditions if each.site in model.plans.sites]:
        raise PlanError(
            f"a plan that is applied writes at {written[0]}, and a condition is read before any plan writes at its site: "
            "leave the `with model.applied(...)` block, or give directions of other sites"
        )
    prompts = [*as_contrast(validation).positive, *validation.negative]
    labels = torch.arange(len(prompts)) < len(validation.positive)
    best: tuple[tuple[float, float], ConditionChoice] | None = None
    for condition, h in zip(conditions, condition_activations(model, prompts, conditions)):
        values = condition.similarities(h.double())
        if not bool(values.isfinite().all()):
            raise DirectionError(f"NaN or infinity in the activations at {condition.site}")
        for score, threshold, above in _thresholds(values, labels):
            if best is None or score > best[0]:
                options |= {"threshold": threshold, "above": above}
                chosen = Condition(condition.vector, condition.site, **options)
                met = chosen.is_met(h.double())
                rates = float(met[labels].double().mean()), float(met[~labels].double().mean())
                best = score, ConditionChoice(chosen, score[0], *rates)
    if best is None:
        raise DirectionError(
            f"all {len(prompts)} validation prompts have the same similarity to every direction: there is no threshold "
            "between them"
        )
    return best[1]


def _thresholds(
    values: Float[Tensor, " prompt"], labels: Bool[Tensor, " prompt"]
) -> Iterator[tuple[tuple[float, float], float, bool]]:
    """Every threshold between two values, on either side: (F1, gap as a share of the spread), threshold, above."""
    order = values.unique()  # sorted
    spread = float(order[-1] - order[0])
    for low, high in zip(order.tolist(), order[1:].tolist()):
        threshold = (low + high) / 2
        if not low < threshold < high:  # neighbours in float64
            continue
        for above in (True, False):
            met = values > threshold if above else values < threshold
            hits = int((met & labels).sum())
            f1 = 2 * hits / (int(met.sum()) + int(labels.sum()))
            yield (f1, (high - low) / spread), threshold, above
