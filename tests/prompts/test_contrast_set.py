"""Prompts: what a set refuses, the split, shuffled labels, the bundled sets."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from interp_ablate.errors import PromptError
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.linting import lint
from interp_ablate.prompts.prompt import Prompt, normalised
from interp_ablate.prompts.readers import bundled_names


def make_set(n: int = 20, *, m: int | None = None) -> ContrastSet:
    return ContrastSet.from_texts(
        [f"positive number {i}" for i in range(n)],
        [f"negative number {i}" for i in range(n if m is None else m)],
        name="numbers",
    )


def texts(side: tuple[Prompt, ...]) -> list[str]:
    return [prompt.text for prompt in side]


def keys(contrast: ContrastSet) -> set[str]:
    return {normalised(p) for p in contrast.positive + contrast.negative}


# --------------------------------------------------------------------------------- the set


def test_a_set_needs_both_sides_and_prompts() -> None:
    with pytest.raises(PromptError, match="0 positive and 1 negative"):
        ContrastSet("x", (), (Prompt("a"),), "memory")
    with pytest.raises(PromptError, match="1 positive and 0 negative"):
        ContrastSet.from_texts(["a"], [])
    with pytest.raises(PromptError, match="from_texts"):
        ContrastSet("x", ("a",), (Prompt("b"),), "memory")  # type: ignore[arg-type]
    assert isinstance(ContrastSet("x", [Prompt("a")], [Prompt("b")], "").positive, tuple)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "  \n\t", None, 3, b"bytes"])
def test_a_prompt_needs_text(text: object) -> None:
    with pytest.raises(PromptError):
        Prompt(text)  # type: ignore[arg-type]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(PromptError, match="surrogate"):
        Prompt("half an emoji \ud83d")


def test_the_same_prompt_on_both_sides_is_shown() -> None:
    with pytest.raises(PromptError, match="Tell  me a JOKE") as caught:
        ContrastSet.from_texts(["Tell  me a JOKE", "other"], ["tell me a joke ", "third"])
    assert "other" not in str(caught.value)
    # Not the same prompt: another system prompt, which is how traits are contrasted.
    ContrastSet("x", (Prompt("hi", "be rude"),), (Prompt("hi", "be kind"),), "memory")


def test_fingerprint_is_of_the_content_only() -> None:
    first = ContrastSet.from_texts(["a"], ["b"])
    assert (
        first.fingerprint == ContrastSet.from_texts(["a"], ["b"], name="y", source="z").fingerprint
    )
    assert len(first.fingerprint) == 64
    others = [
        ContrastSet.from_texts(["b"], ["a"]),
        ContrastSet.from_texts(["a"], ["b"], system=""),
        ContrastSet.from_texts(["a", "c"], ["b"]),
        ContrastSet.from_texts(["A"], ["b"]),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


# --------------------------------------------------------------------------------- split


def test_split_is_disjoint_and_of_the_sizes_asked_for() -> None:
    split = make_set().split(10, 6, 4)
    parts = [split.train, split.validation, split.test]
    assert [(len(p.positive), len(p.negative)) for p in parts] == [(10, 10), (6, 6), (4, 4)]
    assert sum(len(keys(p)) for p in parts) == len(set().union(*map(keys, parts))) == 40
    assert {p.name for p in parts} == {"numbers"}


def test_split_is_the_same_everywhere() -> None:
    """Pinned: a change here changes every published number."""
    split = make_set().split(10, 6, 4, seed=0)
    assert split == make_set().split(10, 6, 4, seed=0)
    assert split != make_set().split(10, 6, 4, seed=1)
    assert texts(split.test.positive) == PINNED_TEST
    code = (
        "from interp_ablate.prompts.contrast_set import ContrastSet as C;"
        "c = C.from_texts([f'positive number {i}' for i in range(20)],"
        "[f'negative number {i}' for i in range(20)]);"
        "print([p.text for p in c.split(10, 6, 4).test.positive])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2], env={"PYTHONHASHSEED": "7", "PATH": ""},
    )  # fmt: skip
    assert out.stdout.strip() == str(PINNED_TEST)


PINNED_TEST = [f"positive number {i}" for i in (18, 3, 10, 0)]


def test_split_does_not_depend_on_order_and_keeps_the_test_part() -> None:
    contrast = make_set()
    back = ContrastSet("x", contrast.positive[::-1], contrast.negative[::-1], "")
    assert keys(contrast.split(10, 6, 4).test) == keys(back.split(10, 6, 4).test)
    assert contrast.split(10, 6, 4).test == contrast.split(3, 1, 4).test


def test_matched_pairs_stay_together() -> None:
    split = make_set().split(10, 6, 4)
    for part in (split.train, split.validation, split.test):
        pairs = zip(part.positive, part.negative, strict=True)
        assert all(p.text.split()[-1] == n.text.split()[-1] for p, n in pairs)


def test_duplicates_never_reach_two_parts() -> None:
    contrast = ContrastSet.from_texts(
        ["A", "a ", " A", "b", "c", "d"], ["1", "2", "2", "2 ", "3", "4"]
    )
    split = contrast.split(2, 1, 1)
    assert sum(len(keys(p)) for p in (split.train, split.validation, split.test)) == 8
    with pytest.raises(PromptError, match="4 positive and 4 negative different"):
        contrast.split(3, 1, 1)


def test_sides_of_different_length() -> None:
    split = make_set(20, m=8).split(4, 2, 2)
    assert len(split.train.negative) == len(split.train.positive) == 4


@pytest.mark.parametrize("sizes", [(4, 2, 0), (0, 1, 1), (4, -1, 1), (1.5, 1, 1), (True, 1, 1)])
def test_three_sets_are_three(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(PromptError, match="three different sets"):
        make_set().split(*sizes)


def test_a_side_too_small_says_what_fits() -> None:
    with pytest.raises(PromptError) as caught:
        make_set(20, m=12).split()
    message = str(caught.value)
    assert "20 positive and 12 negative" in message and "128 of each" in message
    assert "n_train=6, n_validation=3, n_test=3" in message
    make_set(20, m=12).split(6, 3, 3)
    with pytest.raises(PromptError, match="n_train=2, n_validation=1, n_test=1"):
        make_set(4).split(64, 1, 1)
    with pytest.raises(PromptError, match="at least 3 of each"):
        make_set(2).split(1, 1, 1)


# --------------------------------------------------------------------------------- bundled sets


BUNDLED = (
    *("bad_news", "code", "declining", "first_person", "formality", "language", "listing"),
    *("questions", "sentiment"),
)


def test_bundled_names() -> None:
    assert bundled_names() == BUNDLED
    provenance = resources.files("interp_ablate").joinpath("data", "PROVENANCE.md").read_text()
    assert all(f"`{name}`" in provenance for name in bundled_names())


@pytest.mark.parametrize("name", BUNDLED)
def test_the_contract_of_the_bundled_sets(name: str) -> None:
    contrast = ContrastSet.load(name)
    assert len(contrast.positive) == len(contrast.negative) == 128
    assert contrast.duplicates == () and contrast.source == f"bundled:{name}"
    report = lint(contrast)
    assert report.of("error") == ()
    assert {f.kind for f in report.findings} <= {"bag-of-words", "matched-pair"}
    means = [report.lengths[side]["words"]["mean"] for side in ("positive", "negative")]
    assert max(means) / min(means) < 1.05 and abs(report.length_auc - 0.5) < 0.05
    split = contrast.split()
    assert [len(p.positive) for p in (split.train, split.validation, split.test)] == [64, 32, 32]


@pytest.mark.parametrize("name", ["code", "first_person", "formality", "listing", "questions"])
def test_pairs_of_these_sets_have_the_same_words(name: str) -> None:
    """Only their order differs, so that no bag of words and no length can tell the two apart."""
    contrast = ContrastSet.load(name)
    for p, n in zip(contrast.positive, contrast.negative, strict=True):
        words = [
            sorted(re.findall(r"[\w+#']+", re.sub(r"\ban\b", "a", each.text.lower())))
            for each in (p, n)
        ]
        assert words[0] == words[1] and p.text != n.text


@pytest.mark.parametrize("name", sorted(set(BUNDLED) - {"declining", "language", "sentiment"}))
def test_lint_has_no_warning_of_the_sets_of_the_league(name: str) -> None:
    report = lint(ContrastSet.load(name))
    assert report.of("error") == report.of("warning") == () and report.bag_of_words_auc < 0.9


def test_pairs_of_language_differ_in_the_language_only() -> None:
    contrast = ContrastSet.load("language")
    for p, n in zip(contrast.positive, contrast.negative, strict=True):
        assert p.text.replace("French", "English") == n.text and p.text != n.text


def test_a_split_by_shares() -> None:
    contrast = make_set(41, m=40)
    split = contrast.split(0.5, 0.25, 0.25)
    assert [len(part.positive) for part in (split.train, split.validation, split.test)] == [
        20,
        10,
        10,
    ]
    assert split == contrast.split(20, 10, 10)
    few = make_set(3, m=3).split(0.9, 0.05, 0.05)
    assert len(few.train.positive) == len(few.test.negative) == 1
    half = contrast.split(0.25, 0.125, 0.125)
    assert len(half.train.negative) == 10 and len(half.test.negative) == 5
    for wrong in ((0.5, 0.5, 0.5), (0.5, 10, 10), (0.5, 0.0, 0.25), (-0.1, 0.5, 0.5)):
        with pytest.raises(PromptError, match="shares"):
            contrast.split(*wrong)
