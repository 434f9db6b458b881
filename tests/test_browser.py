"""The site in Chromium: every page without a fault, and the search box.

Pages are opened as files, as a reader of `build/site` opens them; those that need a server get one.
"""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from PIL import Image

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
    faults = tab.faults()
    assert not faults, "\n".join(faults)


def test_the_switch_of_colours_switches_the_pictures(chromium, pages):
    """The switch counts more than the system, also on the pages that are opened next."""
    folder, dark, _ = pages
    shown = [p for p in PAGES if any(name in (folder / p).read_text("utf-8") for name in dark)]
    assert shown
    with browser.opened(chromium) as tab:
        for address, scheme in ((shown[0], "slate"), (shown[-1], "default")):
            tab.go((folder / address).as_uri(), dark=dark)
            before = tab.page.locator("body").get_attribute("data-md-color-scheme")
            tab.page.locator("label[for^=__palette]:visible").click()
            after = tab.page.locator("body").get_attribute("data-md-color-scheme")
            assert {before, after} == {"default", "slate"}
            assert after == scheme
            assert tab.look() == []


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
    assert tab.reported == []


def test_the_page_for_missing_addresses_is_served_without_a_fault(tab, served):
    tab.go(f"{served}/404.html")
    assert "404" in tab.page.inner_text("h1")
    assert tab.faults() == []


MADE_UP = """<!doctype html>
<title>A page</title>
<link rel="icon" href="data:,">
<style>
  @font-face {{ font-family: "Formulas"; src: url("{font}") format("woff2") }}
  math {{ font-family: "Formulas", math }}
  pre > code, .scroller, .formula {{ display: block; overflow-x: auto; padding: 1em 0 }}
  img {{ background: #fff }}
  [data-md-color-scheme="slate"] .light, [data-md-color-scheme="default"] .dark {{ display: none }}
</style>
<body>
<script>
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => (document.body.dataset.mdColorScheme = dark.matches ? "slate" : "default");
  dark.addEventListener("change", paint);
  paint();
</script>
<div class="md-content">{content}</div>
"""
GOOD = """
<p>Text with <code>code</code> and <math><mi>x</mi></math>.</p>
<pre><code>{code}</code></pre>
<div class="scroller"><div style="width: 2000px">a wide table</div></div>
<div class="formula"><math><mfrac><mi>x</mi><mi>y</mi></mfrac></math></div>
<img class="light" src="plot.png"><img class="dark" src="plot-dark.png"><img src="digits.png">
""".format(code="x" * 90)


@pytest.fixture
def faults_of(tab, tmp_path):
    """A function that gives the faults of a page with some content."""
    for name in ("plot", "plot-dark", "digits"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")

    def look(content):
        page = tmp_path / "page.html"
        font = (DOCS / "theme/math.woff2").as_uri()
        page.write_text(MADE_UP.format(content=content, font=font), encoding="utf-8")
        tab.go(page.as_uri(), dark=["plot-dark.png"])
        return tab.faults()

    return look


def test_a_good_page_has_no_faults(faults_of):
    assert faults_of(GOOD) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('<img src="https://example.org/a.png">', "asked for https://example.org/a.png"),
        ('<script>fetch("http://example.org/a")</script>', "asked for http://example.org/a"),
        ('<script>console.error("no")</script>', "console: no"),
        ('<script>console.warn("no")</script>', "console: no"),
        ("<script>throw new Error('no')</script>", "script: no"),
        ('<script src="gone.js"></script>', "failed: file:///"),
        ('<img src="gone.png">', "1280 pixels: no picture: file:///"),
        ('<div style="width: 2000px">wide</div>', "the page is 20"),
        ('<div style="width: 2000px">wide</div>', "sticks out of the window: <div> “wide”"),
        ('<p style="margin-left: -9em">left</p>', "sticks out of the window: <p> “left”"),
        (
            '<div style="overflow: hidden"><p style="width: 2000px">wide</p></div>',
            "is cut at the side: <div> “wide”",
        ),
        (f"<pre><code>{'y' * 300}</code></pre>", f"code has to be scrolled: “{'y' * 300}” (300)"),
        (
            f'<pre><code style="overflow: visible">{"y" * 90}</code></pre>',
            "360 pixels: code is cut",
        ),
        ('<code style="font-size: 10.5px">y</code>', "code of 10.5 pixels: <code> “y”"),
        ("<math></math>", "a formula without a size"),
        ("<math><merror><mi>y</mi></merror></math>", "a formula with an error: <math> “y”"),
        (
            '<div class="formula" style="height: 4px; padding: 0"><math><mi>y</mi></math></div>',
            "a formula is cut below: <div.formula> “y”",
        ),
        (
            "<style>.dark { display: none }</style>",
            "plot-dark.png is hidden on a page that is slate",
        ),
        (
            "<style>img { display: inline !important }</style>",
            "plot.png is shown on a page that is slate",
        ),
        ("<style>img { background: none }</style>", "digits.png is on a dark background"),
    ],
)
def test_a_fault_is_found(faults_of, content, fault):
    faults = faults_of(GOOD + content)
    assert any(fault in found for found in faults), faults


def test_a_picture_without_its_twin_is_found(faults_of):
    assert "1280 pixels: plot.png is on the page without plot-dark.png" in faults_of(
        '<img class="light" src="plot.png">'
    )


def test_a_formula_in_another_font_is_found(faults_of):
    assert "1280 pixels: formulas without their font" in faults_of(
        "<style>math { font-family: math !important }</style><math><mi>y</mi></math>"
    )
