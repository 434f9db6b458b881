"""The predictions in docs/gpu.md, compared with what was measured.

They were made before anything had run on a GPU, and are compared with the first run of the same
code. What the first run left out is compared with the first result there is.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_results import FIRST, NOT_MEASURED, PREDICTED, PREDICTED_GPU, RESULTS, Result, read
from markdown_cells import duration, percent, table, two

WORTH_EXPLAINING = 0.20

GROUPS = {
    "updates of 64 MiB and more, CUDA": r"update, cuda, .* (64|256|1024) MiB",
    "updates of 1 and 16 MiB, CUDA": r"update, cuda, .* (1|16) MiB",
    "updates of 64 MiB and more, Triton": r"update, triton, .* (64|256|1024) MiB",
    "updates of 1 and 16 MiB, Triton": r"update, triton, .* (1|16) MiB",
    'loops, `graph="loop"`': r"(loop|latent).*, graph=loop",
    "loops, `graph=True`": r"(loop|latent).*, graph=True",
    "loops, `graph=False`": r"(loop|latent).*, graph=False",
    "loops of diffusers": r"((loop|latent).*, diffusers|ddpm.*, diffusers .*)",
    "whole runs against DDPM": r"ddpm.*, fastddim.*",
    "under `torch.compile`": r"compiled.*",
}
"""Measures by a pattern of their names."""


class Explanation(NamedTuple):
    """Why times whose names match a pattern are off."""

    title: str
    measures: str
    sign: int
    """Of the error, predicted − measured."""
    why: str


EXPLANATIONS = (
    Explanation(
        "Triton's updates of 1 and 16 MiB",
        r"update, triton, .* (1|16) MiB",
        -1,
        "The launch of a Triton kernel from Python takes longer than the kernel, and longer than "
        "the clearing of the caches before the kernel, which would hide the launch. So the two "
        "events measure the host. In a CUDA graph nothing is launched from Python.",
    ),
    Explanation(
        "CUDA's updates of 1 MiB",
        r"update, cuda, .* 1 MiB",
        -1,
        "The launch takes nearly all of the time. Besides the bytes, 5 to 6 µs lie between the two "
        "events. The prediction assumed 3.2: 2 for a kernel that does nothing, and three dependent "
        "reads.",
    ),
    Explanation(
        "CUDA's update of 16 MiB in bfloat16 with noise",
        r"update, cuda, bfloat16, eta 1, 16 MiB",
        -1,
        "Bound by instructions. The prediction assumed that every scheduler issues in 89 % of the "
        "cycles at 1.98 GHz. Nsight Compute counts 78 % (stage `counters`), with 68 % of the warps "
        "active: 40 registers per thread leave room for three quarters. That accounts for 11 to "
        "14 % at larger sizes; at this size the launch adds to it.",
    ),
    Explanation(
        "loops without a graph, and those of diffusers",
        r"(loop|latent|ddpm).*, (graph=False|diffusers.*)",
        -1,
        "The host's time, and this host is slower than the assumed one. Without a graph a U-Net's "
        "step takes 16 to 25 µs for each of its kernels, Python's part included. The prediction "
        "assumed the middle of what others report: 7 µs for a pointwise operation, 25 for the "
        "three kernels of a convolution. Noise adds to the host's time: the update's operator "
        "takes three more tensors, and diffusers draws by another operation.",
    ),
    Explanation(
        "the null model with noise in one graph",
        r"loop, null model, eta 1, graph=loop",
        -1,
        "With noise a step takes 2.8 µs more; the prediction added nothing. It counts instructions "
        "by the rate of issue. 16,384 numbers are too few warps to reach this rate, and each warp "
        "waits for its own results instead.",
    ),
    Explanation(
        "small models in graphs",
        r"loop, (null model|policy head), .*, graph=(True|loop)",
        +1,
        "Small kernels and the launch of a small graph take less than assumed: 2.2 µs for a kernel "
        "in a graph, 4.5 for a product, 10 for the launch from Python, 4.5 between two graphs.",
    ),
    Explanation(
        "under `torch.compile`, longer than predicted",
        r"compiled, .*",
        -1,
        "The call of a compiled function takes longer than assumed, like all of Python's part on "
        "this host.",
    ),
    Explanation(
        "under `torch.compile`, shorter than predicted",
        r"compiled, .*",
        +1,
        "The number of compiled kernels was guessed: one after each product or convolution and two "
        "for a norm. Their least times were too long, as for the small models above.",
    ),
    Explanation(
        "the latent U-Net in graphs",
        r"latent U-Net, graph=(True|loop)",
        -1,
        "Its products and convolutions reach less than the 35 % of the peak that were assumed for "
        "all alike.",
    ),
    Explanation(
        "the latent U-Net",
        r"latent U-Net, .*",
        +1,
        "Its products and convolutions reach more than the 35 % of the peak that were assumed for "
        "all alike.",
    ),
)
"""The first that matches counts."""


class Compared(NamedTuple):
    """A predicted time and the first one that was measured."""

    row: dict[str, Any]
    seconds: float | None

    @property
    def measure(self) -> str:
        return str(self.row["measure"])

    @property
    def error(self) -> float | None:
        """Relative to the measured time; positive where it took less than predicted."""
        return None if self.seconds is None else self.row["seconds"] / self.seconds - 1


def predictions(folder: Path = RESULTS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{PREDICTED}.json").read_text())
    return found


def compared(
    predicted: dict[str, Any], measured: dict[str, Result], folder: Path = RESULTS
) -> list[Compared]:
    """Each prediction with the time of the first run, or of the GPU's result."""
    first = folder / f"{FIRST}.json"
    runs = [read(first)] if first.exists() else []
    runs += [measured[PREDICTED_GPU]] if PREDICTED_GPU in measured else []
    found = {
        measure: row["seconds"]["median"]
        for run in reversed(runs)
        for measure, row in run.measured.items()
    }
    return [Compared(row, found.get(row["measure"])) for row in predicted["rows"]]


def blocks(folder: Path, measured: dict[str, Result]) -> dict[str, str]:
    """Content of the marked places that are about predictions."""
    predicted = predictions(folder)
    pairs = compared(predicted, measured, folder)
    updates = [pair for pair in pairs if "share_of_copy_bandwidth" in pair.row]
    others = [pair for pair in pairs if "share_of_copy_bandwidth" not in pair.row]
    return {
        "gpu-errors": errors_as_markdown(pairs),
        "gpu-explained": explained_as_markdown(pairs),
        "gpu-updates": updates_as_markdown(updates, measured),
        "gpu-loops": loops_as_markdown(others, measured),
        "gpu-assumptions": assumptions_as_markdown(predicted),
        "gpu-counts": counts_as_markdown(predicted),
    }


def median_error(pairs: Iterable[Compared]) -> float | None:
    """Of all that were measured."""
    found = [abs(pair.error) for pair in pairs if pair.error is not None]
    return statistics.median(found) if found else None


def errors_as_markdown(pairs: list[Compared]) -> str:
    """The median error of all, and those of the groups."""
    measured = [pair for pair in pairs if pair.error is not None]
    total = median_error(measured)
    if total is None:
        return "Nothing has been measured yet."
    rows = []
    for name, pattern in GROUPS.items():
        group = [pair for pair in measured if re.fullmatch(pattern, pair.measure)]
        if group:
            rows.append([name, str(len(group)), percent(median_error(group) or 0.0), _range(group)])
    return (
        f"**The median error is {percent(total)}**, over the {len(measured)} of {len(pairs)} "
        "predictions whose measure has run.\n\n"
        + table(["measures", "number", "median error", "errors from, to"], rows)
    )


def _range(pairs: Iterable[Compared]) -> str:
    errors = [pair.error for pair in pairs if pair.error is not None]
    return " to ".join(dict.fromkeys(percent(error, "+") for error in (min(errors), max(errors))))


def explanation_of(pair: Compared) -> Explanation | None:
    """Of an error that is large enough to need one."""
    assert pair.error is not None
    for found in EXPLANATIONS:
        if found.sign * pair.error > 0 and re.fullmatch(found.measures, pair.measure):
            return found
    return None


def far_off(pairs: Iterable[Compared]) -> list[Compared]:
    return [p for p in pairs if p.error is not None and abs(p.error) > WORTH_EXPLAINING]


def explained_as_markdown(pairs: list[Compared]) -> str:
    """The predictions that are off by more than `WORTH_EXPLAINING`, by reason."""
    off = far_off(pairs)
    if not off:
        return "No measured time is further off."
    reasons: dict[Explanation | None, list[Compared]] = {}
    for pair in off:
        reasons.setdefault(explanation_of(pair), []).append(pair)
    rows = [
        [
            f"{reason.title} ({len(group)})" if reason else ", ".join(p.measure for p in group),
            _range(group),
            reason.why if reason else "Not explained yet.",
        ]
        for reason, group in reasons.items()
    ]
    return table(["measures", "errors", "why"], rows)


def updates_as_markdown(pairs: list[Compared], measured: dict[str, Result]) -> str:
    """Predicted and measured times of an update, and its share of the bandwidth of a copy."""

    def predicted_share(row: dict[str, Any]) -> str:
        return f"{row['share_of_copy_bandwidth']:.2f}"

    def now(result: Result, measure: str) -> list[str]:
        share = result.seconds(measure, "share_of_copy_bandwidth")
        return [_time(result.seconds(measure)), "–" if share is None else f"{share:.2f}"]

    columns = [title for gpu in measured for title in (f"now ({gpu})", "of a copy")]
    return _table(pairs, "of a copy", predicted_share, measured, columns, now)


def loops_as_markdown(pairs: list[Compared], measured: dict[str, Result]) -> str:
    """Predicted and measured times of everything else, and the part of each that is largest."""

    def parts(row: dict[str, Any]) -> str:
        return ", ".join(
            f"{name} {duration(seconds, two)}" for name, seconds in row["parts"].items() if seconds
        )

    def now(result: Result, measure: str) -> list[str]:
        return [_time(result.seconds(measure))]

    columns = [f"now ({gpu})" for gpu in measured]
    return _table(pairs, "parts", parts, measured, columns, now)


def _table(
    pairs: list[Compared],
    extra: str,
    extra_of: Callable[[dict[str, Any]], str],
    measured: dict[str, Result],
    columns: list[str],
    now: Callable[[Result, str], list[str]],
) -> str:
    header = ["measure", "predicted", extra, "bound by", "first measured", "error", *columns]
    rows = [
        [
            pair.measure,
            duration(pair.row["seconds"], two),
            extra_of(pair.row),
            pair.row["bound"],
            _time(pair.seconds),
            "–" if pair.error is None else percent(pair.error, "+"),
            *(cell for result in measured.values() for cell in now(result, pair.measure)),
        ]
        for pair in pairs
    ]
    return table(header, rows)


def _time(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else duration(seconds)


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
