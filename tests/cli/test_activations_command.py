"""`activations`: every token's activations of prompts as a folder of shards; what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import folder_of

from interp_ablate.activations.collection import collect
from interp_ablate.activations.token_activations import TokenActivations
from interp_ablate.cli.main import main
from interp_ablate.models.load import load_model


def test_it_streams_what_collect_gives_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("one line\nanother, longer line\n")
    arguments = ["--quiet", "activations", "hello there", f"@{tmp_path / 'prompts.txt'}"]
    arguments += ["--model", str(tmp_path / "model"), "--sites", "resid_post,mlp_out"]
    arguments += ["--layers", "1-2", "--out", str(tmp_path / "kept")]
    assert main(arguments) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == tmp_path / "kept"
    kept = TokenActivations.load(folder)
    prompts = ["hello there", "one line", "another, longer line"]
    assert kept.prompts == tuple(prompts) and len(kept.sites) == 4
    model = load_model(str(tmp_path / "model"))
    for site in kept.sites:
        for mine, theirs in zip(kept.at(site), collect(model, prompts, site, positions="all").at(site)):  # fmt: skip
            torch.testing.assert_close(mine, theirs)

    (shard,) = folder.glob("shard-*")
    (folder / "tokens.json").unlink()  # killed before the last file
    written = shard.stat().st_mtime_ns
    assert main(arguments) == 0 and (folder / "tokens.json").exists()
    assert shard.stat().st_mtime_ns == written
    answers = [*arguments, "--tokens", "response", "--stored-dtype", "bfloat16"]
    assert main(answers) == 0
    other = TokenActivations.load(capsys.readouterr().out.split()[-1])
    assert {token.part for row in other.tokens for token in row} == {"response"}
    assert other.at(kept.sites[0])[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("unknown site 'resid_pots'", ["--sites", "resid_pots"]),
        ("--layers 0-99", ["--layers", "0-99"]),
        ("nowhere.txt", ["@nowhere.txt"]),
        ("cannot write into", ["--out", "{file}/x"]),
        ("is in the model's folder", ["--out", "{model}/kept"]),
        ("is in the model's folder", ["--out", "{model}"]),
    ],
)
def test_one_message_on_bad_input(
    said: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "model")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    more = [word.format(file=tmp_path / "file", model=tmp_path / "model") for word in more]
    more += [] if "--out" in more else ["--out", str(tmp_path / "kept")]
    assert main(["activations", "hello", *more, "--model", str(tmp_path / "model")]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told.splitlines()[-1] and told.count("interp-ablate activations:") == 1
    assert sorted(tmp_path.rglob("*")) == before
