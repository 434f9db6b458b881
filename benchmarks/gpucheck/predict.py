"""What the GPU check should measure on an H100, worked out before it has.

    python benchmarks/gpucheck/predict.py

compiles the kernels, counts instructions and operations, and writes results/gpu-predicted.json;
`python benchmarks/tables.py` then puts it into docs/gpu.md. It needs nvcc, Triton and diffusers,
and no GPU.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import machine

from gpucheck.assumptions import ASSUMPTIONS
from gpucheck.machine_code import nvcc, output_of
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
        "operations": {
            **{name: _operations(model) for name, model in models.items()},
            **{f"diffusers, {name}": tally.operations for name, tally in schedulers.items()},
        },
        "rows": rounded([*predicted_updates(instructions), *predicted_loops(models, schedulers)]),
    }


def _operations(model: Counted) -> dict[str, int]:
    tally = model.tally
    extra = {"kernels": tally.kernels, "flops": tally.flops, "parameters": model.parameters}
    return {**tally.operations, **extra}


def rounded(value: Any) -> Any:
    """Numbers with four digits, which is more than they are worth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def provenance() -> dict[str, Any]:
    """What the counts depend on, and that they are of no GPU."""
    here = machine()
    kept = ("python", "torch", "diffusers", "fastddim", "commit", "modified")
    return {
        "gpu": GPU,
        **{name: here[name] for name in kept},
        "nvcc": nvcc_version(),
        "triton": version("triton"),
    }


def nvcc_version() -> str:
    release = re.search(r"V([\d.]+)", output_of([nvcc(), "--version"], Path.cwd()))
    assert release is not None
    return release[1]


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(prediction(), indent=1) + "\n")
