"""Rendering: the tokens that prompts become, as a fingerprint of how questions are put to a model, and their room.

Knows: what of a model and of the day decides the tokens of a prompt. Does not know: what the answers are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from interp_ablate.errors import PromptError
from interp_ablate.models.model import Model
from interp_ablate.prompts.prompt import Prompt, PromptLike

PROBES = (Prompt("Hello"), Prompt("Hello", "Be brief."))


def rendering(model: Model, prompts: Iterable[PromptLike] = PROBES) -> str:
    """SHA-256 of the chat format and of the tokens that it makes of prompts.

    A template may write the date, so that the same text is another question tomorrow. Where the prompts are too many,
    PROBES stand for them; one that the template refuses (it knows no system prompt) counts as refused.
    """
    rows: list[list[int] | None] = []
    for prompt in prompts:
        try:
            rows.append(None if model.tokenizer is None else model.encode(prompt))
        except PromptError:
            rows.append(None)
    return hashlib.sha256(json.dumps([model.chat_format.to_dict(), rows]).encode()).hexdigest()


def require_room(
    model: Model, prompts: PromptLike | Sequence[PromptLike], max_new_tokens: int
) -> None:
    """Refuse, before any work, prompts after which so many new tokens do not fit into a model's positions.

    A thought counts too where the model may think, and so does the last new token: answers are read again whole.

    Raises:
        ModelError: positions are learned (or the backend is HookedTransformer), and there are fewer.
    """
    rows = model.encode_all(prompts)
    opened = [model.thinking.is_opened(row) for row in rows]
    most = model.thinking.budget(opened, max_new_tokens).most
    model.site_map.check_positions(max(map(len, rows)) + most)
