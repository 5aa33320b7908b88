"""A run made again from what an export's manifest says of it: prompts, scorer and model by fingerprint.

Knows: what must be the same before any work. Does not know: tensors, or flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.runs.configuration import NAMES, Configuration
from interp_ablate.runs.recipe import digest, digests
from interp_ablate.runs.run_folder import Run, read_selected
from interp_ablate.runs.search_settings import SearchSettings
from interp_ablate.runs.stages import do_stage
from interp_ablate.search.objective_scores import ObjectiveScores
from interp_ablate.storage.json_shapes import misfit

_WHAT = {
    "interp-ablate": "the version of this package",
    "contrast": "the prompts",
    "expressions": "what scores the behaviour",
    "model": "the model (weights, config, tokenizer or template)",
    "rendering": "the prompts as the chat template renders them",
}
_FOREVER = 1e6  # minutes: the number of trials ends a search that is made again


def repeat_run(recipe: Mapping[str, Any], out: str | Path, places: Mapping[str, Any]) -> Plan:
    """Make the run again in a folder, to its chosen plan.

    Args:
        recipe: as `recipe.recipe_of` gives it.
        places: where the model, the prompts and the scorer are now, by setting; what they hold must be the same.

    Raises:
        RunError: a manifest without a run; prompts, a scorer, a model or a version that are others; no plan.
    """
    configuration, made_of = _configuration(recipe, places), recipe.get("made_of")
    search = _search(recipe)
    if not isinstance(made_of, Mapping):
        raise RunError("the manifest's run cannot be read: it has no made_of, the fingerprints")
    run = Run(out, configuration)
    _require_same(run, made_of)
    objectives = None if search is None else _objectives(run, search, recipe.get("objectives"))
    run.model  # noqa: B018  (its fingerprint, and the prompts as it renders them)
    _require_same(run, made_of)
    if search is not None:
        from interp_ablate.runs.search_run import run_search

        if recipe.get("round_size"):
            run.state["search"] = {"round_size": recipe["round_size"]}
        run_search(run, search, objectives, recipe.get("fit_rounds"))
    else:
        do_stage(run, "evaluate")
    plan = read_selected(out)["plan"]
    if plan is None:
        raise RunError(f"the run in {out} chose no plan this time: see its selected.json")
    return Plan.from_dict(plan)


def _search(recipe: Mapping[str, Any]) -> SearchSettings | None:
    """The settings of the run's search; None of a run without one."""
    stored, size = recipe.get("search"), recipe.get("round_size")
    if not stored:
        return None
    try:
        texts: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()
        }
        search = replace(SearchSettings(**texts), minutes=_FOREVER)
    except (TypeError, AttributeError) as error:
        raise RunError(f"the manifest's search cannot be read: {error}") from error
    if size is not None and (type(size) is not int or size < 1):
        raise RunError(f"the manifest's round_size must be a whole number above 0; it is {size!r}")
    rounds = recipe.get("fit_rounds")
    if rounds is not None and misfit(rounds, {"*": int}) is not None:
        raise RunError(
            f"the manifest's fit_rounds must name fits with numbers; it is {rounds!r:.80}"
        )
    return search


def _objectives(run: Run, search: SearchSettings, before: Any) -> ObjectiveScores:
    """The search's objectives, none of them code; refused where one is scored by something else than it was."""
    from interp_ablate.runs.search_objectives import identity_of, objective_scores

    scores = objective_scores(run, search)
    if before is not None and digest(before) != digest(identity_of(scores)):
        raise RunError(
            "what scores the search's objectives differs from the export's (a list, a classifier, a judge's server or "
            "rubric): put it where the objectives name it: " + ", ".join(search.objective)
        )
    return scores


def _configuration(recipe: Mapping[str, Any], places: Mapping[str, Any]) -> Configuration:
    try:
        stored = Configuration.stored_in(recipe)
        given = {name: value for name, value in places.items() if value is not None}
        if {"positive", "negative"} & set(given):
            stored["contrast"] = None
        if "contrast" in given:
            stored |= {"positive": None, "negative": None}
        own = {"own_code": True} if given.get("scorer") else {}
        return Configuration.from_dict({**stored, **given, **own})
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the manifest's run cannot be read: {error!r}") from error


def _require_same(run: Run, made_of: Mapping[str, Any]) -> None:
    before = digests(made_of)
    for name, now in digests(run.state["made_of"]).items():
        if name not in before:
            raise RunError(
                f"the manifest's made_of has no {name!r}, the fingerprint of {_WHAT.get(name, name)}: what the run "
                "was made of cannot be held against what is here. Take the manifest that the export wrote"
            )
        if before[name] != now:
            raise RunError(
                f"{_WHAT.get(name, name)} differ from the export's: {_short(before[name])} there, {_short(now)} now. "
                f"Say where they are: {', '.join('--' + each for each in NAMES if each != 'template')}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:16]}..."
