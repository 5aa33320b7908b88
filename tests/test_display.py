"""What a terminal and a notebook show of each type: short, escaped, of this value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import N_LAYERS, make, shared, unit

from interp_ablate import Add, ContrastSet, Direction, Directions, Plan, Prompt, collect, sites_of
from interp_ablate.display import html_of, html_table, shortened
from interp_ablate.evaluation.outputs import ModelOutputs

LONG = "<b>very long & bad</b>\n" * 300


def values() -> dict[str, Any]:
    model = shared()
    sites = sites_of(("resid_pre", "resid_mid", "resid_post"), range(200))
    directions = Directions(tuple(Direction(torch.randn(4096), 1.0, s, source=LONG) for s in sites))
    texts = [f"{i} {LONG}" for i in range(60)]
    contrast = ContrastSet.from_texts(texts[:30], texts[30:], name=LONG)
    plan = Plan(tuple(Add(unit(i), model.writers) for i in range(40)))
    outputs = ModelOutputs(model, [Prompt("<b>Hi</b>")], plan, max_new_tokens=2)
    assert not outputs.has_generations
    return {
        "Model": model,
        "Directions": directions,
        "Direction": directions.items[0],
        "Plan": plan,
        "ContrastSet": contrast,
        "Split": contrast.split(10, 10, 10),
        "Activations": collect(model, ["Hi", "<b>"]),
        "Generation": type(model.generate(["Hi"], max_new_tokens=1)[0])((1,) * 9000, LONG, True),
        "ModelOutputs": outputs,
    }


@pytest.mark.parametrize("name", values())
def test_every_type_is_short_and_escaped(name: str) -> None:
    value = values()[name]
    text = repr(value)
    assert len(text) < 320 and "\n" not in text and name in text
    page = value._repr_html_()
    assert "<b>" not in page and ("<table>" in page or "<pre>" in page)
    assert len(page) < 400_000 if name == "Directions" else len(page) < 20_000


def test_a_look_computes_nothing() -> None:
    outputs = values()["ModelOutputs"]
    outputs._repr_html_(), repr(outputs)
    assert not outputs.has_generations


@pytest.mark.parametrize("kind", ("llama_gqa", "gpt2", "gpt_neox"))
def test_the_tree_shows_the_sites_that_there_are(kind: str) -> None:
    model = make(kind)
    tree = model._repr_html_()
    assert ("resid_mid" in tree) == ("resid_mid" in model.residual_points)
    assert ("pos_embed" in tree) == (kind == "gpt2")
    assert f"layers 0 to {N_LAYERS - 1}" in tree and tree.count(" *") >= 4


def test_the_pieces() -> None:
    assert shortened("a  b\nc") == "a b c" and shortened("x" * 99, 10) == "x" * 9 + "…"
    assert html_of("<\x00&") == "&lt;␀&amp;" and html_of(html_of("<")) == "&lt;"
    assert html_of(0.123456) == "0.1235" and "<td>&lt;</td>" in html_table(("a",), [("<",)])
