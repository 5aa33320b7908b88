"""A real Chromium for tests of pages: found on this machine, held to its own host, its faults collected."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium under Playwright; the test is skipped where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Watched:
    """A page whose requests and faults are remembered."""

    def __init__(self, chromium: Any, *, width: int = 1400, scheme: str = "light") -> None:
        self.page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(30_000)
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "console",
            lambda message: self.faults.append(message.text) if message.type == "error" else None,
        )

    def until(self, script: str) -> None:
        """Wait until an expression is true; the page's policy forbids Playwright's own way to."""
        for _ in range(600):
            if self.page.evaluate(script):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(
            f"never true: {script}; the page says {self.page.evaluate('document.body.innerText')[:500]!r}"
        )

    def check(self, address: str) -> None:
        """No fault, no request to anywhere else, nothing wider than the screen."""
        assert not self.faults, self.faults
        elsewhere = [url for url in self.requests if not url.startswith((address, "data:"))]
        assert not elsewhere, elsewhere
        wide = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{wide} pixels wider than the screen"

    def serious(self) -> list[str]:
        """What axe-core finds that is serious or critical."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        found = axe.run(self.page).response["violations"]
        return [
            f"{each['id']}: {each['nodes'][0]['html'][:200]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
