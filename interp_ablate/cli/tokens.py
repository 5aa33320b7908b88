"""`tokens`: a text's tokens, coloured by their projections on a run's directions.

Knows: flags, files and what is printed. Does not know: how a projection is computed or drawn.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import ModelSettings, load, loading_of_run, run_with_directions
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import MAX_NEW_TOKENS, setting
from interp_ablate.sites import RESIDUAL_POINTS, Point


@dataclass(frozen=True)
class Tokens(ModelSettings):
    """Which text is looked at, along which directions."""

    folder: str = setting(
        help="run folder, or a file of directions (with --model)", positional=True, metavar="RUN"
    )
    text: str = setting(help="the prompt", positional=True)
    response: str | None = setting(
        None, "text of the answer (default: the model's own)", empty=True
    )
    system: str | None = setting(None, "system prompt", empty=True)
    plan: str | None = setting(None, "plan JSON: the edited stream is read")
    point: Point = setting("resid_post", "where the stream is read", choices=RESIDUAL_POINTS)
    max_new_tokens: int = setting(
        MAX_NEW_TOKENS, "tokens of the model's answer, at most; 0: none", least=0
    )
    out: str | None = setting(None, "folder of the files (default: RUN, and RUN/figures)")


add = adding(Tokens, FigureSettings)


def run(args: Namespace) -> int:
    """Write the table, the page and the heat map; print their paths."""
    from interp_ablate.activations.token_html import tokens_page
    from interp_ablate.activations.token_view import token_projections
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.edits.plan import Plan
    from interp_ablate.plots.run_figures import tokens_figure
    from interp_ablate.plots.style import save_figure
    from interp_ablate.prompts.prompt import Prompt
    from interp_ablate.storage.atomic_files import check_folder, write_atomic

    settings, figures = settings_from(args, Tokens), figure_settings(args)
    file = Path(settings.folder)
    if file.is_dir():
        settings = settings_from(args, Tokens, under=loading_of_run(run_with_directions(file)))
        file = file / "directions.safetensors"
    directions = _of_one_method(Directions.load(file), settings.point)
    plan = Plan.load(settings.plan) if settings.plan else None
    prompt = Prompt(settings.text, settings.system)
    out = Path(settings.out) if settings.out else file.parent
    check_folder(out / "figures")
    model = load(settings, settings.model)
    with model.applied(plan):
        projections = token_projections(
            model,
            prompt,
            directions,
            response=settings.response,
            max_new_tokens=0 if settings.response is not None else settings.max_new_tokens,
        )
    frame = projections.to_frame()
    write_atomic(out / "tokens.csv", frame.to_csv(index=False))
    page = tokens_page(projections, title=f"Tokens of {settings.text[:80]!r}", point=settings.point)
    write_atomic(out / "tokens.html", page)
    picture = save_figure(
        tokens_figure(frame), out / "figures" / figures.named("tokens.png"), dpi=figures.dpi
    )
    for path in (out / "tokens.html", picture, out / "tokens.csv"):
        print(path)
    return 0


def _of_one_method(directions: Any, point: Point) -> Any:
    """The plain estimates at one point, at the first position.

    Raises:
        RunError: no direction at that point.
    """
    plain = directions.of("difference_in_means") or directions
    chosen = [item for item in plain if item.site.point == point]
    if not chosen:
        points = sorted({item.site.point for item in plain}, key=get_args(Point).index)
        raise RunError(f"there are no directions at {point}: --point takes {', '.join(points)}")
    return [item for item in chosen if item.position == chosen[0].position]
