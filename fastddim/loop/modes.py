"""Contexts in which loops run, as cheap to enter as can be: a short run takes microseconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fastddim.transforms import check_sampler_unfollowed

NOTHING: AbstractContextManager[None] = nullcontext()


class OneAtATime:
    """Refuses to be entered again before it is left, by another thread or by the same one."""

    __slots__ = ("_lock", "_message")

    def __init__(self, message: str) -> None:
        self._lock = threading.Lock()
        self._message = message

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(self._message)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def without_autograd() -> AbstractContextManager[Any]:
    """Ordinary tensors without gradients, whatever the caller's modes are; no mode is entered where
    it is on already, since that takes as long as a launch.

    Raises:
        RuntimeError: a transform of `torch.func` is at work.
    """
    check_sampler_unfollowed()
    if torch.is_inference_mode_enabled():
        return _outside_inference_mode()
    return torch.no_grad() if torch.is_grad_enabled() else NOTHING


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    # Leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield
