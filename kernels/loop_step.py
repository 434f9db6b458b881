"""The step of a loop whose tensors stay where they are, in two launches: the update and `advance`.

No operator is called. Only the model output is new, so only this tensor is looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.ops import LoopStep
from fastddim.philox import Keys
from fastddim.tracing import operators_are_seen

from .launch import _device_of, _likeness, find_advance, find_update
from .repeated import Repeated
from .update import Tensors
from .views import View

_MOST_KINDS = 8
"""The most kinds of model outputs, by strides and alignment, whose launches a loop keeps."""


def loop_step(
    state: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    *,
    keys: Keys | None,
    history: Tensor | None,
    model_input: Tensor | None,
    counters: Tensor,
    timesteps: Tensor,
    t: Tensor,
) -> LoopStep:
    """`update_out` and `advance` without operators: see `fastddim.backends`."""
    fixed = dict.fromkeys(Tensors._fields)
    fixed |= {"x": state, "out": state, "history": history, "epsilon": history}
    tensors = Tensors(**{**fixed, "model_input": model_input})
    numbers = {"table": table, "row": row, "keys": keys}
    counting = {"counters": counters, "timesteps": timesteps, "t": t}
    return _LoopStep(tensors, numbers, counting, model_output)


class _LoopStep:
    """A `LoopStep`."""

    def __init__(
        self,
        tensors: Tensors,
        numbers: dict[str, Any],
        counting: dict[str, Tensor],
        like: Tensor,
    ) -> None:
        """
        Args:
            tensors: those of the update, without the model output.
            numbers: the other tensors of the update.
            counting: the tensors of `advance`.
            like: a model output, as an example.
        """
        self._tensors = tensors
        self._numbers = numbers
        self._counting = counting
        self._kind = (like.shape, like.dtype, like.device)
        self._advance = find_advance(**counting)
        self._updates: dict[Any, _Update] = {}
        read = tensors.x if tensors.model_input is None else tensors.model_input
        self._first = read.data_ptr()
        self._end = self._first + read.nbytes

    def __call__(self, output: Tensor) -> bool:
        if (
            type(output) is not Tensor
            or output.layout is not torch.strided
            or output.is_neg()
            or operators_are_seen()
        ):
            return False
        # A step writes over the model's input: an output that lies there is read from a copy.
        if self._first <= output.data_ptr() < self._end and not self._is_state(output):
            output = output.clone()
        likeness = _likeness(output)
        update = self._updates.get(likeness) or self._prepared(likeness, output)
        if update is None:
            return False
        with _device_of(output):
            update(output, self._numbers)
            self._advance(**self._counting)
        return True

    def _is_state(self, output: Tensor) -> bool:
        """True for the state itself, of which each element is read before it is written."""
        return self._tensors.model_input is None and output.is_set_to(self._tensors.x)

    def _prepared(self, likeness: Any, output: Tensor) -> _Update | None:
        """The update for such outputs; None where the loop's step does not take them."""
        if (output.shape, output.dtype, output.device) != self._kind or not output.data_ptr():
            return None
        tensors = self._tensors._replace(model_output=output)
        found = find_update(tensors, **self._numbers)
        if found is None:
            return None
        if len(self._updates) == _MOST_KINDS:
            self._updates.clear()
        launch, repeated = found
        self._updates[likeness] = update = _Update(launch.view(tensors), repeated)
        return update


class _Update:
    """An update of tensors that stay, except for the model output, of which only the strides do."""

    def __init__(self, views: list[View | None], repeated: Repeated) -> None:
        at = Tensors._fields.index("model_output")
        output = views[at]
        assert output is not None
        self._before, self._strides, self._after = views[:at], output[1:], views[at + 1 :]
        self._repeated = repeated

    def __call__(self, output: Tensor, numbers: dict[str, Any]) -> None:
        view = View(output, *self._strides)
        tensors = Tensors._make((*self._before, view, *self._after))
        self._repeated(tensors=tensors, **numbers)
