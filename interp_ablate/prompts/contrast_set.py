"""Contrast sets: two sets of prompts that differ in one concept, checked, and split once.

Knows: when a set is unusable, and how it is split into three parts that share nothing. Does not know: file formats,
chat templates or models. Nothing here imports torch, transformers or numpy.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from interp_ablate.display import html_table, shortened
from interp_ablate.errors import PromptError
from interp_ablate.prompts.prompt import (
    Prompt,
    PromptLike,
    as_prompt,
    as_prompts,
    distinct,
    normalised,
    quote,
    repeated,
)
from interp_ablate.prompts.readers import Reading, bundled_names, read_side, read_spec, stem
from interp_ablate.settings import SPLIT_SIZES

logger = logging.getLogger(__name__)
_SHOWN = 5  # prompts a side in a notebook


@dataclass(frozen=True)
class ContrastSet:
    """Two sets of prompts that differ in one concept; in `positive` the concept is present.

    Raises:
        PromptError: a side is empty, holds something else than prompts, or shares a prompt with the
            other side (compared without regard to case and white space, system prompt included).
    """

    name: str
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    source: str
    """Where the prompts came from."""
    duplicates: tuple[Prompt, ...] = field(default=(), compare=False, repr=False)
    """Those that `load` dropped because their side already had them; `lint` reports them."""

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            prompts = tuple(getattr(self, side))
            wrong = [prompt for prompt in prompts if not isinstance(prompt, Prompt)]
            if wrong:
                raise PromptError(
                    f"{self.name}: the {side} side holds {type(wrong[0]).__name__} {wrong[0]!r}, "
                    "not prompts: wrap it in Prompt(...), or use ContrastSet.from_texts"
                )
            object.__setattr__(self, side, prompts)
        if not self.positive or not self.negative:
            raise PromptError(
                f"{self.name} ({self.source}): {len(self.positive)} positive and "
                f"{len(self.negative)} negative prompts: a contrast needs at least one of each"
            )
        others = {normalised(prompt) for prompt in self.negative}
        shared = distinct(p for p in self.positive if normalised(p) in others)
        if shared:
            raise PromptError(
                f"{self.name} ({self.source}): {len(shared)} prompts are in both sets, such as "
                f"{quote(*shared)}: a prompt either has the concept or not; remove it from one set"
            )

    def __repr__(self) -> str:
        sides = f"{len(self.positive)} positive, {len(self.negative)} negative prompts"
        return f"ContrastSet({shortened(self.name)!r}, {sides})"

    def _repr_html_(self) -> str:
        shown = zip_longest(self.positive[:_SHOWN], self.negative[:_SHOWN])
        rows = [[shortened(p.text, 120) if p else "" for p in pair] for pair in shown]
        return html_table(("positive", "negative"), rows, caption=f"{self!r}, the first of them")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the prompts of both sides in their order; name and source do not count."""
        sides = [[p.parts for p in side] for side in (self.positive, self.negative)]
        return hashlib.sha256(json.dumps(sides, ensure_ascii=True).encode()).hexdigest()

    @classmethod
    def from_texts(
        cls,
        positive: Iterable[PromptLike],
        negative: Iterable[PromptLike],
        *,
        name: str = "texts",
        system: str | None = None,
        source: str = "memory",
    ) -> ContrastSet:
        """Two lists of texts or chats as a contrast set; `system` is for those without their own.

        Raises:
            PromptError: see `Prompt` and `ContrastSet`.
        """
        sides = [
            tuple(as_prompt(text, system) for text in as_prompts(texts))  # type: ignore[arg-type]
            for texts in (positive, negative)
        ]
        return cls(name, sides[0], sides[1], source)

    @classmethod
    def load(
        cls,
        spec: str | Path | None = None,
        *,
        positive: str | Path | None = None,
        negative: str | Path | None = None,
        column: str | None = None,
        split: str | None = None,
        system: str | None = None,
        comments: bool = False,
        name: str | None = None,
    ) -> ContrastSet:
        """Read a contrast set.

        Args:
            spec: a bundled name (see `bundled_names`; to read a folder of that name write `./name`), a folder
                holding `positive.*` and `negative.*`, one .jsonl, .json, .csv, .tsv or .parquet file (also as
                .gz or .zst), a folder of datasets' `save_to_disk`, or a Hugging Face dataset written
                `hf:owner/name` or `hf:owner/name:configuration`. A single file has a prompt column and a label
                column (one of LABEL_COLUMNS; positive, pos, 1, true or negative, neg, 0, false), or the columns
                `positive` and `negative`, a matched pair a row. A prompt is a text, or a chat (a list of
                messages, of which an answer at the end is left out). A column `system` (or `system_prompt`)
                gives prompts their own system prompts.
            positive, negative: instead of `spec`, one side each: every row of such a file or dataset, every text
                of a JSON list, or every line of a text file that is not blank.
            column, split, system, comments: see `Reading`.

        Prompts that their own side already had (normalised) are dropped with a logged warning.

        Raises:
            PromptError: nothing, or something unreadable, at the given place; a malformed line or row (named);
                a missing column; an unreachable hub; a set that `ContrastSet` refuses.
        """
        how = Reading(column, split, system, comments)
        if spec is not None and positive is None and negative is None:
            own_name, source, sides = read_spec(spec, how)
        elif spec is None and positive is not None and negative is not None:
            first, second = (read_side(side, how) for side in (positive, negative))
            own_name, sides = f"{stem(positive)}-vs-{stem(negative)}", (first, second)
            source = f"{positive} | {negative}"
        else:
            raise PromptError(_which(spec=spec, positive=positive, negative=negative))
        return _deduplicated(name or own_name, sides, source)

    def first(self, n: int) -> ContrastSet:
        """The first `n` prompts of each side, or all that there are."""
        return ContrastSet(self.name, self.positive[:n], self.negative[:n], self.source)

    def split_sizes(self, **wanted: int | None) -> dict[str, int]:
        """The sizes of a split's parts: those wanted, and for None the usual ones.

        Where there are fewer prompts than that, the parts of which no size is wanted share what is left in the
        proportion of the usual sizes. Too few prompts for that, or for what is wanted, are refused by `split`.
        """
        available = min(len(distinct(side)) for side in (self.positive, self.negative))
        given = {key: size for key in SPLIT_SIZES if (size := wanted.get(key)) is not None}
        free = {key: size for key, size in SPLIT_SIZES.items() if key not in given}
        left = available - sum(given.values())
        if len(free) <= left < sum(free.values()):
            free = _in_proportion(free, left)
        return {key: {**given, **free}[key] for key in SPLIT_SIZES}

    def split(
        self,
        n_train: int | float = SPLIT_SIZES["n_train"],
        n_validation: int | float = SPLIT_SIZES["n_validation"],
        n_test: int | float = SPLIT_SIZES["n_test"],
        *,
        n_finalists: int = 0,
        seed: int = 0,
    ) -> Split:
        """Three parts without a common prompt; the numbers are prompts of each side, or shares as in (0.5, 0.25, 0.25).

        Shares are of the smaller side's different prompts, and each part has at least one.
        Prompts are ordered by a hash of the seed and their own normalised text: the same on every
        platform, whatever their order in the file. The test part is taken first, then validation,
        then train, so that other sizes of the later ones leave the test part as it is; the prompts for
        finalists, `n_finalists` a side, come last. Where both
        sides have the same length and no duplicates, prompt i of one is taken to match prompt i of
        the other, and the two stay in the same part; otherwise duplicates are dropped and each
        side is split alone.

        Raises:
            PromptError: a size below 1 (three sets are three), or more than a side has.
        """
        positive, negative = _ordered(self, seed)
        available = min(len(positive), len(negative))
        asked = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test}
        sizes = _sizes_of_shares(asked, available)
        for key, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise PromptError(
                    f"{key}={size!r}: the prompts that make a direction, select it and report it "
                    "are three different sets, each of at least 1 prompt a side (or three shares, such as "
                    "0.5, 0.25, 0.25)"
                )
        if n_finalists:
            sizes["n_finalists"] = n_finalists
        if sum(sizes.values()) > available:
            raise PromptError(_too_few(self, len(positive), len(negative), sizes))
        parts, start = {}, 0
        for key in ("n_test", "n_validation", "n_train", "n_finalists"):
            if key not in sizes:
                continue
            part, size = key.removeprefix("n_"), sizes[key]
            chosen = slice(start, start + size)
            source = f"{self.source} [{part}, seed {seed}]"
            parts[part] = ContrastSet(self.name, positive[chosen], negative[chosen], source)
            start += size
        return Split(**parts)


@dataclass(frozen=True)
class Split:
    """The prompts that make a direction, those that select it, and those that report it."""

    train: ContrastSet
    validation: ContrastSet
    test: ContrastSet
    finalists: ContrastSet | None = None
    """Prompts on which the best plans of many are compared, where there are enough for that."""

    @property
    def parts(self) -> tuple[ContrastSet, ...]:
        """Every part that there is."""
        last = () if self.finalists is None else (self.finalists,)
        return (self.train, self.validation, self.test, *last)

    def __repr__(self) -> str:
        sizes = [f"{name} {p} + {n}" for name, p, n, _ in self._rows()]
        return f"Split({shortened(self.train.name)!r}, {', '.join(sizes)})"

    def _repr_html_(self) -> str:
        columns = ("part", "positive", "negative", "for")
        return html_table(columns, self._rows(), caption=shortened(self.train.name))

    def _rows(self) -> list[tuple[object, ...]]:
        uses = {"train": "makes directions", "validation": "selects", "test": "reports"}
        if self.finalists is not None:
            uses["finalists"] = "compares the best"
        parts = ((name, getattr(self, name), use) for name, use in uses.items())
        return [(name, len(p.positive), len(p.negative), use) for name, p, use in parts]


def as_contrast(given: object) -> ContrastSet:
    """The contrast set that was given.

    Raises:
        PromptError: it is something else.
    """
    if isinstance(given, ContrastSet):
        return given
    raise PromptError(
        "a ContrastSet is needed, as ContrastSet.from_texts(positive, negative) or ContrastSet.load(name) gives one; "
        f"got {shortened(repr(given))} ({type(given).__name__})"
    )


def _ordered(contrast: ContrastSet, seed: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Both sides without duplicates in the order of the seed, pairs kept together (see `split`)."""

    def rank(*prompts: Prompt) -> str:
        key = "\x1e".join((str(seed), *map(normalised, prompts)))
        return hashlib.sha256(key.encode()).hexdigest()

    positive, negative = distinct(contrast.positive), distinct(contrast.negative)
    no_duplicates = (positive, negative) == (contrast.positive, contrast.negative)
    if no_duplicates and len(positive) == len(negative):
        pairs = sorted(zip(positive, negative, strict=True), key=lambda pair: rank(*pair))
        return tuple(p for p, _ in pairs), tuple(n for _, n in pairs)
    return tuple(sorted(positive, key=rank)), tuple(sorted(negative, key=rank))


def _sizes_of_shares(asked: dict[str, int | float], available: int) -> dict[str, int]:
    """Shares of the prompts as numbers of them; numbers as they are.

    Raises:
        PromptError: a share that is not above 0, or shares that add up to more than 1.
    """
    shares = list(asked.values())
    if not all(isinstance(share, float) for share in shares):
        return asked  # type: ignore[return-value]
    if not all(share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise PromptError(
            f"a split of {asked}: shares are above 0 and add up to 1 at most, such as 0.5, 0.25, 0.25"
        )
    total = max(len(asked), int(available * sum(shares) + 1e-9))
    whole = {key: round(size * 1_000_000) for key, size in asked.items()}
    return _in_proportion(whole, total)


def _too_few(contrast: ContrastSet, n_positive: int, n_negative: int, sizes: dict[str, int]) -> str:
    asked, available = sum(sizes.values()), min(n_positive, n_negative)
    sums = " + ".join(f"{key}={size}" for key, size in sizes.items())
    message = (
        f"{contrast.name}: {n_positive} positive and {n_negative} negative different prompts, but "
        f"{sums} asks for {asked} of each: "
    )
    if available < 3:
        return message + "three disjoint parts need at least 3 of each; add prompts"
    fit = _in_proportion(sizes, available)
    return message + "pass " + ", ".join(f"{k}={v}" for k, v in fit.items()) + ", or add prompts"


def _in_proportion(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Sizes of at least 1 that add up to `total`, by largest remainders."""
    asked = sum(sizes.values())
    fit = {key: max(1, size * total // asked) for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: sizes[key] * total % asked, reverse=True)
    for key in by_remainder[: max(0, total - sum(fit.values()))]:
        fit[key] += 1
    while sum(fit.values()) > total:
        fit[max(fit, key=lambda key: fit[key])] -= 1
    return fit


def _which(**places: str | Path | None) -> str:
    """The message for a contrast set that is given twice, by half or not at all."""
    values = [f"{key}={value}" for key, value in places.items() if value is not None]
    return (
        f"got {' and '.join(values) or 'no contrast set'}: give either one contrast set (a bundled name: "
        f"{', '.join(bundled_names())}; a file, a folder, hf:owner/name), or both positive= and negative="
    )


def _deduplicated(
    name: str, sides: tuple[Sequence[Prompt], Sequence[Prompt]], source: str
) -> ContrastSet:
    dropped: list[Prompt] = []
    distinct_sides = []
    for label, side in zip(("positive", "negative"), sides, strict=True):
        again = repeated(side)
        if again:
            logger.warning(
                "%s: dropped %d duplicates of %d %s prompts, such as %s",
                name, len(again), len(side), label, quote(*again),
            )  # fmt: skip
        dropped += again
        distinct_sides.append(distinct(side))
    return ContrastSet(name, distinct_sides[0], distinct_sides[1], source, tuple(dropped))
