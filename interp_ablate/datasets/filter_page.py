"""A page that shows some decisions of a filter.

Knows: HTML of a few samples. Does not know: how they were decided.
"""

from __future__ import annotations

import html
import random
from collections.abc import Iterator

from interp_ablate.datasets.conversations import Sample
from interp_ablate.datasets.filter_recipe import Decision, RuleHit

_SHOWN = 1500  # characters of a message on the page of samples


class SampledDecisions:
    """A uniform random sample of a stream (reservoir sampling)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random, self.seen = size, random.Random(seed), 0
        self.items: list[tuple[Sample, Decision]] = []

    def add(self, item: tuple[Sample, Decision]) -> None:
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
            return
        place = self.random.randrange(self.seen)
        if place < self.size:
            self.items[place] = item


def reason_kinds(decision: Decision) -> Iterator[tuple[str, str]]:
    """The kinds of reasons of a decision, each with the phrase in the answer, or ""."""
    for hit in decision.hits:
        value, why, phrases = hit.value
        if value is None:
            yield f"no verdict: {why or hit.rule}", ""
        else:
            yield from phrases or ((hit.rule, ""),)


# ---- for human eyes --------------------------------------------------------------------------------

_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "article{border:1px solid #ccc;border-radius:6px;padding:.6rem 1rem;margin:1rem 0}"
    ".role{color:#666;font-size:.8rem;margin:.6rem 0 0}.text{white-space:pre-wrap;margin:0}"
    ".why{color:#a33;font-size:.9rem;margin:.2rem 0}.hit{border-left:3px solid #a33;padding-left:.6rem}"
)


def samples_page(title: str, parts: dict[str, SampledDecisions]) -> str:
    """An HTML page of some samples of each outcome; everything that comes from the data is escaped."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for name, drawn in parts.items():
        if drawn.seen:
            body.append(f"<h2>{name}: {len(drawn.items)} of {drawn.seen}</h2>")
        for sample, decision in sorted(drawn.items, key=lambda item: item[0].number):
            body.append(_article(sample, decision))
    return (
        '<!doctype html>\n<html><head><meta charset="utf-8"><title>'
        f"{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _article(sample: Sample, decision: Decision) -> str:
    reasons = [_reason(hit) for hit in decision.hits]
    turns = {hit.turn for hit in decision.hits}
    parts = [f"<article><p class='role'>number {sample.number}</p>"]
    parts += [f"<p class='why'>{html.escape(reason)}</p>" for reason in reasons]
    for index, message in enumerate(sample.messages):
        text = message.content
        if len(text) > _SHOWN:
            text = f"{text[:_SHOWN]} ... ({len(text) - _SHOWN} more characters)"
        marked = " hit" if index in turns else ""
        parts.append(
            f"<p class='role'>{message.role}</p><p class='text{marked}'>{html.escape(text)}</p>"
        )
    return "".join(parts) + "</article>"


def _reason(hit: RuleHit) -> str:
    value, why, phrases = hit.value
    reason = why or ("no verdict" if value is None else f"{value:g}")
    if phrases:
        reason = "; ".join(f"{kind}: {phrase}" for kind, phrase in phrases)
    place = f"message {hit.turn + 1}, " if hit.turn >= 0 else ""
    return f"{place}{hit.rule}: {reason}"
