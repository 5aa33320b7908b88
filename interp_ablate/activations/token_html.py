"""A text coloured by its tokens' projections, as HTML that needs no script and no other file.

Knows: colours, marks of a token's part, the panel of every layer's value. Does not know: how a projection is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Float
from torch import Tensor

from interp_ablate.display import Html, html_of

if TYPE_CHECKING:
    from interp_ablate.directions.direction import Direction
    from interp_ablate.sites import Point, Site

# Okabe and Ito's vermilion and blue, told apart with any colour vision; at most this opaque, so that the text on
# them keeps a contrast above 4.5 in black on white and in white on black.
_POSITIVE, _NEGATIVE, _OPAQUE = "213 94 0", "0 114 178", 0.62
_STYLE = """
.ia-tokens{color-scheme:light dark;font:15px/1.9 system-ui,sans-serif;max-width:62rem}
.ia-tokens p{font-size:.85em;line-height:1.4;margin:.4em 0}
.ia-tokens input{position:absolute;opacity:0;width:1px;height:1px}
.ia-tokens label{display:inline-block;min-width:1.5em;padding:.05em .3em;text-align:center;border:1px solid
 #8888;border-radius:.3em;margin:0 .15em .2em 0;font-size:.8em;line-height:1.5;cursor:pointer}
.ia-tokens .text{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace}
.ia-tokens .t{position:relative;unicode-bidi:isolate;border-radius:.2em;padding:.12em 0;cursor:default}
.ia-tokens .template{font-style:italic;border-bottom:1px dotted}
.ia-tokens .thought{border-bottom:2px dotted}
.ia-tokens .response{border-bottom:2px solid}
.ia-tokens .t:focus,.ia-tokens .t:hover{outline:2px solid;z-index:3}
.ia-tokens .all{display:none;position:fixed;inset:auto 0 0 0;z-index:4;columns:9em;column-gap:1em;
 white-space:nowrap;font:12px/1.45 ui-monospace,monospace;font-style:normal;padding:.5em .9em;
 border-top:1px solid #888;background:Canvas;color:CanvasText}
.ia-tokens .all b{display:block;column-span:all;font-weight:600;white-space:normal}
.ia-tokens .t:hover>.all,.ia-tokens .t:focus>.all{display:block}
"""


class _Token(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def part(self) -> str: ...


class _Projections(Protocol):
    """The part of `TokenProjections` that is shown."""

    @property
    def values(self) -> Float[Tensor, "token direction"]: ...
    @property
    def tokens(self) -> Sequence[_Token]: ...
    @property
    def directions(self) -> Sequence[Direction]: ...
    @property
    def sites(self) -> Sequence[Site]: ...
    @property
    def layers(self) -> Sequence[int]: ...
    def one_per_layer(self, point: Point | None = None) -> _Projections: ...


def layer_shares(values: Float[np.ndarray, "token layer"]) -> Float[np.ndarray, "token layer"]:
    """Each layer's projections around their median over the tokens, 1 or -1 at the 98th percentile.

    What all tokens have in common at a layer says nothing about any of them, and the stream grows with depth.
    The first token is left out of both numbers where there are others: the stream there is often many times
    longer than anywhere else.
    """
    rest = values[1:] if len(values) > 1 else values
    centres = np.median(rest, axis=0)
    limits = np.quantile(np.abs(rest - centres), 0.98, axis=0)
    return (values - centres) / np.where(limits > 0, limits, 1.0)


def tokens_html(
    projections: _Projections, *, point: Point | None = None, layer: int | None = None
) -> Html:
    """The text, each token on a ground coloured by its projection at one layer; a fragment of a page.

    The row of numbers chooses the layer (arrow keys move along it). The pointer or the Tab key on a token
    shows its projections at every layer. Orange is above the layer's median over the tokens and blue below,
    each layer on a scale of its own (`layer_shares`). Template tokens are slanted with dots below, the response has a line
    below, a thought a thick dotted one.

    Args:
        point: one direction a layer at this point; see `TokenProjections.one_per_layer`.
        layer: shown first; default: the one two thirds of the way up.
    """
    shown = projections.one_per_layer(point)
    values = shown.values.cpu().numpy()
    shares, layers = layer_shares(values), list(shown.layers)
    first = layers.index(layer) if layer in layers else len(layers) * 2 // 3
    key = hashlib.sha256(values.tobytes() + repr(shown.tokens).encode()).hexdigest()[:8]
    radios = "".join(
        f'<input type="radio" name="ia-{key}" id="ia-{key}-{k}"{" checked" if k == first else ""}>'
        f'<label for="ia-{key}-{k}">{name}</label>'
        for k, name in enumerate(layers)
    )
    rules = "".join(
        f"#ia-{key}-{k}:checked~.text .t{{background:var(--c{k})}}"
        f"#ia-{key}-{k}:checked+label,#ia-{key}-{k}:focus-visible+label{{outline:2px solid;font-weight:700}}"
        for k in range(len(layers))
    )
    spans = "".join(
        _token(i, token, values[i], shares[i], layers) for i, token in enumerate(shown.tokens)
    )
    site, direction = shown.sites[0], shown.directions[0]
    about = (
        f"Projection of each of {len(shown.tokens)} tokens at {site.point} on {direction.method}, read at "
        f"position {direction.position}. Orange: above the layer's median; blue: below; full colour at its 98th "
        "percentile. Slanted: the template's tokens; underlined: the response; dotted: a thought before it. Hover over a token, or move to "
        "it with Tab, for every layer."
    )
    return Html(
        f'<div class="ia-tokens"><style>{_STYLE}{rules}</style><p>{html_of(about)}</p>'
        f'<div role="group" aria-label="layer whose projections colour the text">layer {radios}'
        f'<div class="text">{spans}</div></div></div>'
    )


def tokens_page(projections: _Projections, *, title: str, point: Point | None = None) -> str:
    """`tokens_html` as a whole page that works from a file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html_of(title)}</title><style>:root{{color-scheme:light dark}}body{{margin:1.2rem}}"
        f"</style></head><body><main><h1>{html_of(title)}</h1>{tokens_html(projections, point=point)}"
        "</main></body></html>\n"
    )


def _token(
    index: int,
    token: _Token,
    values: Float[np.ndarray, " layer"],
    shares: Float[np.ndarray, " layer"],
    layers: Sequence[int],
) -> str:
    colours = ";".join(f"--c{k}:{_colour(share)}" for k, share in enumerate(shares))
    lines = "<br>".join(f"{layer:>2} {value:+.3f}" for layer, value in zip(layers, values))
    name = f"{token.text!r}, token {index} (id {token.id}), {token.part}"
    text = html_of(token.text.replace("\n", "↵\n")) if token.text else "⋯"
    return (
        f'<span class="t {token.part}" tabindex="0" style="{colours}">{text}'
        f'<span class="all" role="tooltip"><b>{html_of(name)}</b>{lines}</span></span>'
    )


def _colour(share: float) -> str:
    """The ground of a projection, from -1 to 1 and beyond."""
    hue = _POSITIVE if share > 0 else _NEGATIVE
    return f"rgb({hue}/{min(abs(share), 1) * _OPAQUE:.2f})"
