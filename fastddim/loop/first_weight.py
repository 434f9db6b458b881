"""The dtype and the device of a model's weights, for which buffers were made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastddim.wrappers import held_modules


class FirstWeight:
    """The dtype and device of a model's first floating-point parameter or buffer, which stand for
    those of all: `module.to` and `module.half` change them together.
    """

    def __init__(self, owner: str, model: Any, device: torch.device, name: str = "model") -> None:
        """
        Args:
            owner: the class that was prepared for the weights, as an error names it.
            model: the user's.
            device: the state's, to which hooks may move a model that is kept elsewhere.
            name: the argument's, as an error names it.
        """
        self._owner, self._argument = owner, name
        self._module: nn.Module | None = None
        none: tuple[None, str, str] = (None, "", "")
        self._module, self._kind, self._name = next(_weights(model), none)
        weight = self._find()
        self._dtype = None if weight is None else weight.dtype
        self._devices = [] if weight is None else [weight.device, device]
        self._on_cpu = weight is not None and weight.is_cpu

    def check(self) -> None:
        """Refuse a model that was converted or moved meanwhile.

        Raises:
            ValueError: the weights have another dtype or are on another device.
        """
        weight = self._find()
        if weight is None or (weight.dtype is self._dtype and weight.is_cpu and self._on_cpu):
            return
        if weight.dtype is not self._dtype or weight.device not in self._devices:
            raise ValueError(
                f"{self._argument}: expected weights as they were when the {self._owner} was made, "
                f"{self._dtype} on {self._devices[0]}, got {weight.dtype} on {weight.device}; "
                f"make a new {self._owner} after module.to() or module.half()"
            )

    def _find(self) -> Tensor | None:
        """The weight by its name, since a conversion may put another in its place; None where the
        name is gone.
        """
        if self._module is None:
            return None
        try:
            weight: Tensor | None = getattr(self._module, self._kind)[self._name]
        except KeyError:
            return None
        return weight


def first_weights(
    owner: str, model: Any, uncond_model: Any, device: torch.device
) -> list[FirstWeight]:
    """The first weights of the model and, where there is one, of the unconditional model."""
    found = [FirstWeight(owner, model, device)]
    if uncond_model is not None:
        found.append(FirstWeight(owner, uncond_model, device, "uncond_model"))
    return found


def _weights(model: Any) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, its mapping, name) of each floating-point parameter, then of each buffer."""
    for kind in ("_parameters", "_buffers"):
        for root in held_modules(model):
            for module in root.modules():
                for name, weight in getattr(module, kind).items():
                    if weight is not None and weight.is_floating_point():
                        yield module, kind, name
