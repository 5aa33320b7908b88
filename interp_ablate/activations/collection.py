"""Collecting activations of the residual stream at chosen sites and positions, in one streaming pass.

Knows: positions in prompts and responses, the cache on disk. Does not know: directions, or why anyone wants the activations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache as cache_of_calls
from functools import reduce
from pathlib import Path
from typing import Any

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
    response_mean,
    stacked,
)
from interp_ablate.errors import InterpAblateError
from interp_ablate.models.batches import Batch
from interp_ablate.models.model import Model
from interp_ablate.prompts.chat_template import suffix_length
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import PromptLike, as_prompts, text_of_prompt
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.sites import Site, SiteLike, as_sites, sites_of
from interp_ablate.storage.atomic_files import atomic_path


def collect(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    sites: SiteLike | Sequence[SiteLike] | None = None,
    positions: Position | Sequence[Position] = (-1,),
    *,
    responses: Sequence[str] | None = None,
    batch_size: int | None = None,
    cache: str | Path | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Activations:
    """Run the prompts once and keep activations of the sites at the positions; no logits are computed.

    Args:
        sites: `Site`s or their names; default: resid_pre, resid_mid (not in parallel blocks) and resid_post of every layer.
        positions: offsets from the end of the prompt (-1 is its last token; offsets reach back over
            the tokens that follow the instruction in the chat template), "after_instruction" for all
            of these (as in Arditi et al. 2024, https://arxiv.org/abs/2406.11717), and "response_mean".
        responses: one text a prompt, appended to it, for "response_mean"; without them the model's own
            greedy response of 32 tokens is used.
        cache: a folder; what was collected before for the same model, plan, prompts, sites and
            positions is read from it. Under hooks of your own nothing is read or kept.
        on_batch: called with the number of prompts done in each batch.

    Raises:
        ModelError: unknown layers or sites; NaN or infinity in activations, naming where.
        InterpAblateError: positions that do not exist in the prompts; a corrupt cache file.
    """
    request, labels = _request(model, prompts, sites, positions, responses)
    keeps = cache and not model.plans.has_unknown_edits
    path = request.cache_file(cache, model) if cache and keeps else None
    if path is not None and path.exists():
        return replace(_read_cache(path, request, labels), **_texts(model, prompts, request))
    values = torch.empty(0)
    moments: list[Moments] = []
    for batch, block in _blocks(model, request, batch_size):
        if not len(values):
            values = torch.empty(len(request.rows), *block.shape[1:], dtype=block.dtype)
        values[list(batch.index)] = block
        moments.append(Moments.of(block))
        if on_batch:
            on_batch(len(batch.index))
    merged = reduce(Moments.merge, moments)
    texts = _texts(model, prompts, request)
    activations = Activations(values, request.sites, request.positions, labels, merged, **texts)
    if path is not None:
        _write_cache(path, values, merged)
    return activations


def _texts(
    model: Model, prompts: ContrastSet | PromptLike | Sequence[PromptLike], request: _Request
) -> dict[str, Any]:
    """The prompts' texts, and those of the tokens that are read."""
    offsets = [None if name == RESPONSE_MEAN else int(name) for name in request.positions]
    tokenizer = model.tokenizer

    @cache_of_calls
    def text(token: int) -> str:
        return f"[{token}]" if tokenizer is None else tokenizer.decode([token])

    tokens = tuple(
        tuple("" if offset is None else text(row[length + offset]) for offset in offsets)
        for row, length in zip(request.rows, request.prompt_lengths)
    )
    return {"prompts": tuple(map(text_of_prompt, _flatten(prompts)[0])), "tokens": tokens}


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
    request, _ = _request(model, prompts, sites, positions, responses)
    blocks = _blocks(model, request, batch_size)
    return reduce(Moments.merge, (Moments.of(block) for _, block in blocks))


@dataclass(frozen=True)
class _Request:
    """The activations that are wanted."""

    rows: list[list[int]]
    prompt_lengths: list[int]
    sites: tuple[Site, ...]
    positions: tuple[str, ...]

    def cache_file(self, folder: str | Path, model: Model) -> Path:
        """The file that holds these activations; its name is a hash of what they depend on."""
        key = json.dumps(
            {
                "model": model.fingerprint,
                "rows": self.rows,
                "prompt_lengths": self.prompt_lengths,
                "sites": [str(site) for site in self.sites],
                "positions": self.positions,
            }
        )
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
    if sites is None:
        sites = sites_of(model.residual_points, range(model.n_layers))
    chosen = as_sites(sites)
    for site in chosen:
        model.hook_point(site)
    flat, labels = _flatten(prompts)
    rows = model.encode_all(flat)
    names = _check_positions(model, positions, rows)
    lengths = [len(row) for row in rows]
    if RESPONSE_MEAN in names:
        leads, ends = _responses(model, flat, rows, responses)
        if any(leads) and len(names) > 1:
            raise InterpAblateError(
                "response_mean is read after a thought here, and other positions at the prompt's end: collect "
                "them apart, or close the thought (ChatFormat)"
            )
        lengths = [len(row) + len(lead) for row, lead in zip(rows, leads)]
        rows = [[*row, *lead, *end] for row, lead, end in zip(rows, leads, ends)]
    return _Request(rows, lengths, chosen, names), labels


def _flatten(
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
) -> tuple[list[PromptLike], Bool[Tensor, " prompt"] | None]:
    if isinstance(prompts, ContrastSet):
        both: list[PromptLike] = [*prompts.positive, *prompts.negative]
        return both, torch.arange(len(both)) < len(prompts.positive)
    return as_prompts(prompts), None


def _check_positions(
    model: Model, positions: Position | Sequence[Position], rows: list[list[int]]
) -> tuple[str, ...]:
    if not positions:
        raise InterpAblateError("no positions: give offsets such as -1, or 'response_mean'")
    suffix = (
        1 if model.tokenizer is None else suffix_length(model.tokenizer, template=model.chat_format)
    )
    reach = min(suffix, min(map(len, rows)))
    offsets = [str(-i) for i in range(1, reach + 1)]
    names: list[str] = []
    for position in (positions,) if isinstance(positions, (str, int)) else positions:
        text = str(position)
        if text == AFTER_INSTRUCTION:
            names += offsets
            continue
        if text != RESPONSE_MEAN and text not in offsets:
            raise InterpAblateError(
                f"unknown position {position!r}: accepted are -1 (the last token of the prompt) to "
                f"-{reach} (the first one after the instruction, with this chat template), "
                f"'{AFTER_INSTRUCTION}' for all of them, and '{RESPONSE_MEAN}'"
            )
        names.append(text)
    if len(set(names)) != len(names):
        raise InterpAblateError(f"a position is named twice: {names}")
    return tuple(names)


def _responses(
    model: Model,
    prompts: PromptLike | Sequence[PromptLike],
    rows: list[list[int]],
    responses: Sequence[str] | None,
) -> tuple[list[list[int]], list[list[int]]]:
    """What is between each prompt and its response (a thought), and the response."""
    leads = [model.thinking.before(row) for row in rows] if responses is not None else []
    if responses is None:
        written = model.generate(prompts, max_new_tokens=MAX_NEW_TOKENS)
        leads, ends = [list(g.lead) for g in written], [list(g.tokens) for g in written]
    else:
        if len(responses) != len(rows):
            raise InterpAblateError(f"{len(responses)} responses for {len(rows)} prompts")
        ends = [
            model.tokenizer(response, add_special_tokens=False)["input_ids"]
            for response in responses
        ]
    empty = [i for i, end in enumerate(ends) if not end]
    if empty:
        raise InterpAblateError(
            f"response_mean needs responses, but those of prompts {empty[:5]} are empty"
        )
    return leads, ends


def _reader(positions: tuple[str, ...]) -> Callable[[Tensor, Batch], Tensor]:
    """A function that keeps the wanted positions of a site's activations: [batch, position, d_model]."""
    offsets = [int(name) for name in positions if name != RESPONSE_MEAN]

    def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        # Rows end at the last column; a response, if there is one, is what follows the prompt.
        response = batch.row_lengths - batch.prompt_lengths
        columns = (
            x.shape[1]
            - response[:, None]
            + torch.tensor(offsets, dtype=torch.long, device=x.device)
        )
        at_offsets = iter(x.gather(1, columns[..., None].expand(-1, -1, x.shape[2])).unbind(1))
        return torch.stack(
            [
                response_mean(x, batch).to(x) if name == RESPONSE_MEAN else next(at_offsets)
                for name in positions
            ],
            1,
        )

    return read


def _blocks(
    model: Model, request: _Request, batch_size: int | None
) -> Iterator[tuple[Batch, Float[Tensor, "batch position site d_model"]]]:
    """Activations batch by batch, on the CPU."""
    offsets = [-int(name) for name in request.positions if name != RESPONSE_MEAN]
    lengths = zip(request.rows, request.prompt_lengths)
    stream = model.stream(
        request.rows,
        keep=0,
        prompt_lengths=request.prompt_lengths,
        capture=dict.fromkeys(request.sites, _reader(request.positions)),
        batch_size=batch_size,
        tail=max(len(row) - length for row, length in lengths) + max(offsets, default=0),
    )
    for batch, _, captured in stream:
        block = stacked(captured, request.sites, 2)
        bad = (~torch.isfinite(block)).nonzero()
        if len(bad):
            row, position, site, _ = bad[0].tolist()
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

    try:
        tensors = load_file(path)
        values, mean = tensors["values"], tensors["mean"]
        if values.shape[1:3] != (len(request.positions), len(request.sites)):
            raise KeyError(f"shape {tuple(values.shape)}")
        moments = Moments(len(values), mean, tensors["squares"])
    except (SafetensorError, KeyError, OSError) as error:
        raise InterpAblateError(
            f"corrupt activation cache {path}: {error}. Delete this file and run again"
        ) from error
    return Activations(values, request.sites, request.positions, labels, moments)
