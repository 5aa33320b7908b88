"""Healing: an edited checkpoint trained on preferences (DPO) until it is close to the original again.

Sources: DPO, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; recovery after such an edit by DPO,
Labonne 2024, https://huggingface.co/blog/mlabonne/abliteration.

Knows: the steps from preferences to a certified checkpoint, its report and its card. Does not know: how a
trainer works, or how the edit was found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from interp_ablate.errors import ExportError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.export.checkpoint import atomic_folder
from interp_ablate.export.checkpoint_files import write_json
from interp_ablate.export.model_card import CERTIFICATE
from interp_ablate.export.preflight import check_place
from interp_ablate.models.float32 import in_float32
from interp_ablate.models.model import Model
from interp_ablate.stats.intervals import paired_difference
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.provenance import versions
from interp_ablate.storage.safetensors_reader import Checkpoint
from interp_ablate.storage.strict_json import json_text
from interp_ablate.training.healing.case import (
    EditedCheckpoint,
    HealingRun,
    HeldOut,
    bounds_of_damage,
    mean_measures,
    measure_damage,
    residual_share_along,
)
from interp_ablate.training.healing.dpo_training import (
    AXOLOTL,
    PREFERENCES,
    REPORT,
    axolotl_config,
    axolotl_text,
    dpo,
    project,
)
from interp_ablate.training.healing.preferences import pair_rows
from interp_ablate.training.lora_targets import adapted_layers, in_words
from interp_ablate.training.rows import RowTokenizer, TrainingRow
from interp_ablate.training.trainable_model import PACKAGES, TrainableModel, merge, write_trained
from interp_ablate.training.trainer import checkpoint_folder, train
from interp_ablate.weights.plan_to_weights import WeightPlan

REPORT_FORMAT = "interp_ablate.heal/1"


def heal(
    case: EditedCheckpoint,
    treatment: HealingRun,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train an adapter on preferences over an edited checkpoint, merge it, certify it, measure it.

    `out` is a checkpoint that plain transformers loads, with `adapter/`, the preferences, a configuration for
    axolotl, the certificate, the card and the report; it is whole or not there. Killed, the same call goes on
    from the last checkpoint. One whole model is in memory at a time, the original only until it is measured.

    Returns the report.

    Raises:
        RunError, ExportError, PlanError: nothing to train on; a loss that is not finite; tensors of the edit
            that changed although they must not; a certificate that fails. Nothing is left at `out` then.
    """
    healing, recipe, edited = treatment.healing, treatment.recipe, case.edited
    tokenizer = RowTokenizer(edited.tokenizer, edited.chat_format, recipe.max_length)
    rows, counts = pair_rows(treatment.pairs, tokenizer)
    reproject = healing.preserve_edit == "reproject"
    weights = case.weights if case.plan or reproject else None
    settings = _settings(case, treatment)
    check_place(out, edited.nbytes, source=edited.source, overwrite=overwrite)
    with (  # checkpoints go last, when the result is in its place
        checkpoint_folder(out, _identity(case, settings, rows)) as work,
        atomic_folder(out, overwrite=overwrite, source=edited.source) as place,
    ):
        damage = _Damage(case, treatment.held_out)
        trainer = dpo(case, rows, work, healing=healing, recipe=recipe)
        adapted = in_words(adapted_layers(trainer.model))
        logged = train(trainer, work, on_step=on_step)
        projected = project(trainer.model, weights) if reproject and weights else 0
        trained = merge(edited, trainer.model)
        plan = case.plan.to_dict() if case.plan else None
        origin = {"for": "recovery", **settings, "plan_of_source": plan}
        certificate = write_trained(trained, place, origin)
        unchanged = edited_tensors_unchanged(
            edited, weights, place, must=healing.preserve_edit == "freeze-writers"
        )
        report = {
            "format": REPORT_FORMAT,
            **settings,
            "preferences": {**counts, **treatment.details},
            "adapted": adapted,
            "steps": [_step(entry) for entry in logged],
            "edit": {**unchanged, "modules_projected": projected},
            "adapter": certificate["adapter"],
            **damage.report(trained.base),
            "versions": versions(*PACKAGES),
        }
        _write(place, report, treatment, case, certificate)
    return report


def _settings(case: EditedCheckpoint, treatment: HealingRun) -> dict[str, Any]:
    return {
        "source": case.edited.source.to_dict(),
        "original": case.original.source.to_dict() if case.original else None,
        "chat_format": case.edited.chat_format.to_dict(),
        "healing": asdict(treatment.healing),
        "recipe": treatment.recipe.to_dict(),
    }


def _identity(
    case: EditedCheckpoint,
    settings: Mapping[str, Any],
    rows: Sequence[tuple[TrainingRow, TrainingRow]],
) -> dict[str, Any]:
    """The training that checkpoints belong to; weights may change under the same name."""
    bases = [base for base in (case.edited, case.original) if base]
    fingerprints = []
    for base in bases:
        fingerprints.append(base.fingerprint)
        base.release()
    return {
        **{name: settings[name] for name in ("healing", "recipe")},
        "weights": fingerprints,
        "rows": [[a.prompt, a.answer, b.answer] for a, b in rows],
    }


class _Damage:
    """The original's and the edited model's numbers on held-out prompts, measured before the training."""

    def __init__(self, case: EditedCheckpoint, held_out: HeldOut | None) -> None:
        self.plan, self.held_out = case.plan, held_out
        self.baseline: ModelOutputs | None = None
        self.values: dict[str, dict[str, list[float | None]]] = {}
        self.means: dict[str, dict[str, Any]] = {}
        self.computed_in: dict[str, str] = {}
        if held_out is None:
            return
        if case.original is not None:
            self.baseline = case.original.measured(partial(self._measure, "original", held_out))
        case.edited.measured(partial(self._measure, "edited", held_out))

    def _measure(self, name: str, held_out: HeldOut, model: Model) -> ModelOutputs | None:
        with in_float32(model.tl):  # small KLs are below the rounding of half precision
            self.computed_in[name] = str(model.dtype).removeprefix("torch.")
            self.values[name], benign = measure_damage(model, held_out, self.baseline)
            self.means[name] = mean_measures(self.values[name])
            if self.plan is not None:
                share = residual_share_along(model, self.plan, held_out.requests)
                self.means[name]["along_plan"] = share
            return benign.without_model() if name == "original" else None

    def report(self, healed: TrainableModel) -> dict[str, Any]:
        """The numbers of all three models, and how far healed is from edited, prompt by prompt."""
        if self.held_out is None:
            return {"measured": None}
        self._measure("healed", self.held_out, healed.model)
        edited = self.values["edited"]
        return {
            "measured": self.means,
            "computed_in": self.computed_in,
            "healed_minus_edited": {
                name: paired_difference(values, edited[name], bounds=bounds_of_damage(name))
                for name, values in self.values["healed"].items()
            },
            "held_out": {
                "source": self.held_out.source,
                "max_new_tokens": self.held_out.max_new_tokens,
                "expressions": self.held_out.expression.identity,
            },
        }


def _step(entry: Mapping[str, Any]) -> dict[str, float]:
    names = ("step", "loss", "rewards/accuracies", "rewards/margins")
    return {name: round(float(entry[name]), 6) for name in names if name in entry}


def edited_tensors_unchanged(
    edited: TrainableModel, weights: WeightPlan | None, folder: str | Path, *, must: bool
) -> dict[str, Any]:
    """Count the tensors that the edit changed, and those of them with the same bytes after the training.

    Raises:
        ExportError: `must`, and one is not.
    """
    origin = Path(edited.source.path or "")
    if weights is None or edited.source.kind != "folder":
        return {"tensors": None, "unchanged": None}
    before, after = Checkpoint.open(origin), Checkpoint.open(folder)
    names = [name for name in weights.edits if name in before.tensors]
    changed = [n for n in names if not torch.equal(before.read(n), after.read(n))]
    if changed and must:
        raise ExportError(
            f"{len(changed)} tensors of the edit changed in training, such as {changed[0]}: this is a "
            "fault of this package; nothing was left on disk"
        )
    return {"tensors": len(names), "unchanged": len(names) - len(changed)}


def _write(
    place: Path,
    report: Mapping[str, Any],
    treatment: HealingRun,
    case: EditedCheckpoint,
    certificate: Mapping[str, Any],
) -> None:
    rows = (json_text(pair.to_dict(), ensure_ascii=False) for pair in treatment.pairs)
    (place / PREFERENCES).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    adapter = incoming_object(place / "adapter" / "adapter_config.json")
    config = axolotl_config(
        case.edited.source.path or case.edited.source.name,
        treatment,
        targets=sorted(adapter["target_modules"]),
        parameters=sorted(adapter.get("target_parameters") or ()),
    )
    (place / AXOLOTL).write_text(axolotl_text(config, treatment.healing), encoding="utf-8")
    write_json(place / REPORT, report)
    write_json(place / CERTIFICATE, certificate)
    card = (place / "README.md").read_text(encoding="utf-8")
    (place / "README.md").write_text(f"{card}\n{_card(report)}", encoding="utf-8")


def _card(report: Mapping[str, Any]) -> str:
    """The model card's section on the recovery."""
    healing, recipe = report["healing"], report["recipe"]
    keeping = {
        "freeze-writers": "the adapter sat on what reads the residual stream: the edit's tensors are unchanged",
        "reproject": "what the adapter wrote to the residual stream went through the edit at the end",
        "none": "nothing kept the adapter from undoing the edit",
    }[healing["preserve_edit"]]
    lines = [
        "## Recovery after the edit",
        "",
        f"Trained on {report['preferences']['used']} preferences with TRL's DPOTrainer and a LoRA of rank "
        f"{recipe['rank']}, {recipe['steps']} steps of {recipe['batch_size']}, beta {healing['beta']}, "
        f"weights of SFT {healing['sft_weight']} and KL {healing['kl_weight']}; {keeping}. "
        "The edit itself is that of the checkpoint this one came from.",
    ]
    if report["measured"]:
        names = list(report["measured"])
        lines += ["", "| held-out prompts | " + " | ".join(names) + " |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for row in ("behaviour", "behaviour_benign", "kl_first_token", "kl_continuation"):
            cells = [_cell(report["measured"][name].get(row)) for name in names]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    if value["mean"] is None:
        return "no value"
    span = "({:.3g} to {:.3g})".format(*value["interval"]) if value["interval"] else "(no interval)"
    return f"{value['mean']:.3g} {span}"
