"""Writers that nobody declares, planted in models that TransformerLens takes: refused by name, certified by nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BACKENDS, D_MODEL, DECLARED, N_LAYERS, make, rows_of, tiny, unit
from torch import Tensor, nn

from interp_ablate import Ablate, Plan, export_checkpoint, sites_of
from interp_ablate.errors import ExportError
from interp_ablate.export.lora import export_lora
from interp_ablate.models.backends.bridge import BridgeBackend
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model

TYPES = (torch.float32, torch.bfloat16)


def branch(seed: int = 5) -> nn.Linear:
    """Something small that writes to the stream: 2% or so of what a block adds."""
    extra = nn.Linear(D_MODEL, D_MODEL, bias=False)
    generator = torch.Generator().manual_seed(seed)
    extra.weight.data = 0.02 * torch.randn(D_MODEL, D_MODEL, generator=generator)
    return extra.requires_grad_(False)


def class_with(kind: type, forward: Callable[..., Any]) -> type:
    """A subclass, under the name that TransformerLens knows, whose forward is another."""
    return type(kind.__name__, (kind,), {"forward": forward})


def beside_the_block(hf: Any) -> str:
    """The second block adds one more branch."""
    block = hf.model.layers[1]
    block.extra = branch().to(hf.dtype)
    kind = type(block)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return kind.forward(self, hidden_states, **kwargs) + self.extra(hidden_states)

    block.__class__ = class_with(kind, forward)
    return r"blocks\.1"


def inside_the_mlp(hf: Any) -> str:
    """The second MLP adds one more branch: its site holds it, and down_proj does not write it."""
    mlp = hf.model.layers[1].mlp
    mlp.extra = branch().to(hf.dtype)
    kind = type(mlp)

    def forward(self: Any, x: Tensor) -> Tensor:
        return kind.forward(self, x) + self.extra(x)

    mlp.__class__ = class_with(kind, forward)
    return r"blocks\.1\.hook_mlp_out model\.layers\.1\.mlp\.down_proj.*model\.layers\.1\.mlp\.extra"


def a_multiplier(hf: Any) -> str:
    """A factor of what the second block's MLP adds, as a config of another family sets it."""
    block = hf.model.layers[1]
    kind = type(block)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        x = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        residual = residual + x
        return residual + 0.5 * self.mlp(self.post_attention_layernorm(residual))

    block.__class__ = class_with(kind, forward)
    return r"blocks\.1"


def no_module_at_all(hf: Any) -> str:
    """The third block rolls some of the stream: no weight writes that."""
    block = hf.model.layers[2]
    kind = type(block)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out = kind.forward(self, hidden_states, **kwargs)
        return out + 0.02 * hidden_states.roll(1, -1)

    block.__class__ = class_with(kind, forward)
    return r"blocks\.2: what the block adds"


def a_hook_of_somebody(hf: Any) -> str:
    hf.model.layers[2].register_forward_hook(lambda module, args, x: x + 0.02 * x.roll(1, -1))
    return r"blocks\.2"


def before_the_blocks(hf: Any) -> str:
    """The embedding adds a constant that no row of it holds."""
    embed = hf.model.embed_tokens
    kind = type(embed)
    constant = 0.02 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(6))

    def forward(self: Any, tokens: Tensor) -> Tensor:
        return kind.forward(self, tokens) + constant.to(self.weight)

    embed.__class__ = class_with(kind, forward)
    return r"model\.embed_tokens does more than scale the rows"


PLANTED = (
    beside_the_block, inside_the_mlp, a_multiplier, no_module_at_all, a_hook_of_somebody, before_the_blocks,
)  # fmt: skip


def planted(plant: Callable[[Any], str], dtype: torch.dtype, backend: str) -> tuple[Model, str]:
    hf, tokenizer = tiny()
    hf = hf.to(dtype)
    found = plant(hf)
    return from_hf(hf, tokenizer, backend=backend), found  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("plant", PLANTED)
def test_a_bridge_refuses_what_its_table_does_not_name(
    plant: Callable[[Any], str], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, found = planted(plant, dtype, "bridge")
    assert model.backend == "bridge"
    for _ in range(2):
        with pytest.raises(ExportError, match=found):
            Ablate(unit(), model.writers)
    plan = Plan((Ablate(unit(), DECLARED["llama_gqa"].writers),))  # who wrote them down by hand
    for export in (export_checkpoint, export_lora):
        with pytest.raises(ExportError, match=found):
            export(model, plan, tmp_path / "out", prompts=rows_of(9))
    assert not any(tmp_path.iterdir())
    with model.applied(plan):  # the hooks do run
        model.logits(rows_of(9))


@pytest.mark.parametrize("plant", PLANTED)
def test_auto_believes_no_table_either(plant: Callable[[Any], str]) -> None:
    """It takes plain transformers where sites do not add up, whose measured writers are exact or refused."""
    model, found = planted(plant, torch.float32, "auto")
    if plant in (beside_the_block, a_multiplier):
        assert model.backend == "hf"
        with model.applied(Ablate(unit(), model.writers)):
            ((_, _, held),) = model.stream(
                rows_of(9),
                keep=0,
                capture={f"{N_LAYERS - 1}.resid_post": lambda x, batch: x.clone()},
            )
        (x,) = held.values()
        assert float((x.double() @ unit()).norm()) < 1e-5 * float(x.norm())
    else:
        with pytest.raises(ExportError, match=found.split("hook_mlp")[0]):
            Ablate(unit(), model.writers)


@pytest.mark.skipif(
    "hooked" not in BACKENDS, reason="this TransformerLens has no HookedTransformer"
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("inside", (False, True), ids=("beside the block", "inside the MLP"))
def test_a_hooked_transformer_refuses_what_its_sites_do_not_name(
    inside: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    hf, tokenizer = tiny()
    model = from_hf(hf.to(dtype), tokenizer, backend="hooked")
    assert model.writers  # and again, once it is another module
    owner = model.tl.blocks[1].mlp if inside else model.tl.blocks[1]
    owner.extra, kind = branch().to(dtype), type(owner)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return kind.forward(self, x, *args, **kwargs) + self.extra(x)

    owner.__class__ = class_with(kind, forward)
    found = r"blocks\.1\.(mlp\.)?extra\.weight writes too"
    with pytest.raises(ExportError, match=found):
        Ablate(unit(), model.writers)
    plan = Plan((Ablate(unit(), DECLARED["llama_gqa"].writers),))
    with pytest.raises(ExportError, match="extra"):
        export_checkpoint(model, plan, tmp_path / "out", prompts=rows_of(9))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", DECLARED)
@pytest.mark.parametrize("dtype", (*TYPES, torch.float16), ids=str)
def test_every_declared_architecture_is_proven_in_every_precision(
    kind: str, dtype: torch.dtype
) -> None:
    hf, tokenizer = tiny(kind)
    hf = hf.to(dtype)
    before = {name: p.clone() for name, p in hf.named_parameters()}
    model = from_hf(hf, tokenizer, backend="auto")
    assert model.backend == "bridge"
    with model.applied(Ablate(unit(), "1.resid_post")):  # what is applied is not measured
        assert list(model.writers) == DECLARED[kind].writers
        model.logits(rows_of(9))
    state = model.hf_state_dict()
    assert all(torch.equal(state[name], p) for name, p in before.items())


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    proof, measured = model._backend._proof, []  # type: ignore[attr-defined]
    fault = proof._measured
    monkeypatch.setattr(proof, "_measured", lambda: measured.append(1) or fault())
    for _ in range(3):
        assert model.writers == model.writers and model.architecture
    assert len(measured) == 1 and isinstance(model._backend, BridgeBackend)
    # on the Bridge's own module around a block
    model.tl.blocks[1].register_forward_hook(lambda module, args, out: 1.1 * out)
    with pytest.raises(ExportError, match=r"of blocks\.2\.hook_resid_pre is nothing that"):
        assert model.writers
    assert len(measured) == 2


@pytest.mark.parametrize("backend", ("auto", *BACKENDS))
def test_spoiled_weights_are_loaded_and_not_believed(backend: str) -> None:
    """Somebody may look at what is broken; what writes in it cannot be measured."""
    hf, tokenizer = tiny()
    hf.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    model = from_hf(hf, tokenizer, backend=backend)  # type: ignore[arg-type]
    assert model.backend == ("bridge" if backend == "auto" else backend)
    with pytest.raises(ExportError, match=r"\.1 returns NaN or infinity on fixed tokens"):
        assert model.writers


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_bridge_whose_biases_are_zeros_yet_is_not_refused(kind: str) -> None:
    hf, tokenizer = tiny(kind)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    model = from_hf(hf, tokenizer, backend="bridge")
    assert set(sites_of(("attn_out", "mlp_out"), range(N_LAYERS))) < set(model.writers)
