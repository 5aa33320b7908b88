"""Sweep: the journal through every accident, candidates as data, trials against a bench of numbers.

The race of the screening by hand-made scores; the bench itself on a tiny model.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest
import tiny
import torch

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.edits.kinds import Ablate, Add, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.edits.presets import band, everywhere
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.evaluation.metrics import FirstTokenKL, TargetLogOdds, repetition
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.candidates import (
    Candidate,
    Trial,
    along_control_direction,
    distinct,
    scaled,
    screening,
)
from interp_ablate.search.journal import Journal
from interp_ablate.search.race import (
    FIT_DISTANCE,
    RUNGS,
    layers_apart,
    race_directions,
    rank_directions,
    removal_per_kl,
)
from interp_ablate.search.sweep import SCALES, bands, finalists, fitted, run_trial, run_trials
from interp_ablate.search.trial_table import to_frame
from interp_ablate.sites import Point, Site

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


FITTED = Candidate(5, "resid_mid", stage="refine", operation="fitted", fit="5-resid_mid", scale=1.1)
STRENGTHS = tuple(i / 10 for i in range(2 * N_LAYERS + 1))
FITS: dict[str, Ablate | Erase] = {
    "5-resid_mid": Erase(
        direction(5).vector + 0.4 * direction(6).vector,
        direction(5).vector,
        WRITERS,
        strength=STRENGTHS,
        label="it",
    ),
    "flat": Ablate(direction(5), WRITERS, strength=STRENGTHS),
}
EDIT = FITS["5-resid_mid"]
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

    baseline: ClassVar[dict[str, float]] = dict.fromkeys(
        ("behaviour_baseline", "unedited_answer_logprob_baseline", "addition_baseline"), 0.0
    )

    def __init__(self, spoil: Callable[[Plan], dict[str, float]] = lambda plan: {}) -> None:
        self.model = SimpleNamespace(n_layers=N_LAYERS, writers=WRITERS)
        self.scored: list[Plan] = []
        self.added: list[Plan] = []
        self.spoil = spoil
        self.n_prompts = 32

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        self.scored.append(plan)
        number = int(plan.fingerprint[:6], 16) / 16**6
        found = {"behaviour": -number, "unedited_answer_logprob": -9 * number, "kl": number / 5}
        found["kl_high"] = number / 4
        if generate:
            found |= {"expression_rate": number, "repetition": 0.1, "length": 9.0}
        return found | self.spoil(plan)

    def addition(self, plan: Plan) -> float:
        self.added.append(plan)
        return 1.0

    def head(self, n: int) -> FakeBench:
        return self


class Dying(FakeBench):
    """Killed after some scores."""

    def __init__(self, survived: int) -> None:
        super().__init__()
        self.survived = survived

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        if len(self.scored) == self.survived:
            raise KeyboardInterrupt
        return super().score(plan, generate=generate)


def run(
    path: Path, bench: Any, candidates: Sequence[Candidate], directions: Directions = DIRECTIONS
) -> list[Trial]:
    journal = Journal(path, IDENTITY)
    with journal.open() as done:
        return run_trials(bench, directions, candidates, journal, done, fits=FITS)


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
        "mlp_strength": 0.5, "mlp_layer": 1.0, "width": 9.0, "fit": "other", "scale": 0.5,
        "prompts": 4,
    }  # fmt: skip
    assert set(varied) == {field.name for field in fields(Candidate)}
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
    # a fitted edit knows its own sites, which were its model's writers
    assert FITTED.plan(found, projections, FITS) == FITTED.plan(found, WRITERS, FITS)


def test_a_fitted_plan_is_the_scaled_edit() -> None:
    """Whatever the direction: the edit that is kept under the name, at its own sites."""
    plan = FITTED.plan(direction(5), WRITERS, FITS)
    (edit,) = plan.edits
    assert isinstance(edit, Erase) and edit.label == "it"
    want = {site: 1.1 * i / 10 for i, site in enumerate(WRITERS) if i}
    assert dict(zip(edit.sites, edit.amounts)) == pytest.approx(want)
    torch.testing.assert_close(edit.vectors, EDIT.vectors, rtol=0, atol=1e-14)
    assert FITTED.plan(direction(2), WRITERS, FITS) == plan
    flat = replace(FITTED, fit="flat").plan(direction(5), WRITERS, FITS)
    assert flat == Plan((Ablate(direction(5), want, strength=tuple(edit.amounts)),))
    assert replace(FITTED, scale=0.0).plan(direction(5), WRITERS, FITS) == Plan()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("name", FITS)
def test_scaled_edits(name: str) -> None:
    edit = FITS[name]
    half = scaled(edit, 0.5)
    assert half is not None and half.sites == edit.sites[1:]  # 0 at the first is left out
    assert half.amounts == pytest.approx([0.5 * amount for amount in edit.amounts[1:]])
    for site in half.sites:
        whole, part = (each.map_at(site) for each in (edit, half))
        torch.testing.assert_close(
            part.left @ part.right.T, 0.5 * whole.left @ whole.right.T, rtol=0, atol=1e-12
        )
    some = scaled(edit, 2.0, [0, 3, 4])
    assert some is not None and some.sites == (edit.sites[3], edit.sites[4])
    assert some.amounts == pytest.approx((0.6, 0.8))
    assert scaled(edit, 0.0) is None and scaled(edit, 1.0, [0]) is None
    assert scaled(edit, 1.0, []) is None
    assert edit.sites == WRITERS and edit.amounts == STRENGTHS  # the edit itself stays as it is


@pytest.mark.parametrize("name", FITS)
def test_turned_edits_are_as_strong_as_before(name: str) -> None:
    """Lengths, angles, strengths and sites stay, and it writes along the new direction."""
    edit, other = FITS[name], direction(2)
    control = along_control_direction(edit, other)
    assert type(control) is type(edit) and control.label == edit.label
    assert (control.sites, control.amounts) == (edit.sites, edit.amounts)
    torch.testing.assert_close(control.vectors[0], other.vector, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        control.vectors @ control.vectors.T, edit.vectors @ edit.vectors.T, rtol=0, atol=1e-12
    )
    assert (control.vectors - edit.vectors).norm(dim=1).min() > 0.1
    # so that it takes as much from a stream of no preferred direction
    for a, b in zip(edit.sites[1:], control.sites[1:]):
        was, now = edit.map_at(a), control.map_at(b)
        sizes = [torch.linalg.matrix_norm(m.left @ m.right.T) for m in (was, now)]
        torch.testing.assert_close(*sizes)
    if isinstance(edit, Erase):  # it reads something else, too
        old, new = edit.read - edit.write, control.read - control.write
        assert abs(float(old @ new / old.norm() / new.norm())) < 0.7
        return
    # a reflection is undone by another
    back = along_control_direction(control, Direction(edit.vectors[0], 1.0, Site(1, "resid_post")))
    torch.testing.assert_close(back.vectors, edit.vectors, rtol=0, atol=1e-12)


def test_turned_subspaces_stay_subspaces() -> None:
    edit, other = Ablate(torch.eye(D, dtype=torch.float64)[:3], WRITERS), direction(4)
    control = along_control_direction(edit, other)
    torch.testing.assert_close(control.vectors[0], other.vector, rtol=0, atol=1e-12)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(control.vectors @ control.vectors.T, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_an_edit_turned_to_its_own_direction(sign: float) -> None:
    """An ablation is itself; turned to the opposite one it is the same map."""
    for edit in (edit for edit in FITS.values() if isinstance(edit, Ablate)):
        own = Direction(sign * edit.vectors[0], 1.0, Site(1, "resid_post"))
        control = along_control_direction(edit, own)
        if sign > 0:
            assert Plan((control,)) == Plan((edit,))
        torch.testing.assert_close(control.vectors[0], own.vector, rtol=0, atol=1e-12)
        assert float(control.vectors[0] @ control.vectors[-1]) == pytest.approx(1.0)


def test_a_candidates_control() -> None:
    """The plan of the candidate along a direction that is none of the concept's."""
    other = direction(2)
    for candidate in (Candidate(3, "resid_post"), BAND):
        control = candidate.control(other, WRITERS, FITS)
        assert control == candidate.plan(other, WRITERS)
    (control,) = FITTED.control(other, WRITERS, FITS).edits
    (chosen,) = FITTED.plan(direction(5), WRITERS, FITS).edits
    assert isinstance(control, Erase)
    assert (control.sites, control.amounts) == (chosen.sites, chosen.amounts)
    want = along_control_direction(EDIT, other).vectors
    torch.testing.assert_close(control.vectors, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(control.write, other.vector, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "given",
    [
        Trial(BAND, {"behaviour": 0.1 + 0.2, "kl": 1e-17}, 1 / 3),
        Trial(BAND, {}, 0.0, "failed", "not finite: kl"),
        Trial(FITTED, {"kl": 0.5}, 1.5),
        Trial(replace(FITTED, stage="finalist", prompts=12), {"kl": 0.5}, 1.5),
        trial(0),
    ],
)
def test_trials_survive_json(given: Trial) -> None:
    assert Trial.from_dict(json.loads(json.dumps(given.to_dict(), allow_nan=False))) == given


def test_candidates_survive_the_table() -> None:
    few = Trial(replace(trial(2).candidate, prompts=4), {})
    trials = [Trial(BAND, {"kl": 0.5}), trial(4), Trial(FITTED, {}, 0.0), few]
    frame = to_frame(trials)
    assert [Candidate.from_row(row) for _, row in frame.iterrows()] == [t.candidate for t in trials]
    assert list(frame["trial"]) == [0, 1, 2, 3]
    assert frame["kl"][0] == 0.5 and math.isnan(frame["kl"][1])
    assert set(asdict(BAND)) <= set(frame) and {"status", "reason", "seconds"} <= set(frame)


def test_candidates_survive_the_file(tmp_path: Path) -> None:
    """As the next stage reads the table: fitted ones find their edit again."""
    from interp_ablate.search.trial_table import read_trials

    trials = [Trial(BAND, {"kl": 0.5}), trial(4), Trial(replace(FITTED, stage="finalist"), {})]
    path = tmp_path / "trials.csv"
    to_frame(trials, FakeBench()).to_csv(path, index=False)  # type: ignore[arg-type]
    found = [Candidate.from_row(row) for _, row in read_trials(path).iterrows()]
    assert found == [each.candidate for each in trials]
    assert [each.key for each in found] == [each.candidate.key for each in trials]
    one, other = found[2], FITTED
    assert one.plan(direction(5), WRITERS, FITS) == other.plan(direction(5), WRITERS, FITS)


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
            pytest.raises(RunError, match=rf"other work.*{next(iter(change))}") as caught,
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
        "from interp_ablate.search.candidates import Candidate, Trial\n"
        "from interp_ablate.search.journal import Journal\n"
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
    root = Path(__file__).parents[2]
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

    first = Dying(5)
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


class Backwards:
    """An executor that finishes the last job first, and is read as it goes."""

    def __init__(self, work: Callable[[Candidate], Trial]) -> None:
        self.work, self.jobs = work, list[Candidate]()

    def __enter__(self) -> Backwards:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, jobs: Iterable[Candidate]) -> Iterator[tuple[Candidate, Trial]]:
        self.jobs += list(jobs)
        for job in reversed(self.jobs):
            yield job, self.work(job)


def test_an_executor_scores_what_is_not_known(tmp_path: Path) -> None:
    """Trials come in any order and are journalled as they come; the answer is in the candidates' order."""
    path, candidates, bench = tmp_path / "trials.jsonl", screening(PLAIN), FakeBench()
    first = run(path, FakeBench(), candidates[:4])
    executor = Backwards(lambda candidate: run_trial(bench, DIRECTIONS, candidate))  # type: ignore[arg-type]
    seen: list[Trial] = []
    journal = Journal(path, IDENTITY)
    with journal.open() as done, executor:
        trials = run_trials(
            None,  # type: ignore[arg-type]
            DIRECTIONS,
            candidates,
            journal,
            done,
            executor=executor,
            on_trial=seen.append,
        )
    assert executor.jobs == candidates[4:] and len(bench.scored) == len(candidates) - 4
    assert [each.candidate for each in trials] == candidates and trials[:4] == first
    assert seen == [*first, *trials[:3:-1]]
    assert list(read(path)) == [each.candidate.key for each in seen]
    assert [each.scores for each in trials] == [
        each.scores for each in run(tmp_path / "other.jsonl", FakeBench(), candidates)
    ]


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
    return frame.assign(
        behaviour_baseline=0.0, unedited_answer_logprob_baseline=0.0, addition_baseline=0.0
    )


def test_promising_directions_work_both_ways(tmp_path: Path) -> None:
    frame = screened(tmp_path / "trials.jsonl")
    frame.loc[0, "status"] = "failed"
    frame.loc[1, "addition"] = -1.0
    found = rank_directions(frame, n=4)
    assert len(found) == len(set(found)) == 4
    known = {(c.layer, c.point, c.position) for c in screening(PLAIN)}
    assert set(found) <= known
    for row in (0, 1):
        gone = (frame["layer"][row], frame["point"][row], frame["position"][row])
        assert gone not in rank_directions(frame, n=99)


def search(path: Path, bench: FakeBench, frame: Any, *, seed: int = 0) -> list[Trial]:
    return run(path, bench, bands(rank_directions(frame), N_LAYERS, seed=seed))


def test_bands_follow_from_the_seed(tmp_path: Path) -> None:
    sources = rank_directions(screened(tmp_path / "screen.jsonl"))
    drawn = bands(sources, N_LAYERS, seed=0)
    assert drawn == bands(sources, N_LAYERS, seed=0) != bands(sources, N_LAYERS, seed=1)
    assert len({candidate.key for candidate in drawn}) == len(drawn)
    assert {(c.layer, c.point, c.position) for c in drawn} <= set(sources)


def test_fits_are_of_directions_that_are_layers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_ablate.search.race.N_FITS", 2)
    sources = [(10, "resid_post", "-1"), (11, "resid_mid", "-1"), (9, "resid_mid", "-1")]
    assert layers_apart(sources) == sources[:1]
    far = (10 + FIT_DISTANCE, "resid_mid", "-1")
    assert layers_apart([*sources, far]) == [sources[0], far]


def test_multiples_of_a_fitted_edit_resume_from_the_journal(tmp_path: Path) -> None:
    source, path = (5, "resid_post", "-1"), tmp_path / "a.jsonl"
    candidates = fitted(source, "5-resid_mid")
    assert [c.scale for c in candidates] == list(SCALES) and 1.0 in SCALES
    assert {(c.layer, c.point, c.position) for c in candidates} == {source}
    assert {(c.operation, c.stage, c.fit) for c in candidates} == {
        ("fitted", "refine", "5-resid_mid")
    }
    first, second = FakeBench(), FakeBench()
    run(path, first, candidates[:2])
    trials = run(path, second, candidates)
    assert first.scored + second.scored == [c.plan(direction(5), WRITERS, FITS) for c in candidates]
    assert [t.candidate for t in trials] == candidates
    assert run(path, FakeBench(), fitted(source, "5-resid_mid")) == trials
    others = FakeBench()
    run(path, others, fitted(source, "flat"))
    assert len(others.scored) == len(SCALES)  # another edit: nothing of it is known


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
        rank_directions(frame)


# --------------------------------------------------------------------------------- the race


class Race:
    """Scores by hand: each candidate's quality, which every prompt agrees on; counts what it costs."""

    def __init__(
        self, *, quality: Sequence[float], failing: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.quality, self.failing = quality, set(failing)
        self.calls: list[tuple[int, list[Candidate]]] = []
        self.n_prompts = 32
        self.candidates = [Candidate(layer, "resid_post") for layer in range(len(quality))]

    def head(self, n: int) -> Any:
        return SimpleNamespace(prompts=n, baseline=FakeBench.baseline)

    def score(self, small: Any, candidates: Sequence[Candidate]) -> list[Trial]:
        self.calls.append((small.prompts, list(candidates)))
        return [self.trial(candidate, small.prompts) for candidate in candidates]

    def trial(self, candidate: Candidate, prompts: int) -> Trial:
        if (candidate.layer, prompts) in self.failing:
            return Trial(candidate, {}, 0.0, "failed", "not finite: kl")
        value = self.quality[candidate.layer]
        return Trial(candidate, {"unedited_answer_logprob": -value, "kl": 0.1, "addition": 1.0})

    def run(self, *rungs: tuple[int, int]) -> pd.DataFrame:
        return race_directions(self, self.candidates, self.score, rungs=rungs)  # type: ignore[arg-type]

    @property
    def cost(self) -> int:
        """How often a candidate was scored on a prompt a side."""
        return sum(prompts * len(candidates) for prompts, candidates in self.calls)


QUALITY = [3.0, 9.0, 1.0, 7.0, 4.0, 8.0, 2.0, 6.0, 0.5, 5.0]
ALL = 10**9


@pytest.mark.parametrize(
    ("rungs", "cost"),
    [
        ([(4, ALL), (12, 3)], 10 * 4 + 3 * 12),
        ([(2, ALL), (4, 5), (8, 2)], 10 * 2 + 5 * 4 + 2 * 8),
        ([(4, ALL), (12, 1)], 10 * 4 + 12),
        ([(4, ALL), (12, ALL)], 10 * 4 + 10 * 12),
        ([(4, ALL)], 10 * 4),
    ],
)
def test_the_race_is_won_by_the_best(rungs: list[tuple[int, int]], cost: int) -> None:
    """Where prompts agree, the order is the full sweep's, at the cost that the rungs say."""
    race, full = Race(quality=QUALITY), Race(quality=QUALITY)
    table, whole = race.run(*rungs), full.run((rungs[-1][0], ALL))
    last = list(race.calls[-1][1])
    assert table["layer"][0] == whole["layer"][0] == 1
    assert list(table["layer"][: len(last)]) == [
        layer for layer in whole["layer"] if layer in {c.layer for c in last}
    ]
    assert race.cost == cost
    assert [prompts for prompts, _ in race.calls] == [prompts for prompts, _ in rungs]
    for prompts, candidates in race.calls:
        assert {c.prompts for c in candidates} == {prompts}  # what they are known by in the journal


def test_the_races_table_has_every_candidate_once_the_last_rung_first() -> None:
    race = Race(quality=QUALITY)
    table = race.run((2, ALL), (4, 5), (8, 2))
    assert table["layer"].tolist() == [1, 5, 3, 7, 9, 4, 0, 6, 2, 8]
    assert table["prompts"].tolist() == [8] * 2 + [4] * 3 + [2] * 5
    assert list(table.index) == list(range(10))
    assert set(FakeBench.baseline) <= set(table)


def test_a_rung_is_judged_by_its_own_scores() -> None:
    """Few prompts may be wrong about one: more prompts correct it among those that go on."""

    class Noisy(Race):
        def trial(self, candidate: Candidate, prompts: int) -> Trial:
            found = super().trial(candidate, prompts)
            if candidate.layer == 9 and prompts == 4:
                return replace(found, scores=found.scores | {"unedited_answer_logprob": -99.0})
            return found

    table = Noisy(quality=QUALITY).run((4, ALL), (12, 4))
    assert table["layer"].tolist()[:4] == [1, 5, 3, 9]
    assert table["unedited_answer_logprob"].tolist()[:4] == [-9.0, -8.0, -7.0, -5.0]


@pytest.mark.parametrize("most", (3, 8, ALL))
def test_failed_trials_never_go_on(most: int) -> None:
    """Also where fewer are whole than may go on."""
    failing = [(layer, 4) for layer in (1, 5, 3, 7, 0)]
    race = Race(quality=QUALITY, failing=failing)
    table = race.run((4, ALL), (12, most))
    went_on = [c.layer for c in race.calls[1][1]]
    assert went_on == [9, 4, 6, 2, 8][:most]
    assert sorted(table["layer"]) == list(range(10))
    assert table["layer"].tolist()[: len(went_on)] == went_on
    failed = table[table["status"] == "failed"]
    assert set(failed["layer"]) == {1, 5, 3, 7, 0} and set(failed["prompts"]) == {4}
    assert failed.index.min() == 5  # behind all that were scored


def test_a_trial_that_fails_late_is_behind_those_that_did_not() -> None:
    race = Race(quality=QUALITY, failing=[(1, 12)])
    table = race.run((4, ALL), (12, 3))
    assert table["layer"].tolist()[:3] == [5, 3, 1] and table["status"][2] == "failed"
    assert [layer for layer, *_ in rank_directions(table)] == [5, 3, 7, 9, 4, 0, 6, 2]


def test_where_everything_fails_the_reason_is_said() -> None:
    race = Race(quality=QUALITY, failing=[(layer, n) for layer in range(10) for n in (4, 12)])
    table = race.run((4, ALL), (12, 3))
    assert len(table) == 10 and set(table["status"]) == {"failed"}
    with pytest.raises(RunError, match=r"none of the 10 screened .*not finite: kl"):
        rank_directions(table)


def test_those_of_the_last_rung_are_the_most_promising() -> None:
    """What few prompts say of the others is not compared with what more prompts say."""

    class Worse(Race):
        def trial(self, candidate: Candidate, prompts: int) -> Trial:
            found = super().trial(candidate, prompts)
            scores = found.scores | {
                "unedited_answer_logprob": found.scores["unedited_answer_logprob"] * 4 / prompts
            }
            return replace(found, scores=scores)

    table = Worse(quality=QUALITY).run((4, ALL), (12, 3))
    assert removal_per_kl(table)[3] > removal_per_kl(table)[0]
    assert [layer for layer, *_ in rank_directions(table)] == [1, 5, 3, 7, 9, 4, 0, 6]


def test_a_killed_race_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path, candidates = tmp_path / "trials.jsonl", screening(PLAIN)
    rungs = ((4, ALL), (12, 5))

    def race(path: Path, bench: FakeBench) -> pd.DataFrame:
        journal = Journal(path, IDENTITY)
        with journal.open() as done:
            return race_directions(
                bench,  # type: ignore[arg-type]
                candidates,
                lambda small, some: run_trials(small, DIRECTIONS, some, journal, done),
                rungs=rungs,
            )

    whole = FakeBench()
    want = race(tmp_path / "whole.jsonl", whole)
    assert len(whole.scored) == len(candidates) + 5
    for survived in (3, len(candidates), len(candidates) + 2):
        first, second = Dying(survived), FakeBench()
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            race(path, first)
        table = race(path, second)
        assert len(first.scored) == survived
        assert first.scored + second.scored == whole.scored
        kept = [column for column in table if column != "seconds"]
        pd.testing.assert_frame_equal(table[kept], want[kept])


@pytest.mark.parametrize("n", (2, 4, 7, 12, 30, 32, 100))
def test_a_rung_without_more_prompts_is_left_out(n: int) -> None:
    race = Race(quality=QUALITY)
    race.n_prompts = n
    table = race.run(*RUNGS)
    wanted = [prompts for prompts, _ in RUNGS if prompts < n] + [n] * (n <= RUNGS[-1][0])
    assert [prompts for prompts, _ in race.calls] == sorted(set(wanted))
    assert table["layer"][0] == 1 and len(table) == 10


def test_the_rungs_grow_and_narrow() -> None:
    prompts, most = zip(*RUNGS)
    assert list(prompts) == sorted(set(prompts)) and list(most) == sorted(set(most), reverse=True)


# --------------------------------------------------------------------------------- the bench


SOME_WORDS = ExpressionScorer((), patterns=("[a-m]",))
TARGET = TargetLogOdds((70, 71))
POSITIVE, NEGATIVE = tiny.rows_of(9, 12, 14, 11, 8), tiny.rows_of(10, 13, 9, 12, seed=2)
PLAN = Plan((Ablate(tiny.unit(1), everywhere(tiny.N_LAYERS), strength=1.2),))


def bench_of(positive: Any = POSITIVE, negative: Any = NEGATIVE) -> ValidationBench:
    model = tiny.shared(eos_token_id=None)
    return ValidationBench(
        model, positive, negative, target=TARGET, expression=SOME_WORDS, max_new_tokens=10
    )


def test_text_scores_are_of_both_sides_answers() -> None:
    """Expressions of each side by itself; repetition and length of all answers."""
    bench = bench_of()
    found = bench.score(PLAN, generate=True)
    with bench.model.applied(PLAN):
        answers = [bench.model.generate(rows, max_new_tokens=10) for rows in (POSITIVE, NEGATIVE)]
    rates = [float(SOME_WORDS.score_texts([a.text for a in side]).mean()) for side in answers]
    assert [found["expression_rate"], found["negative_expression_rate"]] == pytest.approx(rates)
    assert rates[0] != rates[1] or 0 < rates[0] < 1
    loops = [repetition(answer.tokens) for side in answers for answer in side]
    assert found["repetition"] == pytest.approx(sum(loops) / 9)
    sides = [sum(len(answer.tokens) for answer in side) / len(side) for side in answers]
    assert found["length"] == pytest.approx(sum(sides) / 2)
    before = [*bench.positive.generations, *bench.negative.generations]
    assert bench.repetition == pytest.approx(sum(repetition(g.tokens) for g in before) / 9)
    quick = bench.score(PLAN, generate=False)
    assert set(quick) == {"behaviour", "unedited_answer_logprob", "kl", "kl_high"}
    assert {name: found[name] for name in quick} == pytest.approx(quick)
    kl = FirstTokenKL()(ModelOutputs(bench.model, NEGATIVE, PLAN), bench.negative)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl"] < found["kl_high"] < float(kl.max())


def test_repetition_counts_loops_on_either_side() -> None:
    from interp_ablate.models.generation import Generation

    bench = bench_of()
    loop, plain = (Generation(tokens, "", False) for tokens in ((5,) * 10, tuple(range(10))))
    for looping in ("positive", "negative"):
        for name in ("positive", "negative"):
            side = getattr(bench, name)
            side.generations = [loop if name == looping else plain] * len(side.rows)
        bench.__dict__.pop("repetition", None)
        share = {"positive": 5 / 9, "negative": 4 / 9}[looping]
        assert bench.repetition == pytest.approx(share * 7 / 8)


def test_of_few_prompts_those_that_express_it_are_there() -> None:
    from interp_ablate.models.generation import Generation

    bench = bench_of()
    texts = ("123", "a", "456", "", "b")  # SOME_WORDS is found in the second and the last
    bench.positive.generations = [Generation((5, 6), text, False) for text in texts]
    for n, places in ((1, [1]), (2, [1, 4]), (3, [0, 1, 4]), (4, [0, 1, 2, 4]), (5, range(5))):
        small = bench.head(n)
        assert small.positive.rows == [bench.positive.rows[i] for i in places]
        assert small.positive.texts == [texts[i] for i in places]
        assert small.negative.rows == bench.negative.rows[:n]


def test_the_first_prompts_of_a_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are a bench of these prompts; what is known of them is not run again."""
    bench = bench_of()
    known = bench.baseline, bench.repetition, bench.head(4).repetition
    bench.positive.first_logprobs, bench.negative.first_logprobs  # noqa: B018
    expressed = SOME_WORDS.score_texts(bench.positive.texts).bool().tolist()
    some = sorted(sorted(range(5), key=lambda i: not expressed[i])[:3])
    want = bench_of([POSITIVE[i] for i in some], NEGATIVE[:3])
    expected = want.score(PLAN, generate=True) | {"addition": want.addition(PLAN)}
    expected |= want.baseline | {"was": want.repetition}

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the unedited answers were generated again")

    small = bench.head(3)
    assert (len(small.positive.rows), len(small.negative.rows)) == (3, 3)
    with monkeypatch.context() as patched:
        patched.setattr(bench.model, "generate", never)
        here = small.baseline | {"was": small.repetition}
    here |= small.score(PLAN, generate=True) | {"addition": small.addition(PLAN)}
    assert here == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert small.baseline != bench.baseline
    assert (bench.baseline, bench.repetition, bench.head(4).repetition) == known
    every = bench.head(99)
    assert every.n_prompts == bench.n_prompts == 5
    assert every.positive.rows == bench.positive.rows and every.baseline == pytest.approx(known[0])
