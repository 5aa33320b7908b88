"""Tensors under a weight plan, changed whole or block by block.

Knows: the change of one tensor. Does not know: files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from interp_ablate.edits.affine import rescale_rows
from interp_ablate.weights.plan_to_weights import TensorEdit, WeightPlan

# Elements of a tensor that are changed at a time: some megabytes, so that they stay near the processor.
BLOCK = 1 << 19


def edited_tensor(tensor: Tensor, edit: TensorEdit) -> Tensor:
    """The whole tensor changed; the same bits as its blocks."""
    if edit.layout == "bias":
        return edit.affine(tensor.detach().cpu().double()).to(tensor)
    blocks = edited_blocks(lambda start, stop: tensor[start:stop].detach(), tensor.shape, edit)
    return torch.cat(list(blocks)).to(tensor.device)


def edited_blocks(
    rows: Callable[[int, int], Tensor], shape: Collection[int], edit: TensorEdit
) -> Iterator[Tensor]:
    """A changed weight in blocks along its first axis, from a function that reads rows start to stop.

    Computed in float64, or in float32 for 16-bit sources, and rounded once to the source's dtype. A
    [d_model, in] weight is read twice, everything else once; memory is some blocks, and with
    `keeps_norm` one weight.
    """
    first, *rest = shape
    if edit.layout == "experts":
        inner = TensorEdit("linear", edit.affine, edit.keeps_norm, edit.point)
        for i in range(first):
            yield edited_tensor(rows(i, i + 1)[0], inner)[None]
        return
    width = max(1, BLOCK // max(1, rest[0] if rest else 1))
    spans = [(start, min(start + width, first)) for start in range(0, first, width)]
    if edit.layout != "linear":
        for span in spans:
            yield _edited_rows(rows(*span), edit)
        return
    if edit.keeps_norm:
        whole = rows(0, first)
        eps = torch.finfo(whole.dtype).eps
        yield rescale_rows(_wide(whole).T, edit.affine, eps=eps)[0].T.contiguous().to(whole.dtype)
        return
    left = right = along = None
    for start, stop in spans:
        block = _wide(rows(start, stop))
        if left is None or right is None:
            left, right = edit.affine.left.to(block), edit.affine.right.to(block)
        part = right[start:stop].T @ block
        along = part if along is None else along + part
    assert left is not None and along is not None
    for start, stop in spans:
        block = rows(start, stop)
        yield _own(block).addmm_(left[start:stop], along).to(block.dtype)


def _edited_rows(block: Tensor, edit: TensorEdit) -> Tensor:
    """Rows that are outputs themselves: embeddings, and weights stored [in, d_model]."""
    wide, affine = _own(block), edit.affine
    if edit.keeps_norm:
        wide = rescale_rows(wide, affine, eps=torch.finfo(block.dtype).eps)[0]
    else:
        wide.addmm_(wide @ affine.right.to(wide), affine.left.to(wide).T)
    if edit.layout == "embedding" and not affine.is_linear:
        wide += affine.shift.to(wide)
    return wide.to(block.dtype)


def _own(block: Tensor) -> Tensor:
    """A wide copy that may be changed in place."""
    wide = _wide(block)
    return wide.clone() if wide.dtype == block.dtype else wide


def _wide(tensor: Tensor) -> Tensor:
    """The dtype a change is computed in: float64, or float32 where the stored one has 16 bits or fewer."""
    return tensor.detach().cpu().to(torch.float32 if tensor.element_size() < 4 else torch.float64)


def edited_state_dict(
    state: dict[str, Tensor], plan: WeightPlan
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict under a weight plan, and the names of what changed; other tensors are the same objects."""
    result = dict(state)
    for name, edit in plan.edits.items():
        result[name] = edited_tensor(state[name], edit)
    for name, added in plan.added.items():
        like = state[added.beside]
        if added.copy_of is not None:
            result[name] = state[added.copy_of]
        else:
            result[name] = added.bias(like.shape[0], like.dtype).to(like.device)
    return result, [*plan.edits]
