"""Harness: tasks of EleutherAI's lm-evaluation-harness, run on a `Model`, with or without a plan.

Knows: lm_eval's tasks in local folders and in the library itself, the bundled multiple-choice task, how
its requests are answered by our forward passes, and its results item by item. Does not know: what is done
with a score (`evaluation`).

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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp_ablate.edits import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.files import feed
from interp_ablate.model import Model
from interp_ablate.scores import Evidence, chosen_logprobs

logger = logging.getLogger(__name__)

BUNDLED_TASK = "interp_ablate_basics"
BUNDLED_FOLDER = Path(__file__).parent / "data" / "tasks"
EXTRA = "pip install 'interp-ablate[evaluate]'"
# Of metrics that are no mean over items; their library's own 100000 would take minutes.
BOOTSTRAP = 100
# What its command line draws few-shot examples with.
FEWSHOT_SEED = 1234
# Whole distributions of every answer token are held for so many requests at a time.
REQUESTS = 32

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    `items` are the metric's values an item, in the items' order; None where the metric is no mean of
    such values. `stderr` is the library's own, None where it gives none.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    items: tuple[float, ...] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaskScore:
        items = None if data["items"] is None else tuple(data["items"])
        return cls(**{**data, "items": items})


def is_installed() -> bool:
    """Whether there is an lm_eval to import."""
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
        self._place = tempfile.TemporaryDirectory(prefix="interp_ablate_tasks_")
        self._managers: dict[str, Any] = {}
        with _quiet():
            self._local = self._manager()

    def _manager(self, more: Path | None = None) -> Any:
        """An index of local tasks; those with data files of relative paths get a YAML of absolute ones."""
        import yaml
        from lm_eval.tasks import TaskManager

        folders = [*([more] if more else []), BUNDLED_FOLDER, *self.folders]
        found = TaskManager(include_path=folders, include_defaults=False)
        for name, entry in found.task_index.items():
            options = (entry.cfg or {}).get("dataset_kwargs")
            if entry.yaml_path is None or not isinstance(options, dict):
                continue
            files = _beside(entry.yaml_path.parent, options.get("data_files"))
            if files != options.get("data_files"):
                changed = {"task": name, "dataset_kwargs": {**options, "data_files": files}}
                text = yaml.safe_dump({"include": str(entry.yaml_path.resolve()), **changed})
                file = f"{hashlib.sha256(name.encode()).hexdigest()}.yaml"
                Path(self._place.name, file).write_text(text)
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
        """Of a task of the library's own: its folder alone, because reading all takes half a minute."""
        from lm_eval.tasks import TaskManager

        known = _library_files()
        own = sorted(self._local.task_index)
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *own], n=4, cutoff=0.6)
            raise RunError(
                f"no task {name!r}: "
                + (f"did you mean {', '.join(near)}? " if near else "")
                + f"In the given folders and bundled are {', '.join(own)}; lm_eval itself brings "
                f"{len(known)} more (`lm-eval ls tasks` lists them)"
            )
        with _quiet():
            found = None if known[name] is None else self._manager(known[name])
            if found is None or name not in found.task_index:  # a group: its tasks may be anywhere
                found = TaskManager(include_path=[*self.folders, self._place.name])
        return found

    def identity(self, name: str) -> dict[str, Any]:
        """What a task's numbers depend on: a local one's files, else the library's version.

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
                feed(digest, path)
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
        manager = self._of(name)
        try:
            with _quiet():
                found = _evaluated(manager.load([name]), _as_lm(model, plan), limit, chat)
        except InterpAblateError:
            raise
        except _failures() as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(
                f"the task {name!r} cannot be run: {type(error).__name__}: {reason[0]}. A task whose data "
                "is on the hub needs a network or a filled cache; those of --tasks-folder need neither"
            ) from error
        return _scores(found)


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
        log_samples=True,
    )


def _failures() -> tuple[type[Exception], ...]:
    """What tasks of others, and their data, fail with."""
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
    found: dict[str, Path | None] = {}
    for path in sorted(Path(lm_eval.__file__).parent.joinpath("tasks").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for kind, name in named.findall(text):
            found.setdefault(name, path.parent if kind == "task" else None)
        for block in listed.findall(text):
            for line in block.split("\n"):
                if line.strip():
                    found.setdefault(line.strip(" \t-\"'"), None)
    return found


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
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    finally:
        log.setLevel(level)
        logger.debug("lm_eval said: %s", said.getvalue())


def _scores(found: Any) -> list[TaskScore]:
    """Results as the library gives them ("acc,none": 0.5), with the values of the items behind them."""
    scores = []
    for task, values in found["results"].items():
        samples = sorted((found["samples"] or {}).get(task, []), key=lambda s: s["doc_id"])
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            items = [s.get(metric) for s in samples if s["filter"] == kind]
            error = float(stderr) if known else None
            kept = _means(items, float(value))
            scores.append(TaskScore(task, metric, kind, float(value), error, kept))
    return scores


def _means(items: list[Any], value: float) -> tuple[float, ...] | None:
    """The items' values, if their mean is the metric."""
    if not items or not all(isinstance(x, (bool, int, float)) for x in items):
        return None
    values = tuple(float(x) for x in items)
    same = math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12)
    return values if same else None


# ---- the library's requests, answered by our forward passes --------------------------------------


def longest(model: Model) -> int:
    """How many tokens the model takes at once."""
    limits = [getattr(model.hf_config, "max_position_embeddings", None)]
    if model.backend == "hooked" or limits == [None]:
        limits.append(model.tl.cfg.n_ctx)
    return min(limit for limit in limits if limit)


def loglikelihoods(
    model: Model, pairs: Sequence[Pair], *, plan: Plan | None = None
) -> list[tuple[float, bool]]:
    """Of (context, continuation) token pairs: the continuation's log-probability, nats; is it greedy?

    Contexts that do not fit are cut at their start. Continuations of one token after the same context share
    a forward pass. Positions of the continuation count as generated, for plans that tell.

    Raises:
        RunError: a continuation longer than the model's context.
        InterpAblateError: NaN or infinity in the logits.
    """
    most = longest(model)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for number, (context, end) in enumerate(pairs):
        if len(end) > most:
            raise RunError(f"a continuation of {len(end)} tokens: {model.source.name} takes {most}")
        kept = tuple(context)[-(most + 1 - len(end)) :]
        groups.setdefault((kept, tuple(end[:-1])), []).append(number)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    order = sorted(groups, key=lambda key: -len(key[0]) - len(key[1]))
    for start in range(0, len(order), REQUESTS):
        keys = order[start : start + REQUESTS]
        ends = [list(pairs[groups[key][0]][1]) for key in keys]
        evidence = Evidence(model, [list(key[0]) for key in keys], plan)
        for key, logprobs in zip(keys, evidence.continuation_logprobs(ends, batch_size=REQUESTS)):
            greedy = logprobs.argmax(-1).tolist()
            for number in groups[key]:
                end = list(pairs[number][1])
                total = float(chosen_logprobs(logprobs, end).sum())
                found[number] = (total, greedy == end)
    return found


def _generations(
    model: Model, plan: Plan | None, requests: Sequence[tuple[str, dict[str, Any]]], encode: Any
) -> list[str]:
    """Texts up to the first stop string, for (context, options) as the library asks for them."""
    found = [""] * len(requests)
    by_options: dict[tuple[int, float], list[int]] = {}
    for number, (_, options) in enumerate(requests):
        new = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
        heat = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
        by_options.setdefault((new, heat), []).append(number)
    for (new, heat), numbers in by_options.items():
        room = max(1, longest(model) - new)
        rows = [encode(requests[number][0])[-room:] for number in numbers]
        for start in range(0, len(rows), REQUESTS):  # what is generated from NaN looks like text
            Evidence(model, rows[start : start + REQUESTS], plan).first_logprobs  # noqa: B018
        with model.applied(plan) if plan is not None else nullcontext():
            written = model.generate(rows, max_new_tokens=new, temperature=heat)
        for number, generation in zip(numbers, written):
            until = requests[number][1].get("until") or []
            text = generation.text
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            found[number] = text
    return found


def _encoder(model: Model) -> Callable[..., list[int]]:
    """Text as the library's own Hugging Face wrapper encodes it: with a BOS where the tokenizer adds one."""
    tokenizer = model.tokenizer
    prefix = tokenizer.decode(_prefix(model))

    def encode(text: str, add_special_tokens: bool | None = None) -> list[int]:
        special = not text.startswith(prefix) if add_special_tokens is None else add_special_tokens
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    return encode


def _prefix(model: Model) -> int:
    tokenizer = model.tokenizer
    if tokenizer is None or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None):
        raise RunError(
            f"{model.source.name} has no tokenizer with a BOS or EOS token: tasks need one"
        )
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _as_lm(model: Model, plan: Plan | None) -> Any:
    """A `Model` under a plan as an LM of the library: its public base class, no Hugging Face wrapper.

    (The wrapper calls the checkpoint's own forward pass: there is none below a HookedTransformer, and it
    cannot tell which positions a plan's `prompt` and `generated` are.)
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    encode, prefix = _encoder(model), _prefix(model)

    class Answering(TemplateLM):
        tokenizer = model.tokenizer
        tokenizer_name = model.source.name
        eot_token_id = model.tokenizer.eos_token_id
        prefix_token_id = prefix
        max_length = longest(model)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return encode(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, end) for _, context, end in requests]
            return loglikelihoods(model, pairs, plan=plan)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                tokens = encode(request.args[0], False)
                windows = get_rolling_token_windows(tokens, prefix, self.max_length, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(math.fsum(x for x, _ in loglikelihoods(model, pairs, plan=plan)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return _generations(model, plan, [request.args for request in requests], encode)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return model.tokenizer.apply_chat_template(
                chat_history,
                chat_template=model.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

    return Answering()
