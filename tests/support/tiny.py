"""Tiny random models for the tests, a byte tokenizer, and two plain oracles.

Every tensor is random, norm weights and biases too: unit norms and zero biases hide faults.
`forward` computes a Llama-style model with its Hugging Face modules called one by one, and hands every site
of the residual stream to a function: what a plan must compute, without hooks, caches, padding or
TransformerLens. `hf_forward` does it for every architecture: torch hooks on the Hugging Face modules that
`PARTS` names, a table of its own beside the package's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from interp_ablate import Plan, Site
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.kinds import Edit, Erase
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.sites import POINTS, Point

try:  # TransformerLens 4 has no HookedTransformer, and says so on import
    import transformer_lens

    HookedTransformer: Any = transformer_lens.HookedTransformer
except ImportError:
    HookedTransformer = None
HAS_HOOKED = HookedTransformer is not None
BACKENDS = ("bridge", "hooked") if HAS_HOOKED else ("bridge",)
KINDS = ("llama_gqa", "llama", "mistral", "qwen2", "qwen3")
# What a model without learned positions has.
ROTARY_POINTS: tuple[Point, ...] = tuple(p for p in POINTS if p not in ("pos_embed", "embed_bias"))
N_LAYERS, D_MODEL = 3, 32
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EditAt = Callable[[Site, Tensor], Tensor]


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens and three special ones, in memory."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Parts:
    """Where a decoder's Hugging Face modules are, and the config fields of its tiny model.

    `attn` and `mlp` are modules of a block whose output reaches the stream, through `attn_norm` and
    `mlp_norm` where there are such norms. `experts` is the module that holds experts as one 3-D tensor.
    """

    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    positions: str | None = None
    attn: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    attn_norm: str | None = None
    mlp_norm: str | None = None
    offset: float = 0.0
    norm: str = "model.norm"
    parallel: bool = False
    experts: str | None = None
    model_type: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def gain(self, hf: Any, site: Site) -> Tensor | None:
        """Gain of the norm between a projection and the stream."""
        name = {"attn_proj": self.attn_norm, "mlp_proj": self.mlp_norm}.get(site.point)
        if name is None:
            return None
        return hf.get_submodule(f"{self.layers}.{site.layer}.{name}").weight.double() + self.offset

    @property
    def points(self) -> tuple[Point, ...]:
        """The points of an exact plan."""
        block: tuple[Point, ...] = ("attn_out", "mlp_out")
        if self.attn_norm:
            block = ("attn_proj", "mlp_proj")
        return (("embed", "pos_embed") if self.positions else ("embed",)) + block

    @property
    def writers(self) -> list[Site]:
        embeddings: list[Point] = [p for p in self.points if p.endswith("embed")]
        blocks = [Site(i, p) for i in range(N_LAYERS) for p in self.points[-2:]]
        return [*(Site(0, point) for point in embeddings), *blocks]

    @property
    def residual(self) -> list[Site]:
        points: list[Point] = ["resid_pre", "resid_mid", "resid_post"]
        if self.parallel:
            points.remove("resid_mid")
        return [Site(i, point) for i in range(N_LAYERS) for point in points]


_POST = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
_GPT = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256}
_H: dict[str, Any] = {
    "layers": "transformer.h",
    "embed": "transformer.wte",
    "norm": "transformer.ln_f",
}
_NEOX: dict[str, Any] = {
    "layers": "gpt_neox.layers",
    "embed": "gpt_neox.embed_in",
    "attn": "attention.dense",
    "mlp": "mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
_DECODER: dict[str, Any] = {
    "layers": "model.decoder.layers",
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "norm": "model.decoder.final_layer_norm",
}
# Every entry of the package's table; some in more than one form.
DECLARED: dict[str, Parts] = {
    "llama_gqa": Parts(),
    "llama_biases": Parts(config={"attention_bias": True, "mlp_bias": True}, model_type="llama"),
    "mistral": Parts(),
    "qwen2": Parts(),
    "qwen3": Parts(),
    "phi3": Parts(),
    "smollm3": Parts(),
    "gemma": Parts(config={"head_dim": 8}),
    "gemma2": Parts(**_POST, offset=1.0, config={"head_dim": 8, "sliding_window": 64}),
    "gemma3_text": Parts(**_POST, offset=1.0, config={"head_dim": 8, "sliding_window": 64}),
    "olmo2": Parts(**_POST),
    "gpt2": Parts(
        **_H, positions="transformer.wpe", attn="attn.c_proj", mlp="mlp.c_proj", config=_GPT
    ),
    "gpt_neox": Parts(**_NEOX, parallel=True),
    "gpt_neox_sequential": Parts(
        **_NEOX, model_type="gpt_neox", config={"use_parallel_residual": False}
    ),
    "mixtral": Parts(
        mlp="mlp",
        experts="mlp.experts",
        config={"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Parts(mlp="mlp", experts="mlp.experts", config={**_MOE, "decoder_sparse_step": 1}),
    "qwen3_moe_mixed": Parts(  # layer 1 is dense
        mlp="mlp",
        experts="mlp.experts",
        model_type="qwen3_moe",
        config={**_MOE, "mlp_only_layers": [1]},
    ),
}
# Without an entry: their writers are found in the Bridge's component map.
DISCOVERED: dict[str, Parts] = {
    "stablelm": Parts(),
    "starcoder2": Parts(mlp="mlp.c_proj"),
    "phi": Parts(
        attn="self_attn.dense", mlp="mlp.fc2", norm="model.final_layernorm", parallel=True
    ),
    "opt": Parts(
        **_DECODER,
        attn="self_attn.out_proj",
        mlp="fc2",
        config={"ffn_dim": 48, "word_embed_proj_dim": D_MODEL},
    ),
    "glm4": Parts(
        attn_norm="post_self_attn_layernorm",
        mlp_norm="post_mlp_layernorm",
        config={"head_dim": 8},
    ),
    "gptj": Parts(
        **_H,
        attn="attn.out_proj",
        mlp="mlp.fc_out",
        parallel=True,
        config={**_GPT, "rotary_dim": 8},
    ),
    "gpt_neo": Parts(
        **_H,
        positions="transformer.wpe",
        attn="attn.attention.out_proj",
        mlp="mlp.c_proj",
        config={"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
    ),
    "exaone4": Parts(**_POST),
    "olmo": Parts(),
    "nemotron": Parts(),
    "seed_oss": Parts(),
    "ministral3": Parts(),
}
# Loaded by the Bridge, but not every writer is found.
NOT_FOUND: dict[str, Parts] = {
    "falcon": Parts(),
    "bloom": Parts(config={"n_layer": N_LAYERS, "n_head": 4}),
    "granite": Parts(config={"residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "gpt_oss": Parts(config={"num_local_experts": 4, "head_dim": 8}),
    "qwen2_moe": Parts(config={**_MOE, "shared_expert_intermediate_size": 24}),
}
PARTS: dict[str, Parts] = {
    **DECLARED,
    **DISCOVERED,
    **NOT_FOUND,
    "llama": Parts(),
    "cohere": Parts(parallel=True),
}
# Their configs take n_kv_heads otherwise, or not at all.
_NO_GROUPS = ("gpt2", "gpt_neox", "gptj", "bloom", "opt", "phi", "falcon", "gpt_neo")


def _config(kind: str, **extra: Any) -> tuple[Any, Any]:
    values: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama_gqa": (LlamaConfig, LlamaForCausalLM, {}),
        "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
        "mistral": (MistralConfig, MistralForCausalLM, {}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),  # 4 x 16 is not 32
    }
    if kind in classes:
        config, model, own = classes[kind]
        return config(**{**values, **own, **extra}), model
    parts = PARTS[kind]
    model_type = parts.model_type or kind
    if model_type in _NO_GROUPS:
        del values["num_key_value_heads"]
    settings = AutoConfig.for_model(model_type, **{**values, **parts.config, **extra})
    return settings, AutoModelForCausalLM.from_config


def tiny(kind: str = "llama_gqa", *, tied: bool = False, seed: int = 0, **config: Any) -> Any:
    """A fresh (hf_model, tokenizer): the same arguments give the same weights."""
    settings, make = _config(kind, tie_word_embeddings=tied, **config)
    return randomized(make(settings), tied=tied, seed=seed), make_tokenizer()


def randomized(model: Any, *, tied: bool = False, seed: int = 0) -> Any:
    """The model with every tensor random, norms and biases too; eval mode, no gradients."""
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    norms = (
        0.0 if model.config.model_type.startswith(("gemma", "nemotron")) else 1.0
    )  # 1 + weight there
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "norm" in name or "ln_" in name:
                parameter.copy_(norms + 0.3 * noise)
            elif any(word in name for word in ("embed", "wte", "wpe")):
                parameter.copy_((0.2 if tied else 0.5) * noise)  # logits of size 1 either way
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)


@cache
def source_of(kind: str, tied: bool = False) -> Any:
    """The Hugging Face model that tests read and copy, and never change."""
    return tiny(kind, tied=tied)[0]


def make(kind: str = "llama_gqa", backend: str = "bridge", **options: Any) -> Model:
    """A fresh Model over `tiny(kind, **options)`."""
    return from_hf(*tiny(kind, **options), backend=backend)  # type: ignore[arg-type]


# Building hook points takes longer than most tests: one for all tests that leave the weights alone.
shared = cache(make)


def rows_of(*lengths: int, prefix: int = 0, seed: int = 1) -> list[list[int]]:
    """Random token rows of the given lengths; the first `prefix` tokens are the same in all."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 259, (n,), generator=generator).tolist()

    start = draw(prefix)
    return [start + draw(length - prefix) for length in lengths]


def unit(seed: int = 0, k: int | None = None) -> Tensor:
    """A random unit vector [d_model], or k orthonormal ones [k, d_model]; float64."""
    generator = torch.Generator().manual_seed(100 + seed)
    vectors = torch.randn(k or 1, D_MODEL, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(vectors.T)[0].T.contiguous()
    return basis if k else basis[0]


def _unedited(site: Site, x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def forward(hf: Any, row: Sequence[int], edit: EditAt = _unedited) -> Tensor:
    """Logits [pos, d_vocab] of one row; `edit(site, x)` returns what goes on from each site."""
    body = hf.model
    positions = torch.arange(len(row))[None]
    x = edit(Site(0, "embed"), body.embed_tokens(torch.tensor([list(row)])))
    rotary = body.rotary_emb(x, positions)
    for i, layer in enumerate(body.layers):
        x = edit(Site(i, "resid_pre"), x)
        attention = layer.self_attn(
            hidden_states=layer.input_layernorm(x),
            position_embeddings=rotary,
            attention_mask=None,  # one row without padding: plainly causal
        )[0]
        attention = edit(Site(i, "attn_out"), edit(Site(i, "attn_proj"), attention))
        x = edit(Site(i, "resid_mid"), x + attention)
        mlp = edit(Site(i, "mlp_proj"), layer.mlp(layer.post_attention_layernorm(x)))
        x = edit(Site(i, "resid_post"), x + edit(Site(i, "mlp_out"), mlp))
    return hf.lm_head(body.norm(x))[0]


@torch.no_grad()
def hf_forward(
    hf: Any, kind: str, row: Sequence[int], edit: EditAt = _unedited, *, hidden: bool = False
) -> Tensor:
    """`forward` for any architecture: the model's own forward pass, with torch hooks on its modules.

    `hidden`: the final norm's output instead of the logits.
    """
    parts, handles = PARTS[kind], []
    pre: dict[int, Tensor] = {}

    def after(path: str, change: Callable[[Tensor], Tensor]) -> None:
        def hook(module: Any, args: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            changed = (
                change(x) if x.ndim == 3 else change(x[None])[0]
            )  # OPT's MLPs see [pos, d_model]
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        handles.append(hf.get_submodule(path).register_forward_hook(hook))

    def start(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            pre[layer] = edit(Site(layer, "resid_pre"), args[0])
            return (pre[layer], *args[1:]), kwargs

        return hook

    def middle(layer: int, attention: Tensor) -> Tensor:
        """resid_mid = resid_pre + attention, changed through the attention: no module makes it."""
        attention = edit(Site(layer, "attn_out"), attention)
        if parts.parallel:
            return attention
        mid = pre[layer] + attention
        changed = edit(Site(layer, "resid_mid"), mid)
        return attention if changed is mid else changed - pre[layer]

    after(parts.embed, lambda x: edit(Site(0, "embed"), x))
    if parts.positions:
        after(parts.positions, lambda x: edit(Site(0, "pos_embed"), x))
    for i in range(N_LAYERS):
        block = f"{parts.layers}.{i}"
        handles.append(
            hf.get_submodule(block).register_forward_pre_hook(start(i), with_kwargs=True)
        )
        after(f"{block}.{parts.attn}", lambda x, i=i: edit(Site(i, "attn_proj"), x))
        after(f"{block}.{parts.mlp}", lambda x, i=i: edit(Site(i, "mlp_proj"), x))
        after(f"{block}.{parts.attn_norm or parts.attn}", lambda x, i=i: middle(i, x))
        after(f"{block}.{parts.mlp_norm or parts.mlp}", lambda x, i=i: edit(Site(i, "mlp_out"), x))
        after(block, lambda x, i=i: edit(Site(i, "resid_post"), x))
    found: list[Tensor] = []
    after(parts.norm, lambda x: (found.append(x), x)[1])
    try:
        logits = hf(torch.tensor([list(row)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return found[0][0] if hidden else logits


def gains_of(hf: Any, kind: str) -> dict[Site, Tensor]:
    """The gains of the norms after the projections of a post-norm model."""
    sites = PARTS[kind].writers
    found = {site: PARTS[kind].gain(hf, site) for site in sites}
    return {site: gain for site, gain in found.items() if gain is not None}


def _changed(one: Edit, i: int, x: Tensor, gain: Tensor | None) -> Tensor:
    """The activations at an edit's i-th site after the edit, by its formula."""
    amount, basis = one.amounts[i], one.vectors
    if isinstance(one, AffineEdit):
        assert gain is None
        return x + amount * ((x @ one.read.T) @ one.write + one.shift)
    if isinstance(one, Erase):
        if gain is None:
            along = x @ one.read - one.values[i]
            return x - amount * along[..., None] * one.write
        basis = one.read[None]
    if gain is not None:
        basis = torch.linalg.qr((basis * gain).T)[0].T
    if one.op == "add":
        return x + amount * basis[0]
    inside = (x @ basis.T) @ basis
    if one.op == "clamp":
        return x - inside + amount * basis[0]
    assert one.op in ("ablate", "erase")
    return x - amount * inside


def editing(
    plan: Plan, *, prompt_length: int | None = None, gains: Mapping[Site, Tensor] | None = None
) -> EditAt:
    """A plan as an `edit` for `forward`, from the formulas of its edits; positions count from 0.

    `gains`: of norms after projections; an ablation there is against normalize(gain * r), and an erasure
    the ablation of what it reads.
    """
    gains = gains or {}

    def edit(site: Site, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        late = place >= (x.shape[1] if prompt_length is None else prompt_length)
        masks = {"all": place >= 0, "prompt": ~late, "generated": late}
        for one in plan:
            if site not in one.sites:
                continue
            changed = _changed(one, one.sites.index(site), x.double(), gains.get(site))
            x = torch.where(masks[one.positions][None, :, None], changed.to(x.dtype), x)
        return x

    return edit


def greedy(
    hf: Any,
    row: Sequence[int],
    n: int,
    *,
    plan: Plan | None = None,
    eos: frozenset[int],
    kind: str | None = None,
) -> tuple[int, ...]:
    """Greedy continuation, the whole sequence recomputed for each token, without the end token.

    `kind`: of an architecture that `forward` does not know.
    """
    gains = gains_of(hf, kind) if kind else None
    edit = editing(plan, prompt_length=len(row), gains=gains) if plan else _unedited
    found: list[int] = []
    while len(found) < n:
        row_now = [*row, *found]
        logits = hf_forward(hf, kind, row_now, edit) if kind else forward(hf, row_now, edit)
        token = int(logits[-1].argmax())
        if token in eos:
            break
        found.append(token)
    return tuple(found)


def folder_of(
    place: Path,
    kind: str = "llama_gqa",
    *,
    tied: bool = True,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """A sharded Hugging Face folder of a tiny model, with its tokenizer."""
    hf, tokenizer = tiny(kind, tied=tied, seed=seed)
    hf.to(getattr(torch, dtype)).save_pretrained(place, max_shard_size="40KB")
    tokenizer.save_pretrained(place)
    return place
