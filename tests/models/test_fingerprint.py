"""Fingerprints: another model, another question or another plan has another one; the same has the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHATML, make, make_tokenizer, rows_of, tiny, unit
from uncommon import uncommon

from interp_ablate import Ablate, Direction, Plan, Site, collect
from interp_ablate.datasets.filter_rules import ProjectionRule
from interp_ablate.models import fingerprint
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.prompts.chat_format import ChatFormat
from interp_ablate.training.trainable_model import TrainableModel

SITE = Site(1, "resid_pre")
PLAN = Plan((Ablate(unit(), SITE),))
PLAIN = make()


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


CONFIGS = (rope(500.0), {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"eos_token_id": 7})


@pytest.mark.parametrize("config", CONFIGS, ids=("theta", "eps", "activation", "end"))
def test_equal_weights_of_another_config(config: dict[str, Any], backend: str) -> None:
    one, other = make(backend=backend), make(backend=backend, **config)
    assert one.fingerprint == make(backend=backend).fingerprint != other.fingerprint
    tokenizer = make_tokenizer()
    trainable = [TrainableModel(m, tokenizer, one.source) for m in (tiny()[0], tiny(**config)[0])]
    assert trainable[0].fingerprint != trainable[1].fingerprint


def test_another_window_and_another_attention() -> None:
    windows = [make("mistral", sliding_window=size) for size in (16, 64)]
    assert windows[0].fingerprint != windows[1].fingerprint
    model = make()
    before = model.fingerprint
    model.tl.original_model.set_attn_implementation("eager")
    assert model.fingerprint != before == PLAIN.fingerprint


def test_another_way_to_write_a_prompt() -> None:
    hf = tiny()[0]
    made = []
    for template in (CHATML, CHATML.replace("assistant", "model"), None):
        made.append(from_hf(hf, make_tokenizer(template)).fingerprint)
    made.append(from_hf(hf, make_tokenizer(), template="none").fingerprint)
    made.append(from_hf(hf, make_tokenizer(), template=ChatFormat(response_prefix="a")).fingerprint)
    args = ChatFormat(CHATML + "{% if thinking %}a{% endif %}", {"thinking": False})
    made.append(from_hf(hf, make_tokenizer(), template=args).fingerprint)
    more = make_tokenizer()
    more.add_tokens(["<thought>"])
    made.append(from_hf(hf, more).fingerprint)
    assert len(set(made)) == 7 and made[0] == PLAIN.fingerprint
    tokenizer = make_tokenizer()
    tokenizer("a b", truncation=True, max_length=1)  # which fast tokenizers remember
    assert from_hf(hf, tokenizer).fingerprint == PLAIN.fingerprint


def weight(model: Model) -> Any:
    return next(p for n, p in model.tl.named_parameters() if "mlp" in n)


def test_weights_are_hashed_once_until_one_is_written(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hashed = make(backend=backend), []
    whole = fingerprint._bytes

    def counted(tensor: torch.Tensor) -> bytes:
        hashed.append(tensor.numel())
        return whole(tensor)

    monkeypatch.setattr(fingerprint, "_bytes", counted)
    sizes = [p.numel() for p in model.tl.parameters()]
    largest, n_largest = max(sizes), sizes.count(max(sizes))
    made = [model.fingerprint for _ in range(3)]
    assert len(set(made)) == 1 and hashed.count(largest) == n_largest
    with torch.no_grad():
        weight(model)[0, 0] += 1  # one number
    made.append(model.fingerprint)
    weight(model).data.mul_(2)  # torch does not count this write
    made.append(model.fingerprint)
    weight(model).data = weight(model).data.clone().neg_()
    made.append(model.fingerprint)
    with torch.no_grad():
        weight(model).mul_(-1)
    assert len(set(made)) == 4 and model.fingerprint == made[-2]
    assert hashed.count(largest) == 5 * n_largest


@torch.no_grad()
def test_passes_change_nothing() -> None:
    """Rotary tables of long RoPE grow and shrink while a model runs."""
    model = uncommon("phi3:longrope")
    before = model.fingerprint, model.state
    model.generate(rows_of(30, 20), max_new_tokens=6)
    assert (model.fingerprint, model.state) == before


def test_plans_and_hooks(tmp_path: Path, backend: str) -> None:
    model = make(backend=backend)
    plain = model.fingerprint
    rule = ProjectionRule(model=model, direction=Direction(unit(), 1.0, SITE), above=0.0)
    before = rule.identity
    with model.applied(PLAN):
        assert model.fingerprint != plain and rule.identity != before
        inside = model.fingerprint
        with model.applied(PLAN):
            assert model.fingerprint not in (plain, inside)
            model.logits(rows_of(5))
    with model.applied_each([PLAN, None]):
        assert model.fingerprint not in (plain, inside)
        model.logits(rows_of(5, 6))
    handle = model.hook_point(SITE).register_forward_hook(lambda module, args, x: 2 * x)
    assert model.fingerprint != model.fingerprint
    hooked = collect(model, rows_of(5), [SITE], cache=tmp_path).values
    assert not list(tmp_path.iterdir())
    handle.remove()
    assert model.fingerprint == plain and rule.identity == before
    collect(model, rows_of(5), [SITE], cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    model.hook_point(SITE).register_forward_hook(lambda module, args, x: 2 * x)
    assert torch.equal(collect(model, rows_of(5), [SITE], cache=tmp_path).values, hooked)
    assert list(tmp_path.iterdir()) == [kept]
