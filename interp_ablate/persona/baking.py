"""Baking: a style as a model: a persona's vector written into a checkpoint, with what it changed.

Knows: the one addition that weights compute exactly (at every position), how far that is from the steering
of answers alone, the part of the model card that says so.
Does not know: how tensors are written or certified (`export`), or how answers are made and scored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError
from interp_ablate.export.checkpoint import export_checkpoint
from interp_ablate.export.model_card import add_to_card
from interp_ablate.jobs.progress import Progress
from interp_ablate.models.model import Model
from interp_ablate.persona.answers import Rollout
from interp_ablate.persona.persona import Persona
from interp_ablate.persona.rollouts import run_rollouts
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.persona.steering import GREEDY, steering_requests, summary
from interp_ablate.persona.traits import split_questions
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.stats.intervals import paired_difference
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.output_folder import check_output_path
from interp_ablate.weights.plan_to_weights import weight_plan

STYLE = "style.json"  # beside the export's manifest: what the card's section was written from
# unedited; the vector at the answer's tokens as in steering; at every token, as the weights add it
CONDITIONS = ("before", "steered", "baked")
_SHOWN = 4  # pairs of answers on the card


@dataclass(frozen=True)
class BakedPersona:
    """A baked checkpoint: its certificate, and the answers before, steered and baked."""

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
    coefficient: float | None = None,
    questions: int | None = None,
    sampling: SamplingConfig = GREEDY,
    overwrite: bool = False,
    listener: Progress | None = None,
) -> BakedPersona:
    """Write the model with the persona's vector in its weights, and measure what that did.

    The vector is added at resid_post of the persona's layer: exactly a bias of that layer's last
    projection (`mlp.down_proj` of a Llama). A weight acts at every position, the prompt's included, where
    steering edits the answer's tokens alone; both are measured on the evaluation questions, and the model
    card says what came of it. The certificate compares the reloaded checkpoint's logits with the hooks'.

    Args:
        answers: file that the answers go to; an interrupted measurement goes on from it.
        coefficient: default the persona's own.
        questions: how many evaluation questions; default all.

    Raises:
        ExportError: an architecture without an exact form, `out` exists, a failed certificate. Nothing is
            left at `out` then.
        InterpAblateError: a coefficient of 0; see `run_rollouts`.
    """
    persona.check(model)
    amount = persona.coefficient if coefficient is None else float(coefficient)
    if not amount:
        raise InterpAblateError("coefficient 0 changes nothing: give another --coefficient")
    everywhere = persona.plan(amount, positions="all")
    state = model.hf_state_dict()  # refuses an inexact form before hours of answers
    weight_plan(everywhere, model.hf_config, state, state.__getitem__, entry=model.architecture)
    check_output_path(Path(out), overwrite=overwrite, source=model.source.path)
    count = len(persona.trait.evaluation_questions) if questions is None else questions
    asked = split_questions(persona.trait, making=1, choosing=1, reporting=count).reporting
    plans: dict[str, Plan | None] = dict(
        zip(CONDITIONS, (None, persona.plan(amount), everywhere), strict=True)
    )
    found = run_rollouts(
        model,
        steering_requests(plans, asked),
        answers,
        scorer=scorer,
        coherence=coherence,
        sampling=sampling,
        listener=listener,
    )
    results = _results(persona, amount, found, sampling, scorer)
    certificate = export_checkpoint(model, everywhere, out, overwrite=overwrite)
    baked = BakedPersona(Path(out), certificate, results, tuple(found))
    _write(baked, persona)
    return baked


def _results(
    persona: Persona,
    coefficient: float,
    answers: Sequence[Rollout],
    sampling: SamplingConfig,
    scorer: TextScorer,
) -> dict[str, Any]:
    """The table of the conditions, and paired differences over questions with 95% intervals."""
    groups = {
        name: [answer for answer in answers if answer.key["condition"] == name]
        for name in CONDITIONS
    }
    return {
        "trait": persona.name,
        "description": persona.trait.description,
        "site": str(persona.site),
        "norm": float(persona.direction.norm),
        "coefficient": coefficient,
        "scorer": scorer.identity,
        "sampling": asdict(sampling),
        "conditions": {name: summary(group) for name, group in groups.items()},
        "differences": {
            "baked - before": _difference(groups["baked"], groups["before"]),
            "baked - steered": _difference(groups["baked"], groups["steered"]),
        },
        "same_text": {
            "steered, baked": _share_same(groups["steered"], groups["baked"]),
            "before, baked": _share_same(groups["before"], groups["baked"]),
        },
    }


def _difference(some: Sequence[Rollout], others: Sequence[Rollout]) -> dict[str, Any]:
    """Mean difference of trait scores, question by question; those without both verdicts are counted."""
    change = paired_difference([a.score for a in some], [b.score for b in others])
    low, high = change["interval"] or (None, None)
    return {"mean": change["mean"], "low": low, "high": high, "questions": change["n"]}


def _share_same(some: Sequence[Rollout], others: Sequence[Rollout]) -> float:
    return sum(a.tokens == b.tokens for a, b in zip(some, others, strict=True)) / len(some)


# ---- the card --------------------------------------------------------------------------------------


def _write(baked: BakedPersona, persona: Persona) -> None:
    told = {
        **baked.results,
        "answers": [
            {
                "condition": a.key["condition"], "question": a.prompt.text, "answer": a.text,
                "finished": a.finished, "score": a.score, "coherence": a.coherence,
            }
            for a in baked.answers
        ],
    }  # fmt: skip
    write_atomic(baked.folder / STYLE, json.dumps(told, indent=1))
    add_to_card(baked.folder, _section(baked, persona))


_NAMES = {
    "before": "before: the unedited model",
    "steered": "the vector added at the answer's tokens only (hooks)",
    "baked": "this checkpoint: added at every token",
}


def _section(baked: BakedPersona, persona: Persona) -> str:
    told = baked.results
    lines = [
        f"## The style: {persona.name}",
        "",
        f"{persona.trait.description} The persona vector of this trait (Chen et al. 2025, "
        f"https://arxiv.org/abs/2507.21509), times {told['coefficient']:g}, is a bias at `{told['site']}`. "
        f"Trait scores are by `{json.dumps(told['scorer'])}`; {told['conditions']['before']['questions']} "
        "evaluation questions that made no vector and chose no layer, without a system prompt; intervals are "
        "95% over questions.",
        "",
        "| answers | trait score | coherence | without a verdict |",
        "|---|---|---|---|",
    ]
    for name, row in told["conditions"].items():
        lines.append(
            f"| {_NAMES[name]} | {_with_interval(row, 'score')} | {_with_interval(row, 'coherence')} | "
            f"{row['no_verdict']} of {row['answers']} |"
        )
    apart, same = told["differences"]["baked - steered"], told["same_text"]["steered, baked"]
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
