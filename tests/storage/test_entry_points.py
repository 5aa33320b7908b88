"""Entry points of other packages: found by name, loaded late, a failing one named."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.storage.entry_points import entry_named, entry_names, entry_points_of

GROUP = "interp_ablate.scorers"


def install(place: Path, package: str, *entries: str, group: str = GROUP) -> None:
    """Make a folder on the path look like an installed distribution."""
    info = place / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join((f"[{group}]", *entries)) + "\n")


def test_an_entry_of_another_package_is_found_and_loaded(tmp_path, monkeypatch):
    install(tmp_path, "outside", "polite = outside_scorers:polite")
    (tmp_path / "outside_scorers.py").write_text("polite = 'the scorer'\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = entry_points_of(GROUP)["polite"]
    assert (entry.package, entry.target) == ("outside", "outside_scorers:polite")
    assert entry.load() == "the scorer"
    assert entry_points_of("interp_ablate.nothing") == {}


def test_listing_imports_nothing_and_a_failing_entry_is_named(tmp_path, monkeypatch):
    install(tmp_path, "outside", "broken = outside_broken:thing")
    (tmp_path / "outside_broken.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = entry_points_of(GROUP)["broken"]
    with pytest.raises(InterpAblateError, match=r"outside registers 'broken'.*no licence"):
        entry.load()


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch):
    install(tmp_path, "one", "same = one:thing")
    install(tmp_path, "two", "same = two:thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InterpAblateError, match="both register 'same'"):
        entry_points_of(GROUP)


def test_a_built_in_name_goes_first_and_an_unknown_one_lists_all(tmp_path, monkeypatch):
    install(tmp_path, "outside", "polite = outside_named:it", "rude = outside_named:it")
    (tmp_path / "outside_named.py").write_text("it = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = partial(entry_named, built_in={"rude": 1}, group=GROUP, what="scorer", error=RunError)
    assert entry_names({"rude": 1}, GROUP) == ["rude", "polite"]
    assert (named("rude"), named("polite")) == (1, 3)
    with pytest.raises(
        RunError, match=r"unknown scorer 'odd': accepted are rude, polite, so there"
    ):
        named("odd", advice=", so there")
    with pytest.raises(RunError, match=r"outside registers 'polite'.*a int: a str is needed"):
        named("polite", kind=str)
