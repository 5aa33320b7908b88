"""An architecture entry read from a Bridge's own component map, for models that have no declared one.

Knows: the map that a TransformerBridge adapter holds. Does not know: whether the entry is true (it is measured before it is believed).
"""

from __future__ import annotations

from typing import Any

from interp_ablate.models.architectures import Architecture, Layout, Writer

_PLAIN = ("Linear", "Conv1D")


def describe_components(tl: Any) -> str:
    """The Bridge's component map in words, for messages."""
    parts = tl.adapter.component_mapping
    inner = parts["blocks"].submodules if "blocks" in parts else {}
    blocks = {
        name: f"{part.name} ({', '.join(f'{k}={v.name}' for k, v in part.submodules.items())})"
        for name, part in inner.items()
        if name in ("attn", "mlp")
    }
    names = {name: part.name for name, part in parts.items()} | blocks
    text = ", ".join(f"{name}={value}" for name, value in names.items())
    aliases = tl.blocks[0].hook_aliases
    hooks = [
        f"{point} is {aliases.get(point, 'nothing')}" for point in ("hook_attn_out", "hook_mlp_out")
    ]
    ends = [
        f"{block.name}.{end.name} is a {kind}, neither Linear nor Conv1D"
        for name, last in (("attn", "o"), ("mlp", "out"))
        if (block := inner.get(name)) and (end := block.submodules.get(last))
        for kind in [_kind(tl.original_model, f"{parts['blocks'].name}.0.{block.name}.{end.name}")]
        if kind not in (None, *_PLAIN)
    ]
    model = type(tl.original_model).__name__
    return f"the Bridge's component map of {model} has {text}; {', '.join([*hooks, *ends])}"


def discovered_architecture(tl: Any) -> Architecture | None:
    """An entry read from the component map; None where the map does not name every writer."""
    parts, hf = tl.adapter.component_mapping, tl.original_model
    if not {"embed", "blocks", "unembed"} <= set(parts):
        return None
    blocks, inner = parts["blocks"].name, parts["blocks"].submodules
    attn, mlp = inner.get("attn"), inner.get("mlp")
    if attn is None or mlp is None or "o" not in attn.submodules or "out" not in mlp.submodules:
        return None
    paths = [
        ".".join(name for name in (branch.name, branch.submodules[end].name) if name)
        for branch, end in ((attn, "o"), (mlp, "out"))
    ]
    block, aliases = f"{blocks}.{{layer}}.", tl.blocks[0].hook_aliases
    norms = _norms(inner, aliases, block)
    layouts = _layouts(hf, [f"{blocks}.0.{path}" for path in paths])
    if norms is None or layouts is None:
        return None
    position = parts.get("pos_embed")
    return Architecture(
        embed=f"{parts['embed'].name}.weight",
        unembed=f"{parts['unembed'].name}.weight",
        attn=((Writer(f"{block}{paths[0]}.weight", layouts[0]),),),
        mlp=((Writer(f"{block}{paths[1]}.weight", layouts[1]),),),
        pos_embed=f"{position.name}.weight" if position is not None else None,
        attn_norm=norms[0],
        mlp_norm=norms[1],
        gain_offset=1.0 if getattr(tl.cfg, "rmsnorm_uses_offset", False) else 0.0,
        parallel="hook_resid_mid" not in aliases,
        scaled_embed=True,
        prefix=f"{hf.base_model_prefix}.",
        discovered=True,
    )


def _norms(inner: Any, aliases: Any, block: str) -> list[str | None] | None:
    """Names of the norms after attention and MLP (None: no norm there); None if the map is unclear."""
    norms: list[str | None] = []
    for point in ("hook_attn_out", "hook_mlp_out"):
        holder = str(aliases.get(point, "")).split(".")[0]
        is_branch, component = holder in ("attn", "mlp"), inner.get(holder)
        if component is None or not (is_branch or "RMS" in type(component).__name__):
            return None
        norms.append(None if is_branch else block + component.name)
    return norms


def _layouts(hf: Any, paths: list[str]) -> list[Layout] | None:
    """Layouts of the modules at some paths; None if one is neither Linear nor Conv1D."""
    layouts: list[Layout] = []
    for path in paths:
        kind = _kind(hf, path)
        if kind not in _PLAIN:
            return None
        layouts.append("conv1d" if kind == "Conv1D" else "linear")
    return layouts


def _kind(hf: Any, path: str) -> str | None:
    """The class name of a module that a Bridge may stand around, by its path; None if the Bridge took it apart."""
    modules = {name.replace("._original_component", ""): m for name, m in hf.named_modules()}
    module = modules.get(path)
    return type(getattr(module, "original_component", module)).__name__ if module else None
