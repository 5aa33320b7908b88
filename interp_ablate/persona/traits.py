"""Traits and their files: system prompts in pairs, questions, and a rubric for judges.

Knows: two file layouts, and what makes a trait unusable. Does not know: models, or how answers are made and
scored. Nothing here imports torch, transformers or numpy.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp_ablate.errors import PromptError
from interp_ablate.prompts.prompt import Prompt, normalised
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.incoming_files import incoming_bytes, parse_json
from interp_ablate.storage.strict_json import json_text

FEWEST_QUESTIONS = 2  # for extraction: some make the vector, others choose its layer
_NAME = re.compile(r"[\w][\w .-]*")
_KEYS = (
    "name", "description", "instruction", "extraction_questions", "evaluation_questions", "eval_prompt",
)  # fmt: skip
_EXTRACT, _EVALUATE = "trait_data_extract", "trait_data_eval"  # folders of the published repository


@dataclass(frozen=True)
class Trait:
    """A trait: pairs of system prompts that ask for it and against it, and questions to answer so.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

    Raises:
        PromptError: a blank or missing text, sides of different length, a pair that says the same twice,
            repeated questions, a question that is in both lists.
    """

    name: str
    description: str
    positive: tuple[str, ...]
    """System prompts that ask for the trait; `positive[i]` and `negative[i]` are a pair, alike but for it."""
    negative: tuple[str, ...]
    """System prompts that ask against it."""
    extraction_questions: tuple[str, ...]
    """Questions that make the vectors and choose their layer."""
    evaluation_questions: tuple[str, ...]
    """Questions for reporting alone."""
    rubric: str
    """Tells a judge what 0 and 100 mean."""
    scorer: str | None = None
    """Spec of a scorer that needs no judge (`scoring.registry.make_scorer`)."""

    def __post_init__(self) -> None:
        for key in ("name", "description", "rubric"):
            check_text(getattr(self, key), key)
        check_name(self.name)
        if self.scorer is not None:
            check_text(self.scorer, "scorer")
        for key in ("positive", "negative", "extraction_questions", "evaluation_questions"):
            object.__setattr__(self, key, _check_texts(getattr(self, key), key))
        if len(self.positive) != len(self.negative):
            raise PromptError(
                f"positive, negative: {len(self.positive)} and {len(self.negative)} system prompts: they "
                "are pairs, one that asks for the trait and one against it"
            )
        for i, (one, other) in enumerate(zip(self.positive, self.negative)):
            if _key(one) == _key(other):
                raise PromptError(f"pair {i}: positive and negative are the same: {one[:60]!r}")
        if len(self.extraction_questions) < FEWEST_QUESTIONS:
            raise PromptError(
                f"extraction_questions: {len(self.extraction_questions)} of at least {FEWEST_QUESTIONS}: "
                "some make the vector, others choose its layer"
            )
        made = {_key(question) for question in self.extraction_questions}
        both = [question for question in self.evaluation_questions if _key(question) in made]
        if both:
            raise PromptError(
                f"evaluation_questions: {len(both)} of them are for extraction too, such as {both[0]!r}: "
                "what makes a vector cannot report on it; remove them from one list"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 of everything the trait says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The trait as its file has it; `load_trait` reads it back."""
        return {
            "name": self.name,
            "description": self.description,
            "instruction": [{"pos": p, "neg": n} for p, n in zip(self.positive, self.negative)],
            "extraction_questions": list(self.extraction_questions),
            "evaluation_questions": list(self.evaluation_questions),
            "eval_prompt": self.rubric,
            "scorer": self.scorer,
        }

    def save(self, path: str | Path) -> None:
        """Write the trait as JSON, whole or not at all.

        Raises:
            PromptError: the place cannot be written.
        """
        content = json_text(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_atomic(Path(path), content, error=PromptError)


@dataclass(frozen=True)
class Questions:
    """Three lists of questions without a common one."""

    extraction: tuple[str, ...]
    """They make the vector."""
    selection: tuple[str, ...]
    """They choose its layer and coefficient."""
    evaluation: tuple[str, ...]
    """They report on it."""


def split_questions(trait: Trait, *, extraction: int, selection: int, evaluation: int) -> Questions:
    """Split a trait's questions: its first ones for extraction, the last of these for selection.

    Raises:
        PromptError: a number below 1, or more than the trait has.
    """
    counts = {"extraction": extraction, "selection": selection, "evaluation": evaluation}
    small = [f"{key}={number}" for key, number in counts.items() if number < 1]
    if small:
        raise PromptError(f"{', '.join(small)}: each of the three needs at least 1 question")
    has = len(trait.extraction_questions)
    if extraction + selection > has or evaluation > len(trait.evaluation_questions):
        raise PromptError(
            f"the trait {trait.name!r} has {has} questions for extraction and "
            f"{len(trait.evaluation_questions)} for evaluation; extraction={extraction} + "
            f"selection={selection} and evaluation={evaluation} are too many: ask for fewer, or add "
            "questions to the trait file"
        )
    return Questions(
        trait.extraction_questions[:extraction],
        trait.extraction_questions[has - selection :],
        trait.evaluation_questions[:evaluation],
    )


def first_evaluation_questions(trait: Trait, count: int | None = None) -> tuple[str, ...]:
    """The trait's first `count` evaluation questions; all of them by default.

    Raises:
        PromptError: a count below 1, or more than the trait has.
    """
    count = len(trait.evaluation_questions) if count is None else count
    return split_questions(trait, extraction=1, selection=1, evaluation=count).evaluation


def bundled_traits() -> list[str]:
    """Names of the traits that come with the package."""
    return sorted(path.stem for path in bundled("traits").glob("*.json"))


def load_trait(name_or_path: str | Path) -> Trait:
    """A bundled trait by name, or a trait file.

    Two layouts are read. This package's has everything in one file: `name`, `description`, `instruction`
    (objects with `pos` and `neg`), `extraction_questions`, `evaluation_questions`, `eval_prompt` (the
    rubric) and, if wanted, `scorer`. The published repository's has two files of one name,
    `trait_data_extract/NAME.json` and `trait_data_eval/NAME.json`, each with `instruction`, `questions`
    and `eval_prompt`: give either. Its instructions are used as its pipeline uses them, after "You are a
    NAME assistant." and "You are a helpful assistant."

    Raises:
        PromptError: no such trait; a file that is no JSON (with its line), lacks a key or has a wrong one
            (named); what `Trait` refuses.
    """
    if isinstance(name_or_path, str) and name_or_path in bundled_traits():
        file = bundled("traits", f"{name_or_path}.json")
        return trait_from_file(_parsed(file.read_bytes(), Path(f"{name_or_path}.json")), f"{file}")
    path = Path(name_or_path)
    if path.is_dir():
        raise PromptError(f"{path} is a folder: give a trait file (.json) in it")
    if not path.is_file():
        near = difflib.get_close_matches(str(name_or_path), bundled_traits(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise PromptError(
            f"no trait {str(name_or_path)!r}{hint}: give a bundled name ({', '.join(bundled_traits())}) "
            "or a trait file; `interp-ablate persona new` writes one"
        )
    data = _read(path)
    if "questions" in data:
        return _published(path, data)
    return trait_from_file(data, str(path))


def _read(path: Path) -> dict[str, Any]:
    return _parsed(incoming_bytes(path, error=PromptError), path)


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PromptError(f"{path}, line {line}: not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except ValueError as error:
        raise PromptError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise PromptError(f"{path}: a trait file is one JSON object, not {type(content).__name__}")
    return content


def trait_from_file(data: Mapping[str, Any], place: str) -> Trait:
    accepted = [*_KEYS, "scorer"]
    unknown = [key for key in data if key not in accepted]
    if unknown:
        raise PromptError(
            f"{place}: unknown key {unknown[0]!r}: a trait file has {', '.join(accepted)}"
        )
    positive, negative = _pairs(required_value(data, "instruction", place), place)
    try:
        return Trait(
            required_value(data, "name", place),
            required_value(data, "description", place),
            positive,
            negative,
            required_value(data, "extraction_questions", place),
            required_value(data, "evaluation_questions", place),
            required_value(data, "eval_prompt", place),
            data.get("scorer"),
        )
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from error


def required_value(data: Mapping[str, Any], key: str, place: str) -> Any:
    if key not in data:
        raise PromptError(
            f"{place}: the key {key!r} is missing; there are {', '.join(map(repr, data)) or 'none'}"
        )
    return data[key]


def _pairs(value: Any, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not isinstance(value, list) or not value:
        raise PromptError(
            f'{place}: "instruction" is a list of objects {{"pos": ..., "neg": ...}}; got {value!r:.60}'
        )
    for i, pair in enumerate(value):
        here = f"{place}: instruction[{i}]"
        if not isinstance(pair, dict):
            raise PromptError(f'{here} is an object {{"pos": ..., "neg": ...}}; got {pair!r:.60}')
        for side in ("pos", "neg"):
            try:
                check_text(required_value(pair, side, here), side)
            except PromptError as error:
                raise PromptError(
                    str(error) if here in str(error) else f"{here}: {error}"
                ) from error
    return tuple(pair["pos"] for pair in value), tuple(pair["neg"] for pair in value)


def _published(path: Path, data: Mapping[str, Any]) -> Trait:
    """A trait of the published repository, from the two files of its name."""
    folders = (_EXTRACT, _EVALUATE)
    if path.parent.name not in folders:
        raise PromptError(
            f'{path}: a file with "questions" is one of two of the published layout, in folders '
            f'{_EXTRACT} and {_EVALUATE}; for one file use "extraction_questions" and '
            '"evaluation_questions", disjoint'
        )
    both = [path.resolve().parent.parent / folder / path.name for folder in folders]
    missing = [other for other in both if not other.is_file()]
    if missing:
        raise PromptError(
            f"{path} is half of a trait: {missing[0]} is missing. Extraction and evaluation have "
            "questions of their own; put it there"
        )
    extract, evaluate = (data if p == path.resolve() else _read(p) for p in both)
    positive, negative = _pairs(required_value(extract, "instruction", str(both[0])), str(both[0]))
    name = path.stem
    article = "an" if name[0].lower() in "aeiou" else "a"
    try:
        return Trait(
            name,
            f"the trait {name!r}, as the published trait files describe it",
            tuple(f"You are {article} {name} assistant. {text}" for text in positive),
            tuple(f"You are a helpful assistant. {text}" for text in negative),
            required_value(extract, "questions", str(both[0])),
            required_value(evaluate, "questions", str(both[1])),
            required_value(evaluate, "eval_prompt", str(both[1])),
        )
    except PromptError as error:
        message = str(error)
        raise PromptError(
            message if str(both[0].parent.parent) in message else f"{path}: {error}"
        ) from error


def check_text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"{key}: needs a text, got {value!r:.60} ({type(value).__name__})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{key}: not valid Unicode ({error.reason})") from error
    return value


def _check_texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise PromptError(f"{key}: needs a list of texts, got {value!r:.60}")
    for i, text in enumerate(value):
        check_text(text, f"{key}[{i}]")
    first: dict[str, int] = {}
    for i, text in enumerate(value):
        before = first.setdefault(_key(text), i)
        if before != i:
            raise PromptError(f"{key}[{i}]: the same as {key}[{before}]: {text[:60]!r}; remove one")
    return tuple(value)


def _key(text: str) -> str:
    return normalised(Prompt(text))


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise PromptError(f"name: {name!r} names files: use letters, digits, '-' and '_'")
