"""`tokens`: from a file of directions to a page, a table and a heat map; and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import N_LAYERS, tiny, unit

from interp_ablate import (
    Ablate,
    Direction,
    Directions,
    Plan,
    Site,
    load_model,
    sites_of,
    token_projections,
)
from interp_ablate.cli.main import main
from interp_ablate.plots.run_figures import save_figures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, its directions at two points and a plan."""
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sites = sites_of(("resid_pre", "resid_post"), range(N_LAYERS))
    items = [Direction(unit(k), 1.0, site) for k, site in enumerate(sites)]
    items += [
        Direction(unit(9), 1.0, sites[1], "-2"),
        Direction(unit(8), 1.0, sites[1], method="pca"),
    ]
    Directions(tuple(items)).save(tmp_path / "run" / "directions.safetensors")
    Plan(Ablate(unit(1), [Site(0, "embed")])).save(tmp_path / "plan.json")
    return tmp_path


def test_the_page_the_table_and_the_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, model = folder / "run" / "directions.safetensors", str(folder / "model")
    assert main(["tokens", str(file), "Hi <b>", "--model", model, "--max-new-tokens", "3"]) == 0
    page, picture, table = map(Path, capsys.readouterr().out.split())
    assert page == folder / "run" / "tokens.html" and "&lt;" in page.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")
    frame = pd.read_csv(table, keep_default_na=False)
    directions = Directions.load(file).where(sites_of(("resid_post",), range(N_LAYERS)))
    want = token_projections(
        load_model(model), "Hi <b>", [d for d in directions if d.is_of("-1", "difference_in_means")],
        max_new_tokens=3,
    )  # fmt: skip
    assert set(frame["point"]) == {"resid_post"} and len(frame) == want.values.numel()
    got = torch.tensor(frame["projection"].to_numpy()).view_as(want.values)
    torch.testing.assert_close(got, want.values, atol=1e-9, rtol=0)
    assert "response" in set(frame["part"]) and "".join(want.to_frame()["token"]) == "".join(
        frame["token"]
    )
    picture.unlink()
    assert save_figures(folder / "run")[-1].name == "tokens.png"  # `plot` draws it again
    flags = [
        "--model",
        model,
        "--plan",
        str(folder / "plan.json"),
        "--response",
        "",
        "--point",
        "resid_pre",
    ]
    assert main(["tokens", str(file), "Hi", *flags, "--out", str(folder / "other")]) == 0
    edited = pd.read_csv(folder / "other" / "tokens.csv", keep_default_na=False)
    assert "response" not in set(edited["part"]) and set(edited["point"]) == {"resid_pre"}


def test_what_is_not_there_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "run" / "directions.safetensors")
    for line, said in (
        (["tokens", str(folder / "run"), "Hi"], "it is not a run folder"),
        (["tokens", str(folder / "none.safetensors"), "Hi"], "none.safetensors"),
        (["tokens", file, "Hi"], "--model"),
        (
            ["tokens", file, "Hi", "--point", "resid_mid", "--model", "m"],
            "--point takes resid_pre, resid_post",
        ),
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
    assert not (folder / "run" / "tokens.html").exists()
