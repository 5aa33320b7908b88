"""`activations`: every token's activations of prompts, streamed to disk.

Knows: flags and what is printed. Does not know: how activations are collected or stored.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from interp_ablate.cli.generate import prompts_of
from interp_ablate.cli.options import PLAN, ModelSettings, load, tell
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import FloatDtype, setting
from interp_ablate.sites import RESIDUAL_POINTS

Chosen = Literal["all", "prompt", "response"]


@dataclass(frozen=True)
class CollectedTokens(ModelSettings):
    """Which tokens are read, where, and where they go."""

    prompts: tuple[str, ...] = setting(
        help="prompts, or @FILE of prompts (a prompt a line, or a table)",
        positional=True,
        nargs="+",
    )
    out: str = setting(help="folder; each collection is a folder of its own in it")
    tokens: Chosen = setting(
        "all",
        "of the prompt with its template, of the model's own answer (response), or all",
        choices=get_args(Chosen),
    )
    sites: tuple[str, ...] = setting(RESIDUAL_POINTS, "comma-separated points of the stream")
    layers: str | None = setting(None, "A-B, both included (default: all)")
    system: str | None = setting(None, "system prompt", empty=True)
    plan: str | None = setting(None, f"{PLAN}: the edited stream is read")
    stored_dtype: FloatDtype | None = setting(
        None, "of the values on disk (default: the model's)", choices=get_args(FloatDtype)
    )


add = adding(CollectedTokens)


def run(args: Namespace) -> int:
    """Collect, or go on with what a killed call had finished; print the folder and what it holds."""
    from interp_ablate.activations.collection import collect
    from interp_ablate.activations.token_shards import Shards
    from interp_ablate.edits.plan import Plan
    from interp_ablate.errors import InterpAblateError
    from interp_ablate.models.sources import resolve
    from interp_ablate.runs.configuration import check_points, sites_of_model
    from interp_ablate.storage.atomic_files import check_folder

    settings = settings_from(args, CollectedTokens)
    check_points(settings.sites)
    prompts = prompts_of(settings.prompts, settings.system)
    plan = Plan.load(settings.plan) if settings.plan else None
    check_folder(Path(settings.out))
    source = resolve(settings.model, settings.revision).path if settings.model else None
    if source and Path(settings.out).resolve().is_relative_to(Path(source).resolve()):
        raise InterpAblateError(
            f"{settings.out} is in the model's folder, which stays as it is: choose another --out"
        )
    model = load(settings, settings.model)
    sites = sites_of_model(model, settings.sites, settings.layers)
    shards = Shards(settings.out, dtype=settings.stored_dtype)
    with model.applied(plan):
        found = collect(model, prompts, sites, positions=settings.tokens, cache=shards)
    print(found.folder)
    tell(args, repr(found))
    return 0
