"""Sweep: the journal through every accident, candidates as data, trials against a bench of numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interp_ablate.candidates import Candidate, Trial, distinct, screening
from interp_ablate.directions import Direction, Directions
from interp_ablate.edits import Ablate, Add, Plan, band, everywhere
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.journal import Journal
from interp_ablate.sites import Point, Site
from interp_ablate.sweep import (
    FIT_DISTANCE,
    SCALES,
    bands,
    finalists,
    fitted,
    promising,
    run_trials,
    spread,
    to_frame,
)

D, N_LAYERS = 6, 8
WRITERS = everywhere(N_LAYERS)
IDENTITY = {"model": "abc", "max_kl": 0.1, "layers": [1, 2]}
BAND = Candidate(
    3, "resid_post", "-2", stage="refine", operation="band", attention_strength=1.2,
    attention_layer=3.5, mlp_strength=0.9, mlp_layer=2.0, width=2.5,
)  # fmt: skip


def direction(layer: int, point: Point = "resid_post", **kwargs: Any) -> Direction:
    generator = torch.Generator().manual_seed(layer)
    vector = torch.randn(D, generator=generator, dtype=torch.float64)
    return Direction(vector, 2.0, Site(layer, point), **kwargs)


FITTED = Candidate(
    5, "resid_mid", stage="refine", operation="fitted", budget=0.045, scale=1.1,
    strengths=tuple(i / 10 for i in range(2 * N_LAYERS + 1)),
)  # fmt: skip
METHODS = ("difference_in_means", "difference_in_means_orthogonalized")
DIRECTIONS = Directions(
    tuple(
        direction(layer, position=position, method=method)
        for layer in range(N_LAYERS)
        for position in ("-1", "-2")
        for method in METHODS
    )
)
PLAIN = DIRECTIONS.of(METHODS[0])


class FakeBench:
    """Numbers made from the plan's own JSON; counts how often it was asked."""

    def __init__(self, spoil: Callable[[Plan], dict[str, float]] = lambda plan: {}) -> None:
        self.model = SimpleNamespace(n_layers=N_LAYERS, writers=WRITERS)
        self.scored: list[Plan] = []
        self.added: list[Plan] = []
        self.spoil = spoil

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        self.scored.append(plan)
        number = int(plan.fingerprint[:6], 16) / 16**6
        found = {"behaviour": -number, "own_words": -9 * number, "kl": number / 5}
        found["kl_high"] = number / 4
        if generate:
            found |= {"expression_rate": number, "repetition": 0.1, "length": 9.0}
        return found | self.spoil(plan)

    def addition(self, plan: Plan) -> float:
        self.added.append(plan)
        return 1.0


def run(
    path: Path, bench: Any, candidates: Sequence[Candidate], directions: Directions = DIRECTIONS
) -> list[Trial]:
    journal = Journal(path, IDENTITY)
    with journal.open() as done:
        return run_trials(bench, directions, candidates, journal, done)


def trial(layer: int, **scores: float) -> Trial:
    return Trial(Candidate(layer, "resid_post"), scores or {"behaviour": layer / 3}, 0.25)


def write(path: Path, trials: Sequence[Trial]) -> None:
    journal = Journal(path, IDENTITY)
    with journal.open():
        for each in trials:
            journal.append(each)


def read(path: Path) -> dict[str, Trial]:
    with Journal(path, IDENTITY).open() as done:
        return dict(done)


# --------------------------------------------------------------------------------- candidates


def test_a_candidates_key_is_its_content() -> None:
    varied: dict[str, Any] = {
        "layer": 4, "point": "resid_mid", "position": "-1", "stage": "screen", "method": "random",
        "operation": "ablate", "attention_strength": 1.0, "attention_layer": 3.0,
        "mlp_strength": 0.5, "mlp_layer": 1.0, "width": 9.0,
    }  # fmt: skip
    assert set(varied) <= {field.name for field in fields(Candidate)}
    others = [replace(BAND, **{name: value}) for name, value in varied.items()]
    assert len({BAND.key, *(other.key for other in others)}) == len(varied) + 1
    assert replace(BAND).key == BAND.key
    assert Candidate(**json.loads(BAND.key)) == BAND
    assert BAND.site == Site(3, "resid_post")


def test_a_candidates_plan() -> None:
    found = direction(3)
    full = Candidate(3, "resid_post").plan(found, WRITERS)
    assert full == Plan((Ablate(found, WRITERS),))
    expected = band(found, N_LAYERS, attention=(1.2, 3.5), mlp=(0.9, 2.0), width=2.5)
    assert BAND.plan(found, WRITERS) == expected
    control = direction(5)  # another direction in its place: same sites, same strengths
    other = BAND.plan(control, WRITERS)
    assert other != expected and other.sites == expected.sites
    assert [edit.amounts for edit in other] == [edit.amounts for edit in expected]


def test_a_candidates_plan_is_at_the_writers_of_its_model() -> None:
    """Learned positions are ablated too; where a norm follows a projection, the projection is."""
    found = direction(3)
    positions = (Site(0, "embed"), Site(0, "pos_embed"), *WRITERS[1:])
    assert Candidate(3, "resid_post").plan(found, positions).sites == positions
    assert BAND.plan(found, positions) == BAND.plan(found, WRITERS)
    names: dict[str, Point] = {"attn_out": "attn_proj", "mlp_out": "mlp_proj", "embed": "embed"}
    projections = tuple(Site(site.layer, names[site.point]) for site in WRITERS)
    expected = [
        (tuple(Site(site.layer, names[site.point]) for site in edit.sites), edit.amounts)
        for edit in BAND.plan(found, WRITERS)
    ]
    assert [(e.sites, e.amounts) for e in BAND.plan(found, projections)] == expected
    (edit,) = FITTED.plan(found, projections)
    assert edit.sites == projections[1:]
    with pytest.raises(ValueError, match=r"shorter|longer"):  # strengths of another architecture
        FITTED.plan(found, positions)


@pytest.mark.parametrize(
    "given",
    [
        Trial(BAND, {"behaviour": 0.1 + 0.2, "kl": 1e-17}, 1 / 3),
        Trial(BAND, {}, 0.0, "failed", "not finite: kl"),
        trial(0),
    ],
)
def test_trials_survive_json(given: Trial) -> None:
    assert Trial.from_dict(json.loads(json.dumps(given.to_dict(), allow_nan=False))) == given


def test_candidates_survive_the_table() -> None:
    trials = [Trial(BAND, {"kl": 0.5}), trial(4), Trial(FITTED, {}, 0.0)]
    frame = to_frame(trials)
    assert [Candidate.from_row(row) for _, row in frame.iterrows()] == [t.candidate for t in trials]
    assert list(frame["trial"]) == [0, 1, 2]
    assert frame["kl"][0] == 0.5 and math.isnan(frame["kl"][1])
    assert set(asdict(BAND)) <= set(frame) and {"status", "reason", "seconds"} <= set(frame)


def test_distinct_leaves_out_what_the_layer_before_already_is() -> None:
    sites = [Site(layer, p) for layer in range(3) for p in ("resid_pre", "resid_mid", "resid_post")]  # type: ignore[arg-type]
    every = [direction(site.layer, site.point) for site in sites]
    kept = distinct(iter(every))
    left_out = {Site(1, "resid_pre"), Site(2, "resid_pre")}
    assert [item.site for item in kept] == [site for site in sites if site not in left_out]
    assert distinct(kept) == kept
    only_pre = [item for item in every if item.site.point == "resid_pre"]
    assert distinct(only_pre) == only_pre  # nothing they repeat is there


def test_screening_is_one_candidate_a_distinct_direction() -> None:
    found = screening(PLAIN)
    assert len({candidate.key for candidate in found}) == len(found) == 2 * N_LAYERS
    assert {(c.site, c.position) for c in found} == {(i.site, i.position) for i in PLAIN}
    assert {(c.stage, c.operation) for c in found} == {("screen", "ablate")}


def test_screening_keeps_the_method() -> None:
    found = screening(DIRECTIONS)
    assert {candidate.method for candidate in found} == set(METHODS)


# --------------------------------------------------------------------------------- the journal


def test_a_journal_is_a_header_and_a_line_a_trial(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trials.jsonl"
    trials = [trial(0), Trial(BAND, {"kl": 0.1 + 0.2}, 1.5), Trial(BAND, {}, 0.0, "failed", "why")]
    write(path, trials[:2])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"format": "interp_ablate.journal/1", **IDENTITY} and len(lines) == 3
    assert read(path) == {each.candidate.key: each for each in trials[:2]}
    before = path.read_bytes()
    assert read(path) and path.read_bytes() == before  # reading changes nothing
    write(path, trials[2:])
    assert path.read_bytes().startswith(before)
    assert read(path)[BAND.key] == trials[2]  # the last word on a candidate


def test_a_trial_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, IDENTITY)
    with journal.open():
        for layer in range(3):
            journal.append(trial(layer))
            assert len(path.read_text().splitlines()) == layer + 2


def test_resume_after_every_possible_torn_end(tmp_path: Path) -> None:
    """Killed after any byte: whole trials are kept, the torn one is run again, the file is sound."""
    path = tmp_path / "trials.jsonl"
    trials = [trial(0), trial(1)]
    write(path, trials)
    whole = path.read_bytes()
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        finished = max(whole[:length].count(b"\n") - 1, 0)
        assert list(read(path).values()) == trials[:finished]
        write(path, trials[finished:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "content"),
    [
        (1, b"not JSON"),
        (1, b"[]"),
        (1, b'{"format": "interp_ablate.journal/0"}'),
        (2, b"{"),
        (3, b'"text"'),
        (3, b""),
        (2, b"\xff\xfe"),
        (2, b'{"scores": {}}'),
        (3, b'{"candidate": {"layer": 1}}'),
        (3, b'{"candidate": {"layer": 1, "point": "resid_pre", "depth": 2}}'),
        (2, b'{"candidate": 3}'),
        (2, b'{"candidate": {"layer": 1, "point": "resid_pre"}, "colour": "red"}'),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, line: int, content: bytes) -> None:
    path = tmp_path / "trials.jsonl"
    write(path, [trial(0), trial(1), trial(2)])
    lines = path.read_bytes().splitlines()
    lines[line - 1] = content
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    with pytest.raises(RunError, match=rf"trials\.jsonl, line {line}: .*[Dd]elete"):
        read(path)
    assert path.read_bytes() == before  # a corrupt journal is left as it is, to be looked at


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    write(path, [trial(0)])
    before = path.read_bytes()
    for change in ({"model": "other"}, {"layers": [1]}, {"seed": 1}):
        with (
            pytest.raises(RunError, match=rf"another sweep.*{next(iter(change))}") as caught,
            Journal(path, IDENTITY | change).open(),
        ):
            pass
        others = set(IDENTITY) - set(change)
        assert not any(f" {other}" in str(caught.value).split(":")[-1] for other in others)
    assert path.read_bytes() == before and len(read(path)) == 1


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    with (
        Journal(path, IDENTITY).open(),
        pytest.raises(RunError, match=r"in use by another process.*--out"),
        Journal(path, IDENTITY).open(),
    ):
        pass
    assert read(path) == {}
    with pytest.raises(KeyError), Journal(path, IDENTITY).open():
        raise KeyError  # whatever ends the block, the journal is free again
    assert read(path) == {}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "trials.jsonl", tmp_path):
        with pytest.raises(RunError, match="cannot write the journal"), Journal(path, {}).open():
            pass


@pytest.mark.parametrize("room", [0, 20], ids=["header", "trial"])
def test_a_full_disk(tmp_path: Path, room: int) -> None:
    """A limit on the file's size stands in for the disk; the torn line must not survive either."""
    path = tmp_path / "trials.jsonl"
    size = 0
    if room:
        write(path, [trial(0)])
        size = path.stat().st_size
    code = (
        "import resource, signal, sys\n"
        "from interp_ablate.errors import RunError\n"
        "from interp_ablate.sweep import Candidate, Journal, Trial\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + room}, resource.RLIM_INFINITY))\n"
        "try:\n"
        f"    journal = Journal({str(path)!r}, {IDENTITY!r})\n"
        "    with journal.open():\n"
        "        journal.append(Trial(Candidate(1, 'resid_pre')))\n"
        "except RunError as error:\n"
        "    sys.exit(0 if 'cannot write the journal' in str(error) else 3)\n"
        "sys.exit(4)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=root)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read(path)) == (1 if room else 0)


def test_an_identity_may_hold_tuples(tmp_path: Path) -> None:
    for _ in range(2):
        with Journal(tmp_path / "trials.jsonl", {"layers": (1, 2)}).open() as done:
            assert done == {}


# --------------------------------------------------------------------------------- trials


def test_every_candidate_is_scored_once_in_order(tmp_path: Path) -> None:
    bench = FakeBench()
    seen: list[Trial] = []
    candidates = screening(PLAIN)
    journal = Journal(tmp_path / "trials.jsonl", IDENTITY)
    with journal.open() as done:
        trials = run_trials(bench, DIRECTIONS, candidates, journal, done, on_trial=seen.append)  # type: ignore[arg-type]
    assert [each.candidate for each in trials] == candidates and seen == trials
    assert read(journal.path) == {each.candidate.key: each for each in trials}
    plans = [c.plan(DIRECTIONS[c.site, c.position], WRITERS) for c in candidates]
    assert bench.scored == plans
    expected = [Plan((Add(DIRECTIONS[c.site, c.position], c.site),)) for c in candidates]
    assert bench.added == expected  # screening also adds, at the direction's own site
    assert all(each.status == "ok" and each.scores["addition"] == 1.0 for each in trials)


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path, candidates = tmp_path / "trials.jsonl", screening(PLAIN)

    class Killed(FakeBench):
        def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
            if len(self.scored) == 5:
                raise KeyboardInterrupt
            return super().score(plan, generate=generate)

    first = Killed()
    with pytest.raises(KeyboardInterrupt):
        run(path, first, candidates)
    second = FakeBench()
    trials = run(path, second, candidates)
    assert len(first.scored) == 5 and len(second.scored) == len(candidates) - 5
    assert not set(first.scored) & set(second.scored)
    third = FakeBench()
    assert run(path, third, candidates) == trials and third.scored == third.added == []
    uninterrupted = run(tmp_path / "other.jsonl", FakeBench(), candidates)
    assert [t.scores for t in uninterrupted] == [t.scores for t in trials]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_failed_trial(tmp_path: Path, bad: float) -> None:
    path, candidates = tmp_path / "trials.jsonl", screening(PLAIN)[:3]
    spoiled = candidates[1].plan(PLAIN.items[1], WRITERS)
    bench = FakeBench(lambda plan: {"kl": bad} if plan == spoiled else {})
    trials = run(path, bench, candidates)
    assert [each.status for each in trials] == ["ok", "failed", "ok"]
    assert trials[1].reason == "not finite: kl" and "kl" not in trials[1].scores
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert list(read(path).values()) == trials
    assert run(path, FakeBench(), candidates) == trials  # a failure is a result: not run again
    assert to_frame(trials)["status"].tolist() == ["ok", "failed", "ok"]


def test_a_model_that_breaks_is_a_failed_trial(tmp_path: Path) -> None:
    def broken(plan: Plan) -> dict[str, float]:
        raise InterpAblateError("first-token logits hold NaN")

    [failed] = run(tmp_path / "trials.jsonl", FakeBench(broken), screening(PLAIN)[:1])
    assert (failed.status, failed.reason) == ("failed", "first-token logits hold NaN")


def test_a_direction_that_is_not_there_is_a_failed_trial(tmp_path: Path) -> None:
    candidates = screening(PLAIN)[:2]
    missing = replace(candidates[0], method="difference_in_means_orthogonalized")
    bench = FakeBench()
    trials = run(tmp_path / "trials.jsonl", bench, [missing, *candidates], PLAIN)
    assert [each.status for each in trials] == ["failed", "ok", "ok"]
    assert "no direction at" in trials[0].reason and len(bench.scored) == 2


# --------------------------------------------------------------------------------- the search


def screened(path: Path) -> Any:
    frame = to_frame(run(path, FakeBench(), screening(PLAIN)))
    return frame.assign(behaviour_baseline=0.0, own_words_baseline=0.0, addition_baseline=0.0)


def test_promising_directions_work_both_ways(tmp_path: Path) -> None:
    frame = screened(tmp_path / "trials.jsonl")
    frame.loc[0, "status"] = "failed"
    frame.loc[1, "addition"] = -1.0
    found = promising(frame, n=4)
    assert len(found) == len(set(found)) == 4
    known = {(c.layer, c.point, c.position) for c in screening(PLAIN)}
    assert set(found) <= known
    for row in (0, 1):
        gone = (frame["layer"][row], frame["point"][row], frame["position"][row])
        assert gone not in promising(frame, n=99)


def search(path: Path, bench: FakeBench, frame: Any, *, seed: int = 0) -> list[Trial]:
    return run(path, bench, bands(promising(frame), N_LAYERS, seed=seed))


def test_bands_follow_from_the_seed(tmp_path: Path) -> None:
    sources = promising(screened(tmp_path / "screen.jsonl"))
    drawn = bands(sources, N_LAYERS, seed=0)
    assert drawn == bands(sources, N_LAYERS, seed=0) != bands(sources, N_LAYERS, seed=1)
    assert len({candidate.key for candidate in drawn}) == len(drawn)
    assert {(c.layer, c.point, c.position) for c in drawn} <= set(sources)


def test_fits_are_of_directions_that_are_layers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_ablate.sweep.N_FITS", 2)
    sources = [(10, "resid_post", "-1"), (11, "resid_mid", "-1"), (9, "resid_mid", "-1")]
    assert spread(sources) == sources[:1]
    far = (10 + FIT_DISTANCE, "resid_mid", "-1")
    assert spread([*sources, far]) == [sources[0], far]


def test_a_fit_is_made_once_and_resumed_from_the_journal(tmp_path: Path) -> None:
    fits: list[float] = []

    def fit(found: Direction, budget: float) -> tuple[float, ...]:
        fits.append(budget)
        return FITTED.strengths or ()

    source, path = (5, "resid_post", "-1"), tmp_path / "a.jsonl"
    journal = Journal(path, IDENTITY)
    for _ in range(2):
        with journal.open() as done:
            candidates = fitted(source, DIRECTIONS, done, fit, max_kl=0.1)
            assert [c.scale for c in candidates] == list(SCALES)
            assert {c.strengths for c in candidates} == {FITTED.strengths}
            run_trials(FakeBench(), DIRECTIONS, candidates[:2], journal, done)  # type: ignore[arg-type]
    assert len(fits) == 1


def test_a_fitted_plan_is_the_scaled_strengths() -> None:
    plan = FITTED.plan(direction(5), WRITERS)
    (edit,) = plan.edits
    want = {site: 1.1 * i / 10 for i, site in enumerate(WRITERS) if i}
    assert dict(zip(edit.sites, edit.amounts)) == pytest.approx(want)


def test_finalists_are_the_best_within_the_limit(tmp_path: Path) -> None:
    trials = search(tmp_path / "a.jsonl", FakeBench(), screened(tmp_path / "screen.jsonl"))
    found = finalists(trials, max_kl=0.1)
    assert found and {candidate.stage for candidate in found} == {"finalist"}
    by_key = {replace(t.candidate, stage="finalist").key: t for t in trials}
    assert all(by_key[candidate.key].scores["kl_high"] <= 0.1 for candidate in found)
    # where nothing is within the limit, the nearest to it, so that the report has something to show
    nearest = finalists(trials, max_kl=-1.0)
    least = min(t.scores["kl_high"] for t in trials)
    assert by_key[nearest[0].key].scores["kl_high"] == least


def test_nothing_to_refine_says_so(tmp_path: Path) -> None:
    frame = screened(tmp_path / "screen.jsonl").assign(status="failed", reason="NaN")
    with pytest.raises(RunError, match=rf"none of the {len(frame)} screened .*failed with: NaN"):
        promising(frame)
