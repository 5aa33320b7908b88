"""`circuit`: the tables of a run's direction, from a folder with directions."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tiny import folder_of

from interp_ablate.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("circuit")
    folder_of(place / "model", tied=False)
    for name, words in (("yes", "order bring fetch send"), ("no", "name list tell describe")):
        verbs = words.split()
        lines = [f"{verbs[i % 4]} number {i * 7 + 3} now" for i in range(16)]
        (place / f"{name}.txt").write_text("\n".join(lines))
    flags = ["--model", str(place / "model"), "--positive", str(place / "yes.txt")]
    flags += ["--negative", str(place / "no.txt"), "--n-train", "6", "--n-validation", "5"]
    assert (
        main(["--quiet", "directions", *flags, "--n-test", "5", "--out", str(place / "run")]) == 0
    )
    return place / "run"


def test_it_leaves_tables_and_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "--quiet",
                "circuit",
                str(folder),
                "--site",
                "1.resid_post",
                "--n-patched",
                "2",
                "--neurons",
                "2",
            ]
        )
        == 0
    )
    names = {path.name for path in (folder / "circuit").iterdir()}
    tables = {"attribution.csv", "lens.csv", "readers.csv", "path_patching.csv"}
    assert names == tables | {"attribution.png", "attribution_map.png"}
    terms = pd.read_csv(folder / "circuit" / "attribution.csv")
    assert {"embed", "L0.H3", "L1.mlp.others"} <= set(terms["term"])
    assert (terms["kind"] == "neuron").sum() == 2 and not terms["layer"].eq(2).any()
    frame = pd.read_csv(folder / "projections.csv")
    rows = frame[
        (frame["split"] == "validation") & (frame["layer"] == 1) & (frame["point"] == "resid_post")
    ]
    means = rows.groupby("label")["projection"].mean()
    assert terms["difference"].sum() == pytest.approx(
        means["positive"] - means["negative"], rel=1e-4
    )
    assert len(pd.read_csv(folder / "circuit" / "path_patching.csv")) == 6
    said = capsys.readouterr().out
    assert "What writes it" in said and "What reads it" in said and "random direction" in said


@pytest.mark.parametrize(
    "more, message",
    [
        (["--site", "9.resid_post"], "no direction at 9.resid_post"),
        (["--top", "0"], "--top is at least 1"),
        (["--neurons", "-1"], "--neurons at least 0"),
    ],
)
def test_what_it_cannot_do_is_said_in_words(
    folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quiet", "circuit", str(folder), *more]) == 2
    assert message in capsys.readouterr().err
    assert main(["circuit", str(folder.parent)]) == 2
