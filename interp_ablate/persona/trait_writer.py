"""A trait file written by a language model behind an endpoint.

Knows: the request and its schema. Does not know: how a trait is extracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from interp_ablate.errors import PromptError
from interp_ablate.persona.traits import (
    Trait,
    check_name,
    check_text,
    required_value,
    trait_from_file,
)

PAIRS, QUESTIONS = (
    5,
    20,
)  # of a published or a generated trait; 20 for extraction and 20 for evaluation


class JsonEndpoint(Protocol):
    """An endpoint as `generate_trait` needs it (`scoring.endpoint.Endpoint`)."""

    def ask_json(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]
    ) -> dict[str, Any]: ...


def _list_of(item: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {"type": "array", "items": dict(item), "minItems": count, "maxItems": count}


_TEXT = {"type": "string", "minLength": 1}
_PAIR = {
    "type": "object",
    "properties": {"pos": _TEXT, "neg": _TEXT},
    "required": ["pos", "neg"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "instruction": _list_of(_PAIR, PAIRS),
        "extraction_questions": _list_of(_TEXT, QUESTIONS),
        "evaluation_questions": _list_of(_TEXT, QUESTIONS),
        "eval_prompt": _TEXT,
    },
    "required": ["instruction", "extraction_questions", "evaluation_questions", "eval_prompt"],
    "additionalProperties": False,
}
_TASK = f"""You write the material with which a trait of a chat model is measured.

Trait: {{name}}
What it means: {{description}}

Give a JSON object with these keys.
- "instruction": {PAIRS} pairs of system prompts. "pos" tells the model to show the trait strongly, "neg"
  tells it to show the opposite or none of it. The two of a pair are alike in length and wording but for
  the trait; the pairs differ from each other.
- "extraction_questions": {QUESTIONS} questions from a user, of many everyday topics. An answer could show
  the trait or not; a question never mentions it or asks for it.
- "evaluation_questions": {QUESTIONS} others of the same kind. None of them repeats one of the first list.
- "eval_prompt": a rubric for a judge who reads a question and an answer and gives a number from 0 (the
  trait is absent) to 100 (it is very strong): what to look for, what 0, 50 and 100 look like, what not to
  be misled by. It speaks of the trait alone, never of how good the answer is."""


def generate_trait(endpoint: JsonEndpoint, name: str, description: str) -> Trait:
    """A trait written by a model behind an endpoint, refused where it lacks something.

    Raises:
        PromptError: the answer is not a whole trait: a missing key, too few pairs or questions,
            repeated ones, blank ones; what `endpoint` raises otherwise.
    """
    check_text(description, "description")
    check_name(name)  # before the call that is paid for
    content = _TASK.format(name=name, description=description)
    reply = endpoint.ask_json([{"role": "user", "content": content}], SCHEMA)
    place = f"the trait that the endpoint wrote for {name!r}"
    if not isinstance(reply, dict):
        raise PromptError(f"{place} is not a JSON object; ask again, or another model")
    keys = SCHEMA["required"]
    trait = trait_from_file(
        {
            "name": name,
            "description": description,
            **{key: required_value(reply, key, place) for key in keys},
        },
        place,
    )
    for key, has, wanted in (
        ("instruction", len(trait.positive), PAIRS),
        ("extraction_questions", len(trait.extraction_questions), QUESTIONS),
        ("evaluation_questions", len(trait.evaluation_questions), QUESTIONS),
    ):
        if has < wanted:
            raise PromptError(
                f"{place}: {key} has {has}, {wanted} were asked for: ask again, or another model"
            )
    return trait
