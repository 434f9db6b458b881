"""Contexts in which loops run, cheap to enter since a short run takes microseconds."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
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
    """A context for ordinary tensors without gradients, whatever the caller's modes are. It enters
    no mode that is on already, since that takes as long as a launch.

    Raises:
        RuntimeError: a transform of `torch.func` is at work.
    """
    check_sampler_unfollowed()
    if torch.is_inference_mode_enabled():
        return _OutsideInferenceMode()
    return torch.no_grad() if torch.is_grad_enabled() else NOTHING


class _OutsideInferenceMode:
    """Leaves inference mode for ordinary tensors without gradients."""

    __slots__ = ("_outside",)

    def __enter__(self) -> None:
        self._outside = torch.inference_mode(False)
        self._outside.__enter__()
        # Leaving inference mode turns gradients on. Entering it again puts back what they were.
        torch.set_grad_enabled(False)

    def __exit__(self, *error: Any) -> None:
        self._outside.__exit__(*error)
