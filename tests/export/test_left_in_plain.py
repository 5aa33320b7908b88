"""The certificate's own look at the stream: blocks of plain transformers, whatever the hooks believe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.family_models import build
from support.tiny import make_tokenizer

from interp_ablate import Plan
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.errors import ExportError
from interp_ablate.export.certification import LEFT, removed_vectors
from interp_ablate.export.checkpoint import export_checkpoint
from interp_ablate.models.backends.hf import HFBackend, measured_anatomy
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.models.sources import ModelSource

ROWS = [[*range(5, 14), 20], [*range(5, 14), 99, 98, 97], [3, 4, 5]]


def believing_less(model_type: str, writer: str) -> Model:
    """A model that does not know of one branch that writes, as the declared tables of 4297ea7 did not."""
    hf = build(model_type)
    anatomy = measured_anatomy(hf)
    blocks = tuple(
        replace(
            block,
            attn=tuple(b for b in block.attn if not b.path.endswith(writer)),
            mlp=tuple(b for b in block.mlp if not b.path.endswith(writer)),
        )
        for block in anatomy.blocks
    )
    assert blocks != anatomy.blocks
    backend = HFBackend(hf, replace(anatomy, blocks=blocks))
    return Model(backend, make_tokenizer(), ModelSource(model_type, "object"))


@pytest.mark.parametrize(
    ("model_type", "writer"), [("falcon_h1", "mamba"), ("granitemoeshared", "shared_mlp")]
)
def test_a_writer_that_nobody_knew_of_fails_the_certificate(
    model_type: str, writer: str, tmp_path: Path
) -> None:
    """Hooks and weights leave the same writer out, so that they agree: on 4297ea7 falcon_h1 kept 3.5% of the
    stream along the direction, and was certified."""
    model = believing_less(model_type, writer)
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ExportError, match=LEFT):
        export_checkpoint(model, Plan((Ablate(r, model.writers),)), tmp_path / "out", prompts=ROWS)
    assert not (tmp_path / "out").exists()


def test_what_is_left_is_measured_where_a_plan_says_that_nothing_is() -> None:
    model = from_hf(build("llama"), make_tokenizer(), backend="hf")
    r, w = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(0))
    said = removed_vectors(Plan((Ablate(r, model.writers),)), model)
    torch.testing.assert_close(said[0], (r / r.norm()).double())
    read = removed_vectors(Plan((Erase(r, w, model.writers),)), model)
    torch.testing.assert_close(read[0].abs(), (w / w.norm()).double().abs())
    for edit in (
        Ablate(r, model.writers[1:]),
        Ablate(r, model.writers, strength=0.5),
        Erase(r, w, model.writers, value=[1.0, *[0.0] * (len(model.writers) - 1)]),
    ):
        assert not len(removed_vectors(Plan((edit,)), model))
