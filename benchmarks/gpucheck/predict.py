"""Predicts what the GPU check will measure on an H100.

    python benchmarks/gpucheck/predict.py

compiles the kernels, counts instructions and operations, and writes results/gpu-predicted.json;
`python benchmarks/tables.py` then puts it into docs/gpu.md. It needs nvcc, Triton and diffusers,
and no GPU.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import machine

from gpucheck.assumptions import ASSUMPTIONS
from gpucheck.machine_code import nvcc_version
from gpucheck.operations import Tally
from gpucheck.predict_loops import Counted, count_models, count_schedulers, predicted_loops
from gpucheck.predict_updates import cuda_counts, predicted_updates, triton_counts

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu-predicted.json"
GPU = "NVIDIA H100 80GB HBM3 (SXM)"


def prediction() -> dict[str, Any]:
    """The content of the result file: provenance, assumptions, counts, and the rows from them."""
    instructions = {**cuda_counts(), **triton_counts()}
    models, schedulers = count_models(), count_schedulers()
    return {
        "machine": provenance(),
        "assumptions": {name: found._asdict() for name, found in ASSUMPTIONS.items()},
        "instructions": instructions,
        "operations": operations_of(models, schedulers),
        "rows": [*predicted_updates(instructions), *predicted_loops(models, schedulers)],
    }


def operations_of(
    models: dict[str, Counted], schedulers: dict[str, Tally]
) -> dict[str, dict[str, int]]:
    """Counts of a call of each model and of a step of each of diffusers' loops around none."""
    found = {f"diffusers, {name}": tally.operations for name, tally in schedulers.items()}
    for name, (tally, parameters) in models.items():
        extra = {"kernels": tally.kernels, "flops": tally.flops, "parameters": parameters}
        found[name] = {**tally.operations, **extra}
    return found


def provenance() -> dict[str, Any]:
    """The code and the tools that the counts depend on, and the GPU that is predicted."""
    here = machine()
    kept = ("python", "torch", "diffusers", "fastddim", "commit", "modified")
    return {
        "gpu": GPU,
        **{name: here[name] for name in kept},
        "nvcc": nvcc_version(),
        "triton": version("triton"),
    }


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(prediction(), indent=1) + "\n")
