"""The C++ kernel (csrc/cpu), vectorised for the instruction set at hand."""

from __future__ import annotations

import torch

from fastddim import ops
from fastddim.ops import advance, fit_rows, normal_out, update, update_out

__all__ = [
    "PRIORITY",
    "advance",
    "fit_rows",
    "normal_out",
    "unavailable",
    "update",
    "update_out",
]

PRIORITY = 10


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it runs on the CPU only"
    return ops.EXTENSION_ERROR
