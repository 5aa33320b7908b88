"""Anatomy: what a decoder's blocks and embeddings write to the residual stream, measured on fixed tokens.

Nothing is taken from names. A block's output minus its input is written as a sum of the outputs of modules
inside it; each term is proven by noise, each weight that writes it by a projection.

Knows: modules, recorded calls, least squares. Does not know: plans, hooks that stay, files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from interp_ablate.errors import ModelError
from interp_ablate.models.architectures import Layout
from interp_ablate.models.embedding_anatomy import measure_embedding
from interp_ablate.models.ending_anatomy import measure_ending
from interp_ablate.models.module_calls import (
    Recorded,
    probe_of,
    recording,
    stream_argument,
    stream_in,
    stream_of,
    with_stream,
)
from interp_ablate.models.module_sums import TOLERANCE, rounded, solved, wide_of
from interp_ablate.models.written_parameters import (
    LEFT,
    Norm,
    find_writers,
    gated,
    kinds,
    norm_of,
    projected,
)

_STREAM = ""  # the stream itself, among the names of modules


@dataclass(frozen=True)
class Part:
    """What one module gives to a summand: the whole of it, or one of several behind norms of their own."""

    projection: str
    """The name of the module in the model, before all norms."""
    norms: tuple[Norm, ...] = ()
    """The norms between its output and the stream, the last one first."""
    writers: Mapping[str, Layout] = field(default_factory=dict)
    """The parameters that write its output, by name, with their layouts."""
    problem: str = ""
    """Why it cannot be edited exactly in weights; empty where it can."""


@dataclass(frozen=True)
class Branch:
    """One summand of what a block adds to the stream."""

    path: str
    """The name of the module in the model whose output, times `scale`, reaches the stream."""
    scale: float = 1.0
    parts: tuple[Part, ...] = ()
    """What the summand is made of; several where a norm reads a sum."""

    @property
    def writers(self) -> dict[str, Layout]:
        """The parameters that write this summand, by name, with their layouts."""
        return {name: layout for part in self.parts for name, layout in part.writers.items()}

    @property
    def problem(self) -> str:
        """Why the summand cannot be edited exactly in weights; empty where it can."""
        return "; ".join(part.problem for part in self.parts if part.problem)


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
    stream_scale: float = 1.0
    """What leaves the block is this times the sum of what entered and the branches."""
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
    embed_norms: tuple[Norm, ...] = ()
    """The norms between the embeddings and the stream, the last one first (BLOOM)."""
    embed_problem: str = ""
    """What enters the first block beside the embeddings."""
    end_problem: str = ""
    """What is added between the last block and what reads it."""

    @property
    def embeddings(self) -> dict[str, str]:
        """The parameters that write what enters the first block, by the point of their site."""
        biased = self.embed_norms and self.embed_norms[0].biased
        return {
            "embed": f"{self.embed}.weight",
            **({"pos_embed": f"{self.pos_embed}.weight"} if self.pos_embed else {}),
            **({"embed_bias": f"{self.embed_norms[0].path}.bias"} if biased else {}),
        }

    @property
    def problems(self) -> list[str]:
        """Everything that keeps an ablation at all writers from being exact in weights."""
        return [*filter(None, [self.embed_problem, self.end_problem]), *problems_of(self.blocks)]


def problems_of(blocks: Sequence[BlockAnatomy]) -> list[str]:
    """Everything that blocks add to the stream and no edit of a weight reaches, by block."""
    return [
        f"blocks.{i}: {problem}"
        for i, block in enumerate(blocks)
        for problem in (block.problem, *(b.problem for b in (*block.attn, *block.mlp)))
        if problem
    ]


def measure(hf: Any, run: Callable[[], Any]) -> Anatomy:
    """The anatomy of a Hugging Face decoder; `run` passes fixed tokens through it, without a cache.

    Raises:
        ModelError: no list of blocks whose outputs are the next one's inputs; blocks that keep several
            streams, or none.
    """
    path, blocks, entering = measure_blocks(hf, run)
    with torch.no_grad():
        embedding = measure_embedding(hf, run, path, entering)
    ending = measure_ending(hf, run, f"{path}.{len(blocks) - 1}")
    return Anatomy(path, blocks, **embedding, end_problem=ending)


@torch.no_grad()
def measure_blocks(
    model: nn.Module, run: Callable[[], Any]
) -> tuple[str, tuple[BlockAnatomy, ...], Tensor]:
    """The name of a decoder's list of blocks, what each adds to the stream, and what enters the first.

    Raises:
        ModelError: see `measure`; a block that returns NaN or infinity.
    """
    path, blocks, calls = find_blocks(model, run)
    spoiled = next((i for i, call in enumerate(calls) if not call.output.isfinite().all()), None)
    if spoiled is not None:
        raise ModelError(
            f"{path}.{spoiled} returns NaN or infinity on fixed tokens: what it writes cannot be measured. Are its "
            f"weights whole, and not too large for {calls[spoiled].output.dtype}?"
        )
    guesses: dict[str, dict[str, Layout]] = {}
    measured = tuple(
        _measure_block(f"{path}.{i}", block, call, guesses)
        for i, (block, call) in enumerate(zip(blocks, calls))
    )
    return path, measured, stream_in(calls[0])


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
        for name, items in lists.items():
            run_once = [call for i in range(len(items)) for call in calls.get(f"{name}.{i}", [])]
            if len(run_once) == len(items) and (scaled := _scaled_between(run_once)):
                raise ModelError(f"{type(hf).__name__}: {scaled.format(name)}")
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


def _scaled_between(calls: Sequence[Recorded]) -> str:
    """What is said of a stream that is multiplied between two blocks; empty if it is not."""
    for i, (one, after) in enumerate(pairwise(calls)):
        if stream_argument(after.args, after.kwargs) is None or not bool(one.output.any()):
            return ""
        left, entering = wide_of(one.output), wide_of(stream_in(after))
        if left.shape != entering.shape:
            return ""
        factor = float((left * entering).sum() / left.pow(2).sum())
        if float((entering - factor * left).norm()) > TOLERANCE * float(left.norm()):
            return ""
        if abs(factor - 1) > TOLERANCE:
            return (
                f"the stream is multiplied by {factor:.4g} between {{0}}.{i} and {{0}}.{i + 1}, outside the "
                "blocks, so that what they write is not one sum. RWKV does so when it does not train: set "
                "rescale_every to 0 in its config.json, which is the function that was trained"
            )
    return ""


def _equal(some: Tensor, others: Tensor) -> bool:
    """True for equal values; a NaN, as a spoiled weight makes it, is itself."""
    return torch.equal(some.nan_to_num(), others.nan_to_num())


def _measure_block(
    path: str, block: nn.Module, call: Recorded, guesses: dict[str, dict[str, Layout]]
) -> BlockAnatomy:
    """The summands of one block, from its own call in a whole pass, in float32."""
    wide, call = probe_of(block, call)
    modules = {name: module for name, module in wide.named_modules() if name}
    with recording(modules) as calls:
        output = stream_of(wide(*call.args, **call.kwargs))
    assert output is not None
    delta = output - stream_in(call)
    terms, kept, error, tolerance = _sum_of(delta, calls, call)
    if error <= tolerance and terms and abs(kept) <= TOLERANCE:
        named = " + ".join(terms)
        return BlockAnatomy(
            problem=f"what leaves the block is {named}, with nothing of what entered beside it: the stream "
            "itself passes through it"
        )
    if error > tolerance or not terms:
        own = _own_parameters(wide, delta, calls)
        if own:
            problem = f"the block itself adds {', '.join(own)}, which no module of it returns"
            return BlockAnatomy(problem=problem)
        return BlockAnatomy(problem=_unexplained(error, terms))
    before = {name: calls[name][-1].output for name in terms}
    noise = {name: _noise_run(wide, call, modules, name, terms, before, kept) for name in terms}
    ignored = [name for name, (gap, _) in noise.items() if gap > 50 * tolerance]
    if ignored:
        return BlockAnatomy(problem=f"{ignored[0]} is computed, but not what reaches the stream")
    order = [name for name in calls if name in terms]
    reads = {name: reached for name, (_, reached) in noise.items()}
    attn, mlp = _sites(order, reads)
    branches = {
        name: Branch(
            f"{path}.{name}",
            rounded(terms[name] / kept),
            _parts(path, name, modules, calls, guesses),
        )
        for name in (*attn, *mlp)
    }
    for name, branch in branches.items():
        if len(branch.parts) > 1 and not branch.problem and not _proven(wide, call, path, branch):
            return BlockAnatomy(
                problem=f"{name} is not written by {', '.join(branch.writers)} alone"
            )
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
        stream_scale=kept,
    )


def _sum_of(
    delta: Tensor, calls: Mapping[str, list[Recorded]], call: Recorded
) -> tuple[dict[str, float], float, float, float]:
    """Summands of what a block adds, the factor of what entered, the share that is left, and what rounding allows."""
    # what a block adds to a large stream is known to the rounding of the stream
    step = 4 * torch.finfo(torch.float32).eps * stream_in(call).norm()
    tolerance = max(TOLERANCE, float(step / delta.norm().clamp(min=1e-30)))
    children = [name for name in calls if "." not in name]
    with_stream_in = {**calls, _STREAM: [Recorded((), {}, stream_in(call))]}
    for names in (children, list(calls), [*children, _STREAM], [*calls, _STREAM]):
        terms, error = solved(delta, with_stream_in, names)
        kept = 1 + terms.pop(_STREAM, 0.0)  # of what entered
        if (
            error <= tolerance and abs(kept) > TOLERANCE
        ):  # nothing kept: a module adds the stream itself
            break
    return terms, kept, error, tolerance


def _own_parameters(
    block: nn.Module, delta: Tensor, calls: Mapping[str, list[Recorded]]
) -> list[str]:
    """The parameters that, beside modules' outputs, make up what a block adds; empty if they do not."""
    own = {
        name: [Recorded((), {}, p.detach().expand(delta.shape))]
        for name, p in block.named_parameters()
        if p.shape == delta.shape[-1:]
    }
    terms, error = solved(delta, {**calls, **own}, [*calls, *own])
    return [name for name in terms if name in own] if error <= TOLERANCE else []


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
    kept: float,
) -> tuple[float, set[str]]:
    """With noise in one summand: the share of the sum left unexplained, and the summands that changed.

    `before` holds what each summand is without noise, `kept` the factor of what enters the block.
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
    delta = wide_of(output) - kept * wide_of(stream_in(call))
    left = delta.clone()
    for each, scale in terms.items():
        left -= scale * wide_of(after[each][-1].output).reshape(delta.shape)
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


def _parts(
    path: str,
    name: str,
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, list[Recorded]],
    guesses: dict[str, dict[str, Layout]],
    norms: tuple[Norm, ...] = (),
) -> tuple[Part, ...]:
    """The parts of a summand: the module itself, or, where it is a norm, those of what the norm reads."""
    module, call = modules[name], calls[name][-1]
    norm = norm_of(module, call, f"{path}.{name}")
    if isinstance(norm, Norm) and (norm.centred or norm.biased):
        does = "centres what it reads" if norm.centred else "has a bias"
        norm = f"is a norm that {does}, which has no exact weight form inside a block"
    if isinstance(norm, str):
        return (Part(f"{path}.{name}", norms, problem=f"{name} {norm}"),)
    if norm is None:
        kind = " ".join([name, *kinds(dict(module.named_parameters()))])
        local, problem = find_writers(module, call, guesses.get(kind, {}))
        inner = _handed_on(name, calls) if problem else None
        if inner is not None:
            return _parts(path, inner, modules, calls, guesses, norms)
        problem = problem and (gated(module, call) or problem)
        guesses[kind] = local
        writers = {f"{path}.{name}.{n}": layout for n, layout in local.items()}
        return (Part(f"{path}.{name}", norms, writers, problem and f"{name}: {problem}"),)
    taken = call.args[0] if call.args else next(iter(call.kwargs.values()))
    earlier = [n for n in list(calls)[: list(calls).index(name)] if not n.startswith(f"{name}.")]
    same = [
        n for n in earlier
        if calls[n][-1].output.shape == taken.shape and torch.equal(calls[n][-1].output, taken)
    ]  # fmt: skip
    read = [min(same, key=lambda n: n.count("."))] if same else []
    if not read:
        terms, error = solved(taken, calls, earlier)
        read = list(terms) if error <= TOLERANCE else []
    if not read:
        problem = f"what goes into {name} is no module's output, nor a sum of some"
        return (Part(f"{path}.{name}", norms, problem=problem),)
    then = (*norms, norm)
    return tuple(p for n in read for p in _parts(path, n, modules, calls, guesses, then))


def _handed_on(name: str, calls: Mapping[str, list[Recorded]]) -> str | None:
    """The module inside another whose output that one returns as it is; None if there is none."""
    output = calls[name][-1].output
    return next(
        (
            inner
            for inner, (*_, call) in calls.items()
            if inner.startswith(f"{name}.")
            and call.output.numel() == output.numel()
            and torch.equal(call.output.reshape(output.shape), output)
        ),
        None,
    )


def _proven(block: nn.Module, call: Recorded, path: str, branch: Branch) -> bool:
    """True if projections of all parts' weights, each through its norms, leave nothing in the branch's output."""
    own, name = dict(block.named_parameters()), branch.path.removeprefix(f"{path}.")
    r = torch.randn(stream_in(call).shape[-1], generator=torch.Generator().manual_seed(3))
    r = (r / r.norm()).to(stream_in(call))
    changed: dict[str, Tensor] = {}
    for part in branch.parts:
        v = r.clone()
        for norm in part.norms:
            if norm.weighted:
                v = v * (own[norm.path.removeprefix(f"{path}.") + ".weight"] + norm.offset)
        for parameter, layout in part.writers.items():
            local = parameter.removeprefix(f"{path}.")
            changed[local] = projected(own[local], layout, v / v.norm())
    with recording({name: block.get_submodule(name)}) as calls:
        torch.func.functional_call(block, changed, call.args, call.kwargs)
    left = calls[name][-1].output
    return float((left @ r).norm()) <= LEFT * float(left.norm())
