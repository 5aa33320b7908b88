"""Scores: the parts that need no model, against direct computation in float64; answers made together."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import N_LAYERS, forward, rows_of, shared, source_of, tiny, unit
from torch import Tensor
from torch.nn.functional import kl_div
from torch.testing import assert_close

from interp_ablate.edits.kinds import Ablate, Add, Erase
from interp_ablate.edits.plan import Plan, everywhere
from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.metrics import (
    TargetLogOdds,
    answer_metrics,
    continuation_scores,
    find_target_tokens,
    first_token_kl,
    kl_divergence,
    repetition,
)
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.thinking import Generation
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.readers import bundled_names
from interp_ablate.scoring.expression_lists import (
    EXPRESSIONS_OF_CONTRAST,
    bundled_expressions,
    expression_names,
)
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.text_folding import fold

SEEDS = range(5)
EXPRESSIONS = {
    name: tuple(e.text for e in bundled_expressions(name)) for name in expression_names()
}


def logprobs(
    seed: int, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return draws.log_softmax(-1).to(dtype)


# --------------------------------------------------------------------------------- text


@pytest.mark.parametrize("mark", "'\u2018\u2019\u201b\u02bc\u00b4`\uff07\uff40")
def test_apostrophes_are_folded(mark: str) -> None:
    assert fold(f"I{mark}M sorry") == "i'm sorry"
    assert ExpressionScorer().matches(f"Oh, I{mark}m  Sorry.")


def test_an_acute_accent_is_an_apostrophe() -> None:
    assert fold("I don\u00b4t") == "i don't"


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("I\u00a0can\n\tNOT", "i can not"),
        ("\u201cno\u201d \u201eno\u201c", '"no" "no"'),
        ("\uff29 \ufb01x", "i fix"),
        ("Stra\u00dfe", "strasse"),
        ("e\u0301t\u00e9", "\u00e9t\u00e9"),
        ("", ""),
    ],
)
def test_fold(text: str, folded: str) -> None:
    assert fold(text) == folded


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_folding_twice_is_folding_once(name: str) -> None:
    for phrase in EXPRESSIONS[name]:
        for text in (phrase, phrase.upper().replace("'", "\u2019"), f"\u201c{phrase}\u201d"):
            assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_built_in_phrase_finds_itself(name: str) -> None:
    scorer = ExpressionScorer(name)
    for phrase in EXPRESSIONS[name]:
        curly = phrase.upper().replace("'", "\u2019").replace(" ", "  ")
        text = f"Well: {curly} ..."
        [hit] = [match for match in scorer.matches(text) if match.expression == phrase]
        assert fold(text)[hit.start : hit.end] == fold(phrase).strip()
        assert scorer.score_texts([text, "", "###"]).tolist() == [1.0, 0.0, 0.0]


def test_every_bundled_contrast_of_a_behaviour_has_a_list() -> None:
    in_prompts_alone = {"bad_news", "first_person", "formality", "listing", "questions"}
    assert set(EXPRESSIONS_OF_CONTRAST) == set(bundled_names()) - in_prompts_alone
    assert set(EXPRESSIONS_OF_CONTRAST.values()) <= set(EXPRESSIONS)


def test_phrases_match_at_word_boundaries() -> None:
    scorer = ExpressionScorer(("can't", "love", "l'", "...", "n\u00e9e"))
    matched = {
        "can't": "can't",
        "I can't!": "can't",
        "(love)": "love",
        "l'eau": "l'",
        "Well...yes": "...",
        "NE\u0301E": "n\u00e9e",
    }
    for text, expression in matched.items():
        assert [match.expression for match in scorer.matches(text)] == [expression]
    for text in (
        "cantata",
        "scan't",
        "gloves",
        "lovely",
        "beloved",
        "all'alba",
        "..",
        "journ\u00e9e",
    ):
        assert scorer.matches(text) == []


def test_matches_are_first_places_in_the_folded_text() -> None:
    scorer = ExpressionScorer(("no", "never"), patterns=(r"\bn\w+r\b",))
    text = "\u201cNever\u201d, no, NO."
    assert [(m.expression, m.start, m.end) for m in scorer.matches(text)] == [
        ("no", 9, 11),
        ("never", 1, 6),
        (r"\bn\w+r\b", 1, 6),
    ]
    assert scorer.score_texts([text, "yes"]).tolist() == [1.0, 0.0]


def test_punctuation_in_a_phrase_is_no_regular_expression() -> None:
    scorer = ExpressionScorer(("a.c", "what?", "(x)"))
    assert not scorer.matches("abc wha x") and len(scorer.matches("A.C what? (x)")) == 3


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        ({"expressions": "refusing"}, "'refusing': there are declining"),
        ({"expressions": ()}, "at least one"),
        ({"expressions": ("", "  \n")}, "at least one"),
        ({"expressions": (), "patterns": ("(",)}, r"malformed regular expression '\('"),
        ({"patterns": ("ok", "[a-")}, "'\\[a-'"),
    ],
)
def test_bad_expressions_fail_at_once(kwargs: dict[str, Any], part: str) -> None:
    with pytest.raises(InterpAblateError, match=part):
        ExpressionScorer(**kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"expressions": (3,)}, {"patterns": (3,)}, {"patterns": "sorry"}, {"expressions": 3}]
)
def test_expressions_are_text(kwargs: dict[str, Any]) -> None:
    with pytest.raises(InterpAblateError, match="texts"):
        ExpressionScorer(**kwargs)


# --------------------------------------------------------------------------------- target log-odds


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tokens", [(0,), (3, 17), (17, 3, 3), tuple(range(39))])
def test_log_odds_are_log_p_minus_log_one_minus_p(seed: int, tokens: tuple[int, ...]) -> None:
    values = logprobs(seed, 6, 40)
    p = values.exp()[:, sorted(set(tokens))].sum(-1)
    found = TargetLogOdds(tokens).of_logprobs(values)
    assert_close(found, p.log() - (-p).log1p(), rtol=1e-9, atol=1e-9)
    rest = tuple(sorted(set(range(40)) - set(tokens)))
    assert_close(TargetLogOdds(rest).of_logprobs(values), -found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gap", [-700.0, -80.0, -40.0, 40.0, 80.0, 700.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_near_p_of_0_and_1(gap: float, dtype: torch.dtype) -> None:
    """log p - log(1 - p) written out gives -inf, inf or NaN here."""
    logits = torch.tensor([[gap, 0.0, 0.0], [gap + 5, 5.0, -1e4]], dtype=dtype)
    found = TargetLogOdds((0,)).of_logprobs(logits.log_softmax(-1))
    expected = torch.tensor([gap - math.log(2), gap], dtype=torch.float64)
    assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_log_odds_grow_with_the_targets_and_are_read_from_evidence() -> None:
    values = logprobs(0, 5, 30)
    found = [TargetLogOdds(tuple(range(k))).of_logprobs(values) for k in range(1, 30)]
    assert all((b > a).all() for a, b in pairwise(found))
    evidence: Any = SimpleNamespace(first_logprobs=values, require_answer_next=lambda: None)
    assert torch.equal(TargetLogOdds((0,))(evidence, evidence), found[0])


@pytest.mark.parametrize("tokens", [(), (40,), (-1,)])
def test_target_tokens_are_checked(tokens: tuple[int, ...]) -> None:
    with pytest.raises(InterpAblateError, match="target token"):
        TargetLogOdds(tokens).of_logprobs(logprobs(0, 2, 40))


# --------------------------------------------------------------------------------- target tokens


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_target_tokens_are_those_with_the_largest_gaps(seed: int, share: float) -> None:
    positive, negative = logprobs(seed, 9, 30), logprobs(seed + 50, 7, 30)
    p, q = positive.exp().mean(0).tolist(), negative.exp().mean(0).tolist()
    ranked = sorted(range(30), key=lambda t: q[t] - p[t])[:5]
    largest = p[ranked[0]] - q[ranked[0]]
    expected = [t for t in ranked if p[t] - q[t] >= share * largest]
    found = find_target_tokens(positive, negative, at_most=5, share=share)
    assert [token for token, _, _ in found] == expected
    for token, after_positive, after_negative in found:
        assert after_positive == pytest.approx(p[token]) and after_negative == pytest.approx(
            q[token]
        )
    assert find_target_tokens(positive, negative, at_most=99, share=1.0)[0] == found[0]


def test_no_target_token_where_the_sets_agree() -> None:
    values = logprobs(0, 5, 30)
    for other in (values, values.flip(0)):
        with pytest.raises(InterpAblateError, match="TargetLogOdds"):
            find_target_tokens(values, other)


# --------------------------------------------------------------------------------- KL


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(40,), (6, 40), (3, 4, 40)])
def test_kl_is_torchs(seed: int, shape: tuple[int, ...]) -> None:
    reference, other = logprobs(seed, *shape), logprobs(seed + 50, *shape, scale=9.0)
    expected = kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    found = kl_divergence(reference, other)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (found > 0).all() and found.shape == shape[:-1]
    assert not torch.allclose(found, kl_divergence(other, reference))
    assert torch.equal(kl_divergence(reference, reference), torch.zeros(shape[:-1]).double())


def test_kl_keeps_what_float32_would_lose() -> None:
    """No epsilon and no float32 sum: a divergence of 1e-9 comes out right."""
    reference = logprobs(0, 4, 5000)
    other = (reference + 1e-4 * torch.sin(torch.arange(5000.0).double())).log_softmax(-1)
    expected = kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    assert (expected < 1e-7).all()
    assert_close(kl_divergence(reference, other), expected, rtol=1e-6, atol=1e-16)
    certain = torch.tensor([0.0, -2000.0]).log_softmax(-1)
    assert float(kl_divergence(certain, certain.flip(0))) == pytest.approx(2000)


def test_first_token_kl_is_of_the_unedited_model_from_the_edited() -> None:
    edited: Any = SimpleNamespace(
        first_logprobs=logprobs(0, 3, 8), require_answer_next=lambda: None
    )
    unedited: Any = SimpleNamespace(first_logprobs=logprobs(1, 3, 8))
    expected = kl_divergence(unedited.first_logprobs, edited.first_logprobs)
    assert torch.equal(first_token_kl(edited, unedited), expected)


# --------------------------------------------------------------------------------- repetition, length


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_repetition_against_a_loop(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 3, (25,), generator=generator).tolist()
    seen: set[tuple[int, ...]] = set()
    again = 0
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        again += gram in seen
        seen.add(gram)
    assert repetition(tokens, n) == pytest.approx(again / (len(tokens) - n + 1))


def test_repetition_at_its_ends() -> None:
    assert repetition(list(range(50))) == 0.0
    assert repetition([7] * 50) == pytest.approx(1 - 1 / 48)
    assert repetition([1, 2, 3, 4] * 10) == pytest.approx(1 - 4 / 38)
    for length in range(4):
        assert repetition([5] * length) == 0.0
    assert repetition([5] * 4) == 0.5


def test_repetition_of_a_tensor() -> None:
    assert repetition(torch.tensor([7] * 50)) == pytest.approx(1 - 1 / 48)


def test_repetition_and_length_are_numbers_a_prompt() -> None:
    answers = [(), (1, 2), (4,) * 10]
    evidence: Any = SimpleNamespace(
        generations=[Generation(tokens=t, text="x" * len(t), finished=True) for t in answers]
    )
    metrics = answer_metrics(evidence)
    assert metrics["repetition"] == pytest.approx([0, 0, 1 - 1 / 8])
    assert metrics["length"] == [0.0, 2.0, 10.0] and metrics["empty"] == [1.0, 0.0, 0.0]


def test_answer_metrics_are_values_a_prompt_beside_the_baselines() -> None:
    model = shared(eos_token_id=None)
    unedited = ModelOutputs(model, ["a b c", "d e", "f"], max_new_tokens=6)
    edited = unedited.with_plan(Plan((Ablate(unit(1), everywhere(N_LAYERS)),)))
    first, *others = unedited.generations
    unedited.generations = [replace(first, tokens=(), text=" "), *others]
    scorers = {"targets": TargetLogOdds((1,)), "asked": lambda own, base: [None, 1.0, 2.0]}
    metrics = answer_metrics(edited, unedited, scorers)
    assert metrics["repetition"] == [repetition(g.tokens) for g in edited.generations]
    assert metrics["length"] == [6.0, 6.0, 6.0] and metrics["empty"] == [0.0, 0.0, 0.0]
    assert metrics["kl_first_token"] == first_token_kl(edited, unedited).tolist()
    along = continuation_scores(edited, unedited)["kl_continuation"].tolist()
    assert metrics["kl_continuation"] == [None, *along[1:]] and min(along[1:]) > 0
    assert metrics["targets"] == TargetLogOdds((1,))(edited, unedited).tolist()
    assert metrics["asked"] == [None, 1.0, 2.0]
    alone = answer_metrics(unedited)
    assert set(alone) == {"repetition", "length", "empty"} and alone["empty"] == [1.0, 0.0, 0.0]


def test_exchanges_are_the_prompts_with_their_answers() -> None:
    model = shared()
    outputs = ModelOutputs(model, ["a b", Prompt("c", "d")], max_new_tokens=3)
    assert [each.prompt for each in outputs.exchanges] == [Prompt("a b"), Prompt("c", "d")]
    assert [each.answer for each in outputs.exchanges] == outputs.texts
    assert outputs.subset([1]).exchanges == outputs.exchanges[1:]
    with pytest.raises(InterpAblateError, match="token ids"):
        _ = ModelOutputs(model, [model.encode("a")], max_new_tokens=2).exchanges


# --------------------------------------------------------------------------------- together


EVERYWHERE = everywhere(N_LAYERS)
PLANS = (
    None,
    Plan((Ablate(unit(1), EVERYWHERE),)),
    Plan(
        (Erase(unit(2) + unit(3), unit(2), EVERYWHERE, strength=0.7), Add(unit(4), EVERYWHERE[2]))
    ),
    Plan(),
)


def test_answers_made_together_are_those_of_each_alone(backend: str) -> None:
    """Of evidences of different sizes and plans; prompts share a prefix, which is one a plan."""
    model = shared(backend=backend, eos_token_id=None)
    sides = [rows_of(*(9 + n for n in range(2 + i)), prefix=8, seed=i) for i in range(len(PLANS))]
    evidences = [
        ModelOutputs(model, rows, plan, max_new_tokens=8) for rows, plan in zip(sides, PLANS)
    ]
    generate_outputs_together(evidences)
    assert all(evidence.has_generations for evidence in evidences)
    for evidence, rows, plan in zip(evidences, sides, PLANS):
        alone = ModelOutputs(model, rows, plan, max_new_tokens=8)
        assert evidence.generations == alone.generations and len(evidence.texts) == len(rows)
    texts = [ModelOutputs(model, sides[0], plan, max_new_tokens=8).texts for plan in PLANS[:3]]
    assert len({tuple(each) for each in texts}) == 3


def test_answers_that_are_known_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared(eos_token_id=None)
    first, second = (
        ModelOutputs(model, rows_of(9, 12, seed=seed), max_new_tokens=4) for seed in (1, 2)
    )
    known, asked = first.generations, []
    real = model.generate

    def counting(rows: Any, **options: Any) -> Any:
        asked.append(len(rows))
        return real(rows, **options)

    monkeypatch.setattr(model, "generate", counting)
    generate_outputs_together([first, second])
    assert asked == [2] and first.generations is known
    generate_outputs_together([first, second])
    generate_outputs_together([])
    assert asked == [2]


def test_continuations_of_no_token_and_of_some() -> None:
    model, rows = shared(), rows_of(5, 5, 3)
    ends = [[], [7, 8, 9], [4]]
    found = ModelOutputs(model, rows).continuation_logprobs(ends)
    assert [len(each) for each in found] == [0, 3, 1]
    for row, end, each in zip(rows[1:], ends[1:], found[1:]):
        expected = forward(source_of("llama_gqa"), [*row, *end]).log_softmax(-1)
        assert_close(each, expected[len(row) - 1 : -1], atol=1e-4, rtol=1e-4)


def test_the_first_answers_are_those_of_the_first_prompts() -> None:
    model = shared(eos_token_id=None)
    whole = ModelOutputs(
        model, rows_of(9, 12, 14, 10), Plan((Ablate(unit(1), EVERYWHERE),)), max_new_tokens=4
    )
    unknown = whole.head(2)  # nothing is known yet: nothing is there
    assert not unknown.has_generations and unknown._first_logprobs is None
    assert (unknown.plan, unknown.max_new_tokens, unknown.rows) == (whole.plan, 4, whole.rows[:2])
    _ = whole.generations, whole.first_logprobs
    part = whole.head(2)
    assert part._generations == whole.generations[:2] == unknown.generations
    assert torch.equal(part._first_logprobs, whole.first_logprobs[:2])
    assert_close(part.first_logprobs, unknown.first_logprobs, atol=2e-5, rtol=0)
    some = whole.subset([3, 1])
    assert some.rows == [whole.rows[3], whole.rows[1]] and some.plan == whole.plan
    assert some._generations == [whole.generations[i] for i in (3, 1)]
    assert torch.equal(some._first_logprobs, whole.first_logprobs[[3, 1]])


def test_answers_end_with_the_end_token() -> None:
    """Rows leave a batch under several plans when they end."""
    hf, _ = tiny()
    model = shared()
    assert hf.config.eos_token_id in model.eos_token_ids
    rows = rows_of(*range(9, 29))
    evidences = [ModelOutputs(model, rows, plan, max_new_tokens=24) for plan in PLANS[:2]]
    generate_outputs_together(evidences)
    assert any(g.finished for e in evidences for g in e.generations)
    for evidence, plan in zip(evidences, PLANS):
        assert (
            evidence.generations == ModelOutputs(model, rows, plan, max_new_tokens=24).generations
        )
