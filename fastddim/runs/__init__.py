"""Runs of many samples: `generate` draws them into a folder, `merge` and `digest` read them.

A run may be interrupted at any moment and continued with any number of processes. `manifest.json`
in its folder lists everything that its bytes depend on.
"""

from fastddim.runs.api import generate
from fastddim.runs.complete import digest, merge
from fastddim.runs.generation import Run
from fastddim.runs.manifest import ManifestMismatchError

__all__ = ["ManifestMismatchError", "Run", "digest", "generate", "merge"]
