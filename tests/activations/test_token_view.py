"""Projections token by token: TransformerLens' own cache, the template's tokens, text that is whole and escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from tiny import D_MODEL, N_LAYERS, forward, make_tokenizer, shared, tiny, unit
from torch import Tensor

from interp_ablate import (
    Ablate,
    Direction,
    Directions,
    Plan,
    Prompt,
    Site,
    sites_of,
    token_projections,
)
from interp_ablate.activations.token_html import layer_shares, tokens_html, tokens_page
from interp_ablate.activations.token_rows import token_pieces
from interp_ablate.activations.token_view import TokenProjections
from interp_ablate.errors import DirectionError, InterpAblateError
from interp_ablate.models.load import from_hf
from interp_ablate.sites import RESIDUAL_POINTS

CHAT = [
    {"role": "system", "content": "user"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "<b>Oui & non</b>"},
    {"role": "user", "content": "日本\nsystem"},
]


def directions() -> Directions:
    sites = sites_of(RESIDUAL_POINTS, range(N_LAYERS))
    return Directions(tuple(Direction(unit(k), 1.0, site) for k, site in enumerate(sites)))


def texts_of(found: TokenProjections, part: str) -> str:
    return "".join(token.text for token in found.tokens if token.part == part)


def test_every_token_equals_run_with_cache(kind: str, backend: str) -> None:
    model = shared(kind, backend)
    found = token_projections(model, CHAT, directions(), max_new_tokens=5)
    row = [token.id for token in found.tokens]
    start = model.encode(Prompt.from_messages(CHAT))
    answer = list(model.generate([Prompt.from_messages(CHAT)], max_new_tokens=5)[0].tokens)
    assert row == start + answer and answer
    assert [token.part for token in found.tokens[len(start) :]] == ["response"] * len(answer)
    _, cache = model.tl.run_with_cache(torch.tensor([row]))
    for k, item in enumerate(directions()):
        if backend == "bridge" and item.site.point == "resid_mid":
            continue  # an alias of the MLP norm's input, which `forward` below checks
        want = cache[str(item.site)][0].double() @ item.vector
        torch.testing.assert_close(found.values[:, k], want, atol=2e-5, rtol=0)
    seen: dict[Site, Tensor] = {}
    forward(tiny(kind)[0], row, lambda site, x: seen.setdefault(site, x))
    want = torch.stack([seen[d.site][0].double() @ d.vector for d in directions()], 1)
    torch.testing.assert_close(found.values, want, atol=2e-5, rtol=0)


def test_under_a_plan_the_edited_stream_is_read(backend: str) -> None:
    model, vector = shared(backend=backend), unit()
    direction = Direction(vector, 1.0, Site(0, "embed"))
    sites = sites_of(("resid_post",), range(N_LAYERS))
    before = token_projections(model, "Hi there", direction, sites=sites)
    with model.applied(Plan(Ablate(direction, model.writers))):
        after = token_projections(model, "Hi there", direction, sites=sites)
    assert before.sites == sites and before.values.abs().max() > 0.1
    assert after.values.abs().max() < 1e-5


def test_the_templates_tokens_are_told_from_the_messages() -> None:
    """Also where a message says what the template says."""
    found = token_projections(shared(), CHAT, directions(), response="user")
    assert texts_of(found, "prompt") == "userassistant<b>Oui & non</b>日本\nsystem"
    rest = texts_of(found, "template")
    assert rest == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts_of(found, "response") == "user"
    ended = token_projections(
        shared(), [*CHAT, {"role": "assistant", "content": "user"}], directions()
    )
    assert ended.tokens == found.tokens and torch.equal(ended.values, found.values)


def test_raw_text_and_token_ids_have_no_template() -> None:
    plain = from_hf(tiny()[0], make_tokenizer(None))
    found = token_projections(plain, "Hi you", directions())
    assert texts_of(found, "prompt") == "Hi you" and not texts_of(found, "template")
    system = token_projections(plain, Prompt("Hi you", "Be kind."), directions())
    assert texts_of(system, "prompt") == "Be kind.Hi you"
    row = shared().encode("Hi")
    parts = [token.part for token in token_projections(shared(), row, directions()).tokens]
    assert [i for i, part in zip(row, parts) if part == "template"] == [i for i in row if i < 3]


class SpaceEater:
    """Decodes as SentencePiece does: the first space of a text goes."""

    words = ("▁Hello", "▁", "▁big", "ger", "▁world")

    def __call__(self, ids: Any) -> str:
        return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


def test_pieces_are_the_whole_text() -> None:
    decode = make_tokenizer().decode
    ids = make_tokenizer()("a日🙂\n  é", add_special_tokens=False)["input_ids"]
    pieces = token_pieces(ids, decode)
    assert "".join(pieces) == "a日🙂\n  é" and pieces[:4] == ["a", "", "", "日"]
    assert len(pieces) == len(ids)
    assert token_pieces(range(5), SpaceEater()) == ["Hello", " ", " big", "ger", " world"]
    cut = token_pieces(ids[:2], decode)
    assert cut == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_what_cannot_be_projected_is_refused_in_words() -> None:
    model = shared()
    for wrong in ((), Direction(torch.ones(D_MODEL + 1), 1.0, Site(0, "embed"))):
        with pytest.raises(DirectionError, match=f"d_model {D_MODEL}"):
            token_projections(model, "Hi", wrong)
    with pytest.raises(DirectionError, match="sites are for one direction"):
        token_projections(model, "Hi", directions(), sites="0.embed")
    with pytest.raises(InterpAblateError, match="max_new_tokens"):
        token_projections(model, "Hi", directions(), response="so", max_new_tokens=3)
    with pytest.raises(InterpAblateError, match=f"{N_LAYERS}"):
        token_projections(model, "Hi", Direction(unit(), 1.0, Site(N_LAYERS, "resid_pre")))
    with pytest.raises(InterpAblateError, match="no direction at mlp_out"):
        token_projections(model, "Hi", directions()).one_per_layer("mlp_out")


def test_the_frame_is_tidy_and_one_direction_a_layer_is_shown() -> None:
    found = token_projections(shared(), "Hi", directions())
    frame = found.to_frame()
    assert len(frame) == found.values.numel()
    assert torch.equal(
        torch.tensor(frame["projection"].to_numpy()).view_as(found.values), found.values
    )
    shown = found.one_per_layer()
    assert shown.layers == (0, 1, 2) and {site.point for site in shown.sites} == {"resid_post"}
    assert torch.equal(shown.values, found.values[:, 2::3])


class Reader(HTMLParser):
    """The text of the tokens, without their panels, and every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag not in ("br", "input", "meta"):
            self.open.append(str(values.get("class") or tag))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "text" in self.open and "all" not in self.open:
            self.text += data


def test_the_page_is_whole_escaped_and_reached_by_keys() -> None:
    text = "<script>alert('&')</script>\N{RIGHT-TO-LEFT OVERRIDE}\x07"
    found = token_projections(shared(), text, directions(), response="ok")
    page = tokens_page(found, title="<i>")
    read = Reader(page)
    tags = [tag for tag, _ in read.tags]
    assert "script" not in tags and "link" not in tags and "img" not in tags and "i" not in tags
    assert not re.search(r"https?:|url\(|@import", page)
    assert text.replace("\x07", "\u2407") in read.text.replace("⋯", "")
    tokens = [values for _, values in read.tags if str(values.get("class")).startswith("t ")]
    assert len(tokens) == len(found.tokens)
    assert all(values["tabindex"] == "0" for values in tokens)
    assert [str(values["class"])[2:] for values in tokens] == [t.part for t in found.tokens]
    radios = [values for tag, values in read.tags if tag == "input"]
    assert len(radios) == N_LAYERS and sum("checked" in values for values in radios) == 1
    labelled = {values["for"] for tag, values in read.tags if tag == "label"}
    assert labelled == {values["id"] for values in radios}
    for value in found.one_per_layer().values[3]:
        assert f"{value:+.3f}" in page
    again, other = tokens_html(found), token_projections(shared(), text, directions())
    ids = [set(re.findall(r'id="(ia-[^"]+)"', each)) for each in (again, tokens_html(other))]
    assert not ids[0] & ids[1]  # two views on one page do not share their buttons


def test_colours_stand_for_what_sets_a_token_apart() -> None:
    values = torch.tensor([[90.0], [3.0], [5.0], [4.0]]).numpy()
    shares = layer_shares(values)[:, 0]
    assert shares[3] == 0 and shares[1] == pytest.approx(-shares[2]) and shares[0] > 50
    assert (layer_shares(values[:1]) == 0).all() and (layer_shares(values[1:2]) == 0).all()
