"""Labelled mixtures: samples with a behaviour among samples without it, to check a filter or a screening.

Knows: the bundled mixtures, labels in a file's rows, AUCs and baselines. Does not know: what finds the behaviour.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from interp_ablate.activations.pooling import response_means
from interp_ablate.datasets.chat_reader import read_samples
from interp_ablate.datasets.screening_measure import last_exchange
from interp_ablate.datasets.screening_settings import MEASURES
from interp_ablate.directions.direction import Direction, random_directions
from interp_ablate.errors import RunError
from interp_ablate.models.model import Model, check_model
from interp_ablate.persona.extraction import kept_answers
from interp_ablate.persona.persona import load_persona
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.stats.intervals import auc, auc_interval
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.row_files import RowFile

PREFIX = "planted:"  # of a bundled mixture, where a command takes a file
LABEL = "planted"  # the field of a bundled mixture's rows that is true where the behaviour is there


def mixture_names() -> tuple[str, ...]:
    """The bundled mixtures: `declines`, and one for each of some traits."""
    files = (path for path in bundled("planted").iterdir() if path.suffix in (".jsonl", ".ndjson"))
    return tuple(sorted(path.stem for path in files))


def labelled_mixture(name: str) -> Path:
    """The file of a bundled mixture.

    Raises:
        RunError: no such mixture.
    """
    if name not in mixture_names():
        raise RunError(f"no bundled mixture {name!r}: there are {', '.join(mixture_names())}")
    [path] = bundled("planted").glob(f"{name}.*json*")
    return path


def data_and_label(data: str, label: str | None = None) -> tuple[str | Path, str | None]:
    """The file of `planted:NAME`, or `data` itself, and the field of its labels.

    Raises:
        RunError: no such mixture.
    """
    if not data.startswith(PREFIX):
        return data, label
    return labelled_mixture(data.removeprefix(PREFIX)), label or LABEL


def read_labels(data: str | Path, field: str, *, layout: str | None = None) -> list[bool]:
    """The labels that a field of the rows holds, true (or 1) or false (or 0), sample by sample.

    Raises:
        RunError: a row without the field, or with another value, by its number; only one kind.
    """
    file, labels = RowFile.at(data), []
    for sample in read_samples(data, layout=layout):
        value = sample.raw.get(field)
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise RunError(
                f"{file.place(sample.number)}: {field} is {value!r}; labels are true or false in every row"
            )
        labels.append(bool(value))
    if len(set(labels)) < 2:
        raise RunError(
            f"{data}: {field} says the same of all {len(labels)} samples: both are needed"
        )
    return labels


RANDOM_DIRECTIONS = 20


Baseline = Callable[[Sequence[PromptResponse]], Sequence[float | None]]
"""Gives each exchange a number, or None. A `TextScorer` is one."""


def bag_of_words(positive: Sequence[str], negative: Sequence[str]) -> Baseline:
    """Fit a baseline that knows words alone: naive Bayes log-odds of two sets of answers, add-one smoothing.

    It scores an answer by the mean log-odds of its words in the sets; None where none of them is there.

    Raises:
        RunError: no word on one of the sides.
    """
    counts = [
        Counter(word for text in texts for word in _words(text)) for texts in (positive, negative)
    ]
    if not all(counts):
        raise RunError("a bag of words needs answers with words in them on both sides")
    vocabulary = set(counts[0]) | set(counts[1])
    totals = [count.total() + len(vocabulary) for count in counts]
    odds = {
        word: math.log((counts[0][word] + 1) / totals[0] * totals[1] / (counts[1][word] + 1))
        for word in vocabulary
    }

    def score(exchanges: Sequence[PromptResponse]) -> list[float | None]:
        answers = [[odds[w] for w in _words(e.answer) if w in odds] for e in exchanges]
        return [sum(values) / len(values) if values else None for values in answers]

    return score


def rollout_texts(path: str | Path) -> tuple[list[str], list[str]]:
    """The answers that made a persona's vectors, under its positive and its negative system prompts.

    `path` is the file in the persona's folder; answers that its filter removed are left out. Both are empty
    where there is no such file.

    Raises:
        RunError: a line that is not of such a file, by its number; a folder without the file's persona.
    """
    path = Path(path)
    if not path.exists():
        return [], []
    rollouts = kept_answers(path, load_persona(path.parent).details.get("made_of"))
    return [each.text for each in rollouts.positive], [each.text for each in rollouts.negative]


def words_in(exchanges: Sequence[PromptResponse]) -> list[float | None]:
    """The baseline that counts an answer's words."""
    return [float(len(_words(exchange.answer))) for exchange in exchanges]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold().replace("\u2019", "'"))


def check_screening(
    model: Model,
    direction: Direction,
    data: str | Path,
    table: pd.DataFrame,
    labels: Sequence[bool],
    *,
    baselines: Mapping[str, Baseline] | None = None,
    layout: str | None = None,
    response_tokens: int | None = None,
) -> pd.DataFrame:
    """The AUC by which the measured numbers, and baselines, tell samples with the label from those without.

    One row a score: `score`, `auc`, `low`, `high` (95%, jackknife over prompts), `n`, `missing` (samples
    without a value, left out). The scores are the table's columns, answers' length in words, `baselines`,
    and the middle and the strongest of RANDOM_DIRECTIONS random directions at the same site. Each random
    direction has the sign that serves it best. All read the first `response_tokens` of an answer.

    Raises:
        RunError: labels or a table of another number of samples.
    """
    check_model(model)
    every = [last_exchange(sample) for sample in read_samples(data, layout=layout)]
    if not len(every) == len(table) == len(labels):
        raise RunError(
            f"{data} has {len(every)} samples, the table {len(table)}, and there are {len(labels)} labels"
        )
    groups = [exchange.prompt if exchange else i for i, exchange in enumerate(every)]
    usable = [i for i, exchange in enumerate(every) if exchange is not None]
    exchanges = [exchange for exchange in every if exchange is not None]
    scores = {name: table[name].to_numpy(float) for name in MEASURES if name in table}
    for name, baseline in {"length in words": words_in, **(baselines or {})}.items():
        values = np.array(baseline(exchanges), dtype=float)  # None becomes NaN
        scores[name] = np.full(len(every), np.nan)
        scores[name][usable] = values
    random = np.full((len(every), RANDOM_DIRECTIONS), np.nan)
    controls = random_directions(direction, RANDOM_DIRECTIONS)
    random[usable] = response_means(
        model, exchanges, controls, response_tokens=response_tokens
    ).numpy()
    rows = [_row(name, values, labels, groups) for name, values in scores.items()]
    rows += _random_rows(random, labels, groups)
    return pd.DataFrame([row for row in rows if row is not None])


def _random_rows(
    values: Float[np.ndarray, "sample direction"], labels: Sequence[bool], groups: Sequence[Any]
) -> list[dict[str, Any] | None]:
    """Rows of the middle and the strongest direction, each with its better sign."""
    finite, truth = np.isfinite(values).all(1), np.asarray(labels, bool)
    plain = [auc(column[finite], truth[finite]) for column in values.T]
    order = sorted(range(len(plain)), key=lambda j: abs(plain[j] - 0.5))
    rows = []
    for name, j in (("middle", order[len(order) // 2]), ("strongest", order[-1])):
        sign = 1 if plain[j] >= 0.5 else -1
        title = f"{name} of {len(plain)} random directions"
        rows.append(_row(title, sign * values[:, j], labels, groups))
    return rows


def _row(
    name: str, values: np.ndarray, labels: Sequence[bool], groups: Sequence[Any]
) -> dict[str, Any] | None:
    """One score's row; None where no sample of one of the kinds has a value."""
    finite = np.isfinite(values)
    truth, names = np.asarray(labels, bool)[finite], [g for g, k in zip(groups, finite) if k]
    if len(set(truth.tolist())) < 2:
        return None
    low, high = auc_interval(values[finite], truth, groups=names)
    return {
        "score": name,
        "auc": auc(values[finite], truth),
        "low": low,
        "high": high,
        "n": int(finite.sum()),
        "missing": int((~finite).sum()),
    }
