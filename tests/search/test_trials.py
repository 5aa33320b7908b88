"""Trials: the log through every accident, plans as data, trials against a bench of numbers.

The race of the screening by hand-made scores; the bench itself on a tiny model.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest
import tiny
import torch

from interp_ablate import __version__
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.edits.kinds import Ablate, Add, Erase
from interp_ablate.edits.plan import Plan, band, everywhere
from interp_ablate.errors import InterpAblateError, PlanError, RunError
from interp_ablate.evaluation.metrics import TargetLogOdds, first_token_kl, repetition
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.derived_edits import (
    along_control_direction,
    control_plan,
    scaled,
    scaled_to_kl,
    strength_at_kl,
)
from interp_ablate.search.edit_space import EditSpace, plan_of
from interp_ablate.search.grid import SCALES, bands, finalists, fitted
from interp_ablate.search.race import (
    FIT_DISTANCE,
    RUNGS,
    distinct,
    layers_apart,
    race_directions,
    rank_directions,
    removal_per_kl,
    screening_trials,
)
from interp_ablate.search.trial_table import params_of, read_trials, to_frame
from interp_ablate.search.trials import KILLS, Trial, TrialLog, run_trials, score_trials
from interp_ablate.sites import Point, Site
from interp_ablate.stats.intervals import upper_bound

D, N_LAYERS = 6, 8
WRITERS = everywhere(N_LAYERS)
IDENTITY = {"model": "abc", "max_kl": 0.1, "layers": [1, 2]}
PLACE = {"method": "difference_in_means", "layer": 3, "point": "resid_post", "position": "-2"}
KERNEL = {
    "attention_strength": 1.2, "attention_layer": 3.5, "mlp_strength": 0.9, "mlp_layer": 2.0,
    "width": 2.5,
}  # fmt: skip
BAND = Trial({"edit": "band", **PLACE, **KERNEL}, "refine")


def direction(layer: int, point: Point = "resid_post", **kwargs: Any) -> Direction:
    generator = torch.Generator().manual_seed(layer)
    vector = torch.randn(D, generator=generator, dtype=torch.float64)
    return Direction(vector, 2.0, Site(layer, point), **kwargs)


FIT, FLAT = "5-resid_mid--1-abcdef12", "5-resid_post--1-12abcdef"
ALL_SCALES = ("attention_scale", "mlp_scale", "embed_scale")
FITTED = Trial({"edit": "fitted", "fit": FIT, **dict.fromkeys(ALL_SCALES, 1.1)}, "refine")
STRENGTHS = tuple(i / 10 for i in range(2 * N_LAYERS + 1))
FITS: dict[str, Ablate | Erase] = {
    FIT: Erase(
        direction(5).vector + 0.4 * direction(6).vector,
        direction(5).vector,
        WRITERS,
        strength=STRENGTHS,
        label="it",
    ),
    FLAT: Ablate(direction(5), WRITERS, strength=STRENGTHS),
}
EDIT = FITS[FIT]
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


def space(directions: Directions = DIRECTIONS, writers: tuple[Site, ...] = WRITERS) -> EditSpace:
    """A space over saved directions; its activations are not looked at."""
    labelled: Any = SimpleNamespace(labels=torch.tensor([True, False]))
    return EditSpace(labelled, writers, saved=directions, fits=dict(FITS))


def ablation(layer: int, **changes: Any) -> Trial:
    return Trial({"edit": "ablate", **PLACE, "layer": layer, "position": "-1"}, **changes)


def plan(trial: Trial, **options: Any) -> Plan:
    return plan_of(trial.params, space(**options))


class FakeBench:
    """Numbers made from the plan's own JSON; counts how often it was asked."""

    baseline: ClassVar[dict[str, float]] = dict.fromkeys(
        ("target_log_odds_baseline", "unedited_answer_logprob_baseline", "addition_baseline"), 0.0
    )

    finalists = None
    """No prompts of the finalists' own."""

    def __init__(self, spoil: Callable[[Plan], dict[str, float]] = lambda plan: {}) -> None:
        self.model = SimpleNamespace(n_layers=N_LAYERS, writers=WRITERS)
        self.scored: list[Plan] = []
        self.added: list[Plan] = []
        self.spoil = spoil
        self.n_prompts = 32
        self.together: list[int] = []

    def objectives_of(self, plans: Sequence[Plan]) -> list[dict[str, float]]:
        self.together.append(len(plans))
        return [self.score(each, generate=True) for each in plans]

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        self.scored.append(plan)
        number = int(plan.fingerprint[:6], 16) / 16**6
        found = {
            "target_log_odds": -number,
            "unedited_answer_logprob": -9 * number,
            "kl": number / 5,
        }
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
    path: Path,
    bench: Any,
    trials: Sequence[Trial],
    directions: Directions = DIRECTIONS,
    **options: Any,
) -> list[Trial]:
    with TrialLog(path, IDENTITY).open() as log:
        return run_trials(trials, space(directions), bench, log, **options)


def trial(layer: int, **scores: float) -> Trial:
    return ablation(layer).scored(scores or {"target_log_odds": layer / 3}, 0.25)


def write(path: Path, trials: Sequence[Trial]) -> None:
    with TrialLog(path, IDENTITY).open() as log:
        for each in trials:
            log.finish(each)


def read(path: Path) -> dict[str, Trial]:
    with TrialLog(path, IDENTITY).open() as log:
        return dict(log.done)


# --------------------------------------------------------------------------------- candidates


def test_a_trials_key_is_what_is_tried() -> None:
    changes: dict[str, Any] = {"stage": "finalist", "prompts": 4, "number": 2}
    others = [replace(BAND, **{name: value}) for name, value in changes.items()]
    others += [replace(BAND, params={**BAND.params, name: 0.7}) for name in KERNEL]
    assert len({BAND.key, *(other.key for other in others)}) == len(others) + 1
    assert replace(BAND).key == BAND.key == BAND.scored({"kl": 1.0}, 2.0).key
    assert BAND.failed("why").key == BAND.key


def test_a_trials_plan() -> None:
    found = DIRECTIONS[Site(3, "resid_post"), "-2", METHODS[0]]
    assert plan(Trial({"edit": "ablate", **PLACE})) == Plan((Ablate(found, WRITERS),))
    expected = band(found, N_LAYERS, attention=(1.2, 3.5), mlp=(0.9, 2.0), width=2.5)
    assert plan(BAND) == expected


def test_a_plan_is_at_the_writers_of_its_model() -> None:
    """Learned positions are ablated too; where a norm follows a projection, the projection is."""
    positions = (Site(0, "embed"), Site(0, "pos_embed"), *WRITERS[1:])
    assert plan(ablation(3), writers=positions).sites == positions
    assert plan(BAND, writers=positions) == plan(BAND)
    names: dict[str, Point] = {"attn_out": "attn_proj", "mlp_out": "mlp_proj", "embed": "embed"}
    projections = tuple(Site(site.layer, names[site.point]) for site in WRITERS)
    expected = [
        (tuple(Site(site.layer, names[site.point]) for site in edit.sites), edit.amounts)
        for edit in plan(BAND)
    ]
    found = plan(BAND, writers=projections)
    assert [(edit.sites, edit.amounts) for edit in found] == expected
    # a fitted edit knows its own sites, which were its model's writers
    assert plan(FITTED, writers=projections) == plan(FITTED)


def test_a_fitted_plan_is_the_scaled_edit() -> None:
    """At its own sites; scales that are alike leave one edit."""
    (edit,) = plan(FITTED).edits
    assert isinstance(edit, Erase) and edit.label == "it"
    want = {site: 1.1 * i / 10 for i, site in enumerate(WRITERS) if i}
    assert dict(zip(edit.sites, edit.amounts)) == pytest.approx(want)
    torch.testing.assert_close(edit.vectors, EDIT.vectors, rtol=0, atol=1e-14)
    flat = plan(replace(FITTED, params={**FITTED.params, "fit": FLAT}))
    assert flat == Plan((Ablate(direction(5), want, strength=tuple(edit.amounts)),))
    nothing = {**FITTED.params, **dict.fromkeys(ALL_SCALES, 0.0)}
    assert plan_of(nothing, space()) == Plan()
    assert Plan.from_dict(json.loads(json.dumps(plan(FITTED).to_dict()))) == plan(FITTED)


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


def test_the_control_of_a_subspace_keeps_none_of_its_directions() -> None:
    """A frame turned onto the control's direction by a reflection kept k - 1 of the k."""
    edit, other = Ablate(torch.eye(D, dtype=torch.float64)[:3], WRITERS), direction(4)
    kept = [
        float(
            (along_control_direction(edit, direction(seed)).vectors[1:] @ edit.vectors.T)
            .square()
            .sum()
        )
        for seed in range(40)
    ]
    assert sum(kept) / 40 == pytest.approx(2 * 3 / D, rel=0.25)  # of random ones; 2 of a reflection
    control = along_control_direction(edit, other)
    torch.testing.assert_close(control.vectors[0], other.vector, rtol=0, atol=1e-12)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(control.vectors @ control.vectors.T, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_an_edit_turned_to_its_own_direction(sign: float) -> None:
    """An ablation of one is itself; turned to the opposite one it is the same map."""
    for edit in (
        edit for edit in FITS.values() if isinstance(edit, Ablate) and len(edit.vectors) == 1
    ):
        own = Direction(sign * edit.vectors[0], 1.0, Site(1, "resid_post"))
        control = along_control_direction(edit, own)
        if sign > 0:
            assert Plan((control,)) == Plan((edit,))
        torch.testing.assert_close(control.vectors[0], own.vector, rtol=0, atol=1e-12)
        assert float(control.vectors[0] @ control.vectors[-1]) == pytest.approx(1.0)


def test_a_control_is_scaled_to_a_kl() -> None:
    """Whether the KL is the square of the strength, flattens out or turns to NaN."""
    control, calls = control_plan(plan(BAND), direction(2)), []

    def measured(kl_of_strength: Any) -> Any:
        def kl_of(candidate: Plan) -> float:
            calls.append(candidate)
            return kl_of_strength(candidate.edits[0].amounts[0] / control.edits[0].amounts[0])

        return kl_of

    def breaks(factor: float) -> float:
        if factor > 20:
            raise InterpAblateError("NaN")
        return 1e-4 * factor**2

    for law in (
        lambda f: 0.003 * f**2,
        lambda f: 0.9 * math.tanh(f**3),
        lambda f: 1e-5 * f**6,
        breaks,
    ):
        calls.clear()
        scaled_plan, factor = scaled_to_kl(control, 0.02, measured(law)) or (None, 0)
        assert scaled_plan is not None and len(calls) <= 8
        assert law(factor) == pytest.approx(0.02, rel=0.15)
        assert [e.sites for e in scaled_plan] == [e.sites for e in control]
    plateau, _ = scaled_to_kl(control, 0.02, measured(lambda f: 0.001)) or (None, 0)
    assert plateau is not None  # the nearest, where the KL asked for is out of reach


@pytest.mark.parametrize("start", (0.3, 1.0, 5.0))
def test_no_strength_above_the_greatest_is_tried(start: float) -> None:
    """A KL that oscillates beyond strength 1, as a rotation's, is out of reach there: 1 is the nearest."""
    tried = []

    def family(strength: float) -> Plan:
        tried.append(strength)
        return plan(ablation(3))

    def kl_of(_: Plan) -> float:
        return 0.01 * math.sin(math.pi / 2 * tried[-1]) ** 2

    _, strength = strength_at_kl(family, 0.5, kl_of, start=start, greatest=1.0) or (None, 0)
    assert strength == 1.0 and max(tried) <= 1.0
    tried.clear()
    _, strength = strength_at_kl(family, 0.002, kl_of, start=start, greatest=1.0) or (None, 0)
    assert 0 < strength < 1 and max(tried) <= 1.0
    assert kl_of(plan(ablation(3))) == pytest.approx(0.002, rel=0.15)


def test_a_plans_control() -> None:
    """The same plan along a direction that is none of the concept's."""
    other = direction(2)
    (full,) = control_plan(plan(ablation(3)), other).edits
    torch.testing.assert_close(full.vectors[0], other.vector, rtol=0, atol=1e-12)
    assert full.sites == WRITERS
    control = control_plan(plan(BAND), other)
    want = band(other, N_LAYERS, attention=(1.2, 3.5), mlp=(0.9, 2.0), width=2.5)
    assert [(e.sites, e.amounts) for e in control] == [(e.sites, e.amounts) for e in want]
    for got, wanted in zip(control, want):
        torch.testing.assert_close(got.vectors, wanted.vectors, rtol=0, atol=1e-12)
    (turned,) = control_plan(plan(FITTED), other).edits
    (chosen,) = plan(FITTED).edits
    assert isinstance(turned, Erase)
    assert (turned.sites, turned.amounts) == (chosen.sites, chosen.amounts)
    torch.testing.assert_close(turned.write, other.vector, rtol=0, atol=1e-12)
    more = plan(FITTED) + Add(other, "blocks.0.hook_resid_post")
    for made in (lambda: control_plan(more, other), lambda: scaled_to_kl(more, 0.1, lambda _: 0.1)):
        with pytest.raises(PlanError, match="has no control and no scale"):
            made()


@pytest.mark.parametrize(
    "given",
    [
        BAND.scored({"target_log_odds": 0.1 + 0.2, "kl": 1e-17}, 1 / 3),
        BAND.failed("not finite: kl"),
        FITTED.scored({"kl": 0.5}, 1.5),
        replace(FITTED, stage="search", prompts=12, number=3).scored({"kl": 0.5}, 1.5),
        trial(0),
    ],
)
def test_trials_survive_json(given: Trial) -> None:
    assert Trial.from_dict(json.loads(json.dumps(asdict(given), allow_nan=False))) == given


def test_trials_survive_the_table(tmp_path: Path) -> None:
    """As the next stage reads it: fitted ones find their edit again, and have their direction's place."""
    search = Trial({"edit": "band", **PLACE, **KERNEL, "layer": 2.4, "rank": 2}, "search", number=1)
    control = Trial({**FITTED.params, "control": "random"}, "finalist")
    trials = [BAND.scored({"kl": 0.5}, 0.1), trial(4), FITTED.failed("no"), search, control]
    trials = [each if each.status != "proposed" else each.scored({}, 0.0) for each in trials]
    trials.append(replace(trials[1], prompts=4))
    frame = to_frame(trials)
    assert list(frame["trial"]) == list(range(6))
    assert frame["kl"][0] == 0.5 and math.isnan(frame["kl"][1])
    assert {"status", "reason", "seconds"} <= set(frame)
    assert (frame["layer"][2], frame["point"][2], frame["position"][2]) == (5, "resid_mid", "-1")
    path = tmp_path / "trials.csv"
    frame.to_csv(path, index=False)
    for table in (frame, read_trials(path)):
        rows = [row for _, row in table.iterrows()]
        assert [params_of(row) for row in rows] == [each.params for each in trials]
        assert list(table["prompts"].fillna(0)) == [0, 0, 0, 0, 0, 4]


def test_distinct_leaves_out_what_the_layer_before_already_is() -> None:
    sites = [Site(layer, p) for layer in range(3) for p in ("resid_pre", "resid_mid", "resid_post")]  # type: ignore[arg-type]
    every = [direction(site.layer, site.point) for site in sites]
    kept = distinct(iter(every))
    left_out = {Site(1, "resid_pre"), Site(2, "resid_pre")}
    assert [item.site for item in kept] == [site for site in sites if site not in left_out]
    assert distinct(kept) == kept
    only_pre = [item for item in every if item.site.point == "resid_pre"]
    assert distinct(only_pre) == only_pre  # nothing they repeat is there
    # of another position or method it is another direction
    here = direction(0, "resid_post")
    others = [replace(direction(1, "resid_pre"), **{f: "x"}) for f in ("position", "method")]
    assert distinct([here, *others]) == [here, *others]


def test_screening_is_one_candidate_a_distinct_direction() -> None:
    found = screening_trials(PLAIN)
    assert len({each.key for each in found}) == len(found) == 2 * N_LAYERS
    places = {
        (each.params["layer"], each.params["point"], each.params["position"]) for each in found
    }
    assert places == {(i.site.layer, i.site.point, i.position) for i in PLAIN}
    assert {(each.stage, each.params["edit"]) for each in found} == {("screen", "ablate")}


def test_screening_keeps_the_method() -> None:
    assert {each.params["method"] for each in screening_trials(DIRECTIONS)} == set(METHODS)


# --------------------------------------------------------------------------------- the journal


def test_a_log_is_a_header_and_a_line_a_trial(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trials.jsonl"
    trials = [trial(0), BAND.scored({"kl": 0.1 + 0.2}, 1.5), BAND.failed("why")]
    write(path, trials[:2])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    made_by = {"format": "interp_ablate.trials/3", "interp-ablate": __version__}
    assert lines[0] == {**made_by, **IDENTITY} and len(lines) == 3
    assert read(path) == {each.key: each for each in trials[:2]}
    before = path.read_bytes()
    assert read(path) and path.read_bytes() == before  # reading changes nothing
    write(path, trials[2:])
    assert path.read_bytes().startswith(before)
    assert read(path)[BAND.key] == trials[2]  # the last word on a trial


def test_a_trial_is_on_disk_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    with TrialLog(path, IDENTITY).open() as log:
        for layer in range(3):
            log.finish(trial(layer))
            assert len(path.read_text().splitlines()) == layer + 2


def test_resume_after_every_possible_torn_end(tmp_path: Path) -> None:
    """Killed after any byte: whole trials are kept, the torn one is run again, the file is sound."""
    path = tmp_path / "trials.jsonl"
    trials = [trial(0), trial(1)]
    write(path, trials)
    whole = path.read_bytes()
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        # one that lacks its line break alone is whole
        finished = max(whole[: length + 1].count(b"\n") - 1, 0)
        assert list(read(path).values()) == trials[:finished]
        write(path, trials[finished:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "content"),
    [
        (1, b"not JSON"),
        (1, b"[]"),
        (1, b'{"format": "interp_ablate.trials/1"}'),
        (2, b"{"),
        (3, b'"text"'),
        (2, b"\xff\xfe"),
        (2, b'{"scores": {}}'),
        (3, b'{"params": [1]}'),
        (3, b'{"params": {}, "stage": "first"}'),
        (2, b'{"params": 3}'),
        (2, b'{"params": {}, "colour": "red"}'),
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
            TrialLog(path, IDENTITY | change).open(),
        ):
            pass
        others = set(IDENTITY) - set(change)
        assert not any(f" {other}" in str(caught.value).split(":")[-1] for other in others)
    assert path.read_bytes() == before and len(read(path)) == 1


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    with (
        TrialLog(path, IDENTITY).open(),
        pytest.raises(RunError, match=r"in use by another process.*--out"),
        TrialLog(path, IDENTITY).open(),
    ):
        pass
    assert read(path) == {}
    with pytest.raises(KeyError), TrialLog(path, IDENTITY).open():
        raise KeyError  # whatever ends the block, the journal is free again
    assert read(path) == {}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "file" / "trials.jsonl", "cannot write the log of trials"),
        (tmp_path, "is not a file but a folder"),
    ):
        with (
            pytest.raises(RunError, match=said),
            TrialLog(path, {}).open(),
        ):
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
        "from interp_ablate.search.trials import Trial, TrialLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + room}, resource.RLIM_INFINITY))\n"
        "try:\n"
        f"    with TrialLog({str(path)!r}, {IDENTITY!r}).open() as log:\n"
        "        log.finish(Trial({'edit': 'ablate', 'layer': 1}))\n"
        "except RunError as error:\n"
        "    sys.exit(0 if 'cannot write the log of trials' in str(error) else 3)\n"
        "sys.exit(4)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=root)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read(path)) == (1 if room else 0)


def test_an_identity_may_hold_tuples(tmp_path: Path) -> None:
    for _ in range(2):
        with TrialLog(tmp_path / "trials.jsonl", {"layers": (1, 2)}).open() as log:
            assert log.done == {}


# --------------------------------------------------------------------------------- trials


def test_every_trial_is_scored_once_in_order(tmp_path: Path) -> None:
    bench, path, proposed = FakeBench(), tmp_path / "trials.jsonl", screening_trials(PLAIN)
    seen: list[Trial] = []
    trials = run(path, bench, proposed, on_trial=seen.append)
    assert [each.params for each in trials] == [each.params for each in proposed]
    assert seen == trials and read(path) == {each.key: each for each in trials}
    assert bench.scored == [plan(each) for each in proposed]
    items = [space().direction(each.params) for each in proposed]
    # screening also adds, at the direction's own site
    assert bench.added == [Plan((Add(item, item.site),)) for item in items]
    assert all(each.status == "ok" and each.scores["addition"] == 1.0 for each in trials)
    assert all(each.scores["target_log_odds_baseline"] == 0.0 for each in trials)


def numbered(n: int) -> list[Trial]:
    return [Trial({**BAND.params, "width": 2.0 + i}, "search", number=i) for i in range(n)]


def test_a_searchs_trials_are_scored_together(tmp_path: Path) -> None:
    bench = FakeBench()
    trials = run(tmp_path / "a.jsonl", bench, numbered(7), batch_size=3)
    assert bench.together == [3, 3, 1]
    alone = run(tmp_path / "b.jsonl", FakeBench(), numbered(7))
    assert [each.scores for each in trials] == [each.scores for each in alone]


def test_where_several_fail_each_is_scored_alone(tmp_path: Path) -> None:
    wrong = plan(numbered(2)[1])

    def broken(one: Plan) -> dict[str, float]:
        if one == wrong:
            raise InterpAblateError("this one")
        return {}

    bench = FakeBench(broken)
    trials = run(tmp_path / "trials.jsonl", bench, numbered(3), batch_size=3)
    assert [each.status for each in trials] == ["ok", "failed", "ok"]
    assert trials[1].reason == "this one" and bench.together == [3, 1, 1, 1]


def test_trials_that_kill_their_process_are_given_up(tmp_path: Path) -> None:
    """A trial that was begun and never finished counts; one that was interrupted does not."""
    path, poison = tmp_path / "trials.jsonl", ablation(3)
    for _ in range(KILLS):
        with pytest.raises(KeyboardInterrupt):
            run(path, Dying(0), [poison])
    for kill in range(KILLS):
        with TrialLog(path, IDENTITY).open() as log:
            assert log.kills[poison.key] == kill
            log.begin([poison])
    [given_up, other] = run(path, FakeBench(), [poison, ablation(4)])
    assert given_up.status == "failed" and f"killed {KILLS} times" in given_up.reason
    assert other.status == "ok"


def test_only_the_trial_at_fault_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was killed together is scored one at a time after that."""
    monkeypatch.setattr(TrialLog, "release", lambda *_: None)  # a SIGKILL writes nothing
    path, trials = tmp_path / "trials.jsonl", numbered(4)

    def deadly(one: Plan) -> dict[str, float]:
        if one == plan(trials[1]):
            raise KeyboardInterrupt
        return {}

    for _ in range(KILLS):
        with pytest.raises(KeyboardInterrupt):
            run(path, FakeBench(deadly), trials, batch_size=3)
    finished = run(path, FakeBench(deadly), trials, batch_size=3)
    assert [each.status for each in finished] == ["ok", "failed", "ok", "ok"]


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path, candidates = tmp_path / "trials.jsonl", screening_trials(PLAIN)

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

    n_workers = 1

    def __init__(self, work: Callable[[Any], list[Trial]]) -> None:
        self.work, self.jobs = work, list[Any]()

    def __enter__(self) -> Backwards:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, jobs: Iterable[Any]) -> Iterator[tuple[Any, list[Trial]]]:
        self.jobs += list(jobs)
        for job in reversed(self.jobs):
            yield job, self.work(job)


def test_an_executor_scores_what_is_not_known(tmp_path: Path) -> None:
    """Trials come in any order and are logged as they come; the answer is in the order proposed."""
    path, proposed, bench = tmp_path / "trials.jsonl", screening_trials(PLAIN), FakeBench()
    first = run(path, FakeBench(), proposed[:4])
    executor = Backwards(lambda batch: score_trials(bench, batch))  # type: ignore[arg-type]
    seen: list[Trial] = []
    trials = run(path, None, proposed, executor=executor, on_trial=seen.append)
    assert [each.trial for (each,) in executor.jobs] == proposed[4:]
    assert len(bench.scored) == len(proposed) - 4 and trials[:4] == first
    assert [each.key for each in trials] == [each.key for each in proposed]
    assert seen == [*first, *trials[:3:-1]]
    assert list(read(path)) == [each.key for each in seen]
    alone = run(tmp_path / "other.jsonl", FakeBench(), proposed)
    assert [each.scores for each in trials] == [each.scores for each in alone]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_failed_trial(tmp_path: Path, bad: float) -> None:
    path, candidates = tmp_path / "trials.jsonl", screening_trials(PLAIN)[:3]
    spoiled = plan(candidates[1])
    bench = FakeBench(lambda one: {"kl": bad} if one == spoiled else {})
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

    [failed] = run(tmp_path / "trials.jsonl", FakeBench(broken), screening_trials(PLAIN)[:1])
    assert (failed.status, failed.reason) == ("failed", "first-token logits hold NaN")


def test_a_direction_that_is_not_there_is_a_failed_trial(tmp_path: Path) -> None:
    candidates = screening_trials(PLAIN)[:2]
    missing = replace(
        candidates[0],
        params={**candidates[0].params, "method": "difference_in_means_orthogonalized"},
    )
    bench = FakeBench()
    trials = run(tmp_path / "trials.jsonl", bench, [missing, *candidates], PLAIN)
    assert [each.status for each in trials] == ["failed", "ok", "ok"]
    assert "no direction at" in trials[0].reason and len(bench.scored) == 2


# --------------------------------------------------------------------------------- the search


def screened(path: Path) -> Any:
    return to_frame(run(path, FakeBench(), screening_trials(PLAIN)))


def test_promising_directions_work_both_ways(tmp_path: Path) -> None:
    frame = screened(tmp_path / "trials.jsonl")
    frame.loc[0, "status"] = "failed"
    frame.loc[1, "addition"] = -1.0
    found = rank_directions(frame, n=4)
    assert len(found) == len(set(found)) == 4
    known = {(item.site.layer, item.site.point, item.position) for item in PLAIN}
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
    places = {(c.params["layer"], c.params["point"], c.params["position"]) for c in drawn}
    assert places <= set(sources)


def test_fits_are_of_directions_that_are_layers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_ablate.search.race.N_FITS", 2)
    sources = [(10, "resid_post", "-1"), (11, "resid_mid", "-1"), (9, "resid_mid", "-1")]
    assert layers_apart(sources) == sources[:1]
    far = (10 + FIT_DISTANCE, "resid_mid", "-1")
    assert layers_apart([*sources, far]) == [sources[0], far]


def test_bands_are_inside_the_space_of_a_search(tmp_path: Path) -> None:
    """One set of ranges for both."""
    from interp_ablate.search.edit_space import kernel_ranges

    for n_layers in (3, 30):
        for each in bands([(1, "resid_post", "-1")], n_layers, seed=4):
            for name, (low, high) in kernel_ranges(n_layers).items():
                assert low - 0.005 <= each.params[name] <= high + 0.005


def test_multiples_of_a_fitted_edit_resume_from_the_log(tmp_path: Path) -> None:
    path, proposed = tmp_path / "a.jsonl", fitted(FIT)
    for name in ALL_SCALES:
        assert [each.params[name] for each in proposed] == list(SCALES)
    assert 1.0 in SCALES and {(each.stage, each.params["fit"]) for each in proposed} == {
        ("refine", FIT)
    }
    first, second = FakeBench(), FakeBench()
    run(path, first, proposed[:2])
    trials = run(path, second, proposed)
    assert first.scored + second.scored == [plan(each) for each in proposed]
    assert run(path, FakeBench(), fitted(FIT)) == trials
    others = FakeBench()
    run(path, others, fitted(FLAT))
    assert len(others.scored) == len(SCALES)  # another edit: nothing of it is known


def test_finalists_are_the_best_within_the_limit(tmp_path: Path) -> None:
    trials = search(tmp_path / "a.jsonl", FakeBench(), screened(tmp_path / "screen.jsonl"))
    found = finalists(trials, max_kl=0.1)
    assert found and {candidate.stage for candidate in found} == {"finalist"}
    by_key = {Trial(t.params, "finalist").key: t for t in trials}
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
        self.calls: list[tuple[int, list[Trial]]] = []
        self.n_prompts = 32
        self.candidates = [ablation(layer) for layer in range(len(quality))]

    def score(self, name: str, candidates: Sequence[Trial]) -> list[Trial]:
        (prompts,) = {candidate.prompts for candidate in candidates}
        assert prompts is not None and str(prompts) in name
        self.calls.append((prompts, list(candidates)))
        return [self.trial(candidate, prompts) for candidate in candidates]

    def trial(self, candidate: Trial, prompts: int) -> Trial:
        if (candidate.params["layer"], prompts) in self.failing:
            return candidate.failed("not finite: kl")
        scores = {"unedited_answer_logprob": -self.quality[candidate.params["layer"]], "kl": 0.1}
        return candidate.scored(scores | {"addition": 1.0} | FakeBench.baseline, 0.0)

    def run(self, *rungs: tuple[int, int]) -> pd.DataFrame:
        return race_directions(self.n_prompts, self.candidates, self.score, rungs=rungs)

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
        layer for layer in whole["layer"] if layer in {c.params["layer"] for c in last}
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
        def trial(self, candidate: Trial, prompts: int) -> Trial:
            found = super().trial(candidate, prompts)
            if candidate.params["layer"] == 9 and prompts == 4:
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
    went_on = [c.params["layer"] for c in race.calls[1][1]]
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
        def trial(self, candidate: Trial, prompts: int) -> Trial:
            found = super().trial(candidate, prompts)
            scores = found.scores | {
                "unedited_answer_logprob": found.scores["unedited_answer_logprob"] * 4 / prompts
            }
            return replace(found, scores=scores)

    table = Worse(quality=QUALITY).run((4, ALL), (12, 3))
    assert removal_per_kl(table)[3] > removal_per_kl(table)[0]
    assert [layer for layer, *_ in rank_directions(table)] == [1, 5, 3, 7, 9, 4, 0, 6]


def test_a_killed_race_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path, candidates = tmp_path / "trials.jsonl", screening_trials(PLAIN)
    rungs = ((4, ALL), (12, 5))

    def race(path: Path, bench: FakeBench) -> pd.DataFrame:
        with TrialLog(path, IDENTITY).open() as log:
            return race_directions(
                bench.n_prompts,
                candidates,
                lambda _, some: run_trials(some, space(), bench, log),  # type: ignore[arg-type]
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
    assert set(quick) == {"target_log_odds", "unedited_answer_logprob", "kl", "kl_high"}
    assert {name: found[name] for name in quick} == pytest.approx(quick)
    kl = first_token_kl(ModelOutputs(bench.model, NEGATIVE, PLAN), bench.negative)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl_high"] == pytest.approx(upper_bound(kl.numpy()), rel=1e-3)


def test_repetition_counts_loops_on_either_side() -> None:
    from interp_ablate.models.thinking import Generation

    bench = bench_of()
    loop, plain = (Generation(tokens, "", False) for tokens in ((5,) * 10, tuple(range(10))))
    for looping in ("positive", "negative"):
        for name in ("positive", "negative"):
            side = getattr(bench, name)
            side.generations = [loop if name == looping else plain] * len(side.rows)
        bench._repetition = None
        share = {"positive": 5 / 9, "negative": 4 / 9}[looping]
        assert bench.repetition == pytest.approx(share * 7 / 8)


def test_of_few_prompts_those_that_express_it_are_there() -> None:
    from interp_ablate.models.thinking import Generation

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
