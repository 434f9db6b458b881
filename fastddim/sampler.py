"""Sampling that is prepared once and drawn from many times."""

from __future__ import annotations

from torch import Tensor

from fastddim.loop.loop import Loop
from fastddim.loop.setup import prepare_sampling
from fastddim.options import CallOptions, SamplerOptions
from fastddim.signatures import method_takes


class Sampler:
    """Sampling prepared once: checked arguments, plan, coefficient table, buffers, CUDA graph.

    `sampler(seed=3)` then draws a batch. The arguments are those of `fastddim.sample` that do not
    change from call to call. Buffers and graphs are the sampler's own and go with it.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: (B, …) of the state.
        dtype: of the state.
        device: of the state.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """

    @method_takes(SamplerOptions)
    def __init__(self, options: SamplerOptions) -> None:
        setup = prepare_sampling(options)
        self.plan = setup.plan
        self.shape = setup.shape
        self.dtype = setup.dtype
        self.device = setup.device
        self._loop = Loop(setup)

    @method_takes(CallOptions)
    def __call__(self, options: CallOptions) -> Tensor | tuple[Tensor, Tensor]:
        """Draw one batch, in tensors that are the caller's own.

        The arguments are those of `fastddim.sample` that may change from call to call.

        Returns:
            The samples `[B, …]`, or `(samples, trajectory)` with trajectory `[S + 1, B, …]`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
            RuntimeError: another call is running, in a thread or around this one's callback.
        """
        return self._loop.sample(options)
