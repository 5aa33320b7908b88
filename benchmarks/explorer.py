"""The explorer's page on the real model: seconds until it is there, until an answer begins, and memory over many answers.

A slider moves before each request, as on the page: the plan is a new one each time. The unedited answer of a prompt
is remembered; what is timed is the edited one's first token, and the last event with the scores of both. The first
paint is Chromium's own figure, where Playwright and a Chromium are installed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import threading
import time
import urllib.request
from contextlib import contextmanager
from typing import Any

import common

KEPT = 20  # requests before memory is read: what is remembered is full by then


@contextmanager
def served(session: Any) -> Any:
    """The address of the page, served in a thread."""
    import uvicorn

    from interp_ablate.explorer.server import explorer_app

    config = uvicorn.Config(explorer_app(session), port=0, log_level="warning")
    listening = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def answered(address: str, request: dict[str, Any]) -> tuple[float, float]:
    """Seconds until the edited answer's first token, and until the scores."""
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(address + "answer", json.dumps(request).encode(), headers)
    start, first, event = time.perf_counter(), 0.0, {}
    with urllib.request.urlopen(asked) as lines:
        for line in lines:
            event = json.loads(line)
            if "error" in event:
                raise SystemExit(event["error"])
            first = first or (time.perf_counter() - start if event.get("side") == "edited" else 0)
    assert "scores" in event
    return first, time.perf_counter() - start


def first_paint(address: str) -> float | None:
    """Seconds from opening the address to the first content on the screen, as Chromium has it."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if program is None:
        return None
    paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(address)
        while (milliseconds := page.evaluate(paint)) is None:
            page.wait_for_timeout(20)
        chromium.close()
    return float(milliseconds) / 1000


def main() -> None:
    args = common.arguments(
        __doc__, requests={"type": int, "default": 60, "help": "answers in a row"}
    )
    import psutil

    from interp_ablate import ContrastSet, collect, estimate_directions, load_model
    from interp_ablate.explorer.controls import bands_of
    from interp_ablate.explorer.session import LONGEST_PROMPT, ExplorerSession

    n, limit = (4, 4) if args.smoke else (args.requests, 32)
    model = load_model("smollm2")
    train = ContrastSet.load("declining").split(args.prompts, 2, 1).train
    directions = list(estimate_directions(collect(model, train)))
    session = ExplorerSession(model, directions, ".")
    bands = len(bands_of(model.n_layers))
    process = psutil.Process()
    firsts, wholes, memory = [], [], [0]
    with served(session) as address:
        still = {"operation": "ablate", "direction": 0, "amounts": [None] * bands}
        answered(address, {"prompt": "Hello", "max_new_tokens": 1, "controls": still})  # warm
        paint = first_paint(address)
        for i in range(n):
            amounts = [round(0.5 + 0.01 * (i % 100), 2)] * bands
            chosen = i % len(directions)
            sliders = {
                "operation": ("ablate", "add")[i % 2],
                "direction": chosen,
                "amounts": amounts,
            }
            request = {"prompt": train.positive[i % 5].text, "controls": sliders}
            request |= {"direction": chosen, "max_new_tokens": limit}
            first, whole = answered(address, request)
            firsts.append(first)
            wholes.append(whole)
            if i >= min(KEPT, n - 1):
                memory.append(process.memory_info().rss)
        words = "word " * (64 if args.smoke else LONGEST_PROMPT - 64)
        _, longest = answered(address, {"prompt": words, "max_new_tokens": 1, "controls": still})
    growth = (memory[-1] - memory[1]) / 1e6
    facts = {
        "first paint": paint,
        "first token, median": statistics.median(firsts),
        "first token, slowest": max(firsts),
        "both answers and scores, median": statistics.median(wholes),
        "answer to the longest prompt": longest,
    }
    print(f"\nexplorer, {n} answers of {limit} tokens")
    for name, seconds in facts.items():
        print(f"  {name:<34} {'-' if seconds is None else f'{seconds:8.2f} s'}")
    print(f"  memory, {n} answers                {growth:+8.1f} MB of {memory[-1] / 1e6:.0f}")
    rounded = {name: seconds and round(seconds, 3) for name, seconds in facts.items()}
    print(
        json.dumps(
            {"benchmark": "explorer", "seconds": rounded, "growth_mb": round(growth, 1), "n": n}
        )
    )


if __name__ == "__main__":
    main()
