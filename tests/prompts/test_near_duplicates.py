"""Near duplicates are those that a comparison of every pair finds, and their search does not grow with the square."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest

from interp_ablate.prompts import near_duplicates
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.linting import lint
from interp_ablate.prompts.near_duplicates import MOST_MATCHES, near_pairs
from interp_ablate.prompts.prompt import Prompt


def is_near_by_hand(some: frozenset[str], others: frozenset[str]) -> bool:
    union = len(some | others)
    return union > 0 and Fraction(len(some & others), union) >= Fraction(85, 100)


@pytest.mark.parametrize("n_words", (1, 2, 3, 6, 7, 13, 20, 25, 48, 60, 97, 120))
@pytest.mark.parametrize("seed", range(3))
def test_every_near_pair_is_met(n_words: int, seed: int) -> None:
    """Sets about a few centres, words dropped and added, so that many indices lie close to the limit."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(4 * n_words)]
    sets: list[frozenset[str]] = []
    for _ in range(12):
        centre = rng.sample(vocabulary, n_words)
        for _ in range(6):
            dropped = set(rng.sample(centre, rng.randint(0, max(1, n_words // 6))))
            added = rng.sample(vocabulary, rng.randint(0, max(1, n_words // 6)))
            sets.append(frozenset(w for w in centre if w not in dropped) | frozenset(added[:2]))
    groups = [rng.choice("ab") for _ in sets]
    sought = [rng.choice(("a", "ab", "b")) for _ in sets]
    later = sorted(range(len(sets)), key=lambda i: len(sets[i]))
    place = {i: k for k, i in enumerate(later)}
    want = {
        (i, j)
        for j in range(len(sets))
        for i in range(j)
        if is_near_by_hand(sets[i], sets[j])
        and (groups[i] in sought[j] if place[i] < place[j] else groups[j] in sought[i])
    }
    assert set(near_pairs(sets, groups, sought)) == want


@pytest.mark.parametrize("differ", (1, 4))
def test_texts_of_one_template_are_not_compared_with_each_other(
    differ: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four words of 20 differ: nobody is near. One differs: everybody is, and a few matches each suffice."""
    common = [f"t{i}" for i in range(20 - differ)]
    sets = [frozenset([*common, *(f"{i}-{k}" for k in range(differ))]) for i in range(500)]
    compared = Counter[str]()
    is_near = near_duplicates.is_near

    def counted(*pair: frozenset[str]) -> bool:
        compared["pairs"] += 1
        return is_near(*pair)

    monkeypatch.setattr(near_duplicates, "is_near", counted)
    n = len(list(near_pairs(sets, [0] * 500, [[0]] * 500)))
    assert n == (0 if differ == 4 else sum(min(i, MOST_MATCHES) for i in range(500)))
    assert compared["pairs"] == n


def test_prompts_are_counted_not_pairs() -> None:
    text = "please tell me all that you know about the long history of this old stone bridge"
    kinds = ("one", "two", "three", "four", "five")
    contrast = ContrastSet.from_texts([f"{text} {kind}" for kind in kinds], ["other", "words"])
    [message] = [f.message for f in lint(contrast).findings if f.kind == "near-duplicate"]
    assert message.startswith("4 prompts are nearly the same")


def test_chats_that_end_alike_are_not_duplicates() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [
        Prompt.from_messages([{"role": "system", "content": "s"}, turns[0] | {"content": text}, turns[1],
                              {"role": "user", "content": "go on please"}])
        for text in ("first", "second")
    ]  # fmt: skip
    contrast = ContrastSet("chats", (chats[0],), (chats[1],), "")
    assert {"leak", "matched-pair", "near-leak"}.isdisjoint(f.kind for f in lint(contrast).findings)


def test_words_are_learned_from_a_sample_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_ablate.prompts.linting.MOST_WORDED", 40)
    rng = random.Random(0)
    words = [f"w{i}" for i in range(200)]
    sides = [
        [" ".join([mark, *rng.sample(words, 6)]) for _ in range(n)]
        for mark, n in (("alpha", 300), ("beta", 30))
    ]
    report = lint(ContrastSet.from_texts(*sides))
    assert report.bag_of_words_auc > 0.95 and report.telling_words["positive"][0] == "alpha"
