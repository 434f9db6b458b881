"""The CUDA kernel (csrc/cuda), compiled ahead of time for NVIDIA GPUs."""

from __future__ import annotations

import torch

from fastddim import ops
from fastddim.ops import advance, normal_out, rescale_rows, update, update_out

__all__ = [
    "PRIORITY",
    "advance",
    "normal_out",
    "rescale_rows",
    "unavailable",
    "update",
    "update_out",
]

PRIORITY = 20

# The first with the instruction by which the kernel rounds to bfloat16.
_CAPABILITY = (8, 0)


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "it runs on NVIDIA GPUs only"
    if ops.EXTENSION_ERROR is not None:
        return ops.EXTENSION_ERROR
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastddim::update_out", "CUDA"):
        return "the extension was built without the CUDA kernels (it needs nvcc and a CUDA torch)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return (
            f"it needs compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or later, "
            f"got {capability[0]}.{capability[1]}"
        )
    return None
