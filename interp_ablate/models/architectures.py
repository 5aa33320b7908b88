"""Architectures: which tensors of a decoder write to its residual stream, as a declared table.

Knows: names, orientations and biases of the writers, the norms after them, which embeddings there are.
Does not know: plans, tensors' values, files or hooks; what reads the table proves itself against the
hooked model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from interp_ablate.errors import ExportError
from interp_ablate.sites import Point, Site, sites_of

# Which axis of a writer's tensor is d_model: linear [d_model, in], conv1d [in, d_model],
# embedding [entry, d_model], experts [expert, d_model, in], bias [d_model].
Layout = Literal["linear", "conv1d", "embedding", "experts", "bias"]


@dataclass(frozen=True)
class Writer:
    """A tensor that writes to the stream: its name with {layer} and {expert}, and its layout."""

    name: str
    layout: Layout = "linear"


@dataclass(frozen=True)
class Biases:
    """Biases that a config field adds to modules of every layer; {layer} stands for the layer."""

    config_field: str
    modules: tuple[str, ...]


# Alternatives; each is all the writers of one place, of which the checkpoint must have every one.
Alternatives = tuple[tuple[Writer, ...], ...]


@dataclass(frozen=True)
class Architecture:
    """Where an architecture writes to the residual stream, under the names of its checkpoint.

    `attn_norm` and `mlp_norm` name the norm between a writer and the stream, where there is one
    (post-norm blocks); its gain is its weight plus `gain_offset`. `parallel` blocks run attention and
    MLP side by side: True, False, or the config's field that says so. `prefix` is what a checkpoint of
    the bare body leaves out. `count` is the config's field for the number of experts. `attn_biases` and
    `mlp_biases` are what the config can turn on where a checkpoint has none; `biased` writers always have
    one. `tied` is what transformers assumes of a config that does not say it; what a config says counts.
    """

    embed: str
    unembed: str
    attn: Alternatives
    mlp: Alternatives
    pos_embed: str | None = None
    attn_norm: str | None = None
    mlp_norm: str | None = None
    gain_offset: float = 0.0
    parallel: bool | str = False
    scaled_embed: bool = False
    prefix: str = "model."
    count: str | None = None
    attn_biases: Biases | None = None
    mlp_biases: Biases | None = None
    biased: bool = False
    tied: bool = False
    discovered: bool = field(default=False, compare=False)

    def is_parallel(self, hf_config: Any) -> bool:
        """Whether attention and MLP read the same input, so that there is no resid_mid."""
        if isinstance(self.parallel, bool):
            return self.parallel
        return bool(getattr(hf_config, self.parallel))

    @property
    def post_norm(self) -> bool:
        return self.attn_norm is not None

    def points(self) -> tuple[Point, ...]:
        """The writer points of an exact plan: projections before their norm where a norm follows."""
        return writer_points(pos_embed=self.pos_embed is not None, post_norm=self.post_norm)

    def writer_sites(self, n_layers: int) -> tuple[Site, ...]:
        """Every site that writes to the stream and has an exact weight form, in forward order."""
        return sites_of(self.points(), range(n_layers))

    def new_biases(self, site: Site) -> Biases | None:
        """What turns on a bias for the writer at a site of a checkpoint that has none."""
        return {"attn_out": self.attn_biases, "mlp_out": self.mlp_biases}.get(site.point)

    def norm_after(self, site: Site) -> str | None:
        """The name of the norm's weight between a projection and the stream, if there is one."""
        norm = {"attn_proj": self.attn_norm, "mlp_proj": self.mlp_norm}.get(site.point)
        return norm and f"{norm.format(layer=site.layer)}.weight"

    def writers(self, site: Site, names: Collection[str], hf_config: Any) -> dict[str, Layout]:
        """The checkpoint's tensors that write at a writer site, biases included, and their layouts.

        Raises:
            ExportError: none of the declared tensors is there, or some experts are missing.
        """
        tried = []
        for alternative in self._alternatives(site.point):
            found: dict[str, Layout] = {}
            for writer in alternative:
                matched = self._matching(writer, site.layer, names, hf_config)
                if not matched:
                    tried.append(writer.name.format(layer=site.layer, expert=0))
                    break
                found.update(matched)
            else:
                return found
        near = sorted(name for name in names if f".{site.layer}." in name)[:40]
        raise ExportError(
            f"the checkpoint has no tensor for {site}: looked for "
            f"{', '.join(tried) or 'none, this architecture has no such writer'}; layer "
            f"{site.layer} holds {', '.join(near) or 'nothing'}"
        )

    def _alternatives(self, point: Point) -> Alternatives:
        if point == "embed":
            return ((Writer(self.embed, "embedding"),),)
        if point == "pos_embed":
            return ((Writer(self.pos_embed or "", "embedding"),),) if self.pos_embed else ()
        return self.attn if point.startswith("attn") else self.mlp

    def _matching(
        self, writer: Writer, layer: int, names: Collection[str], hf_config: Any
    ) -> dict[str, Layout]:
        if "{expert}" not in writer.name:
            name = self.present(writer.name.format(layer=layer), names)
            return _with_bias(name, writer.layout, names) if name else {}
        first = self.present(writer.name.format(layer=layer, expert=0), names)
        if first is None:
            return {}
        wanted = getattr(hf_config, self.count) if self.count else 1
        template = writer.name if first.startswith(self.prefix) else writer.name[len(self.prefix) :]
        every = [template.format(layer=layer, expert=i) for i in range(wanted)]
        missing = [name for name in every if name not in names]
        if template.format(layer=layer, expert=wanted) in names:
            raise ExportError(
                f"the config says {wanted} experts, but layer {layer} has more: "
                f"{template.format(layer=layer, expert=wanted)}"
            )
        if missing:
            raise ExportError(
                f"{len(missing)} of {wanted} experts of layer {layer} are missing, such as {missing[0]}"
            )
        return dict.fromkeys(every, writer.layout)

    def present(self, name: str, names: Collection[str]) -> str | None:
        """A declared name as the checkpoint spells it: with the body's prefix or without; None if absent."""
        bare = name.removeprefix(self.prefix)
        return next((n for n in (name, bare) if n in names), None)


def writer_points(*, pos_embed: bool, post_norm: bool) -> tuple[Point, ...]:
    """Where plans are exact: embeddings, and outputs of blocks or, where a norm follows, projections."""
    embeddings: tuple[Point, ...] = ("embed", "pos_embed") if pos_embed else ("embed",)
    return embeddings + (("attn_proj", "mlp_proj") if post_norm else ("attn_out", "mlp_out"))


def is_tied(hf_config: Any) -> bool:
    """Whether a config says that the embedding is the unembedding too."""
    return bool(getattr(hf_config, "tie_word_embeddings", False))


def _with_bias(name: str, layout: Layout, names: Collection[str]) -> dict[str, Layout]:
    bias = re.sub(r"\.weight$", ".bias", name)
    return {name: layout, bias: "bias"} if bias != name and bias in names else {name: layout}


def _one(name: str, layout: Layout = "linear") -> Alternatives:
    return ((Writer(name, layout),),)


def _decoder(
    body: str = "model.",
    *,
    attn: str = "self_attn.o_proj",
    mlp: str = "mlp.down_proj",
    layers: str = "layers",
    embed: str = "embed_tokens",
    layout: Layout = "linear",
    more_mlp: Alternatives = (),
    **fields: Any,
) -> Architecture:
    """An entry whose blocks are `{body}{layers}.{layer}.`."""
    block = f"{body}{layers}.{{layer}}."
    norms = {k: block + fields.pop(k) for k in ("attn_norm", "mlp_norm") if k in fields}
    experts = tuple(
        tuple(Writer(block + writer.name, writer.layout) for writer in alternative)
        for alternative in more_mlp
    )
    return Architecture(
        embed=f"{body}{embed}.weight",
        unembed="lm_head.weight",
        attn=_one(f"{block}{attn}.weight", layout),
        mlp=(*_one(f"{block}{mlp}.weight", layout), *experts),
        prefix=body,
        **norms,
        **fields,
    )


_LLAMA_STYLE = _decoder()
_WITH_BIASES = _decoder(
    attn_biases=Biases(
        "attention_bias",
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj" for part in "qkvo"),
    ),
    mlp_biases=Biases(
        "mlp_bias",
        tuple(f"model.layers.{{layer}}.mlp.{part}_proj" for part in ("gate", "up", "down")),
    ),
)
_FUSED = (Writer("mlp.experts.down_proj", "experts"),)
_GEMMA_2 = _decoder(
    tied=True,
    attn_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
    gain_offset=1.0,
    scaled_embed=True,
)
# model_type of the Hugging Face config -> entry; a missing entry raises.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _WITH_BIASES,
    "mistral": _LLAMA_STYLE,
    "qwen2": _LLAMA_STYLE,
    "qwen3": _LLAMA_STYLE,
    "phi3": _LLAMA_STYLE,
    "smollm3": replace(_WITH_BIASES, tied=True),
    "gemma": _decoder(scaled_embed=True, tied=True),
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "olmo2": _decoder(attn_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm"),
    "gpt2": _decoder(
        "transformer.",
        layers="h",
        attn="attn.c_proj",
        mlp="mlp.c_proj",
        embed="wte",
        pos_embed="transformer.wpe.weight",
        layout="conv1d",
        biased=True,
        tied=True,
    ),
    "gpt_neox": _decoder(
        "gpt_neox.",
        attn="attention.dense",
        mlp="mlp.dense_4h_to_h",
        embed="embed_in",
        parallel="use_parallel_residual",
        biased=True,
    ),
    "mixtral": _decoder(
        more_mlp=(_FUSED, (Writer("block_sparse_moe.experts.{expert}.w2.weight"),)),
        count="num_local_experts",
    ),
    "qwen3_moe": _decoder(
        more_mlp=(_FUSED, (Writer("mlp.experts.{expert}.down_proj.weight"),)),
        count="num_experts",
    ),
}
# What people call the models of an entry.
FAMILIES: dict[str, str] = {
    "llama": "Llama 1 to 3.x, SmolLM, SmolLM2",
    "mistral": "Mistral 7B and its kin",
    "qwen2": "Qwen 2, Qwen 2.5",
    "qwen3": "Qwen 3",
    "phi3": "Phi-3, Phi-4",
    "smollm3": "SmolLM3",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen 3 MoE",
}


def architecture_of(hf_config: Any) -> Architecture:
    """The table's entry for a config.

    Raises:
        ExportError: no entry; the message says what came and which there are.
    """
    entry = ARCHITECTURES.get(hf_config.model_type)
    if entry is None:
        raise ExportError(
            f"no architecture entry for model type {hf_config.model_type!r} "
            f"({', '.join(hf_config.architectures or ['unknown class'])}): which tensors write to its "
            f"residual stream is not declared. There are entries for {', '.join(ARCHITECTURES)} "
            "(`interp-ablate models` prints them); others work where the Bridge's component map "
            "names their writers and the model is loaded: load_model(...), then export_checkpoint(...)"
        )
    return entry


def table() -> Iterator[dict[str, str]]:
    """One row an entry: model type, families, tensors with their layout, norms after them,
    biases, ties, block form."""
    for model_type, entry in ARCHITECTURES.items():
        yield {
            "model_type": model_type,
            "families": FAMILIES[model_type],
            "embeddings": " + ".join(name for name in (entry.embed, entry.pos_embed) if name),
            "attention": _alternatives_text(entry.attn),
            "mlp": _alternatives_text(entry.mlp),
            "norm_after": _norm_text(entry),
            "biases": _bias_text(entry),
            "tied": f"{'yes' if entry.tied else 'no'}, unless config.tie_word_embeddings says otherwise",
            "block": (entry.parallel and f"parallel (config.{entry.parallel})") or "sequential",
        }


def _bias_text(entry: Architecture) -> str:
    if entry.biased:
        return "always"
    known = (entry.attn_biases, entry.mlp_biases)
    fields = [f"config.{biases.config_field}" for biases in known if biases]
    turned_on = f"; additions turn on {' and '.join(fields)}" if fields else ""
    return f"edited where a checkpoint has them{turned_on}"


def _alternatives_text(alternatives: Alternatives) -> str:
    return " or ".join(
        " + ".join(f"{writer.name} [{writer.layout}]" for writer in writers)
        for writers in alternatives
    )


def _norm_text(entry: Architecture) -> str:
    if not entry.post_norm:
        return "none"
    gain = "1 + weight" if entry.gain_offset else "weight"
    return f"{entry.attn_norm}, {entry.mlp_norm} (gain = {gain})"
