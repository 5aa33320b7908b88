"""The flags that say how a model is loaded reach the loader, from every command over a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import folder_of, make_tokenizer, tiny

from interp_ablate.cli.main import main
from interp_ablate.directions.direction import Direction, Separation
from interp_ablate.directions.direction_set import Directions
from interp_ablate.errors import ModelError
from interp_ablate.models.load import _notes, load_model
from interp_ablate.runs.configuration import Configuration
from interp_ablate.runs.run_folder import FORMAT
from interp_ablate.runs.trial_session import make_worker
from interp_ablate.sites import Site


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every model that is requests for; none is loaded."""
    options: list[dict[str, Any]] = []

    def load_model(name: str, **loading: Any) -> None:
        options.append(loading)
        raise ModelError(f"{name} is not loaded in this test")

    monkeypatch.setattr("interp_ablate.models.load.load_model", load_model)
    return options


@pytest.mark.parametrize("command", ["run", "search", "collect", "directions", "sweep"])
def test_trust_remote_code_reaches_the_loader(
    command: str, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ["--model", "smollm2", "--contrast", "declining", "--out", str(out)]
    assert main(["--quiet", command, *arguments, "--trust-remote-code"]) == 2
    assert requests[-1]["trust_remote_code"] is True
    assert not (out / "run.json").exists()  # nothing was done
    # a folder never asks for it: neither one of this package, nor one that somebody else wrote
    asked = Configuration(model="smollm2", contrast="declining", trust_remote_code=True)
    state: dict[str, Any] = {"format": FORMAT, "made_of": {}, "stages": {}, "notes": []}
    state["configuration"] = asked.to_dict()
    assert "trust_remote_code" not in state["configuration"]
    state["configuration"]["trust_remote_code"] = True
    out.mkdir(exist_ok=True)
    (out / "run.json").write_text(json.dumps(state))
    assert main(["--quiet", "collect", "--out", str(out)]) == 2
    assert requests[-1]["trust_remote_code"] is False


@pytest.mark.parametrize("command", ["circuit", "explore"])
def test_a_folder_that_is_looked_at_grants_no_permission(
    command: str, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Before, `explore` took a permission that somebody had written into run.json."""
    if command == "explore":
        pytest.importorskip("uvicorn")
    sizes = {"n_train": 64, "n_validation": 32, "n_test": 32}
    asked = Configuration(model="smollm2", contrast="declining", **sizes).to_dict()
    state: dict[str, Any] = {"format": FORMAT, "made_of": {}, "stages": {}, "notes": []}
    state["configuration"] = {**asked, "trust_remote_code": True}
    (tmp_path / "run.json").write_text(json.dumps(state))
    measured = Separation(0.9, 2.0)
    one = Direction(torch.eye(8)[0], 1.0, Site(0, "resid_post"), separation=measured)
    Directions((one,)).save(tmp_path / "directions.safetensors")
    assert main(["--quiet", command, str(tmp_path)]) == 2
    assert [each["trust_remote_code"] for each in requests] == [False]


def test_a_worker_loads_the_model_as_the_run_does(
    requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    configuration = Configuration(model="smollm2", contrast="declining", trust_remote_code=True)
    assert "trust_remote_code" not in configuration.to_dict()
    with pytest.raises(ModelError):
        make_worker(configuration, str(tmp_path / "run"))
    assert requests[-1]["trust_remote_code"] is True


def test_what_matters_of_a_loaded_model_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "chat")
    load_model(tmp_path / "chat")
    assert not caplog.messages
    folder_of(tmp_path / "raw")
    make_tokenizer(None).save_pretrained(tmp_path / "raw")
    (tmp_path / "raw" / "chat_template.jinja").unlink(missing_ok=True)
    load_model(tmp_path / "raw", template="none")
    assert not caplog.messages
    load_model(tmp_path / "raw", dtype="bfloat16")
    rounded, raw = caplog.messages
    assert "raw runs in bfloat16: first-token KLs" in rounded and "no chat template" in raw
    caplog.clear()
    monkeypatch.setattr("interp_ablate.models.load._LARGE", 1000)
    load_model(tmp_path / "chat")
    assert [said for said in caplog.messages if "GB in float32" in said]


def test_one_part_in_16_bits_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the first parameter is in."""
    for half in ("embed_tokens", "norm"):
        hf, tokenizer = tiny("llama")
        for name, parameter in hf.named_parameters():
            if half in name:
                parameter.data = parameter.data.bfloat16()
        model = SimpleNamespace(tl=hf, dtype=next(hf.parameters()).dtype, tokenizer=tokenizer)
        (note,) = _notes(model, None)  # type: ignore[arg-type]
        assert note.startswith("runs in bfloat16:")
