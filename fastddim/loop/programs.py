"""Captured programs of a loop, each kept by the conditions under which it is valid."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

from fastddim.cache import Cache
from fastddim.loop.capture import capture_if_possible, torch_settings
from fastddim.loop.model_state import ModelState

KEPT = 4
"""The number of loops kept between calls, and of programs that a loop keeps."""

Value = TypeVar("Value")


class Programs(Generic[Value]):
    """The programs that were captured last, and None for what cannot be captured."""

    def __init__(self, mode: bool | str, device: torch.device) -> None:
        """
        Args:
            mode: the caller's `graph`, as in `fastddim.sample`.
            device: the device of the programs.
        """
        self._mode = mode
        self._device = device
        self._model_state: ModelState | None = None
        self._parameters: Any = None
        # A tuple without a program stands for what cannot be captured.
        self._kept: Cache[tuple[Value, ...]] = Cache(KEPT)

    def follow(self, *models: Any) -> None:
        """Let programs depend on these models."""
        self._model_state = ModelState(*models)

    def unfollow(self) -> None:
        """Let go of the models; programs stay valid as long as the models do not change."""
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
            # These graphs read memory that is no longer the model's.
            self._kept.clear()
            self._parameters = parameters
        full_key = (training, torch_settings(self._device), key)
        found = self._kept.get(full_key)
        if found is None:
            captured = capture_if_possible(self._mode, capture)
            found = () if captured is None else (captured,)
            self._kept.put(full_key, found)
        return found[0] if found else None

    def values(self) -> list[Value]:
        """The programs, without those that could not be captured."""
        return [program for found in self._kept.values() for program in found]
