"""What is added between the last block and the final norm: measured, and refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.family_models import build
from support.tiny import make_tokenizer
from torch import Tensor, nn

from interp_ablate.errors import ExportError
from interp_ablate.models.backends.hf import measured_anatomy
from interp_ablate.models.load import from_hf


class Before(nn.Module):
    """A final norm, and what is done to the stream before it."""

    def __init__(self, norm: Any, shift: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.norm, self.shift, self.factor = norm, shift, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.factor * x + self.shift)


def changed(dtype: torch.dtype = torch.float32, **how: float) -> Any:
    hf = build("llama").to(dtype)
    hf.model.norm = Before(hf.model.norm, **how)
    return hf


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_added_after_the_last_block_is_named(dtype: torch.dtype) -> None:
    said = r"after the last block: \d+\.\d% of what model\.norm\.norm reads is nothing that model\.layers\.3"
    problems = measured_anatomy(changed(dtype, shift=0.5)).problems
    assert len(problems) == 1 and problems[0].startswith("after the last block")
    for backend in ("hf", "bridge"):
        model = from_hf(changed(dtype, shift=0.5), make_tokenizer(), backend=backend)  # type: ignore[arg-type]
        with pytest.raises(ExportError, match=said):
            model.writers  # noqa: B018


@pytest.mark.parametrize(
    "model_type", ("llama", "gpt2", "gemma2", "opt", "mamba", "olmoe", "nanochat")
)
def test_nothing_is_found_where_nothing_is_added(model_type: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not measured_anatomy(build(model_type).to(dtype)).end_problem


def test_a_factor_on_the_whole_stream_is_no_addition() -> None:
    assert not measured_anatomy(changed(factor=0.5)).problems
