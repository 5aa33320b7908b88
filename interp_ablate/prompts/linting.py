"""Lint: the faults of a contrast set that a direction made from it would pick up.

Knows: exact and near duplicates, leaks between the sides, lengths, and how well words alone tell the
sides apart. Does not know: files, tokenizers or models, nor what should be done about a finding; it
does not print: findings are data. numpy, scipy and scikit-learn are imported when `lint` runs.
"""

from __future__ import annotations

import math
import random
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from interp_ablate.prompts.contrast_set import ContrastSet, as_contrast
from interp_ablate.prompts.near_duplicates import is_near, near_pairs
from interp_ablate.prompts.prompt import Prompt, distinct, normalised, repeated

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing that `lint` has to say; `examples` are some of the prompts or words it is about."""

    kind: str
    severity: Severity
    message: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class LintReport:
    """What a direction made from this set might carry beside the concept.

    AUCs are the chance that a random positive prompt scores above a random negative one: 0.5 =
    tells nothing, 1 (or 0) = separates fully; NaN where there are too few prompts.
    `length_difference` is the difference of mean word counts, positive minus negative, over the
    pooled standard deviation.
    `lengths` is side -> words/characters -> mean/median/min/max; `telling_words` is side -> words.
    """

    name: str
    findings: tuple[Finding, ...]
    bag_of_words_auc: float
    length_auc: float
    length_difference: float
    lengths: dict[str, dict[str, dict[str, float]]]
    telling_words: dict[str, tuple[str, ...]]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: NaN becomes None."""
        plain = asdict(self)
        for key in ("bag_of_words_auc", "length_auc", "length_difference"):
            plain[key] = None if math.isnan(plain[key]) else plain[key]
        return plain


MOST_WORDED = 10_000  # prompts of a side whose words are learned from
# One character of a script written without spaces, or a word with its apostrophes.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:'[^\W{_CJK}]+)*")


def lint(contrast: ContrastSet) -> LintReport:
    """Faults of a contrast set that a direction made from it would pick up.

    Reports exact and near duplicates inside a side (Jaccard index of the word sets at least
    NEAR_DUPLICATE), leaks between the sides, length imbalance, and how well a bag of words alone
    separates the sides (five-fold cross-validated logistic regression; near duplicates and matched
    pairs stay in one fold; of more than MOST_WORDED prompts a side, on so many). Prompts with different system
    prompts or turns before are not duplicates; lengths and bags of words include the system prompt.
    """
    from interp_ablate.stats.intervals import auc

    prompts = as_contrast(contrast).positive + contrast.negative
    words = [_words(f"{prompt.system or ''}\n{prompt.text}") for prompt in prompts]
    labels = [True] * len(contrast.positive) + [False] * len(contrast.negative)
    keys = [normalised(prompt) for prompt in prompts]
    near = _near_pairs(contrast, keys)
    groups = _groups(contrast, keys, near)
    sample = _sample(contrast, groups)
    worded, labelled = [words[i] for i in sample], [labels[i] for i in sample]
    words_auc = _bag_of_words_auc(worded, labelled, [groups[i] for i in sample])
    telling = _telling_words(worded, labelled)
    n_words = [float(len(w)) for w in words]
    length_auc, difference = auc(n_words, labels), _standardised_difference(n_words, labels)
    findings = [
        *_duplicate_findings(contrast, near),
        *_length_findings(contrast, length_auc, difference),
        *_word_findings(words_auc, telling),
        *_size_findings(contrast),
    ]
    findings.sort(key=lambda finding: ("error", "warning", "info").index(finding.severity))
    lengths = {
        "positive": _lengths(contrast.positive, words[: len(contrast.positive)]),
        "negative": _lengths(contrast.negative, words[len(contrast.positive) :]),
    }
    return LintReport(
        contrast.name, tuple(findings), words_auc, length_auc, difference, lengths, telling
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold().replace("’", "'"))


def _near_pairs(contrast: ContrastSet, keys: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs i < j of different prompts that are nearly the same, under the same system prompt and turns.

    Of many that are alike, each has some pairs, not all; of a matched pair it is always known.
    """
    prompts = contrast.positive + contrast.negative
    n_positive = len(contrast.positive)
    places: dict[tuple[bool, str], int] = {}
    for i, key in enumerate(keys):
        places.setdefault((i < n_positive, key), i)
    firsts = list(places.values())  # of each side's prompts
    words = [frozenset(_words(prompts[i].text)) for i in firsts]
    groups = [(i < n_positive, prompts[i].system, prompts[i].history) for i in firsts]
    sought = [((True, *rest), (False, *rest)) for _, *rest in groups]
    pairs = {(firsts[i], firsts[j]) for i, j in near_pairs(words, groups, sought)}
    if _matched(contrast):
        where = {i: k for k, i in enumerate(firsts)}
        for i, j in zip(range(n_positive), range(n_positive, len(prompts))):
            a, b = where.get(i), where.get(j)
            if a is not None and b is not None and groups[a][1:] == groups[b][1:]:
                pairs |= {(i, j)} if is_near(words[a], words[b]) else set()
    return sorted(pairs)


def _matched(contrast: ContrastSet) -> bool:
    return len(contrast.positive) == len(contrast.negative)


def _groups(
    contrast: ContrastSet, keys: Sequence[str], near: Sequence[tuple[int, int]]
) -> list[int]:
    """A group for each prompt: repeats, near duplicates, and prompts of a matched pair, share theirs."""
    n_positive = len(contrast.positive)
    pairs = [(i, n_positive + i) for i in range(n_positive)] if _matched(contrast) else []
    first: dict[str, int] = {}
    repeats = [(first.setdefault(key, i), i) for i, key in enumerate(keys)]
    return _components(len(keys), [*near, *pairs, *repeats])


def _components(n: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Of each of n nodes, a number that those share which pairs connect."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = np.array([*pairs], dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(ends.shape[1], bool), tuple(ends)), shape=(n, n))
    return connected_components(graph, directed=False)[1].tolist()


def _sample(contrast: ContrastSet, groups: Sequence[int]) -> list[int]:
    """Whole groups of prompts, the same ones every time, until each side has MOST_WORDED or all of its prompts."""
    n_positive = len(contrast.positive)
    if max(n_positive, len(contrast.negative)) <= MOST_WORDED:
        return list(range(len(groups)))
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    chosen, room = list[int](), {True: MOST_WORDED, False: MOST_WORDED}
    for group in random.Random(0).sample(list(members), len(members)):
        sides = Counter(i < n_positive for i in members[group])
        if all(room[side] > 0 for side in sides):
            chosen += members[group]
            for side, n in sides.items():
                room[side] -= n
    return sorted(chosen)


def _bag_of_words_auc(
    words: Sequence[Sequence[str]], labels: Sequence[bool], groups: Sequence[int]
) -> float:
    """AUC of the pooled held-out scores; NaN where five-fold validation is not possible."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    from interp_ablate.stats.intervals import auc

    y = np.array(labels)
    if min(y.sum(), (~y).sum()) < 5 or len(set(groups)) < 5 or not any(words):
        return math.nan
    scores = np.zeros(len(y))
    folds = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=0)
    for train, test in folds.split(np.zeros(len(y)), y, groups):
        if len(test) == 0 or y[train].all() or not y[train].any():
            continue  # one group holds a whole side: nothing to learn from the rest
        seen = [words[i] for i in train]
        if not any(seen):
            continue
        vectorizer = CountVectorizer(analyzer=list)
        features = vectorizer.fit_transform(seen)
        model = LogisticRegression(max_iter=1000).fit(features, y[train])
        scores[test] = model.decision_function(vectorizer.transform([words[i] for i in test]))
    return auc(scores, labels)


def _telling_words(
    words: Sequence[Sequence[str]], labels: Sequence[bool], n: int = 8
) -> dict[str, tuple[str, ...]]:
    """The words that weigh most in a logistic regression on all prompts, for each side."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    if not any(words):
        return {"positive": (), "negative": ()}
    vectorizer = CountVectorizer(analyzer=list)
    features = vectorizer.fit_transform(words)
    weights = LogisticRegression(max_iter=1000).fit(features, labels).coef_[0]
    ranked = sorted(zip(weights.tolist(), vectorizer.get_feature_names_out(), strict=True))
    least = max(1e-6, 0.05 * float(abs(weights).max()))
    return {
        "positive": tuple(str(word) for weight, word in ranked[::-1][:n] if weight >= least),
        "negative": tuple(str(word) for weight, word in ranked[:n] if weight <= -least),
    }


def _standardised_difference(values: Sequence[float], labels: Sequence[bool]) -> float:
    """Cohen's d: difference of means over the pooled standard deviation; NaN below 2 a side."""
    labelled = list(zip(values, labels, strict=True))
    sides = [[value for value, label in labelled if label is side] for side in (True, False)]
    if min(map(len, sides)) < 2:
        return math.nan
    difference = statistics.fmean(sides[0]) - statistics.fmean(sides[1])
    degrees = [len(side) - 1 for side in sides]
    pooled = math.sqrt(
        sum(k * statistics.variance(side) for k, side in zip(degrees, sides, strict=True))
        / sum(degrees)
    )
    if pooled:
        return difference / pooled
    return math.copysign(math.inf, difference) if difference else 0.0


def _lengths(
    prompts: Sequence[Prompt], words: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    def summary(values: Sequence[int]) -> dict[str, float]:
        return {
            "mean": float(statistics.fmean(values)),
            "median": float(statistics.median(values)),
            "min": float(min(values)),
            "max": float(max(values)),
        }

    characters = [len(prompt.system or "") + len(prompt.text) for prompt in prompts]
    return {"words": summary([len(w) for w in words]), "characters": summary(characters)}


def _duplicate_findings(contrast: ContrastSet, near: Sequence[tuple[int, int]]) -> list[Finding]:
    prompts = contrast.positive + contrast.negative
    n_positive = len(contrast.positive)
    findings = []
    again = repeated(contrast.positive) + repeated(contrast.negative) + contrast.duplicates
    if again:
        text = f"{len(again)} prompts repeat one of their own side; each counts once in a split"
        findings.append(Finding("duplicate", "warning", text, _examples(again)))
    kinds: dict[str, list[tuple[int, int]]] = {kind: [] for kind in _NEAR_KINDS}
    for i, j in near:
        if (i < n_positive) == (j < n_positive):
            kinds["near-duplicate"].append((i, j))
        elif _words(prompts[i].text) == _words(prompts[j].text):
            kinds["leak"].append((i, j))
        elif _matched(contrast) and j == n_positive + i:
            kinds["matched-pair"].append((i, j))
        else:
            kinds["near-leak"].append((i, j))
    for kind, pairs in kinds.items():
        severity, text = _NEAR_KINDS[kind]
        shown = tuple(f"{prompts[i].text} | {prompts[j].text}" for i, j in pairs[:5])
        n = len({i for i, _ in pairs})
        if kind == "near-duplicate" and pairs:
            n = len(prompts) - len(set(_components(len(prompts), pairs)))
        if pairs:
            findings.append(Finding(kind, severity, f"{n} {text}", shown))
    return findings


_NEAR_KINDS: dict[str, tuple[Severity, str]] = {
    "leak": (
        "error",
        "positive prompts are in the negative set too but for punctuation: remove them from one",
    ),
    "near-leak": (
        "warning",
        "positive prompts are nearly the same as a negative one that is not their pair: keep one",
    ),
    "near-duplicate": (
        "warning",
        "prompts are nearly the same as another of their side: keep one of each kind",
    ),
    "matched-pair": ("info", "matched pairs differ in a word or two, which is what pairs are for"),
}


def _examples(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    return tuple(prompt.text for prompt in prompts[:5])


def _length_findings(contrast: ContrastSet, auc: float, difference: float) -> list[Finding]:
    if abs(auc - 0.5) < 0.15 and not abs(difference) >= 0.5:
        return []
    longer = "positive" if auc > 0.5 or difference > 0 else "negative"
    by_length = sorted(getattr(contrast, longer), key=lambda prompt: -len(prompt.text))
    text = (
        f"the {longer} prompts are longer (word count alone: AUC {auc:.2f}, difference "
        f"{difference:+.2f} standard deviations): a direction may carry length; match the lengths"
    )
    return [Finding("length", "warning", text, _examples(by_length)[:3])]


def _word_findings(auc: float, telling: dict[str, tuple[str, ...]]) -> list[Finding]:
    if math.isnan(auc):
        text = "too few different prompts to measure how well words alone separate the sets"
        return [Finding("bag-of-words", "info", text)]
    shown = tuple(f"{side}: {', '.join(words)}" for side, words in telling.items() if words)
    text = f"a bag of words alone separates the sets with AUC {auc:.2f}"
    if auc >= 0.9:
        text += ": a direction may carry these words rather than the concept; vary the wording"
        return [Finding("bag-of-words", "warning", text, shown)]
    return [Finding("bag-of-words", "info", text, shown)] if auc >= 0.7 else []


def _size_findings(contrast: ContrastSet) -> list[Finding]:
    n_positive, n_negative = len(distinct(contrast.positive)), len(distinct(contrast.negative))
    findings = []
    counts = f"{n_positive} positive and {n_negative} negative different prompts"
    if max(n_positive, n_negative) > 2 * min(n_positive, n_negative):
        findings.append(Finding("imbalance", "warning", f"{counts}: more than two to one"))
    if min(n_positive, n_negative) < 128:
        text = f"{counts}: the default split (64 + 32 + 32) needs 128 of each; pass smaller sizes"
        findings.append(Finding("size", "info", text))
    shares = [
        statistics.fmean(prompt.system is not None for prompt in side)
        for side in (contrast.positive, contrast.negative)
    ]
    if abs(shares[0] - shares[1]) > 0.1:
        text = (
            f"{shares[0]:.0%} of the positive and {shares[1]:.0%} of the negative prompts have a "
            "system prompt: a direction may carry its presence; give both sides one"
        )
        findings.append(Finding("system", "warning", text))
    return findings
