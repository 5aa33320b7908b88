"""The run folder end to end on a tiny model: what it leaves, what it refuses, how it goes on after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import tiny

from interp_ablate.cli import main
from interp_ablate.directions import Directions
from interp_ablate.edits import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.experiment import WORK
from interp_ablate.pipeline import STAGES, Configuration, Run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose first tokens are peaked enough to have targets."""
    model, tokenizer = tiny(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    for name, words in (("yes", "order bring fetch send"), ("no", "name list tell describe")):
        verbs = words.split()
        lines = [f"{verbs[i % 4]} number {i * 7 + 3} now" for i in range(24)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder / "yes.txt", folder / "no.txt"


@pytest.fixture
def flags(tiny_folder: Path, prompt_files: tuple[Path, Path]) -> list[str]:
    yes, no = map(str, prompt_files)
    return [
        *("--model", str(tiny_folder), "--positive", yes, "--negative", no),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6"),
        *("--new-tokens", "4", "--max-kl", "50"),
    ]


@pytest.fixture(scope="session")
def finished(
    tiny_folder: Path, prompt_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole run, made once."""
    out = tmp_path_factory.mktemp("run") / "out"
    yes, no = map(str, prompt_files)
    arguments = ["--quiet", "run", "--model", str(tiny_folder), "--positive", yes, "--negative", no]
    arguments += ["--n-train", "8", "--n-validation", "6", "--n-test", "6", "--new-tokens", "4"]
    assert main([*arguments, "--max-kl", "50", "--out", str(out)]) == 0
    return out


def test_run_leaves_everything(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert set(run["stages"]) == set(STAGES)
    assert run["versions"]["torch"] and run["model"]["fingerprint"] and run["target_tokens"]
    assert any("no --expressions" in note for note in run["notes"])
    frame = pd.read_csv(finished / "projections.csv")
    assert list(frame) == ["layer", "point", "split", "label", "prompt", "projection"]
    assert set(frame["split"]) == {"train", "validation"}
    directions = Directions.load(finished / "directions.safetensors")
    assert "blocks.0.hook_resid_pre[-1]" in directions.left_out
    selected = json.loads((finished / "selected.json").read_text())
    for key in [
        "behaviour_before",
        "behaviour_after",
        "negative_before",
        "addition_after",
        "kl_first_token",
        "kl_continuation",
        "intervals",
        "controls",
    ]:
        assert key in selected["test"]
    assert {c["name"] for c in selected["test"]["controls"]} >= {"random 0", "shuffled labels"}
    certificate = json.loads((finished / "export" / "certificate.json").read_text())
    assert certificate["passed"] and certificate["residual_along_direction"] <= 1e-5
    texts = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    assert {row["condition"] for row in texts} == {"baseline", "ablated", "added"}
    assert len(list((finished / "figures").glob("*.png"))) >= 5
    assert (finished / "report.html").stat().st_size > 10_000
    assert not list(finished.glob(".*"))  # no temporary files


def test_projections_are_of_the_saved_directions(finished: Path, tiny_folder: Path) -> None:
    from interp_ablate import Site, collect, load_model

    frame = pd.read_csv(finished / "projections.csv")
    row = frame[(frame.layer == 2) & (frame.point == "resid_mid")].iloc[0]
    site = Site(2, "resid_mid")
    direction = Directions.load(finished / "directions.safetensors")[site]
    value = collect(load_model(tiny_folder), [row.prompt], [site]).at(site)[0]
    torch.testing.assert_close(
        float(value.double() @ direction.vector), row.projection, rtol=1e-4, atol=1e-5
    )


def test_finalists_text_scores_decide(finished: Path) -> None:
    trials = pd.read_csv(finished / "trials.csv")
    finals = trials[trials.stage == "finalist"]
    chosen = json.loads((finished / "selected.json").read_text())["trial"]
    assert chosen["trial"] in set(finals.trial)
    assert chosen["expression_rate"] == finals.expression_rate.min()
    assert finals[["expression_rate", "repetition"]].notna().all(axis=None)
    assert trials[trials.stage == "screen"]["addition"].notna().all()


def test_second_run_does_nothing_twice(
    finished: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr("interp_ablate.model.load_model", loaded)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    assert main(["run", *flags, "--out", str(finished)]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}


def test_other_configuration_is_refused_with_what_differs(
    finished: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *flags, "--seed", "5", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "seed: 0 there, 5 now" in error and "Traceback" not in error


def test_changed_prompts_are_refused(finished: Path, tmp_path: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    run["contrast"]["fingerprint"] = "another"
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(RunError, match="other prompts"):
        Run(copy, Configuration.from_dict(run["configuration"]), work=WORK.__getitem__)


def test_killed_sweep_goes_on(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some trials: the next run repeats none, and ends with what an unbroken one has."""
    from interp_ablate import sweep

    real, calls = sweep._run_trial, []

    def dies(bench, directions, candidate):  # type: ignore[no-untyped-def]
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(candidate.key)
        return real(bench, directions, candidate)

    monkeypatch.setattr(sweep, "_run_trial", dies)
    out = tmp_path / "out"
    assert main(["--quiet", "sweep", *flags, "--out", str(out)]) == 130
    lines = (out / "trials.jsonl").read_bytes().splitlines()
    assert len(lines) == 1 + 7
    with open(out / "trials.jsonl", "ab") as file:
        file.write(b'{"candidate": {"layer"')  # and one that was being written
    again: list[str] = []

    def counts(bench, directions, candidate):  # type: ignore[no-untyped-def]
        again.append(candidate.key)
        return real(bench, directions, candidate)

    monkeypatch.setattr(sweep, "_run_trial", counts)
    assert main(["--quiet", "sweep", "--out", str(out)]) == 0
    assert not set(again) & set(calls)
    after = (out / "trials.jsonl").read_bytes().splitlines()
    assert after[:8] == lines
    keys = [json.dumps(json.loads(line)["candidate"], sort_keys=True) for line in after[1:]]
    assert len(keys) == len(set(keys))


def test_nothing_passes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["run", *flags, "--max-kl", "1e-9", "--layers", "1-1", "--sites", "resid_post"]
    assert main([*arguments, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "no candidate passed" in said and "kl > 1e-09" in said
    assert json.loads((out / "selected.json").read_text())["plan"] is None
    assert not (out / "export").exists()
    assert "kl &gt; 1e-09" in (out / "report.html").read_text()


def test_nan_scores_are_failed_trials_and_never_chosen(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.sweep import Bench

    real = Bench.score

    def sometimes_nan(self, plan, *, generate):  # type: ignore[no-untyped-def]
        scores = real(self, plan, generate=generate)
        if len(plan.sites) > 6:  # the screening candidates
            scores["own_words"] = math.nan
        return scores

    monkeypatch.setattr(Bench, "score", sometimes_nan)
    out = tmp_path / "out"
    assert main(["--quiet", "sweep", *flags, "--out", str(out)]) in (0, 2)
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()[1:]]
    failed = [line for line in lines if line["status"] == "failed"]
    assert failed and all("own_words" in line["reason"] for line in failed)


def test_stages_one_by_one(flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--quiet", "collect", *flags, "--out", str(out)]) == 0
    assert (out / "cache").is_dir() and not (out / "directions.json").exists()
    assert main(["--quiet", "directions", "--out", str(out)]) == 0  # settings come from the folder
    assert (out / "projections.csv").exists()
    assert main(["--quiet", "plot", str(out)]) == 0
    assert (out / "figures" / "projections.png").exists() and (out / "report.html").exists()


def test_verify_export_and_generate(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(finished)]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    out = tmp_path / "again"
    assert main(["export", str(finished), "--out", str(out)]) == 0
    capsys.readouterr()
    same = (finished / "export" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == same
    assert main(["export", str(finished), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["verify", str(out), "--plan", str(finished / "selected.json")]) == 0
    capsys.readouterr()
    command = ["generate", "--run", str(finished), "--json", "--new-tokens", "3", "order it"]
    assert main(command) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"prompt", "baseline", "edited"}


def test_verify_fails_another_plan(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from interp_ablate import Ablate, Site

    other = tmp_path / "plan.json"
    Plan((Ablate(torch.randn(32), Site(1, "mlp_out")),)).save(other)
    assert main(["verify", str(finished / "export"), "--plan", str(other)]) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": ""}, "--model"),
        ({"contrast": None}, "--contrast"),
        ({"positive": "a.txt"}, "--contrast"),
        ({"sites": ["resid_up"]}, "resid_up"),
        ({"n_test": 0}, "--n-test"),
        ({"max_kl": 0}, "--max-kl"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_settings(change: dict, said: str) -> None:
    with pytest.raises(InterpAblateError, match=said):
        Configuration.from_dict({"model": "smollm2", "contrast": "declining", **change})


@pytest.mark.parametrize("layers", ["9-12", "2-1", "x", "0-3"])
def test_bad_layers(layers: str) -> None:
    with pytest.raises(RunError, match="layers"):
        Configuration(model="m", contrast="declining", layers=layers).layer_range(3)


def test_folders_that_are_not_runs(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["run", *flags, "--out", str(tmp_path)]) == 2
    assert main(["run", *flags, "--out", str(tmp_path / "notes.txt")]) == 2
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    (corrupt / "run.json").write_text("{")
    assert main(["run", *flags, "--out", str(corrupt)]) == 2
    assert (corrupt / "run.json").read_text() == "{"
