"""The table of estimators: each by name, at every site, and side by side at one.

An estimator is a function `(positive, negative, site, *, position, source) -> Direction | None` in a file of this
folder and a line in `ESTIMATORS`. Another package registers one under the entry-point group
`interp_ablate.estimators`.

Knows: the names, and a table that compares them. Does not know: models, or any edit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from interp_ablate.directions.direction import Direction, PerPrompt, as_directions, orthogonalized
from interp_ablate.directions.direction_set import Directions, HasActivations
from interp_ablate.directions.discriminants import lda, logistic
from interp_ablate.directions.leace_eraser import leace
from interp_ablate.directions.mean_difference import (
    as_float64,
    checked_means,
    difference_in_means,
    directions_at,
    label_shuffles,
    labels_of,
    signed_direction,
    with_separation,
)
from interp_ablate.directions.subspaces import pca
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site, SiteLike, as_sites
from interp_ablate.storage.entry_points import entry_named, entry_names

if TYPE_CHECKING:
    import pandas as pd

GROUP = "interp_ablate.estimators"
CONTROL_COLUMNS = (
    "layer",
    "point",
    "position",
    "control",
    "auc",
    "d_prime",
    "positive",
    "negative",
)


class Estimator(Protocol):
    """Two labelled sets of activations at one site to a direction there; None where there is no difference."""

    def __call__(
        self,
        positive: PerPrompt,
        negative: PerPrompt,
        site: Site,
        *,
        position: str = ...,
        source: str = ...,
    ) -> Direction | None: ...


ESTIMATORS: dict[str, Estimator] = {
    "difference_in_means": difference_in_means,
    "pca": pca,
    "lda": lda,
    "logistic": logistic,
}


def estimator_named(method: str) -> Estimator:
    """The estimator of this name, of this package or of another one.

    Raises:
        DirectionError: no such name.
        InterpAblateError: the package that registers it fails to load.
    """
    advice = (
        " (subspace, leace and som_directions give more than one direction: call them for one site)"
    )
    return entry_named(
        method, ESTIMATORS, GROUP, what="estimator", error=DirectionError, advice=advice
    )


def estimate_with(
    method: str,
    train: HasActivations,
    held_out: HasActivations | None = None,
    *,
    sites: SiteLike | Iterable[SiteLike] | None = None,
    source: str = "",
) -> Directions:
    """One estimator at every site and position; where it finds no direction, the reason.

    Args:
        train: labelled activations (`collect` over a ContrastSet).
        held_out: labelled activations of other prompts; with them every direction carries how well it
            separates prompts that did not make it.
        sites: only these, of those collected; default: all.

    Raises:
        DirectionError: an unknown method; activations without labels, with NaN or of another d_model; no
            site with a direction at all.
    """
    estimator = estimator_named(method)
    labels_of(train)  # refuses what is no activations

    def estimate(means: Direction, positive: Tensor, negative: Tensor) -> Direction | None:
        return estimator(positive, negative, means.site, position=means.position, source=source)

    chosen = _chosen(sites, train.sites)
    directions = directions_at(chosen, train, held_out, {"": estimate}, source=source)
    if not directions:
        reasons = directions.left_out.items()
        first = next(iter(reasons), ("no site was given", "give one or more"))
        raise DirectionError(f"no site has a direction of {method}; {first[0]}: {first[1]}")
    return directions


def _chosen(
    sites: SiteLike | Iterable[SiteLike] | None, collected: tuple[Site, ...]
) -> tuple[Site, ...]:
    """The sites asked for, in the order in which they were collected."""
    if sites is None:
        return collected
    wanted = set(as_sites(sites))
    unknown = sorted(str(site) for site in wanted - set(collected))
    if unknown:
        raise DirectionError(
            f"no activations at {unknown[0]}: collected were {len(collected)} sites"
            + (f" from {collected[0]} to {collected[-1]}" if collected else "")
        )
    return tuple(site for site in collected if site in wanted)


def comparison(
    train: HasActivations, held_out: HasActivations, site: SiteLike, position: str | int = "-1"
) -> pd.DataFrame:
    """One row an estimator: AUC and d' on held-out prompts, cosine to the difference in means, norm.

    `norm` is the gap of the training means along the unit direction. An estimator that cannot be had here
    (too few prompts, a package that is missing) keeps its row, with NaN and the reason in `left_out`. The
    row leace_write is the difference in means again: what LEACE adds is what it reads along.

    Raises:
        DirectionError: activations without labels, with NaN or of another d_model; no difference in means.
        InterpAblateError: a package that registers an estimator fails to load.
    """
    import pandas as pd

    labels, held_labels = labels_of(train), labels_of(held_out)
    site, place = Site.parse(site), str(position)
    values, held = train.at(site, place), held_out.at(site, place)
    means = checked_means(values[labels], values[~labels], site, place)
    rows = []
    for name, item, reason in _side_by_side(values[labels], values[~labels], means):
        row: dict[str, Any] = {"estimator": name, "left_out": reason}
        if item is not None:
            measured = with_separation(item, held, held_labels).separation
            assert measured is not None
            cosine = float(item.vector @ means.vector)
            norm = float(item.vector @ means.raw)
            row.update(auc=measured.auc, d_prime=measured.d_prime, cosine=cosine, norm=norm)
        rows.append(row)
    columns = ["estimator", "auc", "d_prime", "cosine", "norm", "left_out"]
    return pd.DataFrame(rows, columns=columns)


def control_separations(
    train: HasActivations,
    held_out: HasActivations,
    directions: Iterable[Direction],
    *,
    count: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """How well directions of shuffled training labels separate the held-out prompts, at every place of `directions`.

    A row a place and shuffle: layer, point, position, control (its number), auc, d_prime, and the held-out prompts
    of each set. Every shuffle leaves both sides the same share of positives (`shuffled_labels`), so what such a
    direction separates comes from the spread of the activations and not from the concept.

    Raises:
        DirectionError: activations without labels, with NaN or of another d_model.
    """
    import pandas as pd

    labels, held_labels = labels_of(train), labels_of(held_out)
    sides = {"positive": int(held_labels.sum()), "negative": int((~held_labels).sum())}
    shuffles = label_shuffles(labels, count, seed=seed)
    rows: list[dict[str, Any]] = []
    for site, position in dict.fromkeys(
        (item.site, item.position) for item in as_directions(directions)
    ):
        values, held = train.at(site, position), held_out.at(site, position)
        place = {"layer": site.layer, "point": site.point, "position": position}
        for i, shuffled in enumerate(shuffles):
            item = difference_in_means(values[shuffled], values[~shuffled], site, position=position)
            if item is not None:
                found = with_separation(item, held, held_labels).separation
                assert found is not None
                rows.append(
                    {**place, "control": i, "auc": found.auc, "d_prime": found.d_prime, **sides}
                )
    return pd.DataFrame(rows, columns=list(CONTROL_COLUMNS))


def _side_by_side(
    positive: PerPrompt, negative: PerPrompt, means: Direction
) -> list[tuple[str, Direction | None, str]]:
    """The rows of the comparison: a name, and its direction or the reason why there is none."""
    site, position = means.site, means.position
    mean, *others = entry_names(ESTIMATORS, GROUP)
    leace_rows = ("leace_write", "leace_read")
    rows: list[tuple[str, Direction | None, str]] = []
    for method in (mean, f"{mean}_orthogonalized", *others, leace_rows):
        names = (method,) if isinstance(method, str) else method
        items: list[Direction | None]
        try:
            if method == f"{mean}_orthogonalized":
                items = [orthogonalized(means, as_float64(negative).mean(0))]
            elif isinstance(method, str):
                items = [estimator_named(method)(positive, negative, site, position=position)]
            else:
                eraser = leace(positive, negative, site, position=position)
                parts = zip(names, (eraser.write, eraser.read), strict=True)
                items = [signed_direction(part, means, name, "") for name, part in parts]
        except DirectionError as error:
            rows.extend((name, None, str(error)) for name in names)
        else:
            rows.extend((name, item, "") for name, item in zip(names, items, strict=True))
    return rows
