"""A plan's additions as hooks on a Hugging Face decoder while it trains, also under PEFT.

Knows: hooks at a block's input and output. Does not know: data, or how a vector was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.models.architectures import architecture_of
from interp_ablate.sites import Site

_BLOCK_POINTS = ("resid_pre", "resid_post")


def block(hf: Any, layer: int) -> nn.Module:
    """The decoder block of a layer of a Hugging Face model, by the declared names of its writers.

    Raises:
        ExportError: an architecture without an entry.
        PlanError: a layer beyond the last.
    """
    n_layers = hf.config.num_hidden_layers
    if layer >= n_layers:
        raise PlanError(f"no layer {layer}: the model has layers 0 to {n_layers - 1}")
    before, _, _ = architecture_of(hf.config).mlp[0][0].name.partition("{layer}")
    return hf.get_submodule(f"{before}{layer}")


@contextmanager
def train_with_additions(model: Any, plan: Plan) -> Iterator[None]:
    """Run and train a Hugging Face model (or PEFT's over one) with a plan's additions in its stream.

    The same function as `Model.applied(plan)`: x + coefficient * vector at resid_pre or resid_post of a
    layer (the block's input and output). Positions are "all", or "generated": those whose label counts,
    in rows with labels. The hooks are gone when the block is left, whatever happens.

    Raises:
        PlanError: an edit that is no addition at a block's input or output, or at other positions; on
            leaving without another error, a site whose hook never ran.
    """
    base = model.get_base_model() if _is_peft(model) else model
    width = base.config.hidden_size
    if len(plan) and plan.d_model != width:
        raise PlanError(
            f"the vector has d_model {plan.d_model}, the model {width}: it is of another model"
        )
    labelled: list[Tensor] = []
    fired: dict[Site, int] = dict.fromkeys(plan.sites, 0)

    def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        labelled[:] = [] if labels is None else [labels != -100]

    handles = [model.register_forward_pre_hook(hold, with_kwargs=True)]
    try:
        for edit in map(_checked, plan):
            for site in edit.sites:
                change = _adder(edit, site, labelled, fired)
                handles.append(_hook(block(base, site.layer), site, change))
        yield
    finally:
        for handle in handles:
            handle.remove()
    silent = [str(site) for site, count in fired.items() if not count]
    if silent:
        raise PlanError(f"nothing was added at {', '.join(silent)}: no row passed there")


def _is_peft(model: Any) -> bool:
    return type(model).__module__.startswith("peft.")


def _checked(edit: Any) -> Add:
    if not isinstance(edit, Add):
        raise PlanError(f"{edit!r}: while a model trains only additions are made (Add)")
    wrong = [str(site) for site in edit.sites if site.point not in _BLOCK_POINTS]
    if wrong or edit.positions not in ("all", "generated"):
        raise PlanError(
            f"{edit!r} at {(wrong or [edit.positions])[0]}: while a model trains, vectors are added at "
            f"{' and '.join(_BLOCK_POINTS)} of a layer, at positions 'all' or 'generated'"
        )
    return edit


def _adder(
    edit: Add, site: Site, labelled: list[Tensor], fired: dict[Site, int]
) -> Callable[[Tensor], Tensor]:
    vector = edit.map_at(site).shift

    def change(x: Tensor) -> Tensor:
        fired[site] += 1
        shift = vector.to(x)
        if edit.positions == "all":
            return x + shift
        return x + shift * _of_answers(labelled, x)[..., None].to(x)

    return change


def _of_answers(labelled: list[Tensor], x: Tensor) -> Bool[Tensor, "batch pos"]:
    if not labelled or labelled[0].shape != x.shape[:2]:
        raise PlanError(
            "'generated' positions are those whose label counts, and these rows have no labels: train on "
            "rows with labels, or add at positions 'all'"
        )
    return labelled[0]


def _hook(module: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` on the stream that enters a block, or on that which leaves it."""
    if site.point == "resid_pre":

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_hook(after)
