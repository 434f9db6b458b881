"""The distance of few steps to the exact solution, by how they are taken.

    python benchmarks/paper/few_steps.py

writes `benchmarks/results/few-steps.json`: for each bundled model and number of steps, orders 1 to
4 of Adams–Bashforth, order 2 with two of its calls at the first step, and tuned steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import machine

import fastddim
from fastddim import philox
from fastddim.files import atomic_file

RESULTS = Path(__file__).resolve().parents[1] / "results" / "few-steps.json"
SEED = 2026
REFERENCE_STEPS = 300
COUNTS = {"digits": 512, "fashion": 64}
STEPS = (4, 5, 6, 8, 10, 12, 15, 20)
BATCH = 64


def trailing(model: Any, steps: int) -> list[int]:
    return fastddim.select_timesteps(model.schedule.T, steps, "trailing").tolist()


def first_step_twice(model: Any, steps: int) -> list[int]:
    """One step fewer, with one call more halfway through the first."""
    first, *rest = trailing(model, steps - 1)
    return [first, (first + rest[0]) // 2, *rest]


def integrated(model: Any, timesteps: list[int], x: Tensor, order: int) -> Tensor:
    """Eq. 14, dy = ε dσ with y = x/√ᾱ, by Adams–Bashforth steps of any order."""
    alphas = [*model.schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    sigmas = [((1 - a) / a) ** 0.5 for a in alphas]
    y, history = x / alphas[0] ** 0.5, []
    for s, t in enumerate(timesteps):
        epsilon = model(y * alphas[s] ** 0.5, torch.full((len(y),), t))
        history = [epsilon, *history][:order]
        points = sigmas[max(0, s + 1 - len(history)) : s + 1][::-1]
        for weight, each in zip(weights(points, sigmas[s + 1]), history, strict=True):
            y = y + weight * each
    return y


def weights(points: list[float], end: float) -> list[float]:
    """∫ from the first point to `end` of the polynomial through values at the points, as their
    weights.
    """
    scaled, last = np.array(points) / points[0], end / points[0]
    powers = np.arange(len(points))
    integrals = (last ** (powers + 1) - 1) / (powers + 1)
    solved: list[float] = np.linalg.solve(np.vander(scaled, increasing=True).T, integrals).tolist()
    return [float(w * points[0]) for w in solved]


def ways(model: Any, steps: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways to take so many steps: functions from x_T to the samples."""
    plain, twice = trailing(model, steps), first_step_twice(model, steps)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        f"order {order}": lambda x, order=order: integrated(model, plain, x, order)  # type: ignore[misc]
        for order in (1, 2, 3, 4)
    }
    found["first step twice"] = lambda x: integrated(model, twice, x, 2)
    if steps in model.tuned:
        found["tuned"] = lambda x: fastddim.sample(model, model.tuned[steps], x_T=x)
    return found


@torch.no_grad()
def measure(name: str) -> list[dict[str, Any]]:
    """One row for each number of steps and way."""
    model = fastddim.models.load(name)
    x_T = philox.initial_latents((COUNTS[name], *model.sample_shape), SEED)

    def drawn(way: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([way(part) for part in x_T.split(BATCH)])

    reference = drawn(lambda x: integrated(model, trailing(model, REFERENCE_STEPS), x, 3))
    rows = []
    for steps in STEPS:
        for way, function in ways(model, steps).items():
            began = time.perf_counter()
            squares = (drawn(function) - reference).double().square().flatten(1).mean(1)
            rows.append(
                {
                    "model": name,
                    "steps": steps,
                    "way": way,
                    "count": COUNTS[name],
                    "distance": float(f"{squares.mean().sqrt().item():.4g}"),
                    "median": float(f"{squares.median().sqrt().item():.4g}"),
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure all, and write the result file."""
    provenance = machine()
    result = {"machine": provenance, "seed": SEED, "reference_steps": REFERENCE_STEPS, "rows": []}
    for name in COUNTS:
        result["rows"] += measure(name)
    with atomic_file(RESULTS) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
