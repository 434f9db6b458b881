"""Counts of the operations that a model or a loop runs, and what they would cost on an H100.

Operations are counted on the CPU, or without memory for a large model: torch's dispatcher sees
there what it sees on a GPU. An operation is one kernel, or the few that its CUDA backend takes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .assumptions import assumed


class Kind(NamedTuple):
    """Cost of an operation, as names of assumptions."""

    host: str
    kernels: tuple[str, ...]
    """The least time of each of its kernels."""
    passes: int = 0
    """Over its result, by the kernels besides the main one."""


SMALL = "small_kernel"
KINDS = {
    "view": Kind("host_view", ()),
    "scalar": Kind("host_scalar", ()),
    "wait": Kind("host_wait", ()),
    "pointwise": Kind("host_pointwise", (SMALL,)),
    "product": Kind("host_product", ("small_product",)),
    "attention": Kind("host_attention", ("small_attention",)),
    # Moments, then what each channel is multiplied with, then the values.
    "norm": Kind("host_norm", (SMALL, SMALL, SMALL), passes=1),
    # cuDNN's own layout, the convolution, torch's addition of the bias.
    "convolution": Kind("host_convolution", (SMALL, "small_convolution", SMALL), passes=4),
}
NAMES = {
    "_local_scalar_dense": "wait",
    "native_group_norm": "norm",
    "convolution": "convolution",
    **dict.fromkeys(("addmm", "mm", "bmm", "baddbmm"), "product"),
}
# The attention of CPUs has none in torch.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ]
}


class Tally(NamedTuple):
    """Counts and times of the operations of one call."""

    operations: dict[str, int]
    """By kind."""
    kernels: int
    flops: int
    host: float
    """Seconds in which the host has asked for all of them."""
    device: dict[str, float]
    """Seconds of all kernels in a row, by what each operation is bound by."""

    @property
    def device_seconds(self) -> float:
        return sum(self.device.values())


@dataclass
class Operations(TorchDispatchMode):
    """Sees every operation that runs inside."""

    kinds: Counter[str] = field(default_factory=Counter)
    device: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = _kind(func, (args, kwargs), result)
        if kind is not None:
            self.kinds[kind] += 1
            flops = _flops(func, args, kwargs, result)
            self.flops += flops
            bound, seconds = _device_seconds(KINDS[kind], flops, (args, kwargs), result)
            self.device[bound] += seconds
        return result

    def tally(self, calls: int = 1) -> Tally:
        """Counts and times of one of several equal calls."""
        kinds = {kind: round(n / calls) for kind, n in sorted(self.kinds.items())}
        return Tally(
            operations=kinds,
            kernels=sum(n * len(KINDS[kind].kernels) for kind, n in kinds.items()),
            flops=self.flops // calls,
            host=sum(n * assumed(KINDS[kind].host) for kind, n in kinds.items()),
            device={bound: seconds / calls for bound, seconds in sorted(self.device.items())},
        )


def counted(run: Callable[[], Any], calls: int = 1) -> Tally:
    operations = Operations()
    with torch.no_grad(), operations:
        run()
    return operations.tally(calls)


def _tensors(*values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _kind(func: Any, inputs: Any, result: Any) -> str | None:
    """The kind of an operation; None where it only asks something of a tensor."""
    name = func._overloadpacket.__name__
    if name in NAMES:
        return NAMES[name]
    if "scaled_dot_product" in name:
        return "attention"
    results = list(_tensors(result))
    if not results:
        return None
    known = {tensor.untyped_storage()._cdata for tensor in _tensors(inputs)}
    if not func._schema.is_mutable and results[0].untyped_storage()._cdata in known:
        return "view"
    # The schedule's numbers are on the CPU in diffusers; timesteps, which are integers, are not.
    if all(not t.ndim and t.is_floating_point() for t in _tensors(inputs, result)):
        return "scalar"
    return "pointwise"


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = func._overloadpacket
    formula = FORMULAS.get(packet, flop_registry.get(packet))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _device_seconds(kind: Kind, flops: int, inputs: Any, result: Any) -> tuple[str, float]:
    """The bound of an operation on the device, and its time."""
    results = list(_tensors(result))
    if not kind.kernels or not results:
        return "launches", 0.0
    moved = sum(t.nbytes for t in _tensors(inputs, result)) + kind.passes * results[0].nbytes
    half = results[0].dtype in (torch.float16, torch.bfloat16)
    rate = assumed("tensor_float16" if half else "vector_float32") * assumed("arithmetic_share")
    parts = {
        "launches": sum(map(assumed, kind.kernels)),
        "bytes": moved / assumed("copy_bandwidth"),
        "arithmetic": flops / rate,
    }
    bound = max(parts, key=lambda part: parts[part])
    return bound, parts[bound]
