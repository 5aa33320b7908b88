"""Anatomy: what a decoder's blocks and embeddings write to the residual stream, measured on fixed tokens.

Nothing is taken from names. A block's output minus its input is written as a sum of the outputs of modules
inside it; each term is proven by noise, each weight that writes it by a projection.

Knows: modules, recorded calls, least squares. Does not know: plans, hooks that stay, files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from interp_ablate.errors import ModelError
from interp_ablate.models.architectures import Layout
from interp_ablate.models.module_calls import (
    Recorded,
    recording,
    stream_argument,
    stream_in,
    stream_of,
    with_stream,
)
from interp_ablate.models.written_parameters import find_writers, kinds, norm_offset

# A term of a sum that is smaller than this share of the whole is not there, in float32.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Norm:
    """A norm between what a branch computes and the stream."""

    path: str
    """The norm module's name in the model."""
    offset: float
    """The gain is the norm's weight plus this: 0 or 1."""


@dataclass(frozen=True)
class Branch:
    """One summand of what a block adds to the stream."""

    path: str
    """The name of the module in the model whose output, times `scale`, reaches the stream."""
    scale: float = 1.0
    projection: str = ""
    """The name of the module before the norm, where a norm follows it; else `path`."""
    norm: Norm | None = None
    writers: Mapping[str, Layout] = field(default_factory=dict)
    """The parameters that write this summand, by name, with their layouts."""
    problem: str = ""
    """Why the summand cannot be edited exactly in weights; empty where it can."""


@dataclass(frozen=True)
class BlockAnatomy:
    """The summands of one block, as sites name them."""

    attn: tuple[Branch, ...] = ()
    """The branches whose sum is `attn_out`."""
    mlp: tuple[Branch, ...] = ()
    """The branches whose sum is `mlp_out`."""
    parallel: bool = False
    """True if the mlp branches do not read what the attn branches add: there is no resid_mid."""
    chained: tuple[str, ...] = ()
    """Branches that read what an earlier branch of their own site adds."""
    problem: str = ""
    """What the block adds beside its branches; empty where they are all."""


@dataclass(frozen=True)
class Anatomy:
    """Everything that writes to the residual stream of one model."""

    blocks_path: str
    """The name of the list of blocks."""
    blocks: tuple[BlockAnatomy, ...]
    embed: str
    """The name of the word embedding module."""
    embed_scale: float = 1.0
    pos_embed: str | None = None
    """The name of the learned positions' module."""
    embed_problem: str = ""
    """What enters the first block beside the embeddings."""

    @property
    def problems(self) -> list[str]:
        """Everything that keeps an ablation at all writers from being exact in weights."""
        texts = [self.embed_problem]
        for i, block in enumerate(self.blocks):
            texts.append(f"blocks.{i}: {block.problem}" if block.problem else "")
            texts += [f"blocks.{i}: {b.problem}" for b in (*block.attn, *block.mlp) if b.problem]
        return [text for text in texts if text]


def measure(hf: Any, run: Callable[[], Any]) -> Anatomy:
    """The anatomy of a Hugging Face decoder; `run` passes fixed tokens through it, without a cache.

    Raises:
        ModelError: no list of blocks whose outputs are the next one's inputs; blocks that keep several
            streams, or none.
    """
    with torch.no_grad():
        path, blocks, calls = find_blocks(hf, run)
        guesses: dict[str, dict[str, Layout]] = {}
        measured = tuple(
            _measure_block(f"{path}.{i}", block, call, guesses)
            for i, (block, call) in enumerate(zip(blocks, calls))
        )
        embedding = _measure_embedding(hf, run, path, stream_in(calls[0]))
    return Anatomy(path, measured, **embedding)


def find_blocks(hf: Any, run: Callable[[], Any]) -> tuple[str, list[nn.Module], list[Recorded]]:
    """The longest list of modules of which each takes what the one before returned, and their calls."""
    lists = {
        name: list(module)
        for name, module in hf.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    parts = {f"{name}.{i}": part for name, items in lists.items() for i, part in enumerate(items)}
    with recording(parts) as calls:
        run()
    chains = {}
    for name, items in lists.items():
        each = [calls.get(f"{name}.{i}", []) for i in range(len(items))]
        if all(len(found) == 1 for found in each) and _is_chain([found[0] for found in each]):
            chains[name] = [found[0] for found in each]
    if not chains:
        raise ModelError(
            f"{type(hf).__name__} has no list of blocks of which each takes the stream that the one before "
            f"returns (lists of modules: {', '.join(lists) or 'none'}): models with several residual "
            "streams, or with blocks that are run twice, cannot be edited by this package"
        )
    name = max(chains, key=lambda each: len(chains[each]))
    return name, lists[name], chains[name]


def _is_chain(calls: Sequence[Recorded]) -> bool:
    for i, call in enumerate(calls):
        if stream_argument(call.args, call.kwargs) is None:
            return False
        if call.output.shape != stream_in(call).shape:
            return False
        if i and not _equal(calls[i - 1].output, stream_in(call)):
            return False
    return True


def _equal(some: Tensor, others: Tensor) -> bool:
    """True for equal values; a NaN, as a spoiled weight makes it, is itself."""
    return torch.equal(some.nan_to_num(), others.nan_to_num())


def _measure_block(
    path: str, block: nn.Module, call: Recorded, guesses: dict[str, dict[str, Layout]]
) -> BlockAnatomy:
    """The summands of one block, from its own call in a whole pass, in float32."""
    wide, call = _in_float32(block, call)
    modules = {name: module for name, module in wide.named_modules() if name}
    with recording(modules) as calls:
        output = stream_of(wide(*call.args, **call.kwargs))
    assert output is not None
    delta = output - stream_in(call)
    children = [name for name in calls if "." not in name]
    terms, error = _solved(delta, calls, children)
    if error > TOLERANCE:
        terms, error = _solved(delta, calls, list(calls))
    if error > TOLERANCE or not terms:
        return BlockAnatomy(problem=_unexplained(error, terms))
    before = {name: calls[name][-1].output for name in terms}
    noise = {name: _noise_run(wide, call, modules, name, terms, before) for name in terms}
    ignored = [name for name, (gap, _) in noise.items() if gap > 50 * TOLERANCE]
    if ignored:
        return BlockAnatomy(problem=f"{ignored[0]} is computed, but not what reaches the stream")
    order = [name for name in calls if name in terms]
    reads = {name: reached for name, (_, reached) in noise.items()}
    attn, mlp = _sites(order, reads)
    branches = {
        name: _measure_branch(path, name, terms[name], modules, calls, guesses)
        for name in (*attn, *mlp)
    }
    chained = [
        b
        for group in (attn, mlp)
        for i, b in enumerate(group)
        if any(b in reads[a] for a in group[:i])
    ]
    return BlockAnatomy(
        attn=tuple(branches[name] for name in attn),
        mlp=tuple(branches[name] for name in mlp),
        parallel=bool(mlp) and not any(m in reads[a] for a in attn for m in mlp),
        chained=tuple(f"{path}.{name}" for name in chained),
    )


def _in_float32(block: nn.Module, call: Recorded) -> tuple[nn.Module, Recorded]:
    """The block itself, or a float32 copy of it and its call where the model is half precision."""
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    if dtype.itemsize >= 4:
        return block, call

    def widened(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype == dtype else x

    args, kwargs = pytree.tree_map(widened, (call.args, call.kwargs))
    return copy.deepcopy(block).float(), Recorded(args, kwargs, call.output)


def _solved(
    delta: Tensor, calls: Mapping[str, list[Recorded]], names: Sequence[str]
) -> tuple[dict[str, float], float]:
    """The modules whose outputs sum to `delta`, with their coefficients, and the share left unexplained."""
    columns: dict[str, Tensor] = {}
    for name in names:
        x = calls[name][-1].output
        if x.numel() != delta.numel() or x.shape[-1] != delta.shape[-1]:
            continue
        column = x.double().flatten()
        norm = column.norm()
        # what a dropout or a wrapper hands on is no second summand
        same = any((column - other).norm() <= 1e-6 * norm for other in columns.values())
        if norm > 0 and len(calls[name]) == 1 and not same:
            columns[name] = column
    if not columns:
        return {}, 1.0
    target = delta.double().flatten()
    terms, error = _least_squares(target, columns)
    # The smallest set that does: outer modules go first, whose output may hold the stream itself.
    for name in sorted(columns, key=lambda each: each.count(".")):
        small = abs(terms[name]) * columns[name].norm() <= 1e-3 * target.norm()
        without = {each: columns[each] for each in terms if each != name}
        fewer, worse = _least_squares(target, without)
        if worse <= TOLERANCE or (small and worse <= 2 * error):
            terms, error = fewer, worse
    return terms, error


def _least_squares(target: Tensor, columns: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
    size = float(target.norm())
    if not columns or not size:
        return {}, 1.0
    matrix = torch.stack(list(columns.values()), 1).cpu()
    values = torch.linalg.lstsq(matrix, target.cpu()[:, None], driver="gelsd").solution[:, 0]
    error = float((matrix @ values - target.cpu()).norm()) / size
    # a factor of one is one: rounding must not scale what is edited
    rounded = [1.0 if abs(float(v) - 1) < 1e-5 else float(v) for v in values]
    return dict(zip(columns, rounded)), error


def _unexplained(error: float, terms: Mapping[str, float]) -> str:
    named = (
        " + ".join(f"{scale:.3g} * {name}" for name, scale in terms.items()) or "no module's output"
    )
    return (
        f"what the block adds to the stream is not a sum of its modules' outputs: {error:.1%} of it is left "
        f"beside {named}"
    )


def _noise_run(
    block: nn.Module,
    call: Recorded,
    modules: Mapping[str, nn.Module],
    name: str,
    terms: Mapping[str, float],
    before: Mapping[str, Tensor],
) -> tuple[float, set[str]]:
    """With noise in one summand: the share of the sum left unexplained, and the summands that changed.

    `before` holds what each summand is without noise.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        x = stream_of(output)
        assert x is not None
        noise = torch.randn(x.shape, generator=generator).to(x)
        return with_stream(output, x + noise * x.std())

    handle = modules[name].register_forward_hook(disturb)
    try:  # the recorder comes after the noise
        with recording({each: modules[each] for each in terms}) as after:
            output = stream_of(block(*call.args, **call.kwargs))
    finally:
        handle.remove()
    assert output is not None
    delta = (output - stream_in(call)).double()
    left = delta.clone()
    for each, scale in terms.items():
        left -= scale * after[each][-1].output.double().reshape(delta.shape)
    changed = {
        each
        for each in terms
        if each != name and not torch.equal(before[each], after[each][-1].output)
    }
    return float(left.norm() / delta.norm()), changed


def _sites(order: Sequence[str], reached: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """Summands as (attn, mlp): mlp are those that read what an earlier one adds, or else the last of several.

    A block of one summand (Mamba's mixer) has it at mlp.
    """
    late = [name for name in order if any(name in reached[other] for other in order)]
    if len(order) < 2:
        return [], list(order)
    if late:
        return [name for name in order if name not in late], late
    feed_forward = [
        n for n in order if any(word in n.lower() for word in ("mlp", "ffn", "feed", "fc"))
    ]
    mlp = feed_forward if 0 < len(feed_forward) < len(order) else [order[-1]]
    return [name for name in order if name not in mlp], mlp


def _measure_branch(
    path: str,
    name: str,
    scale: float,
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, list[Recorded]],
    guesses: dict[str, dict[str, Layout]],
) -> Branch:
    """The norm and the writing parameters of one summand."""
    module, call = modules[name], calls[name][-1]
    norm, source, problem = None, name, ""
    offset = norm_offset(module, call)
    if offset is not None:
        taken = call.args[0] if call.args else next(iter(call.kwargs.values()))
        before = [
            n for n, each in calls.items()
            if n != name and each[-1].output.shape == taken.shape
            and torch.equal(each[-1].output, taken)
        ]  # fmt: skip
        if isinstance(offset, str):
            problem = f"{name} {offset}"
        elif not before:
            problem = f"what goes into {name} is no module's output"
        else:
            source = min(before, key=lambda n: n.count("."))
            norm = Norm(f"{path}.{name}", offset)
    writers: dict[str, Layout] = {}
    if not problem:
        kind = " ".join([source, *kinds(dict(modules[source].named_parameters()))])
        local, problem = find_writers(modules[source], calls[source][-1], guesses.get(kind, {}))
        guesses[kind] = local
        writers = {f"{path}.{source}.{n}": layout for n, layout in local.items()}
        problem = problem and f"{source}: {problem}"
    return Branch(f"{path}.{name}", scale, f"{path}.{source}", norm, writers, problem)


def _measure_embedding(
    hf: Any, run: Callable[[], Any], blocks: str, entering: Tensor
) -> dict[str, Any]:
    """What enters the first block, as a sum of embeddings."""
    word = hf.get_input_embeddings()
    outside = {
        name: module
        for name, module in hf.named_modules()
        if name and not name.startswith(f"{blocks}.") and not isinstance(module, nn.ModuleList)
    }
    name_of = next(name for name, module in outside.items() if module is word)
    with recording(outside) as calls:
        run()
    word_call = calls[name_of][-1]
    for each in calls.values():  # positions may come without a batch axis
        x = each[-1].output
        if x.shape == entering.shape[1:]:
            each[-1].output = x.expand(entering.shape)
    before = list(calls)
    embeddings = [n for n in before if isinstance(outside[n], nn.Embedding) or outside[n] is word]
    tolerance = max(TOLERANCE, 4 * torch.finfo(entering.dtype).eps)
    terms, error = _solved(entering, calls, embeddings)
    if error > tolerance or name_of not in terms:
        wider, better = _solved(entering, calls, [n for n in before if not _holds(n, before)])
        others = ", ".join(n for n in wider if n not in embeddings) if better < tolerance else ""
        problem = (
            f"what enters the first block is not a sum of embeddings: {error:.1%} of it is left"
            + (f", and {others} writes there too" if others else "")
        )
        return {"embed": name_of, "embed_problem": problem}
    positions = [n for n in terms if n != name_of]
    problem = (
        f"more than one embedding beside the words': {positions}" if len(positions) > 1 else ""
    )
    if positions and terms[positions[0]] != 1.0:
        problem = f"{positions[0]} is scaled on its way to the stream"
    # some embeddings scale what they look up themselves (Gemma 3)
    ids = next(v for v in (*word_call.args, *word_call.kwargs.values()) if isinstance(v, Tensor))
    rows = word.weight[ids].reshape(word_call.output.shape)
    inside = float(word_call.output.norm() / rows.norm())
    if float((word_call.output - inside * rows).norm()) > tolerance * float(
        word_call.output.norm()
    ):
        problem = f"{name_of} does more than scale the rows that it looks up"
    return {
        "embed": name_of,
        "embed_scale": 1.0 if abs(terms[name_of] * inside - 1) < 1e-3 else terms[name_of] * inside,
        "pos_embed": positions[0] if positions else None,
        "embed_problem": problem,
    }


def _holds(name: str, names: Sequence[str]) -> bool:
    """True for a module that others of the list are inside of."""
    return any(other.startswith(f"{name}.") for other in names)
