"""Values that are kept between calls, made outside every mode of the caller.

A tensor belongs to the mode that it is made in. One made in inference mode can have no gradients,
one made in a fake mode has no values, and one made under a transform of `torch.func` has a level
that ends. A later call may be in another mode.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastddim import transfer
from fastddim.cache import Cache

Made = TypeVar("Made")


def ordinary(make: Callable[[], Made]) -> Made:
    """Call `make` in no mode of the caller, except that of gradients, and return the result.

    Modes belong to a thread. Where one of them would change new tensors, `make` runs in a thread of
    its own, which takes 0.2 ms.

    Args:
        make: names the device of every tensor that it makes from numbers. It waits for a device
            other than the CPU, since its thread may have another stream.
    """
    return make() if _is_ordinary(torch.empty(0, device="cpu")) else elsewhere(make)


def elsewhere(make: Callable[[], Made]) -> Made:
    """Call `make` in a thread of its own, without modes and tracers, and return the result."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def keep(
    cache: Cache[Any],
    key: Hashable,
    make: Callable[[], Made],
    *,
    device: torch.device | None = None,
    sources: tuple[object, ...] = (),
) -> Made:
    """Make an ordinary value without gradients and put it into a cache.

    A value made on a device whose work goes into a graph under capture is not put there: its
    tensors have values only after a replay.

    Args:
        device: that of the value, if not the CPU.
        sources: as in `Cache.put`.
    """

    @torch.no_grad()
    def made() -> Made:
        value = make()
        if device is not None:
            transfer.wait(device)
        return value

    if device is not None and transfer.captured(device):
        return make()
    value = ordinary(made)
    cache.put(key, value, sources)
    return value


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and not tensor.is_inference()
        and torch.func.debug_unwrap(tensor) is tensor
    )
