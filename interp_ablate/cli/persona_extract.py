"""`persona extract`: a trait's directions, and the layer that steers.

Knows: flags and what is printed. Does not know: how a direction is made.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import JudgeSettings, load, tell_spent
from interp_ablate.cli.persona_options import ScoringSettings, score_text, scorers
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.persona.settings import ExtractionConfig, SamplingConfig
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Extract(ScoringSettings):
    """Which trait, and where the persona goes."""

    trait: str = setting(help="bundled name (see `persona traits`) or trait file", positional=True)
    out: str = setting(help="persona folder")


add = adding(Extract, ExtractionConfig, SamplingConfig, JudgeSettings, FigureSettings)


def run(args: Namespace) -> int:
    """Extract the persona, and print what was chosen."""
    from interp_ablate.persona.traits import load_trait

    settings, figures = settings_from(args, Extract), figure_settings(args)
    trait, out = load_trait(settings.trait), Path(settings.out)
    both = scorers(args, settings, trait, out)
    from interp_ablate.persona.extraction import extract
    from interp_ablate.plots.persona import save_figures

    sampling = settings_from(args, SamplingConfig)
    persona = extract(
        load(settings, settings.model),
        trait,
        out,
        **both,
        settings=settings_from(args, ExtractionConfig, under={"sampling": sampling}),
        listener=ProgressBars(quiet=args.quiet),
    )
    tell_spent(args, *both.values())
    drawn = save_figures(out, form=figures.format, dpi=figures.dpi)
    _print_persona(persona, out, drawn, as_json=settings.json)
    return 0


def _print_persona(persona: Any, out: Path, figures: list[Path], *, as_json: bool) -> None:
    from interp_ablate.persona.extraction import describe_counts

    counts, unsteered = persona.details["counts"], persona.details["unsteered"]
    chosen = next(row for row in persona.details["layers"] if row["chosen"])
    # the layer that reads best, as `readout.csv` has it
    rows = (persona.details.get("readout") or {}).get("layers", [])
    readout = next((row for row in rows if row["chosen"]), None)
    if as_json:
        keys = ("layer", "site", "norm", "coefficient", "score", "coherence")
        summary = {"trait": persona.name, "out": str(out), **{key: chosen[key] for key in keys}}
        summary |= {"readout": readout, "unsteered": unsteered["score"], "counts": counts}
        print(json_text(summary))
        return
    for side in ("positive", "negative"):
        print(f"{side + ' answers':<18} {describe_counts(counts[side])}")
    print(f"{'direction':<18} {persona.site}, norm {persona.direction.norm:.3g}")
    print(f"{'unsteered':<18} {score_text(unsteered)}")
    print(f"{'steered':<18} {score_text(chosen)} at coefficient {persona.coefficient:g}")
    print(
        f"{'':<18} on the {unsteered['questions']} questions that chose it: `persona steer` reports"
    )
    if readout is not None:
        interval = f"[{readout['r_low']:.2f}, {readout['r_high']:.2f}]"
        print(
            f"{'readout':<18} {readout['site']}, r = {readout['r']:.2f} {interval} with the score on unseen "
            "questions (the highest of the layers)"
        )
    print(f"{'folder':<18} {out} ({', '.join(path.name for path in figures)})")
