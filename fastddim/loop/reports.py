"""Reports of a run, to a progress bar and to the caller's callback."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastddim.options import Progress
from fastddim.validation import check_bool

_NO_BAR = nullcontext()


def check_progress(options: Progress, graph: Any) -> None:
    check_bool("progress", options.progress)
    callback = options.callback
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
    if graph == "loop":
        raise ValueError(
            "callback: expected None with graph='loop', which runs all steps as one, "
            f"got {callback!r}"
        )


def progress_bar(shown: bool, first: int, steps: int) -> AbstractContextManager[Any]:
    """The bar of a run from step `first` on, which is updated after each step; None where it is not
    shown.
    """
    if not shown:
        return _NO_BAR
    from tqdm.auto import tqdm

    bar: AbstractContextManager[Any] = tqdm(
        total=steps, initial=first, desc="sampling", unit="step"
    )
    return bar
