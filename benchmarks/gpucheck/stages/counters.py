"""Hardware counters of one large update each, read by Nsight Compute.

As a script, it is the program that Nsight Compute watches.
"""

from __future__ import annotations

import csv
import shutil
import sys

import torch

from gpucheck.commands import output
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.update import PlainUpdate

DTYPES = (torch.float32, torch.bfloat16)
MEBIBYTES = 256
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


def run(record: Record, settings: Settings) -> None:
    tool = shutil.which("ncu")
    if tool is None and not settings.dry:
        record.lacks("Nsight Compute (ncu)")
        return
    words = [sys.executable, "-m", __name__, str(settings.device), *settings.implementations]
    if not settings.dry:
        words = [
            *(str(tool), "--clock-control", "none", "--csv", "-k", "regex:update"),
            *("--metrics", ",".join(METRICS), *words),
        ]
    text = output(*words, limit=settings.seconds * 0.95)
    (settings.out / "ncu.csv").write_text(text)
    counted = parse(text)
    for row in counted:
        record.show(**row)
    if not counted and settings.dry:
        record.show(launched=text)
    elif not counted:
        record.lacks(f"counters that ncu could read: {text[-600:]}")


def parse(text: str) -> list[dict[str, object]]:
    """Kernel and metrics of each launch, from `ncu --csv`, which prints other lines too."""
    table = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, object]] = {}
    for cell in csv.DictReader(table):
        launch = launches.setdefault(cell["ID"], {"kernel": cell["Kernel Name"][:80]})
        unit = cell["Metric Unit"]
        launch[cell["Metric Name"]] = f"{cell['Metric Value']} {unit}".strip()
    return list(launches.values())


def main() -> None:
    device, *implementations = sys.argv[1:]
    mebibytes = 1 if device == "cpu" else MEBIBYTES
    for implementation in implementations:
        for dtype in DTYPES:
            for eta in (0.0, 1.0):
                PlainUpdate(implementation, dtype, eta, mebibytes, torch.device(device))()
                print(f"{implementation} {dtype} eta {eta:g}", flush=True)


if __name__ == "__main__":
    main()
