"""The scheduler of DDIM's inversion, from an image to noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.schedulers import scheduling_ddim_inverse as _ddim_inverse
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastddim.integrations._coefficients import ddim_row
from fastddim.integrations._hooks import Hooks
from fastddim.integrations.diffusers._graph import Table
from fastddim.integrations.diffusers._rows import (
    SignedTable,
    doubled,
    signed_table,
    strided,
)
from fastddim.integrations.diffusers._scheduler import Fused, output_object
from fastddim.integrations.diffusers._timesteps import check_one_of, given_timesteps
from fastddim.kept import keep

_ATTRIBUTES = ("alphas_cumprod", "initial_alpha_cumprod")


class DDIMInverseScheduler(Fused, _ddim_inverse.DDIMInverseScheduler):  # type: ignore[misc]
    """diffusers' `DDIMInverseScheduler` with fused steps; the module says what they keep.

    Evaluate the model at the timestep that a step ends at, which is an explicit guess;
    `fastddim.invert(refine=…)` iterates on it.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDIMInverseScheduler()
    scheduler = fastddim.integrations.diffusers.DDIMInverseScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.ones(1, 3, 8, 8))
    ```
    """

    _fastddim_hooks = Hooks(of=("DDIMInverseScheduler",), attributes=_ATTRIBUTES)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Set the timesteps, as in diffusers.

        Args:
            num_inference_steps: the number of steps, whose timesteps the config determines.
            device: device of `self.timesteps`.
            timesteps: the timesteps instead of their number, increasing, which diffusers' class
                does not take. Each step begins at the one before, and the first at
                `initial_alpha_cumprod`.

        Raises:
            TypeError, IndexError: a timestep is not an integer.
            ValueError: both a number and timesteps are given, or neither; or the timesteps are not
                increasing or out of range.
        """
        check_one_of(num_inference_steps, timesteps)
        if timesteps is None:
            self._fastddim_work.given = None
            super().set_timesteps(num_inference_steps)  # type: ignore[arg-type]
        else:
            T = self.config["num_train_timesteps"]
            self._give_timesteps(given_timesteps(timesteps, T, upwards=True))
        self._move_timesteps(device)

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """Take one step up to `timestep`, as in diffusers, in one pass.

        Args:
            model_output, sample: `[B, …]`, floating point.
            timestep: an int, or a tensor with one.
            return_dict: return diffusers' output object instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, each shaped like `sample`.

        Raises:
            IndexError: the timestep is not an index of `alphas_cumprod`, or none of those given.
            TypeError: the timestep is not a number.
            ValueError: there is more than one timestep; or timesteps were given, and the step needs
                diffusers' own code, which knows only their number.
        """
        row = timestep if type(timestep) is int else self._row(timestep, sample.device)
        given = self._fastddim_work.given
        if given is not None:
            given.check(row)
        state = self._state(sample, model_output)
        table: Table | None = None
        steps = self.num_inference_steps
        in_graph = is_dynamo_compiling()
        if state is not None and in_graph:
            table = self._in_graph("_table", state, steps, kind=SignedTable)
        elif state is not None:
            table = self._table(steps)
        if state is None or table is None:
            self._refuse_given()
            return super().step(model_output, timestep, sample, return_dict)
        results = table.take(state, model_output, row)
        if not return_dict:
            return results
        return output_object(_ddim_inverse.DDIMSchedulerOutput, results[0], results[1], in_graph)

    def _table(self, steps: int | None) -> SignedTable | None:
        """The table of all steps; None if diffusers has an error to raise.

        Args:
            steps: `num_inference_steps`.
        """
        alphas, initial, config = self.alphas_cumprod, self.initial_alpha_cumprod, self.config
        try:
            versions = alphas._version, initial._version
        except RuntimeError:  # from a tensor of inference mode
            return self._table(steps) if self._count_changes(*_ATTRIBUTES) else None
        kept, given = self._fastddim_work.tables, self._fastddim_work.given
        key = (steps, given, *versions, id(config), id(alphas), id(initial))
        table: SignedTable | None = kept.get(key)
        if table is None and steps is not None and self._covered():
            host, initial_on_host = map(self._on_host, _ATTRIBUTES)

            def make() -> SignedTable:
                start = initial_on_host.to(host)
                stride = config["num_train_timesteps"] // steps
                at_start = (
                    strided(host, stride, start)
                    if given is None
                    else given.neighbours(host, start, upwards=True)
                )
                return _table(config, host, at_start, start)

            table = keep(kept, key, make, sources=(config, alphas, initial))
        return table


def _table(
    config: Mapping[str, Any], alphas: Tensor, at_start: Tensor, initial: Tensor
) -> SignedTable:
    ends, starts = doubled(alphas, at_start, initial)
    return signed_table(ddim_row(config, starts, ends))
