"""The tensors of a batch, which stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastddim import transfer
from fastddim.adapter import CHANNELS_LAST
from fastddim.plan import Row, StepKind, known_rows
from fastddim.reference import compute_dtype


class Buffers(NamedTuple):
    """The tensors that the steps of a batch read and write, besides the counters.

    Tensors like the state have the memory format of the model's weights, which its outputs have
    too: an update then finds all of them in one order. Only `denoised_fn` gets its x_0 row-major.

    Attributes:
        state: x_t `[B, …]`.
        x_0: the predicted x_0, like the state, where it is written.
        table: coefficient rows `[R, K]`.
        own_row: int64 `[B]`, the index of each sample's row in `own_rows`.
        next_input: `[B or 2B, …]`, the model's input, where it is not the state itself.
        history: like the state in the model's dtype, the epsilon of the step before.
        start: like the state, where a refined step begins.
        first_half: where steps are split, the rows `[R, K]` of their first halves.
        epsilon: like the state, the epsilon of the first half, where the second reads it.
        own_rows: rows `[B, K]`, each made for the data of its sample.
    """

    state: Tensor
    x_0: Tensor | None
    table: Tensor
    own_row: Tensor
    next_input: Tensor | None
    history: Tensor | None
    start: Tensor | None
    first_half: Tensor | None
    epsilon: Tensor | None
    own_rows: Tensor | None

    @classmethod
    def allocate(
        cls,
        kind: StepKind,
        shape: tuple[int, ...],
        rows: int,
        *,
        dtype: torch.dtype,
        model_dtype: torch.dtype,
        device: torch.device,
        channels_last: bool,
        with_x_0: bool,
    ) -> Buffers:
        """Buffers of zeros for steps of one kind, with tables of `rows` rows."""
        memory_format = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            made = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
            return made.zero_()

        batch = shape[0]
        state = zeros(shape, dtype)
        x_0_format = torch.contiguous_format if kind.split else torch.preserve_format
        table = state.new_zeros((rows, len(Row._fields)), dtype=compute_dtype(dtype))
        own_input = kind.parts > 1 or model_dtype != dtype
        input_shape = (kind.parts * batch, *shape[1:])
        return cls(
            state=state,
            x_0=torch.zeros_like(state, memory_format=x_0_format)
            if with_x_0 or kind.split
            else None,
            table=table,
            own_row=torch.arange(batch, device=device),
            next_input=zeros(input_shape, model_dtype) if own_input else None,
            history=torch.zeros_like(state, dtype=model_dtype) if kind.history else None,
            start=torch.zeros_like(state) if kind.refine else None,
            first_half=torch.zeros_like(table) if kind.split else None,
            epsilon=torch.zeros_like(state) if kind.split and not kind.rederived else None,
            own_rows=table.new_zeros((batch, table.shape[1])) if kind.rescaling else None,
        )

    @property
    def model_input(self) -> Tensor:
        """The state as the model reads it: in its dtype, twice under guidance."""
        return self.state if self.next_input is None else self.next_input

    def first(self, size: int) -> Buffers:
        """The buffers of the first samples alone, in the same memory."""
        parts = 0 if self.next_input is None else self.next_input.shape[0] // self.state.shape[0]
        shared = {"table", "first_half"}
        views = {
            name: tensor[: size * (parts if name == "next_input" else 1)]
            for name, tensor in self._asdict().items()
            if tensor is not None and name not in shared
        }
        return self._replace(**views)

    def follow_state(self) -> None:
        """Write the tensors that a first step reads besides the state, from the state."""
        if self.history is not None:
            self.history.zero_()
        self.write_input()

    def write_input(self) -> None:
        """Write the model's input from the state."""
        if self.next_input is not None:
            for part in self.next_input.split(max(len(self.state), 1)):
                part.copy_(self.state)

    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor for tensor in self if tensor is not None)


class Inpainting(NamedTuple):
    """Known data, and the tensors that mix them to the noise level of each step.

    Attributes:
        mask: weight of the known data in the state; like the state.
        data: the known data; like the state.
        x_T: the latents that they are mixed with; like the state.
        known: the data at the noise level after a step; like the state.
        table: the rows `[R, K]` that mix them.
    """

    mask: Tensor
    data: Tensor
    x_T: Tensor
    known: Tensor
    table: Tensor

    @classmethod
    def allocate(cls, buffers: Buffers, rows: int) -> Inpainting:
        mask, data, x_T, known = (torch.zeros_like(buffers.state) for _ in range(4))
        return cls(mask, data, x_T, known, buffers.table.new_zeros((rows, len(Row._fields))))

    def first(self, size: int) -> Inpainting:
        """The inpainting of the first samples alone, in the same memory."""
        mask, data, x_T, known = (tensor[:size] for tensor in self[:-1])
        return Inpainting(mask, data, x_T, known, self.table)

    def load(self, mask: Tensor, known: Tensor, x_T: Tensor) -> None:
        """Take over the mask, the known data and the latents."""
        self.mask.copy_(mask)
        self.data.copy_(known)
        self.x_T.copy_(x_T)

    def load_rows(self, alphas_cumprod: Tensor, rows: slice) -> None:
        """Take over the noise levels of a plan, as rows of the table."""
        transfer.write(known_rows(alphas_cumprod), self.table[rows])


def row_major(tensor: Tensor) -> Tensor:
    """A row-major copy for callers, whatever the memory format of a loop's tensor."""
    return tensor.clone(memory_format=torch.contiguous_format)
