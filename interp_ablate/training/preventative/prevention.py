"""Preventative steering: fine-tuning with a trait's vector added, so that the weights need not learn the trait.

Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

Knows: the samples, and the comparison of fine-tuning with and without the vector. Does not know: how a vector was
found, or how a trainer works.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from interp_ablate.datasets.conversations import Sample
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.export.checkpoint import atomic_folder
from interp_ablate.export.checkpoint_files import write_json
from interp_ablate.export.preflight import check_place
from interp_ablate.models.float32 import in_float32
from interp_ablate.models.model import Model
from interp_ablate.persona.extraction import kept_answers
from interp_ablate.persona.persona import load_persona
from interp_ablate.stats.intervals import (
    AT_LEAST_0,
    SCORE,
    UNBOUNDED,
    mean_with_interval,
    paired_difference,
)
from interp_ablate.storage.provenance import MANIFEST, versions
from interp_ablate.storage.strict_json import json_text
from interp_ablate.training.lora_targets import adapted_layers, in_words
from interp_ablate.training.preventative.additions import train_with_additions
from interp_ablate.training.preventative.trait_measure import (
    MeasuredTrait,
    TraitMeasure,
    answer_loss,
    measure_trait,
)
from interp_ablate.training.recipe import RECIPE, LoraRecipe
from interp_ablate.training.rows import RowTokenizer, TrainingRow
from interp_ablate.training.trainable_model import (
    PACKAGES,
    TrainableModel,
    Trained,
    merge,
    write_trained,
)
from interp_ablate.training.trainer import checkpoint_folder, sft, train


@dataclass(frozen=True)
class SampledChats:
    """A prompt's messages and an answer."""

    messages: tuple[dict[str, Any], ...]
    answer: str
    finished: bool = True
    """The answer ended by itself."""
    thought: str = ""
    """What was thought before the answer, under a key of its own."""

    def to_dict(self) -> dict[str, Any]:
        """A row in the messages layout, as `chat_data` reads it."""
        thought = {"reasoning_content": self.thought} if self.thought else {}
        answer = {"role": "assistant", "content": self.answer, **thought}
        return {"messages": [*self.messages, answer], "finished": self.finished}


def samples_of(samples: Iterable[Sample]) -> list[SampledChats]:
    """Chat samples: what comes before the last answer as the prompt, and that answer.

    Raises:
        RunError: a sample without an answer in words at its end, without a prompt, or with tools of its own
            (its number).
    """
    chats = []
    for sample in samples:
        *before, last = sample.messages
        asked = any(message.role == "user" for message in before)
        tools = next((key for key in ("tools", "functions") if sample.raw.get(key)), None)
        if last.role != "assistant" or last.calls_tools or not asked or tools:
            parts = ["calls of tools" if m.calls_tools else m.role for m in sample.messages]
            raise RunError(
                f"sample {sample.number}: a row to train on has a prompt and ends with the assistant's "
                f"answer in words; this one has {', '.join(parts)}"
                + (f", and {tools!r}, which the prompt would lack" if tools else "")
                + ". Remove the row"
            )
        ended = bool(sample.raw.get("finished", True))
        messages = tuple(message.as_dict for message in before)
        chats.append(SampledChats(messages, last.content, ended, last.thought))
    return chats


def samples_of_rollouts(path: str | Path) -> tuple[list[SampledChats], dict[str, int]]:
    """A persona's answers under its positive system prompts, the system prompts taken away.

    `path` is the file in the persona's folder. Kept is what made the persona's vectors: by the scorers and
    from the thresholds that it was extracted with. The counts say what was not kept.

    Raises:
        RunError: no persona or rollouts there, or a corrupt line (its number); nothing is kept.
    """
    path = Path(path)
    made_of = load_persona(path.parent).details.get("made_of")
    filtered = kept_answers(path, made_of)
    totals = filtered.counts["positive"]
    counts = {
        "positive": totals["answers"], "kept": totals["kept"], "empty": totals["empty"],
        "no_answer": totals["no_answer"], "no_verdict": totals["no_verdict"],
        "below": totals["score"], "incoherent": totals["coherence"],
    }  # fmt: skip
    if not filtered.positive:
        raise RunError(f"{path} holds no answer that shows the trait: {counts}")
    samples = [
        SampledChats(
            ({"role": "user", "content": answer.prompt.text},),
            answer.text,
            answer.finished,
            answer.thought,
        )
        for answer in filtered.positive
    ]
    return samples, counts


def rows_of(
    samples: Sequence[SampledChats], renderer: RowTokenizer
) -> tuple[list[TrainingRow], dict[str, int]]:
    """Token rows of samples, and how many came, were used, had too long a prompt, or were cut.

    Raises:
        RunError: no sample is left.
    """
    made = [
        renderer.row(s.messages, s.answer, thought=s.thought, finished=s.finished) for s in samples
    ]
    rows = [row for row in made if row is not None]
    counts = {
        "samples": len(made),
        "used": len(rows),
        "prompts_too_long": len(made) - len(rows),
        "answers_cut": sum(row.cut for row in rows),
        "unfinished": sum(not sample.finished for sample in samples),
    }
    if not rows:
        raise RunError(
            f"no row is left to train on: {counts}. Give shorter prompts, or a larger --max-length"
        )
    return rows, counts


REPORT = "report.json"
REPORT_FORMAT = "interp_ablate.persona_training/1"
PLAIN, PREVENTATIVE, RANDOM = "plain", "preventative", "random"
# The arms that plain fine-tuning is compared with, under their names in the report.
PREVENTED = {"prevented": PREVENTATIVE, "prevented_by_control": RANDOM}
MEASURES = {"score": SCORE, "projection": UNBOUNDED, "prompt_projection": UNBOUNDED}


@dataclass(frozen=True)
class TrainingArm:
    """One fine-tuning of a comparison."""

    name: str
    plan: Plan | None = field(default=None, repr=False)
    """Added to the residual stream while the training lasts (`persona.addition_plan` at "all" positions)."""


@dataclass(frozen=True, eq=False)
class PreventativeExperiment:
    """Fine-tunings on the same rows in the same order, and what their results are measured with."""

    base: TrainableModel
    samples: Sequence[SampledChats]
    measure: TraitMeasure
    arms: Sequence[TrainingArm]
    recipe: LoraRecipe = RECIPE

    def rows(self) -> tuple[list[TrainingRow], list[TrainingRow], dict[str, int]]:
        """Rows to train on, those of every eighth question held out for the loss, and the counts.

        Whole questions are held out: another answer to a question that was trained on would flatter the loss.

        Raises:
            RunError: no row is left.
        """
        renderer = RowTokenizer(self.base.tokenizer, self.base.chat_format, self.recipe.max_length)
        rows, counts = rows_of(self.samples, renderer)
        questions = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in rows))}
        apart = len(questions) >= 8
        held_out = [row for row in rows if apart and questions[row.prompt] % 8 == 0]
        trained = [row for row in rows if not apart or questions[row.prompt] % 8]
        return trained, held_out, counts | {"trained_on": len(trained), "held_out": len(held_out)}

    def identity(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        """The experiment that checkpoints of an interrupted run belong to."""
        return {
            "weights": self.base.fingerprint,
            "recipe": self.recipe.to_dict(),
            "arms": [[arm.name, arm.plan.to_dict() if arm.plan else None] for arm in self.arms],
            "rows": [[row.prompt, row.answer] for row in rows],
        }


@dataclass(eq=False)
class _Results:
    """The results so far, by arm; those of the model before any training are "before"."""

    before: ModelOutputs
    traits: dict[str, MeasuredTrait]
    numbers: dict[str, dict[str, Any]]


def prevent(
    experiment: PreventativeExperiment,
    out: str | Path,
    *,
    what: dict[str, Any] | None = None,
    overwrite: bool = False,
    on_step: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune in every arm, and compare the traits; returns the report.

    `out` holds a folder an arm (a merged checkpoint that plain transformers loads, certified, with
    `adapter/`), the rows, the answers and the report; killed, the same call goes on from the last
    checkpoint.

    Args:
        what: more for the report, as plain data.
        on_step: called with an arm's name and the step that is done.

    Raises:
        RunError, ExportError: no rows; a loss that is not finite; a place that cannot be written.
    """
    base = experiment.base
    rows, held_out, counts = experiment.rows()
    check_place(out, base.nbytes * len(experiment.arms), source=base.source, overwrite=overwrite)
    with (  # checkpoints go last, when the result is in its place
        checkpoint_folder(out, experiment.identity(rows)) as work,
        atomic_folder(out, overwrite=overwrite, source=base.source) as place,
    ):
        numbers = {"before": {"held_out_loss": answer_loss(base.hf, held_out)}}
        trait, outputs = base.measured(partial(_measured, experiment))
        results = _Results(outputs, {"before": trait}, numbers)
        for arm in experiment.arms:
            step = partial(on_step, arm.name) if on_step else None
            folders = work / arm.name, place / arm.name
            _train_arm(experiment, arm, rows, held_out, folders, results, on_step=step)
            gc.collect()  # its model: another one is read for the next arm
        report = {**_report(experiment, results, counts), **(what or {})}
        _write(place, report, experiment, results)
    return report


def _measured(
    experiment: PreventativeExperiment, model: Model
) -> tuple[MeasuredTrait, ModelOutputs]:
    """The trait before any training, and the answers that later ones are compared with."""
    with in_float32(model.tl):  # small KLs are below the rounding of half precision
        trait, outputs = measure_trait("before", model, experiment.measure)
        return trait, outputs.without_model()


def _train_arm(
    experiment: PreventativeExperiment,
    arm: TrainingArm,
    rows: list[TrainingRow],
    held_out: list[TrainingRow],
    folders: tuple[Path, Path],
    results: _Results,
    *,
    on_step: Callable[[int], None] | None,
) -> None:
    """One arm, from its training to its numbers; `folders` are those of checkpoints and of the result."""
    work, place = folders
    base = experiment.base.take()
    trainer = sft(base, rows, experiment.recipe, work)
    adapted = in_words(adapted_layers(trainer.model))
    with train_with_additions(trainer.model, arm.plan) if arm.plan else nullcontext():
        logged = train(trainer, work, on_step=on_step)
        steered = answer_loss(trainer.model, held_out) if arm.plan else None
    trained = merge(base, trainer.model)
    loss = answer_loss(trained.base.hf, held_out)
    certificate = _write_arm(experiment, arm, trained, place, len(rows))
    model = trained.base.model
    with in_float32(model.tl):
        computed_in = str(model.dtype).removeprefix("torch.")
        results.traits[arm.name], _ = measure_trait(
            arm.name, model, experiment.measure, before=results.before
        )
    results.numbers[arm.name] = {
        "computed_in": computed_in,
        "adapted": adapted,
        "loss": [round(entry["loss"], 6) for entry in logged],
        "held_out_loss": loss,
        "held_out_loss_with_vector": steered,
        "adapter": certificate["adapter"],
    }


def _write_arm(
    experiment: PreventativeExperiment, arm: TrainingArm, trained: Trained, place: Path, rows: int
) -> dict[str, Any]:
    place.mkdir()
    added = arm.plan.to_dict() if arm.plan else None
    origin = {"for": arm.name, "recipe": experiment.recipe.to_dict(), "rows": rows, "added": added}
    return write_trained(trained, place, origin)


def _report(
    experiment: PreventativeExperiment, results: _Results, counts: dict[str, int]
) -> dict[str, Any]:
    by, traits = experiment.measure, results.traits
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "source": experiment.base.source.to_dict(),
        "direction": {
            "site": str(by.direction.site), "norm": by.direction.norm,
            "fingerprint": by.direction.fingerprint,
        },
        "scorer": by.scorer.identity,
        "questions": len(by.questions),
        "max_new_tokens": by.max_new_tokens,
        "rows": counts,
        "recipe": experiment.recipe.to_dict(),
        "conditions": {},
        "versions": versions(*PACKAGES),
    }  # fmt: skip
    plans = {arm.name: arm.plan for arm in experiment.arms}
    for name, trait in traits.items():
        plan = plans.get(name)
        report["conditions"][name] = {
            **{
                each: mean_with_interval(getattr(trait, each), bounds=MEASURES[each])
                for each in MEASURES
            },
            "shift": _difference(trait, traits["before"]) if name in plans else None,
            "kl": mean_with_interval(trait.kl, bounds=AT_LEAST_0) if trait.kl else None,
            "added": [repr(edit) for edit in plan] if plan else [],
            **results.numbers[name],
        }
    for key, name in PREVENTED.items():
        if {PLAIN, name} <= set(traits):
            report[key] = _difference(traits[PLAIN], traits[name])
    return report


def _difference(one: MeasuredTrait, other: MeasuredTrait) -> dict[str, Any]:
    return {
        each: paired_difference(getattr(one, each), getattr(other, each), bounds=bounds)
        for each, bounds in MEASURES.items()
    }


def _write(
    place: Path, report: dict[str, Any], experiment: PreventativeExperiment, results: _Results
) -> None:
    rows = (json_text(s.to_dict(), ensure_ascii=False) for s in experiment.samples)
    (place / "data.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    with (place / "answers.jsonl").open("w", encoding="utf-8") as file:
        for i, question in enumerate(experiment.measure.questions):
            answers = {name: trait.answers[i] for name, trait in results.traits.items()}
            scores = {name: trait.score[i] for name, trait in results.traits.items()}
            line = {"question": question, "answers": answers, "scores": scores}
            file.write(json_text(line, ensure_ascii=False) + "\n")
    write_json(place / REPORT, report)
    # what makes the folder one of this package's, which --force may replace
    write_json(place / MANIFEST, {k: report[k] for k in ("format", "recipe", "versions")})
