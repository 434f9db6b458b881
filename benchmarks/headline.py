"""The first table of performance: the fewest steps as good as 1000 of DDPM, and their speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import gpu_tables
from cpu_results import provenance, result_of
from gpu_results import Result
from markdown_cells import gain, table, three
from quality_tables import TUNED, Kind, baseline_of, quality_of


@dataclass(frozen=True)
class EqualQuality:
    """The fewest steps with which samples are as good as DDPM's of 1000 steps."""

    kind: Kind
    steps: int
    distance: float
    error: float
    close: bool  # within 5 % of DDPM's too
    speedup: float | None  # over diffusers' loop of DDPM, where it was timed


def equal_quality(
    quality: dict[str, Any], timed: Sequence[dict[str, Any]], kinds: Sequence[Kind]
) -> EqualQuality | None:
    """None where no number of steps below DDPM's that was measured is enough.

    Enough is a distance that is larger by no more than the bootstrap's error of the difference; of
    several kinds with as many steps, the one with the smallest distance counts.

    Args:
        quality: the quality results of a model.
        timed: the rows of `bench_sampling.py` of the same model.
        kinds: of steps.
    """
    baseline, error = baseline_of(quality)
    enough = [
        (row["steps"], cell["distance"], cell["error"], kind)
        for kind in kinds
        for row in kind.rows(quality)
        if row["steps"] < 1000
        and (cell := row["classifier"])["distance"] - baseline <= math.hypot(cell["error"], error)
    ]
    if not enough:
        return None
    steps, distance, error, kind = min(enough, key=itemgetter(0, 1))
    ratios = [
        row["timings"][_timed_as(kind)]["ratio"]
        for row in timed
        if row["steps"] == steps and _timed_as(kind) in row["timings"]
    ]
    speedup = 1 / ratios[0] if ratios else None
    return EqualQuality(kind, steps, distance, error, distance <= 1.05 * baseline, speedup)


def _timed_as(kind: Kind) -> str:
    """The contender of `bench_sampling.py`; noise takes as long at any η."""
    if kind == TUNED:
        return "fastddim, tuned"
    if kind.order == 2:
        return "fastddim, order 2"
    return "fastddim, η = 1" if kind.eta else "fastddim"


EQUAL_QUALITY: dict[str, tuple[Kind, ...]] = {
    "tuned": (TUNED,),
    "η = 0, order 2": (Kind("order 2", "uniform", order=2),),
    "η = 0": (Kind("order 1", "uniform"),),
    "best of all η": tuple(Kind(f"η = {eta:g}", "uniform", eta=eta) for eta in (0, 0.2, 0.5, 1)),
}
"""The kinds of steps in each row of the first table; its sentence is of the first that has any."""


def headline_as_markdown(result: dict[str, Any], measured: Mapping[str, Result]) -> str:
    """The content of its marked place.

    Args:
        result: that of `bench_sampling.py` on the CPU.
        measured: the result of each GPU, by its name.
    """
    header = ["", "steps", "faster", "Fréchet distance", "DDPM's, 1000 steps"]
    rows: list[list[str]] = []
    best, tuned = None, False
    for data in ("digits", "fashion"):
        quality = quality_of(data)
        timed = [row for row in result["rows"] if row["case"] == f"{data} U-Net"]
        found = {
            label: equal_quality(quality, timed, kinds)
            for label, kinds in EQUAL_QUALITY.items()
            if any(kind.rows(quality) for kind in kinds)
        }
        if not any(found.values()):
            found = {"any of these": None}
        for label, one in found.items():
            cells = [f"{data}, {label}", *_equal_quality(one)]
            rows.append([*cells, _spread(*baseline_of(quality))])
        tuned = tuned or "tuned" in found
        if data == "digits":
            best = next((one for one in found.values() if one is not None), None)
    rows += [row for gpu, found in measured.items() for row in gpu_tables.headline_rows(gpu, found)]
    loops = result_of("loops-cpu")["rows"]
    ratios = {row["case"]: row["timings"]["diffusers"]["ratio"] for row in loops if row["eta"] == 0}
    assert best is not None
    spacing = "at uniform spacing except where tuned" if tuned else "at uniform spacing"
    return "\n".join(
        [
            f"{_first_sentence(best)} The fewest steps measured, {spacing}, whose distance exceeds "
            "DDPM's by no more than the bootstrap's error, bold where it is within 5 % as well:",
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


def _first_sentence(best: EqualQuality) -> str:
    """The gain of the fewest steps: in calls of the model, and in time if it was measured."""
    tuned = "[tuned](../tune.md) " if best.kind == TUNED else ""
    sentence = f"**Digits as good as DDPM's of 1000 steps in {best.steps} {tuned}steps"
    if best.speedup is not None:
        return (
            f"{sentence}, {gain(best.speedup)} times faster** than those in diffusers' loop, with "
            "the same model and batch."
        )
    return f"{sentence}**, with {gain(1000 / best.steps)} times fewer calls of the model."


def _equal_quality(found: EqualQuality | None) -> list[str]:
    if found is None:
        return ["none measured below 1000", "–", "–"]
    distance = _spread(found.distance, found.error)
    noise = f" at η = {found.kind.eta:g}" if found.kind.eta else ""
    return [
        f"{found.steps}{noise}",
        "–" if found.speedup is None else f"{gain(found.speedup)}×",
        f"**{distance}**" if found.close else distance,
    ]


def _spread(distance: float, error: float) -> str:
    return f"{three(distance)} ± {error:.2g}"
