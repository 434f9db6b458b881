"""The example in a docstring: five lines that run."""

from __future__ import annotations

import inspect
import re
from typing import Any


def run_example(documented: Any, **names: Any) -> dict[str, Any]:
    """Run it; returns its variables."""
    text = inspect.getdoc(documented) or ""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1, f"{documented} has {len(blocks)} examples"
    lines = blocks[0].strip().splitlines()
    assert len(lines) <= 5, f"the example of {documented} has {len(lines)} lines"
    exec(compile(blocks[0], f"<example of {documented}>", "exec"), names)
    return names
