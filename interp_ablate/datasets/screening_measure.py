"""The projection of every sample's answer on a direction, kept in a store as it is measured.

Knows: the store, and the model's own answers. Does not know: thresholds, or how a direction was made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.activations.pooling import project_responses
from interp_ablate.datasets.chat_reader import read_samples
from interp_ablate.datasets.conversations import Sample
from interp_ablate.datasets.screening_settings import ScreeningSettings
from interp_ablate.directions.direction import Direction
from interp_ablate.errors import RunError
from interp_ablate.jobs.bars import bar
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.rendering import rendering
from interp_ablate.prompts.chat_format import ReadPart
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.storage.json_shapes import NONE, NUMBER
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.row_files import RowFile

logger = logging.getLogger(__name__)


FORMAT = "interp_ablate.screening/1"
COLUMNS = ("number", "projection", "own", "difference")
_VALUES = [(NONE, *NUMBER)]
_PART = {"start": int, "number": [int], "projection": _VALUES, "own": _VALUES}
FEWEST_FITTED = 10  # samples with a value, for a slope


DEFAULTS = ScreeningSettings()


def model_answers(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = ScreeningSettings.max_new_tokens,
    batch_size: int | None = None,
) -> list[str]:
    """The model's own greedy answer to every prompt; a prompt that is there twice is answered once.

    A prompt that leaves no room for `max_new_tokens` (and a thought) in the context gets the empty answer.
    """
    encoded = {prompt: model.encode(prompt) for prompt in dict.fromkeys(prompts)}
    opened = [model.thinking.is_opened(row) for row in encoded.values()]
    most = model.thinking.budget(opened, max_new_tokens).most
    fits = [prompt for prompt, row in encoded.items() if len(row) + most <= model.tl.cfg.n_ctx]
    if not fits:
        return [""] * len(prompts)
    made = model.generate(fits, max_new_tokens=max_new_tokens, batch_size=batch_size)
    answers = {prompt: generation.text for prompt, generation in zip(fits, made)}
    return [answers.get(prompt, "") for prompt in prompts]


# ---- a file -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileSummary:
    """Counts of a file's samples."""

    samples: int
    rounds: int
    """Samples with earlier rounds, which are not read."""
    unanswered: int
    """Samples without an answer."""


def summarise_file(data: str | Path, *, layout: str | None = None) -> FileSummary:
    """Count a file's samples, before anything is computed.

    Raises:
        RowFileError: a row that cannot be used, with its line.
    """
    samples = rounds = unanswered = 0
    for sample in read_samples(data, layout=layout):
        samples += 1
        rounds += len(sample.turns()) > 1
        unanswered += last_exchange(sample) is None
    return FileSummary(samples, rounds, unanswered)


def last_exchange(sample: Sample, read: ReadPart = "answer") -> PromptResponse | None:
    """A sample's last answer with the user's message before it; None where one of them is missing or blank."""
    turns = sample.turns("last", read=read)
    if not turns or not turns[0].answer.strip() or not turns[0].is_asked:
        return None
    return turns[0].exchange


def measure_samples(
    model: Model,
    direction: Direction,
    data: str | Path,
    store: str | Path,
    *,
    settings: ScreeningSettings = DEFAULTS,
    layout: str | None = None,
    total: int | None = None,
) -> pd.DataFrame:
    """Measure every sample: its projection, that of the model's own answer, and their difference.

    Numbers are appended to `store` and not measured again when the call is repeated; samples are in memory
    `settings.rows` at a time. `total` says how many there are, where that is known. The columns are COLUMNS; NaN where there is nothing to measure.

    Raises:
        RowFileError: a row that cannot be used, with its line.
        RunError: a store of other data, settings, direction or model; own answers for which no prompt leaves room.
    """
    check_model(model)
    room = model.tl.cfg.n_ctx - model.thinking.budget((), settings.max_new_tokens).most
    if settings.own and room < 1:
        raise RunError(
            f"max_new_tokens={settings.max_new_tokens} (and a thought) leave no room for a prompt: "
            f"{model.source.name} takes {model.tl.cfg.n_ctx} tokens"
        )
    lines = _store(model, direction, data, Path(store), settings, layout)
    with lines.open() as done, bar(f"samples of {Path(data).name}", total) as advance:
        parts: dict[int, dict[str, Any]] = {}
        for place, part in enumerate(done, 2):
            if len({len(part[name]) for name in COLUMNS[:3]}) > 1:
                raise lines.corrupt(place, "its columns have several lengths")
            parts[part["start"]] = part
        start = 0
        for samples in _chunks(read_samples(data, layout=layout), settings.rows):
            if start not in parts:
                part = {"start": start, **_measured(model, direction, samples, settings)}
                lines.append(part)
                parts[start] = part
            start += len(samples)
            advance(len(samples))
    ordered = [parts[key] for key in sorted(parts)]
    frame = pd.DataFrame({name: [x for p in ordered for x in p[name]] for name in COLUMNS[:3]})
    if len(frame) != start:
        raise RunError(f"{store} holds {len(frame)} samples of {start}: delete it and run again")
    frame[["projection", "own"]] = frame[["projection", "own"]].astype(float)
    return frame.assign(difference=frame["projection"] - frame["own"])


def _store(
    model: Model,
    direction: Direction,
    data: str | Path,
    path: Path,
    settings: ScreeningSettings,
    layout: str | None,
) -> JsonlLog:
    plan = model.active_plan
    identity = {
        "data": RowFile.at(data).fingerprint(),
        "layout": layout,
        "model": model.fingerprint,
        "rendering": rendering(model),
        "plan": plan.fingerprint if len(plan) else None,
        "direction": direction.fingerprint,
        "settings": {k: v for k, v in asdict(settings).items() if k not in _FREE},
    }
    lost = "its samples are measured again"
    return JsonlLog(path, identity, kind="screening", format=FORMAT, lost=lost, shape=_PART)


_FREE = ("batch_size",)  # a setting that no number depends on


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    waiting = iter(samples)
    while chunk := list(islice(waiting, size)):
        yield chunk


def _measured(
    model: Model, direction: Direction, samples: Sequence[Sample], settings: ScreeningSettings
) -> dict[str, Any]:
    """One line of the store: numbers, projections, own projections (None where there is nothing)."""
    every = [last_exchange(sample, model.chat_format.read) for sample in samples]
    exchanges = [exchange for exchange in every if exchange is not None]
    limits = {"response_tokens": settings.response_tokens, "batch_size": settings.batch_size}
    own: list[float | None] = [None] * len(exchanges)
    if settings.own and exchanges:
        prompts = [exchange.prompt for exchange in exchanges]
        answers = model_answers(
            model, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
        )
        pairs = [PromptResponse(prompt, answer) for prompt, answer in zip(prompts, answers)]
        distinct = list(dict.fromkeys(pairs))
        values = dict(zip(distinct, project_responses(model, distinct, direction, **limits)))
        own = [values[pair] for pair in pairs]
    projections = iter(project_responses(model, exchanges, direction, **limits))
    own_projections = iter(own)
    return {
        "number": [sample.number for sample in samples],
        "projection": [None if exchange is None else next(projections) for exchange in every],
        "own": [None if exchange is None else next(own_projections) for exchange in every],
    }


def baseline_slope(table: pd.DataFrame) -> float:
    """Least-squares slope of the projection on that of the model's own answer, over a table's samples.

    The own answer shows what the prompt alone brings, with noise of its own. Subtracting all of it puts that
    noise into the difference; subtracting the slope times it does not. No label is looked at. The slope is 1
    (the plain difference) where fewer than FEWEST_FITTED samples have a value, or theirs are all alike.
    """
    values = table[["projection", "own"]].dropna()
    x, y = values["own"].to_numpy(float), values["projection"].to_numpy(float)
    if len(values) < FEWEST_FITTED or np.ptp(x) <= 1e-9 * max(1.0, float(np.abs(x).max())):
        logger.warning(
            "%d samples with a value are too few or too alike for a slope: 1 is used", len(x)
        )
        return 1.0
    return float(np.cov(x, y)[0, 1] / x.var(ddof=1))


def baseline_adjusted(table: pd.DataFrame, slope: float) -> pd.DataFrame:
    """The table with the column `adjusted`: projection - slope * own."""
    return table.assign(adjusted=table["projection"] - slope * table["own"])
