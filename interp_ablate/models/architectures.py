"""Architectures: which tensors of a decoder write to its residual stream, as a declared table.

Another package adds an entry under the entry-point group `interp_ablate.architectures`: the name is the
`model_type` of the Hugging Face config, the object an `Architecture`.

Knows: names and layouts of the writers, the norms after them, the embeddings. Does not know: plans, tensors' values, files or hooks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from interp_ablate.errors import ExportError
from interp_ablate.sites import EMBEDDING_POINTS, Point, Site, sites_of
from interp_ablate.storage.entry_points import entry_named, entry_names

# Which axis of a writer's tensor is d_model: linear [d_model, in], conv1d [in, d_model],
# embedding [entry, d_model], experts [expert, d_model, in], experts_conv1d [expert, in, d_model],
# bias [d_model]; the biases of experts [expert, d_model] are rows of a conv1d.
Layout = Literal["linear", "conv1d", "embedding", "experts", "experts_conv1d", "bias"]


@dataclass(frozen=True)
class Writer:
    """A tensor that writes to the stream: its name with {layer} and {expert}, and its layout."""

    name: str
    layout: Layout = "linear"


class Gain(NamedTuple):
    """What a norm multiplies each channel by."""

    name: str | None
    """The norm's weight; None for a norm that has none."""
    offset: float = 0.0
    """What is added to the weight to make the gain."""
    centred: bool = False
    """True if the norm takes the mean over the channels off first."""


@dataclass(frozen=True)
class Biases:
    """Biases that a config field adds to modules of every layer; {layer} stands for the layer."""

    config_field: str
    modules: tuple[str, ...]


# Alternatives; each is all the writers of one place, of which the checkpoint must have every one.
Alternatives = tuple[tuple[Writer, ...], ...]


@dataclass(frozen=True)
class Architecture:
    """The places where an architecture writes to the residual stream, under its checkpoint's names."""

    embed: str
    unembed: str
    attn: Alternatives
    mlp: Alternatives
    families: str = ""
    """The names of the models that this entry is for."""
    pos_embed: str | None = None
    """The learned positions, where there are some."""
    attn_norm: str | None = None
    """The norm between the attention's writer and the stream, in post-norm blocks."""
    mlp_norm: str | None = None
    gain_offset: float = 0.0
    """The gain of these norms is their weight plus this."""
    parallel: bool | str = False
    """True if blocks run attention and MLP side by side; or the config's field that says so."""
    scaled_embed: bool = False
    """True if the embedding is scaled on its way to the stream."""
    prefix: str = "model."
    """The part of the names that a checkpoint of the bare body leaves out."""
    count: str | None = None
    """The config's field for the number of experts."""
    attn_biases: Biases | None = None
    """Biases that the config can turn on where a checkpoint has none."""
    mlp_biases: Biases | None = None
    biased: bool = False
    """True if the writers always have a bias."""
    scales_stream: bool = False
    """True if blocks multiply the whole stream by a factor of their own."""
    tied: bool = False
    """True if transformers takes embeddings for tied where a config says nothing of it."""
    discovered: bool = field(default=False, compare=False)
    """True if the entry is not declared but read from a component map."""

    def is_parallel(self, hf_config: Any) -> bool:
        """True if attention and MLP read the same input, so that there is no resid_mid."""
        if isinstance(self.parallel, bool):
            return self.parallel
        return bool(getattr(hf_config, self.parallel))

    def is_normed(self, site: Site) -> bool:
        """True if a norm stands between a writer, by either of its names, and the stream."""
        return self.attn_norm is not None and site.point not in EMBEDDING_POINTS

    def writer_sites(self, n_layers: int) -> tuple[Site, ...]:
        """The sites of an exact plan: projections before their norm where a norm follows."""
        embeddings: tuple[Point, ...] = ("embed", "pos_embed") if self.pos_embed else ("embed",)
        written: tuple[Point, ...] = ("attn_out", "mlp_out")
        if self.attn_norm is not None:
            written = ("attn_proj", "mlp_proj")
        return sites_of(embeddings + written, range(n_layers))

    def parts(
        self, site: Site, names: Collection[str], hf_config: Any
    ) -> list[tuple[tuple[Gain, ...], dict[str, Layout]]]:
        """What writes at a site, in the order of a pass: the norms between it and the stream, and its tensors.

        Raises:
            ExportError: see `writers`; the checkpoint has no such norm.
        """
        declared = {"attn_proj": self.attn_norm, "mlp_proj": self.mlp_norm}.get(site.point)
        gains: tuple[Gain, ...] = ()
        if declared is not None:
            name = f"{declared.format(layer=site.layer)}.weight"
            found = self.present(name, names)
            if found is None:
                raise ExportError(f"the checkpoint has no {name}, the norm that follows {site}")
            gains = (Gain(found, self.gain_offset),)
        return [(gains, self.writers(site, names, hf_config))]

    def writers(self, site: Site, names: Collection[str], hf_config: Any) -> dict[str, Layout]:
        """The checkpoint's tensors that write at a writer site, biases included, and their layouts.

        Raises:
            ExportError: none of the declared tensors is there, or some experts are missing.
        """
        tried = []
        for alternative in self._alternatives(site.point):
            layouts: dict[str, Layout] = {}
            for writer in alternative:
                matched = self._matching(writer, site.layer, names, hf_config)
                if not matched:
                    tried.append(writer.name.format(layer=site.layer, expert=0))
                    break
                layouts.update(matched)
            else:
                return layouts
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
        n_experts = getattr(hf_config, self.count) if self.count else 1
        template = writer.name if first.startswith(self.prefix) else writer.name[len(self.prefix) :]
        *experts, beyond = (template.format(layer=layer, expert=i) for i in range(n_experts + 1))
        if beyond in names:
            raise ExportError(
                f"the config says {n_experts} experts, but layer {layer} has more: {beyond}"
            )
        missing = [name for name in experts if name not in names]
        if missing:
            raise ExportError(
                f"{len(missing)} of {n_experts} experts of layer {layer} are missing, such as {missing[0]}"
            )
        return dict.fromkeys(experts, writer.layout)

    def present(self, name: str, names: Collection[str]) -> str | None:
        """A declared name as the checkpoint spells it: with the body's prefix or without; None if absent."""
        bare = name.removeprefix(self.prefix)
        return next((n for n in (name, bare) if n in names), None)


def text_config(hf_config: Any) -> Any:
    """The part of a config that describes the decoder of text: itself, or what a multimodal one wraps."""
    return hf_config.get_text_config(decoder=True)


def max_positions(hf_config: Any) -> int:
    """The most positions that a config allows; 2**20 where it sets no limit (XLNet's says -1).

    Positions that YaRN stretches count stretched.
    """
    config = text_config(hf_config)
    limit = getattr(config, "max_position_embeddings", None) or 0
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):  # some have parameters by kind of layer
        if isinstance(each, dict) and each.get("rope_type") == "yarn":
            original = each.get("original_max_position_embeddings") or limit
            limit = max(limit, int(original * (each.get("factor") or 1)))
    return limit if limit > 0 else 1 << 20


def is_tied(hf_config: Any) -> bool:
    """True if a config says that the embedding is the unembedding too."""
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
# model_type of the Hugging Face config -> entry.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": replace(_WITH_BIASES, families="Llama 1 to 3.x, SmolLM, SmolLM2"),
    "mistral": replace(_LLAMA_STYLE, families="Mistral 7B and its kin"),
    "qwen2": replace(_LLAMA_STYLE, families="Qwen 2, Qwen 2.5"),
    "qwen3": replace(_LLAMA_STYLE, families="Qwen 3"),
    "phi3": replace(_LLAMA_STYLE, families="Phi-3, Phi-4"),
    "smollm3": replace(_WITH_BIASES, families="SmolLM3", tied=True),
    "gemma": _decoder(families="Gemma 1", scaled_embed=True, tied=True),
    "gemma2": replace(_GEMMA_2, families="Gemma 2"),
    "gemma3_text": replace(_GEMMA_2, families="Gemma 3 (text)"),
    "olmo2": _decoder(
        families="OLMo 2",
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    "gpt2": _decoder(
        "transformer.",
        families="GPT-2",
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
        families="GPT-NeoX, Pythia",
        attn="attention.dense",
        mlp="mlp.dense_4h_to_h",
        embed="embed_in",
        parallel="use_parallel_residual",
        biased=True,
    ),
    "mixtral": _decoder(
        families="Mixtral",
        more_mlp=(_FUSED, (Writer("block_sparse_moe.experts.{expert}.w2.weight"),)),
        count="num_local_experts",
    ),
    "qwen3_moe": _decoder(
        families="Qwen 3 MoE",
        more_mlp=(_FUSED, (Writer("mlp.experts.{expert}.down_proj.weight"),)),
        count="num_experts",
    ),
}
GROUP = "interp_ablate.architectures"


def declared_architecture(model_type: str) -> Architecture | None:
    """The entry of a model type, from this package or another one; None if there is none.

    Raises:
        InterpAblateError: the package that registers it fails to load.
        ExportError: that package registers something else than an `Architecture`.
    """
    if model_type not in declared_types():
        return None
    return entry_named(
        model_type, ARCHITECTURES, GROUP, what="model type", error=ExportError, kind=Architecture
    )


def architecture_of(hf_config: Any) -> Architecture:
    """The declared entry for a config.

    Raises:
        ExportError: no entry; the message says what came and which there are.
    """
    entry = declared_architecture(hf_config.model_type)
    if entry is None:
        raise ExportError(
            f"no architecture entry for model type {hf_config.model_type!r} "
            f"({', '.join(hf_config.architectures or ['unknown class'])}): which tensors write to its "
            f"residual stream is not declared. There are entries for {', '.join(declared_types())} "
            "(`interp-ablate models` prints them); others work where the Bridge's component map "
            "names their writers and the model is loaded: load_model(...), then export_checkpoint(...)"
        )
    return entry


def declared_types() -> list[str]:
    """Every model type that has an entry, this package's first."""
    return entry_names(ARCHITECTURES, GROUP)


def table() -> Iterator[dict[str, str]]:
    """One row an entry: model type, families, tensors with layouts, norms, biases, ties, block form."""
    for model_type in declared_types():
        entry = declared_architecture(model_type)
        assert entry is not None
        yield {
            "model_type": model_type,
            "families": entry.families,
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
    optional = (entry.attn_biases, entry.mlp_biases)
    fields = [f"config.{biases.config_field}" for biases in optional if biases]
    turned_on = f"; additions turn on {' and '.join(fields)}" if fields else ""
    return f"edited where a checkpoint has them{turned_on}"


def _alternatives_text(alternatives: Alternatives) -> str:
    return " or ".join(
        " + ".join(f"{writer.name} [{writer.layout}]" for writer in writers)
        for writers in alternatives
    )


def _norm_text(entry: Architecture) -> str:
    if entry.attn_norm is None:
        return "none"
    gain = "1 + weight" if entry.gain_offset else "weight"
    return f"{entry.attn_norm}, {entry.mlp_norm} (gain = {gain})"
