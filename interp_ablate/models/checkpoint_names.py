"""Checkpoint names: a discovered architecture in the names and layouts that the tensors of one checkpoint have.

transformers renames and fuses tensors as it loads them (experts, above all). Its own conversions say which tensors
of a checkpoint become a parameter; along which axis they write is tried out on small tensors.

Knows: transformers' conversions of names and tensors. Does not know: plans, bytes, or how an architecture was measured.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.models.anatomy import Branch, Part
from interp_ablate.models.architectures import Architecture, Layout, is_tied, text_config
from interp_ablate.models.measured_architecture import MeasuredArchitecture
from interp_ablate.models.written_parameters import AXIS, Norm
from interp_ablate.sites import EMBEDDING_POINTS, Site

Shapes = Mapping[str, Sequence[int]]
# By number of axes and the axis that is d_model.
_LAYOUTS: dict[tuple[int, int], Layout] = {
    (1, 0): "bias", (2, 0): "linear", (2, 1): "conv1d", (3, 1): "experts", (3, 2): "experts_conv1d",
}  # fmt: skip
# By type: what checkpoints call the unembedding of a declared architecture that is lm_head in memory.
_UNEMBED_IN_FILES = {"gpt_neox": "embed_out.weight"}
_FEW = 2  # experts, and entries of an axis, of the tensors on which a conversion is tried


class NamesError(ExportError):
    """What writes to the stream has no tensor of its own in a checkpoint."""


def in_checkpoint_names(entry: Architecture, hf: Any, shapes: Shapes) -> Architecture:
    """An architecture, which has the names of a model in memory, in the names of a checkpoint of it.

    Args:
        hf: the model, with or without data.
        shapes: of the checkpoint's tensors, by name.

    Raises:
        NamesError: a tensor of the checkpoint holds what writes to the stream and something else; or none does.
    """
    if not entry.discovered:
        return declared_in_files(entry, hf.config)
    names, bias = _CheckpointNames(hf, shapes), getattr(entry, "embed_bias", None)
    embed, *more_embed = names.embedding(entry.embed)
    branches = {}
    for site, group in _branches(entry, hf):
        branches[site] = tuple(
            replace(
                branch,
                parts=tuple(
                    replace(
                        part,
                        writers=names.layouts(part.writers),
                        norms=names.norms(part.norms),
                    )
                    for part in branch.parts
                ),
            )
            for branch in group
        )
    return MeasuredArchitecture(
        **{
            **{f: getattr(entry, f) for f in Architecture.__dataclass_fields__},
            "embed": embed,
            "unembed": names.unembed(entry.unembed),
            "pos_embed": entry.pos_embed and names.only(entry.pos_embed),
            "prefix": "",
        },
        branches=branches,
        more_embed=tuple(more_embed),
        shared=names.shared({entry.embed, entry.unembed}),
        embed_norms=names.norms(getattr(entry, "embed_norms", ())),
        embed_bias=bias and names.only(bias),
    )


def declared_in_files(entry: Architecture, hf_config: Any) -> Architecture:
    """A declared architecture in the names of checkpoints: other than those in memory is only GPT-NeoX's unembedding."""
    name = _UNEMBED_IN_FILES.get(hf_config.model_type, entry.unembed)
    return replace(entry, unembed=name)


def _branches(entry: Architecture, hf: Any) -> Iterator[tuple[Site, tuple[Branch, ...]]]:
    """What writes at the sites of every block, in the model's own names."""
    if isinstance(entry, MeasuredArchitecture):
        yield from entry.branches.items()
        return
    names = hf.state_dict()
    for site in entry.writer_sites(text_config(hf.config).num_hidden_layers):
        if site.point not in EMBEDDING_POINTS:
            parts = (
                Part(
                    "",
                    tuple(Norm(str(g.name).removesuffix(".weight"), g.offset) for g in gains),
                    layouts,
                )
                for gains, layouts in entry.parts(site, names, hf.config)
            )
            yield site.output, (Branch("", parts=tuple(parts)),)


class _CheckpointNames:
    """Which tensors of one checkpoint become which parameters of a model."""

    def __init__(self, hf: Any, shapes: Shapes) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._hf, self._shapes = hf, shapes
        mapping = get_model_conversion_mapping(hf)
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._memory = {name: tuple(tensor.shape) for name, tensor in hf.state_dict().items()}
        self._d_model = hf.get_input_embeddings().weight.shape[-1]
        # by the (first) parameter that they become: tensors, each with the pattern of its converter
        self._groups: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for name in _in_order(shapes):
            target, pattern = self._target(name)
            self._groups[target].append((name, pattern))
        self._group_of: dict[str, str] = {}
        for target, group in self._groups.items():
            for parameter in self._parameters(target, group):
                self._group_of[parameter] = target

    def _target(self, name: str) -> tuple[str, str | None]:
        """As transformers' own loading does it."""
        from transformers.core_model_loading import rename_source_key

        prefix, memory = self._hf.base_model_prefix, self._memory
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, memory)
        if target not in memory and name in memory:
            return rename_source_key(name, [], [], prefix, memory)
        return target, pattern

    def _parameters(self, target: str, group: Sequence[tuple[str, str | None]]) -> Iterable[str]:
        """The parameters that a group of tensors becomes."""
        pattern = group[0][1]
        if pattern is None:
            return (target,)
        first = next(c for c in self._converters if pattern in c.source_patterns)
        if len(first.target_patterns) == 1:
            return (target,)
        head = first.target_patterns[0]
        return tuple(target.replace(head, other) for other in first.target_patterns)

    def only(self, parameter: str) -> str:
        """The one tensor that a parameter is, with the same shape."""
        group = self._groups.get(self._group_of.get(parameter, ""), [])
        if [pattern for _, pattern in group] != [None]:
            raise NamesError(
                f"{parameter} is {'no tensor' if not group else 'made of other tensors'} of the checkpoint"
                f"{': ' + ', '.join(name for name, _ in group[:3]) if group else ''}: {_LOAD_IT}"
            )
        return group[0][0]

    def embedding(self, parameter: str) -> list[str]:
        """The tensors whose rows are those of the embedding: one where it is the unembedding too."""
        if (
            is_tied(self._hf.config)
            or len(self._groups.get(self._group_of.get(parameter, ""), ())) < 2
        ):
            return [self.only(parameter)]
        return [*self.layouts({parameter: "embedding"})]

    def norms(self, norms: Iterable[Norm]) -> tuple[Norm, ...]:
        """Norms under their names in the checkpoint."""
        return tuple(replace(n, path=self._module(n.path)) if n.weighted else n for n in norms)

    def _module(self, path: str) -> str:
        """The name of a module with one weight."""
        name = self.only(f"{path}.weight")
        if not name.endswith(".weight"):
            raise NamesError(f"{path}.weight is {name} in the checkpoint: {_LOAD_IT}")
        return name.removesuffix(".weight")

    def unembed(self, parameter: str) -> str:
        """The unembedding's name; where a tied checkpoint has none, the one that transformers would write it under."""
        from transformers.core_model_loading import revert_weight_conversion

        if parameter in self._group_of:
            return self.only(parameter)
        (name,) = revert_weight_conversion(self._hf, {parameter: torch.empty(0)})
        if self._target(name)[0] != parameter:
            raise NamesError(
                f"the checkpoint has no {parameter}, and under the name {name} none would become it: {_LOAD_IT}"
            )
        return name

    def shared(self, embeddings: set[str]) -> dict[str, str]:
        """The tensors that the checkpoint leaves out for being others of it, embeddings apart."""
        same: dict[int, list[str]] = defaultdict(list)
        for name, p in self._hf.named_parameters(remove_duplicate=False):
            same[id(p)].append(name)
        return {
            name: self.only(first)
            for first, *others in same.values()
            for name in others
            if first in self._group_of and name not in self._group_of
            if not embeddings & {first, *others}
        }

    def layouts(self, writers: Mapping[str, Layout]) -> dict[str, Layout]:
        """The tensors that become the writing parameters, with their own layouts."""
        result: dict[str, Layout] = {}
        for parameter, layout in writers.items():
            group = self._groups.get(self._group_of.get(parameter, ""), [])
            if [pattern for _, pattern in group] == [None]:
                result[group[0][0]] = layout
                continue
            if not group:
                raise NamesError(
                    f"the checkpoint has no tensor that becomes {parameter}: {_LOAD_IT}"
                )
            first = group[0][0]
            others = set(self._parameters(self._group_of[parameter], group)) - set(writers)
            if others and not (group := self._undivided(parameter, others, group)):
                raise NamesError(
                    f"{first} holds what becomes {parameter}, which writes to the stream, and {min(others)}, "
                    f"which does not: {_LOAD_IT}"
                )
            result |= self._tried(parameter, layout, group)
        return result

    def _undivided(
        self, parameter: str, others: Iterable[str], group: Sequence[tuple[str, str | None]]
    ) -> list[tuple[str, str | None]]:
        """The tensors that become this parameter, where each of a group becomes one parameter as a whole; else none.

        Tried out on small tensors, each with a number of its own: the experts of text and of images are so many
        tensors of one name (Ernie 4.5 VL's).
        """
        tensors: dict[str, list[Tensor]] = defaultdict(list)
        for number, (name, pattern) in enumerate(group):
            small = [min(size, _FEW) for size in self._shapes[name]]
            tensors[str(pattern)].append(torch.full(small, float(number)))
        outs = [self._conversion(each, group, tensors) for each in (parameter, *others)]
        if any(out is None for out in outs):
            return []
        mine, *theirs = [set(out.flatten().tolist()) for out in outs if out is not None]
        rest = set().union(*theirs)
        whole = not mine & rest and mine | rest == set(range(len(group)))
        return [group[int(number)] for number in sorted(mine)] if whole else []

    def _tried(
        self, parameter: str, layout: Layout, group: Sequence[tuple[str, str | None]]
    ) -> dict[str, Layout]:
        """Tensors that are converted, with the layouts in which d_model becomes the parameter's d_model."""
        patterns: dict[str, list[str]] = defaultdict(list)
        for name, pattern in group:
            patterns[str(pattern)].append(name)
        shapes = [self._shapes[names[0]] for names in patterns.values()]
        axes = [[k for k, size in enumerate(s) if size == self._d_model] for s in shapes]
        # some conversions compare shapes with the parameter's: after small tensors whole ones are tried
        for few, chosen in itertools.product((_FEW, None), itertools.product(*axes)):
            tensors = {
                pattern: [_counting(self._shapes[name], axis, few) for name in names[:few]]
                for (pattern, names), axis in zip(patterns.items(), chosen)
            }
            out = self._conversion(parameter, group, tensors)
            along = AXIS.get(layout, 1)
            if out is not None and out.ndim > along and out.shape[along] == self._d_model:
                counted = torch.arange(self._d_model, dtype=out.dtype)
                if bool((out.movedim(along, -1) == counted).all()):
                    return {
                        name: _LAYOUTS[len(self._shapes[name]), axis]
                        for names, axis in zip(patterns.values(), chosen)
                        for name in names
                    }
        raise NamesError(
            f"how {', '.join(names[0] for names in patterns.values())} of the checkpoint becomes {parameter}, which "
            f"writes to the stream, is not a matter of axes: {_LOAD_IT}"
        )

    def _conversion(
        self,
        parameter: str,
        group: Sequence[tuple[str, str | None]],
        tensors: Mapping[str, Sequence[Tensor]],
    ) -> Tensor | None:
        """What transformers makes of tensors, for one of the parameters that they become; None if it cannot."""
        pattern, target = group[0][1], self._group_of[parameter]
        converter: Any = copy.deepcopy(
            next(c for c in self._converters if pattern in c.source_patterns)
        )
        names = {str(p): [n for n, q in group if q == p] for _, p in group}
        for each, values in tensors.items():
            for name, value in zip(names[each], values):
                converter.add_tensor(target, name, each, value)
        try:
            out = converter.convert(target, model=self._hf, config=self._hf.config).get(parameter)
        except (ValueError, RuntimeError, KeyError, TypeError, IndexError):
            return None  # small tensors of these axes are not what it converts
        return out[0] if isinstance(out, list) else out


_LOAD_IT = (
    "the folder cannot be streamed. Load the model and export it: --model in place of --source"
)


def _counting(shape: Sequence[int], axis: int, few: int | None) -> Tensor:
    """A tensor whose values count along one axis; of the others it has a few entries, or (None) all."""
    small = [size if k == axis or not few else min(size, few) for k, size in enumerate(shape)]
    numbers = torch.arange(shape[axis], dtype=torch.float32)
    return numbers.reshape([-1 if k == axis else 1 for k in range(len(shape))]).expand(small)


def _in_order(names: Iterable[str]) -> list[str]:
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)
