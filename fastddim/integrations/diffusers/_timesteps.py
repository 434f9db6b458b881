"""Timesteps whose values the host knows, so that a step from one on a device waits for nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.integrations._tables import version

ONE_EACH = (
    "; for a timestep of each sample, call batch_step_no_noise of DDIMParallelScheduler, "
    "fastddim.step with tensors alpha_t and alpha_prev, or fastddim.Stream"
)
"""The end of an error about many timesteps."""


class HostTimesteps(NamedTuple):
    """A tensor of timesteps, and the values it had when the host read them."""

    tensor: Tensor
    storage: torch.UntypedStorage
    version: int
    values: list[int]
    step_of: dict[int, int]
    """The index of each value; of one that is there twice, the first."""

    @classmethod
    def of(cls, tensor: Tensor, values: list[int]) -> HostTimesteps:
        step_of = {t: s for s, t in reversed(list(enumerate(values)))}
        return cls(tensor, tensor.untyped_storage(), version(tensor), values, step_of)

    @property
    def current(self) -> bool:
        """Whether the tensor is known to have these values still. One of inference mode is not: it
        does not count its changes.
        """
        return 0 <= self.version == version(self.tensor)

    def value_of(self, element: Tensor) -> int | None:
        """The value of an element of the tensor, by its address; None if it is no element of it."""
        tensor = self.tensor
        if (
            element.untyped_storage() is not self.storage
            or not self.current
            or element.dtype is not tensor.dtype
            or element.numel() != 1
        ):
            return None
        distance = int(element.storage_offset()) - int(tensor.storage_offset())
        index, rest = divmod(distance, tensor.stride(0))
        return self.values[index] if rest == 0 and 0 <= index < len(self.values) else None


def indexes_otherwise(timesteps: Any, alphas: Tensor) -> bool:
    """Whether a tensor of another dtype is an index too: a mask of all timesteps, or one number."""
    if not isinstance(timesteps, Tensor):
        return False
    dtype = timesteps.dtype
    if dtype in (torch.bool, torch.uint8):
        return timesteps.shape == alphas.shape
    return timesteps.ndim == 0 and not dtype.is_floating_point and not dtype.is_complex
