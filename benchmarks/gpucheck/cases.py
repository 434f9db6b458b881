"""A few updates that together use every operand, and their comparison with the CPU kernel.

As a script, it is what compute-sanitizer watches: `python -m gpucheck.cases DEVICE IMPL …`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastddim
from fastddim import backends, philox
from fastddim.plan import Update, coefficient_row, stack_row
from gpucheck.device import on_device

OUTPUTS = ("out", "x_0", "model_input", "epsilon")
WRONG = 3
"""The exit code of the script if a result differs."""


@dataclass(frozen=True)
class Case:
    """One update. `misaligned` shifts every tensor by one element from an aligned address."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    model_dtype: torch.dtype | None = None
    noise: bool = False
    guided: bool = False
    mask: bool = False
    history: bool = False
    x_0: bool = False
    clip: float | None = None
    misaligned: bool = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of `update_out` on the CPU; outputs hold NaN.

        Every tensor has its own storage, which ends where the tensor ends, so a tool that watches
        allocations sees an access beyond it.
        """
        generator = torch.Generator().manual_seed(3)
        model_dtype = self.model_dtype or self.dtype
        batch = self.shape[0]
        model_shape = ((2 if self.guided else 1) * batch, *self.shape[1:])

        def filled(values: Tensor, dtype: torch.dtype) -> Tensor:
            offset = int(self.misaligned)
            flat = torch.empty(values.numel() + offset, dtype=dtype)[offset:]
            return flat.view(values.shape).copy_(values)

        def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return filled(torch.randn(shape, generator=generator), dtype)

        def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return filled(torch.full(shape, float("nan")), dtype)

        extra_input = self.guided or model_dtype != self.dtype
        return {
            "x": drawn(self.shape, self.dtype),
            "model_output": drawn(model_shape, model_dtype),
            "table": self._table(),
            "row": torch.zeros(1, dtype=torch.int64),
            "noise": None,
            "keys": self._keys(),
            "history": drawn(self.shape, model_dtype) if self.history else None,
            "mask": drawn(self.shape, self.dtype).sigmoid_() if self.mask else None,
            "known": drawn(self.shape, self.dtype) if self.mask else None,
            "out": poisoned(self.shape, self.dtype),
            "x_0": poisoned(self.shape, self.dtype) if self.x_0 else None,
            "model_input": poisoned(model_shape, model_dtype) if extra_input else None,
            "epsilon": poisoned(self.shape, model_dtype) if self.history else None,
        }

    def _table(self) -> Tensor:
        guidance = 3.0 if self.guided else None
        update = Update(eta=float(self.noise), clip=self.clip, guidance_scale=guidance)
        row = coefficient_row(0.4, 0.5, update)
        # Update alone would leave the coefficient of the history at 0.
        row = row._replace(ph=0.3 if self.history else 0.0)
        table = stack_row(row)[None]
        return table if self.dtype == torch.float64 else table.float()

    def _keys(self) -> philox.Keys | None:
        if not self.noise:
            return None
        return philox.make_keys(2**63 + 5, self.shape[0], step_index=2**32 - 1)


CASES = {
    "float32": Case((2, 4, 64, 64)),
    "float32, noise": Case((2, 4, 64, 64), noise=True),
    "float16, guided, noise": Case((2, 4, 64, 64), torch.float16, guided=True, noise=True),
    "float32, bfloat16 model": Case((3, 3, 32, 32), model_dtype=torch.bfloat16),
    "everything": Case(
        (3, 3, 17, 9), noise=True, guided=True, mask=True, history=True, x_0=True, clip=1.0
    ),
    "misaligned": Case((2, 3, 32, 32), misaligned=True, noise=True),
    "float64": Case((2, 3, 8, 8), torch.float64, noise=True),
    "112 numbers": Case((1, 112), clip=1.0),
}


def results(update_out: Callable[..., None], case: Case) -> dict[str, Tensor]:
    """The outputs of an update, by name."""
    arguments = case.arguments()
    update_out(**arguments)
    return {name: arguments[name] for name in OUTPUTS if arguments[name] is not None}


def differing(update_out: Callable[..., None], case: Case) -> dict[str, int]:
    """The number of elements of each output that differ from those of the kernel on the CPU."""
    expected = results(backends.BACKENDS["cpu"].update_out, case)
    got = results(update_out, case)
    return {name: int((got[name] != expected[name]).sum()) for name in expected}


def correctly_rounded(x: Tensor, t: Tensor) -> Tensor:
    """A model of correctly rounded operations, which gives the same bits on every device."""
    time = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return x * 0.75 + (time - 500) * (1 / 1024)


def main() -> int:
    device, *implementations = sys.argv[1:]
    wrong = 0
    for implementation in implementations:
        update_out = on_device(backends.BACKENDS[implementation].update_out, torch.device(device))
        for name, case in CASES.items():
            counts = differing(update_out, case)
            wrong += any(counts.values())
            print(implementation, name, counts, flush=True)
    print(f"{fastddim.__file__}: {wrong} wrong", flush=True)
    return WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
