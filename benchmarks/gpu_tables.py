"""The tables of docs/gpu.md: predictions, and measurements beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown_cells import duration, table, two

RESULTS = Path(__file__).resolve().parent / "results"
PREDICTED = "gpu-predicted"
# The GPU that the predictions are for, as its result file is named.
PREDICTED_GPU = "h100"
NOT_MEASURED = "not measured yet"


def blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Content of each marked place of docs/gpu.md."""
    predicted = json.loads((folder / f"{PREDICTED}.json").read_text())
    measured = measured_results(folder)
    return {
        "gpu-assumptions": assumptions_as_markdown(predicted),
        "gpu-counts": counts_as_markdown(predicted),
        "gpu-updates": updates_as_markdown(predicted, measured),
        "gpu-loops": loops_as_markdown(predicted, measured),
        "gpu-stages": stages_as_markdown(measured),
    }


def measured_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The result file of each GPU that has been measured, by its name."""
    return {
        file.stem.removeprefix("gpu-"): json.loads(file.read_text())
        for file in sorted(folder.glob("gpu-*.json"))
        if file.stem != PREDICTED
    }


def seconds_of(result: dict[str, Any]) -> dict[str, float]:
    """The median of each measure."""
    return {row["measure"]: row["seconds"]["median"] for row in result["rows"] if "measure" in row}


def updates_as_markdown(predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """Predicted and measured times of an update, and its share of the bandwidth of a copy."""
    rows = [row for row in predicted["rows"] if "share_of_copy_bandwidth" in row]
    shares = {row["measure"]: f"{row['share_of_copy_bandwidth']:.2f}" for row in rows}
    return _compared(rows, measured, "of a copy", shares)


def loops_as_markdown(predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """Predicted and measured times of everything else, and the part of each that is largest."""
    rows = [row for row in predicted["rows"] if "share_of_copy_bandwidth" not in row]
    parts = {
        row["measure"]: ", ".join(
            f"{name} {duration(seconds, two)}" for name, seconds in row["parts"].items() if seconds
        )
        for row in rows
    }
    return _compared(rows, measured, "parts", parts)


def _compared(
    rows: list[dict[str, Any]], measured: dict[str, Any], extra: str, cells: dict[str, str]
) -> str:
    header = ["measure", "predicted", extra, "bound by", *_columns(measured)]
    found = {gpu: seconds_of(result) for gpu, result in measured.items()}
    return table(
        header,
        [
            [
                row["measure"],
                duration(row["seconds"], two),
                cells[row["measure"]],
                row["bound"],
                *_measured_cells(row, found),
            ]
            for row in rows
        ],
    )


def _columns(measured: dict[str, Any]) -> Iterator[str]:
    for gpu in measured or {PREDICTED_GPU: None}:
        yield f"measured ({gpu})"
        if gpu == PREDICTED_GPU:
            yield "error"


def _measured_cells(row: dict[str, Any], found: dict[str, dict[str, float]]) -> Iterator[str]:
    for gpu, seconds in (found or {PREDICTED_GPU: {}}).items():
        value = seconds.get(row["measure"])
        yield NOT_MEASURED if value is None else duration(value)
        if gpu == PREDICTED_GPU:
            yield "–" if value is None else f"{row['seconds'] / value - 1:+.0%}"


def assumptions_as_markdown(predicted: dict[str, Any]) -> str:
    """Every number that was taken for granted."""
    rows = [
        [f"`{name}`", _quantity(found), found["meaning"], found["source"]]
        for name, found in predicted["assumptions"].items()
    ]
    return table(["name", "value", "what it is", "source"], rows)


def _quantity(found: dict[str, Any]) -> str:
    value, unit = found["value"], found["unit"]
    return duration(value) if unit == "s" else f"{value:g} {unit}".strip()


def counts_as_markdown(predicted: dict[str, Any]) -> str:
    """Counts that the predictions use: instructions of kernels, operations of models."""
    instructions = table(
        ["update", "instructions of a warp"],
        [[name, str(sum(found.values()))] for name, found in predicted["instructions"].items()],
    )
    kinds = ("kernels", "convolution", "norm", "product", "attention", "pointwise", "view")
    kinds += ("scalar", "wait")
    operations = table(
        ["operations of a step", *kinds],
        [
            [name, *(str(found.get(kind, 0)) for kind in kinds)]
            for name, found in predicted["operations"].items()
        ],
    )
    machine = predicted["machine"]
    note = (
        f"Counted with nvcc {machine['nvcc']}, Triton {machine['triton']}, torch "
        f"{machine['torch']} and diffusers {machine['diffusers']}, fastddim {machine['fastddim']} "
        f"at {machine['commit']}."
    )
    return f"{instructions}\n\n{operations}\n\n{note}"


def stages_as_markdown(measured: dict[str, Any]) -> str:
    """How each stage of the check ended on each GPU."""
    if not measured:
        return "No result file is there: the check has not run on a GPU yet."
    return "\n\n".join(
        f"{result['machine']['gpu']}:\n\n"
        + table(
            ["stage", "result", "seconds"],
            [[s["name"], s["result"], f"{s['seconds']:.1f}"] for s in result["stages"]],
        )
        for result in measured.values()
    )
