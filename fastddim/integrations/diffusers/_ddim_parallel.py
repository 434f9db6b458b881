"""The DDIM scheduler that takes each sample from a timestep of its own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers import scheduling_ddim_parallel as _parallel
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastddim.integrations._hooks import Hooks
from fastddim.integrations._indices import check_indices
from fastddim.integrations.diffusers._ddim import ATTRIBUTES, METHODS, Ddim


class DDIMParallelScheduler(Ddim, _parallel.DDIMParallelScheduler):  # type: ignore[misc]
    """diffusers' `DDIMParallelScheduler` with fused steps; the module says what they keep.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDIMParallelScheduler()
    scheduler = fastddim.integrations.diffusers.DDIMParallelScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.batch_step_no_noise(torch.zeros(2, 8), torch.tensor([980, 0]), torch.ones(2, 8))
    ```
    """

    _output_class = _parallel.DDIMParallelSchedulerOutput
    _fastddim_hooks = Hooks(
        *METHODS, "_batch_get_variance", of=("DDIMParallelScheduler",), attributes=ATTRIBUTES
    )

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """Take a step of each sample from its own timestep, as in diffusers.

        After the last timestep ᾱ is 1 here, even if `set_alpha_to_one` is False.

        Args:
            model_output, sample: `[B, …]`.
            timesteps: int64 or int32 `[B]`.
            eta: 0.

        Returns:
            The samples at the timesteps before, in float32 or wider.

        Raises:
            IndexError: `timesteps` has another dtype.
            TypeError: `timesteps` is not a tensor.
            ValueError: the steps are tuned; or timesteps were given, and the step needs diffusers'
                own code. A timestep that is none of those given makes the sample NaN.
        """
        if self._fastddim_work.tuned is not None:
            raise ValueError(
                "tuned: expected None for batch_step_no_noise, since each tuned step reads the "
                "epsilon of the one before it, got tuned steps"
            )
        check_indices("timesteps", timesteps)
        for name in ATTRIBUTES:
            if getattr(self, name).device != model_output.device:
                self._move(name, model_output.device)
        state = self._state(sample, model_output)
        table: Any = None
        covered = eta == 0 and timesteps.numel() in (1, sample.shape[0])
        # ᾱ of many timesteps contributes to the dtype of the result; ᾱ of one does not.
        if state is not None and covered:
            state = state.to(torch.promote_types(state.dtype, self.alphas_cumprod.dtype))
            if is_dynamo_compiling():
                table = self._table_in_graph(state, 0.0, use_clipped_model_output, True)
            else:
                steps = self.num_inference_steps
                table = self._table(steps, 0.0, use_clipped_model_output, True)
        if state is None or table is None:
            self._refuse_given()
            return super().batch_step_no_noise(
                model_output, timesteps, sample, eta, use_clipped_model_output
            )
        row = self._rows(timesteps, state.device)
        result: Tensor = table.take(state, model_output, row, return_x0=False)[0]
        return result
