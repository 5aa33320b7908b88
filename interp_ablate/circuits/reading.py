"""Readers of a direction: weights that are aligned with it, and what changes when one module does not see it.

Alignment is of the first linear maps of a module with the direction, the norm before it folded in. Path patching
(Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969) ablates the direction in what one attention or MLP
reads, and in nothing else: the module's output of that pass is put into an unedited one.

Knows: reading weights, two passes and a replaced output. Does not know: what wrote the direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.circuits.norm_gains import through_norm
from interp_ablate.directions.direction import Direction, as_direction, random_direction
from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import DirectionError, PlanError
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.module_calls import Recorded, recording
from interp_ablate.models.quantized_modules import plain_weight
from interp_ablate.precision import to_float64
from interp_ablate.prompts.prompt import PromptLike, as_prompts
from interp_ablate.sites import Site
from interp_ablate.stats.intervals import mean_interval

if TYPE_CHECKING:
    import pandas as pd

N_TOKENS = 48  # fixed tokens on which norms are measured


def reading_weights(model: Model, direction: Direction) -> pd.DataFrame:
    """How strongly the first linear maps of each layer read a direction, beside a random one.

    One row a weight and, in attention, a head: layer, weight, head, alignment. The alignment is the length
    of W r over its root mean square for random unit vectors (exact): 1 is what a random direction has. `r` is
    seen through the norm's gain. `head` counts groups of rows as wide as a head; in a weight that holds
    queries, keys and values together they follow each other as they do in the weight.

    Raises:
        DirectionError: a direction of another d_model.
        PlanError: a plan is applied.
    """
    import pandas as pd

    check_model(model)
    _check(model, direction)
    rows: list[dict[str, Any]] = []
    for layer, name, weight, size in _linear_readers(model):
        wide = to_float64(weight.weight)
        along = (wide @ direction.vector.to(wide)).square()
        everything = wide.square().sum(1) / model.d_model
        groups = size if size and _holds_heads(len(wide), size, model, layer) else len(wide)
        ratio = along.unflatten(0, (-1, groups)).sum(1) / everything.unflatten(0, (-1, groups)).sum(
            1
        )
        for head, value in enumerate(ratio.sqrt().tolist()):
            rows.append(
                {
                    "layer": layer,
                    "weight": name,
                    "head": head if len(ratio) > 1 else None,
                    "alignment": value,
                }
            )
    frame = pd.DataFrame(rows, columns=["layer", "weight", "head", "alignment"])
    return frame.astype({"head": "Int64"})


def _holds_heads(n_rows: int, size: int, model: Model, layer: int) -> bool:
    """True if rows can be those of queries, of keys or values (which heads share), or of all three."""
    projection = model.site_map.projection(Site(layer, "attn_out"))
    if projection is None or n_rows % size:
        return False
    n_heads, groups = projection[1].shape[1] // size, n_rows // size
    shared = groups if groups <= n_heads else (groups - n_heads) // 2
    fused = groups > n_heads and (groups - n_heads) % 2 == 0
    return (groups <= n_heads or fused) and shared > 0 and n_heads % shared == 0


class _Folded:
    """A reading weight with the norm before it folded in: [out, d_model]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


def _linear_readers(model: Model) -> Iterator[tuple[int, str, _Folded, int | None]]:
    """The linear maps that read a norm of the stream: layer, name, weight, and the width of a head in attention."""
    generator = torch.Generator().manual_seed(0)
    n = min(N_TOKENS, model.tl.cfg.n_ctx)
    row = torch.randint(0, model.tl.cfg.d_vocab, (n,), generator=generator).tolist()
    for layer in range(model.n_layers):
        block = model.site_map.block(layer)
        modules = {
            name: module
            for name, module in block.named_modules()
            if (weight := _matrix(module)) is not None and weight.shape[1] == model.d_model
        }
        streams = [
            Site(layer, p) for p in ("resid_pre", "resid_mid") if model.site_map.has(Site(layer, p))
        ]  # type: ignore[arg-type]
        with recording(modules) as calls:
            passes = model.stream([row], keep=0, capture=dict.fromkeys(streams, _all), tail=n)
            captured = next(seen for _, _, seen in list(passes))
        eye = torch.eye(model.d_model, dtype=torch.float64)
        for name, recorded in calls.items():
            entered = _input(recorded[-1])
            if entered is None or entered.numel() != n * model.d_model:
                continue
            for site in streams:
                fold = through_norm(captured[site].flatten(0, -2), entered.reshape(n, -1), eye)
                if fold is not None:
                    weight = _matrix(modules[name])
                    assert weight is not None
                    size = model.site_map.head_sizes[layer] if site == streams[0] else None
                    wide = to_float64(weight)
                    wrappers = ("_original_component", "original_component")
                    plain = ".".join(part for part in name.split(".") if part not in wrappers)
                    yield layer, plain, _Folded(wide @ fold.to(wide).T), size
                    break


def _all(x: Tensor, batch: Any) -> Tensor:
    return x.detach()


def _input(call: Recorded) -> Tensor | None:
    values = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)]
    return values[0] if values else None


def _matrix(module: nn.Module) -> Float[Tensor, "out d_model"] | None:
    """The weight of a linear module as [out, in]; None for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or list(module.children()):
        return None
    if isinstance(module, nn.Linear):
        return plain_weight(module)
    return weight.detach().T if type(module).__name__ == "Conv1D" else None


def path_patching(
    model: Model,
    prompts: PromptLike | Sequence[PromptLike],
    direction: Direction,
    *,
    layers: Sequence[int] | None = None,
    controls: int = 1,
    seed: int = 0,
    on_module: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """What changes at the last token when one module alone does not see a direction.

    For each attention and MLP: the direction is ablated from what this module reads, at every token; the rest
    of the model gets the module's changed output, and an unedited stream. One row a module: layer, module,
    kl (nats, KL(unedited || patched) of the next token, mean over prompts with its 95% interval), random_kl (the
    mean over `controls` random directions), n.

    Raises:
        DirectionError: a direction of another d_model.
        PlanError: a plan is applied.
    """
    import pandas as pd

    check_model(model)
    _check(model, direction)
    rows = [model.encode_all([text]) for text in as_prompts(prompts)]
    random = [random_direction(direction, seed=1000 * seed + i) for i in range(controls)]
    unedited = [_log_probs(model, row) for row in rows]
    table: list[dict[str, Any]] = []
    for layer in layers if layers is not None else range(model.n_layers):
        for reads, writes in _modules(model, layer):
            kls = [
                [
                    _patched_kl(model, row, base, each, reads, writes)
                    for row, base in zip(rows, unedited)
                ]
                for each in (direction, *random)
            ]
            low, high = mean_interval(kls[0], bounds=(0.0, float("inf"))) or (None, None)
            chance = sum(map(sum, kls[1:])) / (len(rows) * controls) if controls else None
            table.append(
                {"layer": layer, "module": writes.point.removesuffix("_out"), "kl": sum(kls[0]) / len(rows),
                 "low": low, "high": high, "random_kl": chance, "n": len(rows)}
            )  # fmt: skip
            if on_module:
                on_module(1)
    return pd.DataFrame(table)


def _check(model: Model, direction: Direction) -> None:
    if len(as_direction(direction).vector) != model.d_model:
        raise DirectionError(
            f"the direction has d_model {len(direction.vector)}, and {model.source.name} {model.d_model}"
        )
    if model.plans.is_edited:
        raise PlanError(
            "readers are of a model without edits: leave the `with model.applied(...)` block"
        )


def _modules(model: Model, layer: int) -> Iterator[tuple[Site, Site]]:
    """Where each module of a layer reads the stream, and where it writes."""
    attn, mid, mlp = (Site(layer, p) for p in ("attn_out", "resid_mid", "mlp_out"))  # type: ignore[arg-type]
    before = Site(layer, "resid_pre")
    if model.site_map.has(attn):
        yield before, attn
    if model.site_map.has(mlp):
        yield (mid if model.site_map.has(mid) else before), mlp


def _log_probs(model: Model, rows: list[list[int]]) -> Float[Tensor, " d_vocab"]:
    return to_float64(model.logits(rows)[0, -1]).log_softmax(-1)


def _patched_kl(
    model: Model,
    rows: list[list[int]],
    base: Tensor,
    direction: Direction,
    reads: Site,
    writes: Site,
) -> float:
    """KL in nats at the last token, with the module's output as it is when it does not see the direction."""
    with model.applied(Plan((Ablate(direction, reads),))):
        stream = model.stream(rows, keep=0, capture={writes: _all}, tail=len(rows[0]))
        changed = next(seen[writes].clone() for _, _, seen in list(stream))
    with _replacing(model, writes, changed):
        patched = _log_probs(model, rows)
    return float((base.exp() * (base - patched)).sum().clamp(min=0))


@contextmanager
def _replacing(model: Model, site: Site, values: Tensor) -> Iterator[None]:
    """Inside the block a site holds these values."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return values.reshape(output.shape).to(output)

    handle = model.hook_point(site).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
