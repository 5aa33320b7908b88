"""`persona steer`: trait and coherence against the coefficient, with a figure.

Knows: flags and what is printed. Does not know: how a model is steered.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import JudgeSettings, tell_spent
from interp_ablate.cli.persona_options import PersonaSettings, greedy, opened, score_text
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.persona.settings import SamplingConfig, SteeringConfig
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Steer(PersonaSettings):
    """Which persona steers, and what becomes of earlier answers."""

    force: bool = setting(False, "answer again where settings differ")


add = adding(
    Steer,
    (SteeringConfig, ("coefficients", "questions", "controls")),
    (SamplingConfig, ("max_new_tokens", "batch_size")),
    JudgeSettings,
    FigureSettings,
)


def run(args: Namespace) -> int:
    """Answer under every coefficient, and print the curve."""
    settings, form = settings_from(args, Steer), figure_settings(args)
    persona, both, model = opened(args, settings)
    from interp_ablate.persona.steering import curve, steer
    from interp_ablate.plots.persona import save_figures
    from interp_ablate.storage.atomic_files import write_atomic

    folder = Path(settings.folder)
    path = folder / "steering.jsonl"
    answers = steer(
        model,
        persona,
        path,
        **both,
        settings=settings_from(args, SteeringConfig, under={"sampling": greedy(args)}),
        replace_other=settings.force,
        listener=ProgressBars(quiet=args.quiet),
    )
    tell_spent(args, *both.values())
    table = curve(answers)
    write_atomic(folder / "curve.csv", table.to_csv(index=False))
    figures = save_figures(folder, form=form.format, dpi=form.dpi)
    if settings.json:
        print(table.to_json(orient="records"))
        return 0
    for row in table.to_dict("records"):
        none = f"  ({row['no_verdict']} without a verdict)" if row["no_verdict"] else ""
        row["score"] = None if row["score"] != row["score"] else row["score"]
        print(f"{row['condition']:<10} {row['coefficient']:>6g}  {score_text(row)}{none}")
    print(f"{folder / 'curve.csv'}, {', '.join(str(path) for path in figures)}")
    return 0
