"""The parameters of a module that write its output, and the norm that it is, measured on one recorded call.

Knows: projections of parameters, gains of norms. Does not know: blocks, embeddings or plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.edits.affine import NormGain, norm_gain
from interp_ablate.models.architectures import Gain, Layout
from interp_ablate.models.module_calls import Recorded, stream_of, with_stream

# The share that may be left along a direction that every writer was projected against.
LEFT = 1e-4
# Two measurements of one gain agree within this.
GAIN_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Norm:
    """A norm between what is computed and the stream: gain * x / rms(x), and what it has besides."""

    path: str
    """The norm module's name in the model."""
    offset: float = 0.0
    """The gain is the norm's weight plus this: 0 or 1."""
    centred: bool = False
    """True if the mean over the channels is taken off first (LayerNorm)."""
    weighted: bool = True
    """False if it has no weight: its gain is 1."""
    biased: bool = False
    """True if it adds a bias after the gain."""

    @property
    def gain(self) -> Gain:
        """The gain, as weights are edited by it."""
        return Gain(f"{self.path}.weight" if self.weighted else None, self.offset, self.centred)


def gain_of(gains: Iterable[Gain], read: Callable[[str], Tensor], d_model: int) -> NormGain | None:
    """The gain of norms that stand one after another, the last one first, from their weights; None for no norm."""
    ones = torch.ones(d_model, dtype=torch.float64)
    return norm_gain(
        ((ones if name is None else read(name).detach().cpu().double()) + offset, centred)
        for name, offset, centred in gains
    )


def norm_of(module: nn.Module, call: Recorded, path: str) -> Norm | str | None:
    """None for a module that is no norm; for one, what it does, or why it cannot be written as a `Norm`."""
    parameters = dict(module.named_parameters())
    tensors = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)]
    x = tensors[0] if tensors else None
    if x is None or x.shape != call.output.shape or len(parameters) > 2:
        return None
    if any(p.ndim != 1 for p in parameters.values()):
        return None
    large = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) * 1e3
    bias = parameters.get("bias", torch.zeros(1).to(x))
    one, other = (module(factor * large) - bias for factor in (1, 2))
    if not float((one - other).norm()) <= GAIN_TOLERANCE * float(one.norm()):
        return None  # not free of scale: no norm
    for centred in (False, True):
        read = large - large.mean(-1, keepdim=True) if centred else large
        gains = one * read.pow(2).mean(-1, keepdim=True).sqrt() / read
        gain = gains.flatten(0, -2).median(0).values
        wide = read.abs() > 0.1 * read.pow(2).mean().sqrt()  # of the others rounding is seen
        if float(((gains - gain) * wide).abs().max()) <= GAIN_TOLERANCE * float(gain.abs().max()):
            break
    else:
        return "is a norm that does more than centre and scale what it reads"
    own = [name for name in parameters if name != "bias"]
    weight = parameters[own[0]] if own else torch.ones_like(gain)
    for offset in (0.0, 1.0):
        if torch.allclose(weight + offset, gain, rtol=GAIN_TOLERANCE, atol=GAIN_TOLERANCE):
            return Norm(path, offset, centred, bool(own), "bias" in parameters)
    return "is a norm whose gain is not its weight"


def find_writers(
    module: nn.Module, call: Recorded, guess: Mapping[str, Layout]
) -> tuple[dict[str, Layout], str]:
    """The parameters of a module that write its output, by a projection; and a problem, empty if they are all.

    A parameter writes if projecting a random direction out of one of its axes changes the output along
    that direction only. All of them together must leave nothing along it. `guess` is tried first: what
    was found in a module of the same kind.
    """
    d_model = call.output.shape[-1]
    r = torch.randn(d_model, generator=torch.Generator().manual_seed(2)).to(call.output)
    r = r / r.norm()
    scale = float((call.output @ r).norm())
    own = dict(module.named_parameters())

    def output_with(layouts: Mapping[str, Layout]) -> Tensor:
        changed = {name: projected(own[name], layout, r) for name, layout in layouts.items()}
        output = stream_of(torch.func.functional_call(module, changed, call.args, call.kwargs))
        assert output is not None
        return output.reshape(call.output.shape)

    def left(layouts: Mapping[str, Layout]) -> float:
        return float((output_with(layouts) @ r).norm()) / scale if layouts else 1.0

    if guess and left(guess) <= LEFT:
        return dict(guess), ""
    writers: dict[str, Layout] = {}
    for names in kinds(own).values():
        for layout in _layouts_of(own[names[0]], d_model):
            moved = output_with(dict.fromkeys(names, layout)) - call.output
            amount = moved @ r
            beside = moved - amount[..., None] * r
            if float(amount.norm()) > LEFT * scale and float(beside.norm()) < 1e-3 * float(
                amount.norm()
            ):
                writers |= dict.fromkeys(names, layout)
    if (share := left(writers)) > LEFT:
        known = ", ".join(writers) or "its parameters"
        return writers, f"{share:.1%} of what it writes comes from elsewhere than {known}"
    return writers, ""


def gated(module: nn.Module, call: Recorded) -> str:
    """What is said of a module that multiplies inner ones' outputs, channel by channel; empty for any other.

    A change of half of the channels of the inner output is then one of the same channels outside, by a factor that
    differs from token to token.
    """
    names = []
    for name, inner in module.named_modules():
        half: list[Tensor] = []

        def disturb(_: nn.Module, args: Any, output: Any, half: list[Tensor] = half) -> Any:
            x = stream_of(output)
            if x is None or x.numel() != call.output.numel():
                return None
            half.append(torch.zeros_like(x))
            half[0][..., ::2] = 1.0
            return with_stream(output, x + half[0])

        handle = inner.register_forward_hook(disturb)
        try:
            moved = stream_of(module(*call.args, **call.kwargs))
        finally:
            handle.remove()
        if not name or len(half) != 1 or moved is None:
            continue
        factor = (moved - call.output).flatten(0, -2)
        even, odd = factor[:, ::2], factor[:, 1::2]
        if float(odd.abs().max()) > LEFT * float(even.abs().max()):
            continue
        if float(even.std(0).max()) > 1e-3 * float(even.abs().max()):
            names.append(name)
    if not names:
        return ""
    return (
        f"it multiplies what {' and '.join(names)} give channel by channel, at every token by other numbers, which turns "
        "every direction into another: no edit of a weight leaves nothing along it"
    )


# The axis of each layout that is d_model.
AXIS: dict[Layout, int] = {
    "linear": 0, "conv1d": 1, "bias": 0, "experts": 1, "experts_conv1d": 2,
}  # fmt: skip


def _layouts_of(parameter: Tensor, d_model: int) -> list[Layout]:
    """The layouts that a parameter may have, by which of its axes are as long as d_model."""
    layouts: dict[int, tuple[Layout, ...]] = {
        1: ("bias",), 2: ("linear", "conv1d"), 3: ("experts", "experts_conv1d"),
    }  # fmt: skip
    may = layouts.get(parameter.ndim, ())
    return [layout for layout in may if parameter.shape[AXIS[layout]] == d_model]


def projected(parameter: Tensor, layout: Layout, r: Float[Tensor, " d_model"]) -> Tensor:
    """A writing parameter with nothing along a unit vector."""
    moved = parameter.detach().movedim(AXIS[layout], -1)
    return (moved - (moved @ r.to(moved))[..., None] * r.to(moved)).movedim(-1, AXIS[layout])


def kinds(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Parameters whose names differ in numbers only (one an expert), and which have one shape."""
    kinds: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        words = ["#" if word.isdigit() else word for word in name.split(".")]
        kinds.setdefault(f"{'.'.join(words)} {tuple(parameter.shape)}", []).append(name)
    return kinds
