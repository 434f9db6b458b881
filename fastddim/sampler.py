"""Sampling that is prepared once and drawn from many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.loop.copying import Rebuilt
from fastddim.loop.first_weight import FirstWeight
from fastddim.loop.loop import Loop
from fastddim.loop.setup import prepare_sampling
from fastddim.loop.walk import Walk
from fastddim.options import CallOptions, SamplerOptions
from fastddim.signatures import method_takes
from fastddim.tracing import in_program


class Sampler(Rebuilt):
    """Sampling prepared once: checked arguments, plan, coefficient table, buffers, CUDA graph.

    `sampler(seed=3)` then draws a batch. The arguments are those of `fastddim.sample` that do not
    change from call to call. Buffers and graphs are the sampler's own and go with it.

    Copies and pickles have the same plan, and buffers and graphs of their own. In a deep copy of a
    module that holds a sampler of itself or of a part, the copy's sampler evaluates the copy; so it
    does for a method, or a `functools.partial`, of one.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: (B, …) of the state.
        dtype: of the state.
        device: of the state.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """

    # What is kept serves calls outside the caller's inference mode too.
    @method_takes(SamplerOptions)
    @torch.inference_mode(False)
    def __init__(self, options: SamplerOptions) -> None:
        setup = prepare_sampling(options)
        self.plan = setup.plan
        self.shape = setup.shape
        self.dtype = setup.dtype
        self.device = setup.device
        self._setup = setup
        self._weight = FirstWeight("Sampler", setup.model, setup.device)
        self._rebuild()

    @method_takes(CallOptions)
    def __call__(self, options: CallOptions) -> Tensor:
        """Draw one batch, in tensors that are the caller's own.

        The arguments are those of `fastddim.sample` that may change from call to call.

        Returns:
            The samples `[B, …]`, or the states `[S + 1, B, …]`, as `fastddim.sample` does.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range, or the model
                was converted or moved since the sampler was made; the message names it.
            RuntimeError: another call is running, in a thread or around this one's callback.
        """
        if in_program():
            from fastddim.loop import traced

            return traced.draw(self._walk, self._setup, options, self._draw)
        return self._draw(options)

    def _draw(self, options: CallOptions) -> Tensor:
        self._weight.check()
        return self._loop.sample(options)

    @torch.inference_mode(False)
    def _build(self) -> None:
        self._loop = Loop(self._setup)
        self._walk = Walk.of(self._setup)

    def _functions(self) -> tuple[Any, ...]:
        return self._setup.model, self._setup.denoised_fn
