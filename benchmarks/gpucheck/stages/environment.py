"""Versions, the driver, tools, and the package under test."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import torch
from harness import version_of

import fastddim
from gpucheck import provenance
from gpucheck.commands import output
from gpucheck.record import Record
from gpucheck.settings import Settings

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "huggingface-hub",
    "setuptools",
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
)
TOOLS = ("nvcc", "c++", "git", "ncu", "compute-sanitizer", "cuobjdump")
STATE = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
VARIABLES = ("CUDA", "TRITON", "TORCH", "LD_")


def run(record: Record, settings: Settings) -> None:
    record.show(packages={name: version_of(name) for name in PACKAGES}, python=sys.version)
    record.show(tools={name: shutil.which(name) for name in TOOLS})
    record.row(variables={k: v for k, v in os.environ.items() if k.startswith(VARIABLES)})
    for words in (("nvcc", "--version"), ("c++", "--version"), ("lscpu",)):
        record.row(command=" ".join(words), says=output(*words)[:1500])
    record.attempt(lambda: importlib.import_module("diffusers"))
    _package(record, settings)
    if not settings.dry:
        record.attempt(lambda: _device(record, settings), what="device")
    report = output(sys.executable, "-m", "fastddim.cli", "env", limit=settings.seconds)
    record.show(report=report[:3000])


def _package(record: Record, settings: Settings) -> None:
    """Check that the package under test is that of the kit, and the kit of this checkout."""
    tested = Path(fastddim.__file__).resolve()
    record.show(tested=str(tested), extension=fastddim.ops.EXTENSION_ERROR)
    if fastddim.ops.EXTENSION_ERROR is not None:
        record.problem(extension=fastddim.ops.EXTENSION_ERROR)
    kit = provenance.kit()
    if kit is None:
        return
    if not tested.is_relative_to(settings.work):
        record.problem(tested=f"expected the package of the kit, got {tested}")
    for package in ("torch", "triton"):
        here = version_of(package)
        if release(here) != release(kit[package]):
            record.problem(package=package, expected=kit[package], got=here)
    # A digest rather than the commit, since a copy of a checkout may lack its history.
    sources = provenance.digest(settings.root)
    if sources != kit["sources"]:
        record.problem(expected=f"a kit of this checkout's sources, {sources}", got=kit["sources"])


def release(version: str | None) -> str | None:
    """A version without its local part, which names the build of torch."""
    return version and version.partition("+")[0]


def _device(record: Record, settings: Settings) -> None:
    properties = torch.cuda.get_device_properties(settings.device)
    state = output("nvidia-smi", f"--query-gpu={STATE}", "--format=csv,noheader")
    record.show(
        machine={
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_state": state,
        }
    )
