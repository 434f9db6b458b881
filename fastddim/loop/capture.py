"""The capture of a part of a loop as a graph, and the conditions for it.

A graph repeats kernels on fixed addresses. So all that may change between two replays is copied
into tensors that stay (`StaticInputs`, and the loop's own `Buffers`), and all that decides which
kernels run is part of a key (`ModelState`, `torch_settings`, `ModelArguments.key`). A replay finds
everything else as it was at capture.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from fastddim import transfer
from fastddim.loop import cuda
from fastddim.loop.cuda import CaptureError
from fastddim.validation import check_choice

GRAPH_MODES = ("auto", True, False, "loop")

Value = TypeVar("Value")


class Graph(Protocol):
    @property
    def nodes(self) -> int | None:
        """The number of kernels, copies and fills that it launches; None where it is unknown."""

    @property
    def replay(self) -> Callable[[], None]: ...


def check_graph(graph: Any, device: torch.device, check_finite: bool) -> None:
    check_choice("graph", graph, GRAPH_MODES)
    check_outer_capture(graph, device, check_finite)
    if graph in ("auto", False):
        return
    if not cuda.available(device):
        raise ValueError(
            f"graph: expected 'auto' or False on {device}, which captures no graphs, got {graph!r}"
        )
    if check_finite:
        raise ValueError(
            "graph: expected 'auto' or False with check_finite=True, which waits for the device at "
            f"every step, got {graph!r}"
        )


def check_outer_capture(graph: bool | str, device: torch.device, check_finite: bool) -> None:
    """Refuse options that cannot go into a graph that the caller is capturing."""
    if (graph in ("auto", False) and not check_finite) or not transfer.captured(device):
        return
    if graph not in ("auto", False):
        raise ValueError(
            "graph: expected 'auto' or False while a CUDA graph is being captured, which cannot "
            f"hold the capture of another, got {graph!r}"
        )
    if check_finite:
        raise ValueError(
            "check_finite: expected False while a CUDA graph is being captured, since it waits for "
            "the device at every step, got True"
        )


_capturing = threading.RLock()


def capture(
    body: Callable[[], None],
    *,
    warm_up: Callable[[], None],
    device: torch.device,
    generators: Sequence[torch.Generator] = (),
) -> Graph:
    """The kernels that `body` launches, as a graph with memory of its own.

    Args:
        body: called once, while its kernels are recorded and do not run.
        warm_up: called and run before; its errors are the caller's.
        device: the device of the kernels.
        generators: those on the device that `body` draws from; a replay advances them as `body`
            itself would.

    The capture leaves the states of these generators and of torch's own unchanged.

    Raises:
        CaptureError: `body` does what a graph cannot hold.
    """
    # A graph would read casts that autocast kept from before, in memory that autocast frees.
    with _capturing, _random_states_kept(device, generators), _uncached_autocast():
        return cuda.record(body, warm_up, device, generators)


def capture_if_possible(mode: bool | str, capture: Callable[[], Value]) -> Value | None:
    """The result of `capture`, or None with a warning where it fails and `mode` is "auto".

    Raises:
        ValueError: it fails and the caller asked for a graph.
    """
    try:
        return capture()
    except CaptureError as error:
        if mode != "auto":
            raise ValueError(
                f"graph: expected 'auto' or False where capture fails ({error}), got {mode!r}"
            ) from error
        warnings.warn(f"fastddim: graph='auto' runs without a CUDA graph: {error}", stacklevel=2)
        return None


@contextmanager
def _random_states_kept(
    device: torch.device, generators: Sequence[torch.Generator]
) -> Iterator[None]:
    states = [generator.get_state() for generator in generators]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def draws_inside(generators: Sequence[torch.Generator], device: torch.device) -> bool:
    """True where a graph on `device` can hold the draws of these generators."""
    return device.type == "cuda" and all(g.device == device for g in generators)


def torch_settings(device: torch.device) -> Hashable:
    """The settings of torch that decide which kernels an operation runs."""
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
    )
