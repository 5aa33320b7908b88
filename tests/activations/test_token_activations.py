"""Activations of every token: TransformerLens' own cache and plain hidden states, one prompt at a time; files; pooling."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import D_MODEL, N_LAYERS, make, make_tokenizer, shared, tiny, unit

from interp_ablate import (
    Ablate,
    ContrastSet,
    Direction,
    Site,
    collect,
    estimate_directions,
    project,
    sites_of,
    token_projections,
)
from interp_ablate.activations.collection import collect_moments
from interp_ablate.activations.token_activations import TokenActivations
from interp_ablate.activations.token_shards import Shards, ShardWriter
from interp_ablate.directions.estimators import comparison, estimate_with
from interp_ablate.errors import DirectionError, InterpAblateError, ModelError
from interp_ablate.models.load import from_hf
from interp_ablate.plots.directions import projections
from interp_ablate.sites import RESIDUAL_POINTS

TOLERANCE = 2e-5  # fp32
TEXTS = ("Hi", "What is a river?", "Name two colours of the sky", "日本", "Go")
RESPONSES = ("Hello there", "Water", "Blue, and red", "é", "Where?")
SITES = sites_of(("resid_pre", "resid_post"), range(N_LAYERS))
END = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


def rows() -> list[list[int]]:
    return [shared().encode(text) for text in TEXTS]


def answered() -> list[list[int]]:
    tokenizer = make_tokenizer()
    ends = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in RESPONSES]
    return [row + end for row, end in zip(rows(), ends)]


def same(one: Any, other: Any) -> None:
    """Both hold the same values, to the bit, of the same tokens."""
    assert (one.sites, one.tokens, one.indices) == (other.sites, other.tokens, other.indices)
    assert one.prompts == other.prompts and one.label_names == other.label_names
    for site in one.sites:
        assert all(map(torch.equal, one.at(site), other.at(site)))


# --------------------------------------------------------------------------------- values


@pytest.mark.parametrize("batch_size", (1, 3, None))
def test_every_token_equals_run_with_cache_alone(
    kind: str, backend: str, batch_size: int | None
) -> None:
    model = shared(kind, backend)
    found = collect(model, TEXTS, positions="all", responses=RESPONSES, batch_size=batch_size)
    assert found.sites == sites_of(RESIDUAL_POINTS, range(N_LAYERS)) and found.folder is None
    for i, row in enumerate(answered()):
        assert [token.id for token in found.tokens[i]] == row
        assert found.indices[i] == tuple(range(len(row)))
        _, cache = model.tl.run_with_cache(torch.tensor([row]))
        hidden = tiny(kind)[0](torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in range(N_LAYERS):
            for point in ("resid_pre", "resid_post"):
                site = Site(layer, point)  # type: ignore[arg-type]
                got = found.at(site)[i]
                torch.testing.assert_close(got, cache[str(site)][0], atol=TOLERANCE, rtol=0)
            got = found.at(Site(layer, "resid_pre"))[i]
            torch.testing.assert_close(got, hidden[layer][0], atol=TOLERANCE, rtol=0)


def test_the_hugging_face_backend_in_half_precision() -> None:
    hf, tokenizer = tiny()
    half = copy.deepcopy(hf).to(torch.bfloat16)
    found = collect(
        from_hf(half, tokenizer, backend="hf"), TEXTS, SITES, positions="all", batch_size=4
    )
    for i, row in enumerate(rows()):
        hidden = half(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in range(N_LAYERS):
            got = found.at(Site(layer, "resid_pre"))[i]
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, hidden[layer][0], atol=0.05, rtol=0.05)
    direction = Direction(unit(), 2.0, SITES[3])
    frame = project(found, direction, unit="norm")
    want = torch.cat(found.at(SITES[3])).double() @ unit() / 2
    np.testing.assert_allclose(frame["projection"], want.numpy(), rtol=1e-12)
    assert found.mean().values.dtype == torch.bfloat16


def test_chosen_tokens_are_those_of_all(backend: str) -> None:
    model = shared(backend=backend)
    every = collect(model, TEXTS, SITES, positions="all", responses=RESPONSES)
    lengths, prompts = list(map(len, answered())), list(map(len, rows()))
    rng = random.Random(0)
    masks = [[rng.random() < 0.4 for _ in range(n)] for n in lengths]
    wanted: list[tuple[Any, list[list[int]]]] = [
        ("prompt", [list(range(n)) for n in prompts]),
        ("response", [list(range(k, n)) for k, n in zip(prompts, lengths)]),
        (masks, [[i for i, keep in enumerate(mask) if keep] for mask in masks]),
        ([torch.tensor(mask) for mask in masks], [[i for i, k in enumerate(m) if k] for m in masks]),
        ([[-1, 0], [2], [3, -4], [-2], [5]], [[0, lengths[0] - 1], [2], [3, lengths[2] - 4], [lengths[3] - 2], [5]]),
        (np.array([[1, -1]] * 5), [[1, n - 1] for n in lengths]),
        (
            lambda token: token.part == "prompt",
            [[i for i, t in enumerate(row) if t.part == "prompt"] for row in every.tokens],
        ),
    ]  # fmt: skip
    for positions, places in wanted:
        found = collect(model, TEXTS, SITES, positions=positions, responses=RESPONSES, batch_size=2)
        assert list(map(list, found.indices)) == places
        for site in SITES:
            for got, all_tokens, at in zip(found.at(site), every.at(site), places):
                torch.testing.assert_close(got, all_tokens[at], atol=TOLERANCE, rtol=0)
    assert "".join(t.text for t in found.tokens[3]) == TEXTS[3]


def test_positions_of_the_last_token_and_from_the_start() -> None:
    """One position that all prompts have keeps one tensor, and is the same token."""
    model = shared()
    every = collect(model, TEXTS, SITES, positions="all")
    some = collect(model, TEXTS, SITES, positions=(3, -1, 0, -18), batch_size=2)
    assert some.positions == ("3", "-1", "0", "-18")
    for site in SITES:
        for k, position in enumerate((3, -1, 0, -18)):
            want = torch.stack([x[position] for x in every.at(site)])
            got = some.at(site, position)
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
            assert some.tokens[0][k] == every.tokens[0][position].text
    beside = collect(
        model, TEXTS, SITES, positions=(2, "response_mean", -2), responses=RESPONSES, batch_size=3
    )
    for k, position in ((0, 2), (2, -2)):
        want = torch.stack([x[position] for x in every.at(SITES[4])])
        torch.testing.assert_close(
            beside.values[:, k, SITES.index(SITES[4])], want, atol=TOLERANCE, rtol=0
        )


def test_under_plans_the_edited_stream_is_kept() -> None:
    model = shared()
    plan = Ablate(unit(), model.writers)
    with model.applied(plan):
        found = collect(model, TEXTS, SITES, positions="all")
    assert max(float((x.double() @ unit()).abs().max()) for x in found.at(SITES[-1])) < 1e-5
    plain = collect(model, TEXTS, SITES, positions="all")
    with model.applied_each([None, plan, None, plan, None]):
        each = collect(model, TEXTS, SITES, positions="all", batch_size=2)
    for i, got in enumerate(each.at(SITES[-1])):
        want = (found if i in (1, 3) else plain).at(SITES[-1])[i]
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_an_answer_at_the_end_of_a_chat_is_its_response() -> None:
    found = collect(shared(), [END], SITES, positions="all")
    given = collect(shared(), [END[:1]], SITES, positions="all", responses=["Hello there"])
    same(found, given)
    view = token_projections(shared(), END, Direction(unit(), 1.0, SITES[2]))
    assert view.tokens == found.tokens[0]
    frame = project(found, view.directions)
    np.testing.assert_allclose(frame["projection"], view.values[:, 0].numpy(), atol=TOLERANCE)
    means = collect(shared(), [END], SITES, "response_mean")
    assert torch.equal(means.values, found.mean("response").values)
    with pytest.raises(InterpAblateError, match="1 of 2 prompts are chats that end with an answer"):
        collect(shared(), [END, "Hi"], positions="all")
    with pytest.raises(InterpAblateError, match="leave one out"):
        collect(shared(), [END], positions="all", responses=["So"])


def test_the_models_own_responses() -> None:
    model = shared()
    own = [list(g.tokens) for g in model.generate(list(TEXTS), max_new_tokens=32)]
    found = collect(model, TEXTS, SITES, positions="response")
    assert [[token.id for token in row] for row in found.tokens] == own
    assert {token.part for row in found.tokens for token in row} == {"response"}


# --------------------------------------------------------------------------------- what is made of them


def test_means_are_those_of_collect() -> None:
    model = shared()
    contrast = ContrastSet.from_texts(TEXTS[:2], TEXTS[2:])
    found = collect(model, contrast, positions="all", responses=RESPONSES)
    means = found.mean("response")
    want = collect(model, contrast, positions="response_mean", responses=RESPONSES)
    assert means.positions == want.positions == ("response_mean",)
    torch.testing.assert_close(means.values, want.values, atol=TOLERANCE, rtol=0)
    assert means.prompts == want.prompts and means.label_names == want.label_names
    assert estimate_directions(means).items[0].position == "response_mean"
    site = found.sites[4]
    for over, name, places in (
        ("all", "all_mean", [list(range(len(row))) for row in found.tokens]),
        ("prompt", "prompt_mean", [list(range(len(row))) for row in rows()]),
        (lambda token: token.part == "template", "mean", None),
        ([[0, -1]] * 5, "mean", [[0, -1]] * 5),
    ):
        got = found.mean(over)  # type: ignore[arg-type]
        at = places or [
            [i for i, t in enumerate(row) if t.part == "template"] for row in found.tokens
        ]
        stacked = [x[p].double().mean(0).float() for x, p in zip(found.at(site), at)]
        assert got.positions == (name,) and torch.equal(got.at(site, name), torch.stack(stacked))
    with pytest.raises(InterpAblateError, match=r"no token to average in prompts \[0, 1"):
        found.mean(lambda token: token.text == "日")
    with pytest.raises(InterpAblateError, match="'all', 'prompt', 'response'"):
        found.mean("template")  # type: ignore[arg-type]


def test_estimators_say_which_positions_they_take() -> None:
    contrast = ContrastSet.from_texts(["One", "Two more"], ["Three", "Four of them"])
    found: Any = collect(shared(), contrast, SITES, positions="all")
    for estimate in (
        lambda: estimate_directions(found),
        lambda: estimate_directions(found.mean(), found),
        lambda: estimate_with("pca", found),
        lambda: comparison(found, found, SITES[0]),
    ):
        with pytest.raises(DirectionError, match=r"activations.mean\('response'\).*such as -1"):
            estimate()


def test_tables_have_a_row_a_token() -> None:
    contrast = ContrastSet.from_texts(["One", "Two more"], ["Three"])
    found = collect(shared(), contrast, SITES, positions="all", responses=["a", "b c", "d"])
    directions = [Direction(unit(k), 1.0, site) for k, site in enumerate(SITES[:2])]
    frame = project(found, directions)
    assert list(frame.columns) == [
        "layer", "point", "position", "token", "part", "label", "prompt", "projection", "unit",
        "direction",
    ]  # fmt: skip
    n = sum(map(len, found.tokens))
    assert len(frame) == 2 * n
    flat = [token for row in found.tokens for token in row]
    for k, item in enumerate(directions):
        rows_of = frame[k * n : (k + 1) * n]
        want = torch.cat(found.at(item.site)).double() @ item.vector
        np.testing.assert_allclose(rows_of["projection"], want.numpy(), atol=1e-12)
        assert list(rows_of["token"]) == [token.text for token in flat]
        assert list(rows_of["part"]) == [token.part for token in flat]
        assert list(rows_of["position"]) == [i for row in found.tokens for i in range(len(row))]
    asked = frame[(frame["part"] == "prompt") & (frame["layer"] == 0)].groupby("prompt")["token"]
    assert dict(asked.sum()) == {each: each * 2 for each in ("One", "Two more", "Three")}
    assert set(frame[frame["prompt"] == "Three"]["label"]) == {"negative"}
    drawn = projections(frame[(frame["part"] == "prompt") & (frame["point"] == "resid_post")])
    counts = [sum(t.part == "prompt" for t in row) for row in found.tokens]
    said = " ".join(" ".join(text.get_text() for text in drawn.texts).split())
    assert f"{counts[0] + counts[1]} positive + {counts[2]} negative tokens a layer" in said
    table = found.to_frame()
    assert table.shape == (len(SITES) * n, D_MODEL)
    one = table.xs((1, "positive", 4, 2, "resid_post"), level=("prompt", "label", "position", "layer", "point"))  # fmt: skip
    np.testing.assert_array_equal(one.to_numpy()[0], found.at("2.resid_post")[1][4].numpy())
    xarray = pytest.importorskip("xarray")
    array = found.to_xarray()
    assert isinstance(array, xarray.DataArray) and array.shape == (n, len(SITES), D_MODEL)
    second = array.sel(site="blocks.2.hook_resid_post")[array.prompt == 1]
    np.testing.assert_array_equal(second.to_numpy(), found.at("2.resid_post")[1].numpy())
    assert "".join(array.text.to_numpy()[array.part == "prompt"]) == "OneTwo moreThree"
    assert "3 prompts" in repr(found) and "template" in found._repr_html_()


# --------------------------------------------------------------------------------- disk


def test_shards_are_small_lazy_and_the_same(tmp_path: Path) -> None:
    contrast = ContrastSet.from_texts(TEXTS[:2], TEXTS[2:])
    memory = collect(shared(), contrast, SITES, positions="all", batch_size=2)
    biggest = max(len(row) for row in memory.tokens) * len(SITES) * D_MODEL * 4
    found = collect(
        shared(), contrast, SITES, positions="all", batch_size=2, cache=Shards(tmp_path, max_bytes=biggest)
    )  # fmt: skip
    same(found, memory)
    assert found.folder is not None and found.folder.parent == tmp_path
    files = sorted(found.folder.glob("shard-*.safetensors"))
    assert len(files) > 2 and max(f.stat().st_size for f in files) < biggest + 4000
    same(TokenActivations.load(found.folder), memory)
    memory.save(tmp_path / "saved", max_bytes=1)
    assert len(list((tmp_path / "saved").glob("shard-*"))) == len(TEXTS)
    same(TokenActivations.load(tmp_path / "saved"), memory)
    found.at(SITES[0])[0].zero_()  # a change in memory is none on disk
    same(TokenActivations.load(found.folder), memory)
    with pytest.raises(InterpAblateError, match="exists: choose another"):
        memory.save(tmp_path / "saved")


def test_the_same_collection_is_read_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    first = collect(model, TEXTS, SITES, positions="all", cache=tmp_path)
    for options in (
        {"positions": "prompt", "responses": RESPONSES},
        {"sites": SITES[:2]},
        {"prompts": TEXTS[:2]},
        {"cache": Shards(tmp_path, dtype="float16")},
    ):
        asked: Any = {"prompts": TEXTS, "sites": SITES, "positions": "all", "cache": tmp_path}
        before = len(list(tmp_path.iterdir()))
        other = collect(model, **{**asked, **options})
        assert len(list(tmp_path.iterdir())) == before + 1
    assert {x.dtype for x in other.at(SITES[0])} == {torch.float16}
    with model.applied(Ablate(unit(), model.writers)):
        assert collect(model, TEXTS, SITES, positions="all", cache=tmp_path).folder != first.folder
    monkeypatch.setattr(model._backend, "forward", lambda *args: pytest.fail("the model was run"))
    same(collect(model, TEXTS, SITES, positions="all", cache=tmp_path), first)


def test_a_killed_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shards = shared(), Shards(tmp_path, max_bytes=1)
    options: dict[str, Any] = {"positions": "all", "batch_size": 1, "cache": shards}
    whole = collect(model, TEXTS, SITES, **{**options, "cache": None})
    flush, done = ShardWriter.flush, []

    def killed(writer: ShardWriter) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(writer._prompts)
        flush(writer)

    monkeypatch.setattr(ShardWriter, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(model, TEXTS, SITES, **options)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    written = sorted(folder.iterdir())
    assert len(written) == 3 and {path.suffix for path in written} == {".safetensors"}
    with pytest.raises(InterpAblateError, match=r"tokens\.json"):
        TokenActivations.load(folder)
    written[0].write_bytes(written[0].read_bytes()[:-9])  # and one of them did not survive
    rows_run: list[int] = []
    found = collect(model, TEXTS, SITES, on_batch=rows_run.append, **options)
    assert rows_run == [2, 1, 1, 1] and found.folder == folder
    same(found, whole)


@pytest.mark.parametrize("damage", ("gone", "cut", "of another", "index"))
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    options: dict[str, Any] = {"positions": "all", "cache": Shards(tmp_path, max_bytes=1)}
    found = collect(shared(), TEXTS, SITES, **options)
    assert found.folder is not None
    shard = min(found.folder.glob("shard-*"))
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "index":
        (found.folder / "tokens.json").write_text("{}")
    else:
        other = collect(shared("qwen3"), TEXTS, SITES, **options).folder
        assert other is not None
        (other / shard.name).replace(shard)
    with pytest.raises(InterpAblateError, match=r"(?i)lacks|corrupt shard"):
        TokenActivations.load(found.folder)
    if damage != "index":
        with pytest.raises(InterpAblateError, match=r"lacks|corrupt shard"):
            collect(shared(), TEXTS, SITES, **options)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InterpAblateError, match="cannot write"):
        collect(shared(), TEXTS, SITES, positions="all", cache=tmp_path / "file")
    found = collect(shared(), TEXTS, SITES, positions="all")
    with pytest.raises(InterpAblateError, match="cannot write"):
        found.save(tmp_path / "file" / "below")
    from safetensors import SafetensorError

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(InterpAblateError, match="No space left"):
        found.save(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_does_not_fit_is_refused_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(model._backend, "forward", lambda *args: pytest.fail("the model was run"))
    monkeypatch.setattr("interp_ablate.activations.token_collection.free_memory", lambda _: 10_000)
    with pytest.raises(InterpAblateError, match=r"GB of memory are free: give cache=FOLDER"):
        collect(model, TEXTS, positions="all")


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (["all"], "positions='all' alone"),
        (["response", -1], "positions='response' alone"),
        ([[0]], "for 1 prompts, and there are 5"),
        ([[True, False]] * 5, r"prompt 0 has \d+ tokens, .* give \d+ bools, or indices"),
        ([[0, 0]] * 5, "none of them twice"),
        ([[10**6]] * 5, "indices from"),
        ([["all"]] * 5, "indices from"),
        ([[]] * 5, "none of .* tokens is chosen"),
        ([True, False], "unknown position True"),
        (lambda token: False, "none of .* tokens is chosen"),
    ],
)
def test_positions_that_choose_nothing(positions: Any, message: str) -> None:
    with pytest.raises(InterpAblateError, match=message):
        collect(shared(), TEXTS, positions=positions)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(InterpAblateError, match="moments are of positions that every prompt has"):
        collect_moments(shared(), TEXTS, positions="all")
    with pytest.raises(InterpAblateError, match="1 responses for 5 prompts"):
        collect(shared(), TEXTS, positions="all", responses=["a"])
    with pytest.raises(InterpAblateError, match="cache=FOLDER"):
        collect(shared(), TEXTS, cache=Shards(tmp_path))  # type: ignore[call-overload]
    with pytest.raises(InterpAblateError, match="accepted are the dtypes float32"):
        Shards(tmp_path, dtype="int8")  # type: ignore[arg-type]
    found = collect(shared(), TEXTS, SITES, positions="all")
    with pytest.raises(InterpAblateError, match=r"no activations at .*collected were 6 sites"):
        found.at("0.mlp_out")
    with pytest.raises(InterpAblateError, match=r"tokens\.json"):
        TokenActivations.load(tmp_path)


def test_nan_names_the_token() -> None:
    model = make()
    with torch.no_grad():
        model.tl.original_model.model.embed_tokens.weight[model.encode("Hi")[-1]] = float("nan")
    with pytest.raises(
        ModelError, match=r"NaN or infinity .*resid_pre, first for prompt \d, token \d"
    ):
        collect(model, TEXTS, SITES, positions="all")
