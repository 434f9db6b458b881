"""Markdown tables from result files, and their places in the README and the documentation.

`python benchmarks/tables.py` rewrites the tables of the README and of the pages under docs/ from
the committed results.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import few_steps_tables
import gpu_tables
import policy_tables
import success_tables
import third_party_tables
import version_tables
from cpu_results import result_of
from gains import gains_as_markdown
from gpu_results import measured_results
from headline import headline_as_markdown
from quality_tables import (
    few_as_markdown,
    paper_as_markdown,
    quality_as_markdown,
    reconstruction_as_markdown,
    training_as_markdown,
)
from speed_tables import (
    dropins_as_markdown,
    loops_as_markdown,
    sampling_as_markdown,
    steps_as_markdown,
    stream_as_markdown,
)

ROOT = Path(__file__).resolve().parent.parent

TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step-cpu": steps_as_markdown,
    "dropins-cpu": dropins_as_markdown,
    "loops-cpu": loops_as_markdown,
    "stream-cpu": stream_as_markdown,
    "sampling-cpu": sampling_as_markdown,
    "quality-digits": quality_as_markdown,
    "quality-fashion": quality_as_markdown,
    "reconstruction": reconstruction_as_markdown,
}
"""The function that makes the table of each result file."""


def _made(*names: str) -> dict[str, str]:
    """The tables of result files, by the names of the files."""
    return {name: TABLES[name](result_of(name)) for name in names}


def readme() -> dict[str, str]:
    """The content of each marked place of the README."""
    return {"gains": gains_as_markdown(measured_results())}


def performance() -> dict[str, str]:
    """The content of each marked place of docs/results/speed.md."""
    measured = measured_results()
    return {
        "headline": headline_as_markdown(result_of("sampling-cpu"), measured),
        "gpu": gpu_tables.loops_as_markdown(measured),
        **_made("sampling-cpu", "loops-cpu", "step-cpu", "dropins-cpu", "stream-cpu"),
    }


def quality() -> dict[str, str]:
    """The content of each marked place of docs/results/quality.md."""
    return {
        "quality-few": few_as_markdown([result_of("quality-digits"), result_of("quality-fashion")]),
        "quality-paper": paper_as_markdown(result_of("quality-digits")),
        "quality-training": training_as_markdown(result_of("quality-fashion-earlier")),
        **_made("quality-digits", "quality-fashion"),
    }


def latents() -> dict[str, str]:
    """The content of the marked place of docs/tasks/latents.md."""
    return _made("reconstruction")


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "README.md": readme,
    "docs/gpu.md": gpu_tables.blocks,
    "docs/results/policy-success.md": success_tables.blocks,
    "docs/results/policy-speed.md": policy_tables.blocks,
    "docs/results/quality.md": quality,
    "docs/results/speed.md": performance,
    "docs/tasks/latents.md": latents,
    "docs/third-party.md": third_party_tables.blocks,
    "docs/tune.md": few_steps_tables.blocks,
    "docs/versions.md": version_tables.blocks,
}
"""Files with marked places, and the functions that make their contents."""


def updated(text: str, made: dict[str, str]) -> str:
    """The text of a page with `made` in its marked places."""
    for place, content in made.items():
        begin, end = f"<!-- {place}:begin -->", f"<!-- {place}:end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


if __name__ == "__main__":
    for name, made in PAGES.items():
        page = ROOT / name
        page.write_text(updated(page.read_text(), made()))
