"""Layer edits: plans over chosen decoder layers, and the direction of a behaviour by what its edits do to text.

Knows: ways to name layers, ablation and addition there as plans, a behaviour (prompts and a scorer of
answers), the layer whose direction controls it. Does not know: search over strengths (`sweep`, `search`),
scorers, how plans become weights (`export`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.edits.presets import Layers, layers_of
from interp_ablate.errors import DirectionError
from interp_ablate.evaluation.metrics import Repetition
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse, TextScorer
from interp_ablate.search.bench import bounded_kl
from interp_ablate.search.selection import Selection, least_behaviour_under_kl
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.sites import Point, sites_of

# ---- the direction of a behaviour ----------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """What is to be controlled: prompts that bring it out and prompts that do not, and what tells them apart.

    `scorer` scores answers from 0 (absent) to 100 (`judges.scorer_of` makes one).
    """

    contrast: ContrastSet
    scorer: TextScorer

    @property
    def name(self) -> str:
        return self.contrast.name


@dataclass(frozen=True)
class Found:
    """The direction that controls a behaviour, the table it was chosen from, and by what limits.

    A row of `table` is a direction: `ablated`, mean score of answers to positive prompts without it;
    `added`, of answers to negative prompts with it added at its own layer; `kl` and `kl_high`, first-token
    KL on negative prompts under the ablation and its upper bound, nats; `repetition` of all answers;
    `unscored`, answers without a verdict. `ablated_baseline` and `added_baseline` are the unedited model's.
    """

    direction: Direction
    table: pd.DataFrame
    choice: Selection
    directions: Directions


def find_direction(
    model: Model,
    behaviour: Behaviour,
    *,
    layers: Layers = "20%-80%",
    point: Point = "resid_post",
    prompts: tuple[int, int, int] = (64, 16, 32),
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_kl: float = 1.0,
    seed: int = 0,
) -> Found:
    """The difference in means whose ablation lowers the behaviour's score most.

    Directions are made of training prompts and tried on validation prompts: one layer at a time, ablated
    at every writer, and added at its own site. Only directions that raise the score of negative prompts
    when added are chosen from, at a first-token KL whose upper bound is at most `max_kl` nats; of those
    within 2 points of the lowest score the one with the least KL. The test part of the contrast set is not
    touched: report on it, split with the same sizes and seed.

    Args:
        layers: of the directions.
        prompts: a side, in training, validation and test; the parts are those of
            `behaviour.contrast.split(*prompts, seed=seed)`.

    Raises:
        PromptError: fewer prompts than that.
        DirectionError: no direction within the limits, and what would let some through; no verdict.
    """
    split = behaviour.contrast.split(*prompts, seed=seed)
    sites = sites_of((point,), list(layers_of(model.n_layers, layers)))
    every = estimate_directions(
        collect(model, split.train, sites), collect(model, split.validation, sites)
    ).of("difference_in_means")
    positive, negative = split.validation.positive, split.validation.negative
    base = _answered(model, [(positive, None), (negative, None)], max_new_tokens)
    before = [_scored(behaviour.scorer, *each)[0] for each in zip((positive, negative), base)]
    rows = []
    for direction in every:
        plans = (Plan((Ablate(direction, model.writers),)), Plan((Add(direction, direction.site),)))
        ablated, added = _answered(
            model, [(positive, plans[0]), (negative, plans[1])], max_new_tokens
        )
        quiet = ModelOutputs(model, base[1].rows, plans[0], max_new_tokens=max_new_tokens)
        rows.append(
            {
                "layer": direction.site.layer,
                "site": str(direction.site),
                **_measured(behaviour.scorer, (positive, ablated), (negative, added)),
                "ablated_baseline": before[0],
                "added_baseline": before[1],
                **bounded_kl(quiet, base[1]),
            }
        )
    table = pd.DataFrame(rows)
    return _chosen(table, every, max_kl)


def _answered(
    model: Model, sides: Sequence[tuple[Sequence[Prompt], Plan | None]], max_new_tokens: int
) -> list[ModelOutputs]:
    found = [
        ModelOutputs(model, prompts, plan, max_new_tokens=max_new_tokens) for prompts, plan in sides
    ]
    generate_outputs_together(found)
    return found


def _scored(
    scorer: TextScorer, prompts: Sequence[Prompt], evidence: ModelOutputs
) -> tuple[float, int]:
    """Mean score of the answers that have one (NaN for none), and how many have none."""
    scores = scorer([PromptResponse(prompt, text) for prompt, text in zip(prompts, evidence.texts)])
    known = [score for score in scores if score is not None]
    return (fmean(known) if known else float("nan")), len(scores) - len(known)


def _measured(
    scorer: TextScorer,
    ablated: tuple[Sequence[Prompt], ModelOutputs],
    added: tuple[Sequence[Prompt], ModelOutputs],
) -> dict[str, float]:
    score, without = _scored(scorer, *ablated)
    raised, too = _scored(scorer, *added)
    repeated = [float(Repetition()(e, e).mean()) for _, e in (ablated, added)]
    return {
        "ablated": score,
        "added": raised,
        "unscored": without + too,
        "repetition": fmean(repeated),
    }


def _chosen(table: pd.DataFrame, directions: Directions, max_kl: float) -> Found:
    raising = table[table["added"] > table["added_baseline"]]
    if raising.empty:
        raise DirectionError(
            f"none of {len(table)} directions raises the score of negative prompts when it is added "
            f"(unedited: {table['added_baseline'].iloc[0]:.1f}): use other layers, more prompts, or a "
            "scorer that sees the behaviour in this model's answers"
        )
    choice = least_behaviour_under_kl(raising, max_kl=max_kl, behaviour="ablated", tolerance=2.0)
    if choice.row is None:
        raise DirectionError(
            f"no direction controls the behaviour within a KL of {max_kl:g}: removed "
            f"{choice.removed}; {choice.relax}"
        )
    chosen = next(each for each in directions if str(each.site) == choice.row["site"])
    return Found(chosen, table, choice, directions)
