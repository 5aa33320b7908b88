"""Pipeline: the stages of a run over one folder, each skipped when it is already there.

Knows: the configuration, the folder's layout, the order of the stages, what each leaves. Does not know:
flags or terminals (`cli` does), or how any stage computes what it leaves.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.jobs.progress import NoProgress, Progress
from interp_ablate.runs.configuration import Configuration
from interp_ablate.sites import RESIDUAL_POINTS, Point, Site, sites_of
from interp_ablate.storage.atomic_files import write_atomic

STAGES = ("collect", "directions", "sweep", "evaluate", "export", "plot", "report")
FORMAT = "interp_ablate.run/1"


class Run:
    """A run folder with its configuration; `run.stage(name)` does a stage unless it is done.

    Opening a folder that holds another configuration is refused with what differs.

    Args:
        work: from a stage's name to what does it (`experiment.WORK.__getitem__`).
    """

    def __init__(
        self,
        out: str | Path,
        configuration: Configuration,
        *,
        work: Callable[[str], Callable[[Run], None]],
        listener: Progress | None = None,
    ) -> None:
        self.out = Path(out)
        self.configuration = configuration
        self._work = work
        self.shared: dict[str, Any] = {}  # what stages of this process hand to each other
        self.listener: Progress = listener or NoProgress()
        self.state = self._open()

    # ---- the folder ---------------------------------------------------------------------------

    def _open(self) -> dict[str, Any]:
        saved = read_run(self.out)
        mine = self.configuration.to_dict()
        if saved is None:
            self.contrast_set  # noqa: B018  (bad prompts must fail before anything is written)
            return {"format": FORMAT, "configuration": mine, "stages": {}, "notes": []}
        theirs = saved["configuration"]
        differ = [k for k in mine if theirs.get(k) != mine[k]]
        if differ:
            listed = "; ".join(f"{k}: {theirs.get(k)!r} there, {mine[k]!r} now" for k in differ)
            raise RunError(
                f"{self.out} holds a run of another configuration ({listed}). Choose another --out, "
                "or delete the folder"
            )
        if saved.get("contrast", {}).get("fingerprint") not in (
            None,
            self.contrast_set.fingerprint,
        ):
            raise RunError(
                f"{self.out} was made from other prompts than {self.contrast_set.name} holds now: "
                "choose another --out, or delete the folder"
            )
        return saved

    def _save(self) -> None:
        write_atomic(self.out / "run.json", json.dumps(self.state, indent=1))

    def begin(self) -> None:
        """Make the folder and write the configuration, before any work.

        Raises:
            RunError: the folder cannot be made or written.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the folder {self.out}: {error.strerror or error}"
            ) from error
        self._save()

    def is_done(self, stage: str) -> bool:
        """Whether a stage is recorded as finished and its outputs are still there."""
        done = stage in self.state["stages"]
        return done and all((self.out / name).exists() for name in OUTPUTS[stage])

    def stage(self, name: str) -> bool:
        """Do one stage with those it needs; returns False where it was already done."""
        if self.is_done(name):
            return False
        for needed in NEEDS[name]:
            self.stage(needed)
        self.begin()
        start = time.perf_counter()
        self._work(name)(self)
        self.listener.finish()
        # whatever was made from an older version of this stage's outputs is stale
        for later in STAGES[STAGES.index(name) + 1 :]:
            if later in self.state["stages"]:
                del self.state["stages"][later]
        self.state["stages"][name] = {"seconds": round(time.perf_counter() - start, 2)}
        self._save()
        return True

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Progress of a part of a stage."""
        self.listener.start(name, total)
        yield self.listener.advance
        self.listener.finish()

    def note(self, text: str) -> None:
        """Something a reader of the results must know; kept in run.json and the report."""
        if text not in self.state["notes"]:
            self.state["notes"].append(text)
            self.listener.note(text)

    # ---- what stages share ----------------------------------------------------------------------

    @cached_property
    def contrast_set(self) -> Any:
        from interp_ablate.prompts.contrast_set import ContrastSet

        c = self.configuration
        return ContrastSet.load(
            c.contrast, positive=c.positive, negative=c.negative, system=c.system
        )

    @cached_property
    def split(self) -> Any:
        c = self.configuration
        return self.contrast_set.split(c.n_train, c.n_validation, c.n_test, seed=c.seed)

    @cached_property
    def model(self) -> Any:
        from interp_ablate.models.load import load_model

        self.split  # noqa: B018  (cheap, and fails before the model is loaded)
        c = self.configuration
        with self.step("load model", None):
            model = load_model(c.model, **c.loading)
        c.layer_range(model.n_layers)
        self._check_model(model)
        return model

    def _check_model(self, model: Any) -> None:
        from interp_ablate.storage.provenance import versions

        found = {
            **model.source.to_dict(),
            "backend": model.backend,
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint,
            "trusted_remote_code": self.configuration.trust_remote_code,
        }
        before = self.state.get("model", {}).get("fingerprint")
        if before not in (None, found["fingerprint"]):
            raise RunError(
                f"{self.out} was made with other weights under the name {model.source.name!r}: "
                "choose another --out, or delete the folder"
            )
        contrast = self.contrast_set
        self.state["model"] = found
        self.state["versions"] = versions()
        self.state["contrast"] = {
            "name": contrast.name,
            "fingerprint": contrast.fingerprint,
            "n_positive": len(contrast.positive),
            "n_negative": len(contrast.negative),
            "source": contrast.source,
        }

    @property
    def sites(self) -> tuple[Site, ...]:
        c = self.configuration
        points: tuple[Point, ...] = c.sites  # type: ignore[assignment]
        if points == RESIDUAL_POINTS:
            points = self.model.residual_points
        return sites_of(points, c.layer_range(self.model.n_layers))

    @cached_property
    def directions(self) -> Any:
        from interp_ablate.directions.direction_set import Directions

        return Directions.load(self.out / "directions.safetensors")

    def activations(self, part: str, on_batch: Callable[[int], None] | None = None) -> Any:
        """Activations of a split's prompts at the run's sites and positions, kept in the folder."""
        from interp_ablate.activations.collection import collect

        return collect(
            self.model,
            getattr(self.split, part),
            self.sites,
            self.configuration.positions,
            cache=self.out / "cache",
            on_batch=on_batch,
        )

    def write(self, name: str, value: Any) -> None:
        """Write one JSON, JSONL (list of dicts) or CSV (table) output, whole or not at all."""
        if name.endswith(".csv"):
            text = value.to_csv(index=False)
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value)
        else:
            text = json.dumps(value, indent=1)
        write_atomic(self.out / name, text)


def read_run(out: str | Path) -> dict[str, Any] | None:
    """run.json of a folder; None where there is none yet.

    Raises:
        RunError: the folder is a file, or holds something else, or run.json is corrupt.
    """
    out = Path(out)
    path = out / "run.json"
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out names a folder")
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            raise RunError(
                f"{out} is not empty and holds no run.json: it is not a run folder. Choose another --out"
            )
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise KeyError(f"format {saved['format']}")
        saved["configuration"], saved["stages"], saved["notes"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(
            f"{path} is corrupt ({error}): delete the folder, or choose another --out"
        ) from error
    return saved


def identity(run: Run) -> dict[str, Any]:
    """What a journal's trials depend on."""
    text = json.dumps(run.configuration.to_dict(), sort_keys=True)
    return {
        "configuration": hashlib.sha256(text.encode()).hexdigest(),
        "model": run.model.fingerprint,
        "directions": hashlib.sha256(
            "".join(item.fingerprint for item in run.directions).encode()
        ).hexdigest(),
    }


NEEDS: dict[str, Sequence[str]] = {
    "collect": (),
    "directions": ("collect",),
    "sweep": ("directions",),
    "evaluate": ("sweep",),
    "export": ("evaluate",),
    "plot": ("directions",),
    "report": ("plot",),
}
OUTPUTS: dict[str, Sequence[str]] = {
    "collect": ("cache",),
    "directions": ("directions.safetensors", "directions.json", "projections.csv"),
    "sweep": ("trials.jsonl", "trials.csv"),
    "evaluate": ("selected.json", "generations.jsonl"),
    "export": ("export",),
    "plot": ("figures",),
    "report": ("report.html",),
}

__all__ = ["STAGES", "Configuration", "InterpAblateError", "Run", "read_run"]
