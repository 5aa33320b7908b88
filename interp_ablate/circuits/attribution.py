"""Attribution: the projection of the residual stream on a direction, as the sum of what wrote it.

The stream at a site is the sum of what the embeddings, every attention and every MLP added before it. So its
scalar product with a direction is the sum of their scalar products; heads are split by the columns of W_O,
neurons by those of W_out, experts by their own weights. Nothing is linearized: norms before a module decide what it writes, and norms after
it keep the scale that they had in that pass. Source: direct logit attribution in Elhage et al. 2021,
https://transformer-circuits.pub/2021/framework, with a direction in place of an unembedding's row.

Knows: passes, terms, means over prompts. Does not know: what a module reads, or plots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_ablate.circuits.written_parts import Term, WrittenParts, tolerance
from interp_ablate.directions.direction import Direction, as_direction
from interp_ablate.errors import DirectionError, ModelError, PlanError
from interp_ablate.models.batches import Batch
from interp_ablate.models.forward import Capture
from interp_ablate.models.model import Model, check_model
from interp_ablate.precision import to_float64
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import PromptLike, as_prompts
from interp_ablate.sites import RESIDUAL_POINTS, Site, SiteLike
from interp_ablate.stats.intervals import difference_of_means, mean_interval

if TYPE_CHECKING:
    import pandas as pd

Positions = int | Sequence[int] | Literal["all"]
# Bytes of neurons' shares that one batch may hold, and an attribution before the largest are chosen.
_AT_ONCE, _IN_ALL = 2**28, 2**32


@dataclass(frozen=True, eq=False)
class Attribution:
    """The summands of projections on one direction, at tokens of prompts."""

    values: Float[Tensor, "token term"]
    """What each term wrote along the direction, in units of the stream; float64."""
    projection: Float[Tensor, " token"]
    """What the stream holds along the direction at the site, as the pass computed it; float64."""
    terms: tuple[Term, ...]
    prompt: Int[Tensor, " token"]
    """The index of each token's prompt."""
    position: Int[Tensor, " token"]
    """The index of each token in its prompt, from 0."""
    token_ids: Int[Tensor, " token"]
    site: Site
    direction: str
    """The direction's name."""
    labels: Bool[Tensor, " prompt"] | None = None
    """True for positive prompts; None where the prompts were no ContrastSet."""
    whole: dict[str, str] | None = None
    """The modules that are given whole, with the reason."""

    def __len__(self) -> int:
        return len(self.projection)

    def __repr__(self) -> str:
        return (
            f"Attribution({self.direction!r} at {self.site}: {len(self)} tokens, {len(self.terms)} terms, "
            f"off by {self.error:.1e})"
        )

    @property
    def error(self) -> float:
        """The largest difference of sum and projection, as a share of the sum of all terms' sizes."""
        gap = (self.values.sum(1) - self.projection).abs()
        return float((gap / self.values.abs().sum(1).clamp(min=1e-300)).max())

    def of_token(self, prompt: int, position: int) -> pd.DataFrame:
        """The terms of one token, the largest first: term, kind, layer, module, index, value.

        `position`: its index in the prompt, negative from the end of the tokens attributed.

        Raises:
            ModelError: a token that was not attributed.
        """
        rows = torch.nonzero(self.prompt == prompt).flatten()
        if position < 0:
            matching = rows[position:][:1] if len(rows) >= -position else rows[:0]
        else:
            matching = rows[self.position[rows] == position]
        if not len(matching):
            raise ModelError(
                f"no attribution of position {position} of prompt {prompt}: there are positions "
                f"{self.position[rows].tolist() or 'of no such prompt'}"
            )
        frame = self._terms_frame()
        frame["value"] = self.values[int(matching[0])].numpy()
        order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def to_frame(self, level: Literal["term", "token"] = "term") -> pd.DataFrame:
        """A table: one row a term over all prompts, or one row a token and term (tidy).

        By term: the mean over prompts with its 95% interval (tokens of one prompt are averaged first); of a
        contrast set the means of both sets, and of their difference (positive - negative) the interval. The column
        `share` is the part of the mean projection, or of the mean difference.
        """
        if level == "token":
            return self._token_frame()
        frame, means = self._terms_frame(), self.prompt_means()
        if self.labels is None:
            frame["mean"] = means.mean(0)
            ends = [mean_interval(column) or (None, None) for column in means.T]
            frame["low"], frame["high"] = zip(*ends)
            frame["share"] = frame["mean"] / frame["mean"].sum()
        else:
            mask = self.labels[torch.unique(self.prompt)].numpy()
            gaps = [difference_of_means(column[mask], column[~mask]) for column in means.T]
            frame["positive"], frame["negative"] = means[mask].mean(0), means[~mask].mean(0)
            frame["difference"] = [gap.value for gap in gaps]
            frame["low"], frame["high"] = [g.low for g in gaps], [g.high for g in gaps]
            frame["share"] = frame["difference"] / frame["difference"].sum()
        return frame.assign(n=len(means))

    def prompt_means(self) -> Float[np.ndarray, "prompt term"]:
        """The terms of each prompt, a mean over its tokens."""
        names, index = torch.unique(self.prompt, return_inverse=True)
        sums = torch.zeros(len(names), len(self.terms), dtype=torch.float64)
        sums.index_add_(0, index, self.values)
        return (sums / torch.bincount(index)[:, None]).numpy()

    def _terms_frame(self) -> pd.DataFrame:
        import pandas as pd

        rows = [(t.name, t.kind, t.layer, t.module, t.index) for t in self.terms]
        frame = pd.DataFrame(rows, columns=["term", "kind", "layer", "module", "index"])
        return frame.astype({"layer": "Int64", "index": "Int64"})

    def _token_frame(self) -> pd.DataFrame:
        import pandas as pd

        n = len(self.terms)
        each = {
            "prompt": self.prompt, "position": self.position, "token_id": self.token_ids,
            "projection": self.projection,
        }  # fmt: skip
        columns = {name: np.repeat(x.numpy(), n) for name, x in each.items()}
        terms = pd.concat([self._terms_frame()] * len(self), ignore_index=True)
        return pd.DataFrame(columns).join(terms).assign(value=self.values.flatten().numpy())


def attribute(
    model: Model,
    prompts: ContrastSet | PromptLike | Sequence[PromptLike],
    direction: Direction,
    *,
    site: SiteLike | None = None,
    positions: Positions | None = None,
    neurons: int = 0,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Attribution:
    """The projection of the stream on a direction as a sum over embeddings, heads, MLPs, neurons and experts.

    It adds up to the projection, to rounding: `Attribution.error`. A module whose parts do not (heads of
    state-space layers, norms that centre) is one term, and `whole` says why.

    Args:
        site: a point of the residual stream (default: the direction's own).
        positions: offsets from the end of a prompt, such as -1, or "all" (default: the direction's own).
        neurons: so many neurons have terms of their own: those with the largest mean (of a contrast set the
            largest difference) over these prompts. The other neurons of each MLP are one term.
        on_batch: called with the number of prompts done in each batch.

    Raises:
        DirectionError: a direction of another d_model.
        ModelError: a site that is no point of the stream; positions that no prompt or not every prompt has;
            a negative number of neurons, or more shares of neurons than memory should hold.
        PlanError: a plan is applied: its edits write to the stream too.
    """
    check_model(model)
    place = Site.parse(site if site is not None else as_direction(direction).site)
    _check(model, direction, place)
    if isinstance(prompts, ContrastSet):
        texts: Any = [*prompts.positive, *prompts.negative]
        labels = torch.arange(len(texts)) < len(prompts.positive)
    else:
        texts, labels = as_prompts(prompts), None
    rows = model.encode_all(texts)
    offsets = _offsets(positions, direction, min(map(len, rows)))
    watched = _Watched(model, direction.vector, place, neurons=neurons > 0)
    if neurons:
        batch_size = batch_size or watched.batch_size(neurons, rows, offsets)
    pieces = list(watched.pieces(rows, offsets, batch_size, on_batch))
    merged = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    order = torch.argsort(merged["prompt"], stable=True)
    merged = {name: value[order] for name, value in merged.items()}
    values, terms = watched.settled(merged)
    found = Attribution(
        values, merged["projection"], terms, merged["prompt"], merged["position"], merged["token_ids"],
        place, direction.name, labels, watched.whole,
    )  # fmt: skip
    return _largest_neurons(found, neurons) if neurons else found


def _largest_neurons(found: Attribution, count: int) -> Attribution:
    """The same sum with the `count` largest neurons as terms; the others of an MLP are added up."""
    means = found.prompt_means()
    size = np.abs(means.mean(0))
    if found.labels is not None:
        mask = found.labels[torch.unique(found.prompt)].numpy()
        size = np.abs(means[mask].mean(0) - means[~mask].mean(0))
    ours = [i for i, term in enumerate(found.terms) if term.kind == "neuron"]
    kept = set(sorted(ours, key=lambda i: -size[i])[:count])
    groups: dict[Term, list[int]] = {}
    for i, term in enumerate(found.terms):
        if term.kind == "neuron" and i not in kept:
            term = Term("mlp", term.layer, "mlp", None, f"L{term.layer}.mlp.others")
        groups.setdefault(term, []).append(i)
    values = torch.stack([found.values[:, group].sum(1) for group in groups.values()], 1)
    return replace(found, values=values, terms=tuple(groups))


def _check(model: Model, direction: Direction, site: Site) -> None:
    if len(as_direction(direction).vector) != model.d_model:
        raise DirectionError(
            f"the direction has d_model {len(direction.vector)}, and {model.source.name} {model.d_model}"
        )
    if site.point not in RESIDUAL_POINTS:
        raise ModelError(
            f"{site} is not a place of the residual stream, whose parts could be told: give site=, one of "
            f"{', '.join(model.residual_points)} of a layer, such as '{site.layer}.resid_post'"
        )
    model.hook_point(site)
    if model.plans.is_edited:
        raise PlanError(
            "attribution is of a model without edits (a plan's edits write to the stream too): leave the "
            "`with model.applied(...)` block"
        )


def _offsets(positions: Positions | None, direction: Direction, shortest: int) -> list[int] | None:
    """Negative offsets; None for all positions."""
    if positions is None:
        if not direction.position.lstrip("-").isdigit():
            raise ModelError(
                f"the direction was read at {direction.position!r}: say which tokens to attribute, "
                "positions=-1 (the last of each prompt) or positions='all'"
            )
        positions = int(direction.position)
    if positions == "all":
        return None
    offsets = [positions] if isinstance(positions, int) else list(positions)  # type: ignore[arg-type]
    if not offsets or any(not isinstance(o, int) or not -shortest <= o < 0 for o in offsets):
        raise ModelError(
            f"positions {positions!r}: accepted are 'all', and offsets from the end of a prompt, -1 to "
            f"-{shortest} (the shortest prompt's tokens)"
        )
    return offsets


class _Watched:
    """The hooks and captures of one attribution, and what they saw."""

    def __init__(
        self, model: Model, r: Float[Tensor, " d_model"], site: Site, *, neurons: bool
    ) -> None:
        self.model, self.r, self.site = model, r, site
        self.tolerance = tolerance(model.dtype)
        outputs = [Site(i, p) for i in range(site.layer + 1) for p in ("attn_out", "mlp_out")]  # type: ignore[arg-type]
        self.parts = [
            WrittenParts(model.site_map, out, r, self.tolerance, neurons)
            for out in outputs
            if out < site and model.site_map.has(out)
        ]
        self.entering = [Site(i, "resid_pre") for i in range(site.layer + 1)]
        embedding = Site(0, "pos_embed")
        apart = model.site_map.has(embedding) and not model.site_map.is_normed(embedding)
        self.positions_site = embedding if apart else None

    @property
    def whole(self) -> dict[str, str]:
        """The modules without parts, and why."""
        return {part.whole.name: part.reason for part in self.parts if part.reason}

    def batch_size(self, neurons: int, rows: list[list[int]], offsets: list[int] | None) -> int:
        """How many prompts go through at once, so that the shares of all neurons fit; refuses what never does."""
        mlps = [part.site for part in self.parts if part.module == "mlp"]
        weights = [each[1] for each in map(self.model.site_map.projection, mlps) if each]
        a_token = 8 * sum(weight.shape[-1] for weight in weights)
        tokens = sum(map(len, rows)) if offsets is None else len(rows) * len(offsets)
        if neurons < 0 or tokens * a_token > _IN_ALL:
            raise ModelError(
                f"neurons={neurons} over {tokens} tokens: give a number from 0, and so few prompts or positions "
                f"that all neurons' shares take {_IN_ALL / 2**30:.0f} GiB at most, not {tokens * a_token / 2**30:.1f}"
            )
        return max(1, int(_AT_ONCE / max(1, a_token * max(map(len, rows)))))

    def _captures(self) -> dict[SiteLike, Capture]:
        def read(x: Tensor, batch: Batch) -> Tensor:
            wide = to_float64(x)
            return torch.stack([wide @ self.r.to(wide), wide.norm(dim=-1)], -1).cpu()

        sites = [*self.entering, self.site, *([self.positions_site] if self.positions_site else [])]
        captures: dict[SiteLike, Capture] = dict.fromkeys(sites, read)
        for part in self.parts:
            captures |= dict(part.captures().items())
        return captures

    def pieces(
        self,
        rows: list[list[int]],
        offsets: list[int] | None,
        batch_size: int | None,
        on_batch: Callable[[int], None] | None,
    ) -> Iterator[dict[str, Tensor]]:
        """What each batch's passes held, a row a token."""
        handles: list[Any] = []
        try:
            for part in self.parts:
                handles += part.watch(self.model.d_model)
            stream = self.model.stream(
                rows,
                keep=0,
                capture=self._captures(),
                batch_size=batch_size,
                tail=max(map(len, rows)),
            )
            for batch, _, captured in stream:
                yield self._piece(batch, captured, offsets)
                if on_batch:
                    on_batch(len(batch.index))
        finally:
            for handle in handles:
                handle.remove()

    def _piece(
        self, batch: Batch, captured: dict[Site, Tensor], offsets: list[int] | None
    ) -> dict[str, Tensor]:
        batch = batch.to(torch.device("cpu"))
        width = batch.tokens.shape[1]
        chosen = batch.mask.bool()
        if offsets is not None:
            chosen = torch.zeros_like(chosen)
            chosen[:, [width + offset for offset in offsets]] = True
        row, column = torch.nonzero(chosen, as_tuple=True)
        piece = {
            "prompt": torch.tensor(batch.index)[row],
            "position": batch.positions[row, column],
            "token_ids": batch.tokens[row, column],
            "projection": captured[self.site][row, column, 0],
            "size": captured[self.site][row, column, 1],
        }
        streams = [*self.entering, *([self.positions_site] if self.positions_site else [])]
        for site in streams:
            piece[str(site)] = captured[site][row, column, 0]
        for part in self.parts:
            name = part.whole.name
            piece[name] = captured[part.site][row, column, 0]
            shares = part.take(captured, batch)
            if shares is not None:
                piece[f"{name} parts"] = shares[row, column]
        return piece

    def settled(self, seen: dict[str, Tensor]) -> tuple[Tensor, tuple[Term, ...]]:
        """The terms that explain what was seen, and their values [token, term]."""
        entered = seen[str(self.entering[0])]
        terms, columns = [Term("embed", name="embed")], [entered]
        if self.positions_site:
            terms.append(Term("pos_embed", name="pos_embed"))
            positions = seen[str(self.positions_site)]
            columns = [entered - positions, positions]
        ends = [*(seen[str(site)] for site in self.entering[1:]), seen["projection"]]
        for layer, end in enumerate(ends):
            rest = end - seen[str(self.entering[layer])]
            for part in (part for part in self.parts if part.site.layer == layer):
                rest = rest - seen[part.whole.name]
                own_terms, own_columns = self._settled_part(part, seen)
                terms += own_terms
                columns += own_columns
            if bool((rest.abs() > self.tolerance * seen["size"]).any()):
                terms.append(Term("rest", layer, "block", None, f"L{layer}.rest"))
                columns.append(rest)
        return torch.stack(columns, 1), tuple(terms)

    @staticmethod
    def _settled_part(
        part: WrittenParts, seen: dict[str, Tensor]
    ) -> tuple[list[Term], list[Tensor]]:
        verdict = part.verdict()
        if verdict == "whole":
            return [part.whole], [seen[part.whole.name]]
        shares = seen[f"{part.whole.name} parts"]
        columns = list(shares.unbind(1))
        if verdict == "exact":
            return part.terms, columns[:-1]
        return [*part.terms, part.bias_name], columns
