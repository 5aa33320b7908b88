"""Random plans on every tiny architecture: hooks == a plain oracle, and == edited weights wherever these are exact.

Some hundred in a minute; `make fuzz` tries more. A failure names the architecture and the plan's number, which make it
again: INTERP_ABLATE_FUZZ=N tries the plans up to N of each architecture.
"""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import (
    EVERY,
    TOLERANCE,
    edited,
    hooked_logits,
    is_norm_preserving,
    logits_of,
    moved,
    oracle,
    plain,
)
from tiny import N_LAYERS, PARTS, make, shared, source_of, unit
from transformers import AutoModelForCausalLM

from interp_ablate import Ablate, Add, Clamp, Plan, Site, export_checkpoint, sites_of
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import ExportError, PlanError

PLANS = int(os.environ.get("INTERP_ABLATE_FUZZ", "8"))
RELOADED = 4  # the plan of this number is exported to a folder and loaded again


def some_sites(draw: random.Random, kind: str) -> list[Site]:
    """One site, a few, a band, all writers, or every place of the residual stream."""
    parts = PARTS[kind]
    writers = list(parts.writers)
    which = draw.choice(("one", "few", "band", "writers", "writers", "residual"))
    if which == "one":
        return [draw.choice(writers)]
    if which == "few":
        return sorted(draw.sample(writers, draw.randint(2, len(writers))), key=writers.index)
    if which == "band":
        first = draw.randrange(N_LAYERS)
        return list(sites_of(tuple(parts.points[-2:]), range(first, N_LAYERS)))
    return writers if which == "writers" or parts.attn_norm else list(parts.residual)


def random_edit(draw: random.Random, kind: str) -> Any:
    """An edit of any kind, at any sites, of any strength; most of them have an exact weight form."""
    sites, seed = some_sites(draw, kind), draw.randrange(1000)
    whole = any(site.point.startswith("resid") for site in sites)
    strengths = 1.0 if whole else [round(draw.uniform(-0.5, 2.0), 3) for _ in sites]
    positions: Any = draw.choice(("all",) * 18 + ("prompt", "generated"))
    op = draw.choice(("ablate",) * 5 + ("norm-preserving", "erase", "erase", "add", "clamp"))
    if op == "norm-preserving" and not whole and not PARTS[kind].attn_norm:
        vectors = unit(seed, k=draw.randint(1, 3))
        return Ablate(vectors, sites, strength=strengths, norm_preserving=True)
    if op == "erase":
        return Erase(unit(seed), unit(seed) + 0.5 * unit(seed + 1), sites, strength=strengths, positions=positions)  # fmt: skip
    if op == "add":
        sites = draw.choice((sites, [Site(0, "embed")]))
        return Add(unit(seed), sites, coefficient=draw.uniform(-2, 2), positions=positions)
    if op == "clamp":
        return Clamp(unit(seed), sites[:1], value=draw.uniform(-2, 2), positions=positions)
    rank = draw.choice((1, 1, 1, 2, 3))
    return Ablate(unit(seed, k=rank), sites, strength=strengths, positions=positions)


def random_plan(kind: str, number: int) -> tuple[Plan, bool]:
    """The plan of a number, and whether its model's embedding is tied."""
    draw = random.Random(zlib.crc32(f"{kind} {number}".encode()))
    edits = [random_edit(draw, kind) for _ in range(draw.choice((1, 1, 2, 3)))]
    return Plan(tuple(edits)), draw.random() < 0.5


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], what: str) -> None:
    size = max(1.0, *(float(each.abs().max()) for each in want))
    assert moved(got, want) <= 2 * TOLERANCE * size, what


@pytest.mark.parametrize("kind", EVERY)
def test_random_plans(kind: str, tmp_path: Path) -> None:
    exact = 0
    for number in range(PLANS):
        plan, tied = random_plan(kind, number)
        what = f"{kind}, plan {number}, tied {tied}: {plan!r}"
        source, model = source_of(kind, tied), shared(kind, tied=tied)
        try:
            hooked = hooked_logits(model, plan)
        except PlanError:  # norm-preserving at fused experts, clamps before a norm
            continue
        positional = any(edit.positions != "all" for edit in plan)
        if not is_norm_preserving(plan):
            assert_close(hooked, oracle(source, kind, plan), f"hooks and oracle of {what}")
        try:
            weights = logits_of(edited(source, plan, entry=model.architecture)[0])
        except ExportError:
            continue
        assert not positional, f"weights act at every position: {what}"
        assert_close(weights, hooked, f"weights and hooks of {what}")
        exact += moved(hooked, plain(kind, tied)) > 1e-3
        if number == RELOADED:
            folder = tmp_path / "export"
            assert export_checkpoint(make(kind, tied=tied), plan, folder)["passed"], what
            again = AutoModelForCausalLM.from_pretrained(folder)
            assert_close(logits_of(again), hooked, f"the reloaded export of {what}")
    assert exact >= PLANS // 4, f"only {exact} of {PLANS} plans were compared with weights"
