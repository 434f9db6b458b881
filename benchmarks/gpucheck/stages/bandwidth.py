"""One update against the bandwidth of a copy from device memory to device memory."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from gpucheck import measures
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.timing import device_seconds, spread
from gpucheck.update import PlainUpdate

ROUNDS = 25
# The eager reference is slow, and only serves for comparison.
REFERENCE_ROUNDS = 5
REFERENCE_MOST = 64


@torch.no_grad()
def run(record: Record, settings: Settings) -> None:
    for mebibytes in (1,) if settings.dry else measures.MEBIBYTES:
        for dtype in measures.DTYPES:
            for eta in measures.UPDATE_ETAS:
                for implementation in implementations(settings, dtype, mebibytes):
                    about = {"impl": implementation, "eta": eta, "mib": mebibytes}
                    measure = partial(
                        one_update, record, settings, implementation, dtype, eta, mebibytes
                    )
                    record.attempt(measure, dtype=dtype, **about)


def implementations(settings: Settings, dtype: str, mebibytes: int) -> tuple[str, ...]:
    with_reference = dtype == "float32" and mebibytes <= REFERENCE_MOST
    return (*settings.implementations, *(("reference",) if with_reference else ()))


def one_update(
    record: Record,
    settings: Settings,
    implementation: str,
    dtype: str,
    eta: float,
    mebibytes: int,
) -> None:
    """Time one update and, alternately, a copy of the state."""
    update = PlainUpdate(implementation, getattr(torch, dtype), eta, mebibytes, settings.device)
    measure = measures.update(implementation, dtype, eta, mebibytes)
    wrong = 0 if implementation == "reference" else update.wrong()
    if wrong:
        record.problem(measure_of=measure, wrong=wrong)
    rounds = REFERENCE_ROUNDS if implementation == "reference" else ROUNDS
    ours = device_seconds(update, settings.device, rounds)
    copy = device_seconds(update.copy, settings.device, rounds)
    copied = 2 * update.x.nbytes / statistics.median(copy)
    share = spread([3 * update.x.nbytes / seconds / copied for seconds in ours])
    record.row(
        measure=measure,
        seconds=spread(ours),
        copy_seconds=spread(copy),
        copy_bytes_per_second=copied,
        share_of_copy_bandwidth=share,
    )
    record.show(
        measure_of=measure,
        microseconds=round(statistics.median(ours) * 1e6, 2),
        share_of_copy=round(share["median"], 3),
    )
