"""A browser without a window that opens pages and tells their faults.

Chromium or Chrome is driven by Playwright, which brings a browser of its own only where it is asked
to; the tests take the one that is installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .optional import optional

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HERE = "127.0.0.1"
FLAGS = (
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HERE}",  # nothing leaves the machine
)
FAULTS = (Path(__file__).parent / "faults.js").read_text(encoding="utf-8")
WIDE, NARROW, HEIGHT = 1280, 360, 900
"""Widths of windows and their height, in CSS pixels."""
LIGHT, DARK = "light", "dark"


def program() -> str:
    """The browser that the variable CHROMIUM names, or one on PATH. Without one, the test skips."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named
    for name in PROGRAMS:
        path = shutil.which(name)
        if path is not None:
            return path
    pytest.skip("there is no Chromium or Chrome on PATH")


class Tab:
    """A page in the browser, and what went wrong since its address was asked for.

    Attributes:
        page: the page as Playwright has it.
        reported: messages on the console, errors of scripts, and requests that failed or went
            elsewhere.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.reported: list[str] = []
        self._dark: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.reported.append(f"script: {error}"))
        page.on("request", self._on_request)
        page.on("requestfailed", lambda request: self.reported.append(f"failed: {request.url}"))

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.reported.append(f"console: {message.text}")

    def _on_request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("file", "data", "blob", "about") and parts.hostname != HERE:
            self.reported.append(f"asked for {request.url}")

    def go(self, address: str, *, dark: Iterable[str] = ()) -> None:
        """Open a page; `dark` names the pictures that are drawn for dark pages."""
        self.reported.clear()
        self._dark = list(dark)
        self.resize(WIDE, LIGHT)
        self.page.goto(address)

    def resize(self, width: int, scheme: str) -> None:
        """Give the window a width, and the system the light or the dark scheme."""
        self.page.set_viewport_size({"width": width, "height": HEIGHT})
        self.page.emulate_media(color_scheme=scheme)

    def look(self) -> list[str]:
        """The faults of the page as it is now."""
        width = self.page.viewport_size["width"]
        asked = {"wide": width == WIDE, "dark": self._dark}
        return [f"{width} pixels: {fault}" for fault in self.page.evaluate(FAULTS, asked)]

    def faults(self) -> list[str]:
        """The faults of the page in wide and narrow windows and in both schemes."""
        seen: dict[str, None] = {}
        for width, scheme in ((WIDE, LIGHT), (WIDE, DARK), (NARROW, DARK), (NARROW, LIGHT)):
            self.resize(width, scheme)
            seen.update(dict.fromkeys(self.look()))
        return [*self.reported, *seen]

    def search(self, words: str) -> list[str]:
        """The addresses that the search box lists for words, the best page first."""
        box = self.page.locator("input.md-search__input")
        links = self.page.locator(".md-search-result__item > a.md-search-result__link")
        box.fill("")
        box.press("Backspace")
        links.first.wait_for(state="detached")
        # The box searches when a key is released: once for all of the words.
        box.fill(words[:-1])
        box.press_sequentially(words[-1])
        links.first.wait_for(state="attached")
        return links.evaluate_all("links => links.map(link => link.href)")


@contextmanager
def launched() -> Iterator[Any]:
    """The browser as Playwright has it, until the block ends."""
    path = program()
    with optional("playwright.sync_api").sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=path,
            args=list(FLAGS),
            ignore_default_args=["--hide-scrollbars"],  # which take their part of a real window
        )
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def opened(chromium: Any) -> Iterator[Tab]:
    """An empty tab with a profile of its own."""
    # Without motion, a change of the scheme is drawn once and not as a transition.
    context = chromium.new_context(reduced_motion="reduce")
    try:
        yield Tab(context.new_page())
    finally:
        context.close()
