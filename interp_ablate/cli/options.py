"""Settings and loaders that several commands share.

Knows: model, training, run-folder, scorer and rubric flags. Does not know: what a command does with them.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.jobs.bars import write
from interp_ablate.models.loading import CHAT_SETTINGS, HFLoadingOptions, LoadingOptions
from interp_ablate.scoring.endpoint import DEFAULTS as ENDPOINT
from interp_ablate.settings import setting
from interp_ablate.storage.incoming_files import incoming_text

NO_PLAN = 1  # exit status where no candidate passed the limits
REPLIES = "replies.jsonl"  # what a judge answered
REPLACE = "replace an existing --out"
PLAN = "plan JSON (or selected.json)"
RUBRIC = "of a judge: its text, or a file (@FILE)"


@dataclass(frozen=True)
class ModelSettings(LoadingOptions):
    """Which model, and how it is loaded."""

    model: str | None = setting(None, "bundled alias (smollm2), HF folder, .gguf file or hub name")


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge's server is asked."""

    concurrency: int = setting(ENDPOINT.concurrency, "calls to a judge's server at a time")
    max_tokens: int = setting(ENDPOINT.max_tokens, "of a judge's answer, thoughts included")
    timeout: float = setting(
        ENDPOINT.timeout, "seconds of silence after which a call is tried again"
    )


def judge_settings(args: Namespace) -> dict[str, Any]:
    """How a judge's server is asked, as `make_scorer` takes it."""
    from interp_ablate.cli.settings import settings_from

    return asdict(settings_from(args, JudgeSettings))


def tell_spent(args: Namespace, *scorers: Any) -> None:
    """Print to standard error what judges cost, unless --quiet."""
    for scorer in scorers:
        if getattr(scorer, "spent", ""):
            tell(args, scorer.spent)


def load(settings: LoadingOptions, name: str | None) -> Any:
    """The model of that name, loaded as the settings say.

    Raises:
        RunError: there is no name.
        ModelError: see `load_model`.
    """
    from interp_ablate.models.load import load_model
    from interp_ablate.runs.configuration import NO_MODEL

    if not name:
        raise RunError(NO_MODEL)
    return load_model(name, **settings.loading)


def chosen_in_run(folder: str) -> tuple[dict[str, Any], Path]:
    """How a run's model is loaded, and the file that holds the plan it chose.

    Raises:
        RunError: no run folder, or one without a chosen plan.
    """
    from interp_ablate.runs.run_folder import read_run, read_selected

    saved = read_run(folder)
    if saved is None:
        raise RunError(f"{folder} holds no run.json: it is not a run folder")
    selected = Path(folder) / "selected.json"
    if saved.get("concept"):
        raise RunError(
            f"{folder} is a run of a concept: it chooses no plan. Make a plan in Python, or run again with "
            "--expressions or --scorer, which make it a behaviour"
        )
    if not selected.exists():
        raise RunError(
            f"{folder} has no chosen plan yet: run `interp-ablate run --out {folder}` to the end"
        )
    if read_selected(folder)["plan"] is None:
        raise RunError(
            f"no candidate passed the limits in {folder}: see its report.html, and the plans in {folder}/plans that came nearest"
        )
    return loading_of_run(saved), selected


def run_with_directions(folder: str | Path) -> dict[str, Any]:
    """run.json of a folder that has directions.

    Raises:
        RunError: no run folder, or one without directions.
    """
    from interp_ablate.runs.run_folder import read_run

    saved = read_run(folder)
    if saved is None or not (Path(folder) / "directions.safetensors").exists():
        raise RunError(
            f"{folder} holds no directions: make them with `interp-ablate directions --out {folder}`"
        )
    return saved


def loading_of_run(saved: dict[str, Any]) -> dict[str, Any]:
    """How a run's model is loaded, from its run.json."""
    names = ("model", "backend", "dtype", "device", *CHAT_SETTINGS)
    if lacking := [name for name in names if name not in saved["configuration"]]:
        raise RunError(f"run.json lacks {', '.join(lacking)} in its configuration: run again")
    stored = {name: saved["configuration"][name] for name in names}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}


def check_new(
    out: str | Path,
    force: bool,
    *,
    ours: Callable[[bytes], bool] | None = None,
    source: str | None = None,
) -> None:
    """Refuse a place that exists, or with `force` one that holds what is no result of the command.

    Args:
        ours: whether a file that begins with these bytes is of the kind that is written; None: a folder is.
        source: a folder that is read, which no folder may be written into.

    Raises:
        ExportError: it says what is there.
        RunError: nothing can be written there.
    """
    from interp_ablate.storage.atomic_files import check_folder
    from interp_ablate.storage.output_folder import check_output_file, check_output_path

    if ours is None:
        check_output_path(out, overwrite=force, source=source)
    else:
        check_output_file(out, overwrite=force, ours=ours)
    check_folder(Path(out).absolute().parent)


def trait_scorer(
    spec: str | None, trait: Any, folder: Path, endpoint: dict[str, Any] | None = None
) -> Any:
    """The scorer of --scorer, or the trait's own; a judge keeps its replies in the folder.

    Raises:
        RunError: neither is there.
    """
    from interp_ablate.scoring.registry import make_scorer

    if not (spec or trait.scorer):
        raise RunError(
            f"the trait {trait.name!r} names no offline scorer: give --scorer, such as "
            "judge:MODEL@http://HOST/v1 (its rubric is the trait's) or classifier:FOLDER"
        )
    cache = folder / REPLIES
    return make_scorer(spec or trait.scorer, rubric=trait.rubric, cache=cache, endpoint=endpoint)


def rubric_of(text_or_file: str | None) -> str | None:
    """The text that a --rubric gives: itself where it has several words, else what is in that file (@FILE).

    Raises:
        RunError: a file that cannot be read.
    """
    if text_or_file is None:
        return None
    name = text_or_file.removeprefix("@")
    if name == text_or_file and len(name.split()) > 1 and not os.path.isfile(name):
        return name
    try:
        return incoming_text(name).replace("\r\n", "\n")
    except RunError as error:
        raise RunError(
            f"cannot read the rubric {name}: {error}. Give a file, or a text of several words"
        ) from error


def tell(args: Namespace, text: str) -> None:
    """Print to standard error, unless --quiet."""
    if not args.quiet:
        write(text)


@dataclass(frozen=True)
class TrainingSettings(HFLoadingOptions):
    """Where the result of a training goes, and how its model is loaded."""

    out: str = setting(help="folder of the result")
    force: bool = setting(False, REPLACE)


def load_trainable(settings: TrainingSettings, name: str) -> Any:
    """The model to train.

    Raises:
        ModelError: see `load_model`.
    """
    from interp_ablate.training.trainable_model import load_base

    return load_base(name, **settings.loading)


def prepare(settings: TrainingSettings) -> None:
    """Fail before anything is loaded; keep the trainers below off the network."""
    from interp_ablate.training.trainable_model import require_extra

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    check_new(settings.out, settings.force)
    require_extra()


def estimate_text(value: dict[str, Any], digits: int) -> str:
    """A mean with its interval, such as 1.20 [1.10, 1.30]."""
    if value["mean"] is None:
        return "no value"
    ends = value["interval"]
    span = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else " (no interval)"
    lacking = f" ({value['no_value']} without)" if value.get("no_value") else ""
    return f"{value['mean']:.{digits}f}{span}{lacking}"
