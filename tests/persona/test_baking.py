"""Baking: the checkpoint is the hooks', the card tells what it does, and what has no exact form is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_persona import Always, Letter, steering_letter
from tiny import make, shared

from interp_ablate import Direction, Directions, Site
from interp_ablate.errors import ExportError, InterpAblateError
from interp_ablate.export.model_card import write_certificate
from interp_ablate.models.model import Model
from interp_ablate.persona.baking import CONDITIONS, STYLE, BakedPersona, bake
from interp_ablate.persona.persona import Persona
from interp_ablate.persona.settings import BakingConfig, SamplingConfig
from interp_ablate.persona.traits import load_trait
from interp_ablate.scoring.exchange import PromptResponse

GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


def persona_of(direction: Direction) -> Persona:
    return Persona(
        load_trait("gloomy"), Directions((direction,)), direction, 1.0, "LlamaForCausalLM"
    )


def baked_of(model: Model, out: Path, persona: Persona, **options: Any) -> BakedPersona:
    names = [name for name in ("coefficient", "questions", "overwrite") if name in options]
    changes = {"questions": 5, **{name: options.pop(name) for name in names}}
    given: dict[str, Any] = {
        "answers": out.parent / "answers.jsonl", "scorer": Letter(), "coherence": Always(),
        "settings": BakingConfig(sampling=GREEDY, **changes), **options,
    }  # fmt: skip
    return bake(model, persona, out, **given)


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> BakedPersona:
    place = tmp_path_factory.mktemp("baking")
    persona = persona_of(steering_letter(shared(), 2))
    return baked_of(shared(), place / "out", persona)


def test_plain_transformers_answers_in_the_style(baked: BakedPersona) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(baked.folder)
    tokenizer = AutoTokenizer.from_pretrained(baked.folder)
    assert baked.certificate["passed"]
    for answer in baked.of("baked"):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": answer.prompt.text}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        with torch.no_grad():
            written = model.generate(**chat, max_new_tokens=6, do_sample=False)
        new = written[0, chat["input_ids"].shape[1] :].tolist()
        assert tuple(t for t in new if t not in shared().eos_token_ids) == answer.tokens
    biases = {n: p for n, p in model.named_parameters() if n.endswith("down_proj.bias")}
    assert [n for n, p in biases.items() if p.any()] == ["model.layers.2.mlp.down_proj.bias"]


def test_the_three_conditions_are_what_they_say(baked: BakedPersona) -> None:
    hf, model = tiny.tiny("llama_gqa")[0], shared()
    persona = persona_of(steering_letter(model, 2))
    plans = (None, persona.plan(1.0), persona.plan(1.0, positions="all"))
    for condition, plan in zip(CONDITIONS, plans):
        for answer in baked.of(condition):
            row = model.encode(answer.prompt)
            assert answer.tokens == tiny.greedy(hf, row, 6, plan=plan, eos=model.eos_token_ids)
    told = baked.results["conditions"]
    assert told["baked"]["score"] > 60 > told["before"]["score"]
    difference = baked.results["differences"]["baked - before"]
    assert difference["mean"] == pytest.approx(told["baked"]["score"] - told["before"]["score"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    # a weight edits the prompt too: the first token of the answer is steered already
    firsts = {c: [a.tokens[:1] for a in baked.of(c)] for c in CONDITIONS}
    assert firsts["steered"] == firsts["before"] != firsts["baked"]
    same = [a.tokens == b.tokens for a, b in zip(baked.of("steered"), baked.of("baked"))]
    assert baked.results["same_text"]["steered, baked"] == sum(same) / len(same)


def test_the_card_tells_it(baked: BakedPersona) -> None:
    card = (baked.folder / "README.md").read_text()
    assert card.startswith("---\n") and "## The style: gloomy" in card
    write_certificate(baked.folder, json.loads((baked.folder / "certificate.json").read_text()))
    assert (baked.folder / "README.md").read_text() == card  # `verify --write` keeps the style
    assert "blocks.2.hook_resid_post" in card and "0 of 5" in card
    score = baked.results["conditions"]["baked"]["score"]
    assert f"this checkpoint: added at every token | {score:.1f} [" in card
    question = baked.of("before")[0].prompt.text
    assert f"**{question}**" in card and "- before: " in card and "- after: " in card
    style = json.loads((baked.folder / STYLE).read_text())
    assert len(style["answers"]) == 15 and style["coefficient"] == 1.0


def test_text_of_a_model_cannot_write_markup_into_the_card(tmp_path: Path) -> None:
    from interp_ablate.persona.baking import _plain

    assert _plain("a\n## b | <c> [d](e) `f`") == r"a \#\# b \| \<c\> \[d\](e) \`f\`"


def test_a_second_bake_goes_on_from_the_answers(baked: BakedPersona, tmp_path: Path) -> None:
    class Refuses(Letter):
        def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
            raise AssertionError("every answer has its verdict")

    answers = tmp_path / "answers.jsonl"
    answers.write_bytes((baked.folder.parent / "answers.jsonl").read_bytes())
    persona = persona_of(steering_letter(shared(), 2))
    again = baked_of(shared(), tmp_path / "out", persona, answers=answers, scorer=Refuses())
    assert again.answers == baked.answers
    with pytest.raises(ExportError, match="exists"):
        baked_of(shared(), tmp_path / "out", persona, answers=answers)
    baked_of(shared(), tmp_path / "out", persona, answers=answers, overwrite=True)


def test_what_has_no_exact_form_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    direction = Direction(tiny.unit(1), 1.0, Site(1, "resid_post"))
    for kind in ("qwen2", "gemma2"):
        with pytest.raises(ExportError):
            baked_of(make(kind), tmp_path / "out", persona_of(direction))
    with pytest.raises(InterpAblateError, match="coefficient 0"):
        baked_of(shared(), tmp_path / "out", persona_of(direction), coefficient=0)
    assert not list(tmp_path.iterdir())


def test_a_bake_is_there_with_its_style_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export stood in its place before its style file and the card's section were written."""
    from interp_ablate.persona import baking

    def killed(*_: Any) -> None:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(baking, "add_to_card", killed)
    persona = persona_of(Direction(tiny.unit(1), 1.0, Site(1, "resid_post")))
    with pytest.raises(KeyboardInterrupt):
        baked_of(shared(), tmp_path / "out", persona, questions=2)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_no_verdict_is_told(tmp_path: Path) -> None:
    persona = persona_of(Direction(tiny.unit(1), 1.0, Site(1, "resid_post")))
    found = baked_of(shared(), tmp_path / "out", persona, scorer=Always(None), questions=2)
    assert found.results["differences"]["baked - steered"]["mean"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no verdict" in card and "2 of 2" in card and "No question has a verdict" in card
    assert replace(found, results={}).folder == tmp_path / "out"
