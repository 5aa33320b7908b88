"""Extraction of a persona: a trait's directions from rollouts, with the layer at which they steer best.

Knows: the steps of an extraction, the filter of rollouts, the difference of means at each layer. Does not know: how
answers are made, stored or scored, or how the layer is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from interp_ablate import __version__
from interp_ablate.activations.pooling import POOLED_ROWS, POOLINGS, POSITIONS, pooled
from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.errors import DirectionError, InterpAblateError, RunError
from interp_ablate.jobs.bars import Bars, Progress
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.rendering import rendering, require_room
from interp_ablate.persona.persona import Persona, load_persona
from interp_ablate.persona.readout import TraitReadout, fit_readout
from interp_ablate.persona.rollouts import (
    FLUENCY,
    Rollout,
    read_answers,
    rollout_requests,
    run_rollouts,
)
from interp_ablate.persona.settings import (
    DEFAULTS,
    MIN_ANSWERS,
    MIN_COHERENCE,
    THRESHOLD,
    ExtractionConfig,
)
from interp_ablate.persona.steering import choose_layer
from interp_ablate.persona.traits import Questions, Trait, split_questions
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.sites import Site, sites_of
from interp_ablate.storage.provenance import versions
from interp_ablate.storage.strict_json import as_read_back


def kept_answers(path: str | Path, made_of: Mapping[str, Any] | None) -> FilteredRollouts:
    """The rollouts that made a persona's vectors, scored and filtered as its `made_of` says.

    Raises:
        RunError: as `read_answers`; a persona that does not say what it is made of.
    """
    try:
        origin = dict(made_of or {})
        scorers = {name: origin[name] for name in ("scorer", "coherence")}
        limits = {name: origin["settings"][name] for name in ("threshold", "min_coherence")}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the persona of {path} does not say how its rollouts were judged and filtered ({error!r} is "
            "missing): extract it again"
        ) from error
    return filter_rollouts(read_answers(path, **scorers), **limits, min_answers=0)


@dataclass(frozen=True)
class FilteredRollouts:
    """The answers of both sides that passed the filter."""

    positive: tuple[Rollout, ...]
    negative: tuple[Rollout, ...]
    counts: dict[str, dict[str, int]]
    """For each side, how many `answers` there were, how many were `kept`, and how many each reason removed."""

    def __str__(self) -> str:
        return "; ".join(
            f"{side}: {describe_counts(counts)}" for side, counts in self.counts.items()
        )


def describe_counts(counts: dict[str, int]) -> str:
    """The counts of one side in words."""
    removed = ", ".join(
        f"{n} {_REASONS[why]}" for why, n in counts.items() if why in _REASONS and n
    )
    return f"{counts['kept']} of {counts['answers']} kept" + (f" ({removed})" if removed else "")


_REASONS = {
    "empty": "empty",
    "no_answer": "thoughts without an answer",
    "no_verdict": "without a verdict",
    "score": "on the wrong side of the threshold",
    "coherence": "incoherent",
}


SELECTION = "selection.jsonl"  # the answers that choose the layer


def filter_rollouts(
    rollouts: Sequence[Rollout],
    *,
    threshold: float = THRESHOLD,
    min_coherence: float = MIN_COHERENCE,
    min_answers: int = MIN_ANSWERS,
) -> FilteredRollouts:
    """Keep answers that show the trait under positive prompts, and answers without it under negative ones.

    Kept: score >= threshold under the positive prompts, < threshold under the negative ones, coherence >=
    `min_coherence` in both. Each answer is judged alone (the published code drops a pair where one of the two
    fails). Answers without a verdict are dropped and counted.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

    Raises:
        RunError: fewer than `min_answers` are left on a side, with what was removed and what to do.
    """
    counts: dict[str, dict[str, int]] = {}
    kept: dict[str, list[Rollout]] = {"positive": [], "negative": []}
    for side in ("positive", "negative"):
        tally = counts[side] = {"answers": 0, "kept": 0, **dict.fromkeys(_REASONS, 0)}
        for answer in (each for each in rollouts if each.key["side"] == side):
            why = _why_not(answer, side, threshold, min_coherence)
            tally["answers"] += 1
            tally[why or "kept"] += 1
            if why is None:
                kept[side].append(answer)
    short = [side for side, answers in kept.items() if len(answers) < min_answers]
    if short:
        raise RunError(_too_few(short[0], counts[short[0]], min_answers, threshold))
    return FilteredRollouts(tuple(kept["positive"]), tuple(kept["negative"]), counts)


def _why_not(answer: Rollout, side: str, threshold: float, min_coherence: float) -> str | None:
    if not answer.text.strip() or not answer.tokens:
        return "no_answer" if answer.thought else "empty"
    if answer.score is None or answer.coherence is None:
        return "no_verdict"
    if (answer.score >= threshold) != (side == "positive"):
        return "score"
    return None if answer.coherence >= min_coherence else "coherence"


def _too_few(side: str, counts: dict[str, int], min_answers: int, threshold: float) -> str:
    most = max(_REASONS, key=lambda why: counts[why])
    wanted = "at or above" if side == "positive" else "below"
    advice = {
        "empty": "the model says nothing: is it a chat model, and its chat template its own?",
        "no_answer": "thoughts do not end: raise --max-thought-tokens, or close them (--template-arg)",
        "no_verdict": "the scorer gave no verdict: try another --scorer",
        "score": (
            f"few answers under the {side} system prompts score {wanted} {threshold:g}: read them in the "
            "rollouts, then use a model that follows its system prompt, plainer system prompts, another "
            "--scorer, or another --threshold"
        ),
        "coherence": "the answers are incoherent: lower --temperature, or use another model",
    }[most]
    return (
        f"too few answers under the {side} system prompts: {describe_counts(counts)}; at least {min_answers} are needed. "
        f"Give more --extraction-questions or --samples; {advice}"
    )


def extract(
    model: Model,
    trait: Trait,
    out: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    settings: ExtractionConfig = DEFAULTS,
    listener: Progress | None = None,
) -> Persona:
    """Find the trait's directions at resid_post of every layer, and the layer at which they steer best.

    Rollouts under both sides' system prompts are filtered (`filter_rollouts`); a layer's direction is the
    mean over the kept positive answers minus that over the negative ones. Then every candidate layer and
    coefficient steers answers to the selection questions: of those whose answers are coherent, the highest
    trait score is chosen. All coherent rollouts and their scores make the direction for reading text
    (`fit_readout`). Everything goes to the folder `out`; what is there already is not done again.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509. Its layer i is `hidden_states[i]`, which is
    resid_post of layer i - 1 here.

    Args:
        coherence: scores coherence (a judge); without one `rollouts.fluency`.

    Raises:
        RunError: too few answers pass the filter; no candidate gives coherent answers; `out` is other work.
        InterpAblateError: settings that do not fit the trait or the model.
    """
    check_model(model)
    listener, out = listener or Bars(), Path(out)
    candidates = sites_of(("resid_post",), _candidate_layers(model, settings))
    made_of = _made_of(model, trait, scorer, coherence, settings)
    done = load_persona(out) if (out / "persona.json").exists() else None
    if done is not None and done.details.get("made_of") == made_of:
        listener.note(f"{out}: the persona is there already")
        return done
    _check_scorers(out, done, made_of)
    n_made, n_chosen = settings.extraction_questions, settings.selection_questions
    questions = split_questions(trait, extraction=n_made, selection=n_chosen, evaluation=1)
    options: dict[str, Any] = {"scorer": scorer, "coherence": coherence, "listener": listener}
    rollouts, filtered = _rollouts(model, trait, questions, out, settings, options)
    source = f"{trait.name} {model.source.name}"
    directions = trait_directions(model, filtered, source=source, listener=listener)
    readout = _readout(model, rollouts, candidates, settings, source=source, listener=listener)
    position = POSITIONS[settings.pooling]
    steering = [each for each in directions.where(candidates) if each.position == position]
    chosen, layers, unsteered = choose_layer(
        model, steering, questions.selection, out / SELECTION, settings=settings, **options
    )
    _note_weak(chosen, unsteered, listener)
    details = {
        "made_of": made_of, "counts": filtered.counts, "unsteered": unsteered, "layers": layers,
        "readout": readout.to_dict(), "versions": versions(),
        "questions": {name: list(getattr(questions, name)) for name in ("extraction", "selection")},
    }  # fmt: skip
    direction = directions[Site(chosen["layer"], "resid_post"), position]
    both = replace(directions, items=(*directions.items, *readout.directions))
    persona = Persona(trait, both, direction, chosen["coefficient"], model.source.name, details)
    persona.save(out)
    return persona


def _rollouts(
    model: Model,
    trait: Trait,
    questions: Questions,
    out: Path,
    settings: ExtractionConfig,
    options: dict[str, Any],
) -> tuple[list[Rollout], FilteredRollouts]:
    """Answers under both sides' system prompts: all of them, and those that passed the filter."""
    require_room(model, questions.selection, settings.sampling.max_new_tokens)
    requests = rollout_requests(trait, questions.extraction, samples=settings.samples)
    path = out / "rollouts.jsonl"
    rollouts = run_rollouts(model, requests, path, sampling=settings.sampling, **options)
    filtered = filter_rollouts(
        rollouts,
        threshold=settings.threshold,
        min_coherence=settings.min_coherence,
        min_answers=settings.min_answers,
    )
    options["listener"].note(str(filtered))
    return rollouts, filtered


def _readout(
    model: Model,
    rollouts: Sequence[Rollout],
    candidates: Sequence[Site],
    settings: ExtractionConfig,
    *,
    source: str,
    listener: Progress,
) -> TraitReadout:
    readout = fit_readout(
        model,
        rollouts,
        sites_of(("resid_post",), range(model.n_layers)),
        candidates=candidates,
        min_coherence=settings.min_coherence,
        min_answers=2 * settings.min_answers,
        source=source,
        listener=listener,
    )
    if readout.chosen is None:
        listener.note(
            f"no direction for reading text ({readout.why}): screening will use the steering one"
        )
    return readout


def _note_weak(chosen: dict[str, Any], unsteered: dict[str, Any], listener: Progress) -> None:
    before = unsteered["score"]
    if before is not None and chosen["score"] <= before:
        listener.note(
            f"steering nowhere raises the trait's score above the unsteered {before:.0f}: the vector may "
            "carry little; try more --extraction-questions, --samples or larger --coefficients"
        )


def _made_of(
    model: Model,
    trait: Trait,
    scorer: TextScorer,
    coherence: TextScorer | None,
    settings: ExtractionConfig,
) -> dict[str, Any]:
    """Everything a persona depends on, as it is read back from JSON."""
    made_of = {
        "model": model.fingerprint,
        "interp-ablate": __version__,
        "rendering": rendering(model),
        "chat_format": model.chat_format.to_dict(),
        "trait": trait.fingerprint,
        "scorer": scorer.identity,
        "coherence": coherence.identity if coherence else FLUENCY,
        "settings": asdict(settings),
    }
    return as_read_back(made_of)  # type: ignore[no-any-return]


def _check_scorers(out: Path, done: Persona | None, made_of: dict[str, Any]) -> None:
    """Refuse a folder whose layer was chosen by other scorers, before any score is paid for.

    Raises:
        RunError: the scorers that differ.
    """
    scorers = {name: made_of[name] for name in ("scorer", "coherence")}
    if done is None:
        if (out / SELECTION).exists():  # interrupted after its answers were scored
            read_answers(out / "rollouts.jsonl", **scorers)
        return
    before = done.details.get("made_of") or {}
    other = [name for name, identity in scorers.items() if before.get(name, identity) != identity]
    if other:
        raise RunError(
            f"{out} holds a persona that was made with another {' and '.join(other)}: choose another --out, "
            "or delete it"
        )


def _candidate_layers(model: Model, settings: ExtractionConfig) -> range:
    """The layers that may be chosen; settings that fit no model are refused first."""
    if settings.pooling not in POOLINGS:
        raise InterpAblateError(
            f"unknown pooling {settings.pooling!r}: accepted are {', '.join(POOLINGS)}"
        )
    if settings.layers is None:
        last = max(round(0.9 * model.n_layers) - 1, 0)
        first = min(round(0.2 * model.n_layers), last)
        return range(first, last + 1, max(1, -(-(last - first + 1) // 10)))
    first, last = settings.layers
    if not 0 <= first <= last < model.n_layers:
        raise InterpAblateError(
            f"layers {first} to {last}: {model.source.name} has layers 0 to {model.n_layers - 1}"
        )
    return range(first, last + 1)


def trait_directions(
    model: Model, rollouts: FilteredRollouts, *, source: str = "", listener: Progress | None = None
) -> Directions:
    """The difference of means at resid_post of every layer, for each pooling.

    "response_mean" is over the tokens of the answer alone, as it was generated; "-1" the last token of the
    prompt; "prompt_mean" over the prompt, system prompt and template included. Each answer counts once,
    whatever its length.

    Raises:
        DirectionError: the sides do not differ anywhere; NaN or infinity in the activations.
    """
    listener = listener or Bars()
    sites = sites_of(("resid_post",), range(model.n_layers))
    listener.start("activations", len(rollouts.positive) + len(rollouts.negative))
    positive, negative = (
        pooled(model, side, sites, batch_size=POOLED_ROWS, on_batch=listener.advance)
        for side in (rollouts.positive, rollouts.negative)
    )
    listener.finish()
    directions, left_out = [], {}
    for s, site in enumerate(sites):
        for p, position in enumerate(POSITIONS.values()):
            means = positive.mean[p, s], negative.mean[p, s]
            difference = means[0] - means[1]
            norm = float(difference.norm())
            if norm <= ZERO_TOLERANCE * max(float(mean.norm()) for mean in means):
                left_out[f"{site}[{position}]"] = "the difference in means is zero"
                continue
            directions.append(Direction(difference, norm, site, position, source=source))
    if not directions:
        raise DirectionError(
            "both sides have the same activations everywhere: are the answers the same?"
        )
    return Directions(tuple(directions), left_out, source)
