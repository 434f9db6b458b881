"""Every backend against the reference, and the compiled ones against each other bit for bit.

One body (`check`) serves all backends. A case is a full set of arguments of `update_out`; outputs
are poisoned and lie between sentinels, so that an element left out or written beyond the end shows.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim
from fastddim import backends, ops, philox, reference
from fastddim.plan import PREDICTIONS, Row, Update, coefficient_row, stack_row

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded")
INSTRUCTION_SETS = ("plain", "avx2", "avx512")
SENTINEL = 12345.0


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

    @property
    def table(self) -> Tensor:
        return self.rows.to(reference.compute_dtype(self.x.dtype))


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


def poisoned_like(values: Tensor) -> tuple[Tensor, Tensor]:
    """(a NaN tensor with the strides of `values`, the sentinel-framed buffer that it lies in)."""
    strides = values.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    frame = 37
    buffer = torch.full((max(extent, 0) + 2 * frame,), SENTINEL, dtype=values.dtype)
    view = buffer.as_strided(values.shape, strides, frame)
    view.fill_(float("nan"))
    return view, buffer


def written_only_inside(view: Tensor, buffer: Tensor) -> bool:
    """Whether everything in the buffer but the view still is the sentinel."""
    copy = buffer.clone()
    copy.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(SENTINEL)
    return bool((copy == torch.tensor(SENTINEL).to(copy.dtype)).all())


def run(
    update_out: Callable[..., None], case: Case, *, in_place: bool = False, with_x_0: bool = True
) -> Result:
    """One call into poisoned outputs. In place, x_prev goes over x and epsilon over the history."""
    x = torch.empty_strided(case.x.shape, case.x.stride(), dtype=case.x.dtype)
    x.copy_(case.x)
    framed = {"out": poisoned_like(case.x), "x_0": poisoned_like(case.x)}
    if case.epsilon is not None:
        framed["epsilon"] = poisoned_like(torch.empty_like(case.x, dtype=case.epsilon))
    if case.model_input is not None:
        copies = 2 if case.model_output.shape[0] != x.shape[0] else 1
        target = torch.zeros((copies * x.shape[0], *x.shape[1:]), dtype=case.model_input)
        framed["model_input"] = poisoned_like(target)
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


def spacing(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Distance between neighbouring numbers of `dtype` at `values`."""
    info = torch.finfo(dtype)
    return np.maximum(abs(values), info.tiny) * info.eps


def extended(values: Tensor) -> np.ndarray:
    """The values in NumPy's widest float: 64 bits of mantissa on x86, 11 more than float64."""
    return values.double().numpy().astype(np.longdouble)


def assert_accurate(case: Case, got: Result) -> None:
    """Error at most twice that of the eager formula, plus one rounding of the output.

    A handful of elements may hit no rounding error at all, so the eager error counts as at least
    one rounding of the largest term.
    """
    if case.x.numel() == 0:
        return
    eager = run(backends.BACKENDS["reference"].update_out, case)
    unit = torch.finfo(reference.compute_dtype(case.x.dtype)).eps / 2
    for name, mine, theirs, truth, terms in zip(
        ("x_prev", "x_0", "epsilon"),
        (got.out, got.x_0, got.epsilon),
        (eager.out, eager.x_0, eager.epsilon),
        exact(case),
        exact(case, absolute=True),
        strict=True,
    ):
        if mine is None or theirs is None:
            continue
        error, eager_error = (abs(extended(t) - truth) for t in (mine, theirs))
        expected = max(eager_error.max(), unit * terms.max())
        budget = 2 * expected + spacing(truth, mine.dtype)
        assert (error <= budget).all(), f"{name}: error {error.max()}, eager {expected}"


def check(backend: backends.Backend, case: Case) -> None:
    """The body every backend runs: accuracy against float64, in place, and the next model input."""
    got = run(backend.update_out, case)
    in_place = run(backend.update_out, case, in_place=True)
    for a, b in zip(got.tensors(), in_place.tensors(), strict=True):
        assert torch.equal(a, b), "in place differs"
    # Without x_0 a kernel may take another path, for the same result.
    assert torch.equal(run(backend.update_out, case, with_x_0=False).out, got.out)
    assert_accurate(case, got)
    if got.model_input is not None:
        copies = len(got.model_input) // max(len(got.out), 1)
        expected = torch.cat([got.out] * max(copies, 1)).to(got.model_input.dtype)
        assert torch.equal(got.model_input, expected), "model_input is not the new state"


def exact(case: Case, *, absolute: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x_prev, x_0, epsilon) in extended precision, on the coefficients that the kernel reads.

    `absolute`: the same sums over the absolute values of their terms.
    """

    def wide(values: Tensor) -> np.ndarray:
        return abs(extended(values)) if absolute else extended(values)

    columns = wide(case.table.index_select(0, case.row)).T
    shape = (-1,) + (1,) * (case.x.ndim - 1)
    row = Row(*(column.reshape(shape) for column in columns))
    x = wide(case.x)
    m = wide(case.model_output)
    if x.ndim > 1:
        m = m[:, : x.shape[1]]
    if len(m) != len(x):
        u, c = m[: len(x)], m[len(x) :]
        m = u + row.g * (c + u if absolute else c - u)
    x_0 = row.cx * x + row.cm * m
    if not absolute:
        x_0 = np.clip(x_0, -row.r, row.r)
    x_prev = row.k0 * x_0 + row.kx * x + row.km * m
    if case.history is not None:
        x_prev = x_prev + row.ph * wide(case.history)
    if case.keys is not None:
        z = philox.normal(case.keys, case.x.shape[1:], philox.STEP_NOISE)
        x_prev = x_prev + row.pn * wide(z)
    if case.noise is not None:
        x_prev = x_prev + row.pn * wide(case.noise)
    if case.mask is not None and case.known is not None:
        weight = wide(case.mask)
        x_prev = weight * wide(case.known) + (1 - weight) * x_prev
    return x_prev, x_0, row.e0 * x_0 + row.ex * x + row.em * m


def use_instruction_set(name: str) -> None:
    """Make the C++ kernel use an instruction set from now on; skips where this CPU lacks it."""
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


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(
    backend: backends.Backend, generator: torch.Generator, dtype: torch.dtype, layout: str
) -> None:
    for noise, guided in itertools.product(("none", "given", "keyed"), (False, True)):
        check(
            backend,
            make_case(
                generator,
                (3, 4, 5, 7),
                dtype=dtype,
                layout=layout,
                noise=noise,
                guided=guided,
                model_input=torch.bfloat16,
            ),
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("rederive_eps", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_kinds_of_step(
    backend: backends.Backend,
    generator: torch.Generator,
    prediction: str,
    clip: float | None,
    rederive_eps: bool,
    per_sample: bool,
) -> None:
    for noise, guided, learned in itertools.product(
        ("none", "keyed"), (False, True), (False, True)
    ):
        check(
            backend,
            make_case(
                generator,
                (5, 3, 37),
                prediction=prediction,
                clip=clip,
                rederive_eps=rederive_eps,
                per_sample=per_sample,
                noise=noise,
                guided=guided,
                learned_variance=learned,
            ),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_dtype", DTYPES)
def test_mixed_dtypes(
    backend: backends.Backend,
    generator: torch.Generator,
    dtype: torch.dtype,
    model_dtype: torch.dtype,
) -> None:
    for layout, history in (("contiguous", False), ("channels_last", True)):
        check(
            backend,
            make_case(
                generator,
                (2, 3, 8, 11),
                dtype=dtype,
                model_dtype=model_dtype,
                layout=layout,
                history=history,
                mask=history,
                noise="keyed",
                guided=True,
                model_input=model_dtype,
            ),
        )


@pytest.mark.parametrize("size", [0, 1, 3, 15, 16, 17, 63, 64, 65, 255, 1023, 1024, 1025, 4099])
def test_sizes(backend: backends.Backend, generator: torch.Generator, size: int) -> None:
    for batch, noise in itertools.product((1, 3), ("none", "given", "keyed")):
        check(backend, make_case(generator, (batch, size), noise=noise, mask=True, history=True))


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (2, 0, 4), (1,), (7,), (2, 1, 1, 1), (2, 3, 1, 4, 1, 2)]
)
def test_shapes(
    backend: backends.Backend, generator: torch.Generator, shape: tuple[int, ...]
) -> None:
    for noise in ("none", "given", "keyed"):
        check(backend, make_case(generator, shape, noise=noise))


def test_model_output_in_another_layout(
    backend: backends.Backend, generator: torch.Generator
) -> None:
    for layout, model_layout in itertools.permutations(LAYOUTS, 2):
        check(
            backend,
            make_case(
                generator,
                (2, 3, 4, 5),
                layout=layout,
                model_layout=model_layout,
                noise="keyed",
                learned_variance=True,
            ),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sliding_views(
    backend: backends.Backend, generator: torch.Generator, dtype: torch.dtype
) -> None:
    """Every alignment of input and output, sentinels on both sides."""
    values = torch.randn(200, generator=generator).to(dtype)
    base = make_case(generator, (1, 61), dtype=dtype, noise="keyed")
    expected = None
    for offset in range(0, 40, 3 if dtype == torch.float64 else 1):
        case = replace(base, x=values[:61][None], model_output=values[70:131][None])
        buffer = torch.full((200,), SENTINEL).to(dtype)
        x = buffer[offset : offset + 61][None]
        x.copy_(case.x)
        backend.update_out(
            x,
            case.model_output,
            case.table,
            case.row,
            noise=None,
            keys=case.keys,
            out=x,
            x_0=None,
            model_input=None,
        )
        assert written_only_inside(x, buffer)
        if expected is None:
            expected = run(backend.update_out, case).out
            check(backend, case)
        assert torch.equal(x, expected), f"another result at offset {offset}"


def any_case(data: st.DataObject, largest_batch: int = 9) -> Case:
    """Any combination of features."""
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


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_cases(data: st.DataObject) -> None:
    """Any combination of features, the instruction sets equal bit for bit."""
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(ops.EXTENSION_ERROR)
    case = any_case(data)
    check(backends.BACKENDS["cpu"], case)
    assert_same_bits(case)


def assert_same_bits(case: Case) -> None:
    library = ctypes.CDLL(fastddim._C.__file__)
    results = []
    try:
        for name in INSTRUCTION_SETS:
            if library.fastddim_use_instruction_set(name.encode()):
                results.append(run(backends.BACKENDS["cpu"].update_out, case))
    finally:
        library.fastddim_use_instruction_set(None)
    for other in results[1:]:
        for a, b in zip(results[0].tensors(), other.tensors(), strict=True):
            assert torch.equal(a, b), "instruction sets differ"


def test_noise_has_the_specified_bits(
    backend: backends.Backend, generator: torch.Generator
) -> None:
    """x = m = 0 and a noise coefficient of 1 leave z itself, for any layout."""
    for layout in LAYOUTS[:-1]:
        case = make_case(generator, (3, 5, 7, 9), layout=layout, noise="keyed")
        rows = torch.zeros_like(case.rows)
        rows[:, Row._fields.index("pn")] = 1
        zero = torch.zeros_like(case.x)
        silent = replace(case, x=zero, model_output=zero, rows=rows)
        expected = philox.normal(case.keys, case.x.shape[1:], philox.STEP_NOISE)
        assert torch.equal(run(backend.update_out, silent).out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", [philox.LATENTS, philox.STEP_NOISE])
def test_normals(
    backend: backends.Backend, generator: torch.Generator, dtype: torch.dtype, stream: int
) -> None:
    for layout, shape in itertools.product(LAYOUTS[:-1], [(3, 5, 7, 9), (2, 0), (4,), (1, 5003)]):
        case = make_case(generator, shape, dtype=dtype, layout=layout, noise="keyed")
        out, buffer = poisoned_like(case.x)
        backend.normal_out(case.keys, stream, out)
        assert torch.equal(out, philox.normal(case.keys, shape[1:], stream).to(dtype))
        assert written_only_inside(out, buffer)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 9])
def test_noise_of_interleaved_channels(
    backend: backends.Backend, generator: torch.Generator, channels: int
) -> None:
    """Several tiles of pixels, their edges at any channel and at any place in a quad."""
    for pixels in [(1, 1), (7, 9), (31, 43), (64, 65)]:
        shape = (2, channels, *pixels)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            case = make_case(
                generator, shape, dtype=dtype, layout="channels_last", noise="keyed", history=True
            )
            out = torch.full_like(case.x, float("nan"))
            backend.normal_out(case.keys, philox.STEP_NOISE, out)
            expected = philox.normal(case.keys, shape[1:], philox.STEP_NOISE).to(dtype)
            assert torch.equal(out, expected)
            got = run(backend.update_out, case)
            assert_accurate(case, got)
            row_major = replace(
                case,
                x=case.x.contiguous(),
                model_output=case.model_output.contiguous(),
                history=case.history.contiguous(),
            )
            assert torch.equal(got.out, run(backend.update_out, row_major).out)


def test_no_noise_is_read_where_its_coefficient_is_zero(
    backend: backends.Backend, generator: torch.Generator
) -> None:
    case = make_case(generator, (2, 50), noise="given")
    quiet = case.rows.clone()
    quiet[:, Row._fields.index("pn")] = 0
    nan = torch.full_like(case.x, float("nan"))
    assert run(backend.update_out, replace(case, rows=quiet, noise=nan)).out.isfinite().all()
    assert run(backend.update_out, replace(case, noise=nan)).out.isnan().all()


def test_nan_passes_through_the_clip(backend: backends.Backend, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        case = make_case(generator, (1, 70), dtype=dtype, clip=1.0, rederive_eps=True)
        case.model_output[0, ::3] = float("nan")
        got = run(backend.update_out, case)
        for result in (got.out, got.x_0):
            assert result[0, ::3].isnan().all()
            assert result[0, 1::3].isfinite().all()


def test_clip_holds_infinity(backend: backends.Backend, generator: torch.Generator) -> None:
    case = make_case(generator, (1, 40), clip=0.5)
    case.model_output[0, 0], case.model_output[0, 1] = float("inf"), float("-inf")
    assert run(backend.update_out, case).x_0[0, :2].tolist() == [-0.5, 0.5]


def test_thread_counts_give_the_same_bits(generator: torch.Generator) -> None:
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(ops.EXTENSION_ERROR)
    before = torch.get_num_threads()
    cases = [
        make_case(generator, (5, 3, 150, 150), noise="keyed"),
        make_case(generator, (3000, 112), noise="keyed"),
        make_case(generator, (2, 3, 260, 260), noise="none", layout="channels_last"),
    ]
    try:
        for case in cases:
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run(backends.BACKENDS["cpu"].update_out, case))
            for other in results[1:]:
                assert torch.equal(results[0].out, other.out)
    finally:
        torch.set_num_threads(before)


def test_concurrent_calls(generator: torch.Generator) -> None:
    """Eight threads at once get what one gets alone."""
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(ops.EXTENSION_ERROR)
    update_out = backends.BACKENDS["cpu"].update_out
    cases = [make_case(generator, (4, 3, 64, 64), noise="keyed") for _ in range(8)]
    alone = [run(update_out, case).out for case in cases]
    together: list[list[Tensor]] = [[] for _ in cases]

    def work(i: int) -> None:
        for _ in range(10):
            together[i].append(run(update_out, cases[i]).out)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, results in zip(alone, together, strict=True):
        assert len(results) == 10
        assert all(torch.equal(expected, result) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_closer_than_diffusers(
    backend: backends.Backend, generator: torch.Generator, dtype: torch.dtype
) -> None:
    """One rounding beats a rounding after every operation, on the same inputs."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    x = torch.randn((4, 4, 32, 32), generator=generator).to(dtype)
    m = torch.randn((4, 4, 32, 32), generator=generator).to(dtype)
    for t in (980, 500, 20):
        a = scheduler.alphas_cumprod[t].item()
        p = scheduler.alphas_cumprod[t - 20].item() if t >= 20 else 1.0
        rows = stack_row(coefficient_row(a, p, Update()))[None]
        case = Case(x=x, model_output=m, rows=rows, row=torch.zeros(1, dtype=torch.int64))
        truth = reference.update(x.double(), m.double(), rows, None)
        theirs = scheduler.step(m, t, x)
        ours = run(backend.update_out, case)
        for got, peer, exact_values in (
            (ours.out, theirs.prev_sample, truth[0]),
            (ours.x_0, theirs.pred_original_sample, truth[1]),
        ):
            error, peer_error = ((v.double() - exact_values).abs().mean() for v in (got, peer))
            assert error < peer_error
