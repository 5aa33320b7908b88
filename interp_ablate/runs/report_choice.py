"""The report's words of a search's objectives: what it was for, why it ended, what the test says of each.

Knows: sentences and rows of objectives. Does not know: the files of a run, or how a page is laid out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp_ablate.runs.report_claims import ends_text, is_number, number, objects, part_of, rate


def choice_told(run: Mapping[str, Any], selected: Mapping[str, Any]) -> list[str]:
    """Sentences on a search's objectives and its end; none of a run."""
    end, told = part_of(run, "search_end"), []
    texts = [str(text).partition("=")[2] for text in selected.get("objectives") or ()]
    if end and texts:
        told.append(
            f"The search drew {number(end.get('trials'))} trials by these objectives: {', '.join(texts)}."
        )
    if end.get("by") == "stop_at":
        first = (end.get("met_by") or ["?"])[0]
        told.append(f"It ended because trial number {first} meets {end.get('stop_at')}.")
    elif end.get("stop_at"):
        told.append(f"No trial meets {end['stop_at']}, at which it would have ended.")
    fresh = selected.get("finalist_prompts")
    if fresh:
        told.append(
            f"The finalists were compared on {number(fresh)} prompts a side of their own, by which no trial was chosen."
        )
    where = "the finalists' own prompts" if fresh else "validation prompts"
    return [*told, *_optimism(part_of(selected, "optimism"), part_of(selected, "trial"), where)]


def _optimism(found: Mapping[str, Any], trial: Mapping[str, Any], where: str) -> list[str]:
    """How much such a choice flatters itself, beside the chosen plan's number by which it was chosen."""
    if not is_number(found.get("optimism")):
        return []
    column = str(found.get("column", "expression_rate"))
    told, by = (number, "{:.3g} nats") if column == "kl" else (rate, "{:.1f} percentage points")
    of = "" if column == "expression_rate" else f"{column} "
    flattered = by.format(found["optimism"] * (1 if column == "kl" else 100))
    text = (
        f"Choosing on half of the validation prompts, {number(found.get('splits'))} times, among "
        f"{number(found.get('plans'))} plans: the chosen one had {of}{told(found.get('chosen_half'))} on the half that chose "
        f"it and {told(found.get('other_half'))} on the other, at a KL of {number(found.get('kl_chosen_half'))} and "
        f"{number(found.get('kl_other_half'))}. "
        f"So this choice flatters itself by about {flattered}"
    )
    shown = trial.get(column)
    return [
        f"{text}, beside the {of}{told(shown)} on {where}." if shown is not None else f"{text}."
    ]


def objective_rows(test: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of results: each objective of one's own before and after the edit, on test prompts."""
    rows = []
    for each in objects(test.get("objectives")):
        for when, said in (("before", "unedited"), ("after", "ablated")):
            rows.append(
                {
                    "name": f"{each.get('name')}, {said}",
                    "prompts": str(each.get("side", "")),
                    "value": rate(each.get(when)),
                    "interval": ends_text(each.get(f"interval_{when}"), as_rate=True),
                }
            )
    return rows
