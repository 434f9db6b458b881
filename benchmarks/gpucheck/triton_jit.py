"""Triton's just-in-time functions compiled without a GPU, for any target and as in a launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from fastddim.kernels import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastddim import ops


def backend(module: Any) -> SimpleNamespace:
    """The launchers of `module` and its sibling modules, as functions of a backend."""
    fit_rows = sibling(module, "launch_rescaling").fit_rows

    def rescale_rows(*operands: Any) -> None:
        *given, rescaling, out = operands
        fit_rows(*given, *rescaling, out)

    return SimpleNamespace(
        update_out=ops.update_out_through(module.update_out),
        normal_out=module.normal_out,
        advance=module.advance,
        backward_out=sibling(module, "launch_backward").backward_out,
        rescale_rows=rescale_rows,
    )


def sibling(module: Any, name: str) -> Any:
    """Another module of the package that `module` is in."""
    return importlib.import_module(f"{module.__package__}.{name}")


LAUNCHERS = backend(launch)

KERNELS = {
    "launch": ("update_kernel", "normal_kernel", "advance_kernel"),
    "launch_backward": ("backward_kernel",),
    "launch_rescaling": ("rescaling_kernel",),
}
"""The kernels that each module of `fastddim.kernels` launches."""
SM_90 = GPUTarget("cuda", 90, 32)
CUDA_TARGETS = tuple(GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120))
HIP_TARGETS = (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32))


@dataclass
class Binary:
    kernel: Any
    """The `triton.compiler.CompiledKernel`."""
    signature: dict[str, Any]
    arguments: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.metadata.name)

    @property
    def threads(self) -> int:
        return int(self.kernel.metadata.num_warps * self.kernel.metadata.target.warp_size)

    def parameters(self) -> list[tuple[str, str, Any]]:
        """(name, type, value) of each argument of the launch, without constants or tuples."""
        return [
            leaf
            for name, kind in self.signature.items()
            for leaf in _leaves(name, kind, self.arguments[name])
        ]


def _leaves(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    if isinstance(kind, tuple):
        names = getattr(value, "_fields", [name] * len(kind))
        for inner_name, inner_kind, inner in zip(names, kind, value, strict=True):
            # The address of a view has the name of the view.
            yield from _leaves(name if inner_name == "data" else inner_name, inner_kind, inner)
    elif kind != "constexpr":
        yield name, kind, value


@dataclass
class Compiler:
    """Takes the place of a JITFunction: `[grid](...)` compiles for `target`, and calls `then`."""

    function: JITFunction
    target: GPUTarget
    then: Callable[[Any], None]

    def __post_init__(self) -> None:
        self._backend = make_backend(self.target)
        self._bind = create_function_from_signature(
            self.function.signature, self.function.params, self._backend
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            # This is JITFunction.run up to its launch, for a given target.
            kwargs |= {"debug": False, "instrumentation_mode": ""}
            bound, specialization, options = self._bind(*args, **kwargs)
            options, signature, constants, attributes = self.function._pack_args(
                self._backend, kwargs, bound, specialization, options
            )
            source = ASTSource(self.function, signature, constants, attributes)
            kernel = triton.compile(source, target=self.target, options=options.__dict__)
            self.then(Binary(kernel, signature, bound, grid))

        return launch


class Specializer(Compiler):
    """Takes the place of a JITFunction: `[grid](...)` tells which of its kernels it would launch.

    Triton compiles each of them when it is first launched.
    """

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            kwargs |= {"debug": False, "instrumentation_mode": ""}
            _, specialization, options = self._bind(*args, **kwargs)
            self.then((self.function.fn.__name__, repr(specialization), repr(options)))

        return launch


@contextmanager
def compiled_for(
    target: GPUTarget,
    then: Callable[[Any], None],
    module: Any = launch,
    stand_in: type[Compiler] = Compiler,
) -> Iterator[None]:
    """Compile launches from `fastddim.kernels`, or from the copy that contains `module`, for
    `target`, and hand the results to `then`.
    """
    launching = {sibling(module, name): kernels for name, kernels in KERNELS.items()}
    hip = "7.0" if target.backend == "hip" else None
    properties = SimpleNamespace(warp_size=target.warp_size)
    _forget_launches(module)
    try:
        with (
            ExitStack() as stack,
            mock.patch.object(torch.version, "hip", hip),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        ):
            for launcher, names in launching.items():
                for name in names:
                    kernel = stand_in(getattr(launcher, name), target, then)
                    stack.enter_context(mock.patch.object(launcher, name, kernel))
            yield
    finally:
        _forget_launches(module)


def _forget_launches(module: Any) -> None:
    for found in (
        *(module._found_update, module._prepare_normal, module._found_advance),
        *(sibling(module, name)._prepare for name in ("launch_backward", "launch_rescaling")),
    ):
        found.cache_clear()
