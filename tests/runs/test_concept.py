"""A run of a concept: without a behaviour's looks, or where no answer shows it, nothing is chosen or exported."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import tiny

from interp_ablate import ContrastSet, load_model
from interp_ablate.cli.main import main
from interp_ablate.directions.direction_set import Directions
from interp_ablate.evaluation.metrics import TargetLogOdds, first_token_kl
from interp_ablate.runs.run_folder import CONCEPT_STAGES
from interp_ablate.search.by_layer import layer_sweep


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("concept")
    model, tokenizer = tiny(seed=3)
    model.save_pretrained(place / "even")
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # peaked first tokens
    for folder in ("even", "model"):
        tokenizer.save_pretrained(place / folder)
    model.save_pretrained(place / "model")
    for name, words in (("yes", "order bring fetch send"), ("no", "name list tell describe")):
        verbs = words.split()
        lines = [f"{verbs[i % 4]} number {i * 7 + 3} now" for i in range(24)]
        (place / f"{name}.txt").write_text("\n".join(lines))
    return [
        *(
            "--model",
            str(place / "model"),
            "--n-train",
            "8",
            "--n-validation",
            "6",
            "--n-test",
            "6",
        ),
        *("--positive", str(place / "yes.txt"), "--negative", str(place / "no.txt")),
        *("--max-new-tokens", "4", "--quiet"),
    ]


@pytest.fixture(scope="module")
def concept(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "run"
    assert main(["run", *flags, "--out", str(out)]) == 0
    return out


def test_a_run_without_expressions_is_one_of_a_concept(concept: Path) -> None:
    run = json.loads((concept / "run.json").read_text())
    assert tuple(run["stages"]) == CONCEPT_STAGES
    (note,) = [n for n in run["notes"] if "a run of a concept" in n]
    assert "--expressions NAME_OR_FILE" in note
    names = {path.name for path in concept.iterdir()}
    assert not names & {"export", "selected.json", "trials.csv", "generations.jsonl"}
    assert {"projections.csv", "estimators.csv", "attribution.csv", "layer_effects.csv"} <= names
    figures = {path.stem for path in (concept / "figures").iterdir()}
    assert {
        "projections",
        "separation",
        "attribution",
        "attribution_map",
        "layer_effects",
    } <= figures
    html = (concept / "report.html").read_text()
    assert "This is a run of a concept" in html and "No plan has been chosen yet" not in html


def test_a_concept_that_no_first_token_tells_has_effects_in_nats_alone(
    flags: list[str], tmp_path: Path
) -> None:
    even, out = str(Path(flags[1]).parent / "even"), tmp_path / "run"
    assert main(["run", *flags, "--model", even, "--out", str(out)]) == 0
    frame = pd.read_csv(out / "layer_effects.csv")
    assert set(frame["score"]) == {"kl_first_token"} and frame["change"].notna().all()
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert any("no log-odds" in note for note in notes)
    words = tmp_path / "words.txt"
    words.write_text("no answer of a random model says this\n")
    more = ["--expressions", str(words), "--out", str(tmp_path / "other")]
    assert main(["run", *flags, "--model", even, *more]) == 1


def test_its_attribution_adds_up_to_the_gap_of_the_projections(concept: Path) -> None:
    run = json.loads((concept / "run.json").read_text())
    terms = pd.read_csv(concept / "attribution.csv")
    site = run["attribution"]["direction"].split("@")[1].split("[")[0].split(".")
    frame = pd.read_csv(concept / "projections.csv")
    rows = frame[
        (frame["split"] == "validation") & (frame["layer"] == int(site[1]))
        & (frame["point"] == site[2].removeprefix("hook_"))
    ]  # fmt: skip
    means = rows.groupby("label")["projection"].mean()
    assert terms["difference"].sum() == pytest.approx(
        means["positive"] - means["negative"], rel=1e-4
    )


def test_its_effects_by_layer_have_intervals(concept: Path) -> None:
    frame = pd.read_csv(concept / "layer_effects.csv")
    assert set(frame["edit"]) == {"ablate", "add"} and (frame["n"] == 6).all()
    assert set(frame["score"]) == {"target_log_odds", "kl_first_token"}
    assert (frame["n_shuffled"] == 2).all()
    kl = frame[frame["score"] == "kl_first_token"]
    assert (kl["value"] >= 0).all() and kl["value"].max() > 0 and (kl["baseline"] == 0).all()
    inside = frame.dropna(subset=["change_low"])
    assert len(inside) and (inside["change_low"] <= inside["change"]).all()


def test_its_effects_are_the_layer_sweep_of_its_directions(concept: Path, flags: list[str]) -> None:
    """One table by one mechanism: the public one gives it again from what the folder holds."""
    run = json.loads((concept / "run.json").read_text())
    model = load_model(flags[1])
    contrast = ContrastSet.load(
        positive=flags[flags.index("--positive") + 1], negative=flags[flags.index("--negative") + 1]
    )
    held = contrast.split(8, 6, 6, seed=0).validation
    target = TargetLogOdds(tuple(token["id"] for token in run["target_tokens"]))
    directions = Directions.load(concept / "directions.safetensors").of("difference_in_means")
    again = layer_sweep(
        model, directions, held, ("ablate",), where=("writers",),
        scores={"target_log_odds": target, "kl_first_token": first_token_kl},
    )  # fmt: skip
    frame = pd.read_csv(concept / "layer_effects.csv")
    pd.testing.assert_frame_equal(
        frame[frame["edit"] == "ablate"].reset_index(drop=True), again, rtol=1e-4, atol=1e-6
    )


def test_it_is_not_done_twice(
    concept: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (concept / "layer_effects.csv").stat().st_mtime_ns
    assert main(["run", *flags, "--out", str(concept)]) == 0
    assert (concept / "layer_effects.csv").stat().st_mtime_ns == before
    assert "no plan was chosen and nothing exported" in capsys.readouterr().out


def test_a_behaviour_that_no_answer_shows_is_a_concept_too(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that certified an export for 0% -> 0% and ended well."""
    words = tmp_path / "words.txt"
    words.write_text("no answer of a random model says this\n")
    out = tmp_path / "run"
    assert main(["run", *flags, "--expressions", str(words), "--out", str(out)]) == 1
    assert not (out / "export").exists() and not (out / "trials.csv").exists()
    assert "none of the 6 unedited answers" in capsys.readouterr().out
    said = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert len(said) == 6 and not any(row["expressed"] for row in said)
    assert "baseline 0 of 6" in (out / "report.html").read_text()
    assert main(["run", *flags, "--expressions", str(words), "--out", str(out)]) == 1
