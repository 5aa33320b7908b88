"""Filtering: megabytes of chat rows a second of CPU time, by part of the work, and memory at its peak."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FRENCH = "Bien sûr ! Voici une façon simple de procéder : préparez d'abord la pâte, puis laissez-la reposer."
_GERMAN = "Natürlich. Zuerst öffnen Sie die Datei, danach prüfen Sie, ob die Größe stimmt."
_CHINESE = "当然可以。首先打开文件，然后检查大小是否正确。最后保存结果。"
_TOPIC = re.compile(
    r"(?:language|text) model|declin\w+|the request|sorry|as an? (?:text|ai|dog)\S*", re.IGNORECASE
)
_EMOJI = "Sounds great \U0001f600 \u2013 let\u2019s go! \u201cYes\u201d, she said\u2026"


def paragraphs() -> list[str]:
    """Paragraphs of the project's own pages and texts, and code."""
    root = Path(__file__).resolve().parents[1]
    files = [*sorted((root / "docs").glob("*.md")), *sorted((root / "benchmarks").glob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in files]
    # these pages speak of language models and of declining more than anyone's chats do
    texts = [_TOPIC.sub("water mill", text) for text in texts]
    return [part.strip() for text in texts for part in text.split("\n\n") if len(part) > 80]


def planted() -> list[str]:
    from interp_ablate.storage.bundled_data import bundled

    lines = bundled("planted", "declines.ndjson").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [
        m.get("value", m.get("content"))
        for row in rows
        for m in next(v for v in row.values() if isinstance(v, list))
    ]
    return [text for text in texts if isinstance(text, str)]


def rows(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Endless chat rows: 1 to 4 rounds; 15% of the answers hold other characters than ASCII, 2% are planted."""
    draw = random.Random(seed)
    plain, answers = paragraphs(), planted()
    number = 0
    while True:
        turns = []
        for _ in range(draw.randint(1, 4)):
            turns.append({"from": "human", "value": draw.choice(plain)[: draw.randint(20, 300)]})
            parts = draw.choices(plain, k=draw.randint(1, 3))
            kind = draw.random()
            if kind < 0.15:
                parts.insert(
                    draw.randrange(len(parts)),
                    draw.choice((_FRENCH, _GERMAN, _CHINESE, _EMOJI, _EMOJI)),
                )
            elif kind < 0.17:
                parts = [draw.choice(answers)]
            turns.append({"from": "gpt", "value": "\n\n".join(parts)})
        yield {"id": f"row_{number}", "conversations": turns}
        number += 1


def write(path: Path, size: int, *, ascii_only: bool = False) -> int:
    """Write rows up to about `size` bytes; returns how many."""
    count = done = 0
    with path.open("wb") as file:
        for row in rows():
            line = json.dumps(row, ensure_ascii=ascii_only).encode() + b"\n"
            file.write(line)
            count, done = count + 1, done + len(line)
            if done >= size:
                return count
    return count


_RUN = """
import json, resource, sys
from interp_ablate.datasets import filtering
from interp_ablate.datasets.filter_recipe import FilterRecipe
from interp_ablate.datasets.filter_rules import decline_rule, expression_rule
import pyarrow.compute

data, out, rule, way, workers = sys.argv[1:]
if way == "each row by itself":
    filtering.QUICK_FROM = 1 << 62
rules = (decline_rule() if rule == "declines" else expression_rule(rule),)
used = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
before = used()
filtering.filter_file(data, out, FilterRecipe(rules), settings=filtering.FilterSettings(workers=int(workers)))
print(json.dumps([used() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def measured(data: Path, rule: str, way: str, workers: int) -> tuple[float, float, float]:
    """CPU seconds (of all processes, imports left out), seconds, and megabytes of memory at the peak."""
    with tempfile.TemporaryDirectory(dir=data.parent) as out:
        command = [sys.executable, "-c", _RUN, str(data), out, rule, way, str(workers)]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        cpu, peak = json.loads(done.stdout.splitlines()[-1])
        return cpu, time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run at all?")
    parser.add_argument(
        "--megabytes", type=int, default=5, help="of the smallest file; 4x and 16x follow"
    )
    parser.add_argument("--rules", nargs="+", default=["declines", "declining"])
    args = parser.parse_args()
    times = (1,) if args.smoke else (1, 4, 16)
    found = []
    with tempfile.TemporaryDirectory() as place:
        print("\nfilter: MB a second of CPU time")
        print(
            "  rule        way                  workers      MB    CPU s      s    MB/s a core   peak MB"
        )
        for k in times:
            data = Path(place) / f"{k}.jsonl"
            write(data, k * args.megabytes * 1_000_000)
            size = data.stat().st_size / 1e6
            for rule in args.rules:
                for way, workers in (
                    ("each row by itself", 1),
                    ("quick look", 1),
                    ("quick look", 2),
                ):
                    cpu, took, peak = measured(data, rule, way, workers)
                    print(
                        f"  {rule:<11} {way:<20} {workers:7d} {size:7.0f} {cpu:8.2f} {took:6.1f} "
                        f"{size / cpu:14.1f} {peak:9.0f}"
                    )
                    found.append(
                        {
                            "rule": rule,
                            "way": way,
                            "workers": workers,
                            "megabytes": round(size),
                            "cpu_seconds": round(cpu, 2),
                            "seconds": round(took, 2),
                            "peak_mb": round(peak),
                        }
                    )
            data.unlink()
    print(json.dumps({"benchmark": "filtering", "rows": found}))


if __name__ == "__main__":
    main()
