"""The site as `make docs` builds it: complete, without the network, and help within the window."""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE_WIDTH = 93
"""Characters of a line of code that fit into a window of 1280 pixels, by docs/theme/style.css."""


class Page(HTMLParser):
    """Elements, links and tables of a page."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.elements = []
        self.rows = []
        self._cell = None
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)

    @functools.cached_property
    def fetched(self):
        """The addresses that a browser fetches to show the page."""
        addresses = [a["src"] for tag, a in self.elements if a.get("src")]
        return addresses + [
            a["href"] for tag, a in self.elements if tag == "link" and a.get("rel") != "canonical"
        ]

    def file(self, address):
        """The file that an address on the page names."""
        return (self.path.parent / unquote(urlsplit(address).path)).resolve()


def hook(name):
    """A module of docs/ that MkDocs calls."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Every page by its address."""
    return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html")}


@pytest.fixture(scope="module")
def found(site):
    """The search: the sections that hold all of some words, as addresses."""
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))

    def search(words):
        return {
            entry["location"]
            for entry in index["docs"]
            if all(w in f"{entry['title']} {entry['text']}".lower() for w in words.lower().split())
        }

    return search


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for address, page in pages.items():
        for fetched in page.fetched:
            parts = urlsplit(fetched)
            assert not parts.netloc, (address, fetched)
            if parts.scheme != "data":
                # The page for missing addresses has those of a site that is served.
                assert address == "404.html" or page.file(fetched).is_file(), (address, fetched)
    for style in site.rglob("*.css"):
        for fetched in re.findall(r"url\(([^)]+)\)", style.read_text(encoding="utf-8")):
            assert not urlsplit(fetched.strip("\"'")).netloc, (style, fetched)


def test_links_and_search_work_without_a_server(site, pages):
    """Links and search work without a server: an address of a folder would list its files."""
    for address, page in pages.items():
        links = [a["href"] for tag, a in page.elements if tag == "a" and "href" in a]
        for link in links if address != "404.html" else ():
            parts = urlsplit(link)
            if not parts.scheme and parts.path:
                assert page.file(link).is_file(), (address, link)
    assert (site / "search/search_index.js").is_file()


def test_every_picture_is_on_a_page_and_has_a_description(pages):
    shown = set()
    for page in pages.values():
        for tag, attributes in page.elements:
            if tag == "img":
                assert attributes["alt"], attributes["src"]
                shown.add(page.file(attributes["src"]).name)
    drawn = {path.name for path in (ROOT / "docs").rglob("*.png")}
    assert drawn
    assert drawn <= shown


def as_text(cell):
    """A cell of a Markdown table as a reader sees it."""
    cell = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell.strip())
    return html.unescape(re.sub(r"\*\*|`|<br>", "", cell))


SOURCES = {"README.md": README} | {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md")
}
MEASUREMENTS = [
    (source, name)
    for source, text in SOURCES.items()
    for name in re.findall(r"<!-- ([\w-]+):begin -->", text)
]


@pytest.mark.parametrize(("source", "name"), MEASUREMENTS)
def test_measurements_are_shown(pages, source, name):
    address = "index.html" if source == "README.md" else source.removeprefix("docs/")
    block = SOURCES[source].partition(f"<!-- {name}:begin -->\n")[2]
    rows = block.partition(f"<!-- {name}:end -->")[0].splitlines()
    cells = [row.strip("|").split("|") for row in rows if row.startswith("|")]
    expected = [[as_text(cell) for cell in row] for row in cells if set(row[0].strip()) != {"-"}]
    assert expected
    shown = pages[address.replace(".md", ".html")].rows
    assert all(row in shown for row in expected)


def test_sections_of_the_readme_are_shown(pages):
    """Sections of the README are shown, except those that a page replaces with more detail."""
    left = {
        "Install": "install.html",
        "Drop-ins": "dropins.html",
        "The same noise everywhere": "noise.html",
        "Limits": "features.html",
        "Documentation": "index.html",
    }
    assert set(left.values()) <= set(pages)
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    sections = re.findall(r"^## (.+)$", prose, re.MULTILINE)
    assert set(left) < set(sections)
    for title in set(sections) - set(left):
        heading = re.compile(rf"<h2 id=[^>]*>{re.escape(html.escape(title))}<")
        assert heading.search(pages["index.html"].text), title


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ("inpaint", "tasks/editing.html"),
        ("img2img", "tasks/editing.html"),
        ("warm start", "tasks/editing.html"),
        ("resume", "tasks/editing.html"),
        ("class labels", "tasks/conditions.html"),
        ("classifier-free guidance", "tasks/conditions.html"),
        ("text embeddings", "tasks/conditions.html"),
        ("gif", "tasks/pictures.html"),
        ("png", "tasks/pictures.html"),
        ("torchrun", "tasks/runs.html"),
        ("real-time chunking", "policies.html"),
        ("robot control loop", "policies.html"),
        ("latency", "choose.html"),
    ],
)
def test_the_search_finds(found, words, address):
    assert address in {location.partition("#")[0] for location in found(words)}


@pytest.mark.parametrize("address", ["index.html", "reference/sampling.html"])
def test_which_call_to_take_is_linked(pages, address):
    page = pages[address]
    links = {page.file(a["href"]) for tag, a in page.elements if tag == "a" and a.get("href")}
    assert pages["choose.html"].path.resolve() in links


def test_formulas_are_mathml(pages):
    for address, least in (
        ("method.html", 60),
        ("schedules.html", 20),
        ("policies.html", 20),
        ("noise.html", 10),
        ("kernel.html", 5),
    ):
        assert pages[address].text.count("<math") >= least
    for address, page in pages.items():
        prose = re.sub(r"<(pre|code|script)\b.*?</\1>", "", page.text, flags=re.DOTALL)
        assert "arithmatex" not in prose, address
        assert "$" not in prose, address
        assert "<merror" not in prose, address


def test_help_fits(pages):
    blocks = re.findall(r"<pre>.*?</pre>", pages["commands.html"].text, re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        lines = html.unescape(re.sub(r"<[^>]*>", "", block)).splitlines()
        assert max(map(len, lines)) <= CODE_WIDTH, max(lines, key=len)


class Source:
    """A page, or another file, before the site is built."""

    def __init__(self, address, text=""):
        self.src_uri = address
        self.content_string = text
        self.file = self


class Sources(list):
    """The files of a site, as MkDocs passes them."""

    def documentation_pages(self):
        return [file for file in self if file.src_uri.endswith(".md")]


PART = """# Title
<!-- --8<-- [start:one] -->
## One

See [two](#two), [docs/b.md](docs/b.md#end), [this](docs/b.md), [far](https://example.org/#two),
[benchmarks/README.md](benchmarks/README.md) and ![a plot](docs/figures/plot.png).

```text
## no heading, [no link](#two)
```

### Below
<!-- --8<-- [end:one] -->
<!-- --8<-- [start:two] -->
## Two
<!-- --8<-- [end:two] -->
"""


@pytest.fixture
def included(monkeypatch, tmp_path):
    """A function that gives a page with the parts of `PART` in it."""
    parts = hook("parts")
    monkeypatch.setattr(parts, "README", tmp_path / "README.md")

    def on_a_page(text, *, readme=PART):
        parts.README.write_text(readme, encoding="utf-8")
        page = Source("tasks/a.md", text)
        others = [("c.md", '--8<-- "README.md:two"\n'), ("b.md", "# The other\n")]
        pictures = Source("figures/plot.png")
        parts.on_files(Sources([page, pictures, *(Source(*other) for other in others)]))
        return parts.on_page_markdown(text, page=page)

    return on_a_page


def test_links_of_an_included_part_are_those_of_its_page(included):
    text = included('--8<-- "README.md:one"\n')
    assert text.splitlines()[2:4] == [
        "See [two](../c.md#two), [The other](../b.md#end), [this](../b.md), "
        "[far](https://example.org/#two),",
        "benchmarks/README.md and ![a plot](../figures/plot.png).",
    ]
    assert "## no heading, [no link](#two)" in text


@pytest.mark.parametrize(("title", "level"), [("", 1), ("# A page\n\n", 2)])
def test_headings_of_an_included_part_fit_its_page(included, title, level):
    lines = included(f'{title}--8<-- "README.md:one"\n').splitlines()
    assert f"{'#' * level} One" in lines
    assert f"{'#' * (level + 1)} Below" in lines


def test_a_part_or_a_heading_that_is_not_there_stops_the_build(included):
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match=r"tasks/a\.md: expected a part of README\.md, got three"):
        included('--8<-- "README.md:three"\n')
    with pytest.raises(
        PluginError, match=r"README\.md: #gone: expected a heading that the site has"
    ):
        included('--8<-- "README.md:one"\n', readme=PART.replace("(#two),", "(#gone),"))


def test_a_formula_that_is_no_latex_stops_the_build():
    from mkdocs.exceptions import PluginError

    formulas = hook("formulas")
    page = Source("a.md")
    inline = '<p><span class="arithmatex">\\(a &lt; b\\)</span></p>'
    drawn = formulas.on_page_content(inline, page=page)
    assert drawn == "<p><math><mi>a</mi><mo>&lt;</mo><mi>b</mi></math></p>"
    block = '<div class="arithmatex">\\[\\unknown\\]</div>'
    with pytest.raises(PluginError, match=r"a\.md: \\unknown: "):
        formulas.on_page_content(block, page=page)
