"""Collecting the activations of every token, or of chosen ones, in one pass: into memory, or shard by shard to disk.

Knows: which columns of a padded batch are which tokens, what fits into memory, what a killed pass had finished. Does not
know: positions that all prompts share (`collection`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.activations.activations import check_captured, check_finite
from interp_ablate.activations.token_activations import (
    INDEX,
    TokenActivations,
    TokenPositions,
    chosen_tokens,
)
from interp_ablate.activations.token_rows import (
    Token,
    after_prompts,
    answers_apart,
    flattened,
    tokens_of,
)
from interp_ablate.activations.token_shards import Shards, ShardWriter, TokenBlock, read_shards
from interp_ablate.errors import InterpAblateError
from interp_ablate.models.batches import Batch
from interp_ablate.models.model import Model
from interp_ablate.models.sources import free_memory
from interp_ablate.precision import all_finite
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import PromptLike, text_of_prompt
from interp_ablate.sites import Site
from interp_ablate.storage.strict_json import json_text

_OF_FREE_MEMORY = 0.75  # that activations may take


@dataclass(frozen=True)
class _Wanted:
    """The tokens that are wanted, and the rows that they are read in."""

    tokens: list[tuple[Token, ...]]
    prompt_lengths: list[int]
    places: list[list[int]]
    sites: tuple[Site, ...]
    labels: Bool[Tensor, " prompt"] | None
    prompts: tuple[str, ...]
    dtype: torch.dtype | None
    """Of the values that are kept; None: as the model has them."""

    @property
    def rows(self) -> list[list[int]]:
        return [[token.id for token in row] for row in self.tokens]

    def activations(self, blocks: Sequence[TokenBlock]) -> TokenActivations:
        kept = tuple(tuple(row[i] for i in p) for row, p in zip(self.tokens, self.places))
        indices = tuple(map(tuple, self.places))
        return TokenActivations(self.sites, kept, indices, tuple(blocks), self.labels, self.prompts)

    def request(self, model: Model) -> str:
        """A hash of all that the values depend on."""
        about = [
            model.fingerprint,
            self.rows,
            self.prompt_lengths,
            self.places,
            list(map(str, self.sites)),
            str(self.dtype),
            None if self.labels is None else self.labels.tolist(),
        ]
        return hashlib.sha256(json_text(about).encode()).hexdigest()[:32]


def collect_tokens(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: tuple[Site, ...],
    positions: TokenPositions,
    *,
    responses: Sequence[str] | None = None,
    batch_size: int | None = None,
    cache: str | Path | Shards | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> TokenActivations:
    """`collect` for positions that differ from prompt to prompt; its arguments are explained there.

    Raises:
        ModelError: NaN or infinity in activations, naming where.
        InterpAblateError: no token is chosen; activations that do not fit into memory; a damaged shard.
    """
    shards = Shards(cache) if isinstance(cache, (str, Path)) else cache
    wanted = _wanted(model, prompts, sites, positions, responses, shards)
    if shards is None:
        return _in_memory(model, wanted, batch_size, on_batch)
    request = wanted.request(model)
    folder = Path(shards.folder) / f"tokens-{request}"
    if (folder / INDEX).exists():
        return wanted.activations(_blocks_in(folder, request, wanted, strict=True))
    # rows under plans of their own are run together: none of them is left out
    resumed = model.plans.plan_of_rows(len(wanted.tokens)) is None
    done = _blocks_in(folder, request, wanted, strict=False) if resumed else ()
    finished = {prompt for block in done for prompt in block.prompts}
    left = [i for i in range(len(wanted.tokens)) if i not in finished]
    writer = ShardWriter(folder, request, shards.max_bytes)
    if on_batch and finished:
        on_batch(len(finished))
    _run(model, wanted, left, writer.add, batch_size, on_batch)
    writer.flush()
    activations = wanted.activations(_blocks_in(folder, request, wanted, strict=True))
    activations.write_index(folder, request)
    return activations


def _wanted(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: tuple[Site, ...],
    positions: TokenPositions,
    responses: Sequence[str] | None,
    shards: Shards | None,
) -> _Wanted:
    flat, labels = flattened(prompts)
    flat, responses = answers_apart(flat, responses)
    texts = tuple(map(text_of_prompt, flat))
    starts = model.encode_all(flat)
    leads: list[list[int]] = [[] for _ in starts]
    ends: list[list[int]] = [[] for _ in starts]
    if responses is not None or positions == "response":
        leads, ends = after_prompts(model, flat, starts, responses)
    tokens = [tokens_of(model, *each) for each in zip(flat, starts, leads, ends)]
    places = chosen_tokens(tokens, positions)
    if not any(places):
        raise InterpAblateError(
            f"none of {sum(map(len, tokens))} tokens is chosen by positions={positions!r:.60}: choose others"
        )
    lengths = list(map(len, starts))
    dtype = getattr(torch, shards.dtype) if shards and shards.dtype else None
    return _Wanted(tokens, lengths, places, sites, labels, texts, dtype)


def _blocks_in(
    folder: Path, request: str, wanted: _Wanted, *, strict: bool
) -> tuple[TokenBlock, ...]:
    lengths = list(map(len, wanted.places))
    return read_shards(folder, request, wanted.sites, lengths, strict=strict)


def _in_memory(
    model: Model,
    wanted: _Wanted,
    batch_size: int | None,
    on_batch: Callable[[int], None] | None,
) -> TokenActivations:
    """All values in one tensor a site.

    Raises:
        InterpAblateError: they do not fit into the free memory.
    """
    starts = [0, *accumulate(map(len, wanted.places))]
    itemsize = max(model.dtype.itemsize, 2)  # packed weights have smaller items than the stream
    needed = starts[-1] * len(wanted.sites) * model.d_model * itemsize
    free = free_memory(torch.device("cpu"))
    if needed > _OF_FREE_MEMORY * free:
        raise InterpAblateError(
            f"{starts[-1]} tokens at {len(wanted.sites)} sites take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of "
            "memory are free: give cache=FOLDER, which streams them to disk, or fewer sites or positions"
        )
    values: dict[Site, Tensor] = {}

    def keep(prompt: int, parts: Mapping[Site, Tensor]) -> None:
        for site, part in parts.items():
            if site not in values:
                values[site] = part.new_empty(starts[-1], part.shape[1])
            values[site][starts[prompt] : starts[prompt + 1]] = part

    everyone = list(range(len(wanted.tokens)))
    _run(model, wanted, everyone, keep, batch_size, on_batch)
    return wanted.activations([TokenBlock(tuple(everyone), values)])


def _run(
    model: Model,
    wanted: _Wanted,
    prompts: Sequence[int],
    keep: Callable[[int, Mapping[Site, Tensor]], None],
    batch_size: int | None,
    on_batch: Callable[[int], None] | None,
) -> None:
    """Run these prompts, and hand each one's activations [token, d_model] at every site to `keep`, on the CPU."""
    if not prompts:
        return
    every = wanted.rows
    rows, places = [every[i] for i in prompts], [wanted.places[i] for i in prompts]
    stream = model.stream(
        rows,
        keep=0,
        prompt_lengths=[wanted.prompt_lengths[i] for i in prompts],
        capture=dict.fromkeys(wanted.sites, _reader(places, wanted.dtype)),
        batch_size=batch_size,
        tail=max(len(row) - min(at, default=len(row) - 1) for row, at in zip(rows, places)),
    )
    for batch, _, captured in stream:
        check_captured(captured, wanted.sites)
        lengths = [len(places[i]) for i in batch.index]
        parts = []
        for site in wanted.sites:
            parts.append(captured.pop(site).cpu().split(lengths))
            for i, part in zip(batch.index, parts[-1]):
                _check_finite(part, site, prompts[i], places[i])
        for i, values in zip(batch.index, zip(*parts)):
            keep(prompts[i], dict(zip(wanted.sites, values)))
        if on_batch:
            on_batch(len(batch.index))


def _check_finite(part: Tensor, site: Site, prompt: int, places: Sequence[int]) -> None:
    if not all_finite(part):
        first = int((~part.isfinite()).any(-1).nonzero()[0])
        check_finite(part, f" at {site}, first for prompt {prompt}, token {places[first]}")


def _reader(
    places: Sequence[Sequence[int]], dtype: torch.dtype | None
) -> Callable[[Tensor, Batch], Float[Tensor, "token d_model"]]:
    """A function that keeps the wanted tokens of a batch, one row's after another's; never padding."""

    def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        # rows end at the last column
        first = (x.shape[1] - batch.row_lengths).tolist()
        chosen = [(r, first[r] + p) for r, i in enumerate(batch.index) for p in places[i]]
        index = torch.tensor(chosen, dtype=torch.long, device=x.device).reshape(-1, 2)
        return x[index[:, 0], index[:, 1]].to(dtype or x.dtype)

    return read
