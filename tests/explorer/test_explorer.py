"""The explorer in a real browser, on a tiny model: load, look, slide, answer, keep, export, talk; who may ask."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import Watched, browser
from small_task import write_task

from interp_ablate.cli.main import main
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.explorer.controls import Controls, bands_of
from interp_ablate.explorer.server import _Queue
from interp_ablate.explorer.session import LONGEST_PROMPT, ExplorerSession
from interp_ablate.explorer.views import page_of
from interp_ablate.plots.run_tables import read_directions
from interp_ablate.runs.configuration import Configuration
from interp_ablate.runs.run_folder import Run, read_run
from interp_ablate.sites import Site

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
EVIL = "<img src=x onerror=alert(1)> & <script>alert(2)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model."""
    root = tmp_path_factory.mktemp("explorer")
    write_task(root, 12)
    # what the answers hold: a run whose behaviour is not there has no trials
    (root / "words.txt").write_text("\N{REPLACEMENT CHARACTER}\n")
    arguments = ["--model", str(root / "model"), "--positive", str(root / "yes.txt")]
    arguments += ["--expressions", str(root / "words.txt")]
    arguments += ["--negative", str(root / "no.txt"), "--n-train", "4", "--n-validation", "4"]
    arguments += [
        "--n-test",
        "4",
        "--max-new-tokens",
        "4",
        "--max-kl",
        "50",
        "--sites",
        "resid_post",
    ]
    assert main(["--quiet", "run", *arguments, "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def session(folder: Path) -> ExplorerSession:
    saved = read_run(folder)
    assert saved is not None
    run = Run(folder, Configuration.from_dict(saved["configuration"]))
    return ExplorerSession(
        run.model, read_directions(folder), folder, run=run, expression=run.expression
    )


class Served:
    """The application on a free port, in a thread."""

    def __init__(self, session: ExplorerSession, token: str | None = None) -> None:
        from interp_ablate.explorer.server import explorer_app

        config = uvicorn.Config(explorer_app(session, token=token), port=0, log_level="warning")
        listening = config.bind_socket()
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listening],))

    def __enter__(self) -> Served:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    def ask(self, path: str, request: Any = None, **headers: str) -> tuple[int, list[Any]]:
        """The status and the events of a request."""
        data = None if request is None else json.dumps(request).encode()
        own = {
            "Content-Type": "application/json",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        asked = urllib.request.Request(self.address + path, data, own)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                lines = answer.read().decode().splitlines()
                return answer.status, [json.loads(line) for line in lines] if data else lines
        except urllib.error.HTTPError as error:
            return error.code, []


@pytest.fixture(scope="module")
def served(session: ExplorerSession) -> Iterator[Served]:
    with Served(session) as each:
        yield each


SLIDERS = {"operation": "add", "direction": 1, "amounts": [None, 2.0, 2.0]}


def test_the_events_are_what_the_model_says(served: Served, session: ExplorerSession) -> None:
    request = {"prompt": "Hello", "max_new_tokens": 5, "controls": SLIDERS}
    _, events = served.ask("answer", request)
    streamed = {
        side: "".join(e["text"] for e in events if e.get("side") == side)
        for side in ("edited", "unedited")
    }
    plan = Controls.from_dict(SLIDERS).plan(session.model, session.directions)
    (before,) = session.model.generate(["Hello"], max_new_tokens=5)
    with session.model.applied(plan):
        (after,) = session.model.generate(["Hello"], max_new_tokens=5)
        edited = session.model.logits(["Hello"])[0, -1].double().log_softmax(-1)
    assert streamed == {"edited": after.text, "unedited": before.text} and before != after
    plain = session.model.logits(["Hello"])[0, -1].double().log_softmax(-1)
    kl = float((plain.exp() * (plain - edited)).sum())
    assert events[-1]["scores"][0]["edited"] == pytest.approx(kl, abs=1e-5)


def test_sliders_make_the_plan_that_they_say(session: ExplorerSession) -> None:
    model, direction = session.model, session.directions[1]
    (ablation,) = Controls("ablate", 1, (0.5, None, 0.0)).plan(model, session.directions)
    assert set(ablation.sites) == {Site(0, "attn_out"), Site(0, "mlp_out")}
    assert set(ablation.amounts) == {0.5}
    (addition,) = Controls("add", 1, (None, 1.0, -1.0)).plan(model, session.directions)
    assert dict(zip(addition.sites, addition.amounts)) == {
        Site(1, "resid_post"): 1.0, Site(2, "resid_post"): -1.0,
    }  # fmt: skip
    (clamp,) = Controls("clamp", 1, (0.0, None, 1.0)).plan(model, session.directions)
    assert clamp.amounts == (0.0, pytest.approx(direction.norm))
    assert not Controls("add", 1, (0.0, None, None)).plan(model, session.directions).edits
    assert [len(band) for band in bands_of(32)] == [5, 6, 5, 5, 6, 5]
    for wrong in ({}, {**SLIDERS, "amounts": [1.0]}, {**SLIDERS, "operation": "delete"}, {**SLIDERS, "direction": 99}, {**SLIDERS, "amounts": [float("nan")] * 3}):  # fmt: skip
        with pytest.raises(PlanError):
            Controls.from_dict(wrong).plan(model, session.directions)


def test_tokens_are_seen_along_the_direction_that_is_chosen(session: ExplorerSession) -> None:
    """Of its position and method; and no two directions have one name."""
    first = list(session.directions)
    others = [replace(each, position="-2", method="pca") for each in first]
    both = ExplorerSession(session.model, first + others, session.folder)
    asked = {"prompt": "Hello", "max_new_tokens": 2, "controls": {**SLIDERS, "amounts": [None] * 3}}
    for number in (0, len(first)):
        chosen = both.directions[number]
        html = both.tokens({**asked, "direction": number})["html"]
        assert f"on {chosen.method}, read at position {chosen.position}" in html
    # of its point too, at the layers that have one there
    mid = [replace(first[k], site=Site(k, "resid_mid")) for k in (1, 2)]
    mixed = ExplorerSession(session.model, [*mid, *first], session.folder)
    for number, layers in ((0, [1, 2]), (3, [0, 1, 2])):
        point = mixed.directions[number].site.point
        assert {each.site.point for each in mixed.by_layer(number)} == {point}
        event = next(mixed.answer({**asked, "direction": number}))
        assert event["layers"] == layers and len(event["values"]) == len(layers)
        assert event["layer"] == mixed.directions[number].site.layer
    options = re.findall(r"<option value=\"\d.*?</option>", page_of(both))
    names = [re.sub("<.*?>", "", option) for option in options]
    assert len(set(names)) == len(both.directions)


def test_who_may_ask(served: Served, session: ExplorerSession) -> None:
    request = {"prompt": "Hello", "max_new_tokens": 2, "controls": SLIDERS}
    assert served.ask("", Host="evil.example")[0] == 403
    assert served.ask("answer", request, Host="evil.example:80")[0] == 403
    assert served.ask("answer", request, Origin="http://evil.example")[0] == 403
    assert served.ask("answer", request, Content_Type="text/plain")[0] == 415
    assert served.ask("answer", request, Origin=served.address[:-1])[0] == 200
    for path in (
        "run.json",
        "plans",
        "../run.json",
        "..%2f..%2frun.json",
        "page.js%00",
        "report.html",
    ):
        assert served.ask(path)[0] == 404
    assert served.ask("page.js")[0] == 200
    for wrong in (
        {},
        {**request, "prompt": " "},
        {**request, "max_new_tokens": 10**9},
        {**request, "plan": "../x"},
    ):
        ((status, events),) = [served.ask("answer", wrong)]
        assert status == 200 and "error" in events[-1]
    tunnel = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}  # ssh -L 9000:...
    assert served.ask("answer", request, **tunnel)[0] == 200
    proxy = {"Cookie": "interp_ablate_token=secret", "Origin": "https://proxy.example"}
    with Served(session, token="secret") as elsewhere:
        assert elsewhere.ask("answer", request, Host="proxy.example", **proxy)[0] == 200
        assert elsewhere.ask("answer", request, **proxy)[0] == 403  # it hid the page's own name
        assert elsewhere.ask("")[0] == 403 and elsewhere.ask("?token=wrong")[0] == 403
        assert elsewhere.ask("answer", request)[0] == 403
        assert elsewhere.ask("answer", request, Cookie="interp_ablate_token=secret")[0] == 200


def test_a_warm_up_that_fails_is_told_and_stops_nobody(
    session: ExplorerSession, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise PlanError("nothing writes here")

    monkeypatch.setattr(session, "warm_up", fails)
    request = {"prompt": "Hello", "max_new_tokens": 2, "controls": SLIDERS}
    with Served(session) as elsewhere:
        status, events = elsewhere.ask("answer", request)
    assert status == 200 and "scores" in events[-1]
    assert "warming up: nothing writes here" in caplog.text


def test_two_at_once_wait_for_each_other(served: Served) -> None:
    results: list[Any] = []
    request = {"prompt": "Hello there", "max_new_tokens": 12, "controls": SLIDERS}
    threads = [
        threading.Thread(target=lambda: results.append(served.ask("answer", request)))
        for _ in range(4)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    ends = [events[-1] for _, events in results]
    assert len(ends) == 4 and all(end == ends[0] and "scores" in end for end in ends)


def test_who_no_longer_listens_holds_the_model_until_its_step_is_done() -> None:
    """The next is told of it; one that had not begun is not waited for."""
    began, release = threading.Event(), threading.Event()

    def slow() -> Iterator[dict[str, Any]]:
        began.set()
        release.wait(20)
        yield {"of": "slow"}

    async def events() -> list[dict[str, Any]]:
        queue = _Queue(lambda: None)
        leaves = asyncio.create_task(anext(queue.events(slow)))
        await asyncio.to_thread(began.wait, 20)
        never = queue.events(lambda: iter(({"of": "never"},)))
        assert await anext(never) == {"waiting": 1}
        await never.aclose()
        leaves.cancel()
        found = []
        async for event in queue.events(lambda: iter(({"of": "next"},))):
            found.append(event)
            release.set()
        return found

    assert asyncio.run(events()) == [{"waiting": 1}, {"of": "next"}]


def test_texts_that_are_too_long_are_refused_at_once(served: Served) -> None:
    """A pass over a prompt cannot be stopped, and whoever asks next waits for it."""
    words = "word " * LONGEST_PROMPT
    for path, request in (
        ("answer", {"prompt": words, "controls": SLIDERS}),
        ("tokens", {"prompt": words, "controls": SLIDERS}),
        ("chat", {"prompt": "And?", "turns": [{"role": "user", "content": words}, {"role": "assistant", "content": "."}], "controls": SLIDERS}),
        ("attribution", {"ids": [1] * (LONGEST_PROMPT + 2), "index": LONGEST_PROMPT, "direction": 0}),
    ):  # fmt: skip
        began = time.monotonic()
        _, events = served.ask(path, request)
        assert re.search(rf"at most {LONGEST_PROMPT} tokens.*this one has \d+", events[-1]["error"])
        assert time.monotonic() - began < 5


def test_memory_stays(served: Served) -> None:
    process = psutil.Process()

    def ask(count: int) -> None:
        for i in range(count):
            _, events = served.ask(
                "answer", {"prompt": f"Number {i}", "max_new_tokens": 2, "controls": SLIDERS}
            )
            assert "scores" in events[-1]

    ask(20)
    before = process.memory_info().rss
    ask(60)
    assert process.memory_info().rss - before < 40e6


def test_in_a_browser(
    served: Served, session: ExplorerSession, folder: Path, tmp_path: Path
) -> None:
    with browser() as chromium:
        watched = Watched(chromium)
        page = watched.page
        page.goto(served.address)
        assert page.locator("#projections circle").count() > 20

        page.locator("#prompt").fill(EVIL)
        page.locator("#limit").fill("6")
        page.get_by_label("add", exact=True).check()
        page.get_by_role("button", name="Answer", exact=True).click()
        watched.until("document.querySelector('#scores tbody tr')")
        before = page.locator("#edited").inner_text()
        page.locator(".slider input[type=range]").nth(2).fill("3")
        watched.until(
            f"document.querySelector('#state').textContent.startsWith('first') && document.querySelector('#edited').innerText !== {json.dumps(before)}"
        )

        page.get_by_label("ablate", exact=True).check()
        page.locator("#name").fill("mine")
        page.get_by_role("button", name="Keep the plan").click()
        watched.until("document.querySelector('#kept').textContent.startsWith('kept')")
        kept = folder / "plans" / "mine.json"
        (edit,) = Plan.load(kept)
        assert edit.op == "ablate" and edit.amounts == (1.0, 1.0, 1.0, 1.0, 3.0, 3.0)
        assert page.locator("#plan option", has_text="mine").count() == 1

        page.get_by_role("button", name="Tokens by layer").click()
        page.locator("#tokens .t").nth(3).click()
        watched.until("document.querySelector('#attribution table')")
        assert "L0." in page.locator("#attribution").inner_text()

        page.locator("#show-layer").click()
        watched.until("document.querySelectorAll('#layer tbody tr').length === 8")
        page.locator("#trials-table button.trial").first.click()
        watched.until("document.querySelectorAll('#trial table').length === 2")
        rows = page.locator("#trials-table tbody tr:visible")
        page.locator("#trials input[type=search]").fill("screen")
        assert 0 < rows.count() < len((folder / "trials.csv").read_text().splitlines()) - 1

        for text in ("Hello", "And now?"):
            page.locator("#said").fill(text)
            page.get_by_role("button", name="Say").click()
            watched.until(f"turns.length === {2 if text == 'Hello' else 4}")
        assert page.locator("#turns p.error").count() == 0

        assert watched.serious() == []
        watched.check(served.address)
        page.set_viewport_size({"width": 390, "height": 844})
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(300)
        assert watched.serious() == []
        watched.check(served.address)
    out = tmp_path / "exported"
    plan = ["--plan", str(kept), "--out", str(out)]
    assert main(["--quiet", "export", "--model", str(folder.parent / "model"), *plan]) == 0
    assert json.loads((out / "certificate.json").read_text())["passed"]
    kept.unlink()


LETTERS = """[...document.querySelectorAll('.chart')].filter(chart => chart.offsetParent).map(chart => {
  const text = chart.querySelector('text'), svg = chart.querySelector('svg');
  return parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a;
})"""


def test_what_cannot_be_done_is_said_where_it_was_asked(served: Served, folder: Path) -> None:
    with browser() as chromium:
        watched = Watched(chromium)
        page = watched.page
        page.goto(served.address)
        page.locator("#prompt").fill("Hello")
        page.locator("#name").fill("a/b")
        page.get_by_role("button", name="Keep the plan").click()
        watched.until("document.querySelector('#kept.error')")
        page.locator("#plan").select_option("chosen")
        page.locator("#strength").fill("")
        watched.until("document.querySelector('#state.error')")  # not: times 0
        assert "a strength is a number" in page.locator("#state").inner_text()
        page.locator("#plan").select_option("")

        page.locator("#limit").fill("513")
        page.locator("#said").fill("What I typed")
        page.get_by_role("button", name="Say").click()
        watched.until("document.querySelector('#turns .error')")
        assert page.locator("#said").input_value() == "What I typed"
        page.locator("#layer-number").fill("99")
        page.locator("#show-layer").click()
        watched.until("document.querySelector('#layer .error')")
        page.locator("#layer-number").fill("1")
        page.locator("#show-layer").click()
        watched.until("document.querySelector('#layer svg')")
        ticks = page.locator("#layer text[text-anchor=end]").all_text_contents()
        assert ticks and all(float(tick).is_integer() for tick in ticks)  # of prompts

        page.locator("#look summary").click()
        for width in (1400, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(100)
            letters = page.evaluate(LETTERS)
            assert len(letters) >= 5 and min(letters) > 9 and max(letters) < 20, (width, letters)
        watched.check(served.address)


def test_what_cannot_be_explored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (([], "give a run folder"), ([str(tmp_path)], "no directions"), (["--model", "x"], "--directions")):  # fmt: skip
        assert main(["explore", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [("--dtype", "bfloat16"), ("--template-arg", "thinking=true"), ("--device", "meta")]
)
def test_a_run_is_explored_as_it_was_made(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str]
) -> None:
    assert main(["explore", str(folder), "--port", "0", *flags]) == 2
    said = capsys.readouterr().err
    assert "explored as it was made" in said and f"{folder}/directions.safetensors" in said
    assert "--out" not in said
