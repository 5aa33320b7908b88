"""What goes wrong in a league: failed plans count, one plan alone is given up, memory is tried again, cut files are refused."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make

from interp_ablate.cli.main import main
from interp_ablate.errors import RunError
from interp_ablate.league.behaviours import LeagueBehaviour
from interp_ablate.league.competition import play
from interp_ablate.league.entry import check_behaviours
from interp_ablate.league.fitted import FittedMethod
from interp_ablate.league.journal import Key, LeagueJournal, Record
from interp_ablate.league.page import page
from interp_ablate.league.registry import METHODS
from interp_ablate.league.results import Records, results_of
from interp_ablate.league.settings import LeagueSettings
from interp_ablate.league.task import LeagueTask
from interp_ablate.prompts.chat_format import ChatFormat
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.scoring.behaviour import ScoredBehaviour
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.trials import KILLS

ANYTHING = ExpressionScorer((), patterns=("",))
SETTINGS = LeagueSettings(
    n_train=6, n_validation=4, n_test=4, max_new_tokens=3, budget="60s", seeds=("0",)
)
CONTRAST = ContrastSet.from_texts(
    [f"fetch number {i} now" for i in range(14)], [f"name number {i} please" for i in range(14)]
)
METHOD = METHODS["difference_in_means"]


def done_league(failed: tuple[int, ...] = ()) -> dict[Key, Record]:
    """A journal of one method with two removals of the same effect, some of which failed."""
    place = ("b", "print", "0")
    prompts = {"removal": ["p", "q"], "induction": ["r", "s"]}
    unedited = {"removal": [1.0, 1.0], "induction": [0.0, 0.0], "prompts": prompts}
    shares = (1 / 3, 1.0)
    fit = {
        "plans": {"removal": [{"strength": s, "share": s} for s in shares], "induction": []},
        "scores": [2.0, 3.0, 0.0, 1.0],
        "pairs": ["p", "q"],
    }
    done = {
        ("unedited", *place): Record(("unedited", *place), unedited, 0.0),
        ("fit", *place, METHOD.name): Record(("fit", *place, METHOD.name), fit, 1.0),
    }
    for rung, share in enumerate(shares):
        key = ("plan", *place, METHOD.name, "removal", str(rung))
        numbers = {"rate": [0.0, 0.0], "kl": [0.1 * share] * 2, "kl_answers": [0.1, 0.2], "repetition": [0.0, 0.1]}  # fmt: skip
        done[key] = Record(key, {} if rung in failed else numbers, 0.0, "NaN" * (rung in failed))
    return done


def results(done: dict[Key, Record]) -> dict[str, Any]:
    records = Records(done, {"b": "print"}, (0,), {"removal": 0.1, "induction": 2.0})
    about = {"model": "m", "command": "c", "n_sites": 5}
    return results_of(records, [METHOD], replace(SETTINGS, behaviours=("b",)), about)


def test_a_failed_plan_is_no_effect_and_the_page_counts_it() -> None:
    whole, cut = results(done_league()), results(done_league(failed=(1,)))
    row, with_failed = (each["methods"][METHOD.name] for each in (whole, cut))
    # from 0 to 1 over the first third, then 1: 5/6; with the second one at no effect: 1/6 + 1/3
    assert row["overall"]["removal"][0] == pytest.approx(5 / 6, abs=1e-6)
    assert with_failed["overall"]["removal"][0] == pytest.approx(1 / 2, abs=1e-6)
    assert row["plans"] == [2, 0] and with_failed["plans"] == [2, 1]
    assert row["overall"]["kl_answers"] and with_failed["overall"]["kl_answers"] is None
    said = page(cut, figure="f.png")
    assert "| failed plans |" in said and "| 1 of 2 |" in said
    assert f"Plans of `{METHOD.name}` failed: NaN." in said
    assert "| failed plans |" not in page(whole, figure="f.png")


def test_answers_that_the_unedited_model_lacks_are_not_called_a_concept_of_prompts() -> None:
    done = done_league()
    key = ("unedited", "b", "print", "0")
    found = results(done | {key: Record(key, {}, 0.0, "its process was killed 5 times")})
    assert found["methods"][METHOD.name]["overall"]["removal"] is None
    assert "no answers here (its process was killed 5 times)" in page(found, figure="f.png")


def test_only_the_plan_at_fault_is_given_up(tmp_path: Path) -> None:
    """A batch is killed again and again by one of its plans, which dies alone from the second time on."""
    keys: list[Key] = [("piece", name) for name in "abcd"]
    killer, kills = keys[2], 0
    for _ in range(20):
        journal = LeagueJournal(tmp_path / "log.jsonl", {})
        with journal.open():
            while waiting := [key for key in keys if key not in journal.done]:
                batch = journal.together(waiting, 4)
                if killer in batch and journal._kills[killer] < KILLS:
                    journal._append({"begun": [list(key) for key in batch]})  # and no more: SIGKILL
                    kills += 1
                    break
                journal.work(batch, lambda batch=batch: [Record(key, {}, 0.0) for key in batch])
            else:
                break
    assert kills == KILLS
    assert {key for key, record in journal.done.items() if record.failed} == {killer}
    assert set(journal.done) == set(keys)


def behaviour(scorer: Any = ANYTHING) -> LeagueBehaviour:
    return LeagueBehaviour("numbers", CONTRAST, scorer)


def test_memory_that_ran_out_is_tried_again_and_shared_work_is_on_no_clock(tmp_path: Path) -> None:
    """Its record is in the table of this process; another one fits it."""
    lacking, ready = [True], []

    def fit(task: LeagueTask) -> FittedMethod:
        ready.append([o._first_logprobs is not None for o in (task.positive, task.negative)])
        ready.append([task.positive.has_generations])
        if lacking:
            raise torch.OutOfMemoryError("out of memory")
        return METHOD.fit(task)

    method, model = replace(METHOD, name="mine", fit=fit), make(eos_token_id=None)
    done = play(model, [behaviour()], [method], SETTINGS, tmp_path)
    (failed,) = (record.failed for key, record in done.items() if key[0] == "fit")
    assert "memory ran out while mine was fitted" in failed
    lacking.clear()
    done = play(model, [behaviour()], [method], SETTINGS, tmp_path)
    assert not any(record.failed for record in done.values())
    assert [key for key in done if key[0] == "plan"]
    assert all(all(each) for each in ready)
    lines = [json.loads(line) for line in (tmp_path / "league.jsonl").read_text().splitlines()]
    assert [line["key"][0] for line in lines if "key" in line].count("shared") == 1


class Broken:
    name, identity = "broken", {"kind": "broken"}

    def __call__(self, exchanges: Any) -> list[float | None]:
        return []


def test_all_that_cannot_be_played_is_said_at_once(tmp_path: Path) -> None:
    model = make(eos_token_id=None)
    few = LeagueBehaviour("few", CONTRAST.first(3), ANYTHING)
    unread = LeagueBehaviour("unread", CONTRAST, ScoredBehaviour(Broken()))
    out = tmp_path / "league"
    with pytest.raises(RunError) as caught:
        play(model, [behaviour(), few, unread], [METHOD], SETTINGS, out)
    said = str(caught.value)
    assert "2 behaviours cannot be played" in said and not out.exists()
    assert "- few: " in said and "- unread: the scorer 'broken' gave 0 scores" in said
    check_behaviours([behaviour()], SETTINGS, model)


def test_prompts_that_the_template_cannot_render_are_said_before_any_work(tmp_path: Path) -> None:
    model = make(eos_token_id=None)
    model.chat_format = ChatFormat(template="{{ nothing }}")
    with pytest.raises(RunError, match=r"^numbers: the chat template cannot render"):
        play(model, [behaviour()], [METHOD], SETTINGS, tmp_path / "league")
    assert not (tmp_path / "league").exists()


def test_any_cut_or_foreign_file_of_results_is_one_message(tmp_path: Path, capsys: Any) -> None:
    good = results(done_league())
    file, made = tmp_path / "league.json", tmp_path / "league.md"
    command = ["league", "--from", str(file), "--page", str(made)]
    broken: list[Any] = [{"format": good["format"]}]
    for path in paths(good):
        if path == ["format"]:
            continue
        broken += [changed(good, path, remove=True), changed(good, path, remove=False)]
    first = next(iter(good["methods"].values()))
    for row, ends in itertools.product((first["overall"], *first["by_behaviour"].values()), ([0.5, 0.4, None], [0.5, None, 0.6])):  # fmt: skip
        kept, row["detection"] = row["detection"], ends
        broken.append(copy.deepcopy(good))
        row["detection"] = kept
    curves = first["curves"]["removal"]
    broken.append(changed(good, ["methods", next(iter(good["methods"])), "curves", "removal", next(iter(curves))], remove=False, other=[]))  # fmt: skip
    for content in broken:
        file.write_text(json.dumps(content))
        assert main(command) == 2, content.keys()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "is cut or was changed" in error
        assert not made.exists()
    file.write_text(json.dumps(good))
    assert main(command) == 0 and made.exists()


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[list[Any]]:
    """Where every part of the results is, but the names of behaviours and methods and what is under a "failed"."""
    if not isinstance(value, dict):
        return []
    inside = [
        [*at, key]
        for key in value
        if not {"failed", "failed_plans", "versions"} & set(map(str, at))
    ]
    return inside + [path for key, one in value.items() for path in paths(one, (*at, key))]


def changed(
    content: dict[str, Any], path: list[Any], *, remove: bool, other: Any = ({"x": []},)
) -> dict[str, Any]:
    """A copy in which one part is gone, or an object of something else."""
    copied = copy.deepcopy(content)
    holder: Any = copied
    for key in path[:-1]:
        holder = holder[key]
    if remove:
        del holder[path[-1]]
    else:
        holder[path[-1]] = list(other)
    return copied
