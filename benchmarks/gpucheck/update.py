"""One plain update of a given size, to be timed and counted."""

from __future__ import annotations

import torch

from fastddim import backends, philox
from fastddim.plan import Update, coefficient_row, stack_row
from gpucheck.measures import MEBIBYTE

BATCH = 4
# Elements of each sample that are compared; all of them would take the CPU too long.
COMPARED = 2**18


class PlainUpdate:
    """An update without guidance or extras; its state takes `mebibytes`.

    It moves three times the bytes of the state: x and the model output in, x_prev out.
    """

    def __init__(
        self,
        implementation: str,
        dtype: torch.dtype,
        eta: float,
        mebibytes: int,
        device: torch.device,
    ) -> None:
        size = torch.empty(0, dtype=dtype).element_size()
        shape = (BATCH, mebibytes * MEBIBYTE // size // BATCH)
        generator = torch.Generator(device).manual_seed(1)
        self._implementation = implementation
        self.x, self._model_output = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        self._out = torch.empty_like(self.x)
        row = coefficient_row(0.4, 0.5, Update(eta=eta))
        self._table = stack_row(row).float()[None].to(device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._keys = philox.make_keys(7, BATCH, step_index=3, device=device) if eta else None

    def __call__(self) -> None:
        backends.BACKENDS[self._implementation].update_out(
            self.x,
            self._model_output,
            self._table,
            self._row,
            noise=None,
            keys=self._keys,
            out=self._out,
            x_0=None,
            model_input=None,
        )

    def copy(self) -> None:
        self._out.copy_(self.x)

    def wrong(self) -> int:
        """The number of elements at the beginning of the samples that differ from the CPU."""
        self()
        x, model_output, got = (
            values[:, :COMPARED].cpu() for values in (self.x, self._model_output, self._out)
        )
        expected = torch.empty_like(x)
        backends.BACKENDS["cpu"].update_out(
            x,
            model_output,
            self._table.cpu(),
            self._row.cpu(),
            noise=None,
            keys=self._keys and philox.Keys(*(key.cpu() for key in self._keys)),
            out=expected,
            x_0=None,
            model_input=None,
        )
        return int((got != expected).sum())
