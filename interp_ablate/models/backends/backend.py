"""What a backend must offer: sites, hooks, caches, logits.

Knows: the protocol. Does not know: any TransformerLens class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp_ablate.edits.edit import Positions
from interp_ablate.sites import Site


class Backend(Protocol):
    """What `Model` needs of a TransformerLens object; one small class for each of the two."""

    tl: Any

    def hook_point(self, site: Site) -> nn.Module | None: ...

    @property
    def unembed_input(self) -> nn.Module: ...

    def gain(self, site: Site) -> Float[Tensor, " d_model"] | None: ...

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None: ...

    def new_cache(self, batch: int) -> Any: ...

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any: ...

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any: ...

    def forward(self, step: ForwardCall, keep: int) -> Tensor | None: ...

    @property
    def starts_late(self) -> bool: ...

    def first_block(self, site: Site) -> int: ...

    def is_hooked_below(self, block: int) -> bool: ...

    def hf_state_dict(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class ResumePoint:
    """Where a forward call starts: what enters a block, at every new token. Blocks below are not run.

    `block` is the number of layers where it is what left the last one.
    """

    block: int
    entering: Float[Tensor, "batch new d_model"]


@dataclass
class ForwardCall:
    """One forward call: new tokens, the mask of all tokens so far, positions of the new ones."""

    tokens: Int[Tensor, "batch new"]
    mask: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch new"]
    prompt_lengths: Int[Tensor, " batch"]
    cache: Any = None
    plans: Int[Tensor, " batch"] | None = None  # of each row, where rows are under different ones
    start: ResumePoint | None = None  # None: at the embedding

    @cached_property
    def generated(self) -> Bool[Tensor, "batch new"]:
        """Which of the new tokens come after the prompt, counted from the start of the sequence."""
        return self.positions >= self.prompt_lengths[:, None]

    @cached_property
    def coverage(self) -> dict[Positions, tuple[bool, bool]]:
        """For each kind of positions: (does it hold any real new token, does it hold all of them)."""
        real = self.mask[:, -self.tokens.shape[1] :].bool()
        late = self.generated & real
        any_late, all_late = bool(late.any()), bool((self.generated | ~real).all())
        early = (~self.generated & real).any()
        return {
            "all": (True, True),
            "generated": (any_late, all_late),
            "prompt": (bool(early), not any_late),
        }
