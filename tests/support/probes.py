"""Dispatch modes that watch or disturb what torch computes, and the number of its threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NoSync(TorchDispatchMode):
    """Fails where work would wait for the device, or leave it.

    Reading a value on the host, data-dependent shapes, a tensor made from host numbers, and a copy
    to another device.
    """

    _FORBIDDEN = frozenset(
        {
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.item,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.masked_select,
            torch.ops.aten._unique2,
            torch.ops.aten.unique_dim,
            torch.ops.aten.repeat_interleave,
            torch.ops.aten.lift_fresh,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls += 1
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        if func.overloadpacket in self._FORBIDDEN:
            raise AssertionError(f"host synchronisation in the loop: {func}")
        if func.overloadpacket is torch.ops.aten.index and any(
            v.dtype in (torch.bool, torch.uint8) for v in tensors[1:]
        ):
            raise AssertionError(f"host synchronisation in the loop: {func} by a mask")
        if len({v.device for v in tensors}) > 1:
            raise AssertionError(f"copy between devices in the loop: {func}")
        device = kwargs.get("device")
        if device is not None and any(v.device.type != torch.device(device).type for v in tensors):
            raise AssertionError(f"copy between devices in the loop: {func} to {device}")
        return func(*args, **kwargs)


class LiveStorage(TorchDispatchMode):
    """Counts the most bytes alive at once among the storages made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


class OtherProcessor(TorchDispatchMode):
    """A CPU on which torch's vector library rounds the last bit of a root, power, exponential,
    logarithm, sine or cosine differently.

    Intel's and AMD's are such, of which a test machine is only one. Some differ in long vectors and
    not in short ones.
    """

    FUNCTIONS = frozenset({"sqrt", "rsqrt", "pow", "exp", "log", "sin", "cos"})

    def __init__(self, shortest: int = 2) -> None:
        """
        Args:
            shortest: the number of elements from which it differs.
        """
        super().__init__()
        self.shortest = shortest
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        # Squares are products, which every processor rounds correctly.
        exact = name not in self.FUNCTIONS or (name == "pow" and args[1] not in (0.5, -0.5))
        if exact or result.numel() < self.shortest:
            return result
        self.calls += 1
        bits = result.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[result.element_size()])
        kept = (result == 0) | (result == 1) | ~result.isfinite()
        return result.copy_(torch.where(kept, bits, bits ^ 1).view(result.dtype))
