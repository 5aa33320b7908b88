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
    """A few of many, each as likely as every other, without knowing how many there are."""

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
    """The kinds of reason of a decision, each with the phrase that was found, if it was one."""
    for because in decision.because:
        value, why, found = because.reading
        if value is None:
            yield f"no verdict: {why or because.rule}", ""
        else:
            yield from found or ((because.rule, ""),)


# ---- for human eyes --------------------------------------------------------------------------------

_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "article{border:1px solid #ccc;border-radius:6px;padding:.6rem 1rem;margin:1rem 0}"
    ".role{color:#666;font-size:.8rem;margin:.6rem 0 0}.text{white-space:pre-wrap;margin:0}"
    ".why{color:#a33;font-size:.9rem;margin:.2rem 0}.hit{border-left:3px solid #a33;padding-left:.6rem}"
)


def samples_page(title: str, parts: dict[str, SampledDecisions]) -> str:
    """Some samples of each outcome as an HTML page; everything that comes from the data is escaped."""
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
    reasons = [_reason(because) for because in decision.because]
    turns = {because.turn for because in decision.because}
    parts = [f"<article><p class='role'>number {sample.number}</p>"]
    parts += [f"<p class='why'>{html.escape(reason)}</p>" for reason in reasons]
    for index, message in enumerate(sample.messages):
        text = message.content
        if len(text) > _SHOWN:
            text = f"{text[:_SHOWN]} ... ({len(text) - _SHOWN} more characters)"
        hit = " hit" if index in turns else ""
        parts.append(
            f"<p class='role'>{message.role}</p><p class='text{hit}'>{html.escape(text)}</p>"
        )
    return "".join(parts) + "</article>"


def _reason(because: RuleHit) -> str:
    value, why, found = because.reading
    said = why or ("no verdict" if value is None else f"{value:g}")
    if found:
        said = "; ".join(f"{kind}: {phrase}" for kind, phrase in found)
    place = f"message {because.turn + 1}, " if because.turn >= 0 else ""
    return f"{place}{because.rule}: {said}"
