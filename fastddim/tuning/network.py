"""The user's network and the step around it, evaluated on one batch at one timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddim import adapter
from fastddim.adapter import Model
from fastddim.loop.step import NO_ARGUMENTS
from fastddim.options import Update
from fastddim.reference import Updated, rescaled_rows, updated
from fastddim.validation import check_model_output, check_same_output, check_state


class Network:
    """A model as the steps of one kind call it, or two where one is for the unconditional half.

    Attributes:
        evaluations: the number of samples that the model was evaluated on; under guidance, of
            pairs.
        evaluated: called with the number of samples after each evaluation; None for no call.
    """

    evaluated: Callable[[int], object] | None = None

    def __init__(
        self,
        model: Model,
        update: Update,
        dtype: torch.dtype,
        *,
        uncond_model: Model | None = None,
        arguments: Sequence[dict[str, Any]] = NO_ARGUMENTS,
    ) -> None:
        """
        Args:
            model, uncond_model: called as by `sample`.
            update: the kind of step, checked.
            dtype: the dtype of the models' input.
            arguments: those of each model, the unconditional one's first.
        """
        self._model = model
        self._uncond_model = uncond_model
        self._update = update
        self._dtype = dtype
        self._arguments = arguments
        self.evaluations = 0

    def output(self, x: Tensor, t: int) -> Tensor:
        """The model's output for the states x `[B, …]` at the timestep t."""
        state, guided = x.to(self._dtype), self._update.guided
        if self._uncond_model is None:
            x = torch.cat([state, state]) if guided else state
            output = self._evaluate("model", self._model, x, t, self._arguments[0])
        else:
            others, kwargs = self._arguments
            halves = [
                self._evaluate("uncond_model", self._uncond_model, state, t, others).clone(),
                self._evaluate("model", self._model, state, t, kwargs),
            ]
            check_same_output(*halves)
            output = torch.cat(halves)
        check_model_output("model output", output, state, guided=guided)
        self.evaluations += len(state)
        if self.evaluated is not None:
            self.evaluated(len(state))
        return output

    def _evaluate(
        self, name: str, model: Model, x: Tensor, t: int, arguments: dict[str, Any]
    ) -> Tensor:
        timesteps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        result = adapter.output_tensor(model(x, timesteps, **arguments), name)
        return check_state(f"{name} output", result)

    def updated(self, x: Tensor, output: Tensor, row: Tensor, history: Tensor) -> Updated:
        """The result of a step with one row `[1, K]`."""
        if self._update.rescaling is not None:
            row = rescaled_rows(x, output, row, self._update.rescaling)
        return updated(x, output, row, None, history)
