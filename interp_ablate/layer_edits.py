"""Layer edits: plans over chosen decoder layers, and the direction of a behaviour by what its edits do to text.

Knows: ways to name layers, ablation and addition there as plans, a behaviour (prompts and a scorer of
answers), the layer whose direction controls it. Does not know: search over strengths (`sweep`, `search`),
scorers, how plans become weights (`export`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from interp_ablate.activations import collect
from interp_ablate.directions import Direction, Directions, estimate_directions
from interp_ablate.edits import Ablate, Add, Plan, Positions
from interp_ablate.errors import DirectionError, PlanError
from interp_ablate.exchanges import Exchange, TextScorer
from interp_ablate.model import Model
from interp_ablate.prompts import ContrastSet, Prompt
from interp_ablate.scores import Evidence, Repetition, generate_together
from interp_ablate.selection import Choice, constrained
from interp_ablate.sites import EMBEDDING_POINTS, Point, sites_of
from interp_ablate.sweep import bounded_kl

Layers = int | str | Iterable[int] | None


def layers_of(n_layers: int, layers: Layers = None) -> tuple[int, ...]:
    """Layer numbers of a model: None for all, one number, a range or list, "10-20", or "20%-80%".

    Negative numbers count from the end; both ends of a text are included, and a share of the depth is
    rounded to the layer that it falls into.

    Raises:
        PlanError: a layer that the model lacks, one twice, none at all, something else.
    """
    if layers is None:
        return tuple(range(n_layers))
    if isinstance(layers, str):
        return _between(n_layers, layers)
    given = [layers] if isinstance(layers, int) else list(layers)
    wrong = [each for each in given if isinstance(each, bool) or not isinstance(each, int)]
    outside = [each for each in given if each not in wrong and not -n_layers <= each < n_layers]
    if wrong or outside or not given:
        raise PlanError(
            f"no layers {(wrong or outside or given)!r}: the model has 0 to {n_layers - 1}; give numbers, a "
            'range, "10-20" or "20%-80%"'
        )
    found = sorted(each % n_layers for each in given)
    if len(set(found)) != len(found):
        raise PlanError(f"a layer is named twice in {given}")
    return tuple(found)


def _between(n_layers: int, text: str) -> tuple[int, ...]:
    ends = re.fullmatch(r"\s*(\d+)(%?)\s*(?:-\s*(\d+)(%?))?\s*", text)
    if ends is None:
        raise PlanError(f'cannot read layers from {text!r}: write "12", "10-20" or "20%-80%"')
    first, last = ends[1], ends[3] or ends[1]
    numbers = [
        min(int(number) * n_layers // 100, n_layers - 1) if percent else int(number)
        for number, percent in ((first, ends[2]), (last, ends[4] if ends[3] else ends[2]))
    ]
    return layers_of(n_layers, range(numbers[0], numbers[1] + 1))


def ablate_layers(
    model: Model,
    direction: Direction,
    layers: Layers = None,
    *,
    strength: float = 1.0,
    inputs: bool = False,
    positions: Positions = "all",
) -> Plan:
    """Directional ablation at chosen layers.

    What the layers write (attention and MLP outputs) loses the direction: exact in weights, so that what
    is measured can be exported. With `inputs` the stream that each layer reads loses it instead, as a
    layer wrapped with a hook on its input does it; that has no weight form unless it is every layer.

    Raises:
        PlanError: layers that the model lacks.
    """
    chosen = set(layers_of(model.n_layers, layers))
    sites = (
        sites_of(("resid_pre",), sorted(chosen))
        if inputs
        else [s for s in model.writers if s.layer in chosen and s.point not in EMBEDDING_POINTS]
    )
    return Plan((Ablate(direction, sites, strength=strength, positions=positions),))


def add_to_layers(
    model: Model,
    direction: Direction,
    layers: Layers = None,
    *,
    coefficient: float = 1.0,
    point: Point = "resid_pre",
    positions: Positions = "all",
) -> Plan:
    """Activation addition of coefficient x the raw direction at chosen layers; None is its own layer.

    Raises:
        PlanError: layers that the model lacks.
    """
    own = direction.site.layer if layers is None else layers
    sites = sites_of((point,), list(layers_of(model.n_layers, own)))
    return Plan((Add(direction, sites, coefficient=coefficient, positions=positions),))


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
    choice: Choice
    directions: Directions


def find_direction(
    model: Model,
    behaviour: Behaviour,
    *,
    layers: Layers = "20%-80%",
    point: Point = "resid_post",
    prompts: tuple[int, int, int] = (64, 16, 32),
    new_tokens: int = 32,
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
    base = _answered(model, [(positive, None), (negative, None)], new_tokens)
    before = [_scored(behaviour.scorer, *each)[0] for each in zip((positive, negative), base)]
    rows = []
    for direction in every:
        plans = (Plan((Ablate(direction, model.writers),)), Plan((Add(direction, direction.site),)))
        ablated, added = _answered(model, [(positive, plans[0]), (negative, plans[1])], new_tokens)
        quiet = Evidence(model, base[1].rows, plans[0], new_tokens=new_tokens)
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
    model: Model, sides: Sequence[tuple[Sequence[Prompt], Plan | None]], new_tokens: int
) -> list[Evidence]:
    found = [Evidence(model, prompts, plan, new_tokens=new_tokens) for prompts, plan in sides]
    generate_together(found)
    return found


def _scored(scorer: TextScorer, prompts: Sequence[Prompt], evidence: Evidence) -> tuple[float, int]:
    """Mean score of the answers that have one (NaN for none), and how many have none."""
    scores = scorer([Exchange(prompt, text) for prompt, text in zip(prompts, evidence.texts)])
    known = [score for score in scores if score is not None]
    return (fmean(known) if known else float("nan")), len(scores) - len(known)


def _measured(
    scorer: TextScorer,
    ablated: tuple[Sequence[Prompt], Evidence],
    added: tuple[Sequence[Prompt], Evidence],
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
    choice = constrained(raising, max_kl=max_kl, behaviour="ablated", tolerance=2.0)
    if choice.row is None:
        raise DirectionError(
            f"no direction controls the behaviour within a KL of {max_kl:g}: removed "
            f"{choice.removed}; {choice.relax}"
        )
    chosen = next(each for each in directions if str(each.site) == choice.row["site"])
    return Found(chosen, table, choice, directions)
