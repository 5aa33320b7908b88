"""The folder that the bundled GGUF file is converted to once: the same model, and never a stale or changed one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from interp_ablate import load_model
from interp_ablate.models import converted_gguf, sources
from interp_ablate.models.converted_gguf import VARIABLE, converted_folder, is_whole


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundled_model: str) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def gguf() -> Path:
    return Path(sources.resolve("smollm2").path or "")


def test_a_second_load_reads_the_folder_and_is_the_same_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert converted_folder(gguf()) is None
    plain = load_model("smollm2", backend="hf")
    narrow = load_model("smollm2", backend="hf", dtype="bfloat16")
    assert not cache.exists()

    monkeypatch.setenv(VARIABLE, str(cache))
    load_model("smollm2", backend="hf", dtype="bfloat16")
    assert not cache.exists(), "only float32 holds what the file says"
    first = load_model("smollm2", backend="hf")
    folder = converted_folder(gguf())
    assert folder is not None and folder.parent.parent == cache and is_whole(folder)
    monkeypatch.setattr(sources, "check_gguf", None)  # would be called
    second = load_model("smollm2", backend="hf")
    assert plain.fingerprint == first.fingerprint == second.fingerprint
    assert plain.source == second.source
    assert load_model("smollm2", backend="hf", dtype="bfloat16").fingerprint == narrow.fingerprint
    assert plain.tl.hf.config.to_dict() == {
        **second.tl.hf.config.to_dict(),
        "architectures": None,  # which every folder names and no GGUF file
        "_name_or_path": plain.tl.hf.config.name_or_path,
    }


def test_a_folder_that_was_changed_is_made_anew(cache: Path) -> None:
    load_model("smollm2", backend="hf")
    folder = converted_folder(gguf())
    assert folder is not None
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert not is_whole(folder)
    load_model("smollm2", backend="hf")
    assert is_whole(folder)
    assert [place.name for place in folder.parent.iterdir()] == [folder.name]


def test_what_loads_differently_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sources._read

    def other(source: Any, *arguments: Any) -> Any:
        model, tokenizer = real(source, *arguments)
        if source.kind == "converted":
            with torch.no_grad():
                next(model.parameters())[-1, -1] += 1e-6
        return model, tokenizer

    monkeypatch.setattr(sources, "_read", other)
    load_model("smollm2", backend="hf")
    assert list((cache / "converted").iterdir()) == []


def test_a_place_that_cannot_be_written_changes_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder would be")
    assert load_model("smollm2", backend="hf").n_layers == 30
    assert cache.read_text() == "a file where the folder would be"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(converted_gguf.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert converted_folder(gguf()) is None
