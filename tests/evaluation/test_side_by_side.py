"""Side by side: each condition's own answers in one batch, scores of every kind, differences that are marked."""

from __future__ import annotations

import re
from html import unescape

import pytest
import torch
from tiny import N_LAYERS, shared, unit

from interp_ablate import Ablate, Add, Direction, Plan, Site, compare
from interp_ablate.display import marked_differences
from interp_ablate.errors import RunError
from interp_ablate.evaluation.side_by_side import Comparison
from interp_ablate.models.thinking import Generation
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.registry import make_scorer

PROMPTS = ("Hi", "Name two colours of the sky", "Go <on>")


def plans() -> dict[str, Plan | Ablate | None]:
    model, direction = shared(), Direction(unit(), 1.0, Site(1, "resid_post"))
    return {
        "unedited": None,
        "ablated": Plan(Ablate(direction, model.writers)),
        "added": Plan(Add(direction, [Site(1, "resid_post")], coefficient=20.0)),
        "norms kept": Ablate(direction, model.writers, norm_preserving=True),
    }


def test_every_condition_answers_as_it_does_alone(backend: str) -> None:
    model = shared(backend=backend)
    found = compare(model, PROMPTS, plans(), max_new_tokens=6)
    assert found.conditions == tuple(plans())
    baseline = model.logits([*PROMPTS])[:, -1].double().log_softmax(-1)
    for name, plan in plans().items():
        for i, prompt in enumerate(PROMPTS):
            with model.applied(Plan() if plan is None else plan):
                alone = model.generate([prompt], max_new_tokens=6)[0]
                other = model.logits([prompt])[0, -1].double().log_softmax(-1)
            assert found.answers[name][i] == alone
            kl = float((baseline[i].exp() * (baseline[i] - other)).sum())
            assert found.scores["kl_first_token"][name][i] == pytest.approx(kl, abs=1e-5)
    assert found.answers["added"] != found.answers["unedited"]


def test_scores_of_every_kind_stand_beside() -> None:
    scores = {
        "list": ExpressionScorer(("a",)),
        "long": make_scorer("lexicon:length?half=3"),
        "letters": lambda text: float(len(text)),
        "tokens": lambda outputs, baseline: [len(g.tokens) for g in outputs.generations],
    }
    found = compare(shared(), PROMPTS, plans(), scores=scores, max_new_tokens=4)
    frame = found.to_frame()
    assert list(frame.columns[:6]) == [
        "index",
        "prompt",
        "condition",
        "answer",
        "finished",
        "changed",
    ]
    assert len(frame) == len(PROMPTS) * len(plans())
    assert (frame["letters"] == frame["answer"].str.len()).all()
    assert (frame["tokens"] == 4).all() and set(frame["list"]) <= {0.0, 1.0}
    assert frame["long"].notna().any()
    assert not frame[frame["condition"] == "unedited"]["changed"].any()
    for score in ("nothing", lambda: 1.0):
        with pytest.raises((RunError, TypeError)):
            compare(shared(), PROMPTS, plans(), scores={"wrong": score}, max_new_tokens=1)  # type: ignore[dict-item]
    with pytest.raises(RunError, match="no condition"):
        compare(shared(), PROMPTS, {})


def test_differences_are_marked_and_text_is_escaped() -> None:
    marked = marked_differences("I can't walk <it>.", "I can walk <it> now & then.")
    assert "<mark> now &amp; then</mark>" in marked and "&lt;it&gt;" in marked
    assert unescape(re.sub("</?mark>", "", marked)) == "I can walk <it> now & then."
    assert "<mark>" not in marked_differences("same", "same")
    answers = {
        "a": [Generation((1,), "one <b>", True), Generation((2,), "two", True)],
        "b": [Generation((1,), "one <b>", True), Generation((3,), "three", False)],
    }
    found = Comparison(("p<q", [5, 6]), answers, {"s": {"a": [1.0, None], "b": [0.0, 2.0]}})
    page = found._repr_html_()
    assert "<b>" not in page and "p&lt;q" in page and "tokens 5 6" in page
    assert "1 of 2 prompts" in page and "<mark>three</mark>…" in page
    assert "p&lt;q" not in found.to_html(changed_only=True)
    assert len(repr(found)) < 200


def test_one_condition_and_one_prompt_are_enough() -> None:
    found = compare(shared(), "Hi", {"unedited": None}, max_new_tokens=2)
    assert len(found.to_frame()) == 1
    assert torch.tensor(found.scores["kl_first_token"]["unedited"]).abs().max() < 1e-6
    assert N_LAYERS and "0 of 1 prompts" in found.to_html()
