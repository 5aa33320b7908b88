"""The page of a league, as Markdown from its results.

Knows: tables and sentences. Does not know: how anything was measured, or where the page lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_ablate.league.conclusions import Conclusion, conclusions, losing_everywhere
from interp_ablate.league.results import COLUMNS
from interp_ablate.storage.atomic_files import write_atomic

HEADS = {
    "detection": "detection, AUC",
    "removal": "removal",
    "induction": "induction",
    "kl_answers": "KL along answers",
    "repetition": "repetition",
}
_INTRODUCTION = """\
Every method gets the same prompts, the same splits and the same time.
The table below says what each of them does with these.
It is written by a command from one file of results, and a reader can run both:

    {command}

A run that was killed goes on where it was. `--from league.json --page league.md` writes this page alone."""
_MEASURES = """\
* **Detection** is the area under the ROC curve of a method's own score, on test prompts that it has never seen.
  Chance is 0.5.
* **Removal** is how much less often answers show the behaviour, averaged over KLs from 0 to {max_kl} nats.
  The KL is that of the first token after negative prompts. 0 is no effect.
* **Induction** is how much more often they show it after negative prompts, up to {max_kl_induction} nats.
  That KL holds the behaviour itself, so its limit is higher.
* **KL along answers** is the mean a token over the unedited model's own answers, at the removal nearest to the limit.
  **Repetition** is the share of repeated 3-grams there. Of both, less is better.
* **Failed plans** gave no numbers on the test prompts. One counts as no effect, at the KL that it was made for.
  Where the removal nearest to the limit failed, there is no KL along answers and no repetition.
* **Rank** is a range: the best and the worst place that the intervals allow. Controls have none.
* **Exact in** says what can hold the removal exactly: weights, weights with biases, or only hooks.

Intervals are of 95%, by a jackknife over prompts and, where there are several, over seeds.
Seconds are those of a fit; what methods share is computed before them{shared}.
A mean over behaviours gives each the same weight. The uncertainty of a KL is not in them.
A method without a rule of its own tries {n_sites} layers while its time lasts.
It keeps the one whose removal, at a third of the KL limit, makes the model's own first words unlikeliest on validation prompts.
Where the concept is in the prompts alone, it keeps the layer whose scores are furthest apart on them (d')."""


def write_page(results: Mapping[str, Any], path: str | Path, *, figure: str) -> None:
    """Write the page, whole or not at all; `figure` is the link to the picture.

    Raises:
        RunError: the place cannot be written.
    """
    write_atomic(Path(path), page(results, figure=figure))


def page(results: Mapping[str, Any], *, figure: str) -> str:
    """The page as Markdown."""
    seconds = results["shared_seconds"]
    shared = "" if seconds is None else f", in {seconds:.0f} seconds a behaviour and seed"
    measures = _MEASURES.format(**results["settings"], n_sites=results["n_sites"], shared=shared)
    parts = [
        "# The league",
        _INTRODUCTION.format(command=results["command"]),
        _size(results),
        "## What can be said",
        *_conclusions(results),
        "## All behaviours together",
        _table(results, lambda row: row["overall"], ranked=True),
        f"![Every method with its intervals, controls in grey]({figure})",
        "## How it is measured",
        measures,
        "## Each behaviour",
        *(part for name in results["behaviours"] for part in _of_behaviour(results, name)),
        "## Methods and sources",
        _sources(results),
    ]
    return "\n\n".join(parts) + "\n"


def _size(results: Mapping[str, Any]) -> str:
    s, seeds = results["settings"], results["seeds"]
    counted = f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"
    few = " One seed says nothing of how much a split matters." if len(seeds) == 1 else ""
    return (
        f"**Size of this run:** {results['model']}, {len(results['behaviours'])} behaviours, {counted}, "
        f"{s['seconds']:g} seconds a method.\n"
        f"Each side has {s['n_train']} training, {s['n_validation']} validation and {s['n_test']} test prompts; answers "
        f"have {s['max_new_tokens']} tokens at most.{few}"
    )


def _conclusions(results: Mapping[str, Any]) -> list[str]:
    found = conclusions(results)
    if not found:
        return ["No method has a number on every behaviour: nothing can be said."]
    lines = ["Only intervals that part are taken for a difference."]
    lines += [_sentences(each) for each in found]
    if {each.column for each in found} == {"detection"}:
        lines.append(
            "Removal and induction are not judged in this run: no behaviour of it has a scorer of answers."
        )
        return lines
    lost = losing_everywhere(results)
    lines.append(
        f"Below the best in all that they do: {_names(lost)}."
        if lost
        else "No method is below the best in all that it does."
    )
    return lines


def _sentences(each: Conclusion) -> str:
    first = f"**{each.column.capitalize()}.** The highest value is that of `{each.best}`."
    like = (
        f" These can't be told from it: {_names(each.like_the_best)}."
        if each.like_the_best
        else " No other method reaches it."
    )
    below = f" Below it: {_names(each.below_the_best)}." if each.below_the_best else ""
    return first + like + below + _against_controls(each)


def _against_controls(each: Conclusion) -> str:
    """What the controls that have a number say; each is named, since others may not have played."""
    if not each.controls:
        return " No control has a number here, so none of them is told from noise."
    if each.like_a_control:
        return (
            f" Not told from at least one control ({_names(each.controls)}): "
            f"{_names(each.like_a_control)}."
        )
    return f" All of them are above the controls that have a number: {_names(each.controls)}."


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(results: Mapping[str, Any], numbers: Any, *, ranked: bool = False) -> str:
    from interp_ablate.plots.league import method_order  # needs matplotlib

    rows = [(name, results["methods"][name]) for name in method_order(results, numbers)]
    columns = [column for column in COLUMNS if any(numbers(row)[column] for _, row in rows)]
    heads = ["method", *(HEADS[column] for column in columns)]
    failed = ranked and any(row["plans"][1] for _, row in rows)
    heads += (["failed plans"] if failed else []) + (["exact in", "seconds"] if ranked else [])
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, row in rows:
        label = f"*{name}* (control)" if row["control"] else f"`{name}`"
        cells = [label]
        for column in columns:
            rank = row["ranks"].get(column) if ranked else None
            cells.append(_cell(numbers(row)[column], rank))
        if failed:
            cells.append("{1} of {0}".format(*row["plans"]))
        if ranked:
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
            cells += [row["exactness"], seconds]
        lines.append(_row(cells))
    return "\n".join(lines)


def _cell(estimate: Sequence[float | None] | None, rank: Sequence[int] | None) -> str:
    if estimate is None:
        return "–"
    value, low, high = estimate
    text = f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
    if rank is None:
        return text
    return f"{text}, rank {rank[0]}" + (f" to {rank[1]}" if rank[1] > rank[0] else "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _of_behaviour(results: Mapping[str, Any], name: str) -> list[str]:
    rates, failed = (results["behaviours"][name][part] for part in ("rates", "failed"))
    said = (
        f"Unedited, {rates[0]:.0%} of the answers to positive prompts show it, and {rates[1]:.0%} of those to "
        "negative ones."
        if rates
        else f"Only detection is judged: the unedited model has no answers here ({failed})."
        if failed
        else "The concept is in the prompts alone, so that only detection is judged."
    )
    parts = [f"### {name}", said, _table(results, lambda row: row["by_behaviour"][name])]
    lines = []
    for method, row in results["methods"].items():
        if name in row["failed"]:
            lines.append(f"* `{method}` has no numbers: {row['failed'][name]}.")
        if name in row["failed_plans"]:
            lines.append(f"* Plans of `{method}` failed: {'; '.join(row['failed_plans'][name])}.")
    parts += ["\n".join(lines)] if lines else []
    return parts


def _sources(results: Mapping[str, Any]) -> str:
    rows = [[f"`{name}`", row["source"]] for name, row in results["methods"].items()]
    return "\n".join([_row(["method", "source"]), _row(["---", "---"]), *map(_row, rows)])
