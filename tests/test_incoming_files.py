"""The gate for files that come in: hostile ones, by every command that reads their kind, end in one message."""

from __future__ import annotations

import ast
import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hostile
import pyarrow
import pyarrow.parquet
import pytest
import safetensors
import torch
from hostile import time_limit
from tiny import N_LAYERS, folder_of, unit

import interp_ablate
from interp_ablate import Ablate, Plan, collect, everywhere, load_model
from interp_ablate.activations.token_activations import TokenActivations
from interp_ablate.cli.main import main
from interp_ablate.cli.options import chosen_in_run
from interp_ablate.datasets import filter_journal, screening_measure
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.foreign_files import read_directions
from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation import compare
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.checkpoint import export_folder
from interp_ablate.export.hub import push_to_hub
from interp_ablate.export.model_card import add_to_card
from interp_ablate.league import journal as league_journal
from interp_ablate.league.journal import LeagueJournal, Record
from interp_ablate.persona import rollouts
from interp_ablate.persona.persona import FORMAT, load_persona
from interp_ablate.persona.rollouts import read_answers
from interp_ablate.runs import run_folder
from interp_ablate.runs.report import write_report
from interp_ablate.scoring.expressions import expression_scorer
from interp_ablate.search.trial_table import read_trials
from interp_ablate.search.trials import Trial, TrialLog
from interp_ablate.sites import Site
from interp_ablate.storage.json_shapes import ROLLOUTS
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.row_files import RowFile
from interp_ablate.training.healing.case import read_plan

PLAN = Plan((Ablate(unit(), everywhere(N_LAYERS)),))
LONGEST = 20.0  # seconds; a case takes a tenth of one
READERS = ("load", "export", "verify")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder `a`, its export `b`, a GGUF file and a plan."""
    place = tmp_path_factory.mktemp("sound")
    folder_of(place / "a")
    export_folder(place / "a", PLAN, place / "b")
    hostile.gguf_of(folder_of(place / "c"), place / "m.gguf")
    PLAN.save(place / "plan.json")
    return place


def read_by(reader: str, folder: Path, sound: Path) -> None:
    """What a command does with a folder."""
    if reader == "load":
        load_model(folder)
    elif reader == "export":
        export_folder(folder, PLAN, folder.parent / "out")
    elif not (report := audit(AuditSource.of_folder(sound / "a"), PLAN, folder)).passed:
        raise InterpAblateError(str(report.problems))


def refused(work: Callable[[], object]) -> str:
    """The message, one without a library's name for its own errors."""
    with time_limit(LONGEST), pytest.raises(InterpAblateError) as caught:
        work()
    text = str(caught.value)
    assert 20 < len(text) < 3000 and "Traceback" not in text
    return text


@pytest.mark.parametrize("reader", READERS)
def test_what_is_sound_is_taken(reader: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / ("b" if reader == "verify" else "a"), tmp_path / "m")
    read_by(reader, tmp_path / "m", sound)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [*hostile.MODEL_FOLDERS, *hostile.SIDE_FILES])
def test_folders(name: str, reader: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(sound / ("b" if reader == "verify" else "a"), folder)
    {**hostile.MODEL_FOLDERS, **hostile.SIDE_FILES}[name](folder)
    refused(lambda: read_by(reader, folder, sound))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", hostile.GGUF_FILES)
def test_gguf_files(name: str, sound: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(sound / "m.gguf", tmp_path))
    hostile.GGUF_FILES[name](path)
    refused(lambda: load_model(path))


def test_a_sound_gguf_file_is_taken(sound: Path) -> None:
    assert load_model(sound / "m.gguf").n_layers == N_LAYERS


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npy", "gguf"])
@pytest.mark.parametrize("name", ["FIFO", "LFS pointer", "empty", "web page"])
def test_files_of_directions(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"v.{suffix}"
    if name == "FIFO":
        os.mkfifo(path)
    else:
        page = "<!DOCTYPE html><html></html>"
        path.write_text({"LFS pointer": hostile.POINTER, "empty": ""}.get(name, page))
    refused(lambda: read_directions(path, site="3.resid_post"))


@pytest.mark.parametrize("name", hostile.PLANS)
def test_plans(name: str, sound: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(sound / "plan.json", tmp_path))
    hostile.PLANS[name](path)
    refused(lambda: Plan.load(path))


def test_messages_say_what_the_file_is_and_how_to_get_it(sound: Path, tmp_path: Path) -> None:
    cases = {
        "a shard is an LFS pointer": "git-lfs pointer.*269060552 bytes.*git lfs pull",
        "a shard is cut short": "cut short: 100 of .* bytes are missing.*hf download",
        "a tensor is missing": r"has no tensor model\.layers\.\d\.mlp\.down_proj\.weight",
        "a tensor of another shape": r"down_proj\.weight \[4, 48\] instead of \[32, 48\]",
        "a tensor nobody knows": r"unknown to its model zzz\.weight",
        "10^9 layers": "num_hidden_layers = 1000000000.* 29 tensors",
        "a pickle cut short": "not a whole file of torch",
        "index with an absolute path": "only plain names of .safetensors",
    }
    for name, pattern in cases.items():
        folder = tmp_path / name.replace("^", "")
        shutil.copytree(sound / "a", folder)
        hostile.MODEL_FOLDERS[name](folder)
        with pytest.raises(InterpAblateError, match=pattern):
            load_model(folder)


def test_the_command_line_ends_with_2_and_one_message(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sound / "a", tmp_path / "m")
    hostile.MODEL_FOLDERS["a tensor is missing"](tmp_path / "m")
    arguments = ["--plan", str(sound / "plan.json"), "--out", str(tmp_path / "out")]
    assert main(["export", "--source", str(tmp_path / "m"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("interp-ablate export: ")


@pytest.mark.parametrize("side", ["a", "b"])
def test_verify_tells_a_list_as_generation_config(
    side: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the source it is bad input; of the export it is a difference, and a folder that cannot be loaded."""
    for name in ("a", "b"):
        shutil.copytree(sound / name, tmp_path / name)
    (tmp_path / side / "generation_config.json").write_text("[]")
    command = ["--quiet", "verify", str(tmp_path / "a"), str(tmp_path / "b")]
    command += ["--plan", str(sound / "plan.json")]
    for more, status in (["--tensors-only"], 2 if side == "a" else 1), ([], 2):
        assert main([*command, *more]) == status
        said = capsys.readouterr()
        assert "generation_config.json" in said.err + said.out and "Traceback" not in said.err


def test_a_pickle_of_tensors_is_taken(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "a", tmp_path / "m")
    hostile.pickled(tmp_path / "m")
    assert load_model(tmp_path / "m").n_layers == N_LAYERS


def test_nan_in_rows_that_nothing_reads_is_no_edit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from interp_ablate import export_checkpoint

    folder = folder_of(tmp_path / "a", tied=False)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][-1] = float("nan")
        save_file(tensors, path, {"format": "pt"})
    plan = Plan((Ablate(unit(), everywhere(N_LAYERS)[1:]),))  # not the embedding
    assert export_checkpoint(load_model(folder), plan, tmp_path / "b")["passed"]


# ------------------------------------------------------------------------------- what a run left

RUN: dict[str, str] = {
    "run.json": json.dumps(
        {
            "format": run_folder.FORMAT,
            "configuration": {"model": "x", "contrast": "declining"},
            "stages": {},
            "notes": [],
        }
    ),
    "selected.json": json.dumps(
        {"plan": PLAN.to_dict(), "trial": {}, "limits": {}, "test": {}, "rule": "x"}
    ),
    "export/certificate.json": json.dumps({"passed": True, "max_abs_logit_difference": 0.0}),
    "export/interp_ablate.json": json.dumps(
        {"kind": "checkpoint", "plan": PLAN.to_dict(), "source": {"name": "x", "path": None}}
    ),
    "trials.jsonl": json.dumps({"format": "interp_ablate.trials/1"}) + "\n",
    "generations.jsonl": json.dumps({"prompt": "a", "text": "b"}) + "\n",
    "trials.csv": "trial,stage\n0,finalist\n",
    "persona.json": json.dumps(
        {
            "format": FORMAT,
            "model": "m",
            "trait": "t",
            "trait_fingerprint": "f",
            "site": "3.resid_post",
            "position": "-1",
            "coefficient": 1.0,
        }
    ),
    "rollouts.jsonl": json.dumps({"format": "x"}) + "\n",
    "directions.json": json.dumps({"format": "x", "directions": []}),
}
LEFT_READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "run.json": (run_folder.read_run, write_report, lambda run: chosen_in_run(str(run))),
    "selected.json": (
        run_folder.read_selected,
        write_report,
        lambda run: chosen_in_run(str(run)),
        lambda run: Plan.load(run / "selected.json"),
    ),
    "export/certificate.json": (
        lambda run: add_to_card(run / "export", "more"),
        lambda run: push_to_hub(run / "export", "a/b"),
        write_report,
    ),
    "export/interp_ablate.json": (
        lambda run: Plan.load(run / "export" / "interp_ablate.json"),
        lambda run: read_plan(run / "export"),
        lambda run: add_to_card(run / "export", "more"),
    ),
    "trials.jsonl": (lambda run: _opened(TrialLog(run / "trials.jsonl", {})),),
    "generations.jsonl": (write_report,),
    "trials.csv": (lambda run: read_trials(run / "trials.csv"), write_report),
    "persona.json": (load_persona,),
    "rollouts.jsonl": (lambda run: read_answers(run / "rollouts.jsonl", scorer={}, coherence={}),),
    "directions.json": (lambda run: Directions.load(run / "directions.safetensors"),),
}


def _opened(log: TrialLog | JsonlLog | LeagueJournal) -> None:
    with log.open():
        pass


@pytest.mark.parametrize("name", hostile.LEFTOVERS)
@pytest.mark.parametrize("file", LEFT_READERS)
def test_what_a_run_left(file: str, name: str, tmp_path: Path) -> None:
    """An error of ours, or (a log whose last line was cut, a report without a part) what is right without it."""
    for i, read in enumerate(LEFT_READERS[file]):
        run = tmp_path / str(i)
        for other, content in RUN.items():
            (run / other).parent.mkdir(parents=True, exist_ok=True)
            (run / other).write_text(content)
        hostile.LEFTOVERS[name](run / file)
        with time_limit(LONGEST):
            try:
                read(run)
            except InterpAblateError as error:
                assert "Traceback" not in str(error)
            else:
                torn = file.endswith(".jsonl") and name in ("empty", "cut short")
                part_of_report = read is write_report and name != "a FIFO"
                assert torn or part_of_report, f"{read} took {file}, {name}"


LOOK_INSIDE = {"export/certificate.json": slice(0, 3, 2), "export/interp_ablate.json": slice(2, 3)}


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("run.json", {"search_settings": [3]}),
        ("run.json", {"configuration": []}),
        ("run.json", {"trials_made_by": [{"trials": 1, "versions": {"torch": {}}}]}),
        ("run.json", {"search_end": {"met_by": 3}}),
        ("selected.json", {"objectives": -1}),
        ("selected.json", {"test": {"controls": [None]}}),
        ("selected.json", {"test": {"perplexity_after": 10**400}}),
        ("selected.json", {"plan": {"edits": [{"sites": 10**30}]}}),
        ("run.json", {"configuration": {"model": "x", "device": {}}}),
        ("run.json", {"target_tokens": [{"text": "a", "p_positive": "0.1", "p_negative": 0.2}]}),
        ("run.json", {"contrast": {"n_positive": 2.5}}),
        ("run.json", {"versions": {"torch": float("nan")}}),
        ("selected.json", {"test": {"intervals": {"behaviour_after": ["", 1.0]}}}),
        ("selected.json", {"test": {"controls": [{"name": "random 0"}]}}),
        ("selected.json", {"test": {"behaviour_after": float("nan")}}),
        ("selected.json", {"test": {"n": {"positive": 10**30}}}),
        ("selected.json", {"limits": {"removed": []}}),
        ("run.json", {"configuration": None}),
        ("run.json", {"search": {"trial_seconds": [[]]}}),
        ("persona.json", {"made_of": {"settings": True}}),
        ("persona.json", {"unsteered": {"score": "50"}}),
        ("persona.json", {"coefficient": "1"}),
        ("persona.json", {"site": 3}),
        ("export/certificate.json", {"limits": {"kl": [None]}}),
        ("export/certificate.json", {"prompts": 2.5}),
        ("export/certificate.json", {"compared": {"hooked": [None]}}),
        ("export/interp_ablate.json", {"test": {"intervals": {"repetition_before": [0.0, ""]}}}),
        (
            "export/interp_ablate.json",
            {"test": {"intervals": {"behaviour_after": [0.0, float("nan")]}}},
        ),
        ("export/interp_ablate.json", {"versions": [3]}),
        ("export/interp_ablate.json", {"run": {"search": {"sampler": {}}}}),
        ("export/interp_ablate.json", {"edited": "all"}),
    ],
)
def test_parts_of_another_kind(file: str, changed: dict[str, object], tmp_path: Path) -> None:
    for i, read in enumerate(LEFT_READERS[file][LOOK_INSIDE.get(file, slice(2))]):
        run = tmp_path / str(i)
        for other, content in RUN.items():
            (run / other).parent.mkdir(parents=True, exist_ok=True)
            (run / other).write_text(content)
        (run / file).write_text(json.dumps({**json.loads(RUN[file]), **changed}))
        refused(partial(read, run))


LINES: dict[str, str] = {
    "league": '{"key": ["fit", "a"], "values": {}, "seconds": 0.5, "failed": ""}',
    "answers": '{"answer": 0, "key": {"a": 1}, "system": null, "question": "a", "text": "b", "tokens": [1], "finished": true}',
    "verdicts": '{"by": "score:1", "scored": [0], "values": [50.0]}',
    "screening": '{"start": 0, "number": [1], "projection": [0.5], "own": [null]}',
    "measured": '{"part": "text", "key": null, "value": [1]}',
    "filter": '{"rule": "a", "readings": [[0, 0, 0.5, ""]]}',
}


def journal(kind: str, path: Path) -> None:
    """Open a journal of the package as its owner does."""
    shape = {
        "league": league_journal._LINE,
        "answers": ROLLOUTS,
        "verdicts": ROLLOUTS,
        "screening": screening_measure._PART,
        "measured": compare.PART,
        "filter": filter_journal.LINE,
    }[kind]
    with JsonlLog(
        path, {}, kind="journal", format="x", lost="it is done again", shape=shape
    ).open():
        pass


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("value", [None, "text", -1.5, 10**30, float("nan"), [], {}, [[]], ...])
def test_lines_of_journals_are_of_their_shape(kind: str, value: object, tmp_path: Path) -> None:
    """A part that is gone, or something else: the line is named, or what it says is what was there."""
    path, line = tmp_path / "log.jsonl", json.loads(LINES[kind])
    with JsonlLog(path, {}, kind="journal", format="x", lost="it is done again").open():
        pass
    head = json.dumps({"format": "x", "interp-ablate": interp_ablate.__version__})
    path.write_text(f"{head}\n{json.dumps(line)}\n")
    journal(kind, path)
    for part, before in line.items():
        if (
            before is None
            or part in ("key", "value", "values", "failed")
            or type(value) is type(before)
        ):
            continue
        changed = {k: v for k, v in {**line, part: value}.items() if v is not ...}
        path.write_text(f"{head}\n{json.dumps(line)}\n{json.dumps(changed)}\n")
        said = refused(lambda: journal(kind, path))
        # a line that lacks the part which tells its kind may be named by a part of the other kind
        assert "line 3" in said and (part in said or value is ... or "not JSON" in said)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("plan", {}),
        ("plan", {"rate": [0.5], "kl": [None], "kl_answers": [0.1], "repetition": [0.0]}),
        ("fit", {"site": "a", "position": "-1", "scores": ["0.5"], "pairs": ["a"], "about": {}}),
        ("fit", {"site": "a", "position": "-1", "scores": [], "pairs": [], "about": {}, "plans": {"removal": [{"share": 1}]}}),
        ("unedited", {"removal": [1.0], "induction": [0.0], "prompts": {"removal": [3], "induction": []}}),
    ],
)  # fmt: skip
def test_numbers_of_a_league_are_of_their_shape(key: str, values: object, tmp_path: Path) -> None:
    path = tmp_path / "league.jsonl"
    with LeagueJournal(path, {}).open() as opened:
        opened.finish(Record((key, "b"), {}, 0.1, failed="it was not tried"))  # is taken
    with LeagueJournal(path, {}).open() as opened:
        opened.finish(Record((key, "b"), values, 0.1))  # type: ignore[arg-type]
    said = refused(lambda: _opened(LeagueJournal(path, {})))
    assert "line 3: its " in said and "its work is done again" in said


def test_scores_of_a_file_of_answers_are_from_0_to_100(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    for score in (-1, 100.5, 1e308):
        head, line = (
            {"format": rollouts.FORMAT},
            {**json.loads(LINES["verdicts"]), "values": [score]},
        )
        path.write_text(f"{json.dumps(head)}\n{json.dumps(line)}\n")
        said = refused(lambda: read_answers(path, scorer={}, coherence={}))
        assert "line 2" in said and "0 to 100" in said


def test_a_line_cut_short_that_is_nested_deep(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path, {}, kind="journal", format="x", lost="it is done again")
    head = json.dumps({"format": "x", "interp-ablate": interp_ablate.__version__})
    path.write_text(f'{head}\n{{"a": {hostile.DEEP[:100_000]}')
    assert "line 2" in refused(lambda: _opened(log))


def test_a_link_to_itself_is_no_part_that_was_left_out(tmp_path: Path) -> None:
    for name in ("selected.json", "generations.jsonl", "run.json"):
        run = tmp_path / name
        run.mkdir()
        (run / name).symlink_to(name)
        refused(partial(write_report, run))


def test_stored_tokens_are_of_their_shape(sound: Path, tmp_path: Path) -> None:
    collect(load_model(sound / "a"), ["one two"], positions="all").save(tmp_path / "t")
    path = tmp_path / "t" / "tokens.json"
    index = json.loads(path.read_text())
    row = index["tokens"][0]
    for changed in (
        {"indices": [[2.5, *index["indices"][0][1:]]]},
        {"tokens": [{**row, "id": [10**30, *row["id"][1:]]}]},
        {"tokens": [{**row, "part": [0, *row["part"][1:]]}]},
        {"tokens": [{**row, "text": [[None], *row["text"][1:]]}]},
        {"labels": [1]},
        {"prompts": [3]},
    ):
        path.write_text(json.dumps({**index, **changed}))
        assert "not of the kind" in refused(lambda: TokenActivations.load(tmp_path / "t"))
    for changed in ({"tokens": [{**row, "part": ["answer", *row["part"][1:]]}]}, {"labels": []},
                    {"indices": [index["indices"][0][::-1]]}):  # fmt: skip
        path.write_text(json.dumps({**index, **changed}))
        assert "corrupt index" in refused(lambda: TokenActivations.load(tmp_path / "t"))


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_stored_activations_are_finite_numbers(
    value: float | None, sound: Path, tmp_path: Path
) -> None:
    """One value of one site; None: whole numbers in place of all."""
    from safetensors.torch import load_file, save_file

    kept = collect(load_model(sound / "a"), ["one two"], "1.resid_post", positions="all")
    kept.save(tmp_path / "t")
    (shard,) = (tmp_path / "t").glob("shard-*")
    with safetensors.safe_open(shard, "pt") as file:
        about = file.metadata()
    ((name, values),) = load_file(shard).items()
    if value is not None:
        values[2, 3] = value
    save_file({name: values if value is not None else values.int()}, shard, about)
    again = TokenActivations.load(tmp_path / "t")
    for read in (lambda: again.at("1.resid_post"), again.mean, again.to_frame):
        assert "NaN, infinity or whole numbers at blocks.1" in refused(read)


@pytest.mark.parametrize("value", ["high", None, [0.1], 10**400, float("nan")])
def test_numbers_that_are_none(value: object, tmp_path: Path) -> None:
    """In a certificate, in the description of a direction, in a line of a log: none is believed."""
    card = tmp_path / "card"
    card.mkdir()
    (card / "interp_ablate.json").write_text(RUN["export/interp_ablate.json"])
    content = {"passed": True, "kl": value, "limits": {"kl": 1e-6}}
    (card / "certificate.json").write_text(json.dumps(content))
    refused(lambda: add_to_card(card, "more"))

    place = tmp_path / "d.safetensors"
    Directions((Direction(unit(), 1.0, Site(1, "resid_post")),)).save(place)
    described = json.loads(place.with_suffix(".json").read_text())
    described["directions"][0]["norm"] = value
    place.with_suffix(".json").write_text(json.dumps(described))
    refused(lambda: Directions.load(place))

    with TrialLog(tmp_path / "trials.jsonl", {}).open() as log:
        log.finish(Trial({"layer": 1}, scores={"kl": 0.5}, status="ok"))
    line = (tmp_path / "trials.jsonl").read_text().replace("0.5", json.dumps(value))
    (tmp_path / "trials.jsonl").write_text(line)
    refused(lambda: _opened(TrialLog(tmp_path / "trials.jsonl", {})))


def test_a_link_to_itself_and_null_bytes(tmp_path: Path) -> None:
    for name in ("interp_ablate.json", "certificate.json"):
        folder = tmp_path / name.partition(".")[0]
        for other in ("interp_ablate.json", "certificate.json"):
            folder.mkdir(exist_ok=True)
            (folder / other).write_text(RUN[f"export/{other}"])
        (folder / name).unlink()
        (folder / name).symlink_to(name)
        refused(partial(push_to_hub, folder, "a/b"))
    (tmp_path / "words.txt").write_bytes(b"sorry\n" + bytes(50))
    refused(lambda: expression_scorer(str(tmp_path / "words.txt")))


def test_a_cache_of_activations_that_is_another(sound: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = load_model(sound / "a")
    collect(model, ["one", "two", "three"], cache=tmp_path)
    (path,) = tmp_path.iterdir()
    tensors = load_file(path)
    values, infinite = tensors["values"], torch.full_like(tensors["mean"], math.inf)
    spoiled = values.index_fill(0, torch.tensor([1]), math.nan)
    for other in ({"values": values[:2].clone()}, {"values": spoiled}, {"mean": infinite}, {"values": values.int()}):  # fmt: skip
        save_file({**tensors, **other}, path)
        refused(lambda: collect(model, ["one", "two", "three"], cache=tmp_path))
    path.unlink()
    os.mkfifo(path)
    refused(lambda: collect(model, ["one", "two", "three"], cache=tmp_path))


def test_a_line_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = hostile.bomb(tmp_path / "rows.jsonl.gz", 500)
    with pytest.raises(InterpAblateError, match="line 1 is longer than"):
        list(RowFile.at(path).rows())
    path = hostile.bomb(tmp_path / "prompts.txt.gz", 500)
    with pytest.raises(InterpAblateError, match="holds more than"):
        RowFile(path, "csv", ".gz").text()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # kilobytes


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_number_of_thousands_of_digits_is_one_message(name: str, tmp_path: Path) -> None:
    row = f'{{"prompt": "a", "completion": "b", "n": {"9" * 6000}}}'
    (tmp_path / name).write_text(f"[{row}]" if name.endswith(".json") else f"{row}\n")
    arguments = ["filter", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--drop", "--expressions", "declining"]) == 2


@pytest.mark.parametrize("place", [1, 8, 100, -4])
def test_a_parquet_file_cut_short(place: int, tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a" * 50] * 3000, "completion": ["b" * 50] * 3000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    hostile.cut("a.parquet", place % (tmp_path / "a.parquet").stat().st_size)(tmp_path)
    arguments = ["filter", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--drop", "--expressions", "declining"]) == 2


# Bundled files, and text that is no file: a judge's reply, a trait file with messages of its own.
_OWN_JSON = {
    "incoming_files.py",
    "refusals.py",
    "expression_lists.py",
    "replies.py",
    "judge.py",
    "traits.py",
    "template_process.py",
}


def test_no_other_file_reads_json() -> None:
    """What goes around the gate is believed: `json.loads` is for copies (of `json.dumps`) elsewhere."""
    library = Path(interp_ablate.__file__).parent
    around = []
    for path in sorted(library.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads"):
                copied = ast.unparse(node.args[0]).startswith(("json.dumps(", "json_text("))
                if not copied and path.name not in _OWN_JSON:
                    around.append(f"{path.relative_to(library)}:{node.lineno}")
    assert not around
