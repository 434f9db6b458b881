"""The instructions that the CPU has."""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Tell whether the CPU multiplies in bfloat16 (AVX512_BF16 or AMX); False if torch cannot tell.

    Elsewhere torch emulates it, and networks run many times slower than in float32.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
