"""The origin of a result: the machine, the versions and the code."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from harness import machine, version_of

from gpucheck.commands import output

UNKNOWN, DRY = "unknown", "dry run"

# The sources of a kit, and its tests.
SOURCES = ("csrc", "fastddim", "kernels", "tests")
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".py")


def kit() -> dict[str, Any] | None:
    """The record of the package under test by `prepare.py`; None if the installed one is tested."""
    path = Path(os.environ.get("GPUCHECK_KIT", "")) / "kit.json"
    known: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return known


def digest(root: Path) -> str:
    """SHA-256 of the sources in a checkout, which need not be known to git."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in SUFFIXES:
                content = file.read_bytes()
                total.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
                total.update(content)
    return total.hexdigest()


def provenance(dry: bool) -> dict[str, Any]:
    """Facts that every result of this machine depends on, found without CUDA."""
    facts = {
        **machine(),
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        **({"gpu": DRY} if dry else driver()),
    }
    prepared = kit()
    if prepared is not None:
        facts |= {key: prepared[key] for key in ("commit", "modified", "fastddim", "nvcc")}
    return facts


def driver() -> dict[str, Any]:
    """The GPU and its driver, from nvidia-smi."""
    query = "--query-gpu=name,driver_version,memory.total"
    line = output("nvidia-smi", query, "--format=csv,noheader").splitlines()[:1]
    values = [value.strip() for value in line[0].split(",")] if line else []
    if len(values) != 3:
        return {"gpu": UNKNOWN, "driver": None, "gpu_memory": None}
    return dict(zip(("gpu", "driver", "gpu_memory"), values, strict=True))
