"""Captured programs of a loop, each for the conditions under which it repeats what a step does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

from fastddim.loop.capture import capture_if_possible, torch_settings
from fastddim.loop.model_state import ModelState

KEPT = 4
"""How many loops are kept between calls, and how many programs a loop keeps."""

Value = TypeVar("Value")


class Recent(OrderedDict[Hashable, Value]):
    """The last `KEPT` values put in or used."""

    def put(self, key: Hashable, value: Value) -> None:
        self.pop(key, None)
        self[key] = value
        while len(self) > KEPT:
            self.popitem(last=False)


class Programs(Generic[Value]):
    """The programs that were captured last, and None for what cannot be captured."""

    def __init__(self, mode: bool | str, device: torch.device) -> None:
        """
        Args:
            mode: what the caller asked for, as `graph` of `fastddim.sample`.
            device: where.
        """
        self._mode = mode
        self._device = device
        self._model_state: ModelState | None = None
        self._parameters: Any = None
        self._recent: Recent[Value | None] = Recent()

    def follow(self, *models: Any) -> None:
        """Let programs depend on these models."""
        self._model_state = ModelState(*models)

    def unfollow(self) -> None:
        """Let go of the models, of which programs stay valid as long as nothing has changed."""
        self._model_state = None

    def find(self, key: Hashable, capture: Callable[[], Value]) -> Value | None:
        """The program for `key` and the state of the models and of torch, captured where there is
        none; None where that fails and the caller left the choice.

        Raises:
            ValueError: it fails and the caller asked for a graph.
        """
        assert self._model_state is not None
        parameters, training = self._model_state.read()
        if parameters != self._parameters:
            # The graphs read memory that is no longer the model's.
            self._recent.clear()
            self._parameters = parameters
        full_key = (training, torch_settings(self._device), key)
        program = self._recent.get(full_key)
        if full_key not in self._recent:
            program = capture_if_possible(self._mode, capture)
        self._recent.put(full_key, program)
        return program

    def values(self) -> list[Value]:
        """The programs, without those that could not be captured."""
        return [program for program in self._recent.values() if program is not None]
