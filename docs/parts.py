"""Parts of the README on the pages of the site.

A line `--8<-- "README.md:name"` of a page stands for the text between the marks
`<!-- --8<-- [start:name] -->` and `<!-- --8<-- [end:name] -->` of the README. The headings of the
part are shifted to fit the page: the first is the page's title where the page has no other. Links
of the README become those of the site, and a page that is called by the name of its file is called
by its title. The name of a file that the site lacks stays without a link. A picture of the README
that follows the reader's system follows the site's own switch of colours.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError

README = Path(__file__).parents[1] / "README.md"

INCLUDE = re.compile(r'^--8<-- "README\.md:(\w+)"$', re.MULTILINE)
PART = re.compile(
    r"^<!-- --8<-- \[start:(\w+)\] -->\n(.*?)^<!-- --8<-- \[end:\1\] -->$",
    re.MULTILINE | re.DOTALL,
)
HEADING = re.compile(r"^(#+) (.+)$")
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)">\s*</picture>'
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")

PAGES: dict[str, str] = {}
"""The page that each part is on."""
TITLES: dict[str, str | None] = {}
"""Everything that a page of the site may link to, with the title of what is a page with one."""


def parts() -> dict[str, str]:
    """The text of each part."""
    return dict(PART.findall(README.read_text(encoding="utf-8")))


def outside_code(text: str) -> Iterator[tuple[str, bool]]:
    """The lines, and whether each is prose and not code."""
    fenced = False
    for line in text.splitlines():
        fence = line.startswith("```")
        yield line, not (fenced or fence)
        fenced ^= fence


def headings(text: str) -> list[tuple[int, str]]:
    """Level and title of each heading."""
    found = (HEADING.match(line) for line, prose in outside_code(text) if prose)
    return [(len(heading[1]), heading[2]) for heading in found if heading]


def on_files(files: Any, **_: Any) -> None:
    """Called by MkDocs with the files of the site."""
    TITLES.update((file.src_uri, None) for file in files)
    for file in files.documentation_pages():
        text = file.content_string
        PAGES.update((name, file.src_uri) for name in INCLUDE.findall(text))
        TITLES[file.src_uri] = next((title for _, title in headings(text)), None)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    texts = parts()
    places = {
        slugify(title, "-"): PAGES[name]
        for name, text in texts.items()
        if name in PAGES
        for _, title in headings(text)
    }
    here = page.file.src_uri
    top = 2 if any(level == 1 for level, _ in headings(markdown)) else 1

    def part(found: re.Match[str]) -> str:
        if found[1] not in texts:
            raise PluginError(f"{here}: expected a part of README.md, got {found[1]}")
        return as_part(texts[found[1]], here, top, places)

    return INCLUDE.sub(part, markdown)


def as_part(text: str, here: str, top: int, places: dict[str, str]) -> str:
    """A part of the README as text of the page `here`, its headings from level `top` on."""
    shift = top - min((level for level, _ in headings(text)), default=top)

    def link(found: re.Match[str]) -> str:
        mark, name, target = found.groups()
        path, _, anchor = target.partition("#")
        if ":" in path:
            return found[0]
        if not path:
            if anchor not in places:
                raise PluginError(f"README.md: {target}: expected a heading that the site has")
            return f"{mark}[{name}]({relative(places[anchor], here)}#{anchor})"
        if path.removeprefix("docs/") not in TITLES:
            return name
        title = TITLES[path.removeprefix("docs/")] if name == path else None
        return f"{mark}[{title or name}]({relative(target.removeprefix('docs/'), here)})"

    pair = r"![\g<alt>](\g<light>#gh-light-mode-only)\n![\g<alt>](\g<dark>#gh-dark-mode-only)"
    lines = []
    for line, prose in outside_code(PICTURE.sub(pair, text)):
        heading = HEADING.match(line) if prose else None
        if heading is not None:
            lines.append("#" * (len(heading[1]) + shift) + f" {heading[2]}")
        else:
            lines.append(LINK.sub(link, line) if prose else line)
    return "\n".join(lines)


def relative(target: str, here: str) -> str:
    """The way to a file of the site from the page `here`."""
    return posixpath.relpath(target, posixpath.dirname(here) or ".")
