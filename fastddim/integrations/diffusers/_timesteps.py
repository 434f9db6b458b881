"""Timesteps whose values the host knows, so that a timestep on a device need not be waited for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddim.integrations._indices import one_index
from fastddim.integrations._tables import version

ONE_EACH = (
    "; for a timestep of each sample, call batch_step_no_noise of DDIMParallelScheduler, "
    "fastddim.step with tensors alpha_t and alpha_prev, or fastddim.Stream"
)
"""The end of an error about many timesteps."""


class HostTimesteps(NamedTuple):
    """A tensor of timesteps, and the values that it had when the host read them."""

    tensor: Tensor
    storage: torch.UntypedStorage
    version: int
    values: list[int]
    step_of: dict[int, int]
    """The index of each value; the first index of a value that occurs twice."""

    @classmethod
    def of(cls, tensor: Tensor, values: list[int]) -> HostTimesteps:
        step_of = {t: s for s, t in reversed(list(enumerate(values)))}
        return cls(tensor, tensor.untyped_storage(), version(tensor), values, step_of)

    @property
    def current(self) -> bool:
        """Tell whether the tensor is known to have these values still. A tensor of inference mode
        is not, since it does not count its changes.
        """
        return 0 <= self.version == version(self.tensor)

    def value_of(self, element: Tensor) -> int | None:
        """The value of an element of the tensor, known by its address; None for other tensors."""
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


class GivenTimesteps:
    """Timesteps that `set_timesteps` was given, each followed by the next of them.

    Two objects with the same timesteps are different keys of a table.
    """

    def __init__(self, timesteps: Sequence[int]) -> None:
        """Take over the timesteps.

        Args:
            timesteps: the timesteps in the order visited.
        """
        self.timesteps = tuple(timesteps)
        self._visited = frozenset(timesteps)

    def check(self, timestep: Any) -> None:
        """Refuse a timestep that is none of them, if the host knows its value.

        Raises:
            IndexError: the timestep is none of them.
        """
        if type(timestep) is int and timestep not in self._visited:
            raise IndexError(
                "timestep: expected one of the timesteps that set_timesteps was given, got "
                f"{timestep}"
            )

    def neighbours(self, alphas: Tensor, past_the_end: Tensor, *, upwards: bool = False) -> Tensor:
        """ᾱ of the timestep below each of them, at the index of each; NaN at other indices.

        Args:
            alphas: ᾱ of all timesteps, `[T]`.
            past_the_end: ᾱ below the lowest of them.
            upwards: whether they are visited from the lowest on.
        """
        down = self.timesteps[::-1] if upwards else self.timesteps
        below = torch.full_like(alphas, float("nan"))
        at, before = list(down), list(down[1:])
        below[at[:-1]] = alphas[before]
        below[at[-1]] = past_the_end.to(alphas)
        return below


def given_timesteps(timesteps: Any, T: int, *, upwards: bool = False) -> GivenTimesteps:
    """The timesteps that a user gives to `set_timesteps`, checked.

    Args:
        timesteps: a sequence, an array or a tensor of integers in [0, T).
        T: the number of all timesteps.
        upwards: whether they have to increase rather than decrease.

    Raises:
        TypeError, IndexError: a timestep is not an integer.
        ValueError: there is none, one is out of range, or their order is wrong.
    """
    listed = timesteps.tolist() if isinstance(timesteps, Tensor | np.ndarray) else list(timesteps)
    values: list[int] = []
    for i, value in enumerate(listed):
        t = one_index(f"timesteps[{i}]", value)
        if t is None or not 0 <= t < T:
            raise ValueError(f"timesteps[{i}]: expected a timestep in [0, {T}), got {value}")
        values.append(t)
    if not values:
        raise ValueError("timesteps: expected one or more, got none")
    order = "increasing" if upwards else "decreasing"
    for i, (one, following) in enumerate(itertools.pairwise(values)):
        if not (one < following if upwards else one > following):
            raise ValueError(
                f"timesteps: expected {order} ones, got {one} and then {following} at {i + 1}"
            )
    return GivenTimesteps(values)


def check_one_of(num_inference_steps: int | None, timesteps: Any) -> None:
    """Refuse both arguments of `set_timesteps` together, and neither of them.

    Raises:
        ValueError: both are given, or neither is.
    """
    if (num_inference_steps is None) == (timesteps is None):
        got = "neither" if timesteps is None else "both"
        raise ValueError(f"num_inference_steps, timesteps: expected one of them, got {got}")


def indexes_otherwise(timesteps: Any, alphas: Tensor) -> bool:
    """Tell whether a tensor of another dtype is an index: a mask of timesteps, or one number."""
    if not isinstance(timesteps, Tensor):
        return False
    dtype = timesteps.dtype
    if dtype in (torch.bool, torch.uint8):
        return timesteps.shape == alphas.shape
    return timesteps.ndim == 0 and not dtype.is_floating_point and not dtype.is_complex
