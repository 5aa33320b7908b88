"""Collecting activations of the residual stream at chosen sites and positions, in one streaming pass.

Knows: positions in prompts and responses, the cache on disk. Does not know: directions, or why anyone wants the activations.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache as cache_of_calls
from functools import reduce
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.activations.activations import (
    AFTER_INSTRUCTION,
    RESPONSE_MEAN,
    Activations,
    Moments,
    Position,
    check_finite,
    response_lengths,
    response_mean,
    stacked,
)
from interp_ablate.activations.token_activations import (
    PARTS,
    TokenActivations,
    TokenPositions,
    TokenSet,
    list_of,
)
from interp_ablate.activations.token_collection import collect_tokens
from interp_ablate.activations.token_rows import Token, after_prompts, answers_apart, flattened
from interp_ablate.activations.token_shards import Shards
from interp_ablate.errors import InterpAblateError
from interp_ablate.models.batches import Batch
from interp_ablate.models.model import Model, check_model
from interp_ablate.precision import all_finite
from interp_ablate.prompts.chat_template import suffix_length
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import PromptLike, text_of_prompt
from interp_ablate.sites import Site, SiteLike, as_sites, sites_of
from interp_ablate.storage.atomic_files import atomic_path
from interp_ablate.storage.incoming_files import check_file


@overload
def collect(  # type: ignore[overload-overlap]
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: SiteLike | Sequence[SiteLike] | None = ...,
    *,
    positions: TokenSet | Callable[[Token], bool] | list[list[bool]] | list[list[int]] | Tensor,
    responses: Sequence[str] | None = ...,
    batch_size: int | None = ...,
    cache: str | Path | Shards | None = ...,
    on_batch: Callable[[int], None] | None = ...,
) -> TokenActivations: ...


@overload
def collect(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: SiteLike | Sequence[SiteLike] | None = ...,
    positions: Position | Sequence[Position] = ...,
    *,
    responses: Sequence[str] | None = ...,
    batch_size: int | None = ...,
    cache: str | Path | None = ...,
    on_batch: Callable[[int], None] | None = ...,
) -> Activations: ...


def collect(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: SiteLike | Sequence[SiteLike] | None = None,
    positions: Position | Sequence[Position] | TokenPositions = (-1,),
    *,
    responses: Sequence[str] | None = None,
    batch_size: int | None = None,
    cache: str | Path | Shards | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Activations | TokenActivations:
    """Run the prompts once and keep activations of the sites at the positions; no logits are computed.

    Positions that every prompt has give `Activations`, one tensor. Those that differ from prompt to prompt give
    `TokenActivations`, a tensor a prompt.

    Args:
        sites: `Site`s or their names; default: resid_pre, resid_mid (not in parallel blocks) and resid_post of every layer.
        positions: for `Activations` one or several: offsets from the end of the prompt (-1 is its last token) or
            places from its start (0 is its first), "after_instruction" for all tokens of the chat template
            behind the user's text (as in Arditi et al. 2024, https://arxiv.org/abs/2406.11717), "response_mean".
            For `TokenActivations` one of these: "all"; "prompt" (with the template's tokens); "response"; a
            function that is true for a `Token`; for each prompt a list of bools (one a token) or of indices.
        responses: one text a prompt, appended to it; also the answers that chats end with. For "response_mean"
            and "response" the model's own greedy response of 32 tokens is used without them.
        cache: a folder; what was collected before for the same model, plan, prompts, sites and positions is read
            from it. Tokens are streamed there as safetensors shards (`Shards` sets dtype and size): memory holds
            one shard at a time, and a call that was killed goes on where it was. Under hooks of your own nothing
            is read again.
        on_batch: called with the number of prompts done in each batch.

    Raises:
        ModelError: unknown layers or sites; NaN or infinity in activations, naming where.
        InterpAblateError: positions that do not exist in the prompts; a corrupt cache file; tokens' activations
            that do not fit into memory.
    """
    check_model(model)
    if differ_by_prompt(positions):
        tokens: Any = positions
        options: dict[str, Any] = {"responses": responses, "batch_size": batch_size}
        places = _checked_sites(model, sites)
        return collect_tokens(
            model, prompts, places, tokens, cache=cache, on_batch=on_batch, **options
        )
    if isinstance(cache, Shards):
        raise InterpAblateError(
            "Shards are for positions that differ from prompt to prompt, such as 'all': give cache=FOLDER"
        )
    shared: Any = positions
    request, labels = _request(model, prompts, sites, shared, responses)
    keeps = cache and not model.plans.has_unknown_edits
    path = request.cache_file(cache, model) if cache and keeps else None
    if path is not None and path.exists():
        return replace(_read_cache(path, request, labels), **_texts(model, request))
    values, moments = _collected(model, request, batch_size, on_batch)
    texts = _texts(model, request)
    activations = Activations(values, request.sites, request.positions, labels, moments, **texts)
    if path is not None:
        _write_cache(path, values, moments)
    return activations


def _collected(
    model: Model,
    request: _Request,
    batch_size: int | None,
    on_batch: Callable[[int], None] | None,
) -> tuple[Float[Tensor, "prompt position site d_model"], Moments]:
    """The values of every prompt, and their moments."""
    values = torch.empty(0)
    moments: list[Moments] = []
    for batch, block in _blocks(model, request, batch_size):
        if not len(values):
            values = torch.empty(len(request.rows), *block.shape[1:], dtype=block.dtype)
        values[list(batch.index)] = block
        moments.append(Moments.of(block))
        if on_batch:
            on_batch(len(batch.index))
    return values, reduce(Moments.merge, moments)


def _texts(model: Model, request: _Request) -> dict[str, Any]:
    """The prompts' texts, and those of the tokens that are read."""
    offsets = [None if name == RESPONSE_MEAN else int(name) for name in request.positions]
    tokenizer = model.tokenizer

    @cache_of_calls
    def text(token: int) -> str:
        return f"[{token}]" if tokenizer is None else tokenizer.decode([token])

    tokens = tuple(
        tuple(
            "" if offset is None else text(row[offset if offset >= 0 else length + offset])
            for offset in offsets
        )
        for row, length in zip(request.rows, request.response_starts)
    )
    return {"prompts": request.prompts, "tokens": tokens}


def collect_moments(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: SiteLike | Sequence[SiteLike] | None = None,
    positions: Position | Sequence[Position] = (-1,),
    *,
    responses: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> Moments:
    """The moments of `collect` alone (float64), which need no memory for the values of every prompt."""
    check_model(model)
    if differ_by_prompt(positions):
        raise InterpAblateError(
            f"moments are of positions that every prompt has, such as -1; got {positions!r:.60}"
        )
    request, _ = _request(model, prompts, sites, positions, responses)
    blocks = _blocks(model, request, batch_size)
    return reduce(Moments.merge, (Moments.of(block) for _, block in blocks))


@dataclass(frozen=True)
class _Request:
    """The activations that are wanted."""

    rows: list[list[int]]
    prompt_lengths: list[int]
    response_starts: list[int]
    """Behind a thought of the model, which is no part of the prompt."""
    sites: tuple[Site, ...]
    positions: tuple[str, ...]
    prompts: tuple[str, ...]

    def cache_file(self, folder: str | Path, model: Model) -> Path:
        """The file that holds these activations; its name is a hash of what they depend on."""
        about = {name: value for name, value in vars(self).items() if name != "prompts"}
        about |= {"model": model.fingerprint, "sites": list(map(str, self.sites))}
        key = json.dumps(about, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        return Path(folder) / f"activations-{digest}.safetensors"


def _request(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: SiteLike | Sequence[SiteLike] | None,
    positions: Position | Sequence[Position],
    responses: Sequence[str] | None,
) -> tuple[_Request, Bool[Tensor, " prompt"] | None]:
    """The checked request, and True for the positive prompts of a contrast set."""
    chosen = _checked_sites(model, sites)
    flat, labels = flattened(prompts)
    if RESPONSE_MEAN in list_of(positions):
        flat, responses = answers_apart(flat, responses)
    texts = tuple(map(text_of_prompt, flat))
    rows = model.encode_all(flat)
    names = _check_positions(model, positions, rows)
    lengths = [len(row) for row in rows]
    starts = lengths
    if RESPONSE_MEAN in names:
        leads, ends = after_prompts(model, flat, rows, responses)
        if empty := [i for i, end in enumerate(ends) if not end]:
            raise InterpAblateError(
                f"response_mean needs responses, but those of prompts {empty[:5]} are empty"
            )
        if any(leads) and len(names) > 1:
            raise InterpAblateError(
                "response_mean is read after a thought here, and other positions at the prompt's end: collect "
                "them apart, or close the thought (ChatFormat)"
            )
        starts = [len(row) + len(lead) for row, lead in zip(rows, leads)]
        rows = [[*row, *lead, *end] for row, lead, end in zip(rows, leads, ends)]
    return _Request(rows, lengths, starts, chosen, names, texts), labels


def _checked_sites(model: Model, sites: SiteLike | Sequence[SiteLike] | None) -> tuple[Site, ...]:
    """The sites asked for, all of which the model has; default: its residual points of every layer."""
    if sites is None:
        sites = sites_of(model.residual_points, range(model.n_layers))
    chosen = as_sites(sites)
    for site in chosen:
        model.hook_point(site)
    return chosen


def differ_by_prompt(positions: Any) -> bool:
    """True for positions that are other tokens, or another number of them, in each prompt.

    Raises:
        InterpAblateError: such a name in a list.
    """
    if isinstance(positions, str) or callable(positions):
        return callable(positions) or positions in PARTS
    each = list_of(positions)
    if named := [name for name in each if isinstance(name, str) and name in PARTS]:
        raise InterpAblateError(
            f"{named[0]!r} keeps as many tokens as a prompt has, and is no position beside others: give "
            f"positions={named[0]!r} alone to `collect`; a run takes positions that every prompt has, such as -1"
        )
    return any(isinstance(one, (list, tuple, np.ndarray, Tensor)) for one in each)


def _check_positions(
    model: Model, positions: Position | Sequence[Position], rows: list[list[int]]
) -> tuple[str, ...]:
    if not (each := list_of(positions)):
        raise InterpAblateError("no positions: give offsets such as -1, or 'response_mean'")
    reach = min(map(len, rows))
    names: list[str] = []
    for position in each:
        text = str(position)
        if text == AFTER_INSTRUCTION:
            names += [str(-i) for i in range(1, min(_suffix_length(model), reach) + 1)]
            continue
        is_offset = re.fullmatch(r"0|-?[1-9][0-9]*", text) and -reach <= int(text) < reach
        if text != RESPONSE_MEAN and not is_offset:
            raise InterpAblateError(
                f"unknown position {position!r}: accepted are -1 (the last token of the prompt) to -{reach} and 0 "
                f"(its first) to {reach - 1}, which every prompt has; '{AFTER_INSTRUCTION}', here -1 to "
                f"-{min(_suffix_length(model), reach)}; '{RESPONSE_MEAN}'; and alone {', '.join(map(repr, PARTS))}"
            )
        names.append(text)
    if len(set(names)) != len(names):
        raise InterpAblateError(f"a position is named twice: {names}")
    return tuple(names)


def _suffix_length(model: Model) -> int:
    """The number of the template's tokens behind the user's text."""
    tokenizer = model.tokenizer
    return 1 if tokenizer is None else suffix_length(tokenizer, template=model.chat_format)


def _reader(positions: tuple[str, ...], starts: Sequence[int]) -> Callable[[Tensor, Batch], Tensor]:
    """A function that keeps the wanted positions of a site's activations: [batch, position, d_model]."""
    offsets = [int(name) for name in positions if name != RESPONSE_MEAN]

    def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        # Rows end at the last column; a response, if there is one, with them.
        response = response_lengths(batch, starts)
        wanted = torch.tensor(offsets, dtype=torch.long, device=x.device)
        from_start = (wanted >= 0)[None]
        ends = torch.where(from_start, batch.row_lengths[:, None], response[:, None])
        columns = x.shape[1] - ends + wanted
        at_offsets = iter(x.gather(1, columns[..., None].expand(-1, -1, x.shape[2])).unbind(1))
        return torch.stack(
            [
                response_mean(x, response).to(x) if name == RESPONSE_MEAN else next(at_offsets)
                for name in positions
            ],
            1,
        )

    return read


def _blocks(
    model: Model, request: _Request, batch_size: int | None
) -> Iterator[tuple[Batch, Float[Tensor, "batch position site d_model"]]]:
    """Activations batch by batch, on the CPU."""
    offsets = [int(name) for name in request.positions if name != RESPONSE_MEAN]
    back = max((-offset for offset in offsets if offset < 0), default=0)
    first = min((offset for offset in offsets if offset >= 0), default=None)
    tails = [
        max(len(row) - length + back, 0 if first is None else len(row) - first)
        for row, length in zip(request.rows, request.response_starts)
    ]
    stream = model.stream(
        request.rows,
        keep=0,
        prompt_lengths=request.prompt_lengths,
        capture=dict.fromkeys(request.sites, _reader(request.positions, request.response_starts)),
        batch_size=batch_size,
        tail=max(tails),
    )
    for batch, _, captured in stream:
        block = stacked(captured, request.sites, 2)
        if not all_finite(block):
            row, position, site, _ = (~block.isfinite()).nonzero()[0].tolist()
            place = f"{request.sites[site]}[{request.positions[position]}]"
            check_finite(block, f" at {place}, first for prompt {batch.index[row]}")
        yield batch, block


def _write_cache(path: Path, values: Tensor, moments: Moments) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {"values": values, "mean": moments.mean, "squares": moments.squares}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"count": str(moments.count)})
    except (SafetensorError, OSError) as error:  # a full disk is a SafetensorError
        raise InterpAblateError(
            f"cannot write the activation cache {path}: {error}. Choose another folder, or none"
        ) from error


def _read_cache(path: Path, request: _Request, labels: Tensor | None) -> Activations:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(path, InterpAblateError)
    try:
        tensors = load_file(path)
        values, mean, squares = (tensors[name] for name in ("values", "mean", "squares"))
        expected = (len(request.rows), len(request.positions), len(request.sites))
        if values.shape[:3] != expected or not values.shape[1:] == mean.shape == squares.shape:
            raise KeyError(f"shape {tuple(values.shape)}")
        if not all(t.is_floating_point() and all_finite(t) for t in (values, mean, squares)):
            raise KeyError("NaN, infinity or whole numbers among its values")
        moments = Moments(len(values), mean, squares)
    except (SafetensorError, KeyError, OSError) as error:
        raise InterpAblateError(
            f"corrupt activation cache {path}: {error}. Delete this file and run again"
        ) from error
    return Activations(values, request.sites, request.positions, labels, moments)
