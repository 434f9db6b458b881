"""The formulas of the pages as MathML, which browsers draw without a script.

`pymdownx.arithmatex` finds `$…$` and `$$…$$` in a page; here their LaTeX is converted.
"""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
CONVERTER = LatexToMathML(fancy_error=False)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page."""

    def as_mathml(found: re.Match[str]) -> str:
        tag, latex = found["tag"], html.unescape(found["latex"]).strip()
        try:
            formula = CONVERTER.convert_with_local_state(latex, displaystyle=tag == "div")
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {latex}: {error}") from None
        return f'<div class="formula">{formula}</div>' if tag == "div" else formula

    return FORMULA.sub(as_mathml, content)
