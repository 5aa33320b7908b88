"""Harness: tasks of EleutherAI's lm-evaluation-harness, run on a `Model`, with or without a plan.

Knows: where tasks are found, and their results item by item. Does not know: how requests are answered, or
what is done with a score.

Tasks are code to that library: a folder's YAML may name Python functions beside it, and its templates are
not sandboxed. Give only folders that you trust.

Source: https://github.com/EleutherAI/lm-evaluation-harness (Gao et al., https://doi.org/10.5281/zenodo.10256836)
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.evaluation.harness_adapter import as_harness_lm
from interp_ablate.models.model import Model, check_model
from interp_ablate.storage.atomic_files import hash_file, temporary_folder
from interp_ablate.storage.bundled_data import bundled

logger = logging.getLogger(__name__)


BUNDLED_TASK = "interp_ablate_basics"
BUNDLED_FOLDER = bundled("tasks")
EXTRA = "pip install 'interp-ablate[evaluate]'"
# Resamples for metrics that are no mean over items; the library's own 100000 would take minutes.
BOOTSTRAP = 100
# The seed with which the library's command line draws few-shot examples.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    """The library's own; None where it gives none."""
    items: tuple[float, ...] | None
    """The metric's value for each item, in their order; None where the metric is no mean of such values."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaskScore:
        items = None if data["items"] is None else tuple(data["items"])
        return cls(**{**data, "items": items})


def is_installed() -> bool:
    """True if the package lm_eval is installed."""
    import importlib.util

    return importlib.util.find_spec("lm_eval") is not None


class Tasks:
    """Tasks by name: of the given folders first, of this package, then of lm_eval itself.

    Paths of data files in a folder's YAML are relative to that YAML file.

    Raises:
        RunError: lm_eval is not installed; a folder that is not there or holds no task.
    """

    def __init__(self, folders: Sequence[str | Path] = ()) -> None:
        if not is_installed():
            raise RunError(f"tasks of lm-evaluation-harness need the package lm_eval: {EXTRA}")
        self.folders = [Path(folder).resolve() for folder in folders]
        for folder in self.folders:
            if not next(folder.glob("**/*.yaml"), None):
                raise RunError(
                    f"--tasks-folder {folder} holds no .yaml file: expected a folder with tasks of "
                    "lm-evaluation-harness"
                )
        self._place = temporary_folder("interp_ablate_tasks")
        self._managers: dict[str, Any] = {}
        with _quiet():
            self._local = self._manager()

    def _manager(self, more: Path | None = None) -> Any:
        """An index of local tasks; those with data files of relative paths get a YAML of absolute ones."""
        import yaml
        from lm_eval.tasks import TaskManager

        folders = [*([more] if more else []), BUNDLED_FOLDER, *self.folders]
        local = TaskManager(include_path=folders, include_defaults=False)
        for name, entry in local.task_index.items():
            options = (entry.cfg or {}).get("dataset_kwargs")
            if entry.yaml_path is None or not isinstance(options, dict):
                continue
            files = _beside(entry.yaml_path.parent, options.get("data_files"))
            if files != options.get("data_files"):
                changed = {"task": name, "dataset_kwargs": {**options, "data_files": files}}
                text = yaml.safe_dump({"include": str(entry.yaml_path.resolve()), **changed})
                file = f"{hashlib.sha256(name.encode()).hexdigest()}.yaml"
                Path(self._place.name, file).write_text(text, encoding="utf-8")
        return TaskManager(include_path=[*folders, self._place.name], include_defaults=False)

    def _of(self, name: str) -> Any:
        """The manager that has a task.

        Raises:
            RunError: none has; the nearest names.
        """
        if name in self._local.task_index:
            return self._local
        if name not in self._managers:
            self._managers[name] = self._library(name)
        return self._managers[name]

    def _library(self, name: str) -> Any:
        """The manager of one built-in task: it reads that folder alone (indexing all tasks takes 30 s)."""
        from lm_eval.tasks import TaskManager

        folders = _library_files()
        own = sorted(self._local.task_index)
        if name not in folders:
            near = difflib.get_close_matches(name, [*folders, *own], n=4, cutoff=0.6)
            raise RunError(
                f"no task {name!r}: "
                + (f"did you mean {', '.join(near)}? " if near else "")
                + f"In the given folders and bundled are {', '.join(own)}; lm_eval itself brings "
                f"{len(folders)} more (`lm-eval ls tasks` lists them)"
            )
        with _quiet():
            manager = None if folders[name] is None else self._manager(folders[name])
            # the tasks of a group may be anywhere
            if manager is None or name not in manager.task_index:
                manager = TaskManager(include_path=[*self.folders, self._place.name])
        return manager

    def identity(self, name: str) -> dict[str, Any]:
        """The key of a task's numbers: its files where it is a local one, and the library's version.

        Raises:
            RunError: no such task.
        """
        import lm_eval

        entry = self._of(name).task_index[name]
        origin = self._local.task_index.get(name)
        if origin is None or entry.yaml_path is None:
            return {"task": name, "lm_eval": lm_eval.__version__}
        digest = hashlib.sha256()
        folders = [folder for folder in (BUNDLED_FOLDER, *self.folders) if folder.is_dir()]
        for path in sorted(p for folder in folders for p in folder.rglob("*") if p.is_file()):
            # these change on their own, as tasks are run and looked at
            if not {"__pycache__", ".git"} & set(path.parts):
                digest.update(path.name.encode())
                hash_file(digest, path)
        return {"task": name, "lm_eval": lm_eval.__version__, "files": digest.hexdigest()}

    def run(
        self,
        name: str,
        model: Model,
        plan: Plan | None = None,
        *,
        limit: int | None = None,
        chat: bool = False,
    ) -> list[TaskScore]:
        """The metrics of a task (of a group: of its tasks, and its own), in the library's order.

        Args:
            limit: items a task.
            chat: items go through the model's chat template (off, as in the library).

        Raises:
            RunError: no such task, or one that cannot be loaded or run (its data is not here, ...).
            InterpAblateError: NaN or infinity in the logits.
        """
        check_model(model)
        manager = self._of(name)
        try:
            with _quiet():
                results = _evaluated(manager.load([name]), as_harness_lm(model, plan), limit, chat)
        except InterpAblateError:
            raise
        except _failures() as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(
                f"the task {name!r} cannot be run: {type(error).__name__}: {reason[0]}. A task whose data "
                "is on the hub needs a network or a filled cache; those of --tasks-folder need neither"
            ) from error
        return _scores(results)


def _evaluated(loaded: Any, lm: Any, limit: int | None, chat: bool) -> Any:
    """The library's results; no cache, no generator seeded, few-shot examples as its command line has them."""
    import lm_eval

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return lm_eval.evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,  # as the library's command line has it
        log_samples=True,
    )


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions that other people's tasks, and their data, raise."""
    import jinja2
    import yaml
    from datasets.exceptions import DatasetsError

    return (
        OSError, ValueError, LookupError, TypeError, ImportError, AttributeError, AssertionError,
        NotImplementedError, yaml.YAMLError, jinja2.TemplateError, DatasetsError,
    )  # fmt: skip


@functools.cache
def _library_files() -> dict[str, Path | None]:
    """The library's tasks, groups and tags by name, and a task's folder; files are searched, not parsed."""
    import lm_eval

    named = re.compile(r"^(task|group|tag):[ \t]*[\"']?([\w.:/-]+)", re.MULTILINE)
    listed = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n?)+)", re.MULTILINE)
    folders: dict[str, Path | None] = {}
    for path in sorted(Path(lm_eval.__file__).parent.joinpath("tasks").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for kind, name in named.findall(text):
            folders.setdefault(name, path.parent if kind == "task" else None)
        for block in listed.findall(text):
            for line in block.split("\n"):
                if line.strip():
                    folders.setdefault(line.strip(" \t-\"'"), None)
    return folders


def _beside(folder: Path, files: Any) -> Any:
    """Paths that are there relative to `folder`, made absolute."""
    if isinstance(files, str):
        return str((folder / files).resolve()) if (folder / files).exists() else files
    if isinstance(files, list):
        return [_beside(folder, each) for each in files]
    if isinstance(files, dict):
        return {key: _beside(folder, each) for key, each in files.items()}
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars, advice and warnings; its errors are raised, not logged."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            yield
    finally:
        log.setLevel(level)
        logger.debug("lm_eval output: %s", output.getvalue())


def _scores(results: Any) -> list[TaskScore]:
    """Results as the library gives them ("acc,none": 0.5), with the values of the items behind them."""
    scores = []
    for task, values in results["results"].items():
        samples = sorted((results["samples"] or {}).get(task, []), key=lambda s: s["doc_id"])
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            has_error = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            items = [s.get(metric) for s in samples if s["filter"] == kind]
            error = float(stderr) if has_error else None
            per_item = _means(items, float(value))
            scores.append(TaskScore(task, metric, kind, float(value), error, per_item))
    return scores


def _means(items: list[Any], value: float) -> tuple[float, ...] | None:
    """The items' values, if their mean is the metric."""
    if not items or not all(isinstance(x, (bool, int, float)) for x in items):
        return None
    values = tuple(float(x) for x in items)
    same = math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12)
    return values if same else None
