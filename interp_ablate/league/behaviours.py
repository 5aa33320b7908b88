"""Behaviours of the league: contrast sets and traits, split for a seed, with what finds them in answers.

Knows: how a name becomes prompts and a scorer. Does not know: models or methods.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from interp_ablate.errors import RunError
from interp_ablate.persona.traits import Trait, load_trait
from interp_ablate.prompts.contrast_set import ContrastSet, Split
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.behaviour import Behaviour, behaviour_of
from interp_ablate.scoring.expression_lists import EXPRESSIONS_OF_CONTRAST
from interp_ablate.scoring.expressions import expression_scorer
from interp_ablate.scoring.registry import make_scorer

PERSONA = "persona:"
TRAIN_SHARE = 0.7  # of a trait's questions for extraction; the others are for choosing


@dataclass(frozen=True, eq=False)
class LeagueBehaviour:
    """One behaviour: its prompts, and what finds it in answers."""

    name: str
    contrast: ContrastSet
    """All of its prompts, matched pairs in order."""
    scorer: Behaviour | None
    """None where only the prompts have the concept, and only detection can be judged."""
    trait: Trait | None = None
    """The trait behind a persona."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the prompts and of what the scorer depends on."""
        parts = [self.contrast.fingerprint, self.scorer and self.scorer.identity]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def split(self, seed: int, *, n_train: int, n_validation: int, n_test: int) -> Split:
        """The three parts for a seed; a persona's are apart by question, and its test part has the trait's own.

        Raises:
            PromptError: too few prompts.
            RunError: too few pairs of a trait's question and system prompt.
        """
        if self.trait is None:
            return self.contrast.split(n_train, n_validation, n_test, seed=seed)
        questions = list(self.trait.extraction_questions)
        random.Random(seed).shuffle(questions)
        cut = round(TRAIN_SHARE * len(questions))
        parts = {
            "train": (questions[:cut], n_train),
            "validation": (questions[cut:], n_validation),
            "test": (self.trait.evaluation_questions, n_test),
        }
        return Split(**{name: self._part(name, seed, *part) for name, part in parts.items()})

    def _part(self, name: str, seed: int, questions: Sequence[str], size: int) -> ContrastSet:
        assert self.trait is not None
        positive, negative = _pairs(self.trait, questions)
        if size > len(positive):
            raise RunError(
                f"{self.name} has {len(positive)} pairs of a question and a system prompt for the {name} part; "
                f"--n-{name} asks for {size}"
            )
        chosen = random.Random(seed).sample(range(len(positive)), size)
        source = f"{self.contrast.source} [{name}, seed {seed}]"
        return ContrastSet(
            self.name,
            tuple(positive[i] for i in chosen),
            tuple(negative[i] for i in chosen),
            source,
        )


def behaviour_named(name: str) -> LeagueBehaviour:
    """A behaviour by the name that a command line gives it.

    - a bundled contrast set; its list of expressions, if it has one, finds the behaviour in answers;
    - a file or folder of a contrast set (`ContrastSet.load`), and `FILE#LIST` with a list of expressions for it;
    - `persona:TRAIT`, a bundled trait or a trait file: its questions under its system prompts.

    Raises:
        PromptError: no such contrast set or trait.
        InterpAblateError: no such list of expressions.
        RunError: a trait that names no scorer, or one whose package is missing.
    """
    if name.startswith(PERSONA):
        return _persona(name)
    place, _, listed = name.partition("#")
    contrast = ContrastSet.load(place)
    listed = listed or EXPRESSIONS_OF_CONTRAST.get(place, "")
    scorer = expression_scorer(listed, contrast="") if listed else None
    return LeagueBehaviour(name, contrast, scorer)


def _persona(name: str) -> LeagueBehaviour:
    trait = load_trait(name.removeprefix(PERSONA))
    if trait.scorer is None:
        raise RunError(
            f"the trait {trait.name!r} names no scorer that needs no judge: add one to its file, such as "
            '"scorer": "lexicon:sentiment"'
        )
    positive, negative = _pairs(trait, trait.extraction_questions + trait.evaluation_questions)
    contrast = ContrastSet(name, positive, negative, f"the trait {trait.name}")
    return LeagueBehaviour(name, contrast, behaviour_of(make_scorer(trait.scorer)), trait)


def _pairs(trait: Trait, questions: Sequence[str]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Every question under every pair of system prompts."""
    sides = [
        tuple(Prompt(question, system=system) for question in questions for system in systems)
        for systems in (trait.positive, trait.negative)
    ]
    return sides[0], sides[1]
