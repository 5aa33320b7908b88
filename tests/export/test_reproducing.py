"""Reproducing an export from its manifest: the same bytes, and words for what is another; a run from its prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_task import write_task
from tiny import tiny

from interp_ablate.cli.main import main
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.export.checkpoint import export_folder
from interp_ablate.export.hub import _public_run, _without_places
from interp_ablate.export.reproducing import compare, read_manifest
from interp_ablate.runs import search_run
from interp_ablate.sites import Site


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and export/, edited along a random direction at every writer, partly in strength."""
    place = tmp_path_factory.mktemp("reproducing")
    model, tokenizer = tiny(seed=5)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    vector = torch.randn(
        model.config.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    sites = [Site(0, "embed")] + [
        Site(layer, point)
        for layer in range(model.config.num_hidden_layers)
        for point in ("attn_out", "mlp_out")
    ]
    direction = Direction(vector / vector.norm(), 1.0, Site(0, "resid_post"), "-1", "random")
    plan = Plan((Ablate(direction, tuple(sites), strength=[0.7] * len(sites)),))
    export_folder(place / "model", plan, place / "export")
    return place


def reproduced(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, dict[str, Any]]:
    status = main(["--quiet", "reproduce", *map(str, arguments)])
    return status, json.loads(capsys.readouterr().out)


def test_from_the_manifest_to_the_same_bytes(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    status, result = reproduced(capsys, exported / "export", "--out", out)
    assert status == 0 and result["same"] and result["differ"] == []
    assert result["circumstances"] == [] and result["from"] == "the plan"
    files = sorted((exported / "export").glob("*.safetensors"))
    assert files
    for file in files:  # an oracle of its own: whole files
        assert file.read_bytes() == (out / "export" / file.name).read_bytes()
        assert result["tensors"] == len(load_file(file)) or len(files) > 1
    moved = tmp_path / "elsewhere"
    shutil.copytree(exported / "model", moved)
    assert reproduced(capsys, exported / "export", "--model", moved)[0] == 0


def changed(exported: Path, tmp_path: Path, name: str, part: str = "export") -> Path:
    """A copy of both folders, in which one tensor's first element is another."""
    place = tmp_path / "copy"
    shutil.copytree(exported, place)
    (file,) = (place / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return place


def test_what_differs_is_said(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(exported / "export")
    name = (
        manifest["edited"][0]
        if isinstance(manifest["edited"], list)
        else next(iter(manifest["edited"]))
    )
    place = changed(exported, tmp_path, name)
    status, result = reproduced(capsys, place / "export", "--model", place / "model")
    assert status == 1 and not result["same"]
    (difference,) = result["differ"]
    assert difference["name"] == name and difference["elements"] == 1
    assert difference["largest_difference"] == pytest.approx(0.5, abs=1e-3)


def test_another_source_is_told_by_what_the_plan_leaves_alone(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = read_manifest(exported / "export")["unchanged"][0]
    place = changed(exported, tmp_path, name, "model")
    status, result = reproduced(capsys, place / "export", "--model", place / "model")
    assert status == 1 and [each["name"] for each in result["differ"]] == [name]
    assert name in result["reasons"][0] and "leaves alone" in result["reasons"][0]


def test_versions_and_digests(exported: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(exported, place)
    path = place / "export" / "interp_ablate.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "0.4.1"
    found = compare(manifest, place / "export", exported / "export")
    assert found.same and len(found.circumstances) == 1
    assert found.circumstances[0].startswith("torch: 0.4.1 there, ")
    from interp_ablate.storage.provenance import weight_digests

    digests = weight_digests(exported / "export")
    (place / "export" / "certificate.json").write_text(json.dumps({"files": digests}))
    for file in (place / "export").glob("*.safetensors*"):
        file.unlink()
    found = compare(manifest, place / "export", exported / "export")
    assert found.same and set(found.files) == set(digests)
    (place / "export" / "certificate.json").write_text(
        json.dumps({"files": dict.fromkeys(digests, "0")})
    )
    found = compare(manifest, place / "export", exported / "export")
    assert not found.same and "another machine" in found.reasons[0]


def test_bad_input_is_said_before_any_work(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ((tmp_path / "gone",), "cannot read"),
        ((exported / "model",), "interp_ablate.json"),
        ((exported / "export", "--from-prompts"), "does not say which run"),
        ((exported / "export", "--positive", "x"), "--from-prompts"),
        ((exported / "export", "--device", "cpu"), "--from-prompts"),
        ((exported / "export", "--out", exported / "model"), "holds the source"),
        ((exported / "export", "--out", exported / "export" / "x"), "is inside the source"),
    ):
        assert main(["--quiet", "reproduce", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert said in message and "Traceback" not in message, message


def test_a_damaged_manifest_is_refused_in_words(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((exported / "export" / "interp_ablate.json").read_text())
    run = {"configuration": {"model": "m", "contrast": "declining"}, "made_of": {}}
    damages: list[dict[str, Any]] = [
        {"source": "x"}, {"source": {}}, {"versions": []}, {"plan": []}, {"tied": ["x"]}, {"run": "x"},
        {"run": {"configuration": run["configuration"]}}, {"run": run | {"search": {"foo": 1}}},
        {"run": run | {"search": {"minutes": "x"}}}, {"run": run | {"search": {"trials": 3}, "round_size": "x"}},
        {"run": {"configuration": []}},
    ]  # fmt: skip
    for damage in damages:
        path = tmp_path / "interp_ablate.json"
        path.write_text(json.dumps(manifest | damage))
        more = ("--from-prompts", "--model", str(exported / "model")) if "run" in damage else ()
        assert main(["--quiet", "reproduce", str(path), *more]) == 2, damage
        message = capsys.readouterr().err
        assert "Traceback" not in message and len(message.strip().splitlines()) == 1, message


def test_a_plan_that_is_another_is_what_differs(exported: Path, tmp_path: Path) -> None:
    """A run that chose another plan does not speak against the source's weights."""
    export_folder(exported / "model", other := Plan(), tmp_path / "again")
    found = compare(
        read_manifest(exported / "export"), exported / "export", tmp_path / "again", other
    )
    assert not found.same and "chose another plan" in found.reasons[0]


def test_a_published_run_names_no_place_of_this_machine() -> None:
    run = {
        "configuration": {
            "model": "~/models/m", "contrast": None, "positive": "/home/me/my sets/yes.txt",
            "negative": "C:\\Users\\me\\no.txt", "expressions": "declining", "system": "Answer yes / no. </end>",
            "scorer": "judge:/home/me/big@http://10.0.0.3:8000/v1?key=1", "rubric": "0: / 100: //", "seed": 3,
        },
        "made_of": {"contrast": "abc", "expressions": {"expressions": ["private"]}},
        "search": {"objective": ["own=max:/x/y/own.py:f", "judge:m@http://h/v1/x<=0.2", "kl"], "stop_at": None},
    }  # fmt: skip
    assert _public_run(run) == {
        "configuration": {
            "model": "m", "template": None, "contrast": None, "positive": "yes.txt", "negative": "no.txt",
            "expressions": "declining", "system": "Answer yes / no. </end>", "scorer": "judge:big",
            "rubric": "0: / 100: //", "seed": 3,
        },
        "made_of": {"contrast": "abc"},
        "search": {"objective": ["own=max:own.py:f", "judge:m<=0.2", "kl"], "stop_at": None},
    }  # fmt: skip
    assert _without_places("./runs/yes.txt") == "./runs/yes.txt"
    assert _without_places("https://h/a/b.csv") == "https://h/a/b.csv"
    assert _without_places("file:///home/me/x") == "file:x"


def test_a_run_from_its_prompts_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts by fingerprint: moved they are the same, changed they are refused before any work."""
    write_task(tmp_path)
    (tmp_path / "anything.txt").write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))
    run = tmp_path / "run"
    flags = [
        *("--model", tmp_path / "model", "--expressions", tmp_path / "anything.txt"),
        *("--positive", tmp_path / "yes.txt", "--negative", tmp_path / "no.txt"),
        *(
            "--n-train",
            8,
            "--n-validation",
            6,
            "--n-test",
            6,
            "--max-new-tokens",
            5,
            "--max-kl",
            50,
        ),
        *(
            "--trials",
            4,
            "--minutes",
            1e-5,
        ),  # too few for a fit, which is then not made again either
    ]
    pytest.importorskip("optuna")
    monkeypatch.setattr(search_run, "AT_ONCE", 2)  # rounds of another size, as several workers draw
    assert main(["--quiet", "search", *map(str, flags), "--out", str(run)]) == 0
    monkeypatch.undo()
    assert main(["--quiet", "export", str(run)]) == 0
    manifest = json.loads((run / "export" / "interp_ablate.json").read_text())
    assert manifest["run"]["search"]["trials"] == 4 and manifest["run"]["round_size"] == 2
    assert list(manifest["run"]["fit_rounds"].values()) == [0]
    made_of = manifest["run"]["made_of"]
    assert all(isinstance(value, str) for value in made_of.values()) and "expressions" in made_of
    manifest["run"]["configuration"]["device"] = "cuda"  # made on a machine that is not here
    (run / "export" / "interp_ablate.json").write_text(json.dumps(manifest))
    moved = tmp_path / "moved.txt"
    (tmp_path / "yes.txt").rename(moved)
    places = ("--positive", moved, "--negative", tmp_path / "no.txt", "--device", "cpu")
    capsys.readouterr()
    out = tmp_path / "again"
    status, result = reproduced(capsys, run / "export", "--from-prompts", *places, "--out", out)
    assert status == 0 and result["same"] and result["from"] == "the prompts", result
    chosen = [
        json.loads((each / "selected.json").read_text())["plan"] for each in (run, out / "run")
    ]
    assert chosen[0] == chosen[1]
    again = json.loads((out / "run" / "run.json").read_text())
    assert again["search"]["round_size"] == 2
    _refused(manifest, run, places, tmp_path, capsys)
    moved.write_text(moved.read_text() + "\norder one thing more")
    last = tmp_path / "last"
    arguments = ["reproduce", run / "export", "--from-prompts", *places, "--out", last]
    assert main(["--quiet", *map(str, arguments)]) == 2
    assert "the prompts differ from the export's" in capsys.readouterr().err and not last.exists()


def _refused(
    manifest: Any,
    run: Path,
    places: tuple[Any, ...],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A manifest's own file of Python is not run; an objective that is scored by something else is said."""
    ran, own = place / "ran", place / "own.py"
    own.write_text(f"open({str(ran)!r}, 'w').close()\ndef f(answer):\n    return 1.0\n")
    code = manifest["run"]["search"] | {"objective": [f"own={own}:f", "kl"]}
    path, last = place / "interp_ablate.json", place / "refused"
    made_of = manifest["run"]["made_of"]
    without_rendering = {k: v for k, v in made_of.items() if k != "rendering"}
    for change, said in (
        ({"made_of": {"interp-ablate": made_of["interp-ablate"]}}, "made_of has no 'contrast'"),
        ({"made_of": without_rendering}, "made_of has no 'rendering'"),
        ({"search": code}, "only where a person names it"),
        ({"objectives": "0" * 64}, "what scores the search's objectives differs"),
    ):
        path.write_text(json.dumps(manifest | {"run": manifest["run"] | change}))
        arguments = ["reproduce", path, "--from-prompts", *places, "--out", last]
        assert main(["--quiet", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert said in message and "Traceback" not in message, message
        assert not last.exists() and not ran.exists()
