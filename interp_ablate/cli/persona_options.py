"""Settings, scorers and lines of text that the persona commands share.

Knows: how a persona's folder is opened and its numbers are shown. Does not know: what a command does.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import REPLIES, ModelSettings, judge_settings, load, trait_scorer
from interp_ablate.cli.settings import given_flags
from interp_ablate.errors import RunError
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.settings import setting

COHERENCE_RUBRIC = (
    "How coherent is the answer? 0: gibberish, loops, or words that do not belong together. 50: readable, with "
    "breaks or contradictions. 100: clear and connected throughout. Judge how it hangs together and whether "
    "it speaks to the question, not its mood, style, length or truth; an answer that is cut off at the end "
    "loses nothing."
)


@dataclass(frozen=True)
class ScoringSettings(ModelSettings):
    """The model, the trait's scorer and that of coherence."""

    scorer: str | None = setting(
        None,
        "lexicon:sentiment, expressions:NAME, classifier:FOLDER, judge:MODEL@URL, ... (default: the trait's own)",
    )
    coherence: str | None = setting(
        None,
        "scorer of coherence, such as judge:MODEL@URL (default: perplexity under the model, and loops)",
    )
    json: bool = setting(False, "results as JSON")


@dataclass(frozen=True)
class PersonaSettings(ScoringSettings):
    """A persona's folder beside them."""

    folder: str = setting(help="persona folder", positional=True)


def scorers(args: Namespace, settings: ScoringSettings, trait: Any, folder: Path) -> dict[str, Any]:
    """The trait's scorer and that of coherence (None: fluency); judges keep their replies in the folder."""
    from interp_ablate.scoring.registry import make_scorer

    endpoint = judge_settings(args)
    scorer, coherence = trait_scorer(settings.scorer, trait, folder, endpoint), None
    if settings.coherence:
        options: dict[str, Any] = {"cache": folder / REPLIES, "endpoint": endpoint}
        coherence = make_scorer(settings.coherence, rubric=COHERENCE_RUBRIC, **options)
    return {"scorer": scorer, "coherence": coherence}


def opened(args: Namespace, settings: PersonaSettings) -> tuple[Any, dict[str, Any], Any]:
    """The persona of the folder, its scorers and its model."""
    from interp_ablate.persona.persona import load_persona

    persona, folder = load_persona(settings.folder), Path(settings.folder)
    both = scorers(args, settings, persona.trait, folder)
    return persona, both, load(settings, settings.model or persona.model)


def greedy(args: Namespace) -> SamplingConfig:
    """Greedy answers, with the numbers that were given."""
    return SamplingConfig(**{**given_flags(args, SamplingConfig), "temperature": 0.0})


def asked_questions(count: int | None, persona: Any) -> Any:
    """The first questions of the trait's evaluation questions; all where no number is given.

    Raises:
        RunError: fewer than one, or more than there are.
    """
    questions = persona.trait.evaluation_questions
    if count is not None and not 1 <= count <= len(questions):
        raise RunError(f"--questions {count}: the trait has 1 to {len(questions)}")
    return questions[:count]


def score_text(row: dict[str, Any]) -> str:
    """A condition's trait score and coherence, as a line shows them."""
    if row["score"] is None:
        return "no verdict"
    coherence = "no verdict" if row["coherence"] is None else f"{row['coherence']:.1f}"
    return f"trait {row['score']:.1f} [{row['score_low']:.1f}, {row['score_high']:.1f}], coherence {coherence}"
