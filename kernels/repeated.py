"""Launches of a kernel with arguments like those of its last launch.

A launch of Triton's binds its arguments, reads from each the properties that kernels are
specialised for, and looks up the kernel that was compiled for them. Where only addresses differ,
and not their alignment, these properties are the same, and a launch calls the kernel found before.

This file alone uses what Triton does not document, which is the same in Triton 3.6 to 3.8. With
other versions, and where a name is missing, every launch is Triton's own.
"""

from __future__ import annotations

from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

VERSIONS = ("3.6.", "3.7.", "3.8.")
"""Versions whose compiled kernels are called as `Held` does."""


class Repeated:
    """Launches of one kernel, on one device, with arguments that are alike: tensors of the same
    dtypes whose addresses have the same alignment, and equal numbers.
    """

    def __init__(self, function: Any, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        """
        Args:
            function: a function of `triton.jit`.
            grid: the programs of a launch.
            constants: the arguments that every launch has, and options of the compiler.
        """
        self._function = function
        self._grid = grid
        self._constants = constants
        self._held: Held | None = None
        self._settings: object = None

    def __call__(self, **tensors: Any) -> None:
        """Launch with these arguments and the constants on the current stream of the device, which
        is the current one.
        """
        settings, held = _settings(), self._held
        if held is None or settings != self._settings or self._function.pre_run_hooks:
            compiled = self._function[self._grid](**tensors, **self._constants)
            self._held = _hold(self._function, compiled, self._grid, self._constants)
            self._settings = settings
        else:
            held(tensors)


class Held:
    """A compiled kernel, its grid and the arguments that stay."""

    def __init__(
        self, function: Any, compiled: Any, grid: tuple[int, ...], constants: dict[str, Any]
    ) -> None:
        """
        Raises:
            AttributeError: this version of Triton has other names.
        """
        self._arguments = [constants.get(name) for name in function.arg_names]
        self._positions = {name: position for position, name in enumerate(function.arg_names)}
        self._grid = (*grid, 1, 1)[:3]
        self._metadata = compiled.launch_metadata
        self._run = compiled.run
        self._kernel = (compiled.function, compiled.packed_metadata)
        self._device, self._stream = (
            driver.active.get_current_device,
            driver.active.get_current_stream,
        )

    def __call__(self, changing: dict[str, Any]) -> None:
        """Launch with these arguments among those that stay."""
        arguments = self._arguments.copy()
        for name, argument in changing.items():
            arguments[self._positions[name]] = argument
        stream = self._stream(self._device())
        begin, end = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if _is_idle(begin) and _is_idle(end):
            hooks = (None, None, None)
        else:
            hooks = (self._metadata(self._grid, stream, *arguments), begin, end)
        self._run(*self._grid, stream, *self._kernel, *hooks, *arguments)


def _hold(
    function: Any, compiled: Any, grid: tuple[int, ...], constants: dict[str, Any]
) -> Held | None:
    """The launched kernel with its arguments; None where only Triton can call it."""
    if not triton.__version__.startswith(VERSIONS):
        return None
    try:
        return Held(function, compiled, grid, constants)
    except AttributeError:
        return None


def _is_idle(hook: Any) -> bool:
    """True if a launch need not call this hook of profilers."""
    return hook is None or getattr(hook, "calls", None) == []


def _settings() -> tuple[Any, ...]:
    """The settings that make Triton compile the same source anew."""
    return (
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
        knobs.runtime.add_stages_inspection_hook,
    )
