"""Preventing: fine-tuning with a trait's vector added, so that the weights need not learn the trait.

Knows: additions as hooks on a plain Hugging Face decoder while it trains, trait-bearing rows from a
persona's rollouts, a model's trait before and after (projection, score, what it costs), the comparison of
plain and preventative fine-tuning. Does not know: how a vector was found, how a trainer works
(`training`), or what a score means.

Source: preventative steering of Chen et al. 2025, https://arxiv.org/abs/2507.21509.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.export.checkpoint import atomic_folder
from interp_ablate.export.checkpoint_files import write_json
from interp_ablate.stats.intervals import mean_with_interval, paired_difference
from interp_ablate.storage.output_folder import check_output_path
from interp_ablate.storage.provenance import MANIFEST, versions
from interp_ablate.training.merging import PACKAGES, merge, write_trained
from interp_ablate.training.preventative.additions import train_with_additions
from interp_ablate.training.preventative.samples import SampledChats, rows_of
from interp_ablate.training.preventative.trait_measure import (
    MeasuredTrait,
    TraitMeasure,
    answer_loss,
    measure_trait,
)
from interp_ablate.training.recipe import RECIPE, LoraRecipe
from interp_ablate.training.rows import RowTokenizer, TrainingRow
from interp_ablate.training.trainable_model import TrainableModel
from interp_ablate.training.trainer import checkpoint_folder, sft, train

REPORT = "report.json"
REPORT_FORMAT = "interp_ablate.persona_training/1"
PLAIN, PREVENTATIVE, RANDOM = "plain", "preventative", "random"
# What plain fine-tuning is held against, under its name in the report.
PREVENTED = {"prevented": PREVENTATIVE, "prevented_by_control": RANDOM}
MEASURES = ("score", "projection", "prompt_projection")


# ---- the comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingArm:
    """One fine-tuning: its name, and what is added to the stream while it lasts (None: nothing)."""

    name: str
    plan: Plan | None = field(default=None, repr=False)


def prevention_plan(direction: Direction, coefficient: float, *, positions: str = "all") -> Plan:
    """The addition of a preventative training: coefficient * raw vector at the direction's own site.

    Raises:
        PlanError: see `Add`.
    """
    where: Any = positions
    return Plan((Add(direction, direction.site, coefficient=coefficient, positions=where),))


@dataclass(frozen=True, eq=False)
class PreventativeExperiment:
    """The same rows, in the same order, under every condition; what all of it is measured with."""

    base: TrainableModel
    samples: Sequence[SampledChats]
    yardstick: TraitMeasure
    conditions: Sequence[TrainingArm]
    recipe: LoraRecipe = RECIPE

    def rows(self) -> tuple[list[TrainingRow], list[TrainingRow], dict[str, int]]:
        """Rows to train on, every eighth one held out for the loss, and the counts.

        Raises:
            RunError: no row is left.
        """
        renderer = RowTokenizer(self.base.tokenizer, self.base.template, self.recipe.max_length)
        rows, counts = rows_of(self.samples, renderer)
        held_out = rows[::8] if len(rows) >= 8 else []
        kept = [row for i, row in enumerate(rows) if i % 8 or not held_out]
        return kept, held_out, counts | {"trained_on": len(kept), "held_out": len(held_out)}

    def identity(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        """What checkpoints of an interrupted run belong to."""
        return {
            "source": self.base.source.to_dict(),
            "weights": self.base.fingerprint,
            "recipe": self.recipe.to_dict(),
            "conditions": [[c.name, c.plan.to_dict() if c.plan else None] for c in self.conditions],
            "rows": [[row.prompt, row.answer] for row in rows],
        }


@dataclass(eq=False)
class _Results:
    """What is known so far: measurements and training numbers by condition, and the model before."""

    before: ModelOutputs
    measured: dict[str, MeasuredTrait]
    numbers: dict[str, dict[str, Any]]


def prevent(
    comparison: PreventativeExperiment,
    out: str | Path,
    *,
    what: dict[str, Any] | None = None,
    overwrite: bool = False,
    on_step: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune under every condition, and compare the traits; returns the report.

    `out` holds a folder a condition (a merged checkpoint that plain transformers loads, certified, with
    `adapter/`), the rows, the answers and the report; killed, the same call goes on from the last
    checkpoint.

    Args:
        what: more for the report, as plain data.
        on_step: called with a condition's name and the step that is done.

    Raises:
        RunError, ExportError: no rows; a loss that is not finite; a place that cannot be written.
    """
    base, by = comparison.base, comparison.yardstick
    rows, held_out, counts = comparison.rows()
    check_output_path(out, overwrite=overwrite, source=base.source.path)
    with (  # checkpoints go last, when the result is in its place
        checkpoint_folder(out, comparison.identity(rows)) as work,
        atomic_folder(out, overwrite=overwrite, source=base.source) as place,
    ):
        first, evidence = measure_trait("before", base.copy().model, by)
        numbers = {"before": {"held_out_loss": answer_loss(base.hf, held_out)}}
        results = _Results(evidence, {"before": first}, numbers)
        for condition in comparison.conditions:
            step = partial(on_step, condition.name) if on_step else None
            training = _Training(condition, work / condition.name, place / condition.name, step)
            _train_one(comparison, training, (rows, held_out), results)
        report = {**_report(comparison, results, counts), **(what or {})}
        _write(place, report, comparison, results)
    return report


@dataclass(frozen=True)
class _Training:
    """One condition's training: where its checkpoints and its results go, and who hears of steps."""

    condition: TrainingArm
    work: Path
    place: Path
    on_step: Callable[[int], None] | None


def _train_one(
    comparison: PreventativeExperiment,
    one: _Training,
    rows: tuple[list[TrainingRow], list[TrainingRow]],
    results: _Results,
) -> None:
    (kept, held_out), recipe = rows, comparison.recipe
    name, plan = one.condition.name, one.condition.plan
    base = comparison.base.copy()
    trainer = sft(base, kept, recipe, one.work)
    with train_with_additions(trainer.model, plan) if plan else nullcontext():
        logged = train(trainer, one.work, on_step=one.on_step)
        steered = answer_loss(trainer.model, held_out) if plan else None
    trained = merge(base, trainer.model)
    loss = answer_loss(trained.base.hf, held_out)
    one.place.mkdir()
    added = plan.to_dict() if plan else None
    what = {"for": name, "recipe": recipe.to_dict(), "rows": len(kept), "added": added}
    certificate = write_trained(trained, one.place, what)
    measured, _ = measure_trait(
        name, trained.base.model, comparison.yardstick, before=results.before
    )
    results.measured[name] = measured
    results.numbers[name] = {
        "loss": [round(entry["loss"], 6) for entry in logged],
        "held_out_loss": loss,
        "held_out_loss_with_vector": steered,
        "adapter": certificate["adapter"],
    }


def _report(
    comparison: PreventativeExperiment, results: _Results, counts: dict[str, int]
) -> dict[str, Any]:
    by, found = comparison.yardstick, results.measured
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "source": comparison.base.source.to_dict(),
        "direction": {
            "site": str(by.direction.site), "norm": by.direction.norm,
            "fingerprint": by.direction.fingerprint,
        },
        "scorer": by.scorer.identity,
        "questions": len(by.questions),
        "max_new_tokens": by.max_new_tokens,
        "rows": counts,
        "recipe": comparison.recipe.to_dict(),
        "conditions": {},
        "versions": versions(*PACKAGES),
    }  # fmt: skip
    plans = {c.name: c.plan for c in comparison.conditions}
    for name, measured in found.items():
        plan = plans.get(name)
        report["conditions"][name] = {
            **{each: mean_with_interval(getattr(measured, each)) for each in MEASURES},
            "shift": _apart(measured, found["before"]) if name in plans else None,
            "kl": mean_with_interval(measured.kl) if measured.kl else None,
            "added": [repr(edit) for edit in plan] if plan else [],
            **results.numbers[name],
        }
    for key, name in PREVENTED.items():
        if {PLAIN, name} <= set(found):
            report[key] = _apart(found[PLAIN], found[name])
    return report


def _apart(one: MeasuredTrait, other: MeasuredTrait) -> dict[str, Any]:
    return {each: paired_difference(getattr(one, each), getattr(other, each)) for each in MEASURES}


def _write(
    place: Path, report: dict[str, Any], comparison: PreventativeExperiment, results: _Results
) -> None:
    rows = (json.dumps(s.to_dict(), ensure_ascii=False) for s in comparison.samples)
    (place / "data.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    found = results.measured
    with (place / "answers.jsonl").open("w", encoding="utf-8") as file:
        for i, question in enumerate(comparison.yardstick.questions):
            said = {name: measured.answers[i] for name, measured in found.items()}
            scores = {name: measured.score[i] for name, measured in found.items()}
            line = {"question": question, "answers": said, "scores": scores}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(place / REPORT, report)
    # what makes the folder one of this package's, which --force may replace
    write_json(place / MANIFEST, {k: report[k] for k in ("format", "recipe", "versions")})
