"""Rotations and conditional edits: against oracles of their own on every kind of block, and refused where weights are asked for."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_architectures import EVERY, close
from tiny import D_MODEL, N_LAYERS, folder_of, hf_forward, make, rows_of, shared, source_of, unit
from torch import Tensor

from interp_ablate import Ablate, Add, Plan, Site, certify, export_checkpoint
from interp_ablate.cli.main import main
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.rotation import Rotate
from interp_ablate.errors import DirectionError, ExportError, PlanError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.control_vector import write_control_vector
from interp_ablate.export.lora import export_lora
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.search.condition_choice import best_condition

ROWS = rows_of(9, 14, 6, 11, 8)
READ_AT, WRITTEN = Site(1, "resid_pre"), Site(1, "resid_post")
LATER = [Site(1, "resid_post"), Site(2, "mlp_out")]


# --------------------------------------------------------------------------------- rotations


def turned(
    x: np.ndarray,
    one: np.ndarray,
    two: np.ndarray,
    angle: float,
    adaptive: bool,
    share: float = 1.0,
) -> Any:
    """The activation by its polar coordinates in the plane; `two` is made orthogonal here."""
    first = one / np.linalg.norm(one)
    second = two - (two @ first) * first
    second /= np.linalg.norm(second)
    a, b = x @ first, x @ second
    radius, here = np.hypot(a, b), np.arctan2(b, a)
    there = np.angle(
        np.exp(1j * here) * np.exp(1j * share * np.angle(np.exp(1j * (math.radians(angle) - here))))
    )
    there = np.where(a > 0, there, here) if adaptive else there
    outside = x - a[..., None] * first - b[..., None] * second
    return (
        outside
        + (radius * np.cos(there))[..., None] * first
        + (radius * np.sin(there))[..., None] * second
    )


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 180.0, -135.0, 500.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_and_what_is_outside_the_plane_stay_and_the_angle_is_reached(
    angle: float, adaptive: bool
) -> None:
    x = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(0)).double()
    feature, other = 3 * unit(0), 0.7 * unit(0) + unit(1)
    edit = Rotate(feature, other, READ_AT, angle=angle, adaptive=adaptive)
    after = edit.map_at(READ_AT)(x)
    torch.testing.assert_close(after.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    basis = edit.vectors
    outside = torch.eye(D_MODEL).double() - basis.T @ basis
    torch.testing.assert_close(after @ outside, x @ outside, rtol=0, atol=1e-12)
    inside = after @ basis.T
    reached = torch.rad2deg(torch.atan2(inside[:, 1], inside[:, 0]))
    spared = (x @ unit(0) <= 0) if adaptive else torch.zeros(40, dtype=torch.bool)
    gap = (reached[~spared] - angle + 180) % 360 - 180
    assert float(gap.abs().max()) < 1e-9
    assert torch.equal(after[spared], x[spared]) and bool(spared.any()) == adaptive
    want = turned(x.numpy(), feature.numpy(), other.numpy(), angle, adaptive)
    np.testing.assert_allclose(after.numpy(), want, atol=1e-10)


TURNED = (Site(1, "resid_pre"), Site(2, "resid_post"))


def rotation(sites: Any = TURNED, **options: Any) -> Rotate:
    options = {"angle": (70.0, -20.0), "adaptive": True, "strength": 0.8} | options
    return Rotate(unit(0), unit(1), sites, **options)


def rotating(plan: Plan) -> Callable[[Site, Tensor], Tensor]:
    def edit(site: Site, x: Tensor) -> Tensor:
        for one in plan:
            if site in one.sites:
                i = one.sites.index(site)
                angle, share = one.angles[i], one.amounts[i]
                rows = x.double().numpy()
                out = turned(rows, unit(0).numpy(), unit(1).numpy(), angle, one.adaptive, share)
                x = torch.from_numpy(out).to(x)
        return x

    return edit


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_rotations_are_those_of_the_oracle(kind: str, adaptive: bool) -> None:
    model, plan = shared(kind), Plan((rotation(adaptive=adaptive),))
    with model.applied(plan):
        got = [model.logits([row], keep=len(row))[0] for row in ROWS[:2]]
        together = model.logits(ROWS[:2], keep=1)
    edit = rotating(plan)
    want = [hf_forward(source_of(kind), kind, row, edit) for row in ROWS[:2]]
    plain = [hf_forward(source_of(kind), kind, row) for row in ROWS[:2]]
    assert max(float((a - b).abs().max()) for a, b in zip(want, plain)) > 1e-3
    close(got, want)
    close(list(together[:, -1]), [each[-1] for each in want])


def test_a_strength_is_the_share_of_the_shorter_arc() -> None:
    x = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(1)).double()
    edit = Rotate(unit(0), unit(1), LATER, angle=(50.0, -170.0), strength=0.25)
    for site, angle in zip(LATER, (50.0, -170.0)):
        after = edit.map_at(site)(x)
        want = turned(x.numpy(), unit(0).numpy(), unit(1).numpy(), angle, False, 0.25)
        np.testing.assert_allclose(after.numpy(), want, atol=1e-10)
        torch.testing.assert_close(after.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
        assert edit.times(0.0).map_at(site)(x).allclose(x, rtol=0, atol=1e-12)
    assert edit.times(2.0).amounts == (0.5, 0.5)
    here = edit.at_sites([(LATER[1], READ_AT)])
    assert (here.sites, here.angles) == ((READ_AT,), (-170.0,))


def test_sixteen_bits_keep_the_norm() -> None:
    x = torch.randn(64, 8, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16()
    from interp_ablate.models.plan_hooks import SiteWriter

    plan = Plan((rotation(READ_AT, angle=120.0),))
    after = SiteWriter(READ_AT, [plan.maps_at(READ_AT)], D_MODEL)(x, None)
    assert after.dtype == torch.bfloat16
    exact = plan.edits[0].map_at(READ_AT)(x.double())
    assert float((after.double() - exact).abs().max()) <= 0.5 * 2**-7 * float(exact.abs().max())


# --------------------------------------------------------------------------------- conditions


def similarities(kind: str, condition: Condition) -> list[float]:
    """Of each row, in numpy from a plain forward pass."""
    found = []
    for row in ROWS:
        seen: list[np.ndarray] = []

        def look(site: Site, x: Tensor, seen: list[np.ndarray] = seen) -> Tensor:
            if site == condition.site:
                seen.append(x[0].double().numpy())
            return x

        hf_forward(source_of(kind), kind, row, look)
        h = seen[0].mean(0) if condition.pooled == "mean" else seen[0][-1]
        c = condition.vector.numpy()
        image = np.tanh(np.outer(c, c) @ h / (c @ c))
        other = image if condition.similarity == "projected" else c
        found.append(float(h @ other / np.linalg.norm(h) / np.linalg.norm(other)))
    return found


def splitting(kind: str, **options: Any) -> tuple[Condition, list[bool]]:
    """A condition that some of the rows meet and others do not, and which ones."""
    values = similarities(kind, Condition(unit(5), READ_AT, threshold=0.0, **options))
    ordered = sorted(values)
    gaps = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(ordered[1:-1])]
    threshold = max(gaps)[1]
    above = options.pop("above", True)
    met = [(value > threshold) == above for value in values]
    assert any(met) and not all(met)
    return Condition(unit(5), READ_AT, threshold=threshold, above=above, **options), met


def behaviour(**options: Any) -> Add:
    return Add(4 * unit(7), LATER, **options)


def alone(model: Any, met: list[bool], plan: Any, run: Callable[[list[int]], Any]) -> list[Any]:
    """What each row gives by itself: under the plain edit where the condition is met, else unedited."""
    found = []
    for row, yes in zip(ROWS, met):
        with model.applied(plan if yes else None):
            found.append(run(row))
    return found


@pytest.mark.parametrize("kind", EVERY)
def test_the_edit_is_there_in_the_rows_that_meet_the_condition_and_nowhere_else(kind: str) -> None:
    """In one padded batch: logits, and generation with a cache."""
    model, (condition, met) = shared(kind), splitting(kind)
    plan, inner = Plan((Conditional(behaviour(), condition),)), behaviour()
    want = alone(model, met, inner, lambda row: model.logits([row])[0])
    said = alone(model, met, inner, lambda row: model.generate([row], max_new_tokens=5)[0].tokens)
    with model.applied(plan):
        close(list(model.logits(ROWS)), want)
        assert [each.tokens for each in model.generate(ROWS, max_new_tokens=5)] == said
    plain = model.logits(ROWS)
    away = [float((a - b).abs().max()) > 1e-4 for a, b in zip(want, plain)]
    assert away == met


@pytest.mark.parametrize("similarity", ["projected", "cosine"])
@pytest.mark.parametrize("pooled", ["mean", "last"])
@pytest.mark.parametrize("above", [True, False])
def test_every_form_of_condition(backend: str, similarity: str, pooled: str, above: bool) -> None:
    model = shared("llama_gqa", backend)
    condition, met = splitting("llama_gqa", similarity=similarity, pooled=pooled, above=above)
    inner = behaviour(positions="generated")
    plan = Plan((Conditional(inner, condition),))
    plain = [each.tokens for each in model.generate(ROWS, max_new_tokens=6)]
    with model.applied(plan):
        said = [each.tokens for each in model.generate(ROWS, max_new_tokens=6)]
        (streamed,) = ["".join(t.text for t, _ in model.monitor(ROWS[0], (), max_new_tokens=6))]
    with model.applied(inner):
        steered = [each.tokens for each in model.generate(ROWS, max_new_tokens=6)]
    assert said == [b if yes else a for a, b, yes in zip(plain, steered, met)]
    assert streamed == model.decode(said[0])


@pytest.mark.parametrize("inner", ["ablate", "affine", "rotate"])
def test_other_edits_can_have_a_condition(inner: str) -> None:
    model, (condition, met) = shared("llama_gqa"), splitting("llama_gqa")
    edit: Any = {
        "ablate": Ablate(unit(2, k=2), LATER, strength=1.5),
        "affine": AffineEdit(unit(1, k=2), unit(3, k=2), LATER, shift=unit(4)),
        "rotate": Rotate(unit(0), unit(1), LATER, angle=90.0),
    }[inner]
    want = alone(model, met, edit, lambda row: model.logits([row])[0])
    with model.applied(Plan((Conditional(edit, condition),))):
        close(list(model.logits(ROWS)), want)


def test_rows_with_plans_of_their_own_have_conditions_of_their_own(backend: str) -> None:
    """Beside rotations, plain edits and none; also where a prompt's beginning is shared."""
    model = shared("llama_gqa", backend)
    condition, _ = splitting("llama_gqa")
    other = Condition(unit(6), Site(0, "resid_post"), threshold=0.01, similarity="cosine")
    plans = [
        Plan((Conditional(behaviour(), condition),)),
        Plan((rotation(), Conditional(Ablate(unit(2), LATER, strength=2.0), other))),
        None,
        Plan((Conditional(rotation(LATER), condition), behaviour())),
        Plan((Conditional(behaviour(), other),)),
    ]
    for rows in (ROWS, [[*rows_of(20)[0], *row] for row in ROWS]):
        with model.applied_each(plans):
            logits = model.logits(rows)
            texts = [each.tokens for each in model.generate(rows, max_new_tokens=4)]
        for i, plan in enumerate(plans):
            with model.applied(plan):
                close([logits[i]], [model.logits(rows[i : i + 1])[0]])
                assert model.generate(rows[i : i + 1], max_new_tokens=4)[0].tokens == texts[i]


def test_the_prompt_decides_also_where_answers_follow_it() -> None:
    """Teacher-forced answers: their tokens have no part in the condition."""
    model, (condition, met) = shared("llama_gqa"), splitting("llama_gqa")
    longer, lengths = [[*row, *range(5, 12)] for row in ROWS], [len(row) for row in ROWS]

    def read(rows: list[list[int]], prompts: list[int]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for batch, logits, _ in model.stream(rows, keep=7, prompt_lengths=prompts):
            assert logits is not None
            found.update(zip(batch.index, logits))
        return [found[i] for i in range(len(rows))]

    want = []
    for row, n, yes in zip(longer, lengths, met):
        with model.applied(behaviour() if yes else None):
            want += read([row], [n])
    with model.applied(Plan((Conditional(behaviour(), condition),))):
        close(read(longer, lengths), want)


def test_a_cached_stream_is_read_from_the_condition_on() -> None:
    """What an evaluation does: passes resume at the first block that something reaches."""
    model, (condition, met) = make("llama_gqa", "hf"), splitting("llama_gqa")
    plan = Plan((Conditional(Add(4 * unit(7), Site(2, "resid_post")), condition),))
    base = ModelOutputs(model, ROWS, max_new_tokens=4)
    base.first_logprobs  # noqa: B018 - fills the cache
    cached = base.with_plan(plan).first_logprobs
    with model.applied(plan):
        close([model.logits(ROWS)[:, -1].log_softmax(-1)], [cached.float()])
    gap = (cached - base.first_logprobs).abs().amax(-1) > 1e-4
    assert gap.tolist() == met


def test_nested_plans_and_hooks_that_are_gone_afterwards() -> None:
    model, condition = shared("llama_gqa"), splitting("llama_gqa")[0]
    plan = Plan((Conditional(behaviour(), condition),))
    before = model.logits(ROWS)
    with model.applied(Add(0.0 * unit(1) + unit(1), LATER)), model.applied(plan):
        nested = model.logits(ROWS)
    with model.applied(plan + Add(unit(1), LATER)):
        close([nested], [model.logits(ROWS)])
    assert torch.equal(model.logits(ROWS), before)
    with pytest.raises(PlanError, match="condition of the prompt"), model.applied(plan):
        model.tl(torch.tensor([ROWS[0]]))


@pytest.mark.parametrize("outer", [True, False])
def test_a_condition_is_read_before_any_plan_writes_at_its_site(backend: str, outer: bool) -> None:
    """Of plans one in the other, the inner one's condition saw what the outer one wrote; of the same as one plan, not."""
    model, (condition, met) = shared("llama_gqa", backend), splitting("llama_gqa")
    away, inner = Add(9 * unit(5), READ_AT), Conditional(behaviour(), condition)
    want = []
    for row, yes in zip(ROWS, met):
        with model.applied(Plan((away, behaviour()) if yes else (away,))):
            want.append(model.logits([row])[0])
    with model.applied(Plan((away, inner))):
        close(list(model.logits(ROWS)), want)
    first, second = (away, inner) if outer else (inner, away)
    with model.applied(first), model.applied(second):
        close(list(model.logits(ROWS)), want)
        assert model.active_plan == Plan((first, second))


def test_no_condition_is_chosen_where_a_plan_writes() -> None:
    contrast = ContrastSet.from_texts(["a b", "c d"], ["e f", "g h"])
    direction = Direction(unit(5), 1.0, READ_AT)
    with pytest.raises(PlanError, match="before any plan writes"), shared("llama_gqa").applied(Add(unit(), READ_AT)):  # fmt: skip
        best_condition(shared("llama_gqa"), contrast, direction)


# --------------------------------------------------------------------------------- choosing one


def test_of_all_directions_those_are_tried_where_a_condition_can_be_read() -> None:
    """`collect` records resid_mid too; its directions, as they come, were refused at the first of these."""
    contrast = ContrastSet.from_texts(["a b", "c d"], ["e f", "g h"])
    mid, post = (Direction(unit(1), 1.0, Site(1, point)) for point in ("resid_mid", "resid_post"))
    assert best_condition(make("llama_gqa"), contrast, [mid, post]).condition.site == post.site
    with pytest.raises(PlanError, match=r"got .*resid_mid"):
        best_condition(make("llama_gqa"), contrast, mid)


def test_the_best_condition_is_the_one_of_highest_f1() -> None:
    model = make("llama_gqa")
    contrast = ContrastSet.from_texts(
        [f"fetch number {i} now" for i in range(8)], [f"name number {i} please" for i in range(8)]
    )
    directions = [Direction(unit(i), 1.0, Site(1, "resid_post")) for i in range(3)]
    for similarity in ("projected", "cosine"):
        for pooled in ("mean", "last"):
            found = best_condition(
                model,
                contrast,
                directions,
                similarity=similarity,
                pooled=pooled,  # type: ignore[arg-type]
            )
            # by hand: every threshold among the similarities themselves, both sides, from activations one by one
            best = 0.0
            for each in directions:
                trial = Condition(each, threshold=0.0, similarity=similarity, pooled=pooled)  # type: ignore[arg-type]
                values = [
                    of_prompt(model, trial, p) for p in (*contrast.positive, *contrast.negative)
                ]
                for t in values:
                    for sign in (1, -1):
                        met = [sign * v >= sign * t for v in values]
                        hits = sum(met[:8])
                        best = max(best, 2 * hits / (sum(met) + 8))
            assert found.f1 == pytest.approx(best)
            plan = Plan((Conditional(behaviour(), found.condition),))
            said = [float(v) for v in (found.recall, found.false_rate)]
            for side, rate in zip((contrast.positive, contrast.negative), said):
                plain = model.logits(side)
                with model.applied(plan):
                    moved = (model.logits(side) - plain).abs().amax((1, 2)) > 1e-4
                assert float(moved.double().mean()) == rate
    with pytest.raises(DirectionError, match="needs one or more directions"):
        best_condition(model, contrast, [])


def of_prompt(model: Any, condition: Condition, prompt: Any) -> float:
    seen: list[Tensor] = []
    row = model.encode(prompt)
    capture = {condition.site: lambda x, batch: seen.append(x[0]) or x[:0]}
    list(model.stream([row], keep=0, capture=capture))
    return float(condition.similarities(
        (seen[0].mean(0) if condition.pooled == "mean" else seen[0][-1]).double()[None]
    ))  # fmt: skip


# --------------------------------------------------------------------------------- as data


def hooks_only_plans() -> dict[str, Plan]:
    condition = Condition(unit(5), READ_AT, threshold=1 / 3, above=False)
    return {
        "rotate": Plan((rotation(label="turn"), rotation(adaptive=False, positions="prompt"))),
        "conditional": Plan((Conditional(behaviour(label="x"), condition), behaviour())),
        "both": Plan((Conditional(rotation(LATER), condition),)),
    }


@pytest.mark.parametrize("name", hooks_only_plans())
def test_json_keeps_every_bit(name: str, tmp_path: Path) -> None:
    plan = hooks_only_plans()[name]
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan and back.fingerprint == plan.fingerprint and repr(back) == repr(plan)
    assert back.to_dict() == plan.to_dict()
    for one, two in zip(plan, back, strict=True):
        assert torch.equal(one.vectors, two.vectors) and one.where == two.where
    for entry in plan.to_dict()["edits"]:
        assert {"op", "sites", "positions", "label"} <= set(entry)
    assert "rotate" in repr(plan) or "similarity at" in repr(plan)
    plan._repr_html_()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("rotate", {"adaptive": 1}, "true or false"),
        ("rotate", {"angle": "x"}, "angle is a number"),
        ("rotate", {"vectors": [[1.0, 0.0]]}, "two rows"),
        ("conditional", {"coefficient": 2.0}, "says something else beside its edit"),
        ("conditional", {"condition": {}}, "lacks or misnames"),
        ("conditional", {"edit": {"op": "leave"}}, "lacks or misnames"),
    ],
)
def test_bad_json(name: str, change: dict[str, Any], said: str) -> None:
    data = json.loads(json.dumps(hooks_only_plans()[name].to_dict()))
    data["edits"][0] |= change
    with pytest.raises(PlanError, match=said):
        Plan.from_dict(data)


CONDITION = Condition(unit(5), READ_AT, threshold=0.1)


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: Rotate(unit(0), 2 * unit(0), READ_AT, angle=9.0), "not linearly independent"),
        (lambda: Rotate(unit(0), torch.ones(3), READ_AT, angle=9.0), "of one stream"),
        (lambda: Rotate(unit(0), unit(1), READ_AT, angle=math.nan), "angle must be finite"),
        (lambda: rotation().map_at(READ_AT, torch.ones(D_MODEL)), "before a norm"),
        (lambda: Condition(unit(5), threshold=0.1), "has a site"),
        (lambda: Condition(unit(5), Site(1, "mlp_out"), threshold=0.1), "resid_pre or resid_post"),
        (lambda: Condition(unit(5), READ_AT, threshold=math.inf), "finite number"),
        (lambda: Condition(unit(5), READ_AT, threshold=0.1, pooled="x"), "unknown 'x'"),  # type: ignore[arg-type]
        (lambda: Condition(unit(5), READ_AT, threshold=0.1, above=1), "true or false"),  # type: ignore[arg-type]
        (lambda: Condition(unit(5), "here", threshold=0.1), "here"),
        (lambda: Conditional(Add(unit(), Site(0, "embed")), CONDITION), "before blocks.1"),
        (lambda: Conditional(Conditional(behaviour(), CONDITION), CONDITION), "made of one edit"),
        (
            lambda: Conditional(Ablate(unit(), LATER[1:], norm_preserving=True), CONDITION),
            "without norm_preserving",
        ),
        (lambda: Conditional(behaviour(), "x"), "takes a Condition"),  # type: ignore[arg-type]
        (lambda: Conditional(Add(torch.ones(3), LATER), CONDITION), "both are of one model"),
    ],
)  # fmt: skip
def test_bad_input(make_it: Callable[[], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make_it()


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", hooks_only_plans())
def test_weights_certificates_and_control_vectors_refuse_in_words(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, plan = shared("llama_gqa"), hooks_only_plans()[name]
    out = tmp_path / "out"
    said = "works on a running model only"
    with pytest.raises(ExportError, match=said):
        export_checkpoint(model, plan, out)
    with pytest.raises(ExportError, match=said):
        export_lora(model, plan, out)
    with pytest.raises(ExportError, match=said):
        write_control_vector(plan, tmp_path / "v.gguf", model_hint="llama", n_layers=N_LAYERS)
    with pytest.raises(ExportError, match=said):
        audit(AuditSource.of_model(model), plan, folder_of(tmp_path_factory.mktemp("model")))
    with pytest.raises(ExportError, match=said):
        certify(model, plan, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rotate", "conditional"])
@pytest.mark.parametrize("format_", ["checkpoint", "lora", "gguf", "control-vector", "source"])
def test_the_command_refuses_before_it_loads_anything(
    name: str, format_: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    folder = folder_of(tmp_path / "model")
    hooks_only_plans()[name].save(tmp_path / "plan.json")
    flags = ["--source", str(folder)] if format_ == "source" else [
        "--model", str(folder), "--format", format_
    ]  # fmt: skip
    monkeypatch.setattr("interp_ablate.models.load.load_model", None)
    arguments = ["export", "--plan", str(tmp_path / "plan.json"), *flags]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "works on a running model only" in error and "Traceback" not in error
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "plan.json"]


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_an_export_that_edits_everywhere_is_no_export_of_an_edit_at_some_positions(
    positions: Any, tmp_path: Path
) -> None:
    """All probes are prompts: an export of all positions had passed as one of the prompt's."""
    model = shared("llama_gqa")
    export_checkpoint(model, Plan((Ablate(unit(), model.writers),)), tmp_path / "out")
    plan = Plan((Ablate(unit(), model.writers, positions=positions),))
    with pytest.raises(ExportError, match=f"{positions} positions only"):
        certify(model, plan, tmp_path / "out")
