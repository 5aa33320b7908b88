"""Attribution adds up on every architecture, and each part is what an oracle with plain torch hooks computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny import N_LAYERS, PARTS, gains_of, make_tokenizer, rows_of, shared, source_of, tiny, unit
from torch import Tensor, nn

from interp_ablate import Ablate, ContrastSet, Plan, Site
from interp_ablate.circuits.attribution import Attribution, attribute
from interp_ablate.directions.direction import Direction
from interp_ablate.errors import DirectionError, ModelError, PlanError
from interp_ablate.models.load import from_hf
from interp_ablate.stats.intervals import difference_of_means

ROWS = rows_of(9, 14, 5)
LAST = Site(N_LAYERS - 1, "resid_post")
# Loaded through the Bridge, heads are told apart where its component map names what writes.
ENTRIES_MISSING = ("granite", "gpt_oss", "qwen2_moe", "falcon", "bloom")
CASES = [
    (kind, backend)
    for kind in PARTS
    for backend in ("hf", "bridge")
    if kind != "cohere" or backend == "hf"
]


def direction(site: Site = LAST, **fields: Any) -> Direction:
    return Direction(unit(), 1.0, site, **fields)


@cache
def attributed(kind: str, backend: str) -> Attribution:
    return attribute(shared(kind, backend), ROWS, direction(), positions="all")


@torch.no_grad()
def streams(kind: str, row: list[int], layer: int) -> Tensor:
    """What leaves a block, by a plain hook on it: [pos, d_model], float64."""
    hf, kept = source_of(kind), []
    lists = (m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS)
    block = next(lists)[layer]
    handle = block.register_forward_hook(
        lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        hf(torch.tensor([row]), use_cache=False)
    finally:
        handle.remove()
    return kept[0].reshape(len(row), -1).double()


@pytest.mark.parametrize("kind, backend", CASES)
def test_terms_add_up_to_the_projection_of_plain_transformers(kind: str, backend: str) -> None:
    result = attributed(kind, backend)
    want = torch.cat([streams(kind, row, N_LAYERS - 1) @ unit() for row in ROWS])
    total = result.values.sum(1)
    assert float((total - want).norm()) <= 1e-5 * float(want.norm())
    assert result.error < 1e-6
    assert not [t.name for t in result.terms if t.kind == "rest"]
    if backend == "hf":
        assert result.whole == {}
    heads = sum(t.kind == "head" for t in result.terms)
    assert heads == (0 if backend == "bridge" and kind in ENTRIES_MISSING else 4 * N_LAYERS)


@torch.no_grad()
def heads_by_removal(kind: str, row: list[int], layer: int) -> Tensor:
    """What each head adds along r: the projection's output less that with the head's columns zero, [pos, head]."""
    hf, parts = source_of(kind), PARTS[kind]
    module = hf.get_submodule(f"{parts.layers}.{layer}.{parts.attn}")
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    try:
        hf(torch.tensor([row]), use_cache=False)
    finally:
        handle.remove()
    z = read[0].reshape(len(row), -1)
    whole = module(z).double()
    gain = gains_of(hf, kind).get(Site(layer, "attn_proj"), torch.ones_like(unit()))
    eps = getattr(hf.config, "rms_norm_eps", 0.0) if gains_of(hf, kind) else 0.0
    scale = (whole.pow(2).mean(-1) + eps).rsqrt() if gains_of(hf, kind) else torch.ones(len(row))
    scale = scale * getattr(hf.config, "residual_multiplier", 1.0)
    size = z.shape[1] // 4
    shares = []
    for head in range(4):
        without = z.clone()
        without[:, head * size : (head + 1) * size] = 0
        shares.append(((whole - module(without).double()) * gain) @ unit() * scale)
    return torch.stack(shares, 1)


WITH_HEADS = [
    "llama_gqa",
    "llama_biases",
    "qwen3",
    "gemma2",
    "olmo2",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
]


@pytest.mark.parametrize("kind", WITH_HEADS)
@pytest.mark.parametrize("backend", ["hf", "bridge"])
def test_heads_are_what_removal_of_their_columns_takes_away(kind: str, backend: str) -> None:
    if backend == "bridge" and kind in ENTRIES_MISSING:
        pytest.skip("given whole there")
    result = attributed(kind, backend)
    for layer in range(N_LAYERS):
        columns = [i for i, t in enumerate(result.terms) if t.kind == "head" and t.layer == layer]
        got = result.values[:, columns]
        want = torch.cat([heads_by_removal(kind, row, layer) for row in ROWS])
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def experts_by_removal(kind: str, row: list[int], layer: int) -> Tensor:
    """What each expert adds along r: the block of experts less that with the expert's weight zero, [pos, expert]."""
    hf, kept = source_of(kind), []
    module = hf.get_submodule(f"{PARTS[kind].layers}.{layer}.mlp")
    handle = module.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    try:
        hf(torch.tensor([row]), use_cache=False)
    finally:
        handle.remove()

    def output() -> Tensor:
        out = module(kept[0])
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(len(row), -1).double() @ unit()

    whole, shares = output(), []
    written = [p for n, p in module.experts.named_parameters() if n.startswith("down_proj")]
    for expert in range(4):
        before = [p[expert].clone() for p in written]
        for p in written:
            p[expert] = 0
        shares.append(whole - output())
        for p, old in zip(written, before):
            p[expert] = old
    return torch.stack(shares, 1)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_experts_are_what_removal_of_their_weights_takes_away(kind: str) -> None:
    result = attributed(kind, "hf")
    for layer in range(N_LAYERS):
        columns = [
            i for i, t in enumerate(result.terms)
            if t.kind == "expert" and t.layer == layer and t.index is not None
        ]  # fmt: skip
        want = torch.cat([experts_by_removal(kind, row, layer) for row in ROWS])
        torch.testing.assert_close(result.values[:, columns], want, atol=2e-5, rtol=1e-4)
    shared_expert = [t.name for t in result.terms if t.kind == "expert" and t.index is None]
    assert bool(shared_expert) == (kind == "qwen2_moe")


@torch.no_grad()
def neurons_by_removal(kind: str, row: list[int], layer: int, chosen: list[int]) -> Tensor:
    """What neurons add along r: the MLP's output less that with the neuron's activation zero, [pos, neuron]."""
    hf, name, gains = (
        source_of(kind),
        f"{PARTS[kind].layers}.{layer}.mlp",
        gains_of(source_of(kind), kind),
    )
    mlp = hf.get_submodule(name)
    last = [m for m in mlp.modules() if getattr(m, "weight", None) is not None][-1]
    read: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    try:
        hf(torch.tensor([row]), use_cache=False)
    finally:
        handle.remove()
    a = read[0].reshape(len(row), -1)
    whole, shares = last(a).double(), []
    gain = gains.get(Site(layer, "mlp_proj"), torch.ones_like(unit()))
    eps = getattr(hf.config, "rms_norm_eps", 0.0)
    scale = (whole.pow(2).mean(-1) + eps).rsqrt() if gains else torch.ones(len(row))
    for neuron in chosen:
        without = a.clone()
        without[:, neuron] = 0
        shares.append(((whole - last(without).double()) * gain) @ unit() * scale)
    return torch.stack(shares, 1)


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_biases", "gemma2", "olmo2", "gpt2"])
@pytest.mark.parametrize("backend", ["hf", "bridge"])
def test_neurons_are_what_their_removal_takes_away_and_add_up_to_the_mlp(
    kind: str, backend: str
) -> None:
    model, plain = shared(kind, backend), attributed(kind, backend)
    result = attribute(model, ROWS, direction(), positions="all", neurons=5)
    assert result.error < 1e-6 and result.whole == plain.whole
    neurons = [t for t in result.terms if t.kind == "neuron"]
    assert len(neurons) == 5
    for layer in range(N_LAYERS):
        mine = [i for i, t in enumerate(result.terms) if t.layer == layer and t.module == "mlp"]
        (whole,) = [i for i, t in enumerate(plain.terms) if t.layer == layer and t.module == "mlp"]
        torch.testing.assert_close(
            result.values[:, mine].sum(1), plain.values[:, whole], atol=1e-5, rtol=1e-5
        )
        columns = [i for i in mine if result.terms[i].kind == "neuron"]
        if columns:
            chosen = [int(result.terms[i].index or 0) for i in columns]
            want = torch.cat([neurons_by_removal(kind, row, layer, chosen) for row in ROWS])
            torch.testing.assert_close(result.values[:, columns], want, atol=2e-5, rtol=1e-4)


def test_the_neurons_shown_are_the_largest_of_all() -> None:
    model = shared("llama_gqa", "hf")
    every = attribute(model, ROWS, direction(), neurons=10**6)
    few = attribute(model, ROWS, direction(), neurons=3)
    assert not [t for t in every.terms if t.name.endswith("others")]
    frames = [
        f[f["kind"] == "neuron"].set_index("term")["mean"].abs()
        for f in (every.to_frame(), few.to_frame())
    ]
    assert set(frames[1].index) == set(frames[0].nlargest(3).index)
    assert [t.name for t in few.terms if t.name.endswith("others")] == [
        "L0.mlp.others",
        "L1.mlp.others",
        "L2.mlp.others",
    ][:N_LAYERS]


def test_an_mlp_of_experts_stays_one_of_experts() -> None:
    terms = attribute(shared("mixtral", "hf"), ROWS, direction(), neurons=3).terms
    assert {t.kind for t in terms if t.module == "mlp"} == {"expert"}


@pytest.mark.parametrize("point, n_terms", [("resid_pre", 1 + 5), ("resid_mid", 1 + 5 + 4)])
def test_only_what_came_before_the_site_is_a_term(point: str, n_terms: int) -> None:
    model = shared("llama_gqa", "hf")
    result = attribute(model, ROWS, direction(Site(1, point)))  # type: ignore[arg-type]
    assert len(result.terms) == n_terms and len(result) == len(ROWS) and result.error < 1e-6
    assert result.position.tolist() == [len(row) - 1 for row in ROWS]


def test_a_contrast_set_gives_both_means_and_the_interval_of_their_difference() -> None:
    hf, tokenizer = tiny("llama_gqa")
    model = from_hf(hf, tokenizer, backend="hf")
    contrast = ContrastSet.from_texts(["one", "two!", "three"], ["uno", "dos", "tres", "cuatro"])
    result = attribute(model, contrast, direction())
    frame = result.to_frame().set_index("term")
    alone = [attribute(model, text, direction()).values[0] for text in contrast.positive]
    np.testing.assert_allclose(frame["positive"], torch.stack(alone).mean(0), atol=1e-6)
    np.testing.assert_allclose(frame["difference"], frame["positive"] - frame["negative"])
    gap = result.projection[:3].mean() - result.projection[3:].mean()
    assert frame["difference"].sum() == pytest.approx(float(gap), rel=1e-5)
    assert frame.loc["embed", "difference"] == 0  # one last token of the chat template
    moved = frame.drop("embed")
    assert (moved["low"] < moved["difference"]).all()
    assert (moved["high"] > moved["difference"]).all()
    assert frame["share"].sum() == pytest.approx(1)
    tidy = result.to_frame("token")
    assert tidy.groupby(["prompt", "position"])["value"].sum().to_numpy() == pytest.approx(
        result.projection.numpy(), rel=1e-4, abs=1e-5
    )
    one = result.of_token(2, -1)
    assert one["value"].abs().is_monotonic_decreasing
    assert one["value"].sum() == pytest.approx(float(result.projection[2]), rel=1e-4)
    with pytest.raises(ModelError, match="no attribution of position"):
        result.of_token(9, 0)


def test_welch_interval_is_scipys() -> None:
    from scipy.stats import ttest_ind

    a, b = np.arange(7.0) ** 1.5, np.array([3.0, 1, 4, 1, 5])
    want = ttest_ind(a, b, equal_var=False).confidence_interval()
    got = difference_of_means(a, b)
    assert (got.low, got.high) == pytest.approx((want.low, want.high))
    assert difference_of_means([1.0], [2.0, 3.0]).low is None


def test_what_has_no_attribution_is_refused_in_words() -> None:
    model = shared("llama_gqa", "hf")
    with pytest.raises(ModelError, match="not a place of the residual stream"):
        attribute(model, ROWS, direction(Site(1, "mlp_out")))
    with pytest.raises(ModelError, match="say which tokens"):
        attribute(model, ROWS, direction(position="response_mean"))
    with pytest.raises(ModelError, match="-1 to -5"):
        attribute(model, ROWS, direction(), positions=-6)
    with pytest.raises(ModelError, match="neurons=-1"):
        attribute(model, ROWS, direction(), neurons=-1)
    with pytest.raises(DirectionError, match="d_model"):
        attribute(model, ROWS, Direction(torch.ones(7), 1.0, LAST))
    plan = Plan((Ablate(unit(), model.writers),))
    with model.applied(plan):
        model.logits(ROWS)
        with pytest.raises(PlanError, match="without edits"):
            attribute(model, ROWS, direction())


def test_half_precision_adds_up_to_its_own_rounding() -> None:
    hf, _ = tiny("llama_gqa")
    model = from_hf(hf.bfloat16(), make_tokenizer(), backend="hf")
    result = attribute(model, ROWS, direction(), positions="all")
    assert result.error < 0.01 and result.whole == {}
