"""Activations: Hugging Face's hidden states, at the positions asked for, exact moments, the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    D_MODEL,
    HAS_HOOKED,
    N_LAYERS,
    forward,
    make,
    make_tokenizer,
    rows_of,
    shared,
    tiny,
    unit,
)
from torch import Tensor

from interp_ablate import Ablate, ContrastSet, Site, collect, sites_of
from interp_ablate.activations.activations import RESPONSE_MEAN, Moments
from interp_ablate.activations.collection import collect_moments
from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.sites import RESIDUAL_POINTS

TOLERANCE = 2e-5  # fp32
TEXTS = ("Hi", "What is a river?", "Name two colours of the sky", "Go")
RESPONSES = ("Hello there", "Water", "Blue, and red", "Where?")


def oracle(kind: str, row: list[int], sites: tuple[Site, ...]) -> Tensor:
    """The activations of a plain forward pass at the sites: [pos, site, d_model]."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> Tensor:
        seen[site] = x[0]
        return x

    forward(tiny(kind)[0], row, keep)
    return torch.stack([seen[site] for site in sites], 1)


# --------------------------------------------------------------------------------- values


def test_resid_pre_is_hugging_faces_hidden_state(kind: str, backend: str) -> None:
    model, (hf, _) = shared(kind, backend), tiny(kind)
    found = collect(model, TEXTS)
    assert found.sites == sites_of(RESIDUAL_POINTS, range(N_LAYERS)) and found.positions == ("-1",)
    for i, text in enumerate(TEXTS):
        out = hf(torch.tensor([model.encode(text)]), output_hidden_states=True)
        for layer in range(N_LAYERS):
            want = out.hidden_states[layer][0, -1]
            got = found.at(Site(layer, "resid_pre"))[i]
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
            if layer:
                after = found.at(Site(layer - 1, "resid_post"))[i]
                torch.testing.assert_close(after, want, atol=TOLERANCE, rtol=0)
        last = found.at(Site(N_LAYERS - 1, "resid_post"))[i]  # before the final norm, not after it
        normed = out.hidden_states[-1][0, -1]
        assert (last - normed).abs().max() > 0.1
        torch.testing.assert_close(hf.model.norm(last), normed, atol=TOLERANCE, rtol=1e-5)


def test_every_site_and_offset_in_the_order_given(
    backend: str, all_sites: tuple[Site, ...]
) -> None:
    model = shared(backend=backend)
    sites, positions = all_sites[::-1], (-1, -5, -2)
    found = collect(model, TEXTS, sites, positions, batch_size=2)
    assert found.values.shape == (len(TEXTS), 3, len(sites), D_MODEL)
    assert found.positions == ("-1", "-5", "-2") and found.sites == sites
    for i, text in enumerate(TEXTS):
        want = oracle("llama_gqa", model.encode(text), sites)[[-1, -5, -2]]
        torch.testing.assert_close(found.values[i], want, atol=TOLERANCE, rtol=0)


def test_a_batch_equals_each_prompt_alone(kind: str, backend: str) -> None:
    model = shared(kind, backend)
    together = collect(model, TEXTS, positions=(-1, -3))
    alone = torch.cat([collect(model, [text], positions=(-1, -3)).values for text in TEXTS])
    torch.testing.assert_close(together.values, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("positions", ((RESPONSE_MEAN,), (-2, RESPONSE_MEAN, -1)))
def test_the_mean_over_given_responses(backend: str, positions: tuple[Any, ...]) -> None:
    model = shared(backend=backend)
    sites = sites_of(RESIDUAL_POINTS, [0, 2])
    found = collect(model, TEXTS, sites, positions, responses=RESPONSES, batch_size=3)
    for i, (text, response) in enumerate(zip(TEXTS, RESPONSES)):
        start = model.encode(text)
        row = start + make_tokenizer()(response, add_special_tokens=False)["input_ids"]
        whole = oracle("llama_gqa", row, sites)
        for place, position in enumerate(positions):
            want = (
                whole[len(start) :].mean(0)
                if position == RESPONSE_MEAN
                else whole[len(start) + position]
            )
            torch.testing.assert_close(found.values[i, place], want, atol=TOLERANCE, rtol=0)


def test_the_mean_over_the_models_own_responses(backend: str) -> None:
    model = shared(backend=backend)
    rows = rows_of(7, 9, 12)
    own = [list(g.tokens) for g in model.generate(rows, max_new_tokens=32)]
    assert all(own)
    found = collect(model, rows, [Site(1, "resid_mid")], [RESPONSE_MEAN])
    for i, (row, end) in enumerate(zip(rows, own)):
        want = oracle("llama_gqa", row + end, (Site(1, "resid_mid"),))[len(row) :].mean(0)
        torch.testing.assert_close(found.values[i, 0], want, atol=TOLERANCE, rtol=0)


def test_labels_follow_a_contrast_set(backend: str) -> None:
    contrast = ContrastSet.from_texts(["One more", "Two"], ["Three of them", "Four", "Five"])
    model = shared(backend=backend)
    found = collect(model, contrast)
    assert found.labels is not None and found.labels.tolist() == [True, True, False, False, False]
    plain = collect(model, ["One more", "Two", "Three of them", "Four", "Five"])
    assert plain.labels is None and torch.equal(plain.values, found.values)


def test_activations_under_a_plan(backend: str) -> None:
    model, sites = shared(backend=backend), sites_of(RESIDUAL_POINTS, range(N_LAYERS))
    with model.applied(Ablate(unit(), sites)):
        edited = collect(model, TEXTS)
    assert (edited.values.double() @ unit()).abs().max() < 1e-5
    assert (collect(model, TEXTS).values.double() @ unit()).abs().max() > 0.1


def test_no_logits_are_computed_and_batches_are_reported(backend: str) -> None:
    model = make(backend=backend)
    done: list[int] = []
    unembedded: list[int] = []
    model.tl.unembed.register_forward_hook(lambda *args: unembedded.append(1))
    collect(model, TEXTS, batch_size=3, on_batch=done.append)
    assert done == [3, 1] and not unembedded
    model.logits(TEXTS)
    assert unembedded


@pytest.mark.skipif(not HAS_HOOKED, reason="no HookedTransformer in TransformerLens 4")
def test_both_backends_collect_the_same(kind: str, all_sites: tuple[Site, ...]) -> None:
    bridge, hooked = (
        collect(shared(kind, b), TEXTS, all_sites, (-1, -4)) for b in ("bridge", "hooked")
    )
    torch.testing.assert_close(hooked.values, bridge.values, atol=TOLERANCE, rtol=1e-5)


# --------------------------------------------------------------------------------- moments


def test_moments_are_those_of_all_values_in_double() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(11, 2, 3, 4, generator=generator) + 1e4).float()
    wide = values.numpy().astype(np.float64)
    for parts in ([11], [1, 10], [4, 4, 3], [1] * 11):
        found = [Moments.of(part) for part in values.split(parts)]
        merged = found[0]
        for other in found[1:]:
            merged = merged.merge(other)
        assert merged.count == 11 and merged.mean.dtype == torch.float64
        np.testing.assert_allclose(merged.mean.numpy(), wide.mean(0), rtol=1e-14)
        np.testing.assert_allclose(
            (merged.squares / (merged.count - 1)).numpy(), wide.var(0, ddof=1), rtol=1e-8
        )


@pytest.mark.parametrize("batch_size", (1, 3, 32))
def test_collected_moments_and_moments_only(backend: str, batch_size: int) -> None:
    model = shared(backend=backend)
    kept = collect(model, TEXTS, positions=(-1, -2), batch_size=batch_size)
    assert kept.moments is not None
    wide = kept.values.double().numpy()
    np.testing.assert_allclose(kept.moments.mean.numpy(), wide.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        kept.moments.squares.numpy(), ((wide - wide.mean(0)) ** 2).sum(0), rtol=1e-10, atol=1e-14
    )
    only = collect_moments(model, TEXTS, positions=(-1, -2), batch_size=batch_size)
    assert only.count == len(TEXTS)
    assert torch.equal(only.mean, kept.moments.mean)
    assert torch.equal(only.squares, kept.moments.squares)


# --------------------------------------------------------------------------------- the cache


def forbid_running(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(model._backend, "forward", ran)


def test_what_was_collected_is_read_again(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contrast = ContrastSet.from_texts(["One", "Two"], ["Three"])
    first = collect(shared(backend=backend), contrast, positions=(-1, -2), cache=tmp_path / "c")
    model = shared(backend=backend)
    forbid_running(model, monkeypatch)
    again = collect(model, contrast, positions=(-1, -2), cache=tmp_path / "c")
    assert torch.equal(again.values, first.values) and again.sites == first.sites
    assert again.labels is not None and again.labels.tolist() == [True, True, False]
    assert again.moments is not None and first.moments is not None
    assert again.moments.count == 3 and torch.equal(again.moments.mean, first.moments.mean)
    assert torch.equal(again.moments.squares, first.moments.squares)
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".safetensors"]


def test_the_cache_is_keyed_by_all_that_matters(tmp_path: Path) -> None:
    model = make()
    sites = [Site(0, "resid_mid"), Site(1, "resid_pre")]

    def entries(m: Model = model, prompts: Any = TEXTS, s: Any = sites, p: Any = (-1,)) -> int:
        collect(m, prompts, s, p, cache=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert entries() == 1 and entries() == 1
    assert entries(prompts=TEXTS[::-1]) == 2
    assert entries(s=sites[::-1]) == 3
    assert entries(p=(-2,)) == 4
    assert entries(shared(kind="qwen3")) == 5
    with model.applied(Ablate(unit(), sites)):
        assert entries() == 6
        with model.applied(Ablate(unit(1), sites)):
            assert entries() == 7
    assert entries() == 7
    with torch.no_grad():  # a user's edit in place is another model
        model.tl.original_model.model.embed_tokens.weight[5] += 1
    assert entries() == 8


@pytest.mark.parametrize("damage", ("truncated", "empty", "other tensors", "other shape"))
def test_a_corrupt_cache_is_named(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    model = shared()
    collect(model, TEXTS, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    if damage == "truncated":
        os.truncate(entry, entry.stat().st_size // 2)
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "other tensors":
        save_file({"x": torch.zeros(3)}, entry)
    else:
        save_file({n: torch.zeros(4, 1, 2, 3) for n in ("values", "mean", "squares")}, entry)
    with pytest.raises(InterpAblateError, match=r"corrupt activation cache .*Delete this file"):
        collect(model, TEXTS, cache=tmp_path)


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InterpAblateError, match=r"cannot write the activation cache"):
            collect(shared(), TEXTS, cache=place)
    from safetensors import SafetensorError

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(InterpAblateError, match=r"cannot write .*No space left"):
        collect(shared(), TEXTS, cache=tmp_path / "full")
    assert not list(tmp_path.glob("full/*"))


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("point", ("attn_out", "mlp_out"))
def test_nan_names_the_first_site(backend: str, point: str) -> None:
    hf, tokenizer = tiny()
    module = "self_attn.o_proj" if point == "attn_out" else "mlp.down_proj"
    hf.model.layers[1].get_submodule(module).weight[4, 5] = float("nan")
    if backend == "hooked":  # conversion refuses such a model at once: plant the NaN behind it
        model = make(backend=backend)
        block = model.tl.blocks[1]
        (block.attn.W_O if point == "attn_out" else block.mlp.W_out).data[0, 0] = float("nan")
    else:
        model = from_hf(hf, tokenizer)
    first = "resid_mid" if point == "attn_out" else "resid_post"
    with pytest.raises(
        ModelError, match=rf"NaN or infinity .*blocks.1.hook_{first}\[-1\].*bfloat16"
    ):
        collect(model, TEXTS)


@pytest.mark.parametrize(
    "position", (99, -99, "last", "--1", "-01", "-0", "", "-1.0", "\u00b2", None, True)
)
def test_unknown_positions(position: Any) -> None:
    with pytest.raises(InterpAblateError, match=r"unknown position .*-1 .*to -.*response_mean"):
        collect(shared(), TEXTS, positions=[position])


def test_bad_requests() -> None:
    model = shared()
    for options, message in (
        ({"positions": []}, r"no positions"),
        ({"positions": [-1, "-1"]}, r"named twice"),
        ({"positions": [RESPONSE_MEAN], "responses": ["one"]}, r"1 responses for 4 prompts"),
        ({"positions": [RESPONSE_MEAN], "responses": ["a", "", "c", ""]}, r"\[1, 3\] are empty"),
        ({"sites": [Site(0, "resid_pre"), Site(9, "resid_pre")]}, r"no layer 9"),
    ):
        with pytest.raises(InterpAblateError, match=message):
            collect(model, TEXTS, **options)
    with pytest.raises(ModelError, match=r"no tokens"):
        collect(model, [])


def test_offsets_end_with_the_template() -> None:
    """These tokens follow the instruction: <|im_end|>, newline, <|im_start|>, the bytes of assistant, newline."""
    model = shared()
    suffix = 3 + len("assistant\n")
    assert collect(model, ["Hi"], [Site(0, "embed")], [-suffix]).values.shape[0] == 1
    found = collect(model, ["Hi"], positions="after_instruction")
    assert found.positions == tuple(str(-i) for i in range(1, suffix + 1))
    before = collect(model, ["Hi"], positions=[-suffix - 1])  # the instruction's own last token
    assert before.tokens == (("i",),)


def test_reading_what_was_not_collected() -> None:
    found = collect(shared(), TEXTS, [Site(1, "resid_mid")])
    for site, position in ((Site(0, "resid_mid"), -1), (Site(1, "resid_mid"), -2)):
        with pytest.raises(InterpAblateError, match=r"no activations at .*collected were 1 sites"):
            found.at(site, position)
