"""Activations of every token that was kept: ragged, in memory or in shards on disk.

Knows: tokens, means over some of them, tables, files. Does not know: how a model is run.
"""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.activations.activations import (
    RESPONSE_MEAN,
    Activations,
    Moments,
    as_numpy,
    label_names,
    no_activations,
    xarray_or_error,
)
from interp_ablate.activations.token_rows import Token, TokenPart
from interp_ablate.activations.token_shards import Shards, ShardWriter, TokenBlock, read_shards
from interp_ablate.display import html_table
from interp_ablate.errors import InterpAblateError
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site, SiteLike
from interp_ablate.storage.atomic_files import remove, temporary_beside, write_atomic
from interp_ablate.storage.incoming_files import MAX_LOG, incoming_object
from interp_ablate.storage.strict_json import json_text

if TYPE_CHECKING:
    import pandas as pd
    import xarray

TokenSet = Literal["all", "prompt", "response"]
# Names; a function of a token; or for each prompt a list of bools (one a token) or of indices.
TokenPositions = TokenSet | Callable[[Token], bool] | Sequence[Any] | Tensor | np.ndarray
PARTS: dict[str, tuple[str, ...]] = {
    "all": get_args(TokenPart),
    "prompt": ("template", "prompt"),
    "response": ("response",),
}
MEANS = {"all": "all_mean", "prompt": "prompt_mean", "response": RESPONSE_MEAN}
FORMAT, INDEX = "interp_ablate.tokens/1", "tokens.json"


@dataclass(frozen=True, eq=False)
class TokenActivations:
    """Activations of the tokens that `collect(..., positions="all")` kept, as many a prompt as it has.

    `activations.at(site)` is a tensor [token, d_model] for each prompt, in the order of `tokens`. There is no padding.
    Values in shards are read from disk when they are used.
    """

    sites: tuple[Site, ...]
    tokens: tuple[tuple[Token, ...], ...]
    """For each prompt the tokens that were kept: id, text, and the part of the text that they are of."""
    indices: tuple[tuple[int, ...], ...]
    """Where each of them stands in its prompt's whole row, from 0."""
    blocks: tuple[TokenBlock, ...]
    """The values, in memory or as files."""
    labels: Bool[Tensor, " prompt"] | None = None
    """True for positive prompts; None where the prompts were no ContrastSet."""
    prompts: tuple[str, ...] = ()
    """The prompts' texts."""

    positions = ()
    """No position is every prompt's: `mean` makes activations of which an estimator takes directions."""

    def __repr__(self) -> str:
        values = self.at(self.sites[0])[0]
        folder = self.folder
        return (
            f"TokenActivations({len(self.tokens)} prompts, {sum(map(len, self.tokens))} tokens x {len(self.sites)} "
            f"sites x d_model {values.shape[1]}, {str(values.dtype).removeprefix('torch.')}, "
            f"{f'in {folder}' if folder else 'in memory'})"
        )

    def _repr_html_(self) -> str:
        parts = [token.part for row in self.tokens for token in row]
        counts = ", ".join(f"{parts.count(part)} {part}" for part in dict.fromkeys(parts))
        rows = (
            ("prompts", len(self.tokens), ""),
            ("tokens", len(parts), counts),
            ("sites", len(self.sites), f"{self.sites[0]} to {self.sites[-1]}"),
        )
        return html_table(("axis", "size", "what"), rows, caption=repr(self))

    @property
    def folder(self) -> Path | None:
        """The folder of the shards; None where the values are in memory."""
        values = self.blocks[0].values
        return values.parent if isinstance(values, Path) else None

    @property
    def label_names(self) -> list[str]:
        """positive or negative for each prompt; "" where the prompts were no ContrastSet."""
        return label_names(self.labels, len(self.tokens))

    def at(self, site: SiteLike) -> tuple[Float[Tensor, "token d_model"], ...]:
        """Activations of each prompt's tokens at one site.

        Raises:
            InterpAblateError: a site that was not collected; a shard that is gone or damaged.
        """
        site = Site.parse(site)
        if site not in self.sites:
            raise no_activations(str(site), self.sites, "tokens")
        found: dict[int, Tensor] = {}
        for block in self.blocks:
            parts = block.at(site).split([len(self.tokens[i]) for i in block.prompts])
            found.update(zip(block.prompts, parts))
        return tuple(found[i] for i in range(len(self.tokens)))

    def mean(self, over: TokenPositions = "all") -> Activations:
        """The mean over each prompt's tokens at every site, as activations with one position.

        Sums are in float64, and the means in the dtype of the values. `mean("response")` is what
        `collect(..., positions="response_mean")` gives.

        Args:
            over: of the tokens that were kept "all", those of the "prompt" (the template's too) or of the
                "response"; a function that is true for a `Token`; for each prompt a list of bools or of indices.

        Raises:
            InterpAblateError: a prompt without such a token; an unknown name.
        """
        chosen = chosen_tokens(self.tokens, over)
        if empty := [i for i, places in enumerate(chosen) if not places]:
            raise InterpAblateError(
                f"no token to average in prompts {empty[:5]} of {len(chosen)}: choose others than {over!r:.60}"
            )
        means = [
            torch.stack([to_float64(x[p]).mean(0).to(x) for x, p in zip(self.at(site), chosen)])
            for site in self.sites
        ]
        values = torch.stack(means, 1)[:, None]
        name = MEANS.get(over, "mean") if isinstance(over, str) else "mean"
        texts: dict[str, Any] = {"prompts": self.prompts, "tokens": (("",),) * len(values)}
        return Activations(values, self.sites, (name,), self.labels, Moments.of(values), **texts)

    def token_columns(self) -> dict[str, list[Any]]:
        """A row for each token, as columns: the prompt's number, label, position in the row, text, part."""
        names = self.label_names
        rows = [
            (prompt, names[prompt], place, token.text, token.part)
            for prompt, (places, tokens) in enumerate(zip(self.indices, self.tokens))
            for place, token in zip(places, tokens)
        ]
        columns = ("prompt", "label", "position", "token", "part")
        return dict(zip(columns, map(list, zip(*rows))))

    def to_frame(self) -> pd.DataFrame:
        """A row for each site and token, with the index prompt, label, position, token, part, layer, point; a column a
        dimension of the stream."""
        import pandas as pd

        index = pd.DataFrame(self.token_columns())
        frames = []
        for site in self.sites:
            frame = pd.DataFrame(as_numpy(torch.cat(self.at(site))))
            rows = index.assign(layer=site.layer, point=site.point)
            frames.append(frame.set_index(pd.MultiIndex.from_frame(rows)))
        return pd.concat(frames)

    def to_xarray(self) -> xarray.DataArray:
        """The values with named axes: token, site, d_model. A token's coordinates are its prompt, label, position in
        the prompt's row, text (`text`) and part.

        Raises:
            InterpAblateError: xarray is not installed.
        """
        xarray = xarray_or_error()
        columns = self.token_columns()
        columns["text"] = columns.pop("token")
        coordinates: dict[str, Any] = {name: ("token", column) for name, column in columns.items()}
        coordinates["site"] = [str(site) for site in self.sites]
        coordinates["layer"] = ("site", [site.layer for site in self.sites])
        coordinates["point"] = ("site", [site.point for site in self.sites])
        values = np.stack([as_numpy(torch.cat(self.at(site))) for site in self.sites], 1)
        return xarray.DataArray(
            values, coordinates, ("token", "site", "d_model"), name="activation"
        )

    def save(self, folder: str | Path, *, max_bytes: int = Shards.max_bytes) -> None:
        """Write a folder of safetensors shards and `tokens.json`, whole or not at all.

        In a shard the tensor of a site has the tokens of several prompts, one prompt after another.

        Raises:
            InterpAblateError: the folder exists, or cannot be written.
        """
        folder = Path(folder)
        if os.path.lexists(folder):
            raise InterpAblateError(f"{folder} exists: choose another folder")
        index = self._index()
        request = hashlib.sha256(json_text(index).encode()).hexdigest()[:32]
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            hidden = temporary_beside(folder)
            try:
                writer = ShardWriter(hidden, request, max_bytes)
                for block in self.blocks:
                    lengths = [len(self.tokens[i]) for i in block.prompts]
                    parts = [block.at(site).split(lengths) for site in self.sites]
                    for prompt, values in zip(block.prompts, zip(*parts)):
                        writer.add(prompt, dict(zip(self.sites, values)))
                writer.flush()
                self.write_index(hidden, request)
                os.replace(hidden, folder)
            finally:
                remove(hidden)
        except OSError as error:
            raise InterpAblateError(f"cannot write {folder}: {error.strerror or error}") from error

    def write_index(self, folder: Path, request: str) -> None:
        """Write `tokens.json`, which makes a folder of shards complete."""
        text = json_text({"format": FORMAT, "request": request, **self._index()})
        write_atomic(folder / INDEX, text, error=InterpAblateError)

    def _index(self) -> dict[str, Any]:
        return {
            "sites": [str(site) for site in self.sites],
            "labels": None if self.labels is None else self.labels.tolist(),
            "prompts": list(self.prompts),
            "indices": [list(places) for places in self.indices],
            "tokens": [
                {name: [getattr(token, name) for token in row] for name in ("id", "text", "part")}
                for row in self.tokens
            ],
        }

    @classmethod
    def load(cls, folder: str | Path) -> TokenActivations:
        """Open a folder that `save` wrote or `collect` streamed to; values are read when they are used.

        Raises:
            InterpAblateError: no such folder, one that is not whole, a damaged file.
        """
        folder = Path(folder)
        fields = ("format", "request", "sites", "labels", "prompts", "indices", "tokens")
        advice = "collect into the folder again"
        index = incoming_object(
            folder / INDEX, fields=fields, error=InterpAblateError, limit=MAX_LOG, advice=advice
        )
        try:
            if index["format"] != FORMAT:
                raise ValueError(f"the format is {index['format']!r}; accepted is {FORMAT!r}")
            sites = tuple(map(Site.parse, index["sites"]))
            tokens = tuple(
                tuple(map(Token, row["id"], row["text"], row["part"])) for row in index["tokens"]
            )
            indices = tuple(map(tuple, index["indices"]))
            labels = (
                None if index["labels"] is None else torch.tensor(index["labels"], dtype=torch.bool)
            )
            prompts = tuple(index["prompts"])
            lengths = [len(row) for row in tokens]
            if lengths != [len(row) for row in indices] or len(prompts) != len(tokens):
                raise ValueError("tokens, indices and prompts do not belong together")
            if labels is not None and len(labels) != len(tokens):
                raise ValueError(f"there are {len(labels)} labels for {len(tokens)} prompts")
            if any(sorted({*row}) != [*row] for row in indices):
                raise ValueError("the indices of a prompt do not ascend")
            if other := {token.part for row in tokens for token in row} - {*get_args(TokenPart)}:
                raise ValueError(f"unknown parts {', '.join(sorted(other))}")
        except (KeyError, TypeError, ValueError) as error:
            raise InterpAblateError(f"corrupt index {folder / INDEX}: {error}; {advice}") from error
        blocks = read_shards(folder, index["request"], sites, lengths, strict=True)
        return cls(sites, tokens, indices, blocks, labels, prompts)


def chosen_tokens(tokens: Sequence[Sequence[Token]], positions: TokenPositions) -> list[list[int]]:
    """The places of the chosen tokens in each prompt's row, ascending.

    Raises:
        InterpAblateError: an unknown name; a list for another number of prompts or tokens, or an index that a
            prompt does not have.
    """
    if isinstance(positions, str):
        if positions not in PARTS:
            raise InterpAblateError(
                f"unknown tokens {positions!r}: accepted are {', '.join(map(repr, PARTS))}, a function of a "
                "token, or a list of bools or of indices for each prompt"
            )
        parts = PARTS[positions]
        return [[i for i, t in enumerate(row) if t.part in parts] for row in tokens]
    if callable(positions):
        return [[i for i, token in enumerate(row) if positions(token)] for row in tokens]
    each = list_of(positions)
    if len(each) != len(tokens):
        raise InterpAblateError(
            f"tokens are chosen for {len(each)} prompts, and there are {len(tokens)}: give a list a prompt"
        )
    return [_places(list_of(mask), len(row), i) for i, (mask, row) in enumerate(zip(each, tokens))]


def list_of(values: Any) -> list[Any]:
    """A list, from an iterable, an array or a tensor; a single value as a list of it."""
    values = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else values
    return (
        list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    )


def _places(chosen: list[Any], length: int, prompt: int) -> list[int]:
    """The places in a row of so many tokens that bools or indices choose."""
    kinds = {bool if isinstance(c, (bool, np.bool_)) else numbers.Integral for c in chosen}
    if kinds == {bool} and len(chosen) == length:
        return [i for i, keep in enumerate(chosen) if keep]
    if kinds <= {numbers.Integral} and all(
        isinstance(c, numbers.Integral) and -length <= int(c) < length for c in chosen
    ):
        places = sorted({int(c) % length for c in chosen})
        if len(places) == len(chosen):
            return places
    raise InterpAblateError(
        f"prompt {prompt} has {length} tokens, and those chosen are {chosen!r:.80}: give {length} bools, or "
        f"indices from {-length} to {length - 1}, none of them twice"
    )
