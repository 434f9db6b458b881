"""One update against the bandwidth of a copy from device memory to device memory."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.timing import device_seconds, spread
from gpucheck.update import PlainUpdate

MEBIBYTES = (256, 1024, 64, 16, 1)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 25
# The eager reference is for comparison, and slow.
REFERENCE_ROUNDS = 5
REFERENCE_MOST = 64


@torch.no_grad()
def run(record: Record, settings: Settings) -> None:
    for mebibytes in (1,) if settings.dry else MEBIBYTES:
        for dtype in DTYPES:
            for eta in (0.0, 1.0):
                for implementation in implementations(settings, dtype, mebibytes):
                    about = {"impl": implementation, "eta": eta, "mib": mebibytes}
                    measure = partial(
                        one_update, record, settings, implementation, dtype, eta, mebibytes
                    )
                    record.attempt(measure, dtype=str(dtype), **about)


def implementations(settings: Settings, dtype: torch.dtype, mebibytes: int) -> tuple[str, ...]:
    with_reference = dtype == torch.float32 and mebibytes <= REFERENCE_MOST
    return (*settings.implementations, *(("reference",) if with_reference else ()))


def one_update(
    record: Record,
    settings: Settings,
    implementation: str,
    dtype: torch.dtype,
    eta: float,
    mebibytes: int,
) -> None:
    """Time one update and, beside it, a copy of the state."""
    update = PlainUpdate(implementation, dtype, eta, mebibytes, settings.device)
    name = f"{implementation}, {update.dtype_name}, eta {eta:g}, {mebibytes} MiB"
    wrong = 0 if implementation == "reference" else update.wrong()
    if wrong:
        record.problem(case=name, wrong=wrong)
    rounds = REFERENCE_ROUNDS if implementation == "reference" else ROUNDS
    ours = device_seconds(update, settings.device, rounds)
    copy = device_seconds(update.copy, settings.device, rounds)
    copied = 2 * update.x.nbytes / statistics.median(copy)
    share = spread([3 * update.x.nbytes / seconds / copied for seconds in ours])
    record.row(
        measure=f"update, {name}",
        seconds=spread(ours),
        copy_seconds=spread(copy),
        copy_bytes_per_second=copied,
        share_of_copy_bandwidth=share,
    )
    record.show(
        case=name,
        microseconds=round(statistics.median(ours) * 1e6, 2),
        share_of_copy=round(share["median"], 3),
    )
