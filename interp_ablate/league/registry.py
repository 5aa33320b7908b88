"""The methods of the league by name.

A method is a file in `methods/` with a `METHOD = LeagueMethod(...)` and a line in `METHODS`. Another package
registers one under the entry-point group `interp_ablate.league_methods`.

Knows: the names. Does not know: what a method does, or how it is judged.
"""

from __future__ import annotations

from interp_ablate.errors import RunError
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods import (
    ace,
    angular_steering,
    biprojected,
    cast,
    concept_cone,
    cosmic,
    difference_in_means,
    gaussian_transport,
    gradient_fit,
    lda,
    leace,
    logistic,
    norm_preserving,
    opposite_signs,
    orthogonalized,
    pca,
    random_direction,
    residualized,
    shuffled_labels,
    som,
    subspace,
    winsorized,
)
from interp_ablate.storage.entry_points import entry_named, entry_names

GROUP = "interp_ablate.league_methods"
METHODS: dict[str, LeagueMethod] = {
    each.METHOD.name: each.METHOD
    for each in (
        difference_in_means,
        orthogonalized,
        winsorized,
        pca,
        subspace,
        lda,
        logistic,
        leace,
        ace,
        gaussian_transport,
        angular_steering,
        cast,
        norm_preserving,
        biprojected,
        residualized,
        cosmic,
        opposite_signs,
        som,
        gradient_fit,
        concept_cone,
        random_direction,
        shuffled_labels,
    )
}


def method_named(name: str) -> LeagueMethod:
    """The method of this name, of this package or of another one.

    Raises:
        RunError: no such name, or an entry point that is no `LeagueMethod`.
        InterpAblateError: the package that registers it fails to load.
    """
    return entry_named(
        name, METHODS, GROUP, what="method of the league", error=RunError, kind=LeagueMethod
    )


def method_names() -> list[str]:
    """Every method's name, controls last."""
    names = entry_names(METHODS, GROUP)
    return sorted(names, key=lambda name: name in METHODS and METHODS[name].is_control)
