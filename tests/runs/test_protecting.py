"""`directions --protect` on a tiny model: what it leaves, that it is SRA, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_task import write_task

from interp_ablate import ContrastSet, collect, load_model
from interp_ablate.cli.main import main
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.mean_difference import estimate_directions


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("protect")
    write_task(place)
    for name, (first, second) in {"tense": ("went", "go"), "number": ("two", "one")}.items():
        lines = [
            f'{{"positive": "they {first} {i}", "negative": "they {second} {i}"}}' for i in range(9)
        ]
        (place / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place


def flags(task: Path, out: Path) -> list[str]:
    sides = ["--positive", str(task / "yes.txt"), "--negative", str(task / "no.txt")]
    sizes = ["--n-train", "8", "--n-validation", "4", "--n-test", "4", "--sites", "resid_post"]
    return [
        "--quiet",
        "directions",
        "--model",
        str(task / "model"),
        *sides,
        *sizes,
        "--out",
        str(out),
    ]


def test_what_is_left_is_the_ridge_residual_of_the_runs_directions(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [str(task / f"{name}.jsonl") for name in ("tense", "number")]
    out = tmp_path / "run"
    assert main([*flags(task, out), "--protect", ",".join(sets), "--ridge", "0.5"]) == 0
    assert "3 directions without" in capsys.readouterr().out
    plain = Directions.load(out / "directions.safetensors").of("difference_in_means")
    clean = Directions.load(out / "protected" / "directions.safetensors")
    model = load_model(str(task / "model"))
    theirs = []
    for spec in sets:
        contrast = ContrastSet.load(spec)
        first = ContrastSet(spec, contrast.positive[:8], contrast.negative[:8], "test")
        theirs.append(estimate_directions(collect(model, first, [d.site for d in plain])))
    for before, after in zip(plain, clean, strict=True):
        a = np.stack([each[before.site].vector.numpy() for each in theirs], 1)
        raw = before.raw.numpy()
        w = np.linalg.solve(a.T @ a + 0.5 * np.eye(2), a.T @ raw)
        np.testing.assert_allclose(after.raw.numpy(), raw - a @ w, atol=1e-6)
        assert after.method == "difference_in_means_residualized" and after.separation is not None
    table = pd.read_csv(out / "protected" / "cosines.csv")
    assert len(table) == 6 and set(table.concept) == set(sets)

    # again, with nothing left along either: the stage is not repeated, the files are new
    made = (out / "directions.safetensors").stat().st_mtime_ns
    assert (
        main(
            [
                "--quiet",
                "directions",
                "--out",
                str(out),
                "--protect",
                ",".join(sets),
                "--ridge",
                "0",
            ]
        )
        == 0
    )
    assert (out / "directions.safetensors").stat().st_mtime_ns == made
    again = pd.read_csv(out / "protected" / "cosines.csv")
    assert again.cosine_after.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--protect", "no-such-set"], "no-such-set"),
        (["--protect", "{task}/tense.jsonl,{task}/tense.jsonl"], "twice"),
        (["--protect", "{task}/own.jsonl"], "this run's own contrast set"),
        (["--ridge", "1"], "--ridge is of --protect"),
        (["--protect", "sentiment", "--ridge", "-1"], "--ridge is at least 0"),
        (["--protect", "sentiment", "--ridge", "inf"], "finite"),
        (["--protect", ""], "--protect is empty"),
    ],
)
def test_refused_before_any_work(
    more: list[str], said: str, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yes, no = (
        (task / f"{name}.txt").read_text(encoding="utf-8").split("\n") for name in ("yes", "no")
    )
    own = "\n".join(f'{{"positive": "{a}", "negative": "{b}"}}' for a, b in zip(yes, no))
    (task / "own.jsonl").write_text(own, encoding="utf-8")
    out = tmp_path / "run"
    status = main([*flags(task, out), *(each.format(task=task) for each in more)])
    told = capsys.readouterr()
    assert status == 2 and said in told.err and "Traceback" not in told.err
    assert not out.exists()
