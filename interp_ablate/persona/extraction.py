"""Persona: a trait as a direction: extracted from rollouts, its layer chosen by what steering does, steered.

Knows: difference of means per layer, the choice of a layer and a coefficient on questions that made no
vector, the curve of trait and coherence against the coefficient with random controls, the persona folder.
Does not know: trait files (`traits`), how answers are stored and filtered (`rollouts`) or pooled (`pooling`),
how the direction for reading text is made (`reading`), scorers, weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from interp_ablate.activations.pooling import POOLED_ROWS, POOLINGS, POSITIONS, pooled
from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.errors import DirectionError, InterpAblateError
from interp_ablate.jobs.progress import NoProgress, Progress
from interp_ablate.models.model import Model
from interp_ablate.persona.answers import Rollout
from interp_ablate.persona.persona import Persona, load_persona
from interp_ablate.persona.readout import TraitReadout, fit_readout
from interp_ablate.persona.rollout_filter import FilteredRollouts, filter_rollouts
from interp_ablate.persona.rollouts import BROKEN, FLUENT, rollout_requests, run_rollouts
from interp_ablate.persona.settings import DEFAULTS, ExtractionConfig
from interp_ablate.persona.steering import choose_layer
from interp_ablate.persona.traits import Trait, split_questions
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.sites import Site, sites_of

_PACKAGES = ("interp-ablate", "torch", "transformers", "transformer-lens")


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
    """The trait's directions at resid_post of every layer, and the layer at which they steer best.

    Rollouts under both sides' system prompts are scored and filtered (`filter_rollouts`); a layer's
    direction is the mean over the kept positive answers minus that over the negative ones, each answer
    being the mean over its own tokens. Then every candidate layer and coefficient steers answers to the
    choosing questions: of those whose answers are coherent, the highest trait score is chosen. The direction
    for reading is made of all coherent rollouts and their scores (`reading.fit_reading`). Everything goes to
    the folder `out`; what is there already is not done again.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509. Its layer i is `hidden_states[i]`, which is
    resid_post of layer i - 1 here.

    Args:
        coherence: scores coherence (a judge); without one `rollouts.fluency`.

    Raises:
        RunError: too few answers pass the filter; no candidate gives coherent answers; `out` is other work.
        InterpAblateError: settings that do not fit the trait or the model.
    """
    listener, out = listener or NoProgress(), Path(out)
    candidates = _candidate_layers(model, settings)
    made_of = _made_of(model, trait, scorer, coherence, settings)
    if (out / "persona.json").exists():
        done = load_persona(out)
        # a folder of an earlier version has no reading: what is stored makes one
        if done.details.get("made_of") == made_of and "reading" in done.details:
            listener.note(f"{out}: the persona is there already")
            return done
    parts = split_questions(
        trait,
        making=settings.extraction_questions,
        choosing=settings.selection_questions,
        reporting=1,
    )
    options: dict[str, Any] = {"scorer": scorer, "coherence": coherence, "listener": listener}
    answers, kept = _rollouts(model, trait, parts.making, out, settings, options)
    source = f"{trait.name} {model.source.name}"
    directions = trait_directions(model, kept, source=source, listener=listener)
    read = fit_readout(
        model,
        answers,
        sites_of(("resid_post",), range(model.n_layers)),
        candidates=sites_of(("resid_post",), candidates),
        coherent=settings.min_coherence,
        fewest=2 * settings.min_answers,
        source=source,
        listener=listener,
    )
    _note_reading(read, listener)
    usable = directions.where(Site(layer, "resid_post") for layer in candidates)
    chosen, layers, unsteered = choose_layer(
        model,
        [item for item in usable if item.position == POSITIONS[settings.pooling]],
        parts.choosing,
        out / "choosing.jsonl",
        settings=settings,
        **options,
    )
    _note_weak(chosen, unsteered, listener)
    details = {
        "made_of": made_of,
        "counts": kept.counts,
        "unsteered": unsteered,
        "layers": layers,
        "reading": {
            "site": str(read.chosen) if read.chosen else None,
            "why_not": read.why or None,
            "layers": read.rows,
        },
        "questions": {"making": list(parts.making), "choosing": list(parts.choosing)},
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
    direction = directions[Site(chosen["layer"], "resid_post"), POSITIONS[settings.pooling]]
    both = replace(directions, items=(*directions.items, *read.directions))
    persona = Persona(trait, both, direction, chosen["coefficient"], model.source.name, details)
    persona.save(out)
    return persona


def _rollouts(
    model: Model,
    trait: Trait,
    questions: Sequence[str],
    out: Path,
    settings: ExtractionConfig,
    options: dict[str, Any],
) -> tuple[list[Rollout], FilteredRollouts]:
    """Answers under both sides' system prompts: all of them, and those that passed the filter."""
    jobs = rollout_requests(trait, questions, samples=settings.samples)
    answers = run_rollouts(
        model, jobs, out / "rollouts.jsonl", sampling=settings.sampling, **options
    )
    kept = filter_rollouts(
        answers,
        threshold=settings.threshold,
        coherent=settings.min_coherence,
        fewest=settings.min_answers,
    )
    options["listener"].note(str(kept))
    return answers, kept


def _note_weak(chosen: dict[str, Any], unsteered: dict[str, Any], listener: Progress) -> None:
    before = unsteered["score"]
    if before is not None and chosen["score"] <= before:
        listener.note(
            f"steering nowhere raises the trait's score above the unsteered {before:.0f}: the vector may "
            "carry little; try more --extraction-questions, --samples or larger --coefficients"
        )


def _note_reading(read: TraitReadout, listener: Progress) -> None:
    if read.chosen is None:
        listener.note(
            f"no direction for reading text ({read.why}): screening will use the steering one"
        )


def _made_of(
    model: Model,
    trait: Trait,
    scorer: TextScorer,
    coherence: TextScorer | None,
    settings: ExtractionConfig,
) -> dict[str, Any]:
    """Everything a persona depends on, as it is read back from JSON."""
    told = {
        "model": model.fingerprint,
        "template": model.template,
        "trait": trait.fingerprint,
        "scorer": scorer.identity,
        "coherence": coherence.identity if coherence else {"fluency": [FLUENT, BROKEN]},
        "settings": asdict(settings),
    }
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


def _candidate_layers(model: Model, settings: ExtractionConfig) -> list[int]:
    """The layers that may be chosen; settings that fit no model are refused first."""
    if settings.pooling not in POOLINGS:
        raise InterpAblateError(
            f"unknown pooling {settings.pooling!r}: accepted are {', '.join(POOLINGS)}"
        )
    if settings.layers is None:
        last = max(round(0.9 * model.n_layers) - 1, 0)
        first = min(round(0.2 * model.n_layers), last)
        step = max(1, -(-(last - first + 1) // 10))
        return list(range(first, last + 1, step))
    first, last = settings.layers
    if not 0 <= first <= last < model.n_layers:
        raise InterpAblateError(
            f"layers {first} to {last}: {model.source.name} has layers 0 to {model.n_layers - 1}"
        )
    return list(range(first, last + 1))


def trait_directions(
    model: Model, kept: FilteredRollouts, *, source: str = "", listener: Progress | None = None
) -> Directions:
    """Difference of means at resid_post of every layer, by each pooling.

    "response_mean" is over the tokens of the answer alone, as it was generated; "-1" the last token of the
    prompt; "prompt_mean" over the prompt, system prompt and template included. Each answer counts once,
    whatever its length.

    Raises:
        DirectionError: the sides do not differ anywhere; NaN or infinity in the activations.
    """
    listener = listener or NoProgress()
    sites = sites_of(("resid_post",), range(model.n_layers))
    listener.start("activations", len(kept.positive) + len(kept.negative))
    positive, negative = (
        pooled(model, side, sites, batch_size=POOLED_ROWS, on_batch=listener.advance)
        for side in (kept.positive, kept.negative)
    )
    listener.finish()
    found, left_out = [], {}
    for s, site in enumerate(sites):
        for p, position in enumerate(POSITIONS.values()):
            means = positive.mean[p, s], negative.mean[p, s]
            difference = means[0] - means[1]
            norm = float(difference.norm())
            if norm <= ZERO_TOLERANCE * max(float(mean.norm()) for mean in means):
                left_out[f"{site}[{position}]"] = "the difference in means is zero"
                continue
            found.append(Direction(difference, norm, site, position, source=source))
    if not found:
        raise DirectionError(
            "both sides have the same activations everywhere: are the answers the same?"
        )
    return Directions(tuple(found), left_out, source)
