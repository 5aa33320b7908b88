"""The report's words: its numbers as text, the result in sentences, and the few numbers to read first.

Knows: rounding, units, which numbers say what, and when a result speaks against itself. Does not know: the files of
a run, or how a page is laid out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

NEAR_FLOOR = 5  # a KL below so many times what rounding gives may be rounding


def number(value: Any) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None or isinstance(value, bool):
        return "–" if value is None else ("yes" if value else "no")
    try:
        x = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isnan(x):
        return "–"
    if x.is_integer() and abs(x) < 1e9:
        return f"{int(x)}"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def rate(value: Any) -> str:
    """A share as a percentage, with one decimal below 10% so that 1 of 64 does not read as 2%."""
    try:
        percent = 100 * float(value)
    except (TypeError, ValueError):
        return number(value)
    if not math.isfinite(percent):
        return "–"
    text = f"{percent:.1f}" if 0 < percent < 10 else f"{percent:.0f}"
    return f"{text.removesuffix('.0')}%"


def duration(value: Any) -> str:
    """Seconds as a person says them."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return number(value)
    if seconds < 60 or not math.isfinite(seconds):
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def plain(value: Any) -> str:
    """A configuration value as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None or value == "" else str(value)


def with_interval(test: Mapping[str, Any], key: str, *, as_rate: bool) -> str:
    """The number under `key` and its interval, if it has one."""
    show = rate if as_rate else number
    interval = span_text(test, key, as_rate=as_rate)
    return show(test.get(key)) + (f" [{interval}]" if interval else "")


def span_text(test: Mapping[str, Any], key: str, *, as_rate: bool) -> str:
    """The interval of the number under `key`, empty where there is none."""
    return ends_text(part_of(test, "intervals").get(key), as_rate=as_rate)


def ends_text(ends: Any, *, as_rate: bool) -> str:
    """Both ends of an interval, empty where there is none."""
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        return ""
    show = rate if as_rate else number
    return f"{show(ends[0])} to {show(ends[1])}"


def part_of(whole: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """The object under `key`, empty where there is none."""
    part = (whole or {}).get(key)
    return dict(part) if isinstance(part, Mapping) else {}


def objects(values: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list, empty where there is none."""
    return [dict(value) for value in values or [] if isinstance(value, Mapping)]


def headline(
    behaviour: str,
    configuration: Mapping[str, Any],
    selected: Mapping[str, Any] | None,
    certificate: Mapping[str, Any] | None,
    *,
    concept: bool = False,
) -> list[dict[str, str]]:
    """The result in sentences, each with a tone: plain, good, warn or bad."""
    if selected is None and concept:
        text = (
            "This is a run of a concept: directions, held-out probes, projections, what writes the direction, "
            "and effects by layer. No plan was chosen and nothing exported; the notes say why."
        )
        return [_claim(text)]
    if selected is None:
        return [_claim("No plan has been chosen yet: the sweep has not finished.", "warn")]
    if not selected.get("plan"):
        text = (
            "No candidate passed the limits, so there is no plan and nothing to export. "
            "What removed how many, and what to relax, stands below."
        )
        return [_claim(text, "bad")]
    test = part_of(selected, "test")
    if not test:
        text = "A plan is chosen, but its report on the test split is not there yet."
        return [_claim(text, "warn"), _export(certificate)]
    claims = []
    if "behaviour_before" in test and "behaviour_after" in test:
        before, after = (
            with_interval(test, f"behaviour_{when}", as_rate=True) for when in ("before", "after")
        )
        claims.append(
            _claim(
                f"Of the answers to positive test prompts, {before} express “{behaviour}” before the "
                f"edit and {after} after the ablation."
            )
        )
    if test.get("positive_no_answer_after"):
        none = with_interval(test, "positive_no_answer_after", as_rate=True)
        claims.append(
            _claim(
                f"After the ablation {none} of these prompts have no answer: a thought began and did not end. "
                "They count as answers with it.",
                "warn",
            )
        )
    if test.get("kl_first_token") is not None:
        claims.append(_damage(test, configuration.get("max_kl")))
    if test.get("addition_after") is not None:
        added = with_interval(test, "addition_after", as_rate=True)
        claims.append(
            _claim(
                f"Adding the direction makes {added} of the answers to negative prompts express it, "
                f"against {rate(test.get('negative_before'))} unedited."
            )
        )
    return [*claims, _controls(test), _export(certificate)]


def _damage(test: Mapping[str, Any], limit: Any) -> dict[str, str]:
    kl, interval = test["kl_first_token"], span_text(test, "kl_first_token", as_rate=False)
    text = f"On negative prompts the first token's distribution moved by a KL of {number(kl)} nats"
    text += f" [{interval}]" if interval else ""
    if test.get("kl_continuation") is not None:
        text += f", and by {number(test['kl_continuation'])} a token over the whole continuation"
    over = is_number(kl) and is_number(limit) and float(kl) > float(limit)
    if limit is not None:
        text += f"; the limit in the choice was {number(limit)}"
        text += ", which the test split exceeds" if over else ""
    text, floor = text + ".", test.get("kl_floor")
    if not is_number(floor):
        return _claim(text, "warn" if over else "plain")
    near = is_number(kl) and float(kl) < NEAR_FLOOR * floor
    text += f" Rounding alone gives {number(floor)} nats in {test.get('kl_dtype', 'this dtype')}"
    text += ": the KL is too near to it to be told from rounding." if near else "."
    return _claim(text, "warn" if over or near else "plain")


def _controls(test: Mapping[str, Any]) -> dict[str, str]:
    controls = [c for c in objects(test.get("controls")) if is_number(c.get("behaviour_after"))]
    if not controls:
        text = "There are no controls: without them this is not evidence for a direction."
        return _claim(text, "warn")
    equal_kl = [c for c in controls if c.get("matched") == "KL"]
    equal_strength = [c for c in controls if c not in equal_kl]
    text = f"The same edit along control directions leaves the behaviour in {_range_of(equal_strength or equal_kl)}"
    if equal_strength and equal_kl:
        text += (
            f" at equal strength, and in {_range_of(equal_kl)} where it is scaled to the plan's KL"
        )
    after = test.get("behaviour_after")
    if is_number(after) and min(float(c["behaviour_after"]) for c in controls) <= float(after):
        text += ": a control does as much as the direction, which speaks against it."
        return _claim(text, "bad")
    return _claim(f"{text}.")


def _range_of(controls: Sequence[Mapping[str, Any]]) -> str:
    """The rates of some controls in words."""
    rates = [float(control["behaviour_after"]) for control in controls]
    low, high = rate(min(rates)), rate(max(rates))
    between = low if low == high else f"{low} to {high}"
    return (
        f"{between} of answers to positive prompts ({len(rates)} control{'s' if rates[1:] else ''})"
    )


def _export(certificate: Mapping[str, Any] | None) -> dict[str, str]:
    if certificate is None:
        return _claim("Nothing has been exported yet.")
    numbers = (
        f"largest logit difference to the hooked model {number(certificate.get('max_abs_logit_difference'))}, "
        f"KL {number(certificate.get('kl'))}, "
        f"residual along the direction {number(certificate.get('residual_along_direction'))}"
    )
    if certificate.get("passed") is True:
        return _claim(f"The exported checkpoint passed its certificate: {numbers}.", "good")
    return _claim(
        f"The exported checkpoint FAILED its certificate, do not use it: {numbers}.", "bad"
    )


def _claim(text: str, tone: str = "plain") -> dict[str, str]:
    return {"text": text, "tone": tone}


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def tiles(
    test: Mapping[str, Any], certificate: Mapping[str, Any] | None, configuration: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The few numbers to read first, each with a name and a note."""
    shown = []
    if "behaviour_before" in test and "behaviour_after" in test:
        value = f"{rate(test['behaviour_before'])} → {rate(test['behaviour_after'])}"
        shown.append({"name": "expressed, ablated", "value": value, "note": "positive, test split"})
    if test.get("addition_after") is not None:
        value = f"{rate(test.get('negative_before'))} → {rate(test['addition_after'])}"
        shown.append({"name": "expressed, added", "value": value, "note": "negative, test split"})
    if test.get("kl_first_token") is not None:
        limit = configuration.get("max_kl")
        note = "nats, negative, test split" + (
            f"; limit {number(limit)}" if limit is not None else ""
        )
        shown.append({"name": "KL", "value": number(test["kl_first_token"]), "note": note})
    if shown or certificate is not None:
        passed = certificate is not None and certificate.get("passed") is True
        value = "none yet" if certificate is None else "passed" if passed else "FAILED"
        tone = "" if certificate is None else "good" if passed else "bad"
        note = "export against hooked model"
        shown.append({"name": "certificate", "value": value, "note": note, "tone": tone})
    return shown
