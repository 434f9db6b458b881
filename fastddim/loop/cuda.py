"""CUDA graphs as PyTorch records them, and all the private names of PyTorch that this needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastddim.loop import driver

# The first call compiles and chooses kernels; the second finds them chosen.
WARM_UPS = 2


class CaptureError(Exception):
    """A failed capture; the message is the reason alone."""


def available(device: torch.device) -> bool:
    return device.type == "cuda"


class CapturedGraph:
    """A graph that was captured.

    Attributes:
        replay: launches it.
        nodes: the number of its nodes; None where it is unknown.
    """

    __slots__ = ("nodes", "replay")

    def __init__(self, graph: torch.cuda.CUDAGraph, nodes: int | None) -> None:
        self.replay, self.nodes = graph.replay, nodes


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def record(
    body: Callable[[], None],
    warm_up: Callable[[], None],
    device: torch.device,
    generators: Sequence[torch.Generator],
) -> CapturedGraph:
    """Capture on CUDA; random states and autocast are left to `fastddim.loop.capture`."""
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream()
        side = _side_streams[device]
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    warm_up()
                # The graph's own pool needs the memory that the warm-up leaves cached.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                with _workspaces_of_its_own():
                    return _captured(body, device, generators)
        finally:
            current.wait_stream(side)


def _captured(
    body: Callable[[], None], device: torch.device, generators: Sequence[torch.Generator]
) -> CapturedGraph:
    pool = torch.cuda.graph_pool_handle()
    graph = _begun(pool, generators)
    try:
        try:
            body()
        except BaseException:
            # An error of the end would only say that the body failed.
            with suppress(RuntimeError):
                _end(graph, device, pool, generators)
            raise
        nodes = driver.captured_nodes(stream_handle(device))
        _end(graph, device, pool, generators)
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}") from error
    return CapturedGraph(graph, nodes)


def _begun(pool: Any, generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Later releases of torch register generators by themselves.
    if hasattr(graph, "register_generator_state"):
        for generator in generators:
            graph.register_generator_state(generator)
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    return graph


def _end(
    graph: torch.cuda.CUDAGraph,
    device: torch.device,
    pool: Any,
    generators: Sequence[torch.Generator],
) -> None:
    """End the capture, and do what `capture_end` leaves undone where it fails.

    The allocator would go on with the pool, and before torch 2.13 the generators would stay in the
    state of a capture until a later one ends well (aten/src/ATen/cuda/CUDAGraph.cpp).
    """
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        trivial = _begun(torch.cuda.graph_pool_handle(), generators)
        torch.zeros(1, device=device)
        trivial.capture_end()
        raise


@contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """A capture with cuBLAS workspaces of its own.

    cuBLAS keeps a workspace for each stream. Graphs captured on one stream would share it, and
    could not be replayed on two streams at a time.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def stream_handle(device: torch.device) -> int:
    """The current stream as CUDA knows it, in a tenth of the time that torch's object takes."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle
