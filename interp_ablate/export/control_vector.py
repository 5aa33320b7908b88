"""Additions to the residual stream as the control vector (GGUF) that llama.cpp and repeng read.

Knows: the file's keys and tensors, and which plans it can hold. Does not know: models or hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.gguf_vectors import ARCHITECTURE, GGUFVectors, read_gguf_vectors
from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.sites import Site
from interp_ablate.storage.atomic_files import atomic_path


@dataclass(frozen=True, eq=False)
class ControlVector(GGUFVectors):
    """The content of a control vector file, which can be had as a plan."""

    def plan(self, coefficient: float = 1.0) -> Plan:
        """The same additions as a plan at resid_post; vectors that are zero add nothing and are left out.

        Raises:
            PlanError: a coefficient that is not finite.
        """
        return Plan(
            tuple(
                Add(vector, Site(layer, "resid_post"), coefficient=coefficient, label=self.name)
                for layer, vector in sorted(self.vectors.items())
                if vector.any()
            )
        )


def write_control_vector(
    plan: Plan, path: str | Path, *, model_hint: str, n_layers: int, d_model: int | None = None
) -> dict[str, Any]:
    """Write a plan of additions as a control vector (GGUF), whole or not at all.

    `direction.N` is added to the output of block N, counted from 0: `Site(N, "resid_post")`, and just
    as well `Site(N + 1, "resid_pre")` and `Site(N, "mlp_out")`. Coefficients are multiplied in and
    additions at one place summed, in float64; the file holds float32. llama.cpp's tools add the vectors
    times the scale they are given (`--control-vector-scaled FILE:SCALE`), to every position.

    Args:
        model_hint: the model type that the vectors are for ("llama"); nobody enforces it.
        n_layers: blocks of that model.
        d_model: its width, to be checked against the plan's; llama.cpp refuses another.

    Returns what was written: `blocks`, `d_model`, `model_hint`, `layer_count`.

    Raises:
        ExportError: what a control vector cannot hold, with the nearest plan that it can; a place that
            cannot be written.
    """
    import gguf

    if not model_hint:
        raise ExportError('a control vector names the model type it is for: model_hint="llama"')
    vectors = _block_vectors(plan, n_layers)
    if d_model is not None and plan.d_model != d_model:
        raise ExportError(f"the plan's vectors have d_model {plan.d_model}, the model {d_model}")
    path = Path(path)
    # Both generators write the number of vectors here: llama.cpp's cvector-generator (as int32; its
    # tools/cvector-generator/cvector-generator.cpp) and repeng's ControlVector.export_gguf (uint32).
    # Neither repeng nor llama.cpp's loader (common_control_vector_load) reads it.
    layer_count = len(vectors)
    try:
        with atomic_path(path) as temporary:
            writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
            writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", layer_count)
            for block, vector in vectors.items():
                writer.add_tensor(f"direction.{block}", vector.numpy())
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another place"
        ) from error
    return {
        "blocks": list(vectors),
        "d_model": plan.d_model,
        "model_hint": model_hint,
        "layer_count": layer_count,
    }


def _block_vectors(plan: Plan, n_layers: int) -> dict[int, Float[Tensor, " d_model"]]:
    """Block -> everything that is added to its output, in float32."""
    if not len(plan):
        raise ExportError("the plan has no edits: a control vector needs at least one addition")
    if plan.hooks_only:
        raise ExportError(f"{plan.hooks_only}. {_nearest(n_layers)}")
    sums: dict[int, Tensor] = {}
    for edit in plan:
        if not isinstance(edit, Add):
            raise ExportError(
                f"{edit!r} is no addition, and a control vector only adds. {_nearest(n_layers)}; an "
                "ablation or erasure goes into the weights: export a checkpoint, and that as GGUF"
            )
        if edit.positions != "all":
            raise ExportError(
                f"{edit!r} acts at {edit.positions} positions only; llama.cpp adds a control vector at "
                "every position. The nearest plan is the same with positions='all'"
            )
        for site, amount in zip(edit.sites, edit.amounts):
            block = _block_of(site, n_layers)
            sums[block] = sums.get(block, torch.zeros(plan.d_model, dtype=torch.float64))
            sums[block] = sums[block] + amount * edit.vectors[0]
    return {block: sums[block].float().contiguous() for block in sorted(sums)}


def _block_of(site: Site, n_layers: int) -> int:
    """The block to whose output an addition at a site adds."""
    block = {"resid_post": site.layer, "mlp_out": site.layer, "resid_pre": site.layer - 1}.get(
        site.point
    )
    if block is None:
        raise ExportError(
            f"a control vector cannot add at {site}: it adds to the output of a block, after the MLP. "
            f"{_nearest(n_layers)}"
        )
    if block >= n_layers:
        raise ExportError(
            f"the plan adds at {site}, but there are {n_layers} layers (from 0). {_nearest(n_layers)}"
        )
    if block < 1:
        what = "the embedding's output" if block < 0 else "the output of block 0"
        raise ExportError(
            f"{site} is {what}, and llama.cpp has control vectors from block 1 on (it refuses "
            f"direction.0). {_nearest(n_layers)}"
        )
    return block


def _nearest(n_layers: int) -> str:
    return (
        "The nearest plan is an Add at resid_post of some of the layers 1 to "
        f"{n_layers - 1}, with positions='all'"
    )


def read_control_vector(path: str | Path) -> ControlVector:
    """Read a control vector of llama.cpp's cvector-generator, of repeng, or of `write_control_vector`.

    Raises:
        DirectionError: what `read_gguf_vectors` refuses.
    """
    file = read_gguf_vectors(path)
    return ControlVector(file.name, file.model_hint, file.layer_count, file.vectors)
