"""compute-sanitizer's memcheck over the updates of `gpucheck.cases`.

torch's caching allocator is off, so that every tensor is an allocation of its own and an access
beyond it is noticed. initcheck and racecheck would find nothing here: updates use no shared memory,
and outputs are filled before they are written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from gpucheck.cases import WRONG
from gpucheck.commands import python

FOUND = 9


def tool() -> str | None:
    return shutil.which("compute-sanitizer")


def memcheck(
    implementations: Iterable[str], device: torch.device, log: Path, limit: float
) -> str | None:
    """The first fault in the updates of these implementations, or None.

    On the CPU, the updates run without the tool.
    """
    found = tool()
    under: tuple[str, ...] = ()
    if device.type != "cpu":
        assert found is not None
        under = (found, "--tool", "memcheck", "--error-exitcode", str(FOUND))
        under += ("--log-file", str(log))
    code = python(
        "gpucheck.cases",
        str(device),
        *implementations,
        folder=log.parent,
        limit=limit,
        under=under,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    if code == 0:
        return None
    if code == FOUND:
        return f"memory errors:\n{log.read_text(errors='replace')[:1500]}"
    if code == WRONG:
        return "results differ from those of the CPU"
    return "out of time" if code is None else f"exit code {code}"
