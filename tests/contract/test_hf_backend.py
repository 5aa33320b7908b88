"""Plain transformers as a backend: the same as the Bridge site by site, and exact exports of what no Bridge runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_models import build
from support.hand_hooked import check, left_along
from support.tiny import make_tokenizer

from interp_ablate import Plan
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.errors import ModelError, PlanError
from interp_ablate.export.checkpoint import export_checkpoint
from interp_ablate.models.load import from_hf, load_model
from interp_ablate.models.model import Model
from interp_ablate.sites import POINTS, Site, sites_of

ROWS = [[*range(5, 14), 20], [*range(5, 14), 99, 98, 97], [3, 4, 5]]


def both(model_type: str) -> tuple[Model, Model]:
    hf = build(model_type)
    bridge = from_hf(copy.deepcopy(hf), make_tokenizer(), backend="bridge")
    return bridge, from_hf(hf, make_tokenizer(), backend="hf")


def values(model: Model, sites: list[Site]) -> dict[Any, torch.Tensor]:
    """The last two positions of every row at every site."""
    capture = dict.fromkeys(sites, lambda x, batch: x[:, -2:].clone())
    by_row: dict[Any, torch.Tensor] = {}
    for batch, _, captured in model.stream(ROWS, keep=0, capture=capture, tail=2):
        for site, rows in captured.items():
            by_row.update(
                {
                    (site, i): row
                    for row, i in zip(rows.expand(len(batch.index), -1, -1), batch.index)
                }
            )
    return by_row


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral", "qwen3"])
def test_the_bridge_and_plain_transformers_agree_site_by_site(model_type: str) -> None:
    bridge, plain = both(model_type)
    assert bridge.writers == plain.writers and bridge.residual_points == plain.residual_points
    sites = [
        site
        for site in sites_of(POINTS, range(plain.n_layers))
        if plain._backend.hook_point(site) is not None
    ]
    want, got = values(bridge, sites), values(plain, sites)
    assert want.keys() == got.keys()
    for key, x in want.items():
        torch.testing.assert_close(got[key], x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.logits(ROWS), bridge.logits(ROWS), rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    v, w = torch.randn(2, plain.d_model)
    middle = [Site(1, p) for p in plain.residual_points]
    for plan in (Ablate(v, plain.writers), Ablate(v, middle), Add(w, middle[-1:], coefficient=2.0)):
        with bridge.applied(plan), plain.applied(plan):
            torch.testing.assert_close(
                plain.logits(ROWS), bridge.logits(ROWS), rtol=1e-4, atol=1e-5
            )
    each = [Ablate(v, plain.writers), None, Add(w, middle[-1:])]
    with bridge.applied_each(each), plain.applied_each(each):
        torch.testing.assert_close(plain.logits(ROWS), bridge.logits(ROWS), rtol=1e-4, atol=1e-5)
    answers = [[g.tokens for g in m.generate(ROWS, max_new_tokens=5)] for m in (bridge, plain)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model_type", ["gemma4_text", "olmo_hybrid"])
def test_several_norms_at_a_site_and_blocks_of_two_kinds(model_type: str, tmp_path: Path) -> None:
    """Refused before: "2 branches write at mlp_out, and norms follow them"; "some blocks have norms"."""
    hf = build(model_type)
    for i, layer in enumerate(hf.model.layers):
        if hasattr(layer, "layer_scalar"):
            layer.layer_scalar.fill_(0.3 + 0.2 * i)
    model = from_hf(hf, make_tokenizer())
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    plans = [Plan((Ablate(r, model.writers, strength=s),)) for s in (1.0, 0.5)]
    for plan in (*plans, Plan((Ablate(r, model.writers[3:6]),))):
        certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS, overwrite=True)
        assert certificate["passed"] and certificate["max_abs_logit_effect_of_plan"] > 1e-3
        if plan is plans[0]:
            assert left_along(tmp_path / "out", r, ROWS) < 1e-5
    each = [plans[0], None, plans[1]]
    alone = [model.logits([row], keep=1) for row in ROWS]
    with model.applied_each(each):
        got = model.logits(ROWS)
    for i, plan in enumerate(each):
        with model.applied(plan or Plan()):
            alone[i] = model.logits([ROWS[i]])
        torch.testing.assert_close(got[i], alone[i][0], rtol=1e-3, atol=1e-4)
    with pytest.raises(PlanError, match="before a norm"):
        export_checkpoint(
            model,
            Plan((Add(r, [s for s in model.writers if s.point == "mlp_proj"][-1:]),)),
            tmp_path / "add",
            prompts=ROWS,
        )


def test_the_text_tower_of_a_wrapped_model_is_edited_alone(tmp_path: Path) -> None:
    hf = build("gemma3")
    before = {name: p.clone() for name, p in hf.named_parameters()}
    model = from_hf(hf, make_tokenizer())
    assert model.backend == "hf"
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    certificate = export_checkpoint(
        model, Plan((Ablate(r, model.writers),)), tmp_path / "out", prompts=ROWS
    )
    assert certificate["passed"]
    reloaded = type(hf).from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, p in reloaded.named_parameters():
        same = torch.equal(p, before[name]) if name in before else True
        written = any(part in name for part in ("o_proj", "down_proj", "embed_tokens"))
        assert same or (written and "language_model" in name), name


def test_a_wrapped_model_from_its_folder(tmp_path: Path) -> None:
    """From load to a certified export, with names in the files that are not those in memory."""
    hf = build("gemma3")
    hf.save_pretrained(tmp_path / "in")
    make_tokenizer().save_pretrained(tmp_path / "in")
    model = load_model(tmp_path / "in")
    assert model.backend == "hf"
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    plan = Plan((Ablate(r, model.writers),))
    assert export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)["passed"]
    found = check(hf, tmp_path / "out", r, ROWS)
    assert found["left"] < 1e-5 and found["logits"] < 1e-4 < found["effect"]


def test_what_the_bridge_would_install_packages_for_is_refused() -> None:
    with pytest.raises(ModelError, match="pip install torchvision"):
        from_hf(build("gemma3"), make_tokenizer(), backend="bridge")


def test_the_missing_transformer_lens_object_says_what_there_is() -> None:
    model = from_hf(build("llama"), None, backend="hf")
    assert model.tl.cfg.n_layers == model.n_layers and model.tl.hf is not None
    with pytest.raises(AttributeError, match=r"plain transformers.*model\.applied"):
        model.tl.run_with_cache(None)
