"""The models that ship with the package, listed without reading any."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = ".safetensors"
FOLDER = Path(__file__).parent / "models" / "weights"


def available() -> tuple[str, ...]:
    """Names of the bundled models."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*" + WEIGHTS)))
