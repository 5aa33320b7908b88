"""Tiny random models for the tests: five Llama-style architectures, a byte tokenizer, a plain oracle.

Every tensor is random, norm weights and biases too: unit norms and zero biases hide faults.
`forward` computes a model with its Hugging Face modules called one by one, and hands every site of the
residual stream to a function: what a plan must compute, without hooks, caches, padding or TransformerLens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
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

from interp_ablate import Plan, Site, from_hf
from interp_ablate.model import Model

try:  # TransformerLens 4 has no HookedTransformer, and says so on import
    import transformer_lens

    HookedTransformer: Any = transformer_lens.HookedTransformer
except ImportError:
    HookedTransformer = None
HAS_HOOKED = HookedTransformer is not None
BACKENDS = ("bridge", "hooked") if HAS_HOOKED else ("bridge",)
KINDS = ("llama_gqa", "llama", "mistral", "qwen2", "qwen3")
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
    config, model, own = classes[kind]
    return config(**{**values, **own, **extra}), model


def tiny(kind: str = "llama_gqa", *, tied: bool = False, seed: int = 0, **config: Any) -> Any:
    """A fresh (hf_model, tokenizer): the same arguments give the same weights."""
    settings, make = _config(kind, tie_word_embeddings=tied, **config)
    model = make(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_((0.2 if tied else 0.5) * noise)  # logits of size 1 either way
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False), make_tokenizer()


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
        x = edit(Site(i, "resid_mid"), x + edit(Site(i, "attn_out"), attention))
        mlp = layer.mlp(layer.post_attention_layernorm(x))
        x = edit(Site(i, "resid_post"), x + edit(Site(i, "mlp_out"), mlp))
    return hf.lm_head(body.norm(x))[0]


def editing(plan: Plan, *, prompt_length: int | None = None) -> EditAt:
    """A plan as an `edit` for `forward`, from the formulas of its edits; positions count from 0."""

    def edit(site: Site, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        late = place >= (x.shape[1] if prompt_length is None else prompt_length)
        masks = {"all": place >= 0, "prompt": ~late, "generated": late}
        for one in plan:
            if site not in one.sites:
                continue
            amount = one.amounts[one.sites.index(site)]
            basis, wide = one.vectors, x.double()
            inside = (wide @ basis.T) @ basis
            changed = {
                "ablate": wide - amount * inside,
                "add": wide + amount * basis[0],
                "clamp": wide - inside + amount * basis[0],
            }[one.op]
            x = torch.where(masks[one.positions][None, :, None], changed.to(x.dtype), x)
        return x

    return edit


def greedy(
    hf: Any, row: Sequence[int], n: int, *, plan: Plan | None = None, eos: frozenset[int]
) -> tuple[int, ...]:
    """Greedy continuation, the whole sequence recomputed for each token, without the end token."""
    edit = editing(plan, prompt_length=len(row)) if plan else _unedited
    found: list[int] = []
    while len(found) < n:
        token = int(forward(hf, [*row, *found], edit)[-1].argmax())
        if token in eos:
            break
        found.append(token)
    return tuple(found)
