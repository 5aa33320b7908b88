"""The run folder end to end on a tiny model: what it leaves, what it refuses, how it goes on after a kill."""

from __future__ import annotations

import functools
import importlib
import json
import math
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import shared, tiny

from interp_ablate.cli.main import main
from interp_ablate.directions.direction_set import Directions
from interp_ablate.edits.kinds import Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.template_process import TemplateProcess
from interp_ablate.runs.configuration import Configuration, layers_of
from interp_ablate.runs.run_folder import FORMAT, STAGES, Run
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.grid import SCALES
from interp_ablate.search.race import RUNGS, rank_directions, usable_rungs
from interp_ablate.search.trials import Trial


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


@pytest.fixture(scope="session")
def bytes_that_are_no_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expression that the tiny model's answers hold: there is something to fit."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\N{REPLACEMENT CHARACTER}\n")
    return path


@pytest.fixture(scope="session")
def flags_of_all(
    tiny_folder: Path, prompt_files: tuple[Path, Path], bytes_that_are_no_text: Path
) -> list[str]:
    yes, no = map(str, prompt_files)
    return [
        *("--expressions", str(bytes_that_are_no_text)),
        *("--model", str(tiny_folder), "--positive", yes, "--negative", no),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6"),
        *("--max-new-tokens", "4", "--max-kl", "50"),
    ]


@pytest.fixture
def flags(flags_of_all: list[str]) -> list[str]:
    return list(flags_of_all)


class Trials:
    """Counts what is scored while it is entered; kills the run after the first few."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most: int = 10**9) -> None:
        self.patches, self.most, self.keys = monkeypatch, most, []  # type: ignore[var-annotated]

    def __enter__(self) -> None:
        from interp_ablate.search import trials

        self.real = trials.score_trial
        self.patches.setattr(trials, "score_trial", self.run)

    def __exit__(self, *_: object) -> None:
        self.patches.setattr("interp_ablate.search.trials.score_trial", self.real)

    def run(self, bench: Any, planned: Any) -> Any:
        if len(self.keys) == self.most:
            raise KeyboardInterrupt
        self.keys.append(planned.trial.key)
        return self.real(bench, planned)


def finished_lines(out: Path) -> list[dict[str, Any]]:
    """The log's lines of finished trials."""
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return [line for line in lines if "params" in line]


@pytest.fixture(scope="session")
def finished(
    tiny_folder: Path,
    prompt_files: tuple[Path, Path],
    bytes_that_are_no_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A whole run, made once."""
    out = tmp_path_factory.mktemp("run") / "out"
    yes, no = map(str, prompt_files)
    arguments = ["--quiet", "run", "--model", str(tiny_folder), "--positive", yes, "--negative", no]
    arguments += ["--expressions", str(bytes_that_are_no_text)]
    arguments += ["--n-train", "8", "--n-validation", "6", "--n-test", "6", "--max-new-tokens", "4"]
    assert main([*arguments, "--max-kl", "50", "--out", str(out)]) == 0
    return out


def test_run_leaves_everything(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert set(run["stages"]) == set(STAGES)
    assert run["versions"]["torch"] and run["model"]["fingerprint"] and run["target_tokens"]
    assert not any("no --expressions" in note for note in run["notes"])
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
    assert {row["split"] for row in texts} == {"test"}
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

    monkeypatch.setattr("interp_ablate.models.load.load_model", loaded)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    assert main(["run", *flags, "--out", str(finished)]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}


def test_other_configuration_is_refused_with_what_differs(
    finished: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *flags, "--seed", "5", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "seed: 0 there, 5 now" in error and "Traceback" not in error
    assert main(["run", *flags, "--response-prefix", "Sure", "--out", str(finished)]) == 2
    assert "response_prefix: '' there, 'Sure' now" in capsys.readouterr().err


def test_changed_prompts_are_refused(finished: Path, tmp_path: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    run["made_of"]["contrast"] = "another"
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(RunError, match="other prompts"):
        Run(copy, Configuration.from_dict(run["configuration"]))


def test_killed_sweep_goes_on(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some trials: the next run repeats none."""
    calls, again = Trials(monkeypatch, most=7), Trials(monkeypatch)
    out = tmp_path / "out"
    with calls:
        assert main(["--quiet", "sweep", *flags, "--out", str(out)]) == 130
    lines = (out / "trials.jsonl").read_bytes().splitlines()
    assert len(finished_lines(out)) == 7
    with open(out / "trials.jsonl", "ab") as file:
        file.write(b'{"params": {"layer"')  # and one that was being written
    with again:
        assert main(["--quiet", "sweep", "--out", str(out)]) == 0
    assert again.keys and not set(again.keys) & set(calls.keys)
    after = (out / "trials.jsonl").read_bytes().splitlines()
    assert after[: len(lines)] == lines
    keys = [Trial.from_dict(line).key for line in finished_lines(out)]
    assert len(keys) == len(set(keys))


@pytest.fixture(scope="session")
def behaving(flags_of_all: list[str]) -> list[str]:
    return list(flags_of_all)


def mild(fit_edit: Any) -> Any:
    """A random model's KL is no model's: at its usual weight nothing but strength 0 is worth it."""
    return functools.partial(fit_edit, kl_weight=1.0)


@pytest.fixture(scope="session")
def fitted_run(behaving: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a fitted edit, made once."""
    from interp_ablate.runs import fits

    out = tmp_path_factory.mktemp("fitted") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fits, "fit_edit", mild(fits.fit_edit))
        assert main(["--quiet", "run", *behaving, "--out", str(out)]) == 0
    return out


def trials_of(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "trials.csv").drop(columns="seconds")


def test_a_fitted_edit_is_kept_and_tried_at_every_scale(fitted_run: Path) -> None:
    [path] = (fitted_run / "fits").iterdir()
    (edit,) = Plan.load(path)
    assert isinstance(edit, Erase) and edit.label.endswith(", fitted")
    frame = trials_of(fitted_run)
    fits = frame[(frame.edit == "fitted") & (frame.stage == "refine")]
    for component in ("attention", "mlp", "embed"):
        assert fits[f"{component}_scale"].tolist() == list(SCALES)
    assert set(fits.fit) == {path.stem}
    # from the most promising direction on, whose name it has
    best = rank_directions(frame[frame.stage == "screen"])[0]
    assert {(row.layer, row.point, str(row.position)) for row in fits.itertuples()} == {best}
    assert path.stem.startswith("-".join(map(str, best)) + "-")
    # it was fitted to lower own words on other prompts: so it does on these
    full = fits[fits.mlp_scale == 1.0].iloc[0]
    assert full.unedited_answer_logprob < full.unedited_answer_logprob_baseline and full.kl > 0


def test_the_screening_is_a_race(fitted_run: Path) -> None:
    frame = trials_of(fitted_run)
    screened = frame[frame.stage == "screen"]
    prompts = screened.prompts.tolist()
    rungs = usable_rungs(RUNGS, int(prompts[0]))
    assert prompts == sorted(prompts, reverse=True) and set(prompts) <= {p for p, _ in rungs}
    assert not screened.duplicated(["layer", "point", "position"]).any()
    assert frame[frame.stage != "screen"].prompts.isna().all()
    assert frame.trial.tolist() == list(range(len(frame)))
    count = sum(min(len(screened), most) for _, most in rungs)
    assert sum(line["stage"] == "screen" for line in finished_lines(fitted_run)) == count


def test_a_fitted_edit_that_is_chosen_is_controlled_and_exported(
    behaving: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.runs import final_test, fits
    from interp_ablate.search import grid

    monkeypatch.setattr(grid, "bands", lambda *_, **__: [])  # so that a fitted one is
    monkeypatch.setattr(fits, "fit_edit", mild(fits.fit_edit))
    planned: list[final_test.Control] = []
    real = final_test._control

    def noting(control: final_test.Control, *rest: Any) -> Any:
        planned.append(control)
        return real(control, *rest)

    monkeypatch.setattr(final_test, "_control", noting)
    out = tmp_path / "out"
    assert main(["--quiet", "run", *behaving, "--out", str(out)]) == 0
    selected = json.loads((out / "selected.json").read_text())
    chosen = selected["trial"]
    assert (chosen["stage"], chosen["edit"]) == ("finalist", "fitted")
    (edit,) = Plan.from_dict(selected["plan"])
    (kept,) = Plan.load(out / "fits" / f"{chosen['fit']}.json")
    assert isinstance(edit, Erase) and isinstance(kept, Erase)
    want = {s: chosen["mlp_scale"] * a for s, a in zip(kept.sites, kept.amounts) if a}
    assert dict(zip(edit.sites, edit.amounts)) == pytest.approx(want, abs=1e-6)
    # the controls read and write elsewhere, as far apart and as strongly
    names = ["random 0", "random 1", "shuffled labels"]
    assert [each.name for each in planned if each.matched == "strength"] == names
    equal_kl = [each for each in planned if each.matched == "KL"]
    assert {each.name for each in equal_kl} <= set(names) and equal_kl
    for each in planned:
        (control,) = each.plan
        assert isinstance(control, Erase)
        amounts = {s: (each.factor or 1) * amount for s, amount in zip(edit.sites, edit.amounts)}
        want = {s: amount for s, amount in amounts.items() if round(amount, 6)}
        assert dict(zip(control.sites, control.amounts)) == pytest.approx(want, abs=1e-6)
        assert float(control.read.norm()) == pytest.approx(float(edit.read.norm()))
        assert abs(float(control.write @ edit.write)) < 0.9
    test = selected["test"]
    assert all(math.isfinite(c["kl_first_token"]) for c in test["controls"])
    assert test["kl_dtype"] == "float32" and 0 <= test["kl_floor"] < 1e-6
    certificate = json.loads((out / "export" / "certificate.json").read_text())
    assert certificate["passed"]


@pytest.mark.parametrize("when", ("after the fit", "between the rounds", "while it is tried"))
def test_a_run_killed_around_the_fit_fits_once(
    behaving: list[str],
    fitted_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """A fit that was saved is not made again; one that was not is; the results are the unbroken run's."""
    from interp_ablate.runs import fits as fitting
    from interp_ablate.search import grid

    out, real = tmp_path / "out", mild(fitting.fit_edit)
    fits: list[int] = []

    def counting(*given: Any, **options: Any) -> Any:
        fits.append(options["steps"])
        if when == "between the rounds" and len(fits) == 2:  # the second is not made
            raise KeyboardInterrupt
        return real(*given, **options)

    def dies(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "fit_edit", counting)
    with monkeypatch.context() as patched:
        if when == "after the fit":
            patched.setattr(grid, "fitted", dies)
        if when == "while it is tried":
            patched.setattr("interp_ablate.search.trials.score_trial", dies_at_second_fitted())
        assert main(["--quiet", "sweep", *behaving, "--out", str(out)]) == 130
    rounds = [steps for steps, _ in fitting.FIT_ROUNDS]
    saved = when != "between the rounds"
    before = rounds if saved else rounds[:2]
    assert fits == before
    kept = {p.name: p.read_bytes() for p in out.glob("fits/*")}
    assert len(kept) == saved and not (out / "trials.csv").exists()
    assert main(["--quiet", "sweep", "--out", str(out)]) == 0
    assert fits == (rounds if saved else [*before, *rounds])
    after = {p.name: p.read_bytes() for p in out.glob("fits/*")}
    assert kept.items() <= after.items()
    assert after == {p.name: p.read_bytes() for p in fitted_run.glob("fits/*")}
    pd.testing.assert_frame_equal(trials_of(out), trials_of(fitted_run))


def dies_at_second_fitted() -> Any:
    from interp_ablate.search import trials

    real, seen = trials.score_trial, []

    def dying(bench: Any, planned: Any) -> Any:
        if planned.trial.params["edit"] == "fitted":
            seen.append(planned)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(bench, planned)

    return dying


def test_behaviour_that_is_never_there_is_noted_and_not_fitted(
    flags: list[str], tmp_path: Path
) -> None:
    """`sweep` alone still tries bands; `run` goes on as a run of a concept."""
    words, out = tmp_path / "words.txt", tmp_path / "out"
    words.write_text("no answer of a random model says this\n")
    small = ["--expressions", str(words)]
    assert main(["--quiet", "sweep", *flags, *small, "--out", str(out)]) == 0
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert any("no training prompt's answer expresses the behaviour" in note for note in notes)
    assert not (out / "fits").exists()
    assert set(pd.read_csv(out / "trials.csv").edit) == {"ablate", "band"}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("never to be found",), "only 0% of the positive validation prompts show the behaviour"),
        (("",), "100% of the negative validation prompts show the behaviour, and 100%"),
    ],
)
def test_a_base_rate_of_nothing_or_everything_is_noted(patterns: tuple[str], said: str) -> None:
    """With answers of one token."""
    from interp_ablate.evaluation.metrics import TargetLogOdds
    from interp_ablate.runs.validation_bench import base_rate_note
    from interp_ablate.search.bench import ValidationBench

    sides = ContrastSet.from_texts([f"go {i}" for i in range(3)], [f"no {i}" for i in range(3)])
    bench = ValidationBench(
        shared(), sides.positive, sides.negative, target=TargetLogOdds((5,)),
        expression=ExpressionScorer((), patterns=patterns), max_new_tokens=1,
    )  # fmt: skip
    assert said in (base_rate_note(bench) or "")
    assert bench.unedited_text_scores()["repetition"] == 0


def test_nothing_passes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["run", *flags, "--max-kl", "1e-9", "--layers", "1-1", "--sites", "resid_post"]
    assert main([*arguments, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "no candidate passed" in said and "kl > 1e-09" in said
    selected = json.loads((out / "selected.json").read_text())
    assert selected["plan"] is None and not (out / "export").exists()
    kept = sorted(path.stem for path in (out / "plans").glob("*.json"))
    if selected["nearest"]:  # what was paid for is not lost: each can be exported by its name
        assert kept == sorted(each["plan"] for each in selected["nearest"])
        assert f"{out}/plans/{selected['nearest'][0]['plan']}.json" in said
        assert Plan.load(out / "plans" / f"{kept[0]}.json").edits
    else:
        assert not kept and "does more than the unedited model" in said
    page = (out / "report.html").read_text()
    assert "kl &gt; 1e-09" in page
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert {(row["split"], row["label"], row["condition"]) for row in rows} == {
        ("validation", "positive", "baseline"), ("validation", "negative", "baseline"),
    }  # fmt: skip
    assert all("expressed" in row for row in rows) and any(row["text"] for row in rows)
    assert "Validation split. Expressed: baseline" in page and "Test split." not in page


def test_nan_scores_are_failed_trials_and_never_chosen(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.search.bench import ValidationBench

    real = ValidationBench.score

    def sometimes_nan(self, plan, *, generate):  # type: ignore[no-untyped-def]
        scores = real(self, plan, generate=generate)
        if len(plan.sites) > 6:  # the screening candidates
            scores["unedited_answer_logprob"] = math.nan
        return scores

    monkeypatch.setattr(ValidationBench, "score", sometimes_nan)
    out = tmp_path / "out"
    assert main(["--quiet", "sweep", *flags, "--out", str(out)]) in (0, 2)
    failed = [line for line in finished_lines(out) if line["status"] == "failed"]
    assert failed and all("unedited_answer_logprob" in line["reason"] for line in failed)


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
    command = ["generate", "--run", str(finished), "--json", "--max-new-tokens", "3", "order it"]
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
        layers_of(layers, 3)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model", "no-such-model-anywhere"],
        ["--n-train", "900"],
        ["--layers", "2-90"],
        ["--positions", "one"],
        ["--expressions", "no-such-list"],
        ["--template", "{{ raise_exception('no') }}"],
        ["--dtype", "float7"],
    ],
    ids=lambda flags: flags[0],
)
@pytest.mark.parametrize("command", ["run", "search", "sweep", "collect", "directions"])
def test_a_command_that_fails_before_it_did_anything_leaves_nothing(
    flags: list[str], tmp_path: Path, wrong: list[str], command: str
) -> None:
    out = tmp_path / "runs" / "new"
    assert main(["--quiet", command, *flags, *wrong, "--out", str(out)]) == 2
    assert not list(tmp_path.iterdir())


def test_an_interrupted_or_killed_beginning_binds_nobody(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupt(*_: Any, **__: Any) -> Any:
        assert (out / "run.json").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "activations", interrupt)
        assert main(["--quiet", "collect", *flags, "--out", str(out)]) == 130
    assert not out.exists()
    out.mkdir()  # what a kill leaves: the configuration, and nothing of it done
    begun = {
        "format": FORMAT,
        "configuration": {"seed": 9},
        "made_of": {},
        "stages": {},
        "notes": [],
    }
    (out / "run.json").write_text(json.dumps(begun))
    assert main(["--quiet", "collect", *flags, "--out", str(out)]) == 0


@pytest.mark.parametrize("when", ["load", "first trial", "between trials", "export"])
def test_an_interrupted_run_goes_on_where_it_was(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
) -> None:
    out = tmp_path / "out"
    small = [*flags, "--layers", "1-1", "--sites", "resid_post", "--out", str(out)]
    place, most = {
        "load": ("interp_ablate.models.load.load_model", 0),
        "first trial": ("interp_ablate.search.trials.score_trial", 0),
        "between trials": ("interp_ablate.search.trials.TrialLog.begin", 1),
        "export": ("interp_ablate.export.checkpoint.certify", 0),
    }[when]
    module, _, name = place.rpartition(".")
    if name == "begin":
        from interp_ablate.search.trials import TrialLog as target
    else:
        target = importlib.import_module(module)
    real, calls = getattr(target, name), []

    def interrupted(*given: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) > most:
            raise KeyboardInterrupt
        return real(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(target, name, interrupted)
        assert main(["--quiet", "run", *small]) == 130
    assert capsys.readouterr().err.endswith(
        "interrupted; the same command again goes on from what it kept\n"
    )
    assert out.exists() == (when != "load")
    assert not [p for p in out.rglob(".*") if ".export.partial" not in p.parts]
    done = finished_lines(out) if (out / "trials.jsonl").exists() else []
    assert main(["--quiet", "run", *small]) == 0
    assert finished_lines(out)[: len(done)] == done
    assert not list(out.rglob(".*"))
    for path in (*out.rglob("*.json"), *out.rglob("*.jsonl")):  # for jq, too
        whole = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        for text in whole:
            json.loads(text, parse_constant=pytest.fail)


def test_names_may_change_and_contents_may_not(
    flags: list[str],
    tmp_path: Path,
    tiny_folder: Path,
    prompt_files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Moved files and a moved model go on; an edited one, or another model, is refused with what to do."""
    place, out = tmp_path / "moved", tmp_path / "out"
    words = tmp_path / "words.txt"
    words.write_text("a\n")
    small = ["--layers", "1-1", "--sites", "resid_post", "--expressions", str(words)]
    assert main(["--quiet", "directions", *flags, *small, "--out", str(out)]) == 0
    place.mkdir()
    for path in (*prompt_files, words):
        shutil.copy(path, place / path.name)
    shutil.copytree(tiny_folder, place / "model")
    yes, no = prompt_files
    moved = [*flags, *small]
    for before, after in (
        (str(tiny_folder), place / "model"), (str(yes), place / yes.name), (str(no), place / no.name),
        (str(words), place / "words.txt"),
    ):  # fmt: skip
        moved[moved.index(before)] = str(after)
    assert main(["--quiet", "directions", *moved, "--out", str(out)]) == 0
    assert json.loads((out / "run.json").read_text())["configuration"]["model"] == str(
        place / "model"
    )
    before = files_of(out)
    (place / "words.txt").write_text("b\n")
    assert main(["--quiet", "sweep", *moved, "--out", str(out)]) == 2
    assert "other expressions" in capsys.readouterr().err
    (place / "words.txt").write_text("a\n")
    model, tokenizer = tiny(seed=4)
    model.save_pretrained(place / "another")
    tokenizer.save_pretrained(place / "another")
    assert (
        main(["--quiet", "sweep", *moved, "--model", str(place / "another"), "--out", str(out)])
        == 2
    )
    assert "other weights" in capsys.readouterr().err
    assert files_of(out) == before


def test_a_template_that_writes_the_date_is_another_question_tomorrow(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}: {% endif %}"
    )
    small = ["--layers", "1-1", "--sites", "resid_post", "--template", template]
    out = tmp_path / "out"
    assert main(["--quiet", "directions", *flags, *small, "--out", str(out)]) == 0

    render, year = TemplateProcess.render, str(datetime.now().year)

    def tomorrow(*request: Any) -> str:
        return render(*request).replace(year, "2099")

    monkeypatch.setattr(TemplateProcess, "render", tomorrow)
    assert main(["--quiet", "sweep", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "renders otherwise" in error and "date" in error


def test_another_version_of_the_package_is_refused(
    finished: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    run = json.loads((copy / "run.json").read_text())
    run["made_of"]["interp-ablate"] = "0.0.1"
    (copy / "run.json").write_text(json.dumps(run))
    assert main(["run", *flags, "--out", str(copy)]) == 2
    assert "another version of this package" in capsys.readouterr().err


def test_the_report_credits_trials_to_the_versions_that_made_them(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.search import trials as of_trials
    from interp_ablate.storage import provenance

    out = tmp_path / "out"
    small = ["--layers", "1-1", "--sites", "resid_post"]
    with Trials(monkeypatch, most=2):
        assert main(["--quiet", "sweep", *flags, *small, "--out", str(out)]) == 130
    newer = provenance.versions() | {"torch": "99.0"}
    with monkeypatch.context() as patched:
        patched.setattr(of_trials, "versions", lambda: newer)
        assert main(["--quiet", "sweep", "--out", str(out)]) == 0
    made_by = json.loads((out / "run.json").read_text())["trials_made_by"]
    counts = [(each["versions"]["torch"], each["trials"]) for each in made_by]
    total = len(finished_lines(out))
    assert counts == [(provenance.versions()["torch"], 2), ("99.0", total - 2)]
    assert main(["--quiet", "plot", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert f"{total - 2} trials were made by torch 99.0" in page


def test_few_prompts_are_split_in_proportion(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = [word for word in flags if word not in ("--n-train", "--n-validation", "--n-test", "6")]
    usual.remove("8")
    out = tmp_path / "out"
    assert main(["collect", *usual, "--out", str(out)]) == 0
    run = json.loads((out / "run.json").read_text())
    assert [run["configuration"][f"n_{part}"] for part in ("train", "validation", "test")] == [
        12,
        6,
        6,
    ]
    assert any("12 train, 6 validation, 6 test" in note for note in run["notes"])
    assert "12 train" in capsys.readouterr().err
    again = [*usual, "--n-test", "6"]  # the same
    assert main(["--quiet", "directions", *again, "--out", str(out)]) == 0
    assert main(["--quiet", "collect", *usual, "--n-train", "4", "--out", str(tmp_path / "b")]) == 0
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert (run["configuration"]["n_validation"], run["configuration"]["n_test"]) == (10, 10)


def test_a_run_inside_its_own_model_is_refused(
    flags: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(tiny_folder)
    assert main(["--quiet", "collect", *flags, "--out", str(tiny_folder / "run")]) == 2
    assert "inside the source" in capsys.readouterr().err
    assert files_of(tiny_folder) == before and not (tiny_folder / "run").exists()


def test_folders_that_are_not_runs(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["run", *flags, "--out", str(tmp_path)]) == 2
    assert main(["run", *flags, "--out", str(tmp_path / "notes.txt")]) == 2
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    (corrupt / "run.json").write_text("{")
    assert main(["run", *flags, "--out", str(corrupt)]) == 2
    assert (corrupt / "run.json").read_text() == "{"


def test_a_folder_of_another_version_is_refused_in_words(
    finished: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = json.loads((finished / "run.json").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps(run | {"format": "interp_ablate.run/1"}))
    assert main(["run", *flags, "--out", str(tmp_path / "old")]) == 2
    assert "another version of this package" in capsys.readouterr().err
