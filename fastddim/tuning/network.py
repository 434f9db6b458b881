"""The user's network and the step around it, evaluated on one batch at one timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastddim import adapter
from fastddim.adapter import Model
from fastddim.options import Update
from fastddim.reference import Updated, rescaled_rows, updated
from fastddim.validation import check_model_output


class Network:
    """A model as the steps of one kind call it.

    Attributes:
        evaluations: how many samples the model has been evaluated on so far; under guidance, how
            many pairs.
        evaluated: called with the number of samples after each evaluation, if anything is.
    """

    evaluated: Callable[[int], object] | None = None

    def __init__(
        self, model: Model, update: Update, model_kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        """
        Args:
            model: called as by `sample`.
            update: the kind of step, checked.
            model_kwargs: passed to the model.
            dtype: of what the model reads.
        """
        self._model = model
        self._update = update
        self._model_kwargs = model_kwargs
        self._dtype = dtype
        self.evaluations = 0

    def output(self, x: Tensor, t: int) -> Tensor:
        """What the model predicts of the states x `[B, …]` at the timestep t."""
        state, guided = x.to(self._dtype), self._update.guided
        x = torch.cat([state, state]) if guided else state
        timesteps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        result = adapter.output_tensor(self._model(x, timesteps, **self._model_kwargs))
        output = check_model_output("model output", result, state, guided=guided)
        self.evaluations += len(state)
        if self.evaluated is not None:
            self.evaluated(len(state))
        return output

    def updated(self, x: Tensor, output: Tensor, row: Tensor, history: Tensor) -> Updated:
        """The step with one row `[1, K]`."""
        if self._update.rescaling is not None:
            row = rescaled_rows(x, output, row, self._update.rescaling)
        return updated(x, output, row, None, history)
