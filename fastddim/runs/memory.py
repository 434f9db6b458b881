"""The number of samples that fit into memory at a time, measured on the model."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LARGEST = 1024
"""Upper limit of a batch size chosen here: a killed run loses the batches that it was drawing."""

# Other programs need a part of the free memory, and allocators cannot use all of it.
_SHARE = {"cpu": 0.5, "cuda": 0.8}

_CGROUP = Path("/sys/fs/cgroup")


def default_budget(device: torch.device) -> int:
    """Bytes that one process may use on `device`: its share of a part of the free memory."""
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        processes = -(-processes // torch.cuda.device_count())
    else:
        free = _free_on_host()
    return int(free * _SHARE.get(device.type, 0.5)) // processes


def fitting_batch(
    draw: Callable[[int], object], budget: int, device: torch.device, largest: int = LARGEST
) -> int:
    """A power of two of samples, at most `largest`, that takes at most `budget` bytes.

    Twice the samples take at most twice the memory. So the batch is doubled as long as that fits,
    and no trial takes more than `budget` either.

    Args:
        draw: runs the loop for the given number of samples.
        budget: bytes for everything that `draw` holds at once, including the model's activations
            but not its weights.

    Raises:
        ValueError: one sample does not fit.
    """
    size, peak = 1, peak_bytes(lambda: draw(1), device)
    if peak > budget:
        raise ValueError(
            f"memory: expected at least {peak} bytes for one sample besides the model, got {budget}"
        )
    while 2 * peak <= budget and 2 * size <= largest:
        size *= 2
        peak = max(peak, peak_bytes(functools.partial(draw, size), device))
    return size


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The largest number of bytes that the tensors made by `run` on `device` take at one time."""
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_on_host(run)


def _peak_on_host(run: Callable[[], object]) -> int:
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Storages(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
            self.peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            given = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if _counts(v)}
            result = func(*args, **(kwargs or {}))
            for value in tree_leaves(result):
                if _counts(value) and value.untyped_storage()._cdata not in given:
                    storage = value.untyped_storage()
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
            return result

    storages = Storages()
    with storages:
        run()
    return storages.peak


def _counts(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _free_on_host() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no limit, or no cgroup of version 2
        return free
    return max(0, min(free, limit - used))
