"""The README's first table: the fewest steps that are as good as 1000 of DDPM, and their speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_tables
from cpu_results import provenance, result_of
from gpu_results import Result
from markdown_cells import gain, table, three
from quality_tables import baseline_of, distance_of, quality_of


@dataclass(frozen=True)
class EqualQuality:
    """The fewest steps with which samples are as good as DDPM's of 1000 steps."""

    steps: int
    eta: float
    distance: float
    error: float
    close: bool  # within 5 % of DDPM's too
    speedup: float  # over diffusers' loop of DDPM


def equal_quality(
    quality: dict[str, Any], timed: Sequence[dict[str, Any]], order: int, etas: Sequence[float]
) -> EqualQuality | None:
    """None where no number of steps below DDPM's that was timed is enough.

    Enough is a distance that is larger by no more than the bootstrap's error of the difference; of
    several η with as many steps, the one with the smallest distance counts.

    Args:
        quality: the quality results of a model.
        timed: the rows of `bench_sampling.py` of the same model, fewest steps first.
    """
    baseline = baseline_of(quality)
    for row in (row for row in timed if row["steps"] < 1000):
        found = [
            (*cell, eta)
            for eta in etas
            if (cell := distance_of(quality, row["steps"], eta, order)) is not None
            and cell[0] - baseline[0] <= math.hypot(cell[1], baseline[1])
        ]
        if found:
            distance, error, eta = min(found)
            close = distance <= 1.05 * baseline[0]
            speedup = 1 / row["timings"][_timed_as(order, eta)]["ratio"]
            return EqualQuality(row["steps"], eta, distance, error, close, speedup)
    return None


def _timed_as(order: int, eta: float) -> str:
    """The contender of `bench_sampling.py`; noise takes as long at any η."""
    if order == 2:
        return "fastddim, order 2"
    return "fastddim, η = 1" if eta else "fastddim"


EQUAL_QUALITY: tuple[tuple[str, int, tuple[float, ...]], ...] = (
    ("η = 0, order 2", 2, (0.0,)),
    ("η = 0", 1, (0.0,)),
    ("best of all η", 1, (0.0, 0.2, 0.5, 1.0)),
)
"""The kinds of steps that compete in the headline: name, order and all η tried."""


def headline_as_markdown(result: dict[str, Any], measured: Mapping[str, Result]) -> str:
    """The README's first lines.

    Args:
        result: that of `bench_sampling.py` on the CPU.
        measured: the result of each GPU, by its name.
    """
    header = ["", "steps", "faster", "Fréchet distance", "DDPM's, 1000 steps"]
    rows, bests = [], []
    for data in ("digits", "fashion"):
        quality = quality_of(data)
        timed = [row for row in result["rows"] if row["case"] == f"{data} U-Net"]
        found = {
            label: equal_quality(quality, timed, order, etas)
            for label, order, etas in EQUAL_QUALITY
        }
        if not any(found.values()):
            found = {"any of these": None}
        for label, one in found.items():
            cells = [f"{data}, {label}", *_equal_quality(one)]
            rows.append([*cells, _spread(*baseline_of(quality))])
        bests += found.values()
    rows += [row for gpu, found in measured.items() for row in gpu_tables.headline_rows(gpu, found)]
    loops = result_of("loops-cpu")["rows"]
    ratios = {row["case"]: row["timings"]["diffusers"]["ratio"] for row in loops if row["eta"] == 0}
    best = bests[0]
    assert best is not None
    return "\n".join(
        [
            f"**Digits as good as DDPM's of 1000 steps in {best.steps} steps, "
            f"{gain(best.speedup)} times faster** than those in diffusers' loop, with the same "
            "model and batch. The fewest steps, at uniform spacing, whose distance exceeds DDPM's "
            "by no more than the bootstrap's error, bold where it is within 5 % as well:",
            "",
            table(header, rows),
            "",
            "With the same number of steps, diffusers' loop takes "
            f"{gain(ratios['null model'])} times as long around a model that costs nothing, "
            f"{gain(ratios['policy head'])} times around a policy head of 112 numbers, and "
            f"{gain(ratios['digits U-Net'])} times around the digits' U-Net: there the model "
            "decides.",
            *(
                sentence
                for gpu, found in measured.items()
                for sentence in gpu_tables.headline_sentence(gpu, found)
            ),
            "",
            provenance(result["machine"]),
            *(found.provenance for found in measured.values()),
        ]
    )


def _equal_quality(found: EqualQuality | None) -> list[str]:
    if found is None:
        return ["none measured below 1000", "–", "–"]
    distance = _spread(found.distance, found.error)
    noise = f" at η = {found.eta:g}" if found.eta else ""
    return [
        f"{found.steps}{noise}",
        f"{gain(found.speedup)}×",
        f"**{distance}**" if found.close else distance,
    ]


def _spread(distance: float, error: float) -> str:
    return f"{three(distance)} ± {error:.2g}"
