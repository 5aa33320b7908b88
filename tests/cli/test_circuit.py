"""`circuit`: the tables of a run's direction, from a folder with directions."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tiny import folder_of

from interp_ablate.cli.main import main
from interp_ablate.directions.direction_set import Directions, write_directions


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
                "--format",
                "pdf",
            ]
        )
        == 0
    )
    names = {path.name for path in (folder / "circuit").iterdir()}
    tables = {"attribution.csv", "lens.csv", "readers.csv", "path_patching.csv"}
    assert names == tables | {"attribution.pdf", "attribution_map.pdf"}
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


def test_a_direction_stands_beside_the_runs_own_and_those_of_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--quiet", "circuit", str(folder), "--site", "1.resid_post", "--n-patched", "0"]
    assert main([*quick, "--beside", str(folder)]) == 0
    own = Directions.load(folder / "directions.safetensors")
    table = pd.read_csv(folder / "circuit" / "beside.csv")
    assert len(table) == len(own) - 1 and table["null_low"].notna().all()
    direction = own["1.resid_post"]
    for name, cosine in zip(table["second"], table["cosine"]):
        (other,) = (item for item in own if item.name == name)
        assert cosine == pytest.approx(direction.cosine(other))
    assert "What it resembles" in capsys.readouterr().out
    assert main(["--quiet", "plot", str(folder)]) == 0
    assert (folder / "figures" / "beside.png").stat().st_size > 5000
    write_directions([own["2.resid_post"]], tmp_path / "other.safetensors")
    assert main([*quick, "--beside", str(tmp_path / "other.safetensors")]) == 0
    table = pd.read_csv(folder / "circuit" / "beside.csv")
    assert table["cosine"].item() == pytest.approx(direction.cosine(own["2.resid_post"]))


def test_a_direction_stands_beside_the_features_of_an_sae(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direction = Directions.load(folder / "directions.safetensors")["1.resid_post"]
    rows = torch.randn(50, len(direction.vector), generator=torch.Generator().manual_seed(0))
    rows[9] = 3 * direction.vector
    save_file({"W_dec": rows}, tmp_path / "sae_weights.safetensors")
    about = {"d_in": rows.shape[1], "d_sae": 50, "metadata": {"neuronpedia_id": "tiny/1-res"}}
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    quick = ["--quiet", "circuit", str(folder), "--site", "1.resid_post", "--n-patched", "0"]
    assert main([*quick, "--beside", str(tmp_path)]) == 0
    table = pd.read_csv(folder / "circuit" / "features.csv")
    assert table["feature"].iloc[0] == 9 and table["cosine"].iloc[0] == pytest.approx(1)
    assert table["address"].iloc[0].endswith("/tiny/1-res/9") and bool(table["outside"].iloc[0])
    assert "tiny/1-res/9" in capsys.readouterr().out
    save_file({"W_dec": rows[:, 1:].contiguous()}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text("{}")
    assert main([*quick, "--beside", str(tmp_path)]) == 2
    assert "streams of different widths" in capsys.readouterr().err
    assert main([*quick, "--beside", str(tmp_path / "none")]) == 2


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


def test_a_wrong_dpi_costs_no_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that draws refuses it before it loads anything."""
    for command in (["circuit", str(folder)], ["tokens", str(folder), "hello"]):
        assert main([*command, "--dpi", "0"]) == 2
        assert "dpi" in capsys.readouterr().err
    out = tmp_path / "cost"
    assert main(["evaluate", "no-such", "none", "--out", str(out), "--dpi", "99999"]) == 2
    assert "dpi" in capsys.readouterr().err and not out.exists()
