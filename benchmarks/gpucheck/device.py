"""CPU tensors on another device, with the same layout there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddim.philox import Keys


class Moved:
    """Copies of storages on a device.

    A tensor moves with its whole storage. So a view keeps its strides and its offset from an
    aligned address, tensors that share memory share it there, and a write of a kernel outside a
    view is copied back too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def there(self, value: Any) -> Any:
        """The same value with its tensors on the device."""
        if isinstance(value, Keys):
            return Keys(*map(self.there, value))
        if not isinstance(value, Tensor):
            return value
        storage = self._copy_of(value.untyped_storage())
        view = torch.empty(0, dtype=value.dtype, device=self._device)
        return view.set_(storage, value.storage_offset(), value.shape, value.stride())

    def bring_back(self) -> None:
        """Copy every storage back over the one that it was made from."""
        for here, there in self._storages.values():
            here.copy_(there)

    def _copy_of(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        place = storage.data_ptr()
        if place not in self._storages:
            copy = torch.UntypedStorage(storage.nbytes(), device=self._device)
            self._storages[place] = (storage, copy.copy_(storage))
        return self._storages[place][1]


def on_device(function: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """A backend's function for CPU tensors, which moves them and brings the results back."""

    def call(*arguments: Any, **named: Any) -> None:
        moved = Moved(device)
        function(*map(moved.there, arguments), **{k: moved.there(v) for k, v in named.items()})
        moved.bring_back()

    return call
