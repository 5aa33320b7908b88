"""The streaming monitor against teacher forcing, and the correlations against scipy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import D_MODEL, N_LAYERS, forward, make, shared, source_of, unit
from torch import Tensor

from interp_ablate import (
    Ablate,
    Add,
    Direction,
    Directions,
    Plan,
    Prompt,
    Site,
    collect,
    everywhere,
)
from interp_ablate.errors import DirectionError, ModelError, PlanError, PromptError, RunError
from interp_ablate.models.model import Model
from interp_ablate.persona.monitoring import (
    Monitoring,
    correlate,
    graded_prompts,
    monitor_trait,
    read_graded,
)
from interp_ablate.persona.persona import Persona
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.persona.traits import Trait, bundled_traits, load_trait
from interp_ablate.plots.monitoring import save_monitoring, tokens_figure
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.stats.correlation import across, overall, pearson, within

TOLERANCE = 5e-5  # fp32, activations of some units
PROMPT = Prompt("What is a river?", "Answer in verse")
NEW = 7


def along(site: Site, seed: int = 0) -> Direction:
    return Direction(unit(seed), 2.0, site)


def teacher_forced(
    model: Model, tokens: list[int], directions: list[Direction]
) -> list[list[float]]:
    """Each token's projections from whole rows that end at it, through `collect`."""
    row = model.encode(PROMPT)
    rows = [row + tokens[: i + 1] for i in range(len(tokens))]
    found = collect(model, rows, sorted({item.site for item in directions}))
    return torch.stack([found.at(d.site).double() @ d.vector for d in directions], 1).tolist()


# --------------------------------------------------------------------------------- the stream


def test_a_tokens_projection_is_what_collect_says(
    kind: str, backend: str, all_sites: tuple[Site, ...]
) -> None:
    model = shared(kind, backend)
    directions = [along(site, seed) for seed, site in enumerate(all_sites)]
    seen = list(model.monitor(PROMPT, directions, max_new_tokens=NEW))
    (answer,) = model.generate([PROMPT], max_new_tokens=NEW)
    assert [piece.id for piece, _ in seen] == list(answer.tokens) and len(seen) > 2
    assert "".join(str(piece) for piece, _ in seen) == answer.text
    want = teacher_forced(model, list(answer.tokens), directions)
    got = [list(values) for _, values in seen]
    assert np.abs(np.array(got) - np.array(want)).max() < TOLERANCE
    assert np.abs(np.diff(np.array(got), axis=0)).max() > 0.1  # tokens do differ


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "gpt_neox", "qwen3_moe", "olmo2"])
def test_other_architectures(kind: str) -> None:
    model = shared(kind, "bridge")
    directions = [along(Site(layer, "resid_post"), layer) for layer in range(N_LAYERS)]
    seen = list(model.monitor(PROMPT, directions, max_new_tokens=NEW))
    tokens = [piece.id for piece, _ in seen]
    want = teacher_forced(model, tokens, directions)
    got = [list(values) for _, values in seen]
    assert len(tokens) > 2 and np.abs(np.array(got) - np.array(want)).max() < 2 * TOLERANCE


@pytest.mark.parametrize("positions", ["generated", "prompt", "all"])
def test_under_a_plan_it_reads_what_the_plan_leaves(positions: Any, backend: str) -> None:
    """Against a plain forward pass over the whole text, edited at the plan's positions."""
    kind, site = "llama_gqa", Site(1, "resid_post")
    model, vector = shared(kind, backend), unit(3)
    watched = [along(Site(1, "resid_post"), 3), along(Site(2, "resid_post"), 4)]
    plan = Plan((Add(Direction(vector, 2.0, site), site, coefficient=1.5, positions=positions),))
    with model.applied(plan):
        seen = list(model.monitor(PROMPT, watched, max_new_tokens=NEW))
    unsteered = [values for _, values in model.monitor(PROMPT, watched, max_new_tokens=NEW)]
    row = model.encode(PROMPT)
    start, tokens = len(row), [piece.id for piece, _ in seen]
    held: dict[Site, Tensor] = {}

    def edit(at: Site, x: Tensor) -> Tensor:
        if at == site:
            place = torch.arange(x.shape[1]) >= start
            mask = {"generated": place, "prompt": ~place, "all": place | True}[positions]
            x = x + 3.0 * mask[None, :, None] * vector.to(x)
        held[at] = x[0]
        return x

    forward(source_of(kind), row + tokens, edit)
    want = [
        [float(held[d.site][start + i].double() @ d.vector) for d in watched]
        for i in range(len(tokens))
    ]
    got = [list(values) for _, values in seen]
    assert np.abs(np.array(got) - np.array(want)).max() < TOLERANCE
    assert got[0] != pytest.approx(list(unsteered[0]), abs=1e-2)  # the plan does something


def test_ablated_everywhere_nothing_is_left(backend: str) -> None:
    model = shared("llama_gqa", backend)
    watched = along(Site(2, "resid_post"))
    with model.applied(Plan((Ablate(watched, everywhere(N_LAYERS)),))):
        values = [value for _, value in model.monitor(PROMPT, watched, max_new_tokens=NEW)]
    plain = [value for _, value in model.monitor(PROMPT, watched, max_new_tokens=NEW)]
    assert max(map(abs, values)) < TOLERANCE < 0.1 < max(map(abs, plain))


def hooks(model: Model) -> int:
    return sum(len(module._forward_hooks) for module in model.tl.modules())


def test_stopping_early_leaves_no_hook_and_others_may_run_between(backend: str) -> None:
    model, watched = shared("llama_gqa", backend), along(Site(1, "resid_mid"))
    before, whole = hooks(model), list(model.monitor(PROMPT, watched, max_new_tokens=NEW))
    stream = model.monitor(PROMPT, watched, max_new_tokens=NEW)
    assert hooks(model) == before
    first = next(stream)
    assert hooks(model) == before  # none waits between two tokens
    other = model.generate(["Go on"], max_new_tokens=5)
    second = next(stream)
    assert [first, second] == whole[:2] and other == model.generate(["Go on"], max_new_tokens=5)
    stream.close()  # type: ignore[attr-defined]
    assert hooks(model) == before
    for _, _ in model.monitor(PROMPT, watched, max_new_tokens=NEW):
        break
    assert (
        hooks(model) == before and list(model.monitor(PROMPT, watched, max_new_tokens=NEW)) == whole
    )


def test_a_stream_belongs_to_its_plan() -> None:
    model, watched = shared("llama_gqa", "bridge"), along(Site(1, "resid_post"))
    plan = Plan((Ablate(watched, [watched.site]),))
    with model.applied(plan):
        stream = model.monitor(PROMPT, watched)
        next(stream)
    with pytest.raises(PlanError, match="inside the same"):
        next(stream)
    stream = model.monitor(PROMPT, watched)
    with pytest.raises(PlanError, match="inside the same"), model.applied(plan):
        next(stream)


def test_one_row_of_applied_each() -> None:
    model, watched = shared("llama_gqa", "bridge"), along(Site(1, "resid_post"))
    plan = Plan((Add(watched, watched.site, coefficient=2.0),))
    with model.applied(plan):
        want = list(model.monitor(PROMPT, watched, max_new_tokens=3))
    with model.applied_each([plan]):
        assert list(model.monitor(PROMPT, watched, max_new_tokens=3)) == want


def test_sampling_is_that_of_generate() -> None:
    model, watched = shared("llama_gqa", "bridge"), along(Site(1, "resid_post"))
    for seed in (0, 1):
        (want,) = model.generate([PROMPT], max_new_tokens=NEW, temperature=1.0, seed=seed)
        seen = model.monitor(PROMPT, watched, max_new_tokens=NEW, temperature=1.0, seed=seed)
        assert tuple(piece.id for piece, _ in seen) == want.tokens


def test_it_ends_where_the_model_does() -> None:
    model, watched = make(), along(Site(1, "resid_post"))
    tokens = [piece.id for piece, _ in model.monitor(PROMPT, watched, max_new_tokens=NEW)]
    model.eos_token_ids = frozenset({tokens[3]})  # type: ignore[misc]
    short = [piece.id for piece, _ in model.monitor(PROMPT, watched, max_new_tokens=NEW)]
    end = tokens.index(tokens[3])
    assert short == tokens[:end] and len(short) < len(tokens)


def test_no_direction_only_generates(backend: str) -> None:
    model = shared("llama_gqa", backend)
    (want,) = model.generate([PROMPT], max_new_tokens=NEW)
    pairs = list(model.monitor(PROMPT, (), max_new_tokens=NEW))
    assert tuple(piece.id for piece, _ in pairs) == want.tokens
    assert "".join(map(str, (piece for piece, _ in pairs))) == want.text
    assert all(values == () for _, values in pairs)


def test_bad_directions_are_named() -> None:
    model = shared("llama_gqa", "bridge")
    wide = Direction(torch.ones(D_MODEL + 1), 1.0, Site(0, "resid_post"))
    for given in (wide, [along(Site(0, "resid_post")), wide]):
        with pytest.raises(DirectionError, match=f"d_model {D_MODEL}"):
            model.monitor(PROMPT, given)
    with pytest.raises(ModelError, match="no layer 9"):  # before anything is computed
        model.monitor(PROMPT, along(Site(9, "resid_post")))
    with pytest.raises(ModelError, match="max_new_tokens"):
        model.monitor(PROMPT, along(Site(0, "resid_post")), max_new_tokens=0)


def test_infinity_is_no_projection() -> None:
    model, watched = make(), along(Site(1, "resid_post"))
    with torch.no_grad():
        next(model.tl.parameters()).fill_(float("inf"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        list(model.monitor(PROMPT, watched, max_new_tokens=3))


# --------------------------------------------------------------------------------- correlation


def points(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(8), 10)
    shift = random.normal(size=8)[groups]
    x = shift + random.normal(size=80)
    return x, 0.7 * shift + 0.4 * x + random.normal(size=80), groups


QUESTIONS = np.tile(np.arange(10), 8)


def test_pearson_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y, _ = points()
    for n in (4, 10, 80):
        found, want = pearson(x[:n], y[:n]), stats.pearsonr(x[:n], y[:n])
        low, high = want.confidence_interval(0.95)
        assert (found.r, found.low, found.high) == pytest.approx((want.statistic, low, high))
        assert found.n == n and "Fisher" in found.interval
    found = pearson(x, y, level=0.8)
    low, high = stats.pearsonr(x, y).confidence_interval(0.8)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_within_is_the_partial_correlation_given_the_groups() -> None:
    x, y, groups = points()
    dummies = (groups[:, None] == np.arange(8)).astype(float)

    def left(v: np.ndarray) -> np.ndarray:
        return v - dummies @ np.linalg.lstsq(dummies, v, rcond=None)[0]

    found = within(x, y, groups, {"question": QUESTIONS})
    assert found.r == pytest.approx(float(np.corrcoef(left(x), left(y))[0, 1]))
    assert found.interval == "jackknife over 10 questions"


def test_across_is_that_of_the_means_and_overall_of_all() -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y, groups = points()
    means = [[v[groups == g].mean() for g in range(8)] for v in (x, y)]
    assert across(x, y, groups).r == pytest.approx(stats.pearsonr(*means).statistic)
    found = overall(x, y, {"system prompt": groups, "question": QUESTIONS})
    assert found.r == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.interval == "jackknife over 8 system prompts and 10 questions"
    alone = overall(x, y, {"question": np.zeros(80)})
    assert alone.r == found.r and alone.low is None and "1 questions tell none" in alone.why


def answers_to_questions(seed: int, r: float) -> tuple[np.ndarray, ...]:
    """Projections and scores of 12 questions under 8 system prompts, from what a question adds to both."""
    random = np.random.default_rng(seed)
    x, noise = random.normal(size=(2, 12))
    y = r * x + math.sqrt(1 - r * r) * noise
    levels, questions = np.repeat(np.arange(8), 12), np.tile(np.arange(12), 8)
    x, y = (side[questions] + 0.5 * random.normal(size=96) for side in (x, y))
    return x + levels, y + levels, levels, questions


def test_the_interval_within_covers_although_answers_to_a_question_go_together() -> None:
    """Fisher's z over the 96 answers, as if they were independent, covers about half of the time."""
    for r in (0.0, 0.6):
        covered = fisher = 0
        for seed in range(150):
            x, y, levels, questions = answers_to_questions(seed, r)
            truth = r / 1.25
            found = within(x, y, levels, {"question": questions})
            covered += found.low <= truth <= found.high  # type: ignore[operator]
            z, half = np.arctanh(found.r), 1.96 / math.sqrt(96 - 3 - 7)  # type: ignore[arg-type]
            fisher += np.tanh(z - half) <= truth <= np.tanh(z + half)
        assert covered >= 0.91 * 150 and fisher <= 0.75 * 150, (r, covered, fisher)


def test_no_variation_is_no_correlation() -> None:
    flat, up = np.full(6, 50.0), np.arange(6.0)
    found = pearson(up, flat)
    assert (
        found.r is None
        and found.low is None
        and "scores" in found.why
        and "undefined" in str(found)
    )
    assert "projections" in pearson(flat, up).why
    assert pearson(up[:3], up[:3] ** 2).low is None  # too few for an interval
    exact = pearson(up, 2 * up)
    assert (exact.r, exact.low, exact.high) == (1.0, None, None) and "line" in exact.why
    with pytest.raises(RunError, match="finite"):
        pearson(up, np.append(up[:-1], np.nan))


def test_answers_without_a_score_are_counted_not_averaged() -> None:
    x, y, groups = points()
    direction = along(Site(1, "resid_post"))
    stream = (
        torch.from_numpy(x)[:, None] * direction.vector + torch.randn(80, D_MODEL).double() * 1e-3
    )
    scores = pd.Series(y)
    scores[::4] = None
    table = pd.DataFrame({"level": groups, "question": QUESTIONS, "projection": x, "score": scores})
    found = correlate(table, stream, direction)
    kept = scores.notna().to_numpy()
    assert found.no_verdict == 20 and found.overall.n == 60
    assert found.overall.r == pytest.approx(np.corrcoef(x[kept], y[kept])[0, 1])
    assert set(found.control) == {"overall", "within", "across"}
    assert all(value is not None and 0 <= value <= 1 for value in found.control.values())
    with pytest.raises(RunError, match="none of the 80"):
        correlate(table.assign(score=np.nan), stream, direction)


# --------------------------------------------------------------------------------- a trait


def test_graded_prompts_go_from_the_negative_to_the_positive() -> None:
    for name in bundled_traits():
        trait = load_trait(name)
        found = graded_prompts(trait)
        assert len(set(found)) == 8
        assert all(text.endswith(trait.negative[0]) for text in found[:4])
        assert all(text.endswith(trait.positive[0]) for text in found[4:])
        assert found[1] == trait.negative[0] and found[6] == trait.positive[0]
        for one, other in zip(found[:4], reversed(found[4:])):  # mirrored strengths
            assert one.removesuffix(trait.negative[0]) == other.removesuffix(trait.positive[0])
    with pytest.raises(PromptError, match="no pair 99"):
        graded_prompts(trait, pair=99)


def test_system_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# weakest first\nBe dry.\n\nBe warm.\n")
    (tmp_path / "a.json").write_text(json.dumps(["Be dry.", "Be warm."]))
    assert (
        read_graded(tmp_path / "a.txt")
        == read_graded(tmp_path / "a.json")
        == ("Be dry.", "Be warm.")
    )
    for name, text in (
        ("b.json", '["one"]'),
        ("c.json", '["a", "a"]'),
        ("d.json", '["a", 3]'),
        ("e.json", "{"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(PromptError, match=name):
            read_graded(tmp_path / name)
    with pytest.raises(PromptError, match="cannot read"):
        read_graded(tmp_path / "missing.txt")


class ShareOfVowels:
    """A scorer of which every number is known: 100 times the share of vowels among letters."""

    name = "vowels"

    def __init__(self) -> None:
        self.asked = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": self.name}

    def __call__(self, exchanges: Any) -> list[float | None]:
        self.asked += len(exchanges)
        return [self.of(exchange) for exchange in exchanges]

    def of(self, exchange: PromptResponse) -> float | None:
        letters = [c for c in exchange.answer.casefold() if c.isascii() and c.isalpha()]
        return 100 * sum(c in "aeiou" for c in letters) / len(letters) if letters else None


def persona_of(model: Model) -> Persona:
    questions = ("Why?", "What is rain?", "Who sings?", "Where to?")
    trait = Trait(
        "loud", "speaks up", ("Be loud.",), ("Be quiet.",), questions[:2], questions[2:], "0 to 100"
    )
    direction = along(Site(1, "resid_post"))
    return Persona(trait, Directions((direction,)), direction, 1.0, model.source.name)


def test_monitor_a_trait(tmp_path: Path) -> None:
    model, scorer = shared("llama_gqa", "bridge"), ShareOfVowels()
    persona, sampling = persona_of(model), SamplingConfig(max_new_tokens=12, temperature=0.0)
    store = tmp_path / "monitoring.jsonl"
    found = monitor_trait(model, persona, store, scorer=scorer, sampling=sampling)
    assert len(found.table) == 16 and found.table["level"].nunique() == 8 and scorer.asked
    systems = graded_prompts(persona.trait)
    for row in found.table.itertuples():
        prompt = Prompt(persona.trait.evaluation_questions[row.question], systems[row.level])
        (answer,) = model.generate([prompt], max_new_tokens=12)
        last = collect(model, [prompt], [persona.site]).at(persona.site)[0]
        assert row.projection == pytest.approx(
            float(last.double() @ persona.direction.vector), abs=TOLERANCE
        )
        want = scorer.of(PromptResponse(prompt, answer.text))
        assert row.answer == answer.text and (
            row.score == pytest.approx(want) if want is not None else np.isnan(row.score)
        )
    asked, before = scorer.asked, store.read_bytes()
    again = monitor_trait(model, persona, store, scorer=scorer, sampling=sampling)
    assert store.read_bytes() == before  # nothing was paid for twice
    assert again.overall == found.overall and again.control == found.control
    assert scorer.asked == asked
    found.save(tmp_path)
    saved = json.loads((tmp_path / "monitor.json").read_text())
    assert saved["overall"]["r"] == found.overall.r and saved["systems"] == list(systems)
    assert len(pd.read_csv(tmp_path / "monitor.csv")) == 16
    assert save_monitoring(found, tmp_path / "figures" / "monitor.png").stat().st_size > 10_000


def test_another_models_persona_is_refused(tmp_path: Path) -> None:
    model = shared("llama_gqa", "bridge")
    wide = Direction(torch.ones(D_MODEL + 1), 1.0, Site(0, "resid_post"))
    persona = Persona(persona_of(model).trait, Directions((wide,)), wide, 1.0, "other")
    with pytest.raises(DirectionError, match="extract"):
        monitor_trait(model, persona, tmp_path / "m.jsonl", scorer=ShareOfVowels())


# --------------------------------------------------------------------------------- figures


def test_token_figure(tmp_path: Path) -> None:
    model = shared("llama_gqa", "bridge")
    seen = list(model.monitor(PROMPT, along(Site(1, "resid_post")), max_new_tokens=30))
    path = tokens_figure({"plain": seen, "again": seen[:3]}, tmp_path / "tokens.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunError, match="no generated tokens"):
        tokens_figure({"plain": []}, tmp_path / "none.png")


def test_scatter_of_flat_scores_says_so(tmp_path: Path) -> None:
    numbers = {"level": [0, 0, 1, 1], "question": [0, 1, 0, 1], "projection": [0.0, 1, 2, 3]}
    table = pd.DataFrame({**numbers, "score": 50.0})
    stream = torch.randn(4, D_MODEL).double()
    found: Monitoring = correlate(table, stream, along(Site(1, "resid_post")))
    assert found.overall.r is None and found.control["overall"] is None
    assert save_monitoring(found, tmp_path / "flat.png").exists()
    json.dumps(found.to_dict(), allow_nan=False)
