"""Every backend against the reference, and the compiled ones against each other bit for bit.

One body (`check`) serves all backends. A case is a full set of arguments of `update_out`; outputs
are poisoned and lie between sentinels, so that an element left out or written beyond the end shows.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim
from fastddim import backends, ops, philox, reference
from fastddim.plan import PREDICTIONS, Update, coefficient_row, stack_row

from .support.accuracy import assert_accurate, check
from .support.special_values import FACTS
from .support.updates import (
    DTYPES,
    INSTRUCTION_SETS,
    LAYOUTS,
    SENTINEL,
    Case,
    any_case,
    backend,
    make_case,
    poisoned_like,
    run,
    written_only_inside,
)

__all__ = ["backend"]


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
    """Views slide through every alignment of input and output, with sentinels on both sides."""
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", ["none", "keyed"])
def test_the_first_row_needs_no_index(
    backend: backends.Backend, generator: torch.Generator, dtype: torch.dtype, noise: str
) -> None:
    for layout, guided in (("contiguous", False), ("channels_last", True), ("offset", True)):
        case = make_case(
            generator, (3, 3, 9, 7), dtype=dtype, layout=layout, noise=noise, guided=guided
        )

        def update_out(x: Tensor, m: Tensor, *rows: Tensor, case: Case = case, **rest: Any) -> None:
            backend.update_out(x, m, *case.alone, **rest)

        assert case.alone[1] is None
        got, expected = run(update_out, case), run(backend.update_out, case)
        for a, b in zip(got.tensors(), expected.tensors(), strict=True):
            assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_cases(data: st.DataObject) -> None:
    """Any combination of features is right, and the instruction sets are equal bit for bit."""
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


@pytest.mark.parametrize("hold", FACTS, ids=lambda fact: fact.__name__)
def test_special_values(
    backend: backends.Backend,
    generator: torch.Generator,
    hold: Callable[[backends.Backend, torch.Generator], None],
) -> None:
    hold(backend, generator)


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
    """Noise of interleaved channels takes several tiles of pixels, with edges at any channel and at
    any place in a quad.
    """
    for pixels in [(1, 1), (7, 9), (31, 43), (64, 65)]:
        shape = (2, channels, *pixels)
        small = pixels != (64, 65)
        for dtype in (torch.float32, *((torch.float64, torch.bfloat16) if small else ())):
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
    """Eight threads at once get the results that one gets alone."""
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
    """Half precision is closer than diffusers: one rounding beats a rounding after every operation,
    on the same inputs.
    """
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
