"""The order in which CUDA streams use the same buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from fastddim import transfer
from fastddim.loop import cuda
from fastddim.loop.modes import NOTHING


class StreamOrder:
    """The order of uses of the same buffers, one after the other across CUDA streams.

    While the caller captures a graph, nothing is ordered: a graph cannot wait for work outside it,
    and no work outside can wait for a part of it. The caller orders the replays.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_streams = device.type == "cuda"
        if self._has_streams:
            self._stream = torch.cuda.current_stream(device)
            # Waiting for an event that was never recorded returns at once.
            self._done = torch.cuda.Event()
            if not transfer.captured(device):
                self._done.record(self._stream)

    def use(self, buffers: Callable[[], Iterable[Tensor]]) -> AbstractContextManager[None]:
        """A use of the buffers, which begins when the one before is over."""
        if not self._has_streams or transfer.captured(self._device):
            return NOTHING
        return self._in_order(buffers)

    @contextmanager
    def _in_order(self, buffers: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        if cuda.stream_handle(self._device) != self._stream.cuda_stream:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._done)
            # Otherwise memory freed after this use could be given away before the use is over.
            for buffer in buffers():
                buffer.record_stream(stream)
            self._stream = stream
        try:
            yield
        finally:
            self._done.record(self._stream)
