"""The table of coefficients that kernels read, made of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddim.plan.rows import Row, known_row
from fastddim.validation import readable


def stack_row(row: Row) -> Tensor:
    """float64 tensor `[K]`, or `[B, K]` where a field is a tensor."""
    tensors = [v for v in row if isinstance(v, Tensor)]
    if not tensors:
        return torch.tensor(row, dtype=torch.float64, device="cpu")
    like = tensors[0]
    return torch.stack(
        [v if isinstance(v, Tensor) else torch.full_like(like, v) for v in row], dim=-1
    )


def stack_rows(rows: Sequence[Row]) -> Tensor:
    """float64 `[S, K]` of S rows, or `[B, S, K]` where a field is a tensor."""
    stacked = [stack_row(row) for row in rows]
    shape = max((row.shape for row in stacked), key=len)
    return torch.stack([row.expand(shape) for row in stacked], dim=-2)


def to_table(
    rows: Tensor, dtype: torch.dtype, device: torch.device, *, checked: bool = True
) -> Tensor:
    """Rows `[…, K]` as a backend reads them: a table `[R, K]` in the dtype that it computes in.

    Raises:
        ValueError: a coefficient overflows `dtype`, and is `checked`.
    """
    table = rows.reshape(-1, rows.shape[-1]).to(dtype)
    if checked and readable(rows):
        overflow = rows.reshape(table.shape).isfinite() & ~table.isfinite()
        if overflow.any():
            r, k = overflow.nonzero()[0].tolist()
            raise ValueError(
                f"alphas_cumprod: expected coefficients in the range of {dtype}, got "
                f"{Row._fields[k]} = {rows.reshape(table.shape)[r, k].item():g} in row {r}; "
                "a float64 state has the range"
            )
    return table.to(device)


def known_rows(alphas_cumprod: Tensor) -> Tensor:
    """Rows `[S, K]` that mix known data to the noise level after each step; see `known_row`."""
    return stack_row(known_row(alphas_cumprod))
