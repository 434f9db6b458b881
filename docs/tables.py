"""Cells of tables by what they hold: numbers and names stay on one line, and sentences get width.

A style sheet cannot tell them apart, and a narrow window would break all of them at any space.
"""

from __future__ import annotations

import html
import re
from typing import Any

CELL = re.compile(r"<td(?P<attributes>[^>]*)>(?P<content>.*?)</td>", re.DOTALL)
NUMBER = re.compile(r"[-−+±~≈<>≤≥(]*\d")
LONGEST_NUMBER = 22
"""Characters of the longest number that stays whole, with its unit and its error."""
LONGEST_NAME = 14
SHORTEST_SENTENCE = 32


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page."""
    return CELL.sub(with_class, content)


def with_class(found: re.Match[str]) -> str:
    """A cell with the class of what it holds."""
    attributes, content = found["attributes"], found["content"]
    lines = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br ?/?>", "\n", content))).split("\n")
    kind = kind_of(max((line.strip() for line in lines), key=len))
    if kind is None or "class=" in attributes:
        return found[0]
    return f'<td class="{kind}"{attributes}>{content}</td>'


def kind_of(text: str) -> str | None:
    """`whole` for a number or a short name, `sentence` for a long text, None for all between."""
    if len(text) <= (LONGEST_NUMBER if NUMBER.match(text) else LONGEST_NAME):
        return "whole"
    return "sentence" if len(text) >= SHORTEST_SENTENCE else None
