"""Hooks in a model that are neither TransformerLens' nor transformers' own: found, and taken out for a while.

Knows: torch's tables of hooks, HookPoints. Does not know: whose the hooks are (a plan's, a capture's, the user's).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from interp_ablate.models.backends.hf_sites import SitePoint

# What keeps hooks of its own in a model; any other hook is somebody's who wants it called.
_HOOKING = ("transformer_lens.", "transformers.", f"{SitePoint.__module__}.")


def foreign_hooks(module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """The hooks of others in one module: each as the table that holds it, and its id there."""
    tables = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    if not any(tables):
        return
    anyones = is_point(module)
    for table in tables:
        for number, hook in table.items():
            if anyones or not _module_of(hook).startswith(_HOOKING):
                yield table, number


def is_point(module: nn.Module) -> bool:
    """True for a module that is there to be hooked, and computes nothing."""
    from transformer_lens.hook_points import HookPoint

    return isinstance(module, (HookPoint, SitePoint))


def _module_of(hook: Any) -> str:
    return f"{getattr(hook, '__module__', '')}."


def hook_ids(root: nn.Module) -> frozenset[int]:
    """The ids of all hooks of others below a module."""
    return frozenset(n for module in root.modules() for _, n in foreign_hooks(module))


@contextmanager
def without_hooks(root: nn.Module, *, points_only: bool = False) -> Iterator[None]:
    """Inside the block no hook of others below a module is called; afterwards all are as they were.

    Args:
        points_only: take out those at hook points alone (plans are there, and captures), not those that somebody
            put on a module of the model.
    """
    found = [
        pair
        for module in root.modules()
        if not points_only or is_point(module)
        for pair in foreign_hooks(module)
    ]
    tables = {id(table): table for table, _ in found}
    before = {key: dict(table) for key, table in tables.items()}
    for table, number in found:
        del table[number]
    try:
        yield
    finally:
        for key, table in tables.items():
            table.clear()
            table.update(before[key])
