"""The lens and the readers, held to torch operations on the Hugging Face modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import N_LAYERS, PARTS, rows_of, shared, source_of, unit
from torch import Tensor

from interp_ablate import Site
from interp_ablate.circuits.lens import logit_lens
from interp_ablate.circuits.norm_gains import through_norm
from interp_ablate.circuits.reading import path_patching, reading_weights
from interp_ablate.directions.direction import Direction
from interp_ablate.errors import DirectionError

KINDS = ["llama_gqa", "gemma2", "gpt2", "gpt_neox", "olmo2", "gptj"]
ROWS = rows_of(9, 6)


def direction(layer: int = 1) -> Direction:
    return Direction(unit(), 1.0, Site(layer, "resid_post"))


@torch.no_grad()
def logits_of_far_point(hf: Any, kind: str, r: Tensor) -> Tensor:
    """The logits of a point far out along r, biases left out and the norm's scale undone."""
    norm, head = hf.get_submodule(PARTS[kind].norm).double(), hf.get_output_embeddings().double()
    far, bias = 1e6 * r, getattr(norm, "bias", None)
    centred = far if bias is None else far - far.mean()  # a layer norm has a bias
    read = norm(far) - (0 if bias is None else bias)
    return (head(read) - head(torch.zeros_like(read))) * (centred.pow(2).mean().sqrt() / 1e6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["hf", "bridge"])
def test_the_lens_is_the_final_norm_and_head_of_a_far_point(kind: str, backend: str) -> None:
    lens = logit_lens(shared(kind, backend), direction(), controls=20)
    want = logits_of_far_point(copy.deepcopy(source_of(kind)), kind, unit())
    torch.testing.assert_close(lens.logits, want, atol=2e-3, rtol=2e-3)
    assert abs(float(lens.z.std()) - 1) < 0.3  # r is random here
    assert lens.random_largest[0] <= lens.random_largest[1]
    frame = lens.to_frame(top=4)
    assert list(frame["side"]) == ["promoted"] * 4 + ["suppressed"] * 4
    assert frame["logit"].iloc[0] == float(lens.logits.max())


def test_a_direction_of_a_tokens_own_row_promotes_that_token() -> None:
    model, hf = shared("llama_gqa", "hf"), source_of("llama_gqa")
    row = hf.lm_head.weight[77].double() * hf.model.norm.weight.double()
    lens = logit_lens(model, Direction(row, 1.0, Site(1, "resid_post")))
    assert int(lens.z.argmax()) == 77 and float(lens.z.max()) > lens.random_largest[1]


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2", "olmo2"])
def test_alignment_is_the_length_of_the_folded_weight_times_r(kind: str) -> None:
    hf, frame = source_of(kind), reading_weights(shared(kind, "hf"), direction())
    block = hf.get_submodule(PARTS[kind].layers)[1]
    own = frame[frame["layer"] == 1].set_index(["weight", "head"])["alignment"]
    if kind == "gpt2":
        weight = block.attn.c_attn.weight.T.double() * block.ln_1.weight.double()
        weight = weight - weight.mean(1, keepdim=True)
        name, size = "attn.c_attn", 8
    else:
        gain = 1.0 if kind == "olmo2" else block.input_layernorm.weight.double()
        weight, name, size = block.self_attn.q_proj.weight.double() * gain, "self_attn.q_proj", 8
    for head in range(len(weight) // size):
        part = weight[head * size : (head + 1) * size]
        want = (part @ unit()).norm() / (part.norm() / 32**0.5)
        assert own[name, head] == pytest.approx(float(want), rel=2e-3)
    mlp = own.xs("mlp.c_fc" if kind == "gpt2" else "mlp.up_proj")
    assert len(mlp) == 1


def test_the_bridge_and_plain_transformers_read_alike() -> None:
    tables = [reading_weights(shared("llama_gqa", b), direction()) for b in ("hf", "bridge")]
    assert list(tables[0]["weight"]) == list(tables[1]["weight"])
    assert tables[0]["alignment"].tolist() == pytest.approx(
        tables[1]["alignment"].tolist(), rel=1e-3
    )


@torch.no_grad()
def patched_logits(kind: str, row: list[int], layer: int, module: str, r: Tensor) -> Tensor:
    """Log-probabilities with r taken out of what one norm of a Llama block reads, and nothing else."""
    block = source_of(kind).get_submodule(PARTS[kind].layers)[layer]
    norm = block.input_layernorm if module == "attn" else block.post_attention_layernorm
    handle = norm.register_forward_pre_hook(
        lambda m, args: (args[0] - (args[0].double() @ r)[..., None].to(args[0]) * r.to(args[0]),)
    )
    try:
        return (
            source_of(kind)(torch.tensor([row]), use_cache=False)
            .logits[0, -1]
            .double()
            .log_softmax(-1)
        )
    finally:
        handle.remove()


@pytest.mark.parametrize("backend", ["hf", "bridge", "hooked"])
def test_path_patching_takes_the_direction_out_of_one_norms_input_alone(backend: str) -> None:
    frame = path_patching(
        shared("llama_gqa", backend), ROWS, direction(), layers=[0, 2], controls=1
    )
    frame = frame.set_index(["layer", "module"])
    for (layer, module), kl in frame["kl"].items():
        wanted = []
        for row in ROWS:
            with torch.no_grad():
                base = (
                    source_of("llama_gqa")(torch.tensor([row]))
                    .logits[0, -1]
                    .double()
                    .log_softmax(-1)
                )
            other = patched_logits("llama_gqa", row, layer, module, unit())
            wanted.append(float((base.exp() * (base - other)).sum()))
        assert kl == pytest.approx(sum(wanted) / len(ROWS), rel=1e-2, abs=1e-6)
    assert (frame["random_kl"] >= 0).all() and (frame["n"] == len(ROWS)).all()
    assert len(frame) == 4


def test_norms_are_told_from_what_goes_in_and_out() -> None:
    x = torch.randn(40, 32, dtype=torch.float64)
    gain, bias = torch.randn(32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    r = unit()[None]
    layer_norm = torch.nn.functional.layer_norm(x, (32,), gain, bias)
    torch.testing.assert_close(
        through_norm(x, layer_norm, r), (r - r.mean()) * gain, atol=1e-3, rtol=1e-3
    )
    rms = x / x.pow(2).mean(-1, keepdim=True).sqrt() * gain
    torch.testing.assert_close(through_norm(x, rms, r), r * gain, atol=1e-6, rtol=1e-6)
    assert through_norm(x, torch.tanh(x @ torch.randn(32, 32).double()), r) is None
    assert torch.equal(through_norm(x, x, r), r)  # type: ignore[arg-type]


def test_a_direction_of_another_width_is_refused() -> None:
    model, other = (
        shared("llama_gqa", "hf"),
        Direction(torch.ones(7), 1.0, Site(N_LAYERS - 1, "resid_post")),
    )
    for ask in (logit_lens, reading_weights):
        with pytest.raises(DirectionError, match="d_model"):
            ask(model, other)
    with pytest.raises(DirectionError, match="d_model"):
        path_patching(model, ROWS, other)


def test_a_jacobian_lens_of_transformer_lens_is_the_mean_derivative() -> None:
    from transformer_lens.tools.analysis import JacobianLens

    model, hf = shared("llama_gqa", "bridge"), copy.deepcopy(source_of("llama_gqa")).double()
    text, skip = "one two three", 3
    fitted = JacobianLens.fit(
        model.tl, [text], corpus="test", skip_first_positions=skip, show_progress=False
    )
    lens = logit_lens(model, direction(0), transport=fitted.jacobians[0])

    row = model.tl.to_tokens(text)
    valid, r, step = range(skip, row.shape[1] - 1), unit(), 3e-3  # norms round to float32
    moved = torch.zeros(len(r), dtype=torch.float64)
    for t in valid:  # central differences of the last block's output
        ends = []
        for sign in (1, -1):
            stream: list[Tensor] = []

            def push(m: Any, a: Any, out: Tensor, sign: int = sign, t: int = t) -> Tensor:
                out = out.clone()
                out[0, t] += sign * step * r
                return out

            def keep(m: Any, a: Any, out: Tensor, stream: list[Tensor] = stream) -> None:
                stream.append(out[0])

            hooks = [hf.model.layers[0].register_forward_hook(push)]
            hooks += [hf.model.layers[N_LAYERS - 1].register_forward_hook(keep)]
            hf(row, use_cache=False)
            for hook in hooks:
                hook.remove()
            ends.append(stream[0][list(valid)].sum(0))
        moved += (ends[0] - ends[1]).detach() / (2 * step * len(valid))
    want = hf.lm_head.weight.detach() @ (hf.model.norm.weight.detach() * moved)
    torch.testing.assert_close(lens.logits, want, atol=2e-3, rtol=2e-3)
    with pytest.raises(DirectionError, match="transport has shape"):
        logit_lens(model, direction(), transport=torch.eye(3))
