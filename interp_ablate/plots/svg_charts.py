"""Charts as SVG for pages: marks that say their own value, readable without a script.

Every mark has a `<title>`, which browsers show when the pointer rests on it; a page's script may show it at once.
Colours are classes (`s0`, `s1`, ...), so that a page has them light and dark.

Knows: scales, axes, marks. Does not know: where the data come from, or the page around a chart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from interp_ablate.display import Html, html_of

_WIDTH, _HEIGHT = 720, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 82, 12, 12, 54  # room for labels that narrow screens draw larger
_N_STYLES = 6  # of series: beyond them colours begin again


@dataclass(frozen=True)
class Mark:
    """One value of a chart."""

    x: float
    y: float
    text: str
    """What the pointer shows on it."""
    series: str = ""
    key: str = ""
    """What a page knows it by when it is clicked."""
    chosen: bool = False
    hollow: bool = False
    """Of less evidence than the others, such as of fewer prompts."""


def marks_svg(
    marks: Sequence[Mark],
    *,
    alt: str,
    xlabel: str,
    ylabel: str,
    lines: bool = False,
    front: Sequence[tuple[float, float]] = (),
    band: Sequence[tuple[float, float, float]] = (),
    caption: str = "",
) -> Html:
    """A chart of marks by series, with a legend where there are several; marks that are not finite are left out.

    Args:
        alt: what is seen, for those who do not see it.
        lines: join the marks of a series, in the order of x.
        front: points of a line that is drawn over all.
        band: an area below all, as (x, low, high) in the order of x.
        caption: what is said above the chart, such as n.
    """
    marks = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    if not marks:
        return Html('<p class="soft">No values to draw.</p>')
    xs, ys = (
        _Scale([*(m.x for m in marks), *(x for x, _, _ in band)], _LEFT, _WIDTH - _RIGHT),
        _Scale(
            [*(m.y for m in marks), *(y for _, *ends in band for y in ends)],
            _HEIGHT - _BOTTOM,
            _TOP,
        ),
    )
    names = list(dict.fromkeys(mark.series for mark in marks))
    parts = [_axes(xs, ys, xlabel, ylabel)]
    if band:
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(_line(edge, xs, ys, "band", shape="polygon"))
    if lines:
        for i, name in enumerate(names):
            row = sorted((m.x, m.y) for m in marks if m.series == name)
            parts.append(_line(row, xs, ys, f"s{i % _N_STYLES}"))
    if front:
        parts.append(_line(front, xs, ys, "front"))
    for mark in marks:
        style = f"m s{names.index(mark.series) % _N_STYLES}"
        style += " chosen" * mark.chosen + " hollow" * mark.hollow
        key = f' data-key="{html_of(mark.key)}"' if mark.key else ""
        radius = 6.5 if mark.chosen else 3.6
        parts.append(
            f'<circle class="{style}"{key} cx="{xs(mark.x):.1f}" cy="{ys(mark.y):.1f}" r="{radius}">'
            f"<title>{html_of(mark.text)}</title></circle>"
        )
    legend = "".join(
        f'<span><i class="dot s{i % _N_STYLES}"></i>{html_of(name)}</span>'
        for i, name in enumerate(names)
    )
    return Html(
        f'<div class="chart"><p class="legend">{html_of(caption)} {legend if len(names) > 1 else ""}</p>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html_of(alt)}">{"".join(parts)}</svg></div>'
    )


def heat_svg(
    values: Sequence[Sequence[float]], names: Sequence[str], *, alt: str, caption: str = ""
) -> Html:
    """A square of values from -1 to 1, such as cosines; each cell says its pair and its value."""
    n = len(names)
    side = 560 / max(n, 1)
    cells = [
        f'<rect class="{"pos" if value >= 0 else "neg"}" x="{_LEFT + j * side:.2f}" y="{i * side:.2f}" '
        f'width="{side:.2f}" height="{side:.2f}" fill-opacity="{min(abs(value), 1):.2f}">'
        f"<title>{html_of(names[i])} and {html_of(names[j])}: {value:.3f}</title></rect>"
        for i, row in enumerate(values)
        for j, value in enumerate(row)
    ]
    every = max(1, -(-n // 16))
    labels = [
        f'<text x="{_LEFT - 5}" y="{(i + 0.5) * side + 4:.1f}" text-anchor="end">{html_of(names[i])}</text>'
        for i in range(0, n, every)
    ]
    return Html(
        f'<div class="chart"><p class="legend">{html_of(caption)} <span><i class="dot s0"></i>1</span> '
        f'<span><i class="dot s1"></i>-1</span></p><svg viewBox="0 0 {_LEFT + 564} 564" role="img" '
        f'aria-label="{html_of(alt)}">'
        f"{''.join(cells)}{''.join(labels)}</svg></div>"
    )


class _Scale:
    """From values to places on the page, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        margin = 0.04 * (high - low)
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end
        step = 10 ** math.floor(math.log10((high - low) / 5))
        step = next(k * step for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 8)
        if all(float(value).is_integer() for value in values):  # counts and layers have no halves
            step = max(step, 1.0)
        first = math.ceil(self.low / step)
        self.ticks = [i * step for i in range(first, math.floor(self.high / step) + 1)]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _line(
    points: Sequence[tuple[float, float]],
    xs: _Scale,
    ys: _Scale,
    style: str,
    *,
    shape: str = "polyline",
) -> str:
    joined = " ".join(f"{xs(x):.1f},{ys(y):.1f}" for x, y in points)
    return f'<{shape} class="line {style}" points="{joined}"/>'


def _axes(xs: _Scale, ys: _Scale, xlabel: str, ylabel: str) -> str:
    floor = _HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{ys(t):.1f}" y2="{ys(t):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{ys(t) + 4:.1f}" text-anchor="end">{t:.4g}</text>'
        for t in ys.ticks
    ]
    parts += [
        f'<text x="{xs(t):.1f}" y="{floor + 19}" text-anchor="middle">{t:.4g}</text>'
        for t in xs.ticks
    ]
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{html_of(xlabel)}</text>'
    )
    middle = (_TOP + floor) / 2
    parts.append(
        f'<text transform="rotate(-90 18 {middle:.0f})" x="18" y="{middle:.0f}" text-anchor="middle">{html_of(ylabel)}</text>'
    )
    return "".join(parts)
