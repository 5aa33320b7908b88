"""Persona: a trait as a direction: extracted from rollouts, its layer chosen by what steering does, steered.

Knows: difference of means per layer, the choice of a layer and a coefficient on questions that made no
vector, the curve of trait and coherence against the coefficient with random controls, the persona folder.
Does not know: trait files (`traits`), how answers are stored and filtered (`rollouts`) or pooled (`pooling`),
how the direction for reading text is made (`reading`), scorers, weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from interp_ablate.directions import ZERO_TOLERANCE, Direction, Directions, random_direction
from interp_ablate.edits import Add, Plan, Positions
from interp_ablate.errors import DirectionError, InterpAblateError, RunError
from interp_ablate.exchanges import TextScorer
from interp_ablate.files import write_whole
from interp_ablate.listeners import Listener, Silent
from interp_ablate.model import Model
from interp_ablate.pooling import POOLED_ROWS, POOLINGS, POSITIONS, Pooling, pooled
from interp_ablate.prompts import Prompt
from interp_ablate.reading import COLUMNS as READ_COLUMNS
from interp_ablate.reading import METHOD as READING
from interp_ablate.reading import TraitReading, fit_reading
from interp_ablate.rollouts import (
    BROKEN,
    COHERENT,
    FEWEST,
    FLUENT,
    THRESHOLD,
    Answer,
    Job,
    Kept,
    Sampling,
    answer_all,
    keep_expressing,
    rollout_jobs,
)
from interp_ablate.selection import bootstrap_interval
from interp_ablate.sites import Site, sites_of
from interp_ablate.traits import Trait, load_trait, split_questions

log = logging.getLogger(__name__)

FORMAT = "interp_ablate.persona/1"
GREEDY = Sampling(temperature=0.0)
COEFFICIENTS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
LAYER_COLUMNS = (
    "layer", "site", "norm", "coefficient", "score", "score_low", "score_high", "coherence", "answers",
    "no_verdict", "chosen",
)  # fmt: skip
CURVE_COLUMNS = (
    "condition", "coefficient", "score", "score_low", "score_high", "coherence", "coherence_low",
    "coherence_high", "questions", "answers", "no_verdict",
)  # fmt: skip
_PACKAGES = ("interp-ablate", "torch", "transformers", "transformer-lens")


@dataclass(frozen=True, eq=False)
class Persona:
    """A trait's directions in one model, the one that was chosen, and how strongly to add it.

    `direction.raw` is the difference of means at `direction.site`: coefficient 1 moves the mean response
    without the trait onto that with it. `directions` holds those of every layer and pooling, and after them
    the slopes for `reading`; `details` is what else `persona.json` says (layers, counts, settings, versions).
    """

    trait: Trait
    directions: Directions
    direction: Direction
    coefficient: float
    model: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        """resid_post of the chosen layer; `hidden_states[layer + 1]` in the published code's counting."""
        return self.direction.site

    @property
    def name(self) -> str:
        return self.trait.name

    @property
    def reading(self) -> Direction:
        """The direction to project text on: how the trait shows, where `direction` is how to bring it about.

        Of the layer that reads best (`reading.fit_reading`); `direction` where the extraction found none, or
        was made before there was one.
        """
        site = (self.details.get("reading") or {}).get("site")
        return self.direction if site is None else self.reading_at(Site.parse(site))

    def reading_at(self, site: Site) -> Direction:
        """The direction to project text on at another layer's resid_post.

        Raises:
            DirectionError: none there.
        """
        return self.directions[site, POSITIONS["response_mean"], READING]

    def plan(self, coefficient: float | None = None, *, positions: Positions = "generated") -> Plan:
        """The raw vector times the coefficient, added at the chosen site.

        At "generated" positions every token of the answer is edited as it is read back, and the prompt is
        not. The published code edits the last token of the prompt too, so that its first answer token is
        steered; here that one is the model's own.
        """
        amount = self.coefficient if coefficient is None else coefficient
        return _plan(self.direction, amount, positions)

    def check(self, model: Model) -> None:
        """That the directions are of a model of this shape; another model's name is logged.

        Raises:
            DirectionError: another d_model, or fewer layers.
        """
        width, last = len(self.direction.vector), max(self.site.layer, self.reading.site.layer)
        if width != model.d_model or last >= model.n_layers:
            raise DirectionError(
                f"the persona {self.name!r} is of {self.model} (d_model {width}, {self.site}); "
                f"{model.source.name} has d_model {model.d_model} and {model.n_layers} layers: extract "
                "the trait from this model"
            )
        if model.source.name != self.model:
            log.warning("persona %s is of %s, used on %s", self.name, self.model, model.source.name)

    def save(self, folder: str | Path) -> None:
        """Write persona.json, trait.json, layers.csv, reading.csv and the directions; persona.json last.

        Raises:
            RunError, DirectionError, PromptError: the folder cannot be written.
        """
        folder = Path(folder)
        self.trait.save(folder / "trait.json")
        self.directions.save(folder / "directions.safetensors")
        layers = pd.DataFrame(self.details.get("layers", []), columns=list(LAYER_COLUMNS))
        write_whole(folder / "layers.csv", layers.to_csv(index=False))
        rows = (self.details.get("reading") or {}).get("layers", [])
        write_whole(
            folder / "reading.csv",
            pd.DataFrame(rows, columns=list(READ_COLUMNS)).to_csv(index=False),
        )
        told = {
            "format": FORMAT,
            "model": self.model,
            "trait": self.name,
            "trait_fingerprint": self.trait.fingerprint,
            "site": str(self.site),
            "position": self.direction.position,
            "norm": float(self.direction.norm),
            "coefficient": self.coefficient,
            **self.details,
        }
        write_whole(folder / "persona.json", json.dumps(told, indent=1))


def load_persona(folder: str | Path) -> Persona:
    """Read a persona folder (`interp-ablate persona extract`).

    Raises:
        RunError: no persona there, not finished, or a corrupt file, named.
        DirectionError, PromptError: its directions or its trait cannot be read.
    """
    folder = Path(folder)
    path = folder / "persona.json"
    if not path.is_file():
        began = (folder / "rollouts.jsonl").exists()
        raise RunError(
            f"{folder} holds no persona (no persona.json): "
            + (
                "its extraction was interrupted; run it again, it goes on"
                if began
                else "make one with"
            )
            + f" `interp-ablate persona extract TRAIT --model MODEL --out {folder}`"
        )
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        site, position = Site.parse(told.pop("site")), told.pop("position")
        coefficient, model = float(told.pop("coefficient")), str(told.pop("model"))
        fingerprint = told.pop("trait_fingerprint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"cannot read {path}: {error!r}. Extract the persona again into another folder"
        ) from error
    trait = load_trait(folder / "trait.json")
    if trait.fingerprint != fingerprint:
        raise RunError(
            f"{folder / 'trait.json'} is not the trait that {path.name} was made with: put it back, or "
            "extract the persona again into another folder"
        )
    directions = Directions.load(folder / "directions.safetensors")
    details = {k: v for k, v in told.items() if k not in ("format", "trait", "norm")}
    return Persona(trait, directions, directions[site, position], coefficient, model, details)


def _plan(direction: Direction, coefficient: float, positions: Positions = "generated") -> Plan:
    edit = Add(
        direction,
        direction.site,
        coefficient=coefficient,
        positions=positions,
        label=f"{direction.method}@{direction.site}",
    )
    return Plan((edit,))


# ---- extraction -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extraction:
    """How a persona is extracted.

    `questions` make the vectors, under every pair of system prompts, `samples` answers each; `choosing`
    others, without a system prompt, choose the layer among `layers` (first, last; None: 20 to 90% of the
    depth, at most ten of them) and one of `coefficients`. Evaluation questions are left alone.
    """

    questions: int = 10
    choosing: int = 6
    samples: int = 3
    sampling: Sampling = field(default_factory=Sampling)
    layers: tuple[int, int] | None = None
    coefficients: tuple[float, ...] = (1.0, 2.0)
    pooling: Pooling = "response_mean"
    threshold: float = THRESHOLD
    coherent: float = COHERENT
    fewest: int = FEWEST


DEFAULTS = Extraction()


def extract(
    model: Model,
    trait: Trait,
    out: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    settings: Extraction = DEFAULTS,
    listener: Listener | None = None,
) -> Persona:
    """The trait's directions at resid_post of every layer, and the layer at which they steer best.

    Rollouts under both sides' system prompts are scored and filtered (`keep_expressing`); a layer's
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
    listener, out = listener or Silent(), Path(out)
    candidates = _candidate_layers(model, settings)
    made_of = _made_of(model, trait, scorer, coherence, settings)
    if (out / "persona.json").exists():
        done = load_persona(out)
        # a folder of an earlier version has no reading: what is stored makes one
        if done.details.get("made_of") == made_of and "reading" in done.details:
            listener.note(f"{out}: the persona is there already")
            return done
    parts = split_questions(
        trait, making=settings.questions, choosing=settings.choosing, reporting=1
    )
    options: dict[str, Any] = {"scorer": scorer, "coherence": coherence, "listener": listener}
    answers, kept = _rollouts(model, trait, parts.making, out, settings, options)
    source = f"{trait.name} {model.source.name}"
    directions = trait_directions(model, kept, source=source, listener=listener)
    read = fit_reading(
        model,
        answers,
        sites_of(("resid_post",), range(model.n_layers)),
        candidates=sites_of(("resid_post",), candidates),
        coherent=settings.coherent,
        fewest=2 * settings.fewest,
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
    settings: Extraction,
    options: dict[str, Any],
) -> tuple[list[Answer], Kept]:
    """Answers under both sides' system prompts: all of them, and those that passed the filter."""
    jobs = rollout_jobs(trait, questions, samples=settings.samples)
    answers = answer_all(model, jobs, out / "rollouts.jsonl", sampling=settings.sampling, **options)
    kept = keep_expressing(
        answers,
        threshold=settings.threshold,
        coherent=settings.coherent,
        fewest=settings.fewest,
    )
    options["listener"].note(str(kept))
    return answers, kept


def _note_weak(chosen: dict[str, Any], unsteered: dict[str, Any], listener: Listener) -> None:
    before = unsteered["score"]
    if before is not None and chosen["score"] <= before:
        listener.note(
            f"steering nowhere raises the trait's score above the unsteered {before:.0f}: the vector may "
            "carry little; try more --questions, --samples or larger --coefficients"
        )


def _note_reading(read: TraitReading, listener: Listener) -> None:
    if read.chosen is None:
        listener.note(
            f"no direction for reading text ({read.why}): screening will use the steering one"
        )


def _made_of(
    model: Model,
    trait: Trait,
    scorer: TextScorer,
    coherence: TextScorer | None,
    settings: Extraction,
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


def _candidate_layers(model: Model, settings: Extraction) -> list[int]:
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
    model: Model, kept: Kept, *, source: str = "", listener: Listener | None = None
) -> Directions:
    """Difference of means at resid_post of every layer, by each pooling.

    "response_mean" is over the tokens of the answer alone, as it was generated; "-1" the last token of the
    prompt; "prompt_mean" over the prompt, system prompt and template included. Each answer counts once,
    whatever its length.

    Raises:
        DirectionError: the sides do not differ anywhere; NaN or infinity in the activations.
    """
    listener = listener or Silent()
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


# ---- steering -------------------------------------------------------------------------------------


def choose_layer(
    model: Model,
    directions: Sequence[Direction],
    questions: Sequence[str],
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    settings: Extraction = DEFAULTS,
    listener: Listener | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The layer and coefficient whose steered answers score highest and are coherent.

    Returns the chosen row, all rows (LAYER_COLUMNS), and the unsteered answers' row. Answers are greedy,
    without a system prompt. Ties go to the smaller coefficient, then to the earlier layer.

    Raises:
        RunError: no candidate has coherent answers with a verdict.
        InterpAblateError: no directions, questions or coefficients.
    """
    if not directions or not questions or not settings.coefficients:
        raise InterpAblateError(
            f"{len(directions)} directions, {len(questions)} questions, {len(settings.coefficients)} "
            "coefficients: choosing a layer needs some of each"
        )
    plans: dict[str, Plan | None] = {"unsteered": None}
    rows = []
    for coefficient in settings.coefficients:
        for item in directions:
            site = item.site
            place = {"layer": site.layer, "site": str(site), "norm": float(item.norm)}
            rows.append({**place, "coefficient": float(coefficient)})
            plans[_name(rows[-1])] = _plan(item, coefficient)
    answers = answer_all(
        model,
        steering_jobs(plans, questions),
        path,
        scorer=scorer,
        coherence=coherence,
        sampling=replace(settings.sampling, temperature=0.0, seed=0),
        listener=listener,
    )
    found = {name: summary([a for a in answers if a.key["condition"] == name]) for name in plans}
    table = [{**row, **found[_name(row)], "chosen": False} for row in rows]
    usable = [
        row
        for row in table
        if row["score"] is not None
        and 2 * row["no_verdict"] <= row["answers"]
        and (row["coherence"] or 0.0) >= settings.coherent
    ]
    if not usable:
        raise RunError(_nothing_usable(table, settings))
    chosen = max(usable, key=lambda row: (row["score"], -row["coefficient"], -row["layer"]))
    chosen["chosen"] = True
    return chosen, table, found["unsteered"]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['site']} {row['coefficient']:g}"


def _nothing_usable(table: Sequence[Mapping[str, Any]], settings: Extraction) -> str:
    best = max(row["coherence"] or 0.0 for row in table)
    return (
        "no layer gives coherent answers of which most have a verdict (coherence of at least "
        f"{settings.coherent:g}; the best has {best:.0f}) with coefficients "
        f"{', '.join(f'{c:g}' for c in settings.coefficients)}: give smaller --coefficients, or other "
        "--layers"
    )


def steering_jobs(
    plans: Mapping[str, Plan | None], questions: Sequence[str], *, samples: int = 1
) -> list[Job]:
    return [
        Job({"condition": name, "question": number, "sample": sample}, Prompt(question), plan)
        for name, plan in plans.items()
        for number, question in enumerate(questions)
        for sample in range(samples)
    ]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Means over questions with 95% intervals; answers without a verdict are counted, not averaged."""
    return {
        **_mean("score", answers, lambda answer: answer.score),
        **_mean("coherence", answers, lambda answer: answer.coherence),
        "questions": len({answer.key["question"] for answer in answers}),
        "answers": len(answers),
        "no_verdict": sum(answer.score is None for answer in answers),
    }


def _mean(
    name: str, answers: Sequence[Answer], read: Callable[[Answer], float | None]
) -> dict[str, float | None]:
    """The mean over questions of the mean over each one's answers; bootstrapped over questions."""
    by_question: dict[int, list[float]] = {}
    for answer in answers:
        value = read(answer)
        if value is not None:
            by_question.setdefault(answer.key["question"], []).append(value)
    means = [sum(values) / len(values) for values in by_question.values()]
    if not means:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low, high = bootstrap_interval(means)
    return {name: sum(means) / len(means), f"{name}_low": low, f"{name}_high": high}


def steer(
    model: Model,
    persona: Persona,
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    questions: int | None = None,
    controls: int = 1,
    samples: int = 1,
    sampling: Sampling = GREEDY,
    listener: Listener | None = None,
) -> list[Answer]:
    """Answers to evaluation questions (no system prompt) with the vector added, coefficient by coefficient.

    Beside the persona's direction as many random directions of the same norm at the same site as
    `controls` says. `curve` makes a table of the answers; they are stored in `path` as they come.

    Args:
        questions: how many of the trait's evaluation questions; default all.
        samples: of each question, where `sampling` has a temperature.

    Raises:
        InterpAblateError: no coefficients, twice the same one, or too many questions.
    """
    if not coefficients or len(set(coefficients)) < len(coefficients) or controls < 0:
        raise InterpAblateError(
            f"coefficients {', '.join(f'{c:g}' for c in coefficients) or 'none'}, {controls} controls: give "
            "different coefficients, and 0 controls or more"
        )
    persona.check(model)
    count = len(persona.trait.evaluation_questions) if questions is None else questions
    asked = split_questions(persona.trait, making=1, choosing=1, reporting=count).reporting
    plans = _steering_plans(persona.direction, coefficients, controls)
    return answer_all(
        model,
        steering_jobs(plans, asked, samples=samples),
        path,
        scorer=scorer,
        coherence=coherence,
        sampling=sampling,
        listener=listener,
    )


def _steering_plans(
    direction: Direction, coefficients: Sequence[float], controls: int
) -> dict[str, Plan | None]:
    """Plans by condition and coefficient; at 0 nothing is added, whatever the direction."""
    directions = {"persona": direction}
    for seed in range(controls):
        directions[f"random {seed}"] = random_direction(direction, seed=seed)
    plans: dict[str, Plan | None] = {"persona 0": None} if 0 in coefficients else {}
    for name, one in directions.items():
        plans |= {f"{name} {c:g}": _plan(one, c) for c in coefficients if c}
    return plans


def curve(answers: Sequence[Answer]) -> pd.DataFrame:
    """Trait score and coherence by direction and coefficient (CURVE_COLUMNS), intervals over questions."""
    rows = []
    for name in dict.fromkeys(answer.key["condition"] for answer in answers):
        condition, _, coefficient = name.rpartition(" ")
        here = [answer for answer in answers if answer.key["condition"] == name]
        rows.append({"condition": condition, "coefficient": float(coefficient), **summary(here)})
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
    measured = [name for name in CURVE_COLUMNS if name.startswith(("score", "coherence"))]
    frame[measured] = frame[measured].astype(float)  # None, where there is no verdict, is NaN
    return frame.sort_values(["condition", "coefficient"], kind="stable").reset_index(drop=True)
