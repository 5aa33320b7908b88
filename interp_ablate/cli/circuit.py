"""`circuit`: what writes a run's direction, what it says to the vocabulary, and what reads it.

Knows: flags, files and what is printed. Does not know: how anything is measured or drawn.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import run_with_directions
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Circuit:
    """Which direction of which run.

    Raises:
        RunError: a negative number.
    """

    folder: str = setting(help="run folder with directions", positional=True, metavar="RUN")
    site: str | None = setting(
        None,
        "a place of the stream, such as 12.resid_post (default: whose direction separates best)",
    )
    top: int = setting(10, "rows of each table that are printed")
    n_patched: int = setting(
        8, "positive validation prompts for path patching; 0: none (it is slow)"
    )
    beside: str | None = setting(
        None,
        "directions to compare with: a run folder (this one too), a file of directions, or a SAELens folder",
        metavar="OTHER",
    )
    neurons: int = setting(0, "so many neurons, those that write most, are told from their MLPs")

    def __post_init__(self) -> None:
        if self.top < 1 or min(self.n_patched, self.neurons) < 0:
            raise RunError(
                "--top is at least 1, --n-patched and --neurons at least 0; "
                f"got {self.top}, {self.n_patched} and {self.neurons}"
            )


add = adding(Circuit, FigureSettings)


def run(args: Namespace) -> int:
    """Write RUN/circuit: the tables and two pictures, each when it is there; print the largest rows."""
    from interp_ablate.circuits.attribution import attribute
    from interp_ablate.circuits.lens import logit_lens
    from interp_ablate.circuits.reading import reading_weights
    from interp_ablate.storage.atomic_files import check_folder

    settings, figures = settings_from(args, Circuit), figure_settings(args)
    opened = _open(settings.folder, ProgressBars(quiet=args.quiet))
    direction = _direction(opened, settings.site)
    others = settings.beside and _others(settings.beside, len(direction.vector))
    prompts, out = opened.split.validation, opened.out / "circuit"
    check_folder(out)
    total = len(prompts.positive) + len(prompts.negative)
    with opened.step("attribution", total) as advance:
        attribution = attribute(
            opened.model, prompts, direction, neurons=settings.neurons, on_batch=advance
        )
    print(f"direction   {direction.name}")
    frame = attribution.to_frame()
    _write(out, "attribution", frame)
    _draw(out, frame, figures)
    _print_attribution(attribution, frame, settings.top)
    if others:
        beside = _beside(opened, direction, others)
        _write(out, "features" if "feature" in beside else "beside", beside)
        _print_beside(beside, settings.top)
    lens = logit_lens(opened.model, direction)
    _write(out, "lens", frame := lens.to_frame(settings.top))
    _print_lens(lens, frame)
    _write(out, "readers", frame := reading_weights(opened.model, direction))
    _print_readers(frame, settings.top)
    if settings.n_patched:
        _patch(opened, direction, settings)
    print(f"\n{out}")
    return 0


def _write(out: Path, name: str, table: Any) -> None:
    from interp_ablate.storage.atomic_files import write_atomic

    write_atomic(out / f"{name}.csv", table.to_csv(index=False))


def _draw(out: Path, frame: Any, figures: FigureSettings) -> None:
    from interp_ablate.plots.attribution import attribution_bars, attribution_map
    from interp_ablate.plots.style import new_figure, save_figure

    for name, draw in (("attribution", attribution_bars), ("attribution_map", attribution_map)):
        figure = new_figure(height=6.2)
        draw(frame, figure.add_subplot())
        save_figure(figure, out / figures.named(f"{name}.png"), dpi=figures.dpi)


def _patch(opened: Any, direction: Any, settings: Circuit) -> None:
    """Path patching, the slowest part, once all else is on disk and on the screen."""
    from interp_ablate.circuits.reading import path_patching

    prompts, modules = opened.split.validation.positive, 2 * opened.model.n_layers
    patched = prompts[: settings.n_patched]
    print(
        f"\npath patching: {len(patched)} prompts x {modules} modules, the slowest part "
        "(--n-patched 0 leaves it out)",
        flush=True,
    )
    with opened.step("path patching", modules) as advance:
        frame = path_patching(opened.model, patched, direction, on_module=advance)
    _write(opened.out / "circuit", "path_patching", frame)
    largest = frame.sort_values("kl", ascending=False).head(settings.top)
    _show("What reads it (KL in nats if this module alone does not see it)", largest)


def _open(folder: str, listener: Any) -> Any:
    """The run of a folder.

    Raises:
        RunError: no run there, or one without directions.
    """
    from interp_ablate.runs.configuration import Configuration
    from interp_ablate.runs.run_folder import Run

    stored = Configuration.stored_in(run_with_directions(folder))
    return Run(folder, Configuration.from_dict(stored), listener=listener)


def _direction(opened: Any, wanted: str | None) -> Any:
    """The plain estimate at a site, or the one that separates validation prompts best.

    Raises:
        RunError: none in the residual stream, or none at that site.
    """
    from interp_ablate.directions.direction_set import most_separating
    from interp_ablate.runs.concept import attributable
    from interp_ablate.runs.configuration import MAIN_METHOD
    from interp_ablate.sites import Site

    items = attributable(opened.directions.of(MAIN_METHOD))
    if wanted is not None:
        site = Site.parse(wanted)
        items = [item for item in items if item.site == site]
    if not items:
        raise RunError(
            f"{opened.out} has no direction {'at ' + wanted if wanted else 'that was read'} in the residual "
            "stream at one token: give --site, or make directions with --positions -1"
        )
    return most_separating(items)


def _others(place: str, d_model: int) -> Any:
    """What --beside names: an SAE's decoder, or directions.

    Raises:
        RunError, DirectionError: nothing of the kind there, or of another d_model.
    """
    from pathlib import Path

    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.directions.foreign_files import read_directions
    from interp_ablate.directions.sae_features import CONFIG, SAEDecoder

    if (Path(place) / CONFIG).is_file():
        others: Any = SAEDecoder.open(place)
    elif Path(place).is_dir():
        run_with_directions(place)
        others = Directions.load(Path(place) / "directions.safetensors")
    else:
        others = read_directions(place)
    width = others.d_model if isinstance(others, SAEDecoder) else len(others.items[0].vector)
    if width != d_model:
        raise RunError(
            f"--beside {place} is of d_model {width}, and the run's direction of {d_model}: streams of different "
            "widths have no cosine"
        )
    return others


def _beside(opened: Any, direction: Any, others: Any) -> Any:
    """The direction beside others, with what shuffled labels of this run's training prompts give."""
    from interp_ablate.directions.beside import cosine_table, shuffled_directions
    from interp_ablate.directions.sae_features import SAEDecoder, nearest_features

    activations = opened.activations("train")
    if isinstance(others, SAEDecoder):
        controls = shuffled_directions(direction, activations)
        return nearest_features(direction, others, top=100, controls=controls)
    own = {item.fingerprint for item in opened.directions}
    again = activations if all(item.fingerprint in own for item in others) else None
    named = {item.name: item for item in others if item.name != direction.name or again is None}
    return cosine_table(direction, named, activations=activations, other_activations=again)


def _show(title: str, frame: Any) -> None:
    text = frame.to_string(index=False, float_format="{:.3f}".format)
    print(f"\n{title}\n{text}", flush=True)


def _print_attribution(attribution: Any, frame: Any, top: int) -> None:
    order = frame["difference"].abs().sort_values(ascending=False, kind="stable").index
    columns = ["term", "positive", "negative", "difference", "low", "high", "share"]
    _show("What writes it (difference of both sets' means)", frame.loc[order, columns].head(top))
    for module, reason in list((attribution.whole or {}).items())[:top]:
        print(f"{module} is given whole: {reason}")


def _print_beside(frame: Any, top: int) -> None:
    if "feature" in frame:
        _show("Which features it resembles", frame.head(top))
        return
    columns = ["second", "cosine", "null_low", "null_high", "outside"]
    largest = frame.sort_values("cosine", key=abs, ascending=False)
    _show("What it resembles (null: with shuffled labels)", largest[columns].head(top))


def _print_lens(lens: Any, frame: Any) -> None:
    _show("What it says (logit lens; z in SDs over random directions)", frame)
    average, largest = lens.random_largest
    print(f"a random direction's largest z: {average:.1f} on average, {largest:.1f} at most")


def _print_readers(frame: Any, top: int) -> None:
    readers = frame.sort_values("alignment", ascending=False)
    _show("What is aligned with it (1: as with a random direction)", readers.head(top))
