"""Tensors that were moved to a device, whose values the host still knows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastddim.integrations._tables import version


class Moved(NamedTuple):
    """A tensor that was moved to a device, as it is there and as it was on the host."""

    tensor: Tensor
    host: Tensor
    versions: tuple[int, int]

    @classmethod
    def of(cls, tensor: Tensor, host: Tensor) -> Moved:
        return cls(tensor, host, (version(tensor), version(host)))

    @property
    def current(self) -> bool:
        """Tell whether both are known to hold their values still."""
        return min(self.versions) >= 0 and self.versions == (
            version(self.tensor),
            version(self.host),
        )
