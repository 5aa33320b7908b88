"""Representational independence on tiny models: cosines against plain passes, and pairs whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import D_MODEL, N_LAYERS, editing, forward, shared, source_of, tiny, unit
from torch import Tensor

from interp_ablate import Ablate, Direction, Plan, Site
from interp_ablate.circuits.independence import representational_independence
from interp_ablate.errors import DirectionError
from interp_ablate.models.load import from_hf
from interp_ablate.sites import sites_of

SITE = Site(1, "resid_post")
BASIS = unit(k=2)
FIRST, SECOND = (Direction(row, 1.0, SITE) for row in BASIS)
PROMPTS = ["bring the dog", "why is it so?", "tell me a name"]


def last_tokens(plan: Plan | None) -> np.ndarray:
    """[prompt, site, d_model] at resid_pre of every layer and at the end, from plain forward passes."""
    hf, found = source_of("llama_gqa"), []
    edit = editing(plan) if plan else lambda site, x: x
    for row in shared().encode_all(PROMPTS):
        seen: list[Tensor] = []

        def watched(site: Site, x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            changed = edit(site, x)
            if site.point == "resid_pre" or site == Site(N_LAYERS - 1, "resid_post"):
                seen.append(changed[0, -1].double())
            return changed

        forward(hf, row, watched)
        found.append(torch.stack(seen))
    return torch.stack(found).numpy()


def test_the_table_is_its_definition() -> None:
    table = representational_independence(shared(), FIRST, SECOND, PROMPTS)
    assert len(table) == 2 * (N_LAYERS + 1) and set(table.n) == {len(PROMPTS)}
    writers = [Site(0, "embed"), *sites_of(("attn_out", "mlp_out"), range(N_LAYERS))]
    named = {"first": FIRST, "second": SECOND}
    plain = last_tokens(None)
    for along, ablated in (("first", "second"), ("second", "first")):
        edited = last_tokens(Plan((Ablate(named[ablated], writers),)))
        vector = named[along].vector.numpy()
        old, new = (x @ vector / np.linalg.norm(x, axis=-1) for x in (plain, edited))
        rows = table[table.along == along]
        assert set(rows.ablated) == {ablated}
        np.testing.assert_allclose(rows.cosine, old.mean(0), atol=1e-6)
        np.testing.assert_allclose(rows.cosine_ablated, new.mean(0), atol=1e-6)
        np.testing.assert_allclose(rows.change, np.sqrt(((new - old) ** 2).mean(0)), atol=1e-6)


def test_orthogonal_is_not_independent_and_what_nothing_reads_or_writes_is() -> None:
    table = representational_independence(shared(), FIRST, SECOND, PROMPTS)
    assert table.change.max() > 0.01  # at right angles, and each changes the other
    hf, tokenizer = tiny()
    with torch.no_grad():  # coordinates that no layer writes and no prompt has
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight[:2] = 0
            layer.mlp.down_proj.weight[:2] = 0
        hf.model.embed_tokens.weight[:, :2] = 0
    silent = from_hf(hf, tokenizer, backend="bridge")
    axes = torch.eye(D_MODEL, dtype=torch.float64)[:2]
    apart = representational_independence(
        silent, *(Direction(axis, 1.0, SITE) for axis in axes), PROMPTS
    )
    assert apart.change.max() == 0
    beside = representational_independence(silent, Direction(axes[0], 1.0, SITE), SECOND, PROMPTS)
    assert beside[beside.ablated == "first"].change.max() == 0 < beside.cosine.abs().max()


def test_parallel_directions_and_other_widths_are_refused() -> None:
    with pytest.raises(DirectionError, match="are parallel"):
        representational_independence(shared(), FIRST, -FIRST, PROMPTS)
    with pytest.raises(DirectionError, match="second direction has d_model 3"):
        representational_independence(shared(), FIRST, Direction(torch.ones(3), 1.0, SITE), PROMPTS)
