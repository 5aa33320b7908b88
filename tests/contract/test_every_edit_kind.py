"""Every kind of edit at every place that tells kinds apart: done exactly, or refused in words.

`PLACES` names for each place the kinds that it does and those that it refuses. Somebody who adds a kind has to say
so at each of them; somebody who adds a place where kinds are told apart (`isinstance`) has to name it here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_architectures import edited
from tiny import D_MODEL, N_LAYERS, hf_forward, rows_of, shared, source_of, unit

import interp_ablate
from interp_ablate import Ablate, Add, Clamp, Plan, Prompt, Site, export_checkpoint
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.edit import EditBase
from interp_ablate.edits.joint import jointly
from interp_ablate.edits.kinds import _EDITS, Edit, Erase
from interp_ablate.edits.plan import _summed_values
from interp_ablate.edits.rotation import Rotate
from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.calibration import strength_at_kl_quantile
from interp_ablate.evaluation.perplexity import Corpus, corpus_losses
from interp_ablate.evaluation.side_by_side import _is_norm_preserving
from interp_ablate.export.certification import removed_vectors
from interp_ablate.export.control_vector import write_control_vector
from interp_ablate.export.lora import export_lora
from interp_ablate.export.model_card import _edit
from interp_ablate.runs.fits import load_fitted_edits
from interp_ablate.runs.report import _plans
from interp_ablate.search.derived_edits import control_plan, scaled_to_kl
from interp_ablate.training.healing.case import residual_share_along
from interp_ablate.training.preventative.additions import train_with_additions

KIND = "llama_biases"  # so that weights can hold what is added
KINDS = {each.__name__: each for each in get_args(Edit)}
ROW = rows_of(9)[0]
HERE, ELSE = Site(1, "mlp_out"), Site(1, "resid_post")
STREAM = [Site(i, p) for i in range(N_LAYERS) for p in ("resid_pre", "resid_mid", "resid_post")]  # type: ignore[arg-type]


def sample(kind: str, sites: Any = HERE) -> Any:
    """One edit of a kind; the condition is met by every prompt."""
    always = Condition(unit(5), Site(0, "resid_pre"), threshold=-2.0)
    return {
        "Ablate": lambda: Ablate(unit(0), sites),
        "Add": lambda: Add(unit(0), sites),
        "Clamp": lambda: Clamp(unit(0), sites, value=1.5),
        "Erase": lambda: Erase(unit(0), unit(0) + unit(1), sites, value=1.5),
        "AffineEdit": lambda: AffineEdit(-unit(0), unit(0) + unit(1), sites, shift=unit(3)),
        "Rotate": lambda: Rotate(unit(0), unit(1), sites, angle=60.0),
        "Conditional": lambda: Conditional(Ablate(unit(0), sites), always),
    }[kind]()


def stream() -> torch.Tensor:
    return torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0)).double()


def hooked(plan: Plan) -> torch.Tensor:
    model = shared(KIND, "hf")
    with model.applied(plan):
        return model.logits([ROW], keep=len(ROW))[0]


def same(one: torch.Tensor, other: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


def as_hooks(edit: Any, tmp: Path) -> None:
    def change(site: Site, x: torch.Tensor) -> torch.Tensor:
        return edit.map_at(site)(x.double()).to(x) if site in edit.sites else x

    want = hf_forward(source_of(KIND), KIND, ROW, change)
    same(hooked(Plan((edit,))), want)
    assert float((want - hf_forward(source_of(KIND), KIND, ROW)).abs().max()) > 1e-3


def as_data(edit: Any, tmp: Path) -> None:
    plan = Plan((edit,))
    plan.save(tmp / "plan.json")
    back = Plan.load(tmp / "plan.json")
    assert back == plan and type(back.edits[0]) is type(edit)
    assert edit.op in plan._repr_html_() and edit.op in _edit(edit.to_dict())
    told = {"Clamp": "1.5", "AffineEdit": "shift", "Rotate": "angle 60", "Conditional": "if "}
    assert told.get(type(edit).__name__, edit.amount) in plan._repr_html_()
    assert ("shift" in _edit(edit.to_dict())) == isinstance(edit, AffineEdit)
    [shown] = _plans({"plan": plan.to_dict()})
    assert shown["edits"][0]["op"] == edit.op and shown["edits"][0]["amount"] != "–"
    assert not _is_norm_preserving(plan)


def moved_to_another_site(edit: Any, tmp: Path) -> None:
    there = edit.at_sites([(HERE, ELSE)])
    assert there.sites == (ELSE,)
    same(there.map_at(ELSE)(stream()), edit.map_at(HERE)(stream()), 0)


def weaker(edit: Any, tmp: Path) -> None:
    same(edit.times(0.0).map_at(HERE)(stream()), stream(), 1e-12)
    same(edit.times(1.0).map_at(HERE)(stream()), edit.map_at(HERE)(stream()), 0)


def read_rows(edit: Any, tmp: Path) -> None:
    """What is at right angles to all that an edit reads goes through it unchanged; the rest does not."""
    rows = edit.reads
    beside = stream() - stream() @ torch.linalg.pinv(rows) @ rows if len(rows) else stream()
    change = edit.map_at(HERE)
    same(change(stream() + beside) - change(stream()), beside, 1e-10)
    for row in rows:
        assert float((change(stream() + row) - change(stream()) - row).abs().max()) > 1e-3
    share = residual_share_along(shared(KIND, "hf"), Plan((edit,)), [Prompt("a")])
    assert bool(share) == bool(len(rows))


def in_weights(edit: Any, tmp: Path) -> None:
    hf = edited(source_of(KIND), Plan((edit,)))[0]
    same(hf(torch.tensor([ROW])).logits[0], hooked(Plan((edit,))))


def on_the_stream_in_weights(edit: Any, tmp: Path) -> None:
    spread = edit.at_sites([(HERE, site) for site in STREAM])
    in_weights(spread, tmp)


def as_a_checkpoint(edit: Any, tmp: Path) -> None:
    assert export_checkpoint(shared(KIND, "hf"), Plan((edit,)), tmp / "out")["passed"]


def as_an_adapter(edit: Any, tmp: Path) -> None:
    pytest.importorskip("peft")
    assert export_lora(shared(KIND, "hf"), Plan((edit,)), tmp / "out")["passed"]


def as_a_control_vector(edit: Any, tmp: Path) -> None:
    pytest.importorskip("gguf")
    place = edit.at_sites([(HERE, ELSE)])
    options: dict[str, Any] = {"model_hint": "llama", "n_layers": N_LAYERS}
    assert write_control_vector(Plan((place,)), tmp / "v.gguf", **options)["blocks"] == [1]


def while_a_model_trains(edit: Any, tmp: Path) -> None:
    hf = source_of(KIND)
    with train_with_additions(hf, Plan((edit.at_sites([(HERE, ELSE)]),))):
        got = hf(torch.tensor([ROW])).logits[0]
    same(got, hooked(Plan((edit.at_sites([(HERE, ELSE)]),))))


def left_nothing_along(edit: Any, tmp: Path) -> None:
    """Along what is said to be removed, everywhere in the stream, the map leaves nothing."""
    model = shared(KIND, "hf")
    spread = edit.at_sites([(HERE, site) for site in model.writers])
    along = removed_vectors(Plan((spread,)), model)
    after = spread.map_at(HERE)(stream())
    assert not len(along) or float((after @ along.T).abs().max()) < 1e-9
    if isinstance(edit, Ablate):
        assert len(along) == 1


def warned_of_a_sum(edit: Any, tmp: Path) -> None:
    """Writers sum: an edit that sets what it reads to a value, at two of them, sets the stream to twice the value."""
    after = edit.map_at(HERE)(stream()) @ edit.reads.T
    sets = len(edit.reads) == 1 and float(after.std()) < 1e-9 < float(after.abs().max())
    both = edit.at_sites([(HERE, site) for site in (Site(1, "attn_out"), HERE)])
    assert bool(list(_summed_values([both]))) == sets


def together_with_another(edit: Any, tmp: Path) -> None:
    both = jointly([edit, Ablate(unit(7), HERE)])
    [(_, change)] = both.maps_at(HERE)
    same(change(stream()) @ unit(7), 0 * stream()[:, 0], 1e-10)
    same(change(stream()) @ edit.reads[0], edit.map_at(HERE)(stream()) @ edit.reads[0], 1e-10)


def along_a_control(edit: Any, tmp: Path) -> None:
    direction = Direction(unit(9), 1.0, HERE)
    [turned] = control_plan(Plan((edit,)), direction)
    assert type(turned) is type(edit)
    step = turned.map_at(HERE)(stream()) - stream()
    same(step, (step @ unit(9))[:, None] * unit(9), 1e-10)


def scaled_by_a_search(edit: Any, tmp: Path) -> None:
    found = scaled_to_kl(Plan((edit,)), 0.25, lambda plan: plan.edits[0].amounts[0] ** 2)
    assert found is not None and found[1] == pytest.approx(0.5, rel=0.1)


def scaled_by_a_quantile(edit: Any, tmp: Path) -> None:
    model = shared(KIND, "hf")
    found = strength_at_kl_quantile(model, Plan((edit,)), [ROW], kl=1e-3, tolerance=0.2)
    assert 0.8e-3 <= found.kl <= 1e-3 and found.plan == Plan((edit.times(found.strength),))


def under_perplexity(edit: Any, tmp: Path) -> None:
    text = Corpus("c", ("some text of several words",))
    assert corpus_losses(shared(KIND, "hf"), text, plan=Plan((edit,)), context=16, stride=8)


def beside_a_kept_norm(edit: Any, tmp: Path) -> None:
    kept = Ablate(unit(4), HERE, norm_preserving=True)
    assert Plan((kept, edit)).norm_preserving_at(HERE) is kept
    in_weights(edit, tmp)


def kept_as_a_fit(edit: Any, tmp: Path) -> None:
    Plan((edit,)).save(tmp / "fit.json")
    assert load_fitted_edits(tmp)["fit"].to_dict() == edit.to_dict()


EVERY = "Ablate Add Clamp Erase AffineEdit Rotate Conditional"
LINEAR = "Ablate Add Clamp Erase AffineEdit"
Place = Callable[[Any, Path], None]
# A place: the kinds that it does, and those that it refuses.
PLACES: dict[Place, tuple[str, str]] = {
    as_hooks: (EVERY, ""),
    as_data: (EVERY, ""),
    moved_to_another_site: (EVERY, ""),
    weaker: ("Ablate Add Erase AffineEdit Rotate Conditional", "Clamp"),
    read_rows: (EVERY, ""),
    in_weights: (LINEAR, "Rotate Conditional"),
    on_the_stream_in_weights: ("Ablate Add Clamp Erase", "AffineEdit Rotate Conditional"),
    as_a_checkpoint: (LINEAR, "Rotate Conditional"),
    as_an_adapter: (LINEAR, "Rotate Conditional"),
    as_a_control_vector: ("Add", "Ablate Clamp Erase AffineEdit Rotate Conditional"),
    while_a_model_trains: ("Add", "Ablate Clamp Erase AffineEdit Rotate Conditional"),
    left_nothing_along: (f"{LINEAR} Rotate", "Conditional"),
    warned_of_a_sum: (EVERY, ""),
    together_with_another: ("Ablate Clamp Erase", "Add AffineEdit Rotate Conditional"),
    along_a_control: ("Ablate Erase", "Add Clamp AffineEdit Rotate Conditional"),
    scaled_by_a_search: ("Ablate Erase", "Add Clamp AffineEdit Rotate Conditional"),
    scaled_by_a_quantile: ("Ablate Add Erase AffineEdit Conditional", "Clamp Rotate"),
    under_perplexity: ("Ablate Add Clamp Erase AffineEdit Rotate", "Conditional"),
    beside_a_kept_norm: ("Add", "Ablate Clamp Erase AffineEdit Rotate Conditional"),
    kept_as_a_fit: ("Ablate Erase", "Add Clamp AffineEdit Rotate Conditional"),
}
# Functions that tell kinds apart, and the place above that tries them; None where it is about one kind alone.
DISPATCHES = {
    "edits/conditional.__init__": None,
    "edits/conditional.refuse_conditions": under_perplexity,
    "edits/joint._joint": together_with_another,
    "edits/joint._strength": together_with_another,
    "edits/joint._value": together_with_another,
    "edits/joint.jointly": together_with_another,
    "edits/plan._summed_values": warned_of_a_sum,
    "edits/plan._undone_ablations": None,
    "edits/plan.norm_preserving_at": beside_a_kept_norm,
    "evaluation/calibration._scalable": scaled_by_a_quantile,
    "export/certification.removed_vectors": left_nothing_along,
    "export/control_vector._block_vectors": as_a_control_vector,
    "models/installed_plans.conditions": as_hooks,
    "runs/fits.load_fitted_edits": kept_as_a_fit,
    "search/derived_edits._rebuilt": along_a_control,
    "search/derived_edits._turnable": scaled_by_a_search,
    "search/derived_edits.along_control_direction": along_a_control,
    "training/preventative/additions._checked": while_a_model_trains,
    "weights/weight_form._at_all_writers": on_the_stream_in_weights,
    "weights/weight_form._is_projection": on_the_stream_in_weights,
    "weights/weight_form._nearest": on_the_stream_in_weights,
    "weights/weight_form.writers_only_form": on_the_stream_in_weights,
}


def test_a_kind_is_named_at_every_place() -> None:
    assert set(_EDITS.values()) == set(KINDS.values())
    assert all(issubclass(each, EditBase) for each in KINDS.values())
    for place, (does, refuses) in PLACES.items():
        named = sorted([*does.split(), *refuses.split()])
        assert named == sorted(KINDS), f"{place.__name__}: say of every kind whether it is done"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_done_or_refused(place: Place, kind: str, tmp_path: Path) -> None:
    edit = sample(kind)
    if kind in PLACES[place][0].split():
        place(edit, tmp_path)
        return
    with pytest.raises(InterpAblateError) as caught:
        place(edit, tmp_path)
    assert len(str(caught.value)) > 40


def dispatches() -> set[str]:
    """Every function of the package that asks whether something is of some kinds of edit."""
    root, found = Path(inspect.getfile(interp_ablate)).parent, set()
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not re.search(rf"isinstance\((.|\n){{1,80}}\b({'|'.join(KINDS)})\b", text):
            continue
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "isinstance":
                    names = {n.id for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)}
                    if names & set(KINDS):
                        found.add(f"{path.relative_to(root).with_suffix('')}.{function.name}")
    return found


def test_every_function_that_tells_kinds_apart_is_tried_here() -> None:
    assert dispatches() == set(DISPATCHES)
    assert set(DISPATCHES.values()) <= {*PLACES, None}
