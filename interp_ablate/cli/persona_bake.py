"""`persona bake`: the vector written into a checkpoint.

Knows: flags and what is printed. Does not know: how a checkpoint is written.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from interp_ablate.cli.options import REPLACE, JudgeSettings, tell_spent
from interp_ablate.cli.persona_options import PersonaSettings, greedy, opened, score_text
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.persona.settings import BakingConfig, SamplingConfig
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Bake(PersonaSettings):
    """Which persona is baked, and where the checkpoint goes."""

    out: str = setting(help="folder of the checkpoint")
    force: bool = setting(False, REPLACE)


add = adding(Bake, BakingConfig, JudgeSettings, (SamplingConfig, ("max_new_tokens", "batch_size")))


def run(args: Namespace) -> int:
    """Write the checkpoint, and print what it answers before and after."""
    settings = settings_from(args, Bake)
    persona, both, model = opened(args, settings)
    from interp_ablate.persona.baking import bake

    under = {"sampling": greedy(args), "overwrite": settings.force}
    baking = settings_from(args, BakingConfig, under=under)
    amount = persona.coefficient if baking.coefficient is None else baking.coefficient
    answers = Path(settings.folder) / "bakes" / f"{amount:g}.jsonl"
    baked = bake(
        model,
        persona,
        settings.out,
        answers=answers,
        **both,
        settings=baking,
        listener=ProgressBars(quiet=args.quiet),
    )
    tell_spent(args, *both.values())
    if settings.json:
        certificate = {"certificate": baked.certificate["passed"]}
        print(json_text({"out": settings.out, **certificate, **baked.results}))
        return 0
    for name, row in baked.results["conditions"].items():
        print(f"{name:<10} {score_text(row)}")
    for before, after in list(zip(baked.of("before"), baked.of("baked")))[:2]:
        print(f"\n{before.prompt.text}\n  before  {before.text!r}\n  after   {after.text!r}")
    print(f"\n{settings.out} (certificate passed; load it with transformers alone)")
    return 0
