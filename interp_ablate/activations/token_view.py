"""Projections token by token: the tokens of one text, with its response, on directions.

Knows: one pass over one row, a table. Does not know: which token is of the template (`token_rows`), how they are
drawn (`token_html`, and `plots`), or where a direction came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.activations.activations import check_finite
from interp_ablate.activations.token_html import tokens_html
from interp_ablate.activations.token_rows import Token, after_prompts, answers_apart, tokens_of
from interp_ablate.directions.direction import Direction, as_directions
from interp_ablate.errors import DirectionError, InterpAblateError
from interp_ablate.models.batches import Batch
from interp_ablate.models.model import Model, check_model
from interp_ablate.precision import to_float64
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.sites import Point, Site, SiteLike, as_sites

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class TokenProjections:
    """The projections of every token of one text on directions; a notebook shows the text coloured by them.

    `values[i, k]` is the scalar product of the activation at `sites[k]` and token i with the unit vector of
    `directions[k]`, in the unit of the activations.
    """

    values: Float[Tensor, "token direction"]
    """float64, on the CPU."""
    tokens: tuple[Token, ...]
    directions: tuple[Direction, ...]
    sites: tuple[Site, ...]
    """Where the stream was read, for each direction: its own site unless others were asked for."""

    def __repr__(self) -> str:
        layers = sorted({site.layer for site in self.sites})
        return (
            f"TokenProjections({len(self.tokens)} tokens x {len(self.sites)} directions, "
            f"layers {layers[0]} to {layers[-1]})"
        )

    def _repr_html_(self) -> str:
        return tokens_html(self)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each column."""
        return tuple(site.layer for site in self.sites)

    def one_per_layer(self, point: Point | None = None) -> TokenProjections:
        """The first direction of each layer at one point, in forward order.

        `point`: default resid_post where there is one, else the first direction's.

        Raises:
            InterpAblateError: no direction at that point.
        """
        points = [site.point for site in self.sites]
        chosen = point or ("resid_post" if "resid_post" in points else points[0])
        first: dict[Site, int] = {}
        for k, site in enumerate(self.sites):
            if site.point == chosen:
                first.setdefault(site, k)
        if not first:
            raise InterpAblateError(
                f"no direction at {chosen}: there are {', '.join(dict.fromkeys(points))}"
            )
        columns = [first[site] for site in sorted(first)]
        return TokenProjections(
            self.values[:, columns],
            self.tokens,
            tuple(self.directions[k] for k in columns),
            tuple(self.sites[k] for k in columns),
        )

    def to_frame(self) -> pd.DataFrame:
        """A row for each token and direction: index, id, text and part of the token; layer, point, position,
        method; the projection."""
        import pandas as pd

        rows = [
            (i, t.id, t.text, t.part, site.layer, site.point, direction.position, direction.method, value)
            for i, (t, values) in enumerate(zip(self.tokens, self.values.tolist()))
            for site, direction, value in zip(self.sites, self.directions, values)
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=list(TOKEN_COLUMNS))


TOKEN_COLUMNS = (
    "index", "id", "token", "part", "layer", "point", "position", "method", "projection",
)  # fmt: skip


def token_projections(
    model: Model,
    prompt: PromptLike,
    directions: Direction | Iterable[Direction],
    *,
    sites: SiteLike | Iterable[SiteLike] | None = None,
    response: str | None = None,
    max_new_tokens: int = 0,
) -> TokenProjections:
    """Project the stream at every token of a text on directions, in one pass.

    The text goes through the chat template like every prompt, and its tokens are the rows. Inside `with
    model.applied(plan)` the edited stream is read.

    Args:
        prompt: a text, `Prompt`, chat or token ids; the answer at the end of a chat is its response.
        directions: one or several; each is read at its own site.
        sites: for one direction, the sites at which the stream is projected on it instead.
        response: text that follows the prompt as its answer.
        max_new_tokens: without a response, the model's own greedy answer of so many tokens at most follows.

    Raises:
        DirectionError: no direction, one of another d_model, or sites for several directions.
        ModelError: a site that the model lacks; NaN or infinity in the activations.
        InterpAblateError: two responses; a prompt that cannot be rendered.
    """
    check_model(model)
    columns, places = _columns(model, directions, sites)
    (prompt,), given = answers_apart([prompt], None if response is None else [response])
    if given is not None and max_new_tokens:
        raise InterpAblateError(
            "the response is there: max_new_tokens is for the model's own; leave one out"
        )
    (start,) = model.encode_all([prompt])
    lead: list[int] = []
    end: list[int] = []
    if given is not None or max_new_tokens:
        (lead,), (end,) = after_prompts(
            model, [prompt], [start], given, max_new_tokens=max_new_tokens
        )
    tokens = tokens_of(model, prompt, start, lead, end)
    row = [token.id for token in tokens]
    values = _projected(model, row, len(start), columns, places)
    return TokenProjections(values, tokens, columns, places)


def _columns(
    model: Model,
    directions: Direction | Iterable[Direction],
    sites: SiteLike | Iterable[SiteLike] | None,
) -> tuple[tuple[Direction, ...], tuple[Site, ...]]:
    """The direction and the site of each column, checked."""
    columns = tuple(as_directions(directions))
    widths = [len(item.vector) for item in columns]
    if set(widths) != {model.d_model}:
        raise DirectionError(
            f"token_projections needs directions of the model's d_model {model.d_model}; got "
            f"{', '.join(map(str, sorted(set(widths)))) or 'none'}"
        )
    places = tuple(item.site for item in columns)
    if sites is not None:
        if len(columns) > 1:
            raise DirectionError(
                f"sites are for one direction, and these are {len(columns)}, each read at its own site"
            )
        places = as_sites(sites)
        columns = columns * len(places)
    for site in places:
        model.hook_point(site)
    return columns, places


def _projected(
    model: Model,
    row: list[int],
    prompt_length: int,
    directions: Sequence[Direction],
    sites: Sequence[Site],
) -> Float[Tensor, "token direction"]:
    """One pass over one row; projections in float64."""
    columns_at = {
        site: [k for k, place in enumerate(sites) if place == site] for site in dict.fromkeys(sites)
    }

    def reader(columns: list[int]) -> Callable[[Tensor, Batch], Tensor]:
        vectors = torch.stack([directions[k].vector for k in columns], 1)

        def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
            wide = to_float64(x[0].detach())
            return (wide @ vectors.to(wide)).cpu()

        return read

    capture: dict[SiteLike, Any] = {site: reader(columns) for site, columns in columns_at.items()}
    values = torch.empty(len(row), len(sites), dtype=torch.float64)
    for _, _, captured in model.stream(
        [row], keep=0, prompt_lengths=[prompt_length], capture=capture, tail=len(row)
    ):
        for site, columns in columns_at.items():
            check_finite(captured[site], f" at {site}")
            values[:, columns] = captured[site]
    return values
