"""Pairs of word sets that are nearly the same, found without comparing every pair.

Knows: sets of words, and the Jaccard index. Does not know: prompts, sides, or what a pair means.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations

NEAR_DUPLICATE = 0.85  # Jaccard index of two texts' word sets: shared words over all words
MOST_MATCHES = 20  # of one set in one group: a thousand copies are a thousand findings, not half a million pairs


def near_pairs(
    sets: Sequence[frozenset[str]], groups: Sequence[Hashable], sought: Sequence[Iterable[Hashable]]
) -> Iterator[tuple[int, int]]:
    """Index pairs of sets whose Jaccard index is at least NEAR_DUPLICATE, at most MOST_MATCHES a set and group.

    Two sets that share at least m words share k of the rarest words of each: of n words, the n - m + k rarest
    (the k-prefix filter of Chaudhuri, Ganti and Kaushik, "A primitive operator for similarity joins", 2006). Sets are
    looked up by k such words, so that texts of one template meet only where they are near duplicates.

    Args:
        groups: of each set, the group that it is found in.
        sought: of each set, the groups that it is compared with.
    """
    counts = Counter(word for words in sets for word in words)
    rarest = [sorted(words, key=lambda word: (counts[word], word)) for words in sets]
    index: dict[Hashable, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        size = len(sets[i])
        if not size:
            continue
        sizes = range(
            _least(size), size + 1
        )  # of smaller sets that can be near; larger ones come later
        keys = {
            key for k in {_n_together(n) for n in sizes} for key in _keys(rarest[i], sizes[0], k)
        }
        for group in sought[i]:
            for j in _matches(sets, i, (index.get((group, key), ()) for key in keys)):
                yield (j, i) if j < i else (i, j)
        for key in _keys(rarest[i], _shared(size), _n_together(size)):
            index[groups[i], key].append(i)


def _matches(sets: Sequence[frozenset[str]], i: int, lists: Iterable[Sequence[int]]) -> list[int]:
    """The first MOST_MATCHES sets of some lists that are near set i, each once."""
    words, seen, near = sets[i], set[int](), list[int]()
    for candidates in lists:
        for j in candidates:
            if j not in seen:
                seen.add(j)
                if is_near(words, sets[j]):
                    near.append(j)
                    if len(near) == MOST_MATCHES:
                        return near
    return near


def is_near(some: frozenset[str], others: frozenset[str]) -> bool:
    """Whether the Jaccard index of two sets is at least NEAR_DUPLICATE; two empty sets have none."""
    shared = len(some & others)
    return shared > 0 and shared >= NEAR_DUPLICATE * (len(some) + len(others) - shared)


def _least(size: int) -> int:
    """The size of the smallest set that can be near a set of a size: it lies inside, all of it shared."""
    return math.ceil(NEAR_DUPLICATE * size - 1e-9)


def _shared(size: int) -> int:
    """The fewest words that a set shares with a near one that is at least as large."""
    return math.ceil(2 * NEAR_DUPLICATE / (1 + NEAR_DUPLICATE) * size - 1e-9)


def _n_together(size: int) -> int:
    """How many words a set of a size is looked up by: more together are rarer, but have more combinations."""
    return min(5 if size <= 24 else 3 if size <= 48 else 2 if size <= 96 else 1, _shared(size))


def _keys(words: Sequence[str], shared: int, k: int) -> Iterator[tuple[str, ...]]:
    return combinations(words[: len(words) - shared + k], k)
