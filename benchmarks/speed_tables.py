"""Tables of times on the CPU: steps, drop-ins, loops, whole runs and streams of requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpu_results import paired, provenance, ratio
from markdown_cells import duration, gain, table, three
from quality_tables import baseline_of, distance_of, quality_cell, quality_of

CONTENDERS = (
    "fastddim.step",
    "Stepper",
    "fastddim",
    "fastddim in place",
    "diffusers",
    "eager",
    "torch.compile",
)
LOOP_CONTENDERS = ("diffusers", "official", "fastddim, compiled model", "torch.compile")


def steps_as_markdown(result: dict[str, Any]) -> str:
    """Time of one step as a multiple of the floor, `torch.add(x, e, out=o)`."""
    timed = [name for name in CONTENDERS if any(name in row["timings"] for row in result["rows"])]
    header = ["case", "floor", *timed]
    rows = []
    for row in result["rows"]:
        cells = [row["case"], duration(row["timings"]["floor"]["seconds"])]
        cells += [ratio(row["timings"].get(name)) for name in timed]
        rows.append(cells)
    return f"{table(header, rows)}\n\n{paired(result['machine'])}"


def dropins_as_markdown(result: dict[str, Any]) -> str:
    """Time of a step of the original and of the drop-in, and of the draw that both share."""
    header = ["", "case", "original", "fastddim", "faster", "the draw"]
    rows = []
    for row in result["rows"]:
        timings, steps = row["timings"], row["steps"]
        seconds = [timings[name]["seconds"] / steps for name in ("original", "fastddim")]
        noisy = row["eta"] > 0
        cells = [row["case"], f"η = {row['eta']:g}, {'×'.join(map(str, row['shape']))}"]
        cells += [*map(duration, seconds), ratio(timings["original"])]
        cells += [duration(timings["draw"]["seconds"]) if noisy else "–"]
        rows.append(cells)
    return f"{table(header, rows)}\n\n{paired(result['machine'])}"


def loops_as_markdown(result: dict[str, Any]) -> str:
    """Time of a loop, and the multiples of it that the others take."""
    header = ["model", "", "fastddim, a step", *LOOP_CONTENDERS]
    rows = []
    for row in result["rows"]:
        timings = row["timings"]
        case = f"η = {row['eta']:g}, {'×'.join(map(str, row['shape']))}"
        cells = [row["case"], case, duration(timings["fastddim"]["seconds"] / row["steps"])]
        cells += [ratio(timings[name]) for name in LOOP_CONTENDERS]
        rows.append(cells)
    return f"{table(header, rows)}\n\n{paired(result['machine'])}"


def sampling_as_markdown(result: dict[str, Any]) -> str:
    """Gains over 1000 steps of DDPM, by fewer steps and by the loop separately; and quality."""
    header = ["model", "S", "fastddim", "diffusers' DDIM", "fewer steps", "faster loop", "together"]
    header += ["η = 1", "order 2", "distance", "of order 2", "of DDPM, S = 1000"]
    rows = []
    for row in (row for row in result["rows"] if "diffusers" in row["timings"]):
        timings, steps = row["timings"], row["steps"]
        cells = [row["case"], str(steps)]
        cells += [duration(timings[name]["seconds"]) for name in ("fastddim", "diffusers")]
        cells += [f"{gain(value)}×" for value in gains(row)]
        cells += [duration(timings[f"fastddim, {how}"]["seconds"]) for how in ("η = 1", "order 2")]
        rows.append([*cells, *_distances(row["case"], steps)])
    tables = [table(header, rows), *_tuned_table(result)]
    return "\n\n".join([*tables, paired(result["machine"])])


def _tuned_table(result: dict[str, Any]) -> Iterator[str]:
    """Gains of tuned steps over 1000 steps of DDPM, if they were timed; and quality."""
    header = ["tuned steps", "S", "fastddim", "faster than DDPM", "distance", "of DDPM, S = 1000"]
    rows = []
    for row in result["rows"]:
        if (timing := row["timings"].get("fastddim, tuned")) is not None:
            quality = quality_of(row["case"].split()[0])
            found = distance_of(quality, row["steps"], spacing="tuned")
            cells = [row["case"], str(row["steps"])]
            cells += [duration(timing["seconds"]), f"{gain(1 / timing['ratio'])}×"]
            rows.append([*cells, *map(_distance, (found, baseline_of(quality)))])
    if rows:
        yield table(header, rows)


def gains(row: dict[str, Any]) -> tuple[float, float, float]:
    """The factors by which fewer steps, a faster loop, and both shorten DDPM's 1000 steps."""
    timings = row["timings"]
    fewer, together = (1 / timings[name]["ratio"] for name in ("diffusers", "fastddim"))
    return fewer, timings["diffusers against fastddim"]["ratio"], together


def _distances(case: str, steps: int) -> list[str]:
    data, _, network = case.partition(" ")
    if network != "U-Net":
        return ["–"] * 3
    quality = quality_of(data)
    found = [distance_of(quality, steps, 0.0, order) for order in (1, 2)]
    return list(map(_distance, (*found, baseline_of(quality))))


def _distance(cell: tuple[float, float] | None) -> str:
    return "–" if cell is None else quality_cell(*cell)


def stream_as_markdown(result: dict[str, Any]) -> str:
    """Throughput and latency of requests served one after the other, and in a shared batch."""
    header = ["model", "load", "requests/s", "", "median", "", "95 %", ""]
    rows = [["", "", *["one by one", "stream"] * 3]]
    for row in result["rows"]:
        cells = [row["case"], f"{row['load']:g}"]
        timings = [row["timings"][name] for name in ("one after the other", "stream")]
        cells += [three(timing["requests_per_second"]) for timing in timings]
        for name in ("latency_median", "latency_95"):
            cells += [duration(timing[name]) for timing in timings]
        rows.append(cells)
    slots = f"{result['rows'][0]['slots']} slots, uniform spacing."
    return f"{table(header, rows)}\n\n{provenance(result['machine'])} {slots}"
