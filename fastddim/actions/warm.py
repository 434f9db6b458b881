"""A warm start: a state in the middle of the schedule, from a chunk and the noise of a tick."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastddim import backends, philox, transfer
from fastddim.backends import Backend
from fastddim.philox import Keys
from fastddim.plan import Plan, mixing_row, stack_row, to_table
from fastddim.reference import compute_dtype
from fastddim.validation import check_int, signed_bits


class WarmStart:
    """√ᾱ·chunk + √(1 − ᾱ)·z, with the latents z that a run of the same samples starts from.

    This is the marginal q(x_t | x_0) (arXiv 2010.02502, equation 4), as `Schedule.add_noise` draws
    it, in memory that stays.
    """

    def __init__(
        self,
        alpha_cumprod: float,
        seed: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        """Make the tensors of a warm start.

        Args:
            alpha_cumprod: ᾱ of the state.
            seed: 64 bits as a signed integer.
        """
        self._backend = backend
        rows = stack_row(mixing_row(math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)))
        self._table = transfer.upload(to_table(rows, compute_dtype(dtype), rows.device), device)
        self._latents, self._state = (
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)
        )
        self._keys = Keys(
            *(torch.zeros(shape[0], dtype=torch.int64, device=device) for _ in range(3))
        )
        philox.write_seed(seed, self._keys)

    @classmethod
    def of(
        cls,
        plan: Plan,
        first: int | None,
        seed: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        impl: str,
    ) -> WarmStart | None:
        """The warm start before step `first` of a plan; None if `first` is None.

        Args:
            seed: integer in [0, 2⁶⁴).
            impl: the backend, as in `fastddim.sample`.
        """
        if first is None:
            return None
        alpha_cumprod = float(plan.alphas_cumprod[first])
        backend = backends.choose(impl, device)
        return cls(alpha_cumprod, signed_bits(seed), shape, dtype, device, backend)

    def state(self, chunk: Tensor, sample_offset: int) -> Tensor:
        """The state for a chunk and the samples from an index on; valid until the next call."""
        philox.write_sample_indices(sample_offset, self._keys)
        self._backend.normal_out(self._keys, philox.LATENTS, self._latents)
        self._backend.update_out(
            chunk,
            self._latents,
            self._table,
            None,
            noise=None,
            keys=None,
            out=self._state,
            x_0=None,
            model_input=None,
        )
        return self._state

    def tensors(self) -> Iterator[Tensor]:
        yield from (self._table, self._latents, self._state, *self._keys)


def first_step_of(warm_start: int | None, plan: Plan) -> int | None:
    """The index of the first step of a tick that has an earlier chunk; None to take all steps."""
    if warm_start is None:
        return None
    if plan.kind.history:
        raise ValueError(
            "warm_start: expected None at order 2 and with tuned steps, which read the epsilon of "
            f"the step before, got {warm_start!r}"
        )
    if plan.steps == 1:
        raise ValueError(f"warm_start: expected None with a single step, got {warm_start!r}")
    return plan.steps - check_int("warm_start", warm_start, 1, plan.steps - 1)


def warm_steps(first: int | None, plan: Plan) -> int | None:
    """The `warm_start` for which `first_step_of` gives this index."""
    return None if first is None else plan.steps - first
