"""Lint: planted faults are found, and only those."""

from __future__ import annotations

import json

from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.linting import lint
from interp_ablate.prompts.prompt import Prompt


def make_set(n: int = 20, *, m: int | None = None) -> ContrastSet:
    return ContrastSet.from_texts(
        [f"positive number {i}" for i in range(n)],
        [f"negative number {i}" for i in range(n if m is None else m)],
        name="numbers",
    )


def kinds(contrast: ContrastSet) -> dict[str, str]:
    return {finding.kind: finding.severity for finding in lint(contrast).findings}


COMMON = "please tell me about the long history of that old stone village beside our river"
THINGS = [
    "bread",
    "cheese",
    "paper",
    "glass",
    "silk",
    "bridges",
    "boats",
    "gardens",
    "clocks",
    "coins",
    "maps",
    "lamps",
]


def test_lint_finds_duplicates_and_leaks() -> None:
    base = [f"{thing} {i}" for i, thing in enumerate(THINGS)]
    near = f"{COMMON} small town square"
    found = kinds(ContrastSet.from_texts([*base, near, near + "s", "x y", "X  y"], ["z"]))
    assert found["duplicate"] == found["near-duplicate"] == "warning"
    leak = kinds(ContrastSet.from_texts(["Order a pizza!", "b"], ["c", "order a pizza"]))
    assert leak["leak"] == "error"
    across = ContrastSet.from_texts([f"{COMMON} town now", "b c"], ["d e", f"{COMMON} town then"])
    assert kinds(across)["near-leak"] == "warning"
    paired = ContrastSet.from_texts([f"{COMMON} town now", "b c"], [f"{COMMON} town then", "d e"])
    assert kinds(paired)["matched-pair"] == "info" and "near-leak" not in kinds(paired)


def test_a_shared_system_prompt_makes_no_duplicates() -> None:
    contrast = ContrastSet.from_texts(THINGS[:6], THINGS[6:], system=COMMON + " and much more")
    assert {"near-duplicate", "near-leak", "leak", "matched-pair"}.isdisjoint(kinds(contrast))
    same = ContrastSet("x", (Prompt("hi", "be rude"),), (Prompt("hi", "be kind"),), "")
    assert "leak" not in kinds(same)


def test_lint_measures_words_and_length() -> None:
    rooms = [f"{a} {b}" for a in THINGS[:5] for b in THINGS[5:]]
    worded = lint(
        ContrastSet.from_texts([f"great {r}" for r in rooms], [f"awful {r}" for r in rooms])
    )
    assert worded.bag_of_words_auc > 0.99
    assert worded.telling_words == {"positive": ("great",), "negative": ("awful",)}
    assert [f.severity for f in worded.findings if f.kind == "bag-of-words"] == ["warning"]
    assert worded.length_auc == 0.5 and worded.length_difference == 0.0
    same_words = lint(ContrastSet.from_texts(rooms, [" ".join(r.split()[::-1]) for r in rooms]))
    assert abs(same_words.bag_of_words_auc - 0.5) < 0.1
    longer = lint(ContrastSet.from_texts([f"{r} and so on" for r in rooms], rooms))
    assert "length" in {f.kind for f in longer.of("warning")}
    assert longer.length_auc == 1.0
    assert longer.lengths["positive"]["words"] == {"mean": 5, "median": 5, "min": 5, "max": 5}


def test_near_duplicates_do_not_leak_between_folds() -> None:
    """Each side repeats a few prompts with small changes: easily learned by heart."""
    variants = ["", " ok", " hey"]
    sides = [
        [" ".join(f"{t}{i}" for i in range(6)) + v for t in THINGS[k::2] for v in variants]
        for k in (0, 1)
    ]
    assert lint(ContrastSet.from_texts(*sides)).bag_of_words_auc < 0.6


def test_lint_of_tiny_and_odd_sets() -> None:
    tiny = lint(ContrastSet.from_texts(["a"], ["b"]))
    assert (
        tiny.to_dict()["bag_of_words_auc"] is None and tiny.to_dict()["length_difference"] is None
    )
    json.dumps(tiny.to_dict(), allow_nan=False)
    wordless = lint(
        ContrastSet.from_texts(["?" * i for i in range(1, 9)], ["!" * i for i in range(1, 9)])
    )
    assert wordless.telling_words == {"positive": (), "negative": ()}
    one_word = lint(ContrastSet.from_texts([f"x{'!' * i}" for i in range(9)], THINGS[:9]))
    assert one_word.to_dict()
    chinese = lint(ContrastSet.from_texts(["今天天气怎么样"], ["天空为什么是蓝色的"]))
    assert chinese.lengths["positive"]["words"]["mean"] == 7
    uneven = kinds(make_set(10, m=3))
    assert uneven["imbalance"] == "warning" and uneven["size"] == "info"
    mixed = ContrastSet("x", (Prompt("a", "system"),), (Prompt("b"),), "")
    assert kinds(mixed)["system"] == "warning"
