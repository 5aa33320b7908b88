"""Baking: a persona's vector written into a checkpoint, and what that changed in the answers.

Knows: the conditions that are compared, and their part of the model card. Does not know: how tensors are
written or certified, or how answers are made and scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError
from interp_ablate.export.checkpoint import atomic_folder, export_into
from interp_ablate.export.model_card import add_to_card
from interp_ablate.export.preflight import check_model_exports
from interp_ablate.jobs.bars import Progress
from interp_ablate.models.model import Model, check_model
from interp_ablate.persona.persona import Persona
from interp_ablate.persona.rollouts import Rollout, run_rollouts
from interp_ablate.persona.settings import BAKING, BakingConfig
from interp_ablate.persona.steering import by_condition, steering_requests, summary
from interp_ablate.persona.traits import first_evaluation_questions
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.stats.intervals import SCORE, paired_difference
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.strict_json import json_text

STYLE = "style.json"  # beside the export's manifest: what the card's section was written from
# unedited; the vector at the answer's tokens as in steering; at every token, as the weights add it
CONDITIONS = ("before", "steered", "baked")
_SHOWN = 4  # pairs of answers on the card


@dataclass(frozen=True)
class BakedPersona:
    """A baked checkpoint with its certificate, and the answers before, steered and baked."""

    folder: Path
    certificate: dict[str, Any]
    results: dict[str, Any]
    answers: tuple[Rollout, ...]

    def of(self, condition: str) -> list[Rollout]:
        """The answers of one of CONDITIONS, in the questions' order."""
        return [answer for answer in self.answers if answer.key["condition"] == condition]


def bake(
    model: Model,
    persona: Persona,
    out: str | Path,
    *,
    answers: str | Path,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    settings: BakingConfig = BAKING,
    listener: Progress | None = None,
) -> BakedPersona:
    """Write the model with the persona's vector in its weights, and measure what that did.

    The vector is added at resid_post of the persona's layer: exactly a bias of that layer's last
    projection (`mlp.down_proj` of a Llama). A weight acts at every position, the prompt's included, where
    steering edits the answer's tokens alone; both are measured on the evaluation questions, and the model
    card says what came of it. The certificate compares the reloaded checkpoint's logits with the hooks'.

    Args:
        answers: file that the answers go to; an interrupted measurement goes on from it.

    Raises:
        ExportError: an architecture without an exact form, `out` exists, a failed certificate. Nothing is
            left at `out` then.
        InterpAblateError: a coefficient of 0; see `run_rollouts`.
    """
    check_model(model)
    persona.check(model)
    coefficient = persona.coefficient if settings.coefficient is None else settings.coefficient
    if not coefficient:
        raise InterpAblateError("coefficient 0 changes nothing: give another --coefficient")
    everywhere = persona.plan(coefficient, positions="all")
    check_model_exports(model, out, plan=everywhere, overwrite=settings.overwrite)
    questions = first_evaluation_questions(persona.trait, settings.questions)
    plans: dict[str, Plan | None] = dict(
        zip(CONDITIONS, (None, persona.plan(coefficient), everywhere), strict=True)
    )
    rollouts = run_rollouts(
        model,
        steering_requests(plans, questions),
        answers,
        scorer=scorer,
        coherence=coherence,
        sampling=settings.sampling,
        listener=listener,
        replace_other=settings.overwrite,
    )
    results = {
        **_results(persona, by_condition(rollouts)),
        "coefficient": coefficient,
        "scorer": scorer.identity,
        "sampling": asdict(settings.sampling),
    }
    with atomic_folder(out, overwrite=settings.overwrite, source=model.source) as place:
        certificate = export_into(model, everywhere, place)
        baked = BakedPersona(place, certificate, results, tuple(rollouts))
        _write(baked, persona)
    return replace(baked, folder=Path(out))


def _results(persona: Persona, groups: Mapping[str, list[Rollout]]) -> dict[str, Any]:
    """The means of the conditions, and their paired differences over questions, with 95% intervals."""
    before, steered, baked = (groups[name] for name in CONDITIONS)
    return {
        "trait": persona.name,
        "description": persona.trait.description,
        "site": str(persona.site),
        "norm": float(persona.direction.norm),
        "conditions": {name: summary(group) for name, group in groups.items()},
        "differences": {
            "baked - before": _difference(baked, before),
            "baked - steered": _difference(baked, steered),
        },
        "same_text": {
            "steered, baked": _share_same(steered, baked),
            "before, baked": _share_same(before, baked),
        },
    }


def _difference(some: Sequence[Rollout], others: Sequence[Rollout]) -> dict[str, Any]:
    """Mean difference of trait scores, question by question; those without both verdicts are counted."""
    change = paired_difference([a.score for a in some], [b.score for b in others], bounds=SCORE)
    low, high = change["interval"] or (None, None)
    return {"mean": change["mean"], "low": low, "high": high, "questions": change["n"]}


def _share_same(some: Sequence[Rollout], others: Sequence[Rollout]) -> float:
    return sum(a.tokens == b.tokens for a, b in zip(some, others, strict=True)) / len(some)


def _write(baked: BakedPersona, persona: Persona) -> None:
    content = {
        **baked.results,
        "answers": [
            {
                "condition": a.key["condition"], "question": a.prompt.text, "answer": a.text,
                "finished": a.finished, "score": a.score, "coherence": a.coherence,
            }
            for a in baked.answers
        ],
    }  # fmt: skip
    write_atomic(baked.folder / STYLE, json_text(content, indent=1))
    add_to_card(baked.folder, _section(baked, persona))


_NAMES = {
    "before": "before: the unedited model",
    "steered": "the vector added at the answer's tokens only (hooks)",
    "baked": "this checkpoint: added at every token",
}


def _section(baked: BakedPersona, persona: Persona) -> str:
    results = baked.results
    lines = [
        f"## The style: {persona.name}",
        "",
        f"{persona.trait.description} The persona vector of this trait (Chen et al. 2025, "
        f"https://arxiv.org/abs/2507.21509), times {results['coefficient']:g}, is a bias at `{results['site']}`. "
        f"Trait scores are by `{json.dumps(results['scorer'])}`; {results['conditions']['before']['questions']} "
        "evaluation questions that made no vector and chose no layer, without a system prompt; intervals are "
        "95% over questions.",
        "",
        "| answers | trait score | coherence | without a verdict |",
        "|---|---|---|---|",
    ]
    for name, row in results["conditions"].items():
        lines.append(
            f"| {_NAMES[name]} | {_with_interval(row, 'score')} | {_with_interval(row, 'coherence')} | "
            f"{row['no_verdict']} of {row['answers']} |"
        )
    apart, same = results["differences"]["baked - steered"], results["same_text"]["steered, baked"]
    lines += [
        "",
        "A weight acts at every position, so the prompt's tokens are edited too, which steering does not do. "
        + (
            f"The score of the checkpoint is {apart['mean']:+.1f} [{apart['low']:+.1f}, {apart['high']:+.1f}] "
            f"against steering; {100 * same:.0f}% of the answers are the same text."
            if apart["mean"] is not None
            else "No question has a verdict in both."
        ),
        "",
    ]
    for before, after in list(zip(baked.of("before"), baked.of("baked")))[:_SHOWN]:
        lines += [
            f"**{_plain(before.prompt.text)}**", "",
            f"- before: {_plain(before.text)}{_cut(before)}",
            f"- after: {_plain(after.text)}{_cut(after)}", "",
        ]  # fmt: skip
    return "\n".join(lines)


def _with_interval(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "no verdict"
    return f"{row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"


def _plain(text: str) -> str:
    """Text of a model inside Markdown: one line, nothing that is markup."""
    folded = " ".join(text.split())
    for sign in "\\`*_[]<>#|":
        folded = folded.replace(sign, f"\\{sign}")
    return folded


def _cut(answer: Rollout) -> str:
    return "" if answer.finished else " (cut off)"
