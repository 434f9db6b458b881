"""The last chunk of actions and its part in the next chunk, in memory that stays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim import transfer
from fastddim.actions.options import Actions
from fastddim.reference import compute_dtype
from fastddim.validation import check_int

Counts: TypeAlias = int | npt.NDArray[np.int64]
"""A number of actions, or one for each environment."""


class Chunks:
    """The last chunk, shifted to the time at which the next one begins.

    All work is done by operators that write into these tensors, so a tick allocates nothing and
    does not wait for the device. Indices and weights depend on the numbers of executed and frozen
    actions, and are recomputed only when these numbers change.

    Attributes:
        last: the last chunk `[B, horizon, action_dim]`.
        shifted: the last chunk after `shift`: executed actions are removed, and the last action is
            repeated.
        mask: bool `[B, horizon, 1]`, True for actions that are frozen.
        weights: `[B, horizon, 1]`, weight of each action of `shifted` in the new chunk: the soft
            mask of arXiv 2506.07339, equation 5.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        batch, horizon, _ = shape
        self._horizon = horizon
        self.last, self.shifted = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.mask = torch.zeros((batch, horizon, 1), dtype=torch.bool, device=device)

        # The numbers of executed and frozen actions: as requested and as last loaded, both on the
        # host, and then on the device. Before the first load, -1 makes the first two differ.
        self._asked = np.zeros((2, batch, 1, 1), np.int64)
        self._on_host = np.full((2, batch, 1, 1), -1, np.int64)
        self._host = torch.from_numpy(self._on_host)
        self._counts = torch.zeros((2, batch, 1, 1), dtype=torch.int64, device=device)
        self._place = torch.arange(horizon, device=device)[None, :, None]
        self._index = torch.zeros(shape, dtype=torch.int64, device=device)

        # Constants are tensors, since the CPU allocates one for every number given to an operator.
        self.weights = torch.zeros((batch, horizon, 1), dtype=compute_dtype(dtype), device=device)
        self._share = torch.zeros_like(self.weights)
        self._spent = self.weights.new_zeros(self._counts.shape)
        self._from_end = (horizon - self._place).to(self.weights.dtype)
        self._span = self.weights.new_zeros((batch, 1, 1))
        self._most = self.weights.new_full((), horizon + 1)
        self._e_less_1 = self.weights.new_full((), math.e - 1)

    @property
    def guide(self) -> tuple[Tensor, Tensor]:
        """The last chunk, shifted, and its weights."""
        return self.shifted, self.weights

    def shift(self, executed: Counts, frozen: Counts) -> None:
        """Write `shifted`, `mask` and `weights`, from the last chunk and these numbers."""
        self._asked[0, :, 0, 0], self._asked[1, :, 0, 0] = executed, frozen
        if not np.array_equal(self._asked, self._on_host):
            self._on_host[:] = self._asked
            transfer.write(self._host, self._counts)
            self._follow_counts()
        torch.gather(self.last, 1, self._index, out=self.shifted)

    def keep_frozen(self) -> None:
        """Write the frozen actions over those of a new chunk in `last`, since the sum of state and
        known data may have rounded them.
        """
        torch.where(self.mask, self.shifted, self.last, out=self.last)

    def _follow_counts(self) -> None:
        executed, frozen = self._counts
        torch.add(self._place.expand(self._index.shape), executed, out=self._index)
        self._index.clamp_(max=self._horizon - 1)
        torch.lt(self._place, frozen, out=self.mask)
        self._weigh()

    def _weigh(self) -> None:
        """Write the weights: with H' old actions left and d of them frozen, c·(e^c - 1)/(e - 1)
        where c = (H' - i)/(H' - d + 1) within [0, 1], which is 1 for i < d and 0 from H' on.
        """
        executed, frozen = self._spent.copy_(self._counts)
        torch.sub(self._most, executed, out=self._span).sub_(frozen)
        torch.sub(self._from_end, executed, out=self._share)
        self._share.div_(self._span).clamp_(0, 1)
        torch.expm1(self._share, out=self.weights)
        self.weights.mul_(self._share).div_(self._e_less_1)

    def tensors(self) -> Iterator[Tensor]:
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))


def listed(counts: Counts) -> int | list[int]:
    """The numbers as an int or a list of ints."""
    return counts if isinstance(counts, int) else [int(count) for count in counts]


def check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"shape: expected (B, horizon, action_dim), none of them 0, got {shape}")


def checked_counts(
    executed: Actions, frozen: Actions, batch: int, horizon: int
) -> tuple[Counts, Counts]:
    """The number of executed actions of the last chunk, and of frozen actions of the new one.

    Raises:
        TypeError, ValueError: a number is not an integer, or not in [0, horizon], or more actions
            are frozen than the last chunk has left; the message names it.
    """
    done = _checked("executed", executed, batch, horizon)
    return done, _checked("frozen", frozen, batch, horizon - done)


def _checked(name: str, value: Any, batch: int, most: Counts) -> Counts:
    if type(value) is int or not hasattr(value, "__len__") or isinstance(value, str | bytes):
        return check_int(name, value, 0, most if isinstance(most, int) else int(most.min()))
    numbers = _integers(name, value)
    if numbers.shape != (batch,):
        raise ValueError(
            f"{name}: expected an integer or one for each environment, {batch}, got shape "
            f"{numbers.shape}"
        )
    wrong = (numbers < 0) | (numbers > most)
    if wrong.any():
        i = int(wrong.argmax())
        check_int(f"{name}[{i}]", numbers[i], 0, int(np.broadcast_to(most, batch)[i]))
    return numbers


def _integers(name: str, value: Any) -> npt.NDArray[np.int64]:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name}: expected an int64 tensor, got dtype {value.dtype}")
        if not value.is_cpu:
            raise ValueError(f"{name}: expected a tensor on cpu, got one on {value.device}")
        return value.numpy()
    numbers = np.array(value)
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {value!r}")
    return numbers
