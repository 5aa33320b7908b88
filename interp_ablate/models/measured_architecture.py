"""The architecture of one model, from its measured anatomy: the same questions as a declared entry answers.

Knows: which parameters write at a site, the norms after them. Does not know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp_ablate.errors import ExportError
from interp_ablate.models.anatomy import Anatomy, Branch
from interp_ablate.models.architectures import Architecture, Gain, Layout
from interp_ablate.models.written_parameters import Norm
from interp_ablate.sites import EMBEDDING_POINTS, PROJECTION_POINTS, Site


@dataclass(frozen=True)
class MeasuredArchitecture(Architecture):
    """What writes to the stream of one model, under the names that its modules have."""

    branches: Mapping[Site, tuple[Branch, ...]] = field(default_factory=dict)
    """The summands at `attn_out` and `mlp_out` of every layer."""
    embed_norms: tuple[Norm, ...] = ()
    """The norms between the embeddings and the stream, the last one first."""
    embed_bias: str | None = None
    """The bias of the last of them, where it has one."""
    more_embed: tuple[str, ...] = ()
    """The other tensors of an embedding whose rows a checkpoint keeps in several."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Tensors beside the unembedding that a tied checkpoint leaves out, each with the tensor that it is."""

    def writers(self, site: Site, names: Collection[str], hf_config: Any) -> dict[str, Layout]:
        """The parameters that write at a writer site, and their layouts.

        Raises:
            ExportError: nothing writes there, or a parameter is not among the names.
        """
        embedding = {"embed": self.embed, "pos_embed": self.pos_embed}.get(site.point)
        layouts: dict[str, Layout] = {embedding: "embedding"} if embedding else {}
        if site.point == "embed":
            layouts |= dict.fromkeys(self.more_embed, "embedding")
        if site.point == "embed_bias" and self.embed_bias:
            layouts[self.embed_bias] = "bias"
        for branch in self.branches.get(site.output, ()):
            layouts |= branch.writers
        missing = [name for name in layouts if name not in names]
        if missing or not layouts:
            raise ExportError(
                f"the checkpoint has no tensor for {site}: "
                + (f"{missing[0]} writes there in the model" if missing else "nothing writes there")
            )
        return layouts

    def parts(
        self, site: Site, names: Collection[str], hf_config: Any
    ) -> list[tuple[tuple[Gain, ...], dict[str, Layout]]]:
        if site.point in EMBEDDING_POINTS:
            norms = self.embed_norms if self.is_normed(site) else ()
            return [(_gains(norms), self.writers(site, names, hf_config))]
        self.writers(site, names, hf_config)
        return [
            (_gains(part.norms) if site.point in PROJECTION_POINTS else (), dict(part.writers))
            for branch in self.branches.get(site.output, ())
            for part in branch.parts
        ]

    def is_normed(self, site: Site) -> bool:
        if site.point in EMBEDDING_POINTS:
            return bool(self.embed_norms) and site.point != "embed_bias"
        branches = self.branches.get(site.output, ())
        return any(part.norms for branch in branches for part in branch.parts)

    def writer_sites(self, n_layers: int) -> tuple[Site, ...]:
        there = {"embed": True, "pos_embed": self.pos_embed, "embed_bias": self.embed_bias}
        embeddings = [point for point in EMBEDDING_POINTS if there[point]]
        written = (s.projection if self.is_normed(s) else s for s in self.branches)
        return tuple(sorted((*(Site(0, point) for point in embeddings), *written)))


def _gains(norms: tuple[Norm, ...]) -> tuple[Gain, ...]:
    return tuple(norm.gain for norm in norms)


def some_of(problems: Sequence[str]) -> str:
    """The first of some problems, and how many there are."""
    more = f" ({len(problems)} in all)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def architecture_from(anatomy: Anatomy, unembed: str, hf_config: Any) -> MeasuredArchitecture:
    """The architecture that an anatomy describes.

    Raises:
        ExportError: something writes to the stream that no edit of a weight reaches. The message names it.
    """
    problems = anatomy.problems
    branches: dict[Site, tuple[Branch, ...]] = {}
    for layer, block in enumerate(anatomy.blocks):
        for point, group in (("attn_out", block.attn), ("mlp_out", block.mlp)):
            if group:
                branches[Site(layer, point)] = group  # type: ignore[index, arg-type]
    if problems:
        raise ExportError(
            f"not everything that writes to the residual stream of this {hf_config.model_type} model can "
            f"be edited exactly in weights: {some_of(problems)}. Plans run as hooks"
        )
    norms = {
        norm for group in branches.values() for b in group for p in b.parts for norm in p.norms
    }
    return MeasuredArchitecture(
        embed=anatomy.embeddings["embed"],
        unembed=unembed,
        attn=(),
        mlp=(),
        pos_embed=anatomy.embeddings.get("pos_embed"),
        embed_norms=anatomy.embed_norms,
        embed_bias=anatomy.embeddings.get("embed_bias"),
        attn_norm="measured" if norms else None,
        mlp_norm="measured" if norms else None,
        parallel=all(block.parallel or not block.attn for block in anatomy.blocks),
        scaled_embed=anatomy.embed_scale != 1.0,
        prefix="",
        discovered=True,
        branches=branches,
        scales_stream=any(block.stream_scale != 1.0 for block in anatomy.blocks),
    )
