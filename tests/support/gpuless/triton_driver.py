"""A stand-in for Triton's driver: launches of Triton's own runtime, executed on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fastddim.kernels.update import advance_kernel, normal_kernel, update_kernel
from gpucheck import triton_jit
from triton.compiler.compiler import max_shared_mem
from triton.runtime.driver import driver as config
from triton.runtime.jit import JITFunction


@dataclass
class Driver:
    """Hands every launch to `then`, in place of a GPU.

    Attributes:
        then: called with what is launched, arguments as Triton's launcher in C gets them.
        device: the current device.
        stream: its current stream.
        streams: that of each launch.
    """

    then: Callable[[triton_jit.Binary], None]
    device: int = 0
    stream: int = 7
    streams: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 2**17},
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        assert device == self.device
        return self.stream

    def get_current_target(self) -> Any:
        return triton_jit.SM_90

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launcher of one kernel."""

        def launch(*given: Any) -> None:
            grid, (stream, _, _, launched, begin, end), arguments = given[:3], given[3:9], given[9:]
            self.streams.append(stream)
            if begin is not None:
                begin(launched)
            named = dict(zip(source.fn.arg_names, arguments, strict=True))
            compiled = kernel_of(source, self.device)
            self.then(triton_jit.Binary(compiled, source.signature, named, grid))
            if end is not None:
                end(launched)

        return launch


def kernel_of(source: Any, device: int) -> Any:
    """The compiled kernel of a source."""
    kernels = source.fn.device_caches[device][0].values()
    return next(kernel for kernel in kernels if kernel.src is source)


@contextmanager
def driven(driver: Driver) -> Iterator[list[str]]:
    """Launches of `fastddim.kernels` go to `driver`; yields the names of kernels that Triton's own
    launch was called for, as they come.
    """
    own: list[str] = []
    run = JITFunction.run

    def recorded(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        own.append(function.__name__)
        return run(function, *args, **kwargs)

    with (
        mock.patch.object(config, "_active", driver),
        mock.patch.object(JITFunction, "run", recorded),
    ):
        try:
            _forget()
            yield own
        finally:
            _forget()


def _forget() -> None:
    """Forget launches, and what a driver's device was asked for."""
    triton_jit._forget_launches(triton_jit.launch)
    max_shared_mem.cache_clear()
    for function in (update_kernel, normal_kernel, advance_kernel):
        function.device_caches.clear()
