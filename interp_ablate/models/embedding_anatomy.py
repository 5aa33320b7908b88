"""Anatomy of what enters the first block: a sum of embeddings, or a norm of one.

Knows: calls outside the blocks, least squares, norms. Does not know: plans, hooks that stay, files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_ablate.models.module_calls import Recorded, probe_of, recording
from interp_ablate.models.module_sums import TOLERANCE, solved
from interp_ablate.models.written_parameters import Norm, norm_of


def measure_embedding(
    hf: Any, run: Callable[[], Any], blocks: str, entering: Tensor
) -> dict[str, Any]:
    """What entered the first block in a pass, as a sum of embeddings, or norms of one: fields of an `Anatomy`."""
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
    terms, error = solved(entering, calls, embeddings)
    norms: list[Norm] = []
    while (error > tolerance or name_of not in terms) and len(norms) < len(calls):
        found = _norm_that_gave(entering, outside, calls)
        if found is None:
            break
        norms, entering = [*norms, found[0]], found[1]
        terms, error = solved(entering, calls, embeddings)
    if error > tolerance or name_of not in terms:
        wider, better = solved(entering, calls, [n for n in before if not _holds(n, before)])
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
    if any(norm.biased and (i or len(calls[norm.path]) > 1) for i, norm in enumerate(norms)):
        problem = f"{norms[-1].path} has a bias, and is read by another norm, or run again later"
    if positions and abs(terms[positions[0]] - 1) > 1e-3:  # a sum in half precision is rounded
        problem = f"{positions[0]} is scaled on its way to the stream"
    inside = _inner_scale(word, word_call, tolerance)
    if inside is None:
        inside, problem = 1.0, f"{name_of} does more than scale the rows that it looks up"
    scale = terms[name_of] * inside
    return {
        "embed": name_of,
        "embed_scale": 1.0 if abs(scale - 1) < 1e-3 else scale,
        "pos_embed": positions[0] if positions else None,
        "embed_norms": tuple(norms),
        "embed_problem": problem,
    }


def _inner_scale(word: Any, call: Recorded, tolerance: float) -> float | None:
    """The factor by which an embedding scales the rows that it looks up (Gemma 3's); None if it does more."""
    ids = next(v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor))
    rows = word.weight[ids.to(word.weight.device)].reshape(call.output.shape).to(call.output)
    inside = float(call.output.norm() / rows.norm())
    beside = float((call.output - inside * rows).norm())
    return inside if beside <= tolerance * float(call.output.norm()) else None


def _norm_that_gave(
    x: Tensor, modules: Mapping[str, nn.Module], calls: Mapping[str, Sequence[Recorded]]
) -> tuple[Norm, Tensor] | None:
    """The norm that returned a tensor, and what it read; None if none did."""
    for name, of_one in calls.items():
        for call in of_one:
            if call.output.shape == x.shape and torch.equal(call.output.to(x.device), x):
                norm = norm_of(*probe_of(modules[name], call), name)
                if isinstance(norm, Norm):
                    return norm, next(v for v in (*call.args, *call.kwargs.values()))
    return None


def _holds(name: str, names: Sequence[str]) -> bool:
    """True for a module that others of the list are inside of."""
    return any(other.startswith(f"{name}.") for other in names)


def unembedding_of(hf: Any) -> Any:
    """The module that makes logits, which some wrapped models' inner decoder alone names; None where neither does."""
    decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else hf
    named = (
        part.get_output_embeddings()
        for part in (hf, decoder)
        if hasattr(part, "get_output_embeddings")
    )
    return next((head for head in named if isinstance(head, nn.Module)), None)
