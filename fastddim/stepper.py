"""The steps of a plan, prepared for a loop that the caller writes."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastddim import direct
from fastddim.loop.copying import Rebuilt
from fastddim.loop.describing import described_number
from fastddim.options import NoiseSource, Seed, StepperOptions, Update
from fastddim.plan import make_plan
from fastddim.schedule import Schedule
from fastddim.signatures import method_takes, shared
from fastddim.single import PreparedStep
from fastddim.stepping import take
from fastddim.steptable import StepTable, backend_in_graph
from fastddim.tracing import HELD
from fastddim.validation import check_bool, check_int, check_state


class Stepper(Rebuilt):
    """The steps of a plan, prepared for a loop of your own.

    `stepper(x, model_output, i)` is the update of step i as `fastddim.sample` takes it: with its
    coefficients, its η and, for the same seed, its noise. A call does the same as `fastddim.step`
    with the numbers of step i. These are computed once, and a call takes the least time that a call
    from Python can. A loop that matches `sample` in everything else gives the same bits.

    Copies and pickles take the same steps. Calls may come from any number of threads.

    Args:
        schedule: ᾱ that the model was trained with, a `fastddim.Schedule`.
        steps: number of steps, or the timesteps themselves in the order visited. Tuned steps are
            refused, since they read the epsilons of earlier steps.

    The other arguments are those of `fastddim.sample`. η, the guidance scale and the temperature
    are numbers, or sequences with one number a step.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        timesteps: int64 `[S]` in the order visited; the model is evaluated at `timesteps[i]`
            before step i.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """

    @method_takes(StepperOptions)
    @torch.inference_mode(False)
    def __init__(self, options: StepperOptions) -> None:
        if not isinstance(options.schedule, Schedule):
            raise TypeError(
                f"schedule: expected a fastddim.Schedule, got {type(options.schedule).__name__}"
            )
        update = shared(Update, options).checked(None, per_step=True)
        self.plan = make_plan(
            options.schedule,
            options.steps,
            update,
            spacing=options.spacing,
            steps_offset=options.steps_offset,
        )
        if self.plan.tuned is not None:
            raise ValueError(
                "steps: expected a number or timesteps, since tuned steps read the epsilons of "
                f"earlier steps, got {options.steps!r}"
            )
        if self.plan.table.ndim > 2:
            raise ValueError(
                "eta, guidance_scale, temperature: expected numbers, or sequences with one a "
                "step, got a tensor [B]; fastddim.step takes these"
            )
        self.timesteps = self.plan.timesteps
        self._impl = options.impl
        self._eta = options.eta
        self._rebuild()

    def __repr__(self) -> str:
        return f"Stepper(steps={self.plan.steps}, eta={described_number(self._eta)})"

    @overload
    def __call__(
        self,
        x_t: Tensor,
        model_output: Tensor,
        i: int,
        *,
        seed: Seed | None = ...,
        sample_offset: int = ...,
        noise: NoiseSource = ...,
        out: Tensor | None = ...,
        return_x0: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        x_t: Tensor,
        model_output: Tensor,
        i: int,
        *,
        seed: Seed | None = ...,
        sample_offset: int = ...,
        noise: NoiseSource = ...,
        out: Tensor | None = ...,
        return_x0: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        x_t: Tensor,
        model_output: Tensor,
        i: int,
        *,
        seed: Seed | None = None,
        sample_offset: int = 0,
        noise: NoiseSource = None,
        out: Tensor | None = None,
        return_x0: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Take step `i`, in [0, S).

        The other arguments, the results and the errors are those of `fastddim.step`. Without `out`
        the result is differentiable, as there.
        """
        if not is_dynamo_compiling():
            taken = self._direct(
                x_t, model_output, i, noise, seed, sample_offset, i, out, return_x0
            )
            if taken is not None:
                return taken
        check_state("x_t", x_t)
        check_bool("return_x0", return_x0)
        row = check_int("i", i, 0, self.plan.steps - 1)
        return take(
            self._prepared(x_t, row),
            x_t,
            model_output,
            seed=seed,
            sample_offset=sample_offset,
            step_index=row,
            noise=noise,
            out=out,
            return_x0=return_x0,
        )

    def _prepared(self, x: Tensor, i: int) -> PreparedStep:
        kind = self.plan.kind
        same = (kind.rescaling, kind.noisy, kind.guided, False)
        if is_compiling():
            table = getattr(HELD, self._table.name_in_graph(x.dtype, x.device))
            row = torch.full((1,), i, dtype=torch.int64, device=x.device)
            backend = backend_in_graph(self._impl, x.device)
            return PreparedStep(backend, table, row, *same, in_graph=True)
        prepared = self._table.prepared(x.dtype, x.device)
        return PreparedStep(prepared.backend, prepared.table, prepared.indices[i], *same)

    @torch.inference_mode(False)
    def _build(self) -> None:
        plan, kind = self.plan, self.plan.kind
        self._table = StepTable(plan.table, rescaling=kind.rescaling, impl=self._impl, checked=True)
        here = kind.rescaling is None and self._impl in direct.IMPLEMENTATIONS
        self._direct = (
            direct.make_stepper(plan.table, noisy=kind.noisy, guided=kind.guided)
            if here
            else direct.declines
        )

    def _functions(self) -> tuple[Any, ...]:
        return ()
