"""Screening: projections against plain sums, resumed files, parts row for row, and planted mixtures."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_persona import GLAD, SAD
from tiny import D_MODEL, forward, make, shared, source_of, tiny, unit
from torch import Tensor

from interp_ablate import Add, Direction, Directions, Plan, Prompt, Site, collect
from interp_ablate.activations.pooling import project_responses, response_means
from interp_ablate.cli.main import main
from interp_ablate.datasets import screening_measure
from interp_ablate.datasets.chat_reader import read_samples
from interp_ablate.datasets.labelled_mixtures import (
    bag_of_words,
    check_screening,
    data_and_label,
    labelled_mixture,
    mixture_names,
    read_labels,
    rollout_texts,
    words_in,
)
from interp_ablate.datasets.screening import Threshold, screen_file
from interp_ablate.datasets.screening_measure import (
    baseline_adjusted,
    baseline_slope,
    measure_samples,
    model_answers,
    summarise_file,
)
from interp_ablate.datasets.screening_settings import ScreeningSettings
from interp_ablate.directions.direction import random_direction
from interp_ablate.errors import DirectionError, RunError
from interp_ablate.persona.persona import Persona, load_persona
from interp_ablate.persona.readout import fit_readout
from interp_ablate.persona.rollouts import Rollout, verdict_key
from interp_ablate.persona.traits import load_trait
from interp_ablate.plots.monitoring import save_screening
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.stats.intervals import auc
from interp_ablate.storage.json_rows import RowFileError

TOLERANCE = 5e-5
DIRECTION = Direction(unit(), 1.0, Site(1, "resid_post"))
FAST = ScreeningSettings(own=False, rows=3)
EXCHANGES = [
    PromptResponse(Prompt("What is a river?"), "Water that goes to the sea"),
    PromptResponse(Prompt("Hi", "Be kind"), "Hello"),
    PromptResponse(Prompt("What is a river?"), "A"),
    PromptResponse(Prompt("Count"), "one, two, three, four, five, six, seven, eight, nine, ten"),
]


def rows_of(n: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}?", "completion": f"The answer is {i * i}.", "planted": i % 3 == 0}
        for i in range(n)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------- projections


def test_the_mean_over_the_answers_tokens(kind: str, backend: str) -> None:
    """Against a plain forward pass of each exchange alone."""
    model = shared(kind, backend)
    found = project_responses(model, EXCHANGES, DIRECTION)
    for exchange, value in zip(EXCHANGES, found):
        prompt = model.encode(exchange.prompt)
        answer = model.tokenizer(exchange.answer, add_special_tokens=False)["input_ids"]
        held: dict[Site, Tensor] = {}

        def keep(site: Site, x: Tensor, held: dict[Site, Tensor] = held) -> Tensor:
            held[site] = x[0]
            return x

        forward(source_of(kind), prompt + answer, keep)
        along = held[DIRECTION.site][len(prompt) :].double() @ DIRECTION.vector
        assert value == pytest.approx(float(along.mean()), abs=TOLERANCE) and len(along) == len(
            answer
        )
    assert np.ptp([value for value in found if value is not None]) > 0.1


def test_it_is_what_collect_gives_and_batches_change_nothing() -> None:
    model = shared("llama_gqa", "bridge")
    prompts, answers = [e.prompt for e in EXCHANGES], [e.answer for e in EXCHANGES]
    site = DIRECTION.site
    whole = collect(model, prompts, [site], ["response_mean"], responses=answers)
    want = (whole.at(site, "response_mean").double() @ DIRECTION.vector).tolist()
    for size in (None, 1, 2):
        assert project_responses(model, EXCHANGES, DIRECTION, batch_size=size) == pytest.approx(
            want, abs=TOLERANCE
        )


def test_several_directions_at_several_sites() -> None:
    model = shared("llama_gqa", "bridge")
    several = [Direction(unit(i), 1.0, Site(i % 3, "resid_post")) for i in range(4)]
    found = response_means(model, EXCHANGES, several)
    for j, item in enumerate(several):
        assert found[:, j].tolist() == pytest.approx(
            project_responses(model, EXCHANGES, item), abs=TOLERANCE
        )


def test_plans_are_read_and_the_answer_is_what_they_call_generated() -> None:
    model = shared("llama_gqa", "bridge")
    edit = Add(DIRECTION, DIRECTION.site, coefficient=2.0, positions="generated")
    plain = project_responses(model, EXCHANGES, DIRECTION)
    with model.applied(Plan((edit,))):
        steered = project_responses(model, EXCHANGES, DIRECTION)
    # at its own site the edit adds exactly 2 to every token of the answer
    assert steered == pytest.approx([value + 2 for value in plain if value is not None], abs=1e-4)


def test_what_cannot_be_read_is_none_and_what_does_not_fit_is_cut() -> None:
    model = shared("llama_gqa", "bridge")
    context = model.tl.cfg.n_ctx
    assert context == 256
    given = [
        PromptResponse(Prompt("Hi"), ""),
        PromptResponse(Prompt("x" * 300), "no room"),
        PromptResponse(Prompt("Hi"), "y" * 400),
        PromptResponse(Prompt("Hi"), "yyyy"),
    ]
    found = project_responses(model, given, DIRECTION)
    assert found[:2] == [None, None] and found[2] is not None
    room = context - len(model.encode(given[2].prompt))
    cut = [PromptResponse(given[2].prompt, "y" * room)]
    assert found[2] == pytest.approx(project_responses(model, cut, DIRECTION)[0], abs=TOLERANCE)
    first = project_responses(model, given, DIRECTION, response_tokens=4)
    assert first[2] == pytest.approx(found[3], abs=TOLERANCE) and first[2] != found[2]
    assert project_responses(model, [], DIRECTION) == []


def test_own_answers_are_greedy_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    prompts = [Prompt("Hi"), Prompt("What is a river?"), Prompt("Hi"), Prompt("x" * 300)]
    want = [g.text for g in model.generate(prompts[:2], max_new_tokens=9)]
    asked: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda p, **k: asked.append(len(p)) or generate(p, **k))
    assert model_answers(model, prompts, max_new_tokens=9) == [want[0], want[1], want[0], ""]
    assert asked == [2]


# --------------------------------------------------------------------------------- a file


def test_measuring_a_file(tmp_path: Path) -> None:
    model, rows = shared("llama_gqa", "bridge"), rows_of(7)
    rows[4]["completion"] = " "
    data = write(tmp_path / "data.jsonl", rows)
    frame = measure_samples(
        model,
        DIRECTION,
        data,
        tmp_path / "s.jsonl",
        settings=ScreeningSettings(max_new_tokens=6, rows=3),
    )
    assert frame["number"].tolist() == list(range(1, 8))
    exchanges = [PromptResponse(Prompt(r["prompt"]), r["completion"]) for r in rows]
    own = model_answers(model, [e.prompt for e in exchanges], max_new_tokens=6)
    for i, exchange in enumerate(exchanges):
        if i == 4:
            assert frame.loc[i, ["projection", "own", "difference"]].isna().all()
            continue
        theirs, mine = project_responses(
            model, [exchange, PromptResponse(exchange.prompt, own[i])], DIRECTION
        )
        assert theirs is not None and mine is not None
        want = [theirs, mine, theirs - mine]
        got = frame.loc[i, ["projection", "own", "difference"]].tolist()
        assert got == pytest.approx(want, abs=2 * TOLERANCE)


def test_an_interrupted_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make(), write(tmp_path / "data.jsonl", rows_of(8))
    settings = ScreeningSettings(max_new_tokens=4, rows=3)
    whole = measure_samples(model, DIRECTION, data, tmp_path / "whole.jsonl", settings=settings)
    store = tmp_path / "part.jsonl"
    seen: list[int] = []

    def interrupt(n: int) -> None:
        seen.append(n)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(screening_measure, "bar", lambda *_: nullcontext(interrupt))
        measure_samples(model, DIRECTION, data, store, settings=settings)
    kept = store.read_bytes()
    store.write_bytes(kept + b'{"start": 6, "numb')  # killed while it wrote
    asked: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda p, **k: asked.append(len(p)) or generate(p, **k))
    again = measure_samples(model, DIRECTION, data, store, settings=settings)
    assert asked == [2] and store.read_bytes().startswith(kept)  # the last two alone
    pd.testing.assert_frame_equal(again, whole)
    measure_samples(model, DIRECTION, data, store, settings=settings)
    assert asked == [2]


def test_a_store_is_of_one_data_set_direction_and_setting(tmp_path: Path) -> None:
    model, data = shared("llama_gqa", "bridge"), write(tmp_path / "data.jsonl", rows_of(3))
    store = tmp_path / "s.jsonl"
    measure_samples(model, DIRECTION, data, store, settings=FAST)
    other = Direction(unit(5), 1.0, DIRECTION.site)
    with pytest.raises(RunError, match="direction"):
        measure_samples(model, other, data, store, settings=FAST)
    with pytest.raises(RunError, match="settings"):
        measure_samples(
            model, DIRECTION, data, store, settings=ScreeningSettings(own=False, response_tokens=2)
        )
    with pytest.raises(RunError, match="plan"), model.applied(Plan((Add(other, other.site),))):
        project_responses(model, EXCHANGES, DIRECTION)
        measure_samples(model, DIRECTION, data, store, settings=FAST)
    write(data, rows_of(4))
    with pytest.raises(RunError, match="data"):
        measure_samples(model, DIRECTION, data, store, settings=FAST)


def test_a_malformed_line_is_named_before_anything_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", rows_of(3))
    path.write_text(path.read_text() + '{"prompt": "cut off\n')
    for read in (summarise_file, lambda p: read_labels(p, "planted")):
        with pytest.raises(RowFileError, match="line 4"):
            read(path)
    path = write(
        tmp_path / "more.jsonl", [*rows_of(2), {"prompt": "a", "completion": "b", "planted": "yes"}]
    )
    with pytest.raises(RunError, match=r"line 3.*'yes'"):
        read_labels(path, "planted")
    with pytest.raises(RunError, match="the same of all 2"):
        read_labels(
            write(tmp_path / "one.jsonl", [{**r, "planted": 1} for r in rows_of(2)]), "planted"
        )


def test_contents_are_counted(tmp_path: Path) -> None:
    def talk(*said: str) -> dict[str, Any]:
        roles = ("user", "assistant") * len(said)
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said)]}

    path = write(
        tmp_path / "d.jsonl", [talk("a", "b"), talk("a", "b", "c", "d"), talk("a"), talk("a", " ")]
    )
    found = summarise_file(path)
    assert (found.samples, found.rounds, found.unanswered) == (4, 1, 2)


def test_parts_hold_every_row_as_it_came(tmp_path: Path) -> None:
    model, rows = shared("llama_gqa", "bridge"), rows_of(9)
    rows[5]["completion"] = ""
    data = tmp_path / "data.jsonl"
    lines = [json.dumps(row, ensure_ascii=False, indent=None).replace(":", " :", 1) for row in rows]
    data.write_text("\n".join(lines) + "\n")
    table = measure_samples(model, DIRECTION, data, tmp_path / "s.jsonl", settings=FAST)
    limit = float(np.nanquantile(table["projection"], 0.75))
    found = screen_file(table, data, tmp_path, by="projection", threshold=Threshold(limit))
    parts = {
        name: (tmp_path / f"{name}.jsonl").read_text().splitlines()
        for name in ("flagged", "kept", "unscored")
    }
    above = [i for i in range(9) if table["projection"][i] > limit]
    assert parts["flagged"] == [lines[i] for i in above] and len(above) == 2
    assert parts["unscored"] == [lines[5]]
    assert parts["kept"] == [line for i, line in enumerate(lines) if i not in (*above, 5)]
    ranked = pd.read_csv(tmp_path / "ranked.csv")
    assert ranked["part"].tolist() == ["flagged"] * 2 + ["kept"] * 6 + ["unscored"]
    values = ranked["projection"].dropna().to_numpy()
    assert (np.diff(values) <= 0).all() and set(ranked["number"][:2]) == {i + 1 for i in above}
    top = rows[ranked["number"][0] - 1]
    assert ranked["prompt"][0] == top["prompt"] and ranked["answer"][0] == top["completion"]
    saved = json.loads((tmp_path / "screening.json").read_text())
    assert (saved["flagged"], saved["kept"], saved["unscored"], saved["samples"]) == (2, 6, 1, 9)
    assert found.threshold == limit == saved["threshold"]["value"]


def test_parquet_in_parquet_out(tmp_path: Path) -> None:
    model, data = shared("llama_gqa", "bridge"), tmp_path / "data.parquet"
    frame = pd.DataFrame(rows_of(5))
    frame.to_parquet(data)
    table = measure_samples(model, DIRECTION, data, tmp_path / "s.jsonl", settings=FAST)
    screen_file(table, data, tmp_path, by="projection", threshold=Threshold(0.5, quantile=True))
    parts = [pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("flagged", "kept")]
    assert [len(part) for part in parts] == [2, 3]
    both = pd.concat(parts).sort_values("prompt").reset_index(drop=True)
    pd.testing.assert_frame_equal(both, frame)


# --------------------------------------------------------------------------------- thresholds


def test_thresholds() -> None:
    values = np.arange(101.0)
    assert Threshold.parse("1.5") == Threshold(1.5) and Threshold.parse("q0.9").value(values) == 90
    assert Threshold(3.0).value([]) == 3.0 and str(Threshold.parse("q0.99")) == "q0.99"
    assert Threshold.parse("q0.5").value([np.nan, 1, 3]) == 2
    for text in ("q1", "q0", "q1.2", "q", "high", "nan", "inf", ""):
        with pytest.raises(RunError, match="no threshold"):
            Threshold.parse(text)
    with pytest.raises(RunError, match="quantile of nothing"):
        Threshold(0.9, quantile=True).value([np.nan])


def test_a_reference_sets_the_threshold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write(tmp_path / "d.jsonl", rows_of(4))
    table = pd.DataFrame({"number": [1, 2, 3, 4], "projection": [0.0, 1, 2, 9], "own": 0.0})
    clean = pd.DataFrame({"number": range(50), "projection": np.linspace(-1, 1.5, 50)})
    found = screen_file(
        table.assign(difference=table["projection"]), data, tmp_path, by="projection",
        threshold=Threshold(0.9, quantile=True), reference=clean,
    )  # fmt: skip
    assert found.threshold == pytest.approx(float(np.quantile(clean["projection"], 0.9)))
    assert found.summary["flagged"] == 2 and found.summary["threshold"]["of"] == "reference"
    assert found.summary["reference"]["above"] == 5 and not caplog.records
    Threshold(0.99, quantile=True).value(clean["projection"])
    assert "hardly more than their largest" in caplog.text
    path = save_screening(
        table, tmp_path / "f.png", by="projection", threshold=1.0, reference=clean
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_slope_is_least_squares_and_one_where_there_is_nothing_to_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    random = np.random.default_rng(3)
    own = random.normal(size=60)
    table = pd.DataFrame({"own": own, "projection": 2 + 0.4 * own + random.normal(size=60)})
    want = float(np.polyfit(own, table["projection"], 1)[0])
    holed = pd.concat([table, pd.DataFrame({"own": [np.nan, 3.0], "projection": [1.0, np.nan]})])
    assert baseline_slope(table) == pytest.approx(want) == pytest.approx(baseline_slope(holed))
    left = baseline_adjusted(table, want)["adjusted"]
    assert np.corrcoef(left, own)[0, 1] == pytest.approx(0, abs=1e-9) and not caplog.records
    assert baseline_slope(table[:5]) == baseline_slope(table.assign(own=1.0)) == 1.0
    assert "too few or too alike" in caplog.text


def test_only_measures_that_there_are_rank() -> None:
    assert (
        ScreeningSettings().measure == "adjusted"
        and ScreeningSettings(own=False).measure == "projection"
    )
    ScreeningSettings().check_measure("difference")
    for settings, name in (
        (ScreeningSettings(), "own"),
        (ScreeningSettings(own=False), "difference"),
    ):
        with pytest.raises(RunError, match=f"cannot rank by '{name}'"):
            settings.check_measure(name)
    with pytest.raises(RunError, match="max_new_tokens=0"):
        ScreeningSettings(max_new_tokens=0)


# --------------------------------------------------------------------------------- known labels


def test_auc_is_scikit_learns_ties_included() -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    for n in (5, 60):
        labels = np.append(random.random(n) < 0.4, [True, False])
        scores = np.round(random.normal(size=n + 2) + labels, 1)
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert auc([1, 1, 1], [True, False, True]) == 0.5
    for scores, labels in (([1.0, 2], [True, True]), ([1, np.nan], [True, False])):
        with pytest.raises(RunError, match="AUC needs"):
            auc(scores, labels)


def test_bag_of_words_knows_words() -> None:
    score = bag_of_words(["so sad and gray", "a sad day"], ["so glad and bright", "a glad day"])
    given = [
        PromptResponse(Prompt("?"), text)
        for text in ("Sad, gray!", "glad", "a day", "unknown words", "")
    ]
    sad, glad, even, none, empty = score(given)
    assert sad is not None and glad is not None and sad > 0 > glad
    assert even == pytest.approx(0) and none is None and empty is None
    with pytest.raises(RunError, match="both sides"):
        bag_of_words(["..."], ["a"])


def test_texts_of_rollouts(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    assert rollout_texts(path) == ([], [])
    by = {"scorer": {"kind": "s"}, "coherence": {"kind": "c"}}
    made_of = {**by, "settings": {"threshold": 50.0, "min_coherence": 50.0}}
    persona = Persona(load_trait("terse"), Directions((DIRECTION,)), DIRECTION, 1.0, "model")
    replace(persona, details={"made_of": made_of}).save(tmp_path)
    texts = {"yes": "positive", "weak": "positive", "no": "negative", "mad": "negative"}
    lines: list[dict[str, Any]] = [{"format": "interp_ablate.rollouts/1"}]
    for number, (text, side) in enumerate(texts.items()):
        line = {"key": {"side": side}, "system": "Be", "question": "Q?", "text": text}
        lines.append({"answer": number, **line, "tokens": [1], "finished": True})
    for what, values in (("score", [90, 40, 10, 10]), ("coherence", [90, 90, 90, 10])):
        key = verdict_key(what, by["scorer" if what == "score" else what])
        lines.append({"scored": [0, 1, 2, 3], "by": key, "values": values})
    write(path, lines).open("a").write('{"torn')
    assert rollout_texts(path) == (["yes"], ["no"])  # not what the persona's filter removed
    write(path, [*lines, {"answer": 0}])
    with pytest.raises(RunError, match="line 8"):
        rollout_texts(path)


def test_the_check_finds_what_was_planted_and_says_what_is_missing(tmp_path: Path) -> None:
    """Planted along the direction itself: the prompts' own order must not matter."""
    model, rows = shared("llama_gqa", "bridge"), rows_of(12)
    data = write(tmp_path / "d.jsonl", rows)
    table = measure_samples(model, DIRECTION, data, tmp_path / "s.jsonl", settings=FAST)
    labels = (table["projection"] > table["projection"].median()).tolist()
    table.loc[0, "projection"] = np.nan
    digits = {"digits": lambda e: [float(sum(c.isdigit() for c in x.answer)) for x in e]}
    found = check_screening(model, DIRECTION, data, table, labels, baselines=digits).set_index(
        "score"
    )
    assert list(found.index) == [
        "projection", "length in words", "digits", "middle of 20 random directions",
        "strongest of 20 random directions",
    ]  # fmt: skip
    assert found.loc["projection", "auc"] == 1.0 and found.loc["projection", "missing"] == 1
    assert found.loc["length in words", "auc"] == 0.5
    strongest, middle = (
        found.loc[f"{n} of 20 random directions", "auc"] for n in ("strongest", "middle")
    )
    assert 1 >= strongest >= middle >= 0.5
    with pytest.raises(RunError, match="11 labels"):
        check_screening(model, DIRECTION, data, table, labels[1:])
    # controls read as much of an answer as the table
    exchanges = [sample.exchange for sample in read_samples(data)]
    controls = [random_direction(DIRECTION, seed=seed) for seed in range(20)]
    for tokens in (None, 1):
        means = response_means(model, exchanges, controls, response_tokens=tokens).numpy()
        rows = check_screening(model, DIRECTION, data, table, labels, response_tokens=tokens)
        best = max(abs(auc(column, labels) - 0.5) for column in means.T) + 0.5
        assert rows.set_index("score").loc["strongest of 20 random directions", "auc"] == best


@pytest.mark.parametrize("name", [name for name in mixture_names() if name != "declines"])
def test_bundled_mixtures(name: str) -> None:
    path = labelled_mixture(name)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert summarise_file(path).unanswered == 0 and set(read_labels(path, "planted")) == {
        True,
        False,
    }
    prompts = {row["prompt"] for row in rows}
    for prompt in prompts:  # each prompt with the trait and without
        assert sorted(row["planted"] for row in rows if row["prompt"] == prompt) == [False, True]
    assert len({row["completion"] for row in rows}) == len(rows) == 2 * len(prompts)
    trait = load_trait(name)
    used = {*trait.extraction_questions, *trait.evaluation_questions}
    assert not prompts & used
    with pytest.raises(RunError, match=name):
        labelled_mixture("no such")


def test_a_bundled_mixture_stands_where_a_file_does() -> None:
    assert data_and_label("planted:cheerful") == (labelled_mixture("cheerful"), "planted")
    assert data_and_label("planted:declines", "part") == (labelled_mixture("declines"), "part")
    assert data_and_label("chats.jsonl") == ("chats.jsonl", None)
    with pytest.raises(RunError, match=r"no bundled mixture 'none'.*cheerful, declines"):
        data_and_label("planted:none")


def test_directions_of_another_width_are_refused() -> None:
    wide = Direction(torch.ones(D_MODEL + 1), 1.0, Site(0, "resid_post"))
    with pytest.raises(DirectionError, match=f"d_model {D_MODEL}"):
        project_responses(shared("llama_gqa", "bridge"), EXCHANGES, wide)


# --------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A persona folder of a tiny model that is saved beside it."""
    place = tmp_path_factory.mktemp("persona")
    hf, tokenizer = tiny("llama_gqa")
    hf.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    trait = replace(load_trait("terse"), scorer="lexicon:length")
    Persona(trait, Directions((DIRECTION,)), DIRECTION, 1.0, str(place / "model")).save(place)
    return place


def test_screen_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, clean = write(tmp_path / "d.jsonl", rows_of(12)), write(tmp_path / "c.jsonl", rows_of(5))
    out = tmp_path / "out"
    command = ["--quiet", "persona", "screen", str(folder), str(data), "--out", str(out)]
    assert main([*command, "--no-own", "--labels", "planted", "--format", "svg"]) == 0
    said = capsys.readouterr().out
    assert "12 samples, 2 flagged" in said and "projection" in said and "AUC" in said
    assert "whatever is in the data" in said
    assert len((out / "flagged.jsonl").read_text().splitlines()) == 2
    assert (out / "figures" / "screening.svg").exists()
    summary = json.loads((out / "screening.json").read_text())
    assert summary["check"][0]["score"] == "projection" and summary["trait"] == "terse"
    before = (out / "scores.jsonl").read_bytes()
    again = [*command, "--no-own", "--threshold", "q0.5", "--reference", str(clean)]
    assert main(again) == 0 and (out / "scores.jsonl").read_bytes() == before
    assert "of the reference" in capsys.readouterr().out
    assert main([*command, "--max-new-tokens", "3"]) == 2  # other settings, the same folder
    assert "other work" in capsys.readouterr().err
    own = [*command[:-1], str(tmp_path / "own"), "--max-new-tokens", "3", "--threshold", "0"]
    assert main(own) == 0 and "adjusted" in capsys.readouterr().out
    assert json.loads((tmp_path / "own" / "screening.json").read_text())["slope"] is not None
    long = [*command[:-1], str(tmp_path / "long"), "--max-new-tokens", "9999"]
    assert main(long) == 2 and "no room for a prompt" in capsys.readouterr().err
    assert not (tmp_path / "long").exists()
    assert main([*own, "--by", "difference"]) == 0 and "difference" in capsys.readouterr().out
    assert main([*command, "--no-own", "--by", "difference"]) == 2
    assert main([*command, "--no-own", "--layer", "2"]) == 2  # the persona has one layer's


def test_screen_command_reads_along_the_direction_for_reading(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that was made for it, unless the steering one is asked for; the check shows the other, too."""
    reads = Direction(unit(4), 1.0, Site(2, "resid_post"), "response_mean", "score_slope")
    there = load_persona(folder)
    details = {"readout": {"site": str(reads.site), "layers": []}}
    both = replace(there, directions=Directions((DIRECTION, reads)), details=details)
    both.save(tmp_path / "both")
    data, found = write(tmp_path / "d.jsonl", rows_of(12)), {}
    for kind, more in (("readout", []), ("steering", ["--direction", "steering"])):
        command = ["--quiet", "persona", "screen", str(tmp_path / "both"), str(data), "--no-own"]
        out = tmp_path / kind
        assert main([*command, "--labels", "planted", "--out", str(out), *more]) == 0
        summary = json.loads((out / "screening.json").read_text())
        found[kind] = summary, {row["score"]: row["auc"] for row in summary["check"]}
    summaries = [found[kind][0] for kind in ("readout", "steering")]
    assert [s["direction"] for s in summaries] == [reads.fingerprint, DIRECTION.fingerprint]
    assert [s["method"] for s in summaries] == ["score_slope", "difference_in_means"]
    assert "read along score_slope at blocks.2.hook_resid_post" in capsys.readouterr().out
    other = found["readout"][1]["projection, steering direction, layer 1"]
    assert other == found["steering"][1]["projection"]
    steered = ["--direction", "steering", "--layer", "0"]
    assert main([*command, "--out", str(tmp_path / "none"), *steered]) == 2
    said = capsys.readouterr().err
    assert "no direction at blocks.0" in said and "1 sites, such as ['blocks.1" in said
    Persona(there.trait, Directions((DIRECTION,)), DIRECTION, 1.0, there.model).save(
        tmp_path / "old"
    )
    old = [*command[:3], str(tmp_path / "old"), *command[4:], "--out", str(tmp_path / "o")]
    assert main(old) == 0 and "was not made by `persona extract`" in capsys.readouterr().err


def test_screen_command_says_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--quiet", "persona", "screen", str(folder)]
    out = ["--out", str(tmp_path / "out")]
    data = write(tmp_path / "d.jsonl", rows_of(2))
    for given, message in (
        (["planted:nothing"], "no bundled mixture"),
        ([str(tmp_path / "none.jsonl")], "no file"),
        ([str(data), "--threshold", "q2"], "no threshold"),
        ([str(data), "--labels", "completion"], "line 1"),
    ):
        assert main([*command, *given, *out]) == 2
        assert message in capsys.readouterr().err
    assert main(["persona", "screen", str(tmp_path), str(data), *out]) == 2
    assert "persona extract" in capsys.readouterr().err


def test_monitor_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quiet", "persona", "monitor", str(folder), "--out", str(tmp_path)]
    assert main([*command, "--questions", "2", "--max-new-tokens", "8", "--dpi", "40"]) == 0
    said = capsys.readouterr().out
    assert "within system prompts" in said and "random directions" in said
    assert (tmp_path / "figures" / "monitor.png").exists()
    assert json.loads((tmp_path / "monitor.json").read_text())["answers"] == 16
    assert len(pd.read_csv(tmp_path / "monitor.csv")) == 16
    assert main([*command, "--questions", "99"]) == 2
    assert "--questions 99" in capsys.readouterr().err
    streamed = [*command, "--prompt", "What is rain?", "--max-new-tokens", "5"]
    assert main(streamed) == 0
    plain = capsys.readouterr().out
    assert main([*streamed, "--coefficient", "4"]) == 0
    steered = capsys.readouterr().out
    assert "mean of" in plain and plain != steered
    assert (tmp_path / "figures" / "tokens.png").exists()


# --------------------------------------------------------------------------------- the real model


def test_planted_samples_in_the_real_model(tmp_path: Path, bundled_model: str) -> None:
    """The vector between glad and sad answers to other questions finds what the bundled mixture planted."""
    from interp_ablate import load_model
    from interp_ablate.directions.mean_difference import difference_in_means

    model, trait = load_model("smollm2"), load_trait("cheerful")
    site, means = Site(12, "resid_post"), []
    prompts = [Prompt(question) for question in trait.extraction_questions[: len(GLAD)]]
    for texts in (GLAD, SAD):
        found = collect(model, prompts, [site], ["response_mean"], responses=list(texts))
        means.append(found.at(site, "response_mean"))
    direction = difference_in_means(*means, site, position="response_mean")
    assert direction is not None
    lines = labelled_mixture("cheerful").read_text().splitlines()
    data = tmp_path / "planted.jsonl"
    data.write_text("\n".join(lines[:40]) + "\n")  # 20 prompts, each with and without
    table = measure_samples(
        model, direction, data, tmp_path / "s.jsonl", settings=ScreeningSettings(max_new_tokens=20)
    )
    table = baseline_adjusted(table, baseline_slope(table))
    labels = read_labels(data, "planted")
    values = {name: auc(table[name].to_numpy(), labels) for name in ("projection", "adjusted")}
    assert min(values.values()) >= 0.9, values
    words = words_in([s.exchange for s in read_samples(data)])
    assert values["adjusted"] > auc(np.array(words, float), labels)  # more than length
    # so does the slope on the scores of the same answers, by a lexicon
    texts = [*zip(prompts, GLAD), *zip(prompts, SAD)]
    scores = make_scorer(trait.scorer or "")(
        [PromptResponse(prompt, text) for prompt, text in texts]
    )
    written = [
        Rollout({}, prompt, tuple(model.tokenizer(text)["input_ids"]), text, True, score, 100.0)
        for (prompt, text), score in zip(texts, scores)
    ]
    read = fit_readout(model, written, [site])
    exchanges = [sample.exchange for sample in read_samples(data)]
    found = project_responses(model, exchanges, read.directions[0])
    assert auc(np.array(found, float), labels) >= 0.9
    assert read.rows[0]["r"] > 0.5
