"""The measured anatomy: the sums that tiny models were built with, and what is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_models import D_MODEL, N_LAYERS, build, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interp_ablate import export_checkpoint
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError, ModelError
from interp_ablate.models.anatomy import Anatomy
from interp_ablate.models.backends.hf import measured_anatomy
from interp_ablate.models.load import from_hf
from interp_ablate.models.measured_architecture import architecture_from


def anatomy(model_type: str) -> tuple[Any, Anatomy]:
    hf = build(model_type)
    return hf, measured_anatomy(hf)


def with_layer_scalars(hf: Any) -> Any:
    """Gemma 4 with factors as training leaves them."""
    for i, layer in enumerate(hf.model.layers):
        layer.layer_scalar.fill_(0.3 + 0.2 * i)
    return hf


def parts(measured: Anatomy, layer: int) -> tuple[list[str], list[str]]:
    """Names of the branches of a block, inside it."""
    block = measured.blocks[layer]
    start = len(f"{measured.blocks_path}.{layer}.")
    return [b.path[start:] for b in block.attn], [b.path[start:] for b in block.mlp]


@pytest.mark.parametrize(
    ("model_type", "attn", "mlp"),
    [
        ("llama", ["self_attn"], ["mlp"]),
        ("gemma2", ["post_attention_layernorm"], ["post_feedforward_layernorm"]),
        ("falcon_h1", ["mamba", "self_attn"], ["feed_forward"]),
        ("granitemoeshared", ["self_attn"], ["block_sparse_moe", "shared_mlp"]),
        ("mamba", [], ["mixer"]),
    ],
)
def test_the_summands_of_a_block(model_type: str, attn: list[str], mlp: list[str]) -> None:
    _, measured = anatomy(model_type)
    assert not measured.problems and len(measured.blocks) == N_LAYERS
    assert all(parts(measured, layer) == (attn, mlp) for layer in range(N_LAYERS))


def test_a_multiplier_is_part_of_the_sum() -> None:
    _, measured = anatomy("granite")  # residual_multiplier 0.22
    scales = [b.scale for block in measured.blocks for b in (*block.attn, *block.mlp)]
    assert scales == pytest.approx([0.22] * 2 * N_LAYERS, rel=1e-5)
    assert measured.embed_scale == pytest.approx(3.0, rel=1e-5)  # embedding_multiplier


def test_parallel_blocks_are_told_from_sequential_ones() -> None:
    assert all(block.parallel for block in anatomy("cohere")[1].blocks)
    assert not any(block.parallel for block in anatomy("llama")[1].blocks)


def test_experts_biases_and_layouts() -> None:
    hf, measured = anatomy("gpt_oss")
    block = measured.blocks[0]
    layouts = {name.split("layers.0.")[1]: layout for name, layout in block.mlp[0].writers.items()}
    assert layouts == {
        "mlp.experts.down_proj": "experts_conv1d",
        "mlp.experts.down_proj_bias": "conv1d",
    }
    assert set(block.attn[0].writers.values()) == {"linear", "bias"}
    names = dict(hf.named_parameters())
    assert all(name in names for b in (*block.attn, *block.mlp) for name in b.writers)


def test_learned_positions() -> None:
    assert anatomy("gpt2")[1].pos_embed == "transformer.wpe"
    assert anatomy("opt")[1].pos_embed == "model.decoder.embed_positions"
    assert anatomy("llama")[1].pos_embed is None


def test_what_writes_beside_the_embeddings_is_named() -> None:
    """XGLM adds sinusoids, which no weight holds: 13% of the stream was left along an ablated direction."""
    hf, measured = anatomy("xglm")
    assert "model.embed_positions writes there too" in measured.embed_problem
    with pytest.raises(ExportError, match="embed_positions"):
        architecture_from(measured, "lm_head.weight", hf.config)
    model = from_hf(hf, None)
    assert model.backend == "hf"
    with pytest.raises(ExportError, match="embed_positions"):
        Ablate(torch.ones(D_MODEL), model.writers)


def test_the_factor_of_a_blocks_whole_stream() -> None:
    """Gemma 4's trained blocks multiply the stream by a scalar of their own, which is 1 in a new model."""
    hf = with_layer_scalars(build("gemma4_text"))
    measured = measured_anatomy(hf)
    assert not measured.problems
    for block, layer in zip(measured.blocks, hf.model.layers):
        assert block.stream_scale == pytest.approx(float(layer.layer_scalar), rel=1e-5)
        assert all(branch.scale == 1.0 for branch in (*block.attn, *block.mlp))


def test_a_stream_that_passes_a_norm_is_refused_in_words() -> None:
    problems = anatomy("bert")[1].problems
    assert (
        "output.LayerNorm, with nothing of what entered beside it: the stream itself" in problems[1]
    )


def test_a_gate_over_channels_is_refused_in_words() -> None:
    """RWKV's channel mixing: sigmoid(receptance) * value, of which it was said only that no parameter writes it."""
    problems = anatomy("rwkv")[1].problems
    assert "pre_ln + attention.output + feed_forward, with nothing of what entered" in problems[0]
    assert "multiplies what receptance and value give channel by channel" in problems[1].replace("value and receptance", "receptance and value")  # fmt: skip


def test_a_stream_that_is_halved_between_blocks_is_refused_in_words() -> None:
    """RWKV's rescale_every divides what leaves every sixth block by two, and its weights in place."""
    config = tiny_config(CONFIG_MAPPING["rwkv"])
    config.rescale_every = 3
    hf = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ModelError, match=r"multiplied by 0\.5 between rwkv\.blocks\.2 and rwkv\.blocks\.3"
    ):
        measured_anatomy(hf)


def test_a_parameter_that_a_block_adds_itself_is_named() -> None:
    """GPT-NeoX Japanese's last block adds attention.dense_bias, which its attention only hands out."""
    problems = anatomy("gpt_neox_japanese")[1].problems
    assert problems == [
        "blocks.3: the block itself adds attention.dense_bias, which no module of it returns"
    ]


def test_a_norm_inside_the_module_that_writes() -> None:
    """A.X-K1's mixtures end in a norm: what they write seemed to come from no parameter."""
    [branch] = anatomy("axk1")[1].blocks[1].mlp
    assert [part.norms[0].path.rpartition(".")[2] for part in branch.parts] == [
        "post_mlp_layernorm"
    ] * 2
    assert {layout for part in branch.parts for layout in part.writers.values()} == {
        "experts",
        "linear",
    }


def test_norms_of_sums_of_norms() -> None:
    """Gemma 4's mixtures: a norm of the MLP's norm and the experts', and a branch with a norm of its own after it."""
    config = CONFIG_MAPPING["gemma4_text"]
    sizes = tiny_config(config).to_dict()
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(
        config(**{**sizes, **experts, "moe_intermediate_size": 32})
    )
    measured = measured_anatomy(hf.eval())
    assert not measured.problems
    fed_forward, per_layer = measured.blocks[1].mlp
    assert [len(part.norms) for part in fed_forward.parts] == [2, 2]
    assert [set(part.writers.values()) for part in fed_forward.parts] == [{"linear"}, {"experts"}]
    assert per_layer.path in measured.blocks[1].chained and len(per_layer.parts[0].norms) == 1


def test_blocks_of_two_kinds_have_writers_of_two_kinds() -> None:
    model = from_hf(build("olmo_hybrid"), None)
    points = [{site.point for site in model.writers if site.layer == i} for i in range(N_LAYERS)]
    assert {"attn_proj", "mlp_proj"} in points  # with norms after them
    assert {"attn_out", "mlp_out"} in [each - {"embed"} for each in points]


def test_one_of_several_projections_is_not_read() -> None:
    model = from_hf(build("gemma4_text"), None)
    with pytest.raises(ModelError, match=r"several projections.*read blocks\.1\.hook_mlp_out"):
        list(model.stream([[3, 4]], keep=0, capture={"1.mlp_proj": lambda x, batch: x}))


class _Extra(nn.Module):
    """A Llama block that adds something beside its branches."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share
        self.attention_type = getattr(inner, "attention_type", None)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.inner(hidden_states, **kwargs) + self.share * hidden_states.roll(1, -1)


def test_a_block_that_adds_something_else_is_inexact_by_name() -> None:
    hf = build("llama")
    hf.model.layers[2] = _Extra(hf.model.layers[2], 0.02)
    problems = measured_anatomy(hf).problems
    assert len(problems) == 1 and problems[0].startswith("blocks.2: what the block adds")


def test_half_precision_is_measured_in_float32() -> None:
    hf = build("qwen2").to(torch.bfloat16)
    before = {name: p.clone() for name, p in hf.named_parameters()}
    measured = measured_anatomy(hf)
    assert not measured.problems
    assert all(b.scale == 1.0 for block in measured.blocks for b in (*block.attn, *block.mlp))
    assert all(torch.equal(p, before[name]) for name, p in hf.named_parameters())


def test_a_model_without_one_stream_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = build("llama").config
            self.embed = nn.Embedding(300, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 9), nn.Linear(9, 8)])

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.raises(ModelError, match="no list of blocks"):
        measured_anatomy(Odd())


def test_a_block_of_zeros_writes_where_its_code_does() -> None:
    """Blocks that were added to a model begin with zeros: nothing that they write can be seen as they are."""
    hf = build("llama")
    want = measured_anatomy(hf)
    with torch.no_grad():
        for part in (hf.model.layers[1].self_attn.o_proj, hf.model.layers[1].mlp.down_proj):
            part.weight.zero_()
        hf.model.layers[2].self_attn.o_proj.weight.zero_()
    before = {name: p.clone() for name, p in hf.named_parameters()}
    assert measured_anatomy(hf) == want
    assert all(torch.equal(p, before[name]) for name, p in hf.named_parameters())


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi", "opt", "gpt_oss"])
def test_biases_of_zeros_write_as_others_do(model_type: str, tmp_path: Path) -> None:
    """As a fresh model has them."""
    hf = build(model_type)
    want = measured_anatomy(hf)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "bias" in name:
                parameter.zero_()
    assert measured_anatomy(hf) == want
    model = from_hf(hf, None)
    writer = [site for site in model.writers if site.point == "attn_out"][-1:]
    plan = Plan((Add(torch.ones(D_MODEL), writer, coefficient=2.0),))
    certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=[[1, 2, 3]])
    assert certificate["passed"]


@pytest.mark.parametrize("model_type", ["falcon_h1", "gpt_oss", "olmo_hybrid", "gpt2"])
def test_half_precision_of_mixed_kinds(model_type: str) -> None:
    hf = build(model_type)
    exact = measured_anatomy(hf)
    half = measured_anatomy(hf.to(torch.bfloat16))
    assert not half.problems
    for block, want in zip(half.blocks, exact.blocks):
        assert block.stream_scale == want.stream_scale
        for one, other in zip((*block.attn, *block.mlp), (*want.attn, *want.mlp), strict=True):
            assert one.parts == other.parts and one.scale == pytest.approx(other.scale, rel=1e-5)
