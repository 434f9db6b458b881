"""The noise that schedulers add for training, and the velocity that models learn."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddim.integrations._coefficients import roots
from fastddim.integrations._indices import check_indices
from fastddim.integrations._tables import step_table
from fastddim.integrations.diffusers._scheduler import Fused
from fastddim.integrations.diffusers._timesteps import indexes_otherwise
from fastddim.kept import keep
from fastddim.plan import mixing_row
from fastddim.steptable import StepTable
from fastddim.tracing import PLAIN, is_traced
from fastddim.transforms import bare


class Noising(Fused):
    """`add_noise` and `get_velocity`, for the schedulers that have them.

    Both leave `alphas_cumprod` on the device of the samples.
    """

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return √ᾱ_t·original_samples + √(1 − ᾱ_t)·noise, as in diffusers.

        Raises:
            IndexError: `timesteps` has a dtype other than int64 and int32.
            TypeError: `timesteps` is not a tensor.
        """
        mixed = self._mixed("add_noise", original_samples, noise, timesteps)
        if mixed is None:
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc,no-any-return]
        return mixed

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return √ᾱ_t·noise − √(1 − ᾱ_t)·sample, as in diffusers.

        Raises:
            IndexError, TypeError: as in `add_noise`.
        """
        mixed = self._mixed("get_velocity", sample, noise, timesteps)
        if mixed is None:
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc,no-any-return]
        return mixed

    def _mixed(self, method: str, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor | None:
        """The result of a method; None if diffusers has to compute it."""
        state = self._state(x, noise)
        if not isinstance(timesteps, Tensor) or timesteps.dtype is not torch.int64:
            if indexes_otherwise(timesteps, self.alphas_cumprod):
                return None
            check_indices("timesteps", timesteps)
        if state is None or timesteps.numel() not in (1, x.shape[0]):
            return None
        if is_traced(timesteps) or type(x) not in PLAIN:
            return self._mixed_in_graph(method, state, noise, timesteps)
        row = timesteps.reshape(-1)
        if timesteps.is_cpu and bare(timesteps):
            values = row.tolist()
            if not values or min(values) < 0 or max(values) >= len(self.alphas_cumprod):
                return None
        if self.alphas_cumprod.device != x.device:
            self._move("alphas_cumprod", x.device)
        table = self._mixing(method)
        if table is None:
            return None
        return table.take(state, noise, row.to(x.device, torch.int64), return_x0=False)[0]

    def _mixing(self, method: str) -> StepTable | None:
        alphas, kept = self.alphas_cumprod, self._fastddim_work.tables
        try:
            key = (method, alphas._version, id(alphas))
        except RuntimeError:  # from a tensor of inference mode
            return self._mixing(method) if self._count_changes("alphas_cumprod") else None
        table: StepTable | None = kept.get(key)
        if table is None and self._has_values("alphas_cumprod"):
            host = self._on_host("alphas_cumprod")
            table = keep(kept, key, lambda: _mixing_table(method, host), sources=(alphas,))
        return table

    def _mixed_in_graph(
        self, method: str, state: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor | None:
        table = self._in_graph("_mixing", state, method)
        if table is None:
            return None
        row = timesteps.reshape(-1).to(state.device, torch.int64)
        row = torch.where(row < 0, row + len(self.alphas_cumprod), row)
        return table.take(state, noise, row)[0]


def _mixing_table(method: str, alphas: Tensor) -> StepTable:
    signal, sigma = roots(alphas).double(), roots(1 - alphas).double()
    of_x, of_noise = (signal, sigma) if method == "add_noise" else (-sigma, signal)
    return step_table(mixing_row(of_x, of_noise))
