"""Arguments of one update, and a call that watches the memory around its outputs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastddim
from fastddim import backends, ops, philox, reference
from fastddim.plan import PREDICTIONS, Row, Update, coefficient_row, stack_row

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded")
INSTRUCTION_SETS = ("plain", "avx2", "avx512")
SENTINEL = 12345.0

# Elements around an output: those that leave it at no whole word of 16 bytes, and those that do.
UNALIGNED, ALIGNED = 37, 48


@dataclass
class Case:
    """Arguments of one update. `rows` are float64; every tensor is made anew for each call."""

    x: Tensor
    model_output: Tensor
    rows: Tensor
    row: Tensor
    noise: Tensor | None = None
    keys: philox.Keys | None = None
    history: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    epsilon: torch.dtype | None = None
    model_input: torch.dtype | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    frame: int = UNALIGNED

    @property
    def table(self) -> Tensor:
        return self.rows.to(reference.compute_dtype(self.x.dtype))

    @property
    def alone(self) -> tuple[Tensor, Tensor | None]:
        """The table and the indices; where all samples share a row, a view of it and no index."""
        if len(self.row) > 1:
            return self.table, self.row
        row = int(self.row)
        return self.table[row : row + 1], None


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "permuted" and values.ndim > 2:
        return values.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 3), SENTINEL)
        wide = wide.to(values.dtype)
        view = wide[..., 3::2]
        view.copy_(values)
        return view
    if layout == "offset":
        flat = torch.full((values.numel() + 1,), SENTINEL).to(values.dtype)
        view = flat[1:].view(values.shape)
        view.copy_(values)
        return view
    return values.contiguous()


def make_case(
    generator: torch.Generator,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    model_layout: str | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = False,
    guided: bool = False,
    learned_variance: bool = False,
    noise: str = "none",
    per_sample: bool = False,
    history: bool = False,
    mask: bool = False,
    epsilon: bool = False,
    model_input: torch.dtype | None = None,
    frame: int = UNALIGNED,
) -> Case:
    batch = shape[0]

    def draw(size: tuple[int, ...], of: torch.dtype = dtype, lay: str = layout) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64).to(of)
        if lay == "expanded" and len(size) > 2 and size[1] > 0:
            return values[:, :1].expand(size)
        return laid_out(values, lay)

    count = batch if per_sample else 1
    low = torch.rand(count, generator=generator, dtype=torch.float64) * 0.9 + 0.01
    high = low + (0.999 - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    update = Update(
        eta=1.0 if noise != "none" else 0.0,
        prediction=prediction,
        clip=clip,
        rederive_eps=rederive_eps,
        guidance_scale=torch.rand(count, generator=generator).double() * 8 if guided else None,
    )
    row = coefficient_row(low, high, update)
    # No coefficient of epsilon and history that matters only in some kinds of step is left at 0.
    row = row._replace(ph=0.3 * low, e0=row.e0 + 0.25 * low, ex=row.ex + 0.5 * low)
    rows = stack_row(row).reshape(-1, len(Row._fields))
    # The rows in use are neither the first nor in order, so that an ignored index shows.
    spare = torch.full((2, len(Row._fields)), SENTINEL, dtype=torch.float64)
    order = torch.randperm(len(rows), generator=generator)
    table = torch.cat([spare, rows[order]])
    index = 2 + torch.argsort(order)
    model_shape = list(shape)
    model_shape[0] *= 2 if guided else 1
    if learned_variance:
        model_shape[1] *= 2
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    steps = torch.randint(0, 2**32, (batch,), generator=generator)
    samples = torch.randint(0, 2**32, (batch,), generator=generator)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return Case(
        x=draw(shape, lay="contiguous" if layout == "expanded" else layout),
        model_output=draw(tuple(model_shape), model_dtype or dtype, model_layout or layout),
        rows=table,
        row=index,
        noise=draw(shape) if noise == "given" else None,
        keys=philox.Keys(seeds, steps, samples) if noise == "keyed" else None,
        history=draw(shape, model_dtype or dtype) if history else None,
        mask=laid_out(weights, layout) if mask else None,
        known=draw(shape) if mask else None,
        epsilon=(model_dtype or dtype) if history or epsilon else None,
        model_input=model_input,
        frame=frame,
    )


@dataclass
class Result:
    out: Tensor
    x_0: Tensor
    epsilon: Tensor | None
    model_input: Tensor | None

    def tensors(self) -> list[Tensor]:
        all_of_them = (self.out, self.x_0, self.epsilon, self.model_input)
        return [t for t in all_of_them if t is not None]


def poisoned_like(values: Tensor, frame: int = UNALIGNED) -> tuple[Tensor, Tensor]:
    """(a NaN tensor with the strides of `values`, the sentinel-framed buffer that it lies in)."""
    strides = values.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    buffer = torch.full((max(extent, 0) + 2 * frame,), SENTINEL, dtype=values.dtype)
    view = buffer.as_strided(values.shape, strides, frame)
    view.fill_(float("nan"))
    return view, buffer


def written_only_inside(view: Tensor, buffer: Tensor) -> bool:
    """True if everything in the buffer except the view is still the sentinel."""
    copy = buffer.clone()
    copy.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(SENTINEL)
    return bool((copy == torch.tensor(SENTINEL).to(copy.dtype)).all())


def run(
    update_out: Callable[..., None], case: Case, *, in_place: bool = False, with_x_0: bool = True
) -> Result:
    """Runs one call into poisoned outputs. In place, x_prev goes over x and epsilon over the
    history.
    """
    x = torch.empty_strided(case.x.shape, case.x.stride(), dtype=case.x.dtype)
    x.copy_(case.x)
    framed = {name: poisoned_like(case.x, case.frame) for name in ("out", "x_0")}
    if case.epsilon is not None:
        like = torch.empty_like(case.x, dtype=case.epsilon)
        framed["epsilon"] = poisoned_like(like, case.frame)
    if case.model_input is not None:
        copies = 2 if case.model_output.shape[0] != x.shape[0] else 1
        target = torch.zeros((copies * x.shape[0], *x.shape[1:]), dtype=case.model_input)
        if target.shape == case.model_output.shape:
            target = torch.empty_like(case.model_output, dtype=case.model_input)
        framed["model_input"] = poisoned_like(target, case.frame)
    views = {name: view for name, (view, _) in framed.items()}
    history = case.history
    if in_place:
        views["out"] = x
        if history is not None:
            history = views["epsilon"].copy_(history)
    update_out(
        x,
        case.model_output,
        case.table,
        case.row,
        noise=case.noise,
        keys=case.keys,
        history=history,
        mask=case.mask,
        known=case.known,
        out=views["out"],
        x_0=views["x_0"] if with_x_0 else None,
        model_input=views.get("model_input"),
        epsilon=views.get("epsilon"),
    )
    for view, buffer in framed.values():
        assert written_only_inside(view, buffer), "written outside of the output"
    if not in_place:
        assert torch.equal(x, case.x), "the input was changed"
    return Result(views["out"], views["x_0"], views.get("epsilon"), views.get("model_input"))


def use_instruction_set(name: str) -> None:
    """Makes the C++ kernel use an instruction set from now on; skips if this CPU lacks it."""
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(ops.EXTENSION_ERROR)
    library = ctypes.CDLL(fastddim._C.__file__)
    if not library.fastddim_use_instruction_set(name.encode()):
        pytest.skip(f"this CPU has no {name}")


@pytest.fixture(params=["reference", *(f"cpu-{name}" for name in INSTRUCTION_SETS)])
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    name, _, instruction_set = request.param.partition("-")
    if instruction_set:
        use_instruction_set(instruction_set)
    yield backends.BACKENDS[name]
    if instruction_set:
        ctypes.CDLL(fastddim._C.__file__).fastddim_use_instruction_set(None)


def any_case(data: st.DataObject, largest_batch: int = 9) -> Case:
    """Arguments with any combination of features."""
    dims = data.draw(st.integers(2, 5))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=dims, max_size=dims))
    shape = (min(sizes[0], largest_batch), *sizes[1:])
    return make_case(
        torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))),
        shape,
        dtype=data.draw(st.sampled_from(DTYPES)),
        model_dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        model_layout=data.draw(st.sampled_from(LAYOUTS)),
        prediction=data.draw(st.sampled_from(PREDICTIONS)),
        clip=data.draw(st.sampled_from([None, 0.5])),
        rederive_eps=data.draw(st.booleans()),
        guided=data.draw(st.booleans()),
        learned_variance=data.draw(st.booleans()),
        noise=data.draw(st.sampled_from(["none", "given", "keyed"])),
        per_sample=data.draw(st.booleans()),
        history=data.draw(st.booleans()),
        mask=data.draw(st.booleans()),
        epsilon=data.draw(st.booleans()),
        model_input=data.draw(st.sampled_from([None, *DTYPES])),
    )
