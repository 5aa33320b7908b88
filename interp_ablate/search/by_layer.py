"""What each layer's direction does to a model: ablated, added or patched, at one site, at all writers, from it on.

Knows: the plans of a layer sweep, paired changes with intervals, the band of shuffled labels. Does not know: how directions
were estimated, or how results are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from interp_ablate.activations.activations import Activations
from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import one_per_layer
from interp_ablate.directions.mean_difference import difference_in_means, label_shuffles
from interp_ablate.edits.kinds import Ablate, Add, Clamp
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.evaluation.metrics import (
    Metric,
    TargetLogOdds,
    find_target_tokens,
    first_token_kl,
)
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.side_by_side import Score, as_metric
from interp_ablate.jobs.bars import with_bar
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.contrast_set import ContrastSet, as_contrast
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.sites import Point, Site
from interp_ablate.stats.intervals import AT_LEAST_0, SCORE, SHARE, UNBOUNDED, Bounds, mean_interval

if TYPE_CHECKING:
    import pandas as pd

LayerEdit = Literal["ablate", "add", "patch"]
Where = Literal["site", "writers", "from"]
COLUMNS = (
    "layer", "point", "edit", "where", "score", "on", "n", "baseline", "value", "change", "change_low",
    "change_high", "shuffled_low", "shuffled_high", "n_shuffled",
)  # fmt: skip


def layer_sweep(
    model: Model,
    directions: Direction | Iterable[Direction],
    contrast: ContrastSet,
    edits: Sequence[LayerEdit] = ("ablate", "add"),
    *,
    scores: Mapping[str, Score] | None = None,
    where: Sequence[Where] = ("site", "writers", "from"),
    point: Point | None = None,
    n_shuffled: int = 2,
) -> pd.DataFrame:
    """The effect of each layer's direction, one edit at a time, on prompts that did not make it.

    Edits, all at full strength: "ablate" removes the direction from the positive prompts; "add" adds its raw
    vector to the negative ones; "patch" sets the positive prompts' projection to the mean of the negative
    prompts' at the direction's site and position (activation patching of one direction; it is done at the
    site alone). Places: "site" is the direction's own; "writers" everything that writes to the stream;
    "from" the site and all that writes after it. An addition is divided among its sites, so that the stream
    gets the vector once in all.

    A row a layer, edit, place and score: the score's mean without the edit (`baseline`) and with it
    (`value`), the mean of the paired changes with its 95% interval (NaN where the prompts tell none), and the
    least and largest mean change by directions of the same norm, estimated from these prompts with shuffled labels
    (a control). Intervals know what a score can be: a rate of expressions 0 to 1, a text scorer 0 to 100, a KL
    not below 0. A function of text that gives only 0 and 1, or only 0 and 100, counts as such a rate; the
    values of any other function may be anything.

    It takes layers x edits x places x (1 + n_shuffled) passes over one side's prompts. For a quick look give the
    directions of a few layers, one place and no shuffled labels.

    Args:
        directions: the first direction of each layer at one point is taken (`one_per_layer`).
        contrast: the prompts; held-out ones, because those that made a direction flatter it.
        scores: as for `compare`. Default: `target_log_odds`, the log-odds of the first tokens that tell the sets
            apart (left out where none does), and `kl_first_token`, in nats.
        n_shuffled: directions of shuffled labels a layer; 0 leaves the control out.

    Raises:
        RunError: an unknown edit or place; no edit; n_shuffled below 0.
        DirectionError, PlanError: directions that do not fit the model.
    """
    check_model(model)
    _check(edits, where, n_shuffled)
    items = one_per_layer(directions, point)
    places: list[tuple[LayerEdit, Where]] = [
        (edit, place) for edit in edits for place in where if edit != "patch"
    ]
    places += [("patch", "site")] * ("patch" in edits)
    sweep = LayerSweep.of(model, items, as_contrast(contrast), scores, n_shuffled)
    jobs = [(item, edit, place) for item in items for edit, place in places]
    return sweep.table(with_bar(jobs, "layer sweep"))


Job = tuple[Direction, LayerEdit, Where]


@dataclass(frozen=True)
class LayerSweep:
    """What all edits of a layer sweep share: prompts without an edit, their activations, how they are scored."""

    model: Model
    activations: Activations
    baselines: Mapping[str, ModelOutputs]
    """positive and negative -> the outputs without an edit."""
    metrics: Mapping[str, Metric]
    before: Mapping[tuple[str, str], np.ndarray]
    """Score and side -> a value a prompt without an edit."""
    n_shuffled: int
    bounds: Mapping[str, Bounds]
    """Score -> what the change of one prompt can be."""

    @classmethod
    def of(
        cls,
        model: Model,
        items: Sequence[Direction],
        contrast: ContrastSet,
        scores: Mapping[str, Score] | None,
        n_shuffled: int,
    ) -> LayerSweep:
        """The sweep of some directions; the arguments are those of `layer_sweep`."""
        positions = list(dict.fromkeys(item.position for item in items))
        activations = collect(model, contrast, [item.site for item in items], positions)
        sides = {"positive": contrast.positive, "negative": contrast.negative}
        baselines = {side: ModelOutputs(model, prompts) for side, prompts in sides.items()}
        metrics = _metrics(scores, baselines)
        before = {
            (score, side): _values(metric, baseline, baseline)
            for score, metric in metrics.items()
            for side, baseline in baselines.items()
        }
        given = scores or {}
        bounds = {
            name: _bounds_of_change(given.get(name, metric)) for name, metric in metrics.items()
        }
        return cls(model, activations, baselines, metrics, before, n_shuffled, bounds)

    def table(self, jobs: Iterable[Job]) -> pd.DataFrame:
        """The rows of `layer_sweep` for these edits at these places."""
        import pandas as pd

        return pd.DataFrame([row for job in jobs for row in self.rows(*job)], columns=list(COLUMNS))

    def rows(self, item: Direction, edit: LayerEdit, place: Where) -> Iterator[dict[str, Any]]:
        """A row a score of one edit of one direction."""
        side = "negative" if edit == "add" else "positive"
        tried = [item, *_shuffled(item, self.activations, self.n_shuffled)]
        plans = [_plan(self.model, each, self.activations, edit, place) for each in tried]
        outputs = [self.baselines[side].with_plan(plan) for plan in plans]
        for score, metric in self.metrics.items():
            after = [_values(metric, each, self.baselines[side]) for each in outputs]
            yield {
                "layer": item.site.layer,
                "point": item.site.point,
                "edit": edit,
                "where": place,
                "score": score,
                "on": side,
                **_changes(self.before[score, side], after, self.bounds[score]),
            }


def _check(edits: Sequence[str], where: Sequence[str], n_shuffled: int) -> None:
    for what, chosen, accepted in (("edits", edits, LayerEdit), ("where", where, Where)):
        unknown = [each for each in chosen if each not in get_args(accepted)]
        if unknown or isinstance(chosen, str) or not chosen:
            raise RunError(
                f"{what}={chosen!r}: give one or several of {', '.join(get_args(accepted))} in a tuple"
            )
    if n_shuffled < 0:
        raise RunError(f"n_shuffled is a number of directions from 0; got {n_shuffled}")


def _bounds_of_change(score: Score) -> Bounds:
    """What the change of one prompt's value can be."""
    if score is first_token_kl:  # 0 without an edit
        return AT_LEAST_0
    if isinstance(score, ExpressionScorer):
        return -SHARE[1], SHARE[1]
    return (-SCORE[1], SCORE[1]) if isinstance(score, TextScorer) else UNBOUNDED


def _of_two_values(values: np.ndarray) -> Bounds:
    """The bounds of a rate, where all values are 0 and 1, or 0 and 100, and both are there."""
    highest = float(values.max(initial=0.0))
    two = set(np.unique(values)) == {0.0, highest} and highest in (SHARE[1], SCORE[1])
    return (-highest, highest) if two else UNBOUNDED


def _metrics(
    scores: Mapping[str, Score] | None, baselines: Mapping[str, ModelOutputs]
) -> dict[str, Metric]:
    if scores is not None:
        return {name: as_metric(name, score) for name, score in scores.items()}
    metrics: dict[str, Metric] = {}
    try:
        found = find_target_tokens(*(baselines[side].first_logprobs for side in baselines))
        metrics["target_log_odds"] = TargetLogOdds(tuple(token for token, _, _ in found))
    except InterpAblateError:  # the sets do not differ at the first token
        pass
    return {**metrics, "kl_first_token": first_token_kl}


def _values(metric: Metric, outputs: ModelOutputs, baseline: ModelOutputs) -> np.ndarray:
    """A value a prompt; NaN where there is none."""
    return np.array([np.nan if v is None else float(v) for v in metric(outputs, baseline)])


def _shuffled(item: Direction, activations: Activations, n: int) -> Iterator[Direction]:
    """Differences in means of shuffled labels, of the direction's own norm."""
    values, labels = activations.at(item.site, item.position), activations.labels
    assert labels is not None
    for chosen in label_shuffles(labels, n, seed=0):
        null = difference_in_means(
            values[chosen],
            values[~chosen],
            item.site,
            position=item.position,
            method="shuffled_labels",
        )
        if null is not None:
            yield Direction(null.vector, item.norm, item.site, item.position, null.method)


def _plan(
    model: Model, item: Direction, activations: Activations, edit: LayerEdit, where: Where
) -> Plan:
    if edit == "patch":
        labels = activations.labels
        assert labels is not None
        others = activations.at(item.site, item.position)[~labels]
        return Plan((Clamp(item, item.site, value=float((item @ others).mean())),))
    sites = _sites(model, item.site, where)
    if edit == "ablate":
        return Plan((Ablate(item, sites),))
    sites = tuple(site.output for site in sites)
    return Plan((Add(item, sites, coefficient=1 / len(sites)),))


def _sites(model: Model, own: Site, where: Where) -> tuple[Site, ...]:
    choose: dict[Where, Callable[[], tuple[Site, ...]]] = {
        "site": lambda: (own,),
        "writers": lambda: model.writers,
        "from": lambda: (own, *(site for site in model.writers if own < site)),
    }
    return choose[where]()


def _changes(start: np.ndarray, after: Sequence[np.ndarray], bounds: Bounds) -> dict[str, float]:
    """Means over the prompts that have a value before and after, the change's interval, the controls' range."""
    both = np.isfinite(start) & np.isfinite(after[0])
    changes = after[0][both] - start[both]
    if bounds == UNBOUNDED:
        bounds = _of_two_values(np.concatenate([start[both], after[0][both]]))
    interval = mean_interval(changes, bounds=bounds) if len(changes) else None
    controls = [float(np.nanmean(values - start)) for values in after[1:]]
    low, high = interval or (np.nan, np.nan)
    return {
        "n": len(changes),
        "baseline": float(start[both].mean()) if len(changes) else np.nan,
        "value": float(after[0][both].mean()) if len(changes) else np.nan,
        "change": float(changes.mean()) if len(changes) else np.nan,
        "change_low": low,
        "change_high": high,
        "shuffled_low": min(controls, default=np.nan),
        "shuffled_high": max(controls, default=np.nan),
        "n_shuffled": len(controls),
    }
