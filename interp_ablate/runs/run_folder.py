"""A run folder: its configuration, its state, and what its stages share, made when first asked for.

Knows: the folder's layout, what was done. Does not know: flags or terminals, or what a stage does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_ablate import __version__
from interp_ablate.errors import RunError
from interp_ablate.jobs.bars import Bars, Progress
from interp_ablate.runs.configuration import NAMES, Configuration, layers_of, sites_of_model
from interp_ablate.settings import SPLIT_SIZES
from interp_ablate.sites import Site
from interp_ablate.storage.atomic_files import folder_made, remove_left_overs, write_atomic
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.output_folder import check_output_path
from interp_ablate.storage.strict_json import as_read_back, json_text

if TYPE_CHECKING:
    from interp_ablate.activations.activations import Activations
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.jobs.ray_executor import RaySettings
    from interp_ablate.models.model import Model
    from interp_ablate.runs.fits import EditFitter
    from interp_ablate.search.bench import ValidationBench
    from interp_ablate.search.edit_space import EditSpace

STAGES = ("collect", "directions", "sweep", "evaluate", "export", "plot", "report")
# Of a run of a concept, in place of the stages that choose and export a plan.
CONCEPT_STAGES = ("collect", "directions", "concept", "plot", "report")
_ORDER = ("collect", "directions", "concept", *STAGES[2:])
# 3: `made_of`, the identity of a run by contents; the sizes of its split as they are.
FORMAT = "interp_ablate.run/3"
_TRIED = 4  # prompts a side on which a model shows whether it thinks first
# What to say where a part of what a run was made of is another one now.
_OTHER = {
    "interp-ablate": "by another version of this package: use that one",
    "contrast": "from other prompts than are given now",
    "expressions": "with another scorer or other expressions of the behaviour than are given now",
    "model": "with other weights, another config, tokenizer or chat template than are given now",
    "rendering": (
        "from the same prompts, which the chat template renders otherwise now: one that writes the date does so "
        "every day. Give a --template without it"
    ),
}


class Run:
    """A run folder with its configuration; only its methods change what run.json says.

    Opening a folder that holds another configuration is refused with what differs. A name may change (a model
    or a file that was moved); what it holds may not.

    Args:
        ray: where trials are scored; None for this process.
        endpoint: how a judge's server is asked.
    """

    def __init__(
        self,
        out: str | Path,
        configuration: Configuration,
        *,
        ray: RaySettings | None = None,
        listener: Progress | None = None,
        endpoint: dict[str, Any] | None = None,
    ) -> None:
        self.out = Path(out)
        self.configuration, self.ray, self.endpoint = configuration, ray, endpoint
        self._directions: Directions | None = None
        self.listener: Progress = listener or Bars()
        saved = read_run(self.out)
        self.state: dict[str, Any] = {"format": FORMAT, "made_of": {}, "stages": {}, "notes": []}
        if saved is not None and (saved["stages"] or self._has_files()):
            self.state = saved
        self._open()

    # ---- the folder ---------------------------------------------------------------------------

    def _open(self) -> None:
        """Take the configuration; bad prompts and scorers, and a folder of another run, are refused here."""
        from interp_ablate.runs.validation_bench import behaviour_identity

        contrast, c = self.contrast_set, self.configuration
        self._made_of(
            {
                "interp-ablate": __version__,
                "contrast": contrast.fingerprint,
                "expressions": behaviour_identity(c, contrast.name, self.state["made_of"]),
            }
        )
        wanted = {name: getattr(c, name) for name in SPLIT_SIZES}
        sizes = contrast.split_sizes(**wanted)
        if sizes != {name: wanted[name] or usual for name, usual in SPLIT_SIZES.items()}:
            parts = ", ".join(f"{size} {name[2:]}" for name, size in sizes.items())
            self.note(
                f"{contrast.name} has fewer prompts than the usual split takes: {parts} a side"
            )
        self.configuration = replace(c, **sizes)
        self.split  # noqa: B018  (cheap, and fails before the model is loaded)
        mine = self.configuration.to_dict()
        theirs = self.state.setdefault("configuration", mine)
        differ = [k for k in mine if k not in NAMES and theirs.get(k) != mine[k]]
        if differ:
            listed = "; ".join(f"{k}: {theirs.get(k)!r} there, {mine[k]!r} now" for k in differ)
            raise RunError(
                f"{self.out} holds a run of another configuration ({listed}). Choose another --out, "
                "or delete the folder"
            )
        if theirs != mine:  # other names
            if any(theirs[name] != mine[name] for name in ("model", "template")):
                self.model  # noqa: B018  (it must be the same one)
            self.state["configuration"] = mine
            self.save()

    def _made_of(self, contents: dict[str, Any]) -> None:
        """Keep what the run is made of; refuse what is not what it was made of before.

        Raises:
            RunError: something is another one, with what to do.
        """
        before, now = self.state["made_of"], as_read_back(contents)
        other = [name for name in now if before.get(name, now[name]) != now[name]]
        if other:
            raise RunError(
                f"{self.out} was made {_OTHER[other[0]]}; or choose another --out, or delete the folder"
            )
        self.state["made_of"] = {**before, **now}

    def save(self) -> None:
        """Write run.json."""
        write_atomic(self.out / "run.json", json_text(self.state, indent=1))

    def _has_files(self) -> bool:
        """Whether the folder holds anything but its configuration."""
        return any(path.is_file() and path.name != "run.json" for path in self.out.rglob("*"))

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The folder with its configuration, for the first stage; one that comes to nothing leaves nothing.

        Raises:
            RunError: the folder cannot be made or written.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(folder_made(self.out))
            except OSError as error:
                raise RunError(
                    f"cannot make the folder {self.out}: {error.strerror or error}"
                ) from error
            self.save()
            try:
                yield
            except BaseException:
                if not self.state["stages"] and not self._has_files():
                    (self.out / "run.json").unlink(missing_ok=True)
                raise

    def is_done(self, stage: str) -> bool:
        """Whether a stage is recorded as finished and its outputs are still there."""
        done = stage in self.state["stages"]
        return done and all((self.out / name).exists() for name in OUTPUTS[stage])

    def finish(self, stage: str, seconds: float) -> None:
        """Record a stage as done; what was made from an older version of its outputs is stale."""
        self.listener.finish()
        self.discard_after(stage)
        self.state["stages"][stage] = {"seconds": round(seconds, 2)}
        self.save()

    def discard_after(self, stage: str) -> None:
        """Forget that later stages were done."""
        for later in _ORDER[_ORDER.index(stage) + 1 :]:
            self.state["stages"].pop(later, None)
        self.save()

    def record(self, **values: Any) -> None:
        """Keep facts of the run in run.json; they are on disk when the stage is."""
        self.state |= values

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
    def expression(self) -> Any:
        """What scores the behaviour in answers."""
        from interp_ablate.runs.validation_bench import behaviour_scorer

        return behaviour_scorer(
            self.configuration, self.contrast_set.name,
            cache=self.out / "replies.jsonl", endpoint=self.endpoint,
        )  # fmt: skip

    @property
    def names_behaviour(self) -> bool:
        """Whether anything says how the behaviour looks; without it, a run is one of a concept."""
        from interp_ablate.runs.validation_bench import names_behaviour

        return names_behaviour(self.configuration, self.contrast_set.name)

    @cached_property
    def split(self) -> Any:
        from interp_ablate.runs.validation_bench import split_of

        return split_of(self.contrast_set, self.configuration)

    @cached_property
    def model(self) -> Model:
        from interp_ablate.models.load import load_model

        c = self.configuration
        with self.step("load model", None):
            model = load_model(c.model, **c.loading)
        layers_of(c.layers, model.n_layers)
        check_output_path(self.out / "export", overwrite=True, source=model.source.path)
        self._check_model(model)
        self._check_answers_next(model)
        return model

    def _check_answers_next(self, model: Model) -> None:
        """Refuse before any work a model whose first new token is one of a thought.

        Raises:
            RunError: the options with which it is the answer's.
        """
        from interp_ablate.models.thinking import has_thought

        thinking = model.thinking
        if not thinking.thinks or "evaluate" in self.state["stages"]:
            return
        part = self.split.train
        prompts = [*part.positive[:_TRIED], *part.negative[:_TRIED]]
        if thinking.opens:
            raise RunError(
                thinking.no_answer_next(f"the chat format of {model.source.name} opens a thought")
            )
        for generation in model.generate(prompts, max_new_tokens=1):
            if has_thought(generation):
                raise RunError(
                    thinking.no_answer_next(f"{model.source.name} writes a thought first")
                )

    def check_export(self) -> None:
        """Refuse before any work what the export at the end would refuse; the files first, then the model.

        Raises:
            ExportError, ModelError: why there would be no export.
        """
        from interp_ablate.export.preflight import check_model_exports, check_source_exports
        from interp_ablate.models.sources import resolve

        if "export" in self.state["stages"]:
            return
        out = self.out / "export"
        self.split  # noqa: B018  (bad prompts are cheaper still)
        check_source_exports(
            resolve(self.configuration.model, self.configuration.revision), out, overwrite=True
        )
        check_model_exports(self.model, out, overwrite=True)

    def _check_model(self, model: Model) -> None:
        from interp_ablate.models.rendering import rendering, require_room
        from interp_ablate.storage.provenance import versions

        facts = {
            **model.source.to_dict(),
            "backend": model.backend,
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint,
            "trusted_remote_code": self.configuration.trust_remote_code,
        }
        prompts = [
            prompt for part in self.split.parts for prompt in (*part.positive, *part.negative)
        ]
        require_room(model, prompts, self.configuration.max_new_tokens)
        # the rendering first: it is a part of the fingerprint, and what differs is named by its closest cause
        self._made_of({"rendering": rendering(model, prompts), "model": model.fingerprint})
        contrast = self.contrast_set
        self.record(
            model=facts,
            versions=versions(),
            contrast={
                "name": contrast.name,
                "fingerprint": contrast.fingerprint,
                "n_positive": len(contrast.positive),
                "n_negative": len(contrast.negative),
                "source": contrast.source,
            },
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        return sites_of_model(self.model, self.configuration.sites, self.configuration.layers)

    @property
    def directions(self) -> Directions:
        """The directions that the folder holds."""
        from interp_ablate.directions.direction_set import Directions

        if self._directions is None:
            self._directions = Directions.load(self.out / "directions.safetensors")
        return self._directions

    def keep_directions(self, directions: Directions) -> None:
        """Save directions in the folder."""
        directions.save(self.out / "directions.safetensors")
        self._directions = None  # as the file has them, from now on

    @cached_property
    def bench(self) -> ValidationBench:
        """The validation prompts with scorers and unedited answers."""
        from interp_ablate.runs.validation_bench import DEFAULT_LIST, base_rate_note, make_bench

        c = self.configuration
        with self.step("baselines", 3) as advance:
            bench, targets = make_bench(
                self.model,
                self.split,
                self.expression,
                max_new_tokens=c.max_new_tokens,
                advance=advance,
            )
        self.record(target_tokens=targets)
        if not self.names_behaviour:
            self.note(DEFAULT_LIST)
        if note := base_rate_note(bench):
            self.note(note)
        return bench

    @cached_property
    def fitter(self) -> EditFitter:
        """Fits edits by gradient and keeps them in fits/."""
        from interp_ablate.runs.fits import EditFitter, FitPrompts

        prompts = FitPrompts(self.model, self.split.train, self.configuration.max_new_tokens)
        return EditFitter(prompts, self.bench.expression, self.out / "fits", self.step)

    def edit_space(self, *, control: str | None = None) -> EditSpace:
        """What plans are made of: directions, training activations, fitted edits."""
        from interp_ablate.runs.fits import load_fitted_edits
        from interp_ablate.search.edit_space import EditSpace

        train = self.activations("train")
        return EditSpace(
            train,
            self.model.writers,
            position=train.positions[0],
            saved=self.directions,
            fits=load_fitted_edits(self.out / "fits"),
            control=control,
            seed=self.configuration.seed,
        )

    def identity(self) -> dict[str, Any]:
        """What the folder's trials depend on: contents, and settings but for names."""
        self.model  # noqa: B018  (a part of it)
        settings = {k: v for k, v in self.configuration.to_dict().items() if k not in NAMES}
        prints = "".join(item.fingerprint for item in self.directions)
        return {
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
            **self.state["made_of"],
            "directions": hashlib.sha256(prints.encode()).hexdigest(),
        }

    def activations(self, part: str, on_batch: Callable[[int], None] | None = None) -> Activations:
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
            text = "".join(json_text(row, ensure_ascii=False) + "\n" for row in value)
        else:
            text = json_text(value, indent=1)
        write_atomic(self.out / name, text)


def read_run(out: str | Path) -> dict[str, Any] | None:
    """run.json of a folder; None where there is none yet.

    Raises:
        RunError: the folder is a file, or holds something else, or run.json is corrupt.
    """
    out = Path(out)
    path = out / "run.json"
    remove_left_overs(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out names a folder")
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            raise RunError(
                f"{out} is not empty and holds no run.json: it is not a run folder. Choose another --out"
            )
        return None
    try:
        saved = incoming_object(path)
        version = saved["format"]
        if version == FORMAT:
            saved["configuration"], saved["made_of"], saved["stages"], saved["notes"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is corrupt ({error}): delete the folder, or choose another --out"
        ) from error
    if version != FORMAT:
        raise RunError(
            f"{out} is a run of another version of this package (format {version!r}; this one reads and "
            f"writes {FORMAT!r}): choose another --out, or use the version that made it"
        )
    return saved


def read_selected(out: str | Path) -> dict[str, Any]:
    """selected.json of a run folder.

    Raises:
        RunError: none yet, or it is corrupt.
    """
    path = Path(out) / "selected.json"
    advice = f"delete it, and run `interp-ablate run --out {out}` again"
    selected = incoming_object(path, advice=advice, fields=("plan", "limits"))
    if selected["plan"] is not None:
        incoming_object(path, advice=advice, fields=("trial", "test"))
    return selected


NEEDS: dict[str, Sequence[str]] = {
    "collect": (),
    "directions": ("collect",),
    "concept": ("directions",),
    "sweep": ("directions",),
    "evaluate": ("sweep",),
    "export": ("evaluate",),
    "plot": ("directions",),
    "report": ("plot",),
}
OUTPUTS: dict[str, Sequence[str]] = {
    "collect": ("cache",),
    "directions": ("directions.safetensors", "directions.json", "projections.csv"),
    "concept": ("attribution.csv", "layer_effects.csv"),
    "sweep": ("trials.jsonl", "trials.csv"),
    "evaluate": ("selected.json", "generations.jsonl"),
    "export": ("export",),
    "plot": ("figures",),
    "report": ("report.html",),
}
