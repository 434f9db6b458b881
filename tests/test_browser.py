"""The site in Chromium: every page without a fault, and the search box.

Pages are opened as files, as a reader of `build/site` opens them; those that need a server get one.
"""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .support import browser, site
from .support.environment import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(DOCS).with_suffix(".html").as_posix() for p in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as running:
        yield running


@pytest.fixture(scope="module")
def pages(chromium):
    """The folder of the site, its pictures for dark pages, and a tab for one page after another."""
    folder = site.built()
    dark = [path.name for path in folder.rglob("*-dark.*")]
    with browser.opened(chromium) as tab:
        yield folder, dark, tab


@pytest.fixture
def tab(chromium):
    with browser.opened(chromium) as fresh:
        yield fresh


@pytest.fixture
def served():
    """The address of a server of the site."""
    handler = functools.partial(Quiet, directory=site.built())
    with ThreadingHTTPServer((browser.HERE, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{browser.HERE}:{server.server_port}"
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("address", PAGES)
def test_a_page_is_shown_without_a_fault(pages, address):
    folder, dark, tab = pages
    tab.go((folder / address).as_uri(), dark=dark)
    assert tab.page.title()
    assert tab.faults() == []


WORDS = {
    "inpaint": "tasks/editing.html",
    "img2img": "tasks/editing.html",
    "resume": "tasks/editing.html",
    "warm start": "tasks/editing.html",
    "class labels": "tasks/conditions.html",
    "guidance": "tasks/conditions.html",
    "text embeddings": "tasks/conditions.html",
    "GIF": "tasks/pictures.html",
    "robot": "policies.html",
    "torchrun": "tasks/runs.html",
    "latency": "choose.html",
}


def first_three(links):
    """The paths of the first pages of a search, by the sections that it lists."""
    return list(dict.fromkeys(urlsplit(link).path for link in links))[:3]


@pytest.fixture(scope="module")
def home(chromium):
    """The front page, opened as a file."""
    with browser.opened(chromium) as tab:
        tab.go((site.built() / "index.html").as_uri())
        yield tab


@pytest.mark.parametrize("words", WORDS)
def test_the_search_box_finds(home, words):
    expected = (site.built() / WORDS[words]).as_uri()
    assert urlsplit(expected).path in first_three(home.search(words))
    assert home.reported == []


def test_a_served_site_is_searched_by_a_worker(tab, served):
    tab.go(f"{served}/results/speed.html")
    assert "/tasks/editing.html" in first_three(tab.search("inpaint"))
    assert tab.faults() == []


def test_the_page_for_missing_addresses_is_served_without_a_fault(tab, served):
    tab.go(f"{served}/404.html")
    assert "404" in tab.page.inner_text("h1")
    assert tab.faults() == []
