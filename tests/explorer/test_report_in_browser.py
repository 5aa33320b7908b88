"""The report in a real browser, from a file: it sorts, filters, opens, shows values; and without a script it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Watched, browser

from interp_ablate.runs.report import write_report


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as each:
        yield each


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    heads = "trial,stage,layer,point,position,target_log_odds,target_log_odds_baseline,addition,addition_baseline,kl,status,reason"
    trials = [
        f"{i},refine,{i % 3},resid_post,-1,{(i * 7) % 10 - 4}.5,2.0,1.0,0.0,{i / 10},ok,"
        for i in range(10)
    ]
    (folder / "trials.csv").write_text("\n".join([heads, *trials]))
    rows = ["layer,point,split,label,prompt,projection"]
    rows += [
        f"{layer},resid_post,validation,{label},{label} {n},{layer + n * 0.2 + (label == 'positive')}"
        for layer in range(3)
        for label in ("positive", "negative")
        for n in range(4)
    ]
    (folder / "projections.csv").write_text("\n".join(rows))
    answers = [
        {
            "label": "positive",
            "prompt": f"Do {n}",
            "condition": name,
            "text": text,
            "expressed": False,
        }
        for n in range(6)
        for name, text in (("baseline", "No."), ("ablated", "Yes." if n % 2 else "No."))
    ]
    (folder / "generations.jsonl").write_text("\n".join(map(json.dumps, answers)))
    return write_report(folder).as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_nothing_serious_and_nothing_from_outside(
    chromium: Any, report: str, width: int, scheme: str
) -> None:
    watched = Watched(chromium, width=width, scheme=scheme)
    watched.page.goto(report)
    assert watched.serious() == []
    watched.check(report)
    watched.page.close()


def test_it_works(chromium: Any, report: str) -> None:
    watched = Watched(chromium)
    page = watched.page
    page.goto(report)
    table = page.locator("#trials table")

    def column() -> list[float]:
        cells = table.locator("tbody tr:visible td:nth-child(4)")
        return [float(text) for text in cells.all_inner_texts()]

    button = table.get_by_role("button", name="behaviour (log-odds)")
    button.click()
    assert column() == sorted(column()) and len(column()) == 10
    button.click()
    assert column() == sorted(column(), reverse=True)
    page.locator("#trials input[type=search]").fill("0.resid_post")
    assert len(column()) == 4

    assert page.locator("details.answer[open]").count() == 0
    page.get_by_role("button", name="Expand all").click()
    assert page.locator("details.answer[open]").count() == 6
    page.get_by_label("changed answers only").check()
    assert page.locator("details.answer:visible").count() == 3

    chart = page.locator("#charts .chart").first
    chart.scroll_into_view_if_needed()
    mark = chart.locator("circle").nth(5).bounding_box()
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    tip = chart.locator(".tip")
    assert tip.is_visible() and "layer" in tip.inner_text() and "SD" in tip.inner_text()
    watched.check(report)
    page.close()


def test_without_a_script_everything_is_there(chromium: Any, report: str) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report)
    assert page.locator("#trials tbody tr").count() == 10
    assert page.locator("#charts circle title").count() == 24 + 10 + 1, "and the unedited model"
    assert page.locator("details.answer").count() == 6 and page.locator(".pair").count() == 3
    assert page.get_by_role("button").count() == 0, "a control that does nothing"
    context.close()
