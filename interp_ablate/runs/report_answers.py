"""The report's answers side by side: by set and prompt, with the words marked that differ.

Knows: generations.jsonl. Does not know: the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp_ablate.display import marked_differences
from interp_ablate.storage.tables import read_lines

CONDITIONS = ("baseline", "ablated", "added")
FIRST_PAIRS = 3


def answer_groups(folder: Path) -> list[dict[str, Any]] | None:
    """Answers side by side, one group a set; None where none were written."""
    records = read_lines(folder / "generations.jsonl")
    if records is None:
        return None
    labels: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        prompts = labels.setdefault(str(record.get("label", "unlabelled")), {})
        answers = prompts.setdefault(str(record.get("prompt", "")), {})
        answers[str(record.get("condition", "?"))] = record
    groups = []
    for label, prompts in sorted(labels.items(), reverse=True):
        present = {condition for answers in prompts.values() for condition in answers}
        conditions = [name for name in CONDITIONS if name in present]
        conditions += sorted(present - set(CONDITIONS))
        counts = {
            name: [bool(a[name].get("expressed")) for a in prompts.values() if name in a]
            for name in conditions
        }
        groups.append(
            {
                "label": label,
                "conditions": conditions,
                "counts": {name: (sum(hits), len(hits)) for name, hits in counts.items()},
                "prompts": [
                    {"prompt": p, "answers": answers, **_marked(answers)}
                    for p, answers in prompts.items()
                ],
            }
        )
    return groups


def _marked(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each condition's answer, with the words marked that the unedited one does not say; whether any differs."""
    texts = {name: str(record.get("text") or "") for name, record in answers.items()}
    before = texts.get("baseline")
    if before is None:
        return {"marked": texts, "changed": False}
    marked = {
        name: text if name == "baseline" else marked_differences(before, text)
        for name, text in texts.items()
    }
    return {"marked": marked, "changed": any(text != before for text in texts.values())}


def first_pairs(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first prompts of the first set with an unedited and an edited answer, differences marked in both."""
    pairs = []
    for item in groups[0]["prompts"] if groups else ():
        before, after = (item["answers"].get(name) for name in CONDITIONS[:2])
        if before is None or after is None:
            continue
        texts = [str(record.get("text") or "") for record in (before, after)]
        pairs.append(
            {
                "prompt": item["prompt"],
                "before_record": before,
                "after_record": after,
                "before": marked_differences(texts[1], texts[0]),
                "after": marked_differences(texts[0], texts[1]),
            }
        )
    return pairs[:FIRST_PAIRS]
