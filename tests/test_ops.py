"""The operators as PyTorch sees them: registration, gradients, tracing, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import backends, ops, philox
from fastddim.plan import Rescaling, Row, Update, coefficient_row, stack_row

OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def inputs(
    dtype: torch.dtype = torch.float64,
    *,
    guided: bool = False,
    learned: bool = False,
    channels_last: bool = False,
    requires_grad: bool = False,
    noise: str = "given",
    clip: float | None = 0.8,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        return values.requires_grad_(requires_grad)

    update = Update(eta=0.7, clip=clip, guidance_scale=2.5 if guided else None)
    rows = [coefficient_row(a, p, update)._replace(ph=0.2) for a, p in ((0.3, 0.5), (0.4, 0.9))]
    table = torch.stack([stack_row(row) for row in rows])
    return {
        "x": draw(2, 3, 4, 5),
        "model_output": draw(4 if guided else 2, 6 if learned else 3, 4, 5),
        "table": table.to(torch.float64 if dtype == torch.float64 else torch.float32),
        "row": torch.tensor([1, 0]),
        "noise": draw(2, 3, 4, 5) if noise == "given" else None,
        "keys": philox.make_keys(5, 2, step_index=4) if noise == "keyed" else None,
        "history": draw(2, 3, 4, 5),
        "mask": torch.rand((2, 3, 4, 5), generator=generator).to(dtype),
        "known": draw(2, 3, 4, 5),
    }


def positional(arguments: dict[str, Any]) -> tuple[Any, ...]:
    keys = arguments["keys"] or (None, None, None)
    before = [arguments[name] for name in ("x", "model_output", "table", "row", "noise")]
    return *before, *keys, *(arguments[name] for name in ("history", "mask", "known"))


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [
        (torch.float32, False),
        (torch.bfloat16, True),
        *(
            pytest.param(dtype, channels_last, marks=pytest.mark.deep)
            for dtype, channels_last in itertools.product(
                (torch.float64, torch.float32, torch.float16, torch.bfloat16), (False, True)
            )
            if (dtype, channels_last) not in ((torch.float32, False), (torch.bfloat16, True))
        ),
    ],
)
def test_opcheck(dtype: torch.dtype, channels_last: bool) -> None:
    for noise in ("given", "keyed"):
        arguments = inputs(dtype, guided=True, channels_last=channels_last, noise=noise)
        if noise == "keyed":
            arguments["row"] = None
        x = arguments["x"]
        outputs = (*(torch.zeros_like(x) for _ in range(2)), torch.zeros(4, 3, 4, 5), x * 0)
        torch.library.opcheck(
            torch.ops.fastddim.update_out.default,
            (*positional(arguments), *outputs),
            test_utils=OPCHECK,
        )
        torch.library.opcheck(
            torch.ops.fastddim.update.default, positional(arguments), test_utils=OPCHECK
        )
        with_grad = inputs(
            dtype, guided=True, channels_last=channels_last, noise=noise, requires_grad=True
        )
        torch.library.opcheck(
            torch.ops.fastddim.update.default, positional(with_grad), test_utils=OPCHECK
        )


def test_opcheck_of_fitted_rows() -> None:
    arguments = inputs(torch.float32, guided=True)
    before = [arguments[name] for name in ("x", "model_output", "table", "row")]
    torch.library.opcheck(
        torch.ops.fastddim.fit_rows.default,
        (*before, 0.5, 0.9, 3.0, torch.zeros(2, len(Row._fields))),
        test_utils=OPCHECK,
    )


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded", "none"])
def test_step_makes_what_update_out_writes(noise: bool, layout: str) -> None:
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda v: v,
        "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
        "sliced": lambda v: v[..., 1::2],
        "expanded": lambda v: v[:, :1].expand(v.shape),
        "none": lambda v: v[:, :0],
    }
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        arguments = inputs(dtype)
        x, m, z = (change[layout](arguments[name]) for name in ("x", "model_output", "noise"))
        given = (x, m, arguments["table"], arguments["row"])
        got = ops.step(*given, z if noise else None)
        expected = [torch.empty_like(x) for _ in range(2)]
        ops.update_out(
            *given,
            noise=z if noise else None,
            keys=None,
            out=expected[0],
            x_0=expected[1],
            model_input=None,
        )
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
            assert a.dtype == dtype


def test_opcheck_of_step() -> None:
    arguments = inputs(torch.float32)
    given = tuple(arguments[name] for name in ("x", "model_output", "table", "row", "noise"))
    torch.library.opcheck(torch.ops.fastddim.step.default, given, test_utils=OPCHECK)


def test_opcheck_of_normals() -> None:
    arguments = (*philox.make_keys(5, 2), philox.LATENTS, torch.zeros(2, 3, 4))
    torch.library.opcheck(torch.ops.fastddim.normal_out.default, arguments, test_utils=OPCHECK)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_gradients_are_those_of_finite_differences(
    guided: bool, learned: bool, clip: float | None
) -> None:
    arguments = inputs(guided=guided, learned=learned, clip=clip, requires_grad=True)
    names = ("x", "model_output", "noise", "history", "known")

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.update(**{**arguments, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(both, tuple(arguments[name] for name in names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_the_reference(dtype: torch.dtype) -> None:
    for guided, learned, rows in ((False, False, 0), (True, True, 1)):
        grads = []
        for backend in (backends.BACKENDS["reference"], ops):
            arguments = inputs(dtype, guided=guided, learned=learned, requires_grad=True)
            arguments["row"] = torch.tensor([rows])
            x_prev, x_0 = backend.update(**arguments)
            generator = torch.Generator().manual_seed(9)
            weights = (torch.randn(x_prev.shape, generator=generator).to(dtype) for _ in range(2))
            torch.autograd.backward((x_prev, x_0), list(weights))
            names = ("x", "model_output", "noise", "history", "known")
            grads.append({name: arguments[name].grad for name in names})
        for name, expected in grads[0].items():
            got = grads[1][name]
            tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_step_is_differentiable() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    m = torch.randn(2, 3, requires_grad=True)
    fastddim.step(x, m, 0.25, 0.64, clip=100.0).sum().backward()
    # x_prev = √p·(x − √(1−a)·m)/√a + √(1−p)·m at a = 0.25, p = 0.64
    torch.testing.assert_close(x.grad, torch.full((2, 3), 0.8 / 0.5))
    torch.testing.assert_close(m.grad, torch.full((2, 3), -0.8 * 0.75**0.5 / 0.5 + 0.6))


def test_no_gradient_where_the_clip_acts() -> None:
    for impl in ("reference", "auto"):
        x = torch.tensor([[5.0, 0.1]], requires_grad=True)
        x_prev, x_0 = fastddim.step(
            x, torch.zeros(1, 2), 0.25, 1.0, clip=1.0, return_x0=True, impl=impl
        )
        (x_prev + x_0).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[0.0, 4.0]]


def test_mask_has_a_gradient() -> None:
    arguments = inputs(requires_grad=True)
    mask = arguments["mask"].double()

    def both(mask: Tensor) -> tuple[Tensor, Tensor]:
        return ops.update(**{**arguments, "mask": mask})

    assert torch.autograd.gradcheck(both, mask.requires_grad_())


def test_writing_into_out_refuses_gradients() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"out: .*not differentiable"):
        fastddim.step(x, torch.zeros(2, 3), 0.5, 0.7, out=torch.empty(2, 3))
    with torch.no_grad():
        out = torch.empty(2, 3)
        assert fastddim.step(x, torch.zeros(2, 3), 0.5, 0.7, out=out) is out
    with torch.inference_mode():
        fastddim.step(x, torch.zeros(2, 3), 0.5, 0.7)


@pytest.mark.parametrize("mode", ["number", "tensor", "out"])
def test_step_compiles_in_one_graph(mode: str) -> None:
    def step(x: Tensor, m: Tensor) -> Any:
        if mode == "out":
            return fastddim.step(x, m, 0.5, 0.7, eta=1.0, seed=3, out=torch.empty_like(x))
        a, p = (0.5, 0.7) if mode == "number" else (torch.tensor([0.5, 0.4]), 0.7)
        return fastddim.step(x, m, a, p, clip=1.0, eta=0.5, seed=3, return_x0=True)

    x, m = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, m), step(x, m), rtol=0, atol=0)


def test_operators_export() -> None:
    arguments = inputs(torch.float32, noise="keyed")

    class Step(torch.nn.Module):
        def forward(self, x: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
            return ops.update(**{**arguments, "x": x, "model_output": model_output})

    example = (arguments["x"], arguments["model_output"])
    exported = torch.export.export(Step(), example)
    torch.testing.assert_close(exported.module()(*example), Step()(*example), rtol=0, atol=0)


def test_meta_tensors_give_shapes_only() -> None:
    arguments = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in inputs(torch.float32, noise="none").items()
    }
    x_prev, x_0 = ops.update(**arguments)
    assert x_prev.device.type == "meta"
    assert x_prev.shape == x_0.shape == (2, 3, 4, 5)


@pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=str(ops.EXTENSION_ERROR))
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_output", torch.zeros(2, 3, 4, 6, dtype=torch.float64), "expected size 5 in dim"),
        ("model_output", torch.zeros(3, 3, 4, 5, dtype=torch.float64), "expected size 4 in dim"),
        ("model_output", torch.zeros(2, 3, 4, 5, dtype=torch.int64), "floating-point"),
        ("table", torch.zeros(2, len(Row._fields)), "expected dtype Double"),
        ("table", torch.zeros(2, 3, dtype=torch.float64), "expected a contiguous tensor"),
        ("row", torch.tensor([0, 2]), r"expected values in \[0, 2\), got 2"),
        ("row", torch.tensor([-1]), r"expected values in \[0, 2\), got -1"),
        ("row", torch.tensor([0, 0, 0]), "expected a contiguous int64"),
        ("noise", torch.zeros(2, 3, 4, dtype=torch.float64), "expected 4 dimensions, got 3"),
        ("known", None, "expected both"),
    ],
)
def test_the_compiled_operator_refuses_what_does_not_fit(
    name: str, value: Any, message: str
) -> None:
    arguments = {**inputs(noise="none"), name: value}
    out = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
        ops.update_out(**arguments, out=out, x_0=None, model_input=None)
    assert not out.any()


@pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=str(ops.EXTENSION_ERROR))
def test_a_table_without_rows_has_no_first() -> None:
    arguments = {**inputs(noise="none"), "table": torch.zeros(0, len(Row._fields)).double()}
    out = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="table: expected at least one row, got none"):
        ops.update_out(**{**arguments, "row": None}, out=out, x_0=None, model_input=None)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_indices_the_first_row_is_that_of_all(requires_grad: bool) -> None:
    """Without indices, the first row is that of all samples, in every operator that takes indices,
    gradients included.
    """
    results: list[list[Tensor]] = []
    for alone in (False, True):
        given = inputs(torch.float32, guided=True, requires_grad=requires_grad)
        own = {"table": given["table"][1:], "row": None} if alone else {"row": torch.tensor([1])}
        given |= own
        got = [*ops.update(**given)]
        if requires_grad:
            leaves = [given[name] for name in ("x", "model_output", "noise", "history", "known")]
            got += torch.autograd.grad(got[0].square().sum() + got[1].sum(), leaves)
        x, m, table, row = (given[name] for name in ("x", "model_output", "table", "row"))
        got += ops.step(x, m, table, row, given["noise"])
        fitted = torch.empty(2, len(Row._fields))
        ops.rescale_rows(x, m, table, row, Rescaling(0.5, 0.9, 3.0), fitted)
        results.append([*got, fitted])
    assert len(results[0]) == (10 if requires_grad else 5)
    assert all(map(torch.equal, *results))
