"""Sampling that is prepared once and run many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.loop.copying import Rebuilt
from fastddim.loop.describing import (
    described_model,
    described_number,
    described_placement,
    described_steps,
)
from fastddim.loop.first_weight import first_weights
from fastddim.loop.loop import Loop
from fastddim.loop.setup import Setup, prepare_sampling
from fastddim.loop.walk import Walk
from fastddim.options import DrawOptions, SamplerOptions, Update
from fastddim.signatures import method_takes, shared
from fastddim.tracing import in_program


class Sampler(Rebuilt):
    """Sampling prepared once: checked arguments, plan, coefficient table, buffers, CUDA graph.

    Each call, such as `sampler(seed=3)`, then draws a batch. The arguments are those of
    `fastddim.sample` that do not change from call to call. The sampler owns its buffers and graphs,
    which are freed with it.

    Copies and pickles have the same plan, and buffers and graphs of their own. If a module holds a
    sampler of itself or of a part of itself, the sampler in a deep copy of the module evaluates the
    copy. The same holds for a sampler of a method, or of a `functools.partial`, of the module.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: (B, …) of the state.
        dtype: dtype of the state.
        device: device of the state.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """

    # Tensors made here also serve calls outside the caller's inference mode.
    @method_takes(SamplerOptions)
    @torch.inference_mode(False)
    def __init__(self, options: SamplerOptions) -> None:
        self._prepare(options, prepare_sampling(options))

    def _prepare(self, options: SamplerOptions, setup: Setup) -> None:
        """Store what the options resolve to, and make the buffers."""
        self.plan = setup.plan
        self.shape = setup.shape
        self.dtype = setup.dtype
        self.device = setup.device
        self._setup = setup
        self._update = shared(Update, options)
        self._steps = described_steps(setup.plan, options)
        self._weights = first_weights("Sampler", setup.model, setup.uncond_model, setup.device)
        self._rebuild()

    def __repr__(self) -> str:
        setup, update = self._setup, self._update
        parts = [
            described_model(setup.model),
            f"shape={self.shape}",
            f"steps={self._steps}",
            f"eta={described_number(update.eta)}",
        ]
        if update.guidance_scale is not None:
            parts.append(f"guidance_scale={described_number(update.guidance_scale)}")
        if setup.uncond_model is not None:
            parts.append(f"uncond_model={described_model(setup.uncond_model)}")
        if update.prediction != "epsilon":
            parts.append(f"prediction={update.prediction!r}")
        parts += described_placement(self.dtype, self.device, setup.backend, setup.graph)
        return f"Sampler({', '.join(parts)})"

    @method_takes(DrawOptions)
    def __call__(self, options: DrawOptions) -> Tensor:
        """Draw one batch into new tensors, or into `out`.

        The arguments are those of `fastddim.sample` that may change from call to call.

        Args:
            model_kwargs, uncond_kwargs: values for this call that replace those of the sampler, by
                their names: tensors of the same shape, dtype and device, with B rows or one. Graphs
                are not captured anew. You may also write in place into a tensor that the sampler
                was made with.
            out: tensor that the samples are written to, with the shape, dtype and device of the
                state; not with a trajectory. Such a call allocates no memory, except for what the
                model and a callback allocate.

        Returns:
            The samples `[B, …]`, which are `out` if it is given, or the states `[S + 1, B, …]`, as
            from `fastddim.sample`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range, or the model
                was converted or moved since the sampler was made; the message names it.
            RuntimeError: another call is running, in another thread or around the callback that
                makes this call.
        """
        if in_program():
            from fastddim.loop import traced

            return traced.draw(self._walk, self._setup, options, self._draw)
        return self._draw(options)

    def _draw(self, options: DrawOptions) -> Tensor:
        for weight in self._weights:
            weight.check()
        arguments = None
        if options.model_kwargs is not None or options.uncond_kwargs is not None:
            arguments = self._setup.arguments.replaced(options.model_kwargs, options.uncond_kwargs)
        return self._loop.sample(options, arguments, options.out)

    def _evaluate_in_inference_mode(self, value: bool) -> None:
        """Set whether the next calls evaluate the model in inference mode.

        The default is outside of it, whatever the caller's mode is, so that models which
        differentiate work everywhere. In inference mode PyTorch's own operators take less time.
        """
        self._loop.inference = value

    @torch.inference_mode(False)
    def _build(self) -> None:
        self._loop = Loop(self._setup)
        self._walk = Walk.of(self._setup)

    def _functions(self) -> tuple[Any, ...]:
        setup = self._setup
        return setup.model, setup.uncond_model, setup.denoised_fn
