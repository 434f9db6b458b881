"""Numbers of the host on a device, without the host waiting for the device.

A copy from ordinary host memory waits for all work that was queued before it. So a single value is
written by a kernel that takes the value as an argument, and many values are copied from page-locked
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def captured(device: torch.device) -> bool:
    """Tell whether work that is launched on `device` now becomes part of a graph under capture."""
    if device.type != "cuda":
        return False
    if torch.cuda.is_initialized() and torch.cuda.current_device() == device.index:
        return bool(torch.cuda.is_current_stream_capturing())
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def filled(value: int, count: int, device: torch.device) -> Tensor:
    """int64 `[count]` that repeats one value."""
    return torch.full((count,), value, dtype=torch.int64, device=device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, ready for work that is launched on the current stream from now on."""
    if device.type != "cuda" or not values.is_cpu or torch.compiler.is_compiling():
        return values.to(device)
    if captured(device):
        return _by_arguments(values, device)
    # PyTorch reuses page-locked memory for another tensor only after the copy is done.
    return values.pin_memory().to(device, non_blocking=True)


def write(values: Tensor, out: Tensor) -> None:
    """Write `values` into a tensor of their shape, for work that is launched on the current stream
    from now on. This takes one copy, where `upload` would take a second.
    """
    if out.device.type != "cuda" or not values.is_cpu:
        out.copy_(values)
    elif captured(out.device):
        out.copy_(_by_arguments(values, out.device))
    else:
        out.copy_(values.to(out.dtype).pin_memory(), non_blocking=True)


def wait(device: torch.device) -> None:
    """Wait until all work of the current stream is done, so that any stream can use its results."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _by_arguments(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, written by kernels that take the values as arguments.

    A captured copy would read host memory at every replay, when that memory may hold other data.
    """
    made = torch.ones(values.shape, dtype=values.dtype, device=device)
    if values.numel():
        # Multiplying by one keeps every value and the sign of zero; adding zero would not.
        torch._foreach_mul_(list(made.view(-1).unbind()), values.reshape(-1).tolist())
    return made
