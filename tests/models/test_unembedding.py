"""The unembedding reads all rows' positions in one product of matrices, and gives what it gave."""

from __future__ import annotations

from typing import Any

import torch
from support.family_models import build
from tiny import rows_of, shared
from torch.utils._python_dispatch import TorchDispatchMode

from interp_ablate.models.embedding_anatomy import unembedding_of
from interp_ablate.training.lora_targets import linear_modules


class Products(TorchDispatchMode):
    """Keeps the kinds of the products of matrices into a vocabulary."""

    def __init__(self, d_vocab: int) -> None:
        super().__init__()
        self.d_vocab, self.kinds = d_vocab, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "matmul", "linear") and out.shape[-1] == self.d_vocab:
            self.kinds.append(name)
        return out


def test_the_weight_is_read_once_for_all_rows(backend: str) -> None:
    """A view of the last positions went through `bmm`, which reads the weight once a row."""
    model, rows = shared(backend=backend), rows_of(9, 12, 14)
    model.logits(rows, keep=3)  # what is measured once is measured
    for keep in (1, 3):
        with Products(model.tl.cfg.d_vocab) as products:
            model.logits(rows, keep=keep)
        assert products.kinds and "bmm" not in products.kinds


def test_logits_are_those_of_the_whole_stream(backend: str) -> None:
    model, rows = shared(backend=backend), rows_of(9, 12, 14)
    for keep in (1, 3):
        got = model.logits(rows, keep=keep)
        for row, logits in zip(rows, got):
            whole = model.logits([row], keep=len(row))[0]  # contiguous as it is
            torch.testing.assert_close(logits, whole[-keep:], atol=2e-5, rtol=0)


def test_the_unembedding_is_left_as_it_was() -> None:
    model = shared(backend="hf")
    head = model.tl.hf.get_output_embeddings()
    model.logits(rows_of(9, 12))
    assert "forward" not in head.__dict__


def test_an_unembedding_that_only_the_inner_decoder_names() -> None:
    """It was none to the model's backend, and a LoRA on all linear layers adapted it."""
    hf = build("nemotron_h_omni")
    assert hf.get_output_embeddings() is None
    assert unembedding_of(hf) is hf.language_model.lm_head
    assert not [name for name in linear_modules(hf) if "lm_head" in name]
