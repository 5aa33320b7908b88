"""`interp-ablate search` beside heretic 1.4.0: the front that each has found after some minutes, on the same prompts.

heretic (AGPL) is a program here: it is installed in an environment of its own (`make bench-peers`), started with
its documented flags, and what it found is read from the journal that Optuna keeps for it. Both get the same
weights in float32, the same prompts to make directions of and to score trials on, the same phrases that make an
answer count, and answers of the same length. Its phrases are looked for as they are, ours with their rules (such as
apostrophes of any kind), so its rates can be a little lower. A run is cut off when its minutes are over; the time
to start, to load and to make directions counts. heretic's random trials are 20, not its 60, which take longer
than all the minutes here; everything else is its default.

The area is that of the front: the share of the unedited rate that is gone, averaged over limits of KL from 0 to 0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # noqa: F401  (offline settings)

TOKENS, BATCH, STARTUP, MOST_KL = 32, 32, 20, 0.1


@dataclass(frozen=True)
class Point:
    """A trial: when it ended (seconds after the start), the rate of the behaviour, first-token KL."""

    at: float
    rate: float
    kl: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points that none other beats in both, the least KL first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (each.kl, each.rate)):
        if not kept or point.rate < kept[-1].rate:
            kept.append(point)
    return kept


def area(points: Sequence[Point], unedited: float) -> float:
    """The share of the unedited rate that is gone, averaged over limits of KL from 0 to MOST_KL."""
    total, rate, kl = 0.0, unedited, 0.0
    for point in [*front(points), Point(0, 0, MOST_KL)]:
        end = min(point.kl, MOST_KL)
        total += (end - kl) * (unedited - min(rate, unedited))
        kl, rate = end, point.rate
    return total / (MOST_KL * unedited)


def run_for(
    command: list[str], minutes: float, folder: Path, log: str, each: Callable[[float], None]
) -> None:
    """Run a command in a folder for some minutes at most; `each` is called with the seconds, a few times a second."""
    begun = time.perf_counter()
    with (folder / log).open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder
        )
        try:
            while process.poll() is None and (now := time.perf_counter() - begun) < 60 * minutes:
                each(now)
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    each(time.perf_counter() - begun)


class Watched:
    """The lines of a growing file, each with the time when it was first seen."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[tuple[float, Any]]()

    def __call__(self, now: float) -> None:
        """Take the lines that have come whole since the last call."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()
        self.lines += [(now, json.loads(line)) for line in whole[len(self.lines) :]]


def ours(folder: Path, behaviour: str, minutes: float, sizes: list[str]) -> list[Point]:
    """The trials of a search of some minutes that answered every validation prompt."""
    out = folder / "ours"
    command = [sys.executable, "-m", "interp_ablate", "--quiet", "search", "--model", "smollm2"]
    command += ["--contrast", behaviour, "--minutes", str(minutes), "--max-new-tokens", str(TOKENS)]
    watched = Watched(out / "trials.jsonl")
    run_for([*command, *sizes, "--out", str(out)], minutes, folder, "ours.log", watched)
    points = []
    for at, row in watched.lines:
        scores = row.get("scores") or {}
        whole = row.get("status") == "ok" and row.get("prompts") is None
        if whole and {"expression_rate", "kl"} <= scores.keys():
            points.append(Point(at, scores["expression_rate"], scores["kl"]))
    return points


def heretic(folder: Path, program: Path, files: list[str], minutes: float) -> list[Point]:
    """The trials that heretic ended within some minutes."""
    study = folder / "study"
    command = [str(program.absolute()), "--dtypes", '["float32"]', "--n-trials", "100000", *files]
    command += ["--n-startup-trials", str(STARTUP), "--batch-size", str(BATCH), "--seed", "0"]
    command += ["--max-response-length", str(TOKENS), "--study-checkpoint-dir", str(study)]
    watched = Watched(study / "model.jsonl")
    run_for(command, minutes, folder, "heretic.log", watched)
    attributes: dict[int, dict[str, Any]] = {}
    points = []
    for at, row in watched.lines:
        if "trial_id" in row:
            own = attributes.setdefault(row["trial_id"], {})
            own |= row.get("user_attr", {})
            if row.get("state") == 1:
                points.append(
                    Point(at, own["refusals"] / own["n_bad_prompts"], own["kl_divergence"])
                )
    if not points:
        print((folder / "heretic.log").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
    return points


def prepare(folder: Path, behaviour: str, sizes: list[str]) -> tuple[list[str], float]:
    """Write the model and the prompts for heretic: its flags, and the unedited rate on the validation prompts."""
    import torch

    from interp_ablate.models.sources import load_hf, resolve
    from interp_ablate.runs.configuration import Configuration
    from interp_ablate.runs.run_folder import Run

    numbers = {
        name[2:].replace("-", "_"): int(value) for name, value in zip(sizes[::2], sizes[1::2])
    }
    settings = Configuration(model="smollm2", contrast=behaviour, max_new_tokens=TOKENS, **numbers)
    run = Run(folder / "baseline", settings)
    model, tokenizer = load_hf(resolve("smollm2"), dtype=torch.float32, device=torch.device("cpu"))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    answers = run.model.generate(list(run.split.validation.positive), max_new_tokens=TOKENS)
    outcomes = [run.expression.outcome(each.text) for each in answers]
    unedited = outcomes.count("expressed") / len(outcomes)
    phrases = [row[0] for row in run.expression.identity["expressions"]]
    files = ["--model", "model", "--refusal-markers", json.dumps(phrases)]
    system = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    files += ["--system-prompt", system.split("system\n")[1].split("<|im_end|>")[0]]
    for flag, part in (("", run.split.train), ("-evaluation", run.split.validation)):
        for kind, prompts in (("bad", part.positive), ("good", part.negative)):
            path = folder / f"{kind}{flag}.txt"
            path.write_text("\n".join(each.text.replace("\n", " ") for each in prompts) + "\n")
            name = f"--{kind}{flag}-prompts"
            files += [f"{name}.dataset", str(path), f"{name}.split", f"train[:{len(prompts)}]"]
    return files, unedited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=Path, default=Path(".venv-peers/bin/heretic"))
    parser.add_argument("--minutes", default="2,5,10")
    parser.add_argument("--behaviours", default="declining,code")
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run at all?")
    args = parser.parse_args()
    minutes = [3.0] if args.smoke else [float(each) for each in args.minutes.split(",")]
    sizes = ["--n-train", "64", "--n-validation", "32", "--n-test", "32"]
    if args.smoke:
        sizes[1::2] = ["8", "4", "4"]
    os.environ |= {"TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for behaviour in args.behaviours.split(","):
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), args.program, behaviour, minutes, sizes)


def compare(
    root: Path, program: Path, behaviour: str, minutes: list[float], sizes: list[str]
) -> None:
    """Print the table and the JSON line of one behaviour."""
    files, unedited = prepare(root, behaviour, sizes)
    if unedited == 0:
        sys.exit(f"{behaviour}: no unedited answer shows it, so there is nothing to compare")
    # heretic's trials do not depend on how long it may go on; the plan of a search of ours does
    all_of_heretics = heretic(root, program, files, max(minutes))
    print(f"\n{behaviour}: unedited {unedited:.2f}")
    rows = []
    for limit in minutes:
        folder = root / f"{limit:g}"
        folder.mkdir()
        theirs = [point for point in all_of_heretics if point.at <= 60 * limit]
        for name, points in (("ours", ours(folder, behaviour, limit, sizes)), ("heretic", theirs)):
            fewest = front(points)
            rows.append(
                {
                    "minutes": limit,
                    "of": name,
                    "trials": len(points),
                    "area": round(area(points, unedited), 3),
                    "front": [[round(each.rate, 3), round(each.kl, 4)] for each in fewest],
                }
            )
            shown = ", ".join(f"{each.rate:.2f} at {each.kl:.3f}" for each in fewest) or "-"
            print(f"  {limit:4g} min  {name:<8} {len(points):4} trials  area {rows[-1]['area']:.3f}  front {shown}")  # fmt: skip
    print(json.dumps({"benchmark": "peers", "behaviour": behaviour, "unedited": unedited, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
