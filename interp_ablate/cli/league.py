"""`league`: every method on every behaviour, at one budget.

Knows: flags and what is printed. Does not know: how a method is fitted or judged.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import load
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.league.settings import LeagueSettings
from interp_ablate.settings import setting


@dataclass(frozen=True)
class LeagueFiles:
    """Where a league's files are."""

    out: str | None = setting(None, "folder; what it has already is not done again")
    results: str | None = setting(
        None,
        "make the page of this league.json alone, without a model",
        flag="from",
        metavar="FILE",
    )
    page: str | None = setting(
        None, "write the page here too, its figure into figures/ beside it", metavar="FILE.md"
    )


add = adding(LeagueSettings, LeagueFiles)


def run(args: Namespace) -> int:
    """Play the league, and print its table."""
    from interp_ablate.league.saved_results import read_results

    files = settings_from(args, LeagueFiles)
    settings = settings_from(args, LeagueSettings)
    if files.results is not None:
        if files.page is None:
            raise RunError("--from makes a page: say where, with --page FILE.md")
        _write(read_results(files.results), Path(files.page), Path("figures/league.png"))
        return 0
    if files.out is None:
        raise RunError("a league needs a folder: give --out FOLDER (or --from with --page)")
    _play(settings, Path(files.out), files.page)
    return 0


def _play(settings: LeagueSettings, out: Path, page: str | None) -> None:
    from interp_ablate.league.competition import play
    from interp_ablate.league.entry import check_behaviours, named_behaviours
    from interp_ablate.league.registry import method_named, method_names
    from interp_ablate.league.summary import save_results

    behaviours = named_behaviours(settings)
    methods = [method_named(name) for name in settings.methods or method_names()]
    check_behaviours(behaviours, settings)
    done = play(load(settings, settings.model), behaviours, methods, settings, out)
    results = save_results(out / "league.json", done, behaviours, methods, settings)
    _write(results, out / "league.md", Path("league.png"))
    if page is not None:
        _write(results, Path(page), Path("figures/league.png"))
    print(_lines(results))
    print(f"\n{out / 'league.md'}, league.json, league.png; every number: {out / 'league.jsonl'}")


def _write(results: dict[str, Any], page: Path, figure: Path) -> None:
    from interp_ablate.league.page import write_page
    from interp_ablate.plots.league import league_figure
    from interp_ablate.plots.style import save_figure

    save_figure(league_figure(results), page.parent / figure)
    write_page(results, page, figure=figure.as_posix())


def _lines(results: dict[str, Any]) -> str:
    """The methods in a terminal: detection, removal and induction with intervals."""
    from interp_ablate.plots.league import method_order

    width = max(map(len, results["methods"]))
    lines = [f"{'method':{width}s}  {'detection':22s}{'removal':24s}induction"]
    for name in method_order(results):
        numbers = results["methods"][name]["overall"]
        cells = [_cell(numbers[column]) for column in ("detection", "removal", "induction")]
        lines.append(f"{name:{width}s}  {cells[0]:22s}{cells[1]:24s}{cells[2]}".rstrip())
    return "\n".join(lines)


def _cell(estimate: list[float | None] | None) -> str:
    if estimate is None:
        return "-"
    value, low, high = estimate
    return f"{value:.2f}" if low is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
