"""Killed and out of disk: some of the campaigns of `make faults`, and that their checks see a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")


def test_checks_see_what_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "export").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"stages": {"directions": {"seconds": 1}}}))
    (out / "directions.json").write_text("{}")
    trial = json.dumps({"params": {}, "seconds": 1.5})
    (out / "trials.jsonl").write_text(f'{{"format": "f"}}\n{trial}\n')
    wanted, before = faults.contents(out), faults.finished_files(out)
    assert set(before) == {"directions.json"}
    assert not faults.half_written(out) and not faults.left_over(out)
    (out / "trials.jsonl").write_text(f'{{"format": "f"}}\n{trial.replace("1.5", "2.5")}\n')
    assert not faults.differences(out, wanted)
    with open(out / "trials.jsonl", "a") as log:
        log.write(trial + "\n")
    (out / "new").write_text("{}")
    os.replace(out / "new", out / "directions.json")
    assert len(faults.done_twice(out, before)) == 2
    (out / "selected.json").write_text('{"plan": ')
    (out / "figure.png").write_bytes(b"\x89PNG")
    (out / "export" / "config.json").write_text("{}")
    assert len(faults.half_written(out)) == 3
    (out / ".a.png.0a1b2c3d-1-0.tmp").write_text("")
    (tmp_path / ".out.partial").mkdir()
    assert len(faults.left_over(out)) == 2
    assert len(faults.differences(out, wanted)) >= 4


def test_killed_or_out_of_disk_the_result_is_that_of_an_undisturbed_command() -> None:
    program = [
        sys.executable,
        faults.__file__,
        "--sample",
        "--only",
        "run,search,export,filter,disk",
    ]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])["faults"]
    assert {"run", "search", "export", "filter", "lora"} == {each["command"] for each in counts}
    assert all(each["disturbed"] and not each["faults"] for each in counts)
