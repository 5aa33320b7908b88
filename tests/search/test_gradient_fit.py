"""Fitted edits on tiny models: the gradients are right, the loss falls, what is found is the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import D_MODEL, N_LAYERS, forward, make, rows_of, shared, tiny, unit
from torch.nn.functional import kl_div

from interp_ablate import Ablate, Direction, Model, Plan, Site, everywhere
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import InterpAblateError, ModelError, PlanError
from interp_ablate.evaluation.metrics import kl_divergence
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.load import from_hf
from interp_ablate.models.thinking import Generation
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.gradient_fit import (
    N_KEPT,
    N_TOKENS,
    PASSAGE_LIMIT,
    PASSAGE_TOKENS,
    STRONGEST,
    UNLIKELY,
    FitData,
    NothingToFitError,
    Passage,
    _kl,
    _unwanted,
    answer_logprobs,
    expression_of,
    fit_data,
    fit_edit,
    loop_of,
)
from interp_ablate.settings import STEP_ROWS

SITES = everywhere(N_LAYERS)
DIRECTION = Direction(unit(3), 1.0, Site(1, "resid_post"))
READ, WRITE = 1.4 * unit(4), 0.8 * unit(4) + 0.5 * unit(5)
ANYTHING = ExpressionScorer((), patterns=("",))  # every answer expresses it


def sure(backend: str) -> Model:
    """A tiny model that is sure of its greedy answers: own words are likely at first."""
    hf, tokenizer = tiny(eos_token_id=None)
    with torch.no_grad():
        hf.lm_head.weight.mul_(4)
    return from_hf(hf, tokenizer, backend=backend)  # type: ignore[arg-type]


def data_of(model: Model) -> FitData:
    positive = ModelOutputs(model, rows_of(14, 15, 16, prefix=9), max_new_tokens=N_TOKENS + 1)
    return fit_data(positive, ModelOutputs(model, rows_of(13, 15, prefix=9, seed=2)), ANYTHING)


def read_by_answers(model: Model, data: FitData) -> Direction:
    """Along what the final norm and the unembedding read for the first answer's tokens."""
    state = model.hf_state_dict()
    read = (state["lm_head.weight"][data.answers[0]] * state["model.norm.weight"]).sum(0)
    return Direction(read, 1.0, Site(2, "resid_post"))


def scores_under(model: Model, data: FitData, plan: Erase | Ablate) -> tuple[float, float]:
    with model.applied(Plan((plan,))):
        return float(answer_logprobs(model, data).mean()), float(_kl(model, data))


def oblique_map(edit: Erase | Ablate) -> list[torch.Tensor]:
    """What an edit takes away at each site, as a matrix: the same whatever its vectors' lengths."""
    return [edit.map_at(site).left @ edit.map_at(site).right.T for site in edit.sites]


# --------------------------------------------------------------------------------- gradients


def check_gradients(model: Model) -> None:
    """Of every strength, and along what is read and what is written, against finite differences."""
    sites, data = model.writers, data_of(model)
    leaves = {
        "strengths": torch.linspace(0.2, 0.5, len(sites)),
        "read": READ.float(),
        "write": WRITE.float(),
    }

    def loss(read: torch.Tensor, write: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        with model.plans.fitting_erasure(read, write, sites, strengths):
            return answer_logprobs(model, data).mean() + _kl(model, data)

    live = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    gradients = dict(zip(live, torch.autograd.grad(loss(**live), list(live.values()))))
    assert all(bool((gradient != 0).all()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        size = len(leaves[name])
        ways = [torch.eye(size)[i] for i in (0, 2, size - 1)] + [gradient / gradient.norm()]
        for way in ways:
            step = 1e-2 * way
            with torch.no_grad():
                above = loss(**leaves | {name: leaves[name] + step})
                below = loss(**leaves | {name: leaves[name] - step})
            slope = (above - below) / 2e-2
            torch.testing.assert_close(slope, (gradient @ way).to(slope), rtol=2e-2, atol=2e-3)


def test_memory_that_runs_out_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass: halves give the same edit. In a gradient: one message, and nothing stays installed."""
    model = make(eos_token_id=None)
    data, direction = data_of(model), Direction(READ, 1.0, Site(1, "resid_post"))
    want = fit_edit(model, direction, data, steps=2)
    forward, calls = type(model._backend).forward, []

    def hungry(self: Any, step: Any, keep: int) -> Any:
        calls.append(len(step.tokens))
        if calls.count(3) == 2 and calls[-1] == 3:  # of the three prompts' batches
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, step, keep)

    with monkeypatch.context() as patches:
        patches.setattr(type(model._backend), "forward", hungry)
        again = fit_edit(model, direction, data, steps=2)
    assert calls.count(3) >= 2
    torch.testing.assert_close(torch.tensor(again.amounts), torch.tensor(want.amounts))
    torch.testing.assert_close(again.vectors, want.vectors)

    def gone(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", gone)
    with pytest.raises(ModelError, match="memory ran out while an edit was fitted"):
        fit_edit(model, direction, data, steps=2)
    assert not len(model.active_plan) and not model.plans.with_gradients


def test_gradients_against_finite_differences(backend: str) -> None:
    check_gradients(make(backend=backend, eos_token_id=None))


@pytest.mark.parametrize("kind", ("gemma2", "llama_biases", "gpt2"))
def test_gradients_on_other_architectures(kind: str) -> None:
    """(Not of experts: where a router switches, the loss jumps, and differences are no slopes.)"""
    check_gradients(shared(kind, eos_token_id=None))


@pytest.mark.parametrize("kind", ("llama_gqa", "gemma2"))
def test_one_block_serves_many_gradients(kind: str) -> None:
    """A fit stays inside for all its steps: no step needs what another one freed."""
    model = shared(kind, eos_token_id=None)
    data = data_of(model)
    read, write = (vector.float().requires_grad_() for vector in (READ, WRITE))
    with model.plans.fitting_erasure(
        read, write, model.writers, torch.full((len(model.writers),), 0.3)
    ):
        both = [torch.autograd.grad(_kl(model, data), (read, write)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*both))


# --------------------------------------------------------------------------------- live edits


def live_logits(
    model: Model, rows: list[list[int]], read: torch.Tensor, write: torch.Tensor, strengths: object
) -> torch.Tensor:
    given = torch.tensor(strengths)
    with model.plans.fitting_erasure(read.float(), write.float(), model.writers, given):
        return model.logits(rows).detach()


def plan_logits(model: Model, rows: list[list[int]], edit: Erase | Ablate) -> torch.Tensor:
    with model.applied(Plan((edit,))):
        return model.logits(rows)


KINDS = ("llama_gqa", "llama_biases", "qwen2", "gemma2", "olmo2", "gpt2", "gpt_neox", "mixtral")


@pytest.mark.parametrize("kind", KINDS)
def test_live_tensors_are_the_plan(kind: str) -> None:
    """At projections before a norm the read is pulled back through its gain, as in plans."""
    model, rows = shared(kind), rows_of(9, 12, 14)
    strengths = torch.linspace(0.1, 1.5, len(model.writers)).tolist()
    ablation = Ablate(DIRECTION, model.writers, strength=strengths)
    got = live_logits(model, rows, DIRECTION.vector, DIRECTION.vector, strengths)
    want = plan_logits(model, rows, ablation)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    # neither unit nor at a right angle to one another: lengths are part of the strength
    scaled = [float(READ @ WRITE) * strength for strength in strengths]
    erasure = Erase(WRITE, READ, model.writers, strength=scaled)
    got = live_logits(model, rows, READ, WRITE, strengths)
    other = plan_logits(model, rows, erasure)
    torch.testing.assert_close(got, other, atol=5e-5, rtol=1e-5)
    plain = model.logits(rows)
    assert min(float((a - b).abs().max()) for a, b in ((want, plain), (other, plain))) > 1e-2


def test_live_tensors_are_the_plan_on_every_backend(backend: str) -> None:
    model, rows = shared(backend=backend), rows_of(19, 22, 24, prefix=12)
    strengths = torch.linspace(0, 1.5, len(SITES)).tolist()
    scaled = [float(READ @ WRITE) * strength for strength in strengths]
    want = plan_logits(model, rows, Erase(WRITE, READ, SITES, strength=scaled))
    got = live_logits(model, rows, READ, WRITE, strengths)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)


def test_live_tensors_by_their_formula() -> None:
    """Not by what a plan makes of them."""
    row, (hf, _) = rows_of(11)[0], tiny()

    def edit(site: Site, x: torch.Tensor) -> torch.Tensor:
        if site not in SITES:
            return x
        along = (x.double() @ READ)[..., None]
        return (x - 0.3 * (1 + SITES.index(site)) * along * WRITE).to(x)

    strengths = [0.3 * (1 + i) for i in range(len(SITES))]
    got = live_logits(shared(), [row], READ, WRITE, strengths)[0]
    torch.testing.assert_close(got, forward(hf, row, edit)[-1:], atol=5e-5, rtol=1e-5)


def test_gradients_end_with_the_block(backend: str) -> None:
    model, rows = shared(backend=backend), rows_of(9, 12)
    strengths, plain = torch.ones(len(SITES), requires_grad=True), model.logits(rows)
    with model.plans.fitting_erasure(unit(1).float(), unit(1).float(), SITES, strengths):
        assert model.logits(rows).requires_grad
    with (
        pytest.raises(KeyError),
        model.plans.fitting_erasure(unit(1).float(), unit(1).float(), SITES, strengths),
    ):
        raise KeyError
    after = model.logits(rows)
    assert not after.requires_grad and torch.equal(after, plain)


def test_no_such_site() -> None:
    vector, middle = DIRECTION.vector.float(), [Site(1, "resid_mid")]
    with (
        pytest.raises(PlanError),
        make().plans.fitting_erasure(vector, vector, middle, torch.ones(1)),
    ):
        pass


# --------------------------------------------------------------------------------- the data


def negative_data(*lengths: int) -> tuple[Model, FitData, list[list[int]]]:
    """Data with negative answers of given lengths: as if the end token came after them."""
    model = shared(eos_token_id=None)
    rows = rows_of(*range(9, 9 + len(lengths)), seed=7)
    negative = ModelOutputs(model, rows, max_new_tokens=N_KEPT)
    cut = [Generation(g.tokens[:n], "", True) for g, n in zip(negative.generations, lengths)]
    negative.generations = cut
    positive = ModelOutputs(model, rows_of(9, 12), max_new_tokens=N_TOKENS)
    return model, fit_data(positive, negative, ANYTHING), rows


def test_negative_prompts_come_with_their_answers() -> None:
    """The reference is the unedited model's distribution after the prompt and each of its own words."""
    model, data, rows = negative_data(N_KEPT, N_KEPT, N_KEPT)
    assert data.reference.shape == (3, N_KEPT, model.tl.cfg.d_vocab)
    assert data.negative_lengths == [len(row) for row in rows]
    for i, row in enumerate(rows):
        answer = model.generate([row], max_new_tokens=N_KEPT)[0].tokens
        assert data.negative[i] == [*row, *answer[:-1]]
        want = model.logits([[*row, *answer[:-1]]], keep=N_KEPT)[0].log_softmax(-1)
        torch.testing.assert_close(data.reference[i], want, atol=2e-5, rtol=0)
        assert data.reference[i].argmax(-1).tolist() == list(answer)


def test_negative_prompts_with_short_answers_are_left_out() -> None:
    model, data, rows = negative_data(N_KEPT, N_KEPT - 1, N_KEPT, 0)
    assert data.negative_lengths == [len(rows[0]), len(rows[2])]
    assert data.reference.shape[:2] == (2, N_KEPT)
    assert float(_kl(model, data)) == pytest.approx(0, abs=1e-6)


def test_where_most_answers_are_short_the_first_token_counts() -> None:
    """Also after a prompt that the model does not answer at all."""
    model, data, rows = negative_data(N_KEPT, 1, 0)
    assert data.negative == rows and data.reference.shape[:2] == (3, 1)
    want = model.logits(rows)[:, -1].log_softmax(-1)
    torch.testing.assert_close(data.reference[:, 0], want, atol=2e-5, rtol=0)
    assert float(_kl(model, data)) == pytest.approx(0, abs=1e-6)


def test_expressing_answers_that_end_at_once_are_no_answers() -> None:
    """They have fewer tokens than are made unlikely; where all do, there is nothing to fit."""
    model = shared(eos_token_id=None)
    positive = ModelOutputs(model, rows_of(9, 12, 14), max_new_tokens=N_TOKENS)
    negative = ModelOutputs(model, rows_of(9, 12, seed=2), max_new_tokens=N_KEPT)
    whole = positive.generations
    short = Generation(whole[1].tokens[: N_TOKENS - 1], "x", True)
    positive.generations = [whole[0], short, whole[2]]
    data = fit_data(positive, negative, ANYTHING)
    assert data.answers == [list(whole[0].tokens), list(whole[2].tokens)]
    positive.generations = [short] * 3
    with pytest.raises(NothingToFitError):
        fit_data(positive, negative, ANYTHING)


def test_kl_is_half_the_first_tokens_and_half_the_mean(backend: str) -> None:
    model = shared(backend=backend, eos_token_id=None)
    data = data_of(model)
    assert float(_kl(model, data)) == pytest.approx(0, abs=1e-6)
    with model.applied(Ablate(DIRECTION, SITES)):
        got = float(_kl(model, data))
        new = [model.logits([row], keep=N_KEPT)[0].log_softmax(-1) for row in data.negative]
    want = []
    for p, q in zip(data.reference.double(), new):
        kl = (p.exp() * (p - q.double())).sum(-1)
        want.append(float(kl[0] / 2 + kl.mean() / 2))
    assert got == pytest.approx(sum(want) / len(want), rel=1e-3) and got > 1e-2


def test_own_words_are_the_answers_log_probability() -> None:
    model = shared(eos_token_id=None)
    data = data_of(model)
    for i, (row, n, answer) in enumerate(zip(data.positive, data.prompt_lengths, data.answers)):
        assert row[n:] == answer and len(answer) == N_TOKENS
        logprobs = model.logits([row], keep=N_TOKENS + 1)[0, :-1].log_softmax(-1)
        want = sum(float(logprobs[k, token]) for k, token in enumerate(answer))
        got = answer_logprobs(
            model, replace(data, positive=[row], prompt_lengths=[n], answers=[answer])
        )
        assert float(got) == pytest.approx(want, abs=1e-4), i


def test_second_round_adds_answers() -> None:
    model = make(eos_token_id=None)
    data = data_of(model)
    rows = rows_of(11, 12, seed=5)
    under = ModelOutputs(model, rows, Plan((Ablate(DIRECTION, SITES),)), max_new_tokens=N_TOKENS)
    more = data.with_answers(under, ANYTHING)
    assert len(more.positive) == len(data.positive) + 2 == len(more.answers)
    assert [len(r) - n for r, n in zip(more.positive, more.prompt_lengths)] == [N_TOKENS] * 5
    assert more.answers[3:] == [list(g.tokens) for g in under.generations]
    assert more.positive[3:] == [row + end for row, end in zip(rows, more.answers[3:])]
    assert more.reference is data.reference and more.negative == data.negative
    nothing = data.with_answers(under, ExpressionScorer(("zzzzzz",)))
    assert nothing.positive == data.positive


# --------------------------------------------------------------------------------- loops


@pytest.mark.parametrize(
    ("answer", "length", "repeats"),
    [
        ([1, 2, 3, 4, 5, 6], None, []),
        ([1, 2, 3, 1, 2, 3], 6, [5]),
        ([1, 2, 3, 1, 2, 3, 1, 9, 8, 7], 7, [5, 6]),
        ([5] * 6, 6, [3, 4, 5]),
        ([5, 5, 5], None, []),
        ([], None, []),
        ([*range(PASSAGE_TOKENS), 0, 1, 2], None, []),  # later than is read
        ([0, 1, 2, *range(PASSAGE_TOKENS)], 6, [5]),
    ],
)
def test_loops(answer: list[int], length: int | None, repeats: list[int]) -> None:
    found = loop_of([7, 8], answer)
    if length is None:
        assert found is None
        return
    assert found == Passage([7, 8], answer[:length], repeats)
    grams = [tuple(answer[i - 2 : i + 1]) for i in range(2, len(answer))]
    for place in found.places:  # each completes three tokens seen before
        assert grams[place - 2] in grams[: place - 2]


def test_loops_of_both_sides_are_added() -> None:
    model = shared(eos_token_id=None)
    data = data_of(model)
    sides = [ModelOutputs(model, rows_of(9, 12, 14, seed=seed)) for seed in (1, 2)]
    for side in sides:
        side.generations = [
            Generation(answer, "", False) for answer in ((5,) * 6, (1, 2, 3, 4), (7,) * 8)
        ]
    more = data.with_loops(sides)
    want = [loop_of(s.rows[i], s.generations[i].tokens) for s in sides for i in (0, 2)]
    assert more.loops == want and more.late == []
    assert data.passages == [] and more.positive == data.positive
    assert more.with_loops(sides[:1]).passages == [*want, *want[:2]]


@pytest.mark.parametrize(
    "counts", [(3, 2, 2, 0), (16, 16, 12, 1), (17, 40, 30, 3), (33, 64, 16, 9), (5, 5, 2, 30)]
)
def test_every_row_is_seen_as_often_as_any_other(counts: tuple[int, int, int, int]) -> None:
    """Steps see some rows of each kind; each row comes with its own length, answer and reference.

    However many loops there are, up to four late expressions are in every step.
    """
    n, m, k, late = counts
    data = FitData(
        [[i] * 5 for i in range(n)],
        list(range(n)),
        [[i] * N_TOKENS for i in range(n)],
        [[i] * 6 for i in range(m)],
        list(range(m)),
        torch.arange(m, dtype=torch.float32)[:, None, None].expand(m, N_KEPT, 3),
        [Passage([i], [i], [i]) for i in range(late)],
        [Passage([i], [i], [i]) for i in range(k)],
    )
    seen = [Counter[int](), Counter[int](), Counter[int](), Counter[int]()]
    steps = 400
    for step in range(steps):
        some = data.some(step)
        assert len(some.positive) == min(n, STEP_ROWS) and len(some.negative) == min(m, STEP_ROWS)
        assert some.prompt_lengths == [row[0] for row in some.positive]
        assert some.answers == [[row[0]] * N_TOKENS for row in some.positive]
        assert some.negative_lengths == [row[0] for row in some.negative]
        assert some.reference[:, 0, 0].tolist() == [row[0] for row in some.negative]
        for counter, rows in zip(seen, (some.prompt_lengths, some.negative_lengths)):
            counter.update(rows)
        assert len(some.late) == min(late, STEP_ROWS // 4)
        assert len(some.loops) == min(k, STEP_ROWS // 2 - len(some.late))
        seen[2].update(loop.prompt[0] for loop in some.loops)
        seen[3].update(passage.prompt[0] for passage in some.late)
        again = data.some(step)
        assert (again.positive, again.passages) == (some.positive, some.passages)
    for size, counter in zip(counts[:2], seen):
        assert len(counter) == size and max(counter.values()) - min(counter.values()) <= 1
    for size, counter in zip(counts[2:], seen[2:]):
        assert len(counter) == size  # and no passage is left out for ever
        assert not counter or min(counter.values()) > 0.6 * max(counter.values())


def test_expressions_that_come_late_are_unwanted_passages() -> None:
    """The answer's beginning is another one's business; where it comes early, that is made unlikely."""
    model = shared(eos_token_id=None)
    rows, word = rows_of(9, 12, 14, 11, 10), ExpressionScorer(("sorry",))
    texts = (
        "sorry, no thanks",
        "well, I am sorry that",
        "nothing of the kind",
        "so sorry!",
        "x" * 40 + " sorry",
    )
    evidence = ModelOutputs(model, rows, max_new_tokens=24)
    answers = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    evidence.generations = [
        Generation(tuple(answer), text, True) for answer, text in zip(answers, texts)
    ]
    found = [expression_of(evidence, i, word) for i in range(5)]
    # a token is a byte; the word ends where the next letter shows that it does, or the text ends
    assert found == [(0, 4), (11, 15), None, (3, 7), None]  # the last comes later than is read
    data = replace(data_of(model), positive=[], prompt_lengths=[], answers=[])
    more = data.with_answers(evidence, word)
    assert more.answers == [answers[0][:N_TOKENS], answers[3][:N_TOKENS]]
    assert more.positive == [rows[i] + answers[i][:N_TOKENS] for i in (0, 3)]
    assert (
        more.late == [Passage(rows[1], answers[1][:16], list(range(11, 16)))] and more.loops == []
    )


def looping_data(model: Model, *lengths: int) -> FitData:
    """Prompts of given lengths, each with a loop of its own."""
    answers = ([9, 8, 7] * 6, [50] * 7, [60, 61, 60, 61, 60, 61])
    rows = rows_of(*lengths, seed=4)
    loops = [loop_of(row, answer) for row, answer in zip(rows, answers)]
    assert all(loop is not None for loop in loops)
    return replace(data_of(model), loops=loops)


@pytest.mark.parametrize("lengths", ((21, 30, 24), (21, 3, 24)), ids=("long", "a short prompt"))
def test_looping_is_what_repeats_above_the_limit(lengths: tuple[int, ...]) -> None:
    """Of each loop by itself, each token after what comes before it."""
    model = sure("bridge")
    data = looping_data(model, *lengths)
    want = []
    for loop in data.passages:
        total = 0.0
        for place in loop.places:
            logits = model.logits([loop.prompt + loop.answer[:place]])[0, -1].double()
            value = logits.log_softmax(-1)[loop.answer[place]] - PASSAGE_LIMIT
            total += float(torch.nn.functional.softplus(value))
        want.append(total)
    assert float(_unwanted(model, data)) == pytest.approx(sum(want) / len(want), rel=1e-4)


def test_a_fit_breaks_loops() -> None:
    """With loops in the data they get less likely than without."""
    model = sure("bridge")
    direction = Direction(unit(3), 1.0, Site(1, "resid_post"))
    rows = rows_of(21, 24, 22, 23, seed=6)
    answers = [list(g.tokens) for g in model.generate(rows, max_new_tokens=N_KEPT)]
    # the model's own words said twice: likely, and a loop
    loops = [loop_of(row, answer[:4] * 3) for row, answer in zip(rows, answers)]
    data = data_of(model)
    looping = replace(data, loops=[loop for loop in loops if loop])
    found = []
    for given in (data, looping):
        edit = fit_edit(model, direction, given, kl_weight=0.1, steps=6)
        with model.applied(Plan((edit,))):
            found.append(float(_unwanted(model, looping)))
    assert found[1] < found[0] - 0.02


# --------------------------------------------------------------------------------- nothing


def test_nothing_to_fit() -> None:
    model = make()
    evidence = ModelOutputs(model, rows_of(9, 12), max_new_tokens=N_TOKENS)
    with pytest.raises(InterpAblateError, match="no training prompt") as caught:
        fit_data(evidence, evidence, ExpressionScorer(("zzzzzz",)))
    assert isinstance(caught.value, NothingToFitError)


# --------------------------------------------------------------------------------- the fit


def test_a_fit_lowers_own_words_and_minds_the_kl(backend: str) -> None:
    model = sure(backend)
    data = data_of(model)
    direction = read_by_answers(model, data)
    before = float(answer_logprobs(model, data).mean())
    steps: list[int] = []

    def fit(kl_weight: float) -> tuple[float, float]:
        found = fit_edit(
            model,
            direction,
            data,
            kl_weight=kl_weight,
            steps=20,
            on_step=lambda: steps.append(1),
        )
        assert isinstance(found, Erase) and found.sites == SITES and not any(found.values)
        return scores_under(model, data, found)

    generous = fit(1.0)
    assert len(steps) == 20 and fit(1.0) == generous  # deterministic
    frugal = fit(1000.0)
    assert frugal[1] < generous[1] and generous[0] < min(frugal[0], before)
    assert generous[0] < before - 1


def test_vectors_find_more_than_strengths() -> None:
    """What is read and written moves away from the direction, and the loss is lower for it."""
    model = sure("bridge")
    data, direction = data_of(model), Direction(unit(3), 1.0, Site(1, "resid_post"))
    flat = fit_edit(model, direction, data, vectors=False, kl_weight=1.0)
    found = fit_edit(model, direction, data, kl_weight=1.0)
    assert isinstance(flat, Ablate) and isinstance(found, Erase)
    plain = Ablate(direction, SITES, strength=flat.amounts, label=f"{direction.name}, fitted")
    assert Plan((flat,)) == Plan((plain,))  # along the direction itself, every bit
    assert all(0 <= amount <= STRONGEST for amount in flat.amounts) and len(set(flat.amounts)) > 1

    def loss(edit: Erase | Ablate) -> float:
        unedited_answer_logprob, kl = scores_under(model, data, edit)
        return unedited_answer_logprob + kl

    assert loss(found) < loss(flat) - 0.1
    cosines = [float(v @ direction.vector / v.norm()) for v in (found.read, found.write)]
    assert all(0.2 < cosine < 0.999 for cosine in cosines)
    assert abs(cosines[0] - cosines[1]) > 1e-3  # each by its own gradient


def test_without_a_step_it_is_the_direction() -> None:
    model = shared(eos_token_id=None)
    found = fit_edit(model, DIRECTION, data_of(model), steps=0)
    assert isinstance(found, Erase) and found.label == f"{DIRECTION.name}, fitted"
    for vector in found.vectors:
        torch.testing.assert_close(vector, DIRECTION.vector, atol=1e-6, rtol=0)
    assert found.amounts == pytest.approx([0.3] * len(SITES), rel=1e-6)


STARTS = (
    Erase(WRITE, READ, SITES, strength=[0.1 * (1 + i) for i in range(len(SITES))]),
    Erase(WRITE, -3 * READ, SITES, strength=0.4),
    Ablate(unit(8), SITES, strength=[0.2 * i for i in range(len(SITES))]),
)


@pytest.mark.parametrize("start", STARTS, ids=("erase", "other sign", "ablate"))
def test_a_fit_goes_on_from_an_edit(start: Erase | Ablate) -> None:
    model = shared(eos_token_id=None)
    data = data_of(model)
    kept = start.vectors.clone(), start.amounts
    same = fit_edit(model, DIRECTION, data, steps=0, start=start)
    assert same.sites == start.sites
    for got, want in zip(oblique_map(same), oblique_map(start)):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    on = fit_edit(model, DIRECTION, data, steps=3, start=start, kl_weight=1.0)
    moved = max(float((a - b).abs().max()) for a, b in zip(oblique_map(on), oblique_map(start)))
    assert 1e-3 < moved < 1
    assert torch.equal(start.vectors, kept[0]) and start.amounts == kept[1]


def test_the_kl_in_float32_is_that_in_float64_and_so_are_its_gradients() -> None:
    """The fit sums in float32, a score in float64: the same to the rounding of log-probabilities (1e-5 nats)."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(6, N_KEPT, 49152, generator=generator).mul(4).log_softmax(-1)
    for apart in (1.0, 0.05):
        noise = apart * torch.randn(reference.shape, generator=generator)
        logits = [
            (reference + noise).to(t).requires_grad_() for t in (torch.float32, torch.float64)
        ]
        got = kl_div(logits[0].log_softmax(-1), reference, reduction="none", log_target=True)
        want = kl_divergence(reference, logits[1].log_softmax(-1))
        torch.testing.assert_close(got.sum(-1), want.float(), rtol=2e-4, atol=2e-5)
        got.sum().backward()
        want.sum().backward()
        ours, exact = logits[0].grad, logits[1].grad
        assert ours is not None and exact is not None
        assert float((ours - exact).norm()) < 1e-3 * float(exact.norm())


def test_two_rounds_go_further_than_one() -> None:
    model = sure("bridge")
    data = data_of(model)
    direction = read_by_answers(model, data)
    first = fit_edit(model, direction, data, steps=3, kl_weight=1.0)
    again = fit_edit(model, direction, data, steps=6, kl_weight=1.0, start=first)

    def loss(edit: Erase | Ablate) -> float:
        unedited_answer_logprob, kl = scores_under(model, data, edit)
        return max(unedited_answer_logprob, UNLIKELY) + kl  # further down there is nothing to win

    plain = fit_edit(model, direction, data, steps=0)
    assert loss(again) < loss(first) < loss(plain)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_directions_are_not_written_into(dtype: torch.dtype) -> None:
    """A direction of the optimizer's own dtype neither, nor the model's weights."""
    model = shared(eos_token_id=None)
    direction = Direction(unit(3), 1.0, Site(1, "resid_post"))
    object.__setattr__(direction, "vector", direction.vector.to(dtype))
    vector, weights = direction.vector.clone(), model.fingerprint
    found = fit_edit(model, direction, data_of(model), steps=3)
    assert torch.equal(direction.vector, vector) and not direction.vector.requires_grad
    assert model.fingerprint == weights
    assert not any(v.requires_grad for v in found.vectors)


@pytest.mark.parametrize("kind", ("gemma2", "gpt2", "mixtral"))
def test_fits_on_other_architectures(kind: str) -> None:
    """What was fitted live is what the plan does, also behind a norm."""
    model = shared(kind, eos_token_id=None)
    data = data_of(model)
    direction = Direction(unit(6), 1.0, Site(1, "resid_post"))
    none = fit_edit(model, direction, data, steps=0, kl_weight=1.0)
    found = fit_edit(model, direction, data, steps=8, kl_weight=1.0)

    def loss(edit: Erase | Ablate) -> float:
        unedited_answer_logprob, kl = scores_under(model, data, edit)
        return unedited_answer_logprob + kl

    assert loss(found) < loss(none)
    assert found.d_model == D_MODEL and found.sites == model.writers
