"""Kill campaigns and full disks: whatever happens in between, the result is that of an undisturbed command.

Commands run in forked processes on tiny models, are killed (SIGKILL) at random moments, and are given again until they
end; or they run where the disk is too small, and again where it is not. What is checked after each kill: nothing
that has its name is half written. At the end: the same files as undisturbed, nothing done twice that was done, no
temporary file left. Prints a table, and one line of JSON.

    python tests/support/faults.py            # 25 kills of run, 10 of search, 15 of export, 8 of filter; full disks
    python tests/support/faults.py --sample   # some of them, in seconds
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1")

KILLS = {"run": 25, "search": 10, "export": 15, "filter": 8}
SAMPLED = {"run": 2, "search": 1, "export": 3, "filter": 2}
OWN_MOUNTS = "INTERP_ABLATE_FAULTS_MOUNTS"
# Lines of JSON that say when something was done, or was begun; the rest must be the same.
_TIMES = re.compile(r'"\w*seconds": [\d.e+-]+')


@dataclass
class Outcome:
    """What came of one campaign; every fault is a line of text."""

    command: str
    disturbed: int = 0
    by: str = "SIGKILL"
    faults: list[str] = field(default_factory=list)


# ---- commands and their inputs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command line but for its `--out`."""

    name: str
    arguments: list[str]

    def line(self, out: Path) -> list[str]:
        return ["--quiet", *self.arguments, "--out", str(out)]


def make_commands(place: Path) -> dict[str, Command]:
    """Tiny models, prompts and data in `place`, and the commands over them."""
    import torch
    from tiny import tiny
    from transformers import LlamaConfig, LlamaForCausalLM

    from interp_ablate import Ablate, Plan, Site
    from interp_ablate.directions.direction import Direction
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.sites import sites_of

    model, tokenizer = tiny(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    shutil.copytree(
        place / "model", place / "merging"
    )  # llama.cpp takes no tokenizer without merges
    tokens = json.loads((place / "merging" / "tokenizer.json").read_text())
    tokens["model"]["merges"] = [["a", "b"]]
    tokens["model"]["vocab"]["ab"] = 259
    (place / "merging" / "tokenizer.json").write_text(json.dumps(tokens))
    for name, verbs in (("yes", "order bring fetch send"), ("no", "name list tell describe")):
        lines = [f"{verbs.split()[i % 4]} number {i * 7 + 3} now" for i in range(24)]
        (place / f"{name}.txt").write_text("\n".join(lines))
    (place / "letters.txt").write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))
    config = LlamaConfig(
        vocab_size=264, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "large", max_shard_size="3MB")
    tokenizer.save_pretrained(place / "large")
    torch.manual_seed(0)
    everywhere = sites_of(("embed", "attn_out", "mlp_out"), range(6))
    Plan((Ablate(torch.randn(256), everywhere),)).save(place / "large.json")
    Plan((Ablate(torch.randn(32), sites_of(("attn_out", "mlp_out"), range(3))),)).save(
        place / "plan.json"
    )
    direction = Direction(torch.randn(32), 1.0, Site(1, "resid_post"), "response_mean")
    Directions((direction,)).save(place / "direction.safetensors")
    dice = random.Random(0)
    rows = (
        {"prompt": f"question {i}", "completion": "".join(dice.choices("abc xyz.", k=30))}
        for i in range(400)
    )
    (place / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = [
        *("--model", str(place / "model"), "--expressions", str(place / "letters.txt")),
        *("--positive", str(place / "yes.txt"), "--negative", str(place / "no.txt")),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6", "--layers", "1-2"),
        *("--max-new-tokens", "4", "--max-kl", "50"),
    ]
    source = ["--source", str(place / "large"), "--plan", str(place / "large.json")]
    loaded = ["--model", str(place / "model"), "--plan", str(place / "plan.json")]
    read = ["--direction", str(place / "direction.safetensors"), "--above", "0"]
    lines = {
        "run": ["run", *flags],
        "search": ["search", *flags, "--trials", "12", "--no-fits"],
        "export": ["export", *source],
        "export, loaded": ["export", *loaded],
        "lora": ["export", *loaded, "--format", "lora"],
        "gguf": ["export", "--model", str(place / "merging"), *loaded[2:], "--format", "gguf"],
        "filter": ["filter", str(place / "data.jsonl"), "--model", str(place / "model"), *read],
    }
    return {name: Command(name, arguments) for name, arguments in lines.items()}


def preload() -> None:
    """Import what the commands import, so that kills come while they work."""
    # its lock is one of all forked processes: a killed one would hold it for ever
    importlib.import_module("tqdm.std").TqdmDefaultWriteLock.mp_lock = None
    for name in (
        "cli.run", "cli.search", "cli.export", "cli.filter", "runs.stages", "runs.search_run", "runs.report",
        "export.checkpoint", "export.lora", "export.gguf", "export.preflight", "datasets.filtering",
        "datasets.filter_rules", "models.load", "plots.run_figures", "models.backends.bridge",
    ):  # fmt: skip
        importlib.import_module(f"interp_ablate.{name}")


# ---- processes -----------------------------------------------------------------------------------------------


def start(line: list[str], said: Path, *, largest: int | None = None) -> int:
    """Fork a process that does a command; its output goes to `said`. `largest`: bytes a file may have."""
    from interp_ablate.cli.main import main

    process = os.fork()
    if process:
        return process
    status = 99
    try:
        with open(said, "wb", buffering=0) as file:
            os.dup2(file.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        status = main(line)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)


def ended(process: int, *, within: float = 900.0) -> int | None:
    """The exit status; None where the process did not end `within` so many seconds, and was killed."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


# ---- what a folder holds -------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, Any]:
    """What must be the same whenever a command was disturbed: bytes, but for times and the order of a log."""
    found: dict[str, Any] = {}
    paths = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    for path in paths:
        name = str(path.relative_to(out))
        data = path.read_bytes()
        if path.suffix == ".csv" and b"seconds" in data:
            rows = [line.split(",") for line in data.decode().splitlines()]
            at = rows[0].index("seconds")
            data = repr([row[:at] + row[at + 1 :] for row in rows]).encode()
        elif path.name == "trials.jsonl":
            data = repr(sorted(finished_trials(path))).encode()
        elif path.suffix in (".json", ".jsonl"):
            data = _TIMES.sub("", data.decode()).encode()
        elif path.suffix == ".html":
            data = data[-20:]  # the page shows times
        found[name] = data
    return found


def finished_trials(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [json.dumps({**one, "seconds": 0}, sort_keys=True) for one in lines if "params" in one]


def half_written(out: Path) -> list[str]:
    """Files that have their name and are not whole."""
    from safetensors import safe_open

    faults = []
    paths = [out] if out.is_file() else [p for p in out.rglob("*") if p.is_file()]
    for path in paths:
        if any(part.startswith(".") for part in path.relative_to(out.parent).parts):
            continue
        data = path.read_bytes()
        try:
            if path.suffix == ".json":
                json.loads(data)
            elif path.suffix == ".jsonl":  # a log's last line may be cut short
                [json.loads(line) for line in data.split(b"\n")[:-1]]
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            elif path.suffix == ".gguf":
                assert data.startswith(b"GGUF")
            end = {".png": b"IEND\xaeB`\x82", ".html": b"</html>", ".csv": b"\n"}.get(
                path.suffix, b""
            )
            assert data.rstrip(b"\n").endswith(end.rstrip(b"\n")) and data.endswith(
                end[-1:] if end == b"\n" else b""
            )
        except Exception as error:
            faults.append(f"{path.name} is half written ({error!r})")
    exports = [path for path in (out, out / "export") if (path / "config.json").is_file()]
    faults += [
        f"{e.name} has no manifest" for e in exports if not (e / "interp_ablate.json").is_file()
    ]
    return faults


def finished_files(out: Path) -> dict[str, int]:
    """Files that no later process may make again, with their inodes: of stages that are done, and whole shards."""
    from interp_ablate.runs.run_folder import OUTPUTS

    hidden = out.with_name(f".{out.name}.partial")
    if (out / "run.json").is_file():
        stages = json.loads((out / "run.json").read_text())["stages"]
        names = [
            name for stage in stages for name in OUTPUTS[stage] if not name.startswith("trials")
        ]
        names += ["cache", "fits"]
        paths = [p for name in names for p in (out / name, *(out / name).rglob("*")) if p.is_file()]
        return {
            str(p.relative_to(out)): p.stat().st_ino for p in paths if not p.name.startswith(".")
        }
    journal = hidden / ".interp_ablate.partial.jsonl"
    if journal.is_file():
        lines = [line for line in journal.read_bytes().split(b"\n")[:-1] if b'"file"' in line]
        names = [json.loads(line)["file"] for line in lines]
        return {name: (hidden / name).stat().st_ino for name in names}
    return {}


def done_twice(out: Path, before: dict[str, int]) -> list[str]:
    """Files, trials and verdicts that were made a second time."""
    again = [
        name for name, inode in before.items()
        if (out / name).exists() and (out / name).stat().st_ino != inode
    ]  # fmt: skip
    log = out / "trials.jsonl"
    keys = Counter(finished_trials(log)) if log.is_file() else Counter()
    verdicts = out / "verdicts.jsonl"
    if verdicts.is_file():
        lines = [json.loads(line) for line in verdicts.read_text().splitlines()[1:]]
        keys = Counter(str((one["rule"], row[:2])) for one in lines for row in one["readings"])
    return [f"{name} was made again" for name in (*again, *(k for k, n in keys.items() if n > 1))]


def left_over(out: Path) -> list[str]:
    """Hidden files in and beside the result."""
    beside = [path for path in out.parent.glob(".*") if out.name in path.name]
    return [f"{path.name} is left" for path in (*beside, *out.rglob(".*"))]


def differences(out: Path, wanted: dict[str, Any]) -> list[str]:
    """Files that are not those of the undisturbed command."""
    found = contents(out)
    names = sorted({*found, *wanted})
    return [f"{name} differs" for name in names if found.get(name) != wanted.get(name)]


# ---- campaigns -----------------------------------------------------------------------------------------------


def kill_campaign(command: Command, kills: int, place: Path, dice: random.Random) -> Outcome:
    """Kill a command at random moments, one or several times, and let it end each time."""
    outcome, wanted, seconds, statuses = Outcome(command.name), *undisturbed(command, place)
    for attempt in range(4 * kills):
        if outcome.disturbed >= kills:
            break
        out, said = place / f"{command.name}-{attempt}", place / "said.txt"
        before: dict[str, int] = {}
        while outcome.disturbed < kills:
            process = start(command.line(out), said)
            if ended(process, within=dice.uniform(0.01, 1) * seconds) is not None:
                break
            outcome.disturbed += 1
            outcome.faults += half_written(out)
            before |= finished_files(out)
            if dice.random() < 0.6:
                break
        status = ended(start(command.line(out), said))
        if status == 2 and "exists" in said.read_text() and command.name == "export":
            status = 0  # it was killed after its end
        if status not in statuses:
            outcome.faults.append(f"exit status {status}: {said.read_text()[-300:]}")
        outcome.faults += differences(out, wanted) + done_twice(out, before) + left_over(out)
        shutil.rmtree(out, ignore_errors=True)
    return outcome


def undisturbed(command: Command, place: Path) -> tuple[dict[str, Any], float, tuple[int, ...]]:
    """What a command leaves, how long it takes and how it ends, where nothing happens."""
    if command.name in _UNDISTURBED:
        return _UNDISTURBED[command.name]
    out, said = place / f"{command.name}-undisturbed", place / "said.txt"
    begin = time.monotonic()
    status = ended(start(command.line(out), said))
    seconds = time.monotonic() - begin
    assert status in (0, 1), said.read_text()
    _UNDISTURBED[command.name] = contents(out), seconds, (status,)
    return _UNDISTURBED[command.name]


_UNDISTURBED: dict[str, tuple[dict[str, Any], float, tuple[int, ...]]] = {}


def full_disk_campaign(
    command: Command, place: Path, shares: tuple[float, ...], *, mounts: bool
) -> list[Outcome]:
    """Run a command where files, or the whole disk, may have a share of the bytes that it needs; then again without."""
    wanted, _, statuses = undisturbed(command, place)
    sizes = [path.stat().st_size for path in _files(place / f"{command.name}-undisturbed")]
    outcomes = []
    for by in ("file size", "full disk") if mounts else ("file size",):
        outcome = Outcome(command.name, by=by)
        for share in shares:
            disk, said = place / "disk", place / "said.txt"
            disk.mkdir()
            largest = int(share * max(sizes)) if by == "file size" else None
            with (
                _small_disk(disk, int(share * sum(sizes)))
                if by == "full disk"
                else contextlib.nullcontext()
            ):
                out = disk / "out"
                status = ended(start(command.line(out), said, largest=largest))
                text = said.read_text()
                outcome.disturbed += 1
                if status != 2 or "Traceback" in text or not text.strip():
                    outcome.faults.append(f"share {share}: exit status {status}: {text[-300:]}")
                outcome.faults += half_written(out) + left_over(out)
                if by == "full disk":
                    subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                status = ended(start(command.line(out), said))
                if status not in statuses:
                    outcome.faults.append(
                        f"share {share}, then: {status}: {said.read_text()[-300:]}"
                    )
                outcome.faults += differences(out, wanted) + done_twice(out, {}) + left_over(out)
            shutil.rmtree(disk)
        outcomes.append(outcome)
    return outcomes


def _files(out: Path) -> list[Path]:
    return [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]


@contextlib.contextmanager
def _small_disk(place: Path, size: int) -> Iterator[None]:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={max(size, 8192)}", "none", place], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def can_mount() -> bool:
    """Whether this process is in a namespace of its own, where a small disk can be mounted."""
    return OWN_MOUNTS in os.environ


def in_own_namespace() -> None:
    """Begin this program again where it may mount, if the machine lets it."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if can_mount() or shutil.which("unshare") is None:
        return
    if subprocess.run([*unshare, "true"], capture_output=True).returncode == 0:
        os.environ[OWN_MOUNTS] = "1"
        os.execvp(unshare[0], [*unshare, sys.executable, *sys.argv])


def main_program() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="some kills and disks, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", help="comma-separated: run, search, export, filter, disk; or one command's disks"
    )
    options = parser.parse_args()
    in_own_namespace()
    only = set((options.only or "run,search,export,filter,disk").split(","))
    dice = random.Random(options.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        preload()
        commands = make_commands(place)
        for command, kills in (SAMPLED if options.sample else KILLS).items():
            if command in only:
                outcomes.append(kill_campaign(commands[command], kills, place, dice))
                print(row(outcomes[-1]), flush=True)
        shares = (0.5,) if options.sample else (0.2, 0.5, 0.8, 0.95)
        disks = (
            ["export", "lora", "filter"]
            if options.sample
            else [n for n in commands if n != "search"]
        )
        for command in disks if "disk" in only else ():
            for outcome in full_disk_campaign(commands[command], place, shares, mounts=can_mount()):
                outcomes.append(outcome)
                print(row(outcome), flush=True)
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    counts = [
        {"command": o.command, "by": o.by, "disturbed": o.disturbed, "faults": len(o.faults)}
        for o in outcomes
    ]
    print(json.dumps({"faults": counts, "seed": options.seed}))
    return 1 if faults or not outcomes else 0


def row(outcome: Outcome) -> str:
    faults = "; ".join(outcome.faults) or "same result, nothing twice, nothing left"
    return f"{outcome.command:<16} {outcome.disturbed:>3} x {outcome.by:<10} {faults}"


if __name__ == "__main__":
    sys.exit(main_program())
