"""COSMIC: the direction, of all layers and positions, whose ablation and addition best turn one set into the other.

Two sets' activations are compared inside the model, so that nothing needs to be known of how answers look.

Knows: means of activations under plans, cosines, the KL of the next token. Does not know: answers, scorers, or how
directions were estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction import Direction, as_directions
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ModelError, NotFiniteError, RunError
from interp_ablate.evaluation.metrics import first_token_kl
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.jobs.bars import with_bar
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.contrast_set import ContrastSet, as_contrast
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.search.race import distinct
from interp_ablate.settings import MAX_KL
from interp_ablate.sites import Site, sites_of

if TYPE_CHECKING:
    import pandas as pd

SHARE, DEPTH = 0.1, 0.8
COLUMNS = ("layer", "point", "position", "method", "ablated", "added", "score", "kl", "left_out")


@dataclass(frozen=True, eq=False)
class ConceptInversion:
    """What COSMIC found: the direction, the layers it was judged at, and every candidate's scores."""

    direction: Direction
    layers: tuple[int, ...]
    """Layers at whose end the two sets' mean activations are least alike."""
    table: pd.DataFrame
    """A row a candidate, the highest score first: layer, point, position, method; `ablated` and `added`, the two
    cosines; `score`, their sum; `kl` in nats (NaN where it was not needed); `left_out`, why it was not chosen."""

    def __repr__(self) -> str:
        return (
            f"ConceptInversion({self.direction.name}, of {len(self.table)} candidates, judged at layers "
            f"{', '.join(map(str, self.layers))})"
        )


def cosmic(
    model: Model,
    directions: Direction | Iterable[Direction],
    contrast: ContrastSet,
    *,
    share: float = SHARE,
    depth: float = DEPTH,
    max_kl: float | None = MAX_KL,
    batch_size: int | None = None,
) -> ConceptInversion:
    """Choose layer and position of a direction by cosine similarity of inverted concepts, without reading answers.

    The layers that judge are those where the two sets' mean activations (resid_post, last token) have the lowest
    cosine. Every candidate is ablated everywhere on the positive prompts, and its raw vector added at its own site
    on the negative ones. `ablated` is the cosine of the positive prompts' mean then (over prompts and those layers)
    with the negative prompts' mean in the unedited model; `added` the same the other way round. The highest sum wins
    among candidates that keep the next token's distribution on negative prompts.
    Source: Siu et al. 2025, https://arxiv.org/abs/2506.00085, and its published code for what means are taken of.
    There layers are picked on training prompts; here on the same prompts that judge.

    Args:
        directions: candidates, such as `estimate_directions` over layers and positions. Of resid_post of a layer and
            resid_pre of the next the first alone is tried: they are one place.
        contrast: prompts that did not make the directions; both sides are used.
        share: of all layers, how many judge (at least one).
        depth: candidates at layers from this share of the depth on are left out, as in the paper.
        max_kl: nats, at most, of the mean KL of the next token on negative prompts under the ablation; None for no limit.

    Raises:
        RunError: no candidate, a share or depth outside (0, 1], a limit of 0 or less; no prompts of one side; no
            candidate within the limits.
        DirectionError, PlanError: directions that do not fit the model.
    """
    _check(model, share, depth, max_kl, contrast)
    candidates = distinct(as_directions(directions))
    if not candidates:
        raise RunError("COSMIC chooses among directions, and there is none: estimate some")
    judge = _Judge.of(model, contrast, share, batch_size)
    beyond = int(depth * model.n_layers) if depth < 1 else model.n_layers
    rows = []
    for item in with_bar(candidates, "cosmic"):
        row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan)
        row.update(layer=item.site.layer, point=item.site.point, position=item.position)
        row.update(method=item.method, left_out="")
        if item.site.layer >= beyond:
            row["left_out"] = f"layer {item.site.layer} is beyond {depth:g} of the depth"
        else:
            row.update(judge.scores(item))
        rows.append(row)
    order = sorted(range(len(rows)), key=lambda i: (-_or_least(rows[i]["score"]), i))
    chosen = _first_within(judge, [(candidates[i], rows[i]) for i in order], max_kl)
    if chosen is None:
        raise RunError(
            f"none of {len(rows)} candidates is within the limits; of the first, {rows[order[0]]['left_out']}. "
            "Give directions of other layers, a larger depth, or a larger max_kl"
        )
    import pandas as pd

    table = pd.DataFrame([rows[i] for i in order], columns=list(COLUMNS))
    return ConceptInversion(chosen, judge.layers, table)


def _check(
    model: Model, share: float, depth: float, max_kl: float | None, contrast: ContrastSet
) -> None:
    check_model(model)
    for name, value in (("share", share), ("depth", depth)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
            raise RunError(f"{name} is more than 0 and at most 1; got {value!r}")
    if max_kl is not None and not (isinstance(max_kl, Real) and max_kl > 0):
        raise RunError(f"max_kl is above 0 nats, or None for no limit; got {max_kl!r}")
    if not as_contrast(contrast).positive or not contrast.negative:
        raise RunError("COSMIC turns one set into the other: give prompts of both sides")


def _or_least(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _first_within(
    judge: _Judge, ranked: Sequence[tuple[Direction, dict[str, Any]]], max_kl: float | None
) -> Direction | None:
    """The first candidate whose ablation stays within the limit; its row and those before it get their KL."""
    for item, row in ranked:
        if row["left_out"]:
            continue
        if max_kl is None:
            return item
        row["kl"] = judge.kl(item)
        if row["kl"] <= max_kl:
            return item
        row["left_out"] = f"its ablation costs {row['kl']:.3g} nats, more than {max_kl:g}"
    return None


@dataclass(frozen=True)
class _Judge:
    """The unedited model's means, which candidates are judged by."""

    model: Model
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    sites: tuple[Site, ...]
    means: tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]
    """Of positive and of negative prompts, over prompts and sites."""
    unedited: ModelOutputs
    """Of the negative prompts."""
    batch_size: int | None

    @classmethod
    def of(
        cls, model: Model, contrast: ContrastSet, share: float, batch_size: int | None
    ) -> _Judge:
        sides = tuple(contrast.positive), tuple(contrast.negative)
        every = sites_of(("resid_post",), range(model.n_layers))
        found = [_mean(model, prompts, every, batch_size) for prompts in sides]
        alike = torch.nn.functional.cosine_similarity(found[0], found[1], dim=-1)
        count = max(int(round(share * model.n_layers, 9)), 1)  # 0.57 of 100 is 57, not 56
        layers = sorted(alike.argsort(stable=True)[:count].tolist())
        return cls(
            model,
            *sides,
            tuple(every[layer] for layer in layers),
            (found[0][layers].mean(0), found[1][layers].mean(0)),
            ModelOutputs(model, sides[1], batch_size=batch_size),
            batch_size,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(site.layer for site in self.sites)

    def scores(self, item: Direction) -> dict[str, Any]:
        """Both cosines and their sum; where the edited model overflows, the reason."""
        ablation = Plan((Ablate(item, self.model.writers),))
        addition = Plan((Add(item, item.site),))
        try:
            ablated = self._cosine(ablation, self.positive, self.means[1])
            added = self._cosine(addition, self.negative, self.means[0])
        except ModelError as error:
            return {"left_out": str(error)}
        return {"ablated": ablated, "added": added, "score": ablated + added}

    def _cosine(self, plan: Plan, prompts: Sequence[Prompt], towards: Tensor) -> float:
        with self.model.applied(plan):
            mean = _mean(self.model, prompts, self.sites, self.batch_size).mean(0)
        return float(torch.nn.functional.cosine_similarity(mean, towards, dim=0))

    def kl(self, item: Direction) -> float:
        """Mean KL of the token after the negative prompts under the ablation, in nats; infinite where that breaks."""
        edited = self.unedited.with_plan(Plan((Ablate(item, self.model.writers),)))
        try:
            return float(first_token_kl(edited, self.unedited).mean())
        except NotFiniteError:
            return math.inf


def _mean(
    model: Model, prompts: Sequence[Prompt], sites: Sequence[Site], batch_size: int | None
) -> Float[Tensor, "site d_model"]:
    """The mean activation of the last token at each site, in float64."""
    values = collect(model, list(prompts), list(sites), batch_size=batch_size).values
    return values[:, 0].double().mean(0)
