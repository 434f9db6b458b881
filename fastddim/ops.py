"""The update as PyTorch operators: schemas, fakes and gradients, each in one place.

`fastddim::update_out` writes into tensors it is given; `fastddim::update` returns new ones and is
differentiable; `fastddim::fit_rows` takes factors of coefficients from the data;
`fastddim::normal_out` draws; `fastddim::advance` moves a loop to its next step. Compiled backends
implement `update_out`, `backward_out`, `fit_rows`, `normal_out` and `advance`, or some of them;
the others run the reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddim.backends import reference
from fastddim.philox import Keys
from fastddim.plan import Fit, Row

_INPUTS = (
    "Tensor x, Tensor model_output, Tensor table, Tensor row, Tensor? noise, "
    "Tensor? seed, Tensor? step, Tensor? sample, Tensor? history, Tensor? mask, Tensor? known"
)

_library = torch.library.Library("fastddim", "DEF")
_library.define(
    f"update_out({_INPUTS}, Tensor(a!) out, Tensor(b!)? x_0, Tensor(c!)? model_input, "
    "Tensor(d!)? epsilon) -> ()"
)
_library.define(f"update({_INPUTS}) -> (Tensor x_prev, Tensor x_0)")
_library.define(
    "step(Tensor x, Tensor model_output, Tensor table, Tensor row, Tensor? noise) "
    "-> (Tensor x_prev, Tensor x_0)"
)
_library.define(
    "backward_out(Tensor? grad_x_prev, Tensor? grad_x_0, Tensor x, Tensor model_output, "
    "Tensor table, Tensor row, Tensor? mask, Tensor(a!) grad_x, Tensor(b!) grad_model_output) -> ()"
)
_library.define(
    "backward(Tensor? grad_x_prev, Tensor? grad_x_0, Tensor x, Tensor model_output, "
    "Tensor table, Tensor row, Tensor? mask) -> (Tensor grad_x, Tensor grad_model_output)"
)
_library.define(
    "normal_out(Tensor seed, Tensor step, Tensor sample, int stream, Tensor(a!) out) -> ()"
)
_library.define(
    "fit_rows(Tensor x, Tensor model_output, Tensor table, Tensor row, float rescale, float ratio, "
    "float limit, Tensor(a!) out) -> ()"
)
_library.define("advance(Tensor(a!) counters, Tensor timesteps, Tensor(b!) t) -> ()")
_library.define(
    "make_loop_step(Tensor state, Tensor model_output, Tensor table, Tensor row, Tensor? seed, "
    "Tensor? step, Tensor? sample, Tensor? history, Tensor? model_input, Tensor counters, "
    "Tensor timesteps, Tensor t) -> int"
)

# Resolved once: looking an overload up costs a tenth of a small update.
_advance_op = torch.ops.fastddim.advance.default
_step_op = torch.ops.fastddim.step.default

EXTENSION_ERROR: str | None = None
"""Why the compiled extension cannot be used, or None where it can."""

try:
    # Registers the CPU implementations.
    importlib.import_module("fastddim._C")
except ImportError as error:
    EXTENSION_ERROR = f"the compiled extension is missing ({error})"


def update_out_through(operator: Callable[..., None]) -> Callable[..., None]:
    """`update_out` of a backend whose operator has the schema of `fastddim::update_out`."""

    def update_out(
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor,
        *,
        noise: Tensor | None,
        keys: Keys | None,
        history: Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        out: Tensor,
        x_0: Tensor | None,
        model_input: Tensor | None,
        epsilon: Tensor | None = None,
    ) -> None:
        """One update into `out`, by the implementation compiled for the device; the arguments are
        those of `fastddim.backends.Backend.update_out`.

        Raises:
            RuntimeError: grad mode is on and an input requires grad (`torch.ops.fastddim.update` is
                differentiable), or a tensor does not fit.
        """
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for tensor in (x, model_output, noise, history, mask, known, out)
        ):
            raise RuntimeError(
                "out: writing into a given tensor is not differentiable; "
                "call without out=, or under torch.no_grad()"
            )
        seed, step, sample = keys if keys is not None else (None, None, None)
        operator(
            x,
            model_output,
            table,
            row,
            noise,
            seed,
            step,
            sample,
            history,
            mask,
            known,
            out,
            x_0,
            model_input,
            epsilon,
        )

    return update_out


update_out = update_out_through(torch.ops.fastddim.update_out.default)
"""See `fastddim.backends.Backend.update_out`. Refuses an input that requires grad in grad mode."""


def step(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x_prev, x_0) in new tensors, without gradients; for the arguments see
    `fastddim.backends.Backend.update_out`.
    """
    results: tuple[Tensor, Tensor] = _step_op(x, model_output, table, row, noise)
    return results


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """See `fastddim.backends.Backend.normal_out`."""
    torch.ops.fastddim.normal_out(*keys, stream, out)


def fit_rows(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, fit: Fit, out: Tensor
) -> None:
    """See `fastddim.backends.Backend.fit_rows`."""
    torch.ops.fastddim.fit_rows(x, model_output, table, row, *fit, out)


def advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    """See `fastddim.backends.Backend.advance`."""
    _advance_op(counters, timesteps, t)


@torch.library.impl(_library, "advance", "CompositeExplicitAutograd")
def _advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    reference.advance(counters, timesteps, t)


@torch.library.impl(_library, "fit_rows", "CompositeExplicitAutograd")
def _fit_rows(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    rescale: float,
    ratio: float,
    limit: float,
    out: Tensor,
) -> None:
    reference.fit_rows(x, model_output, table, row, Fit(rescale, ratio, limit), out)


@torch.library.impl(_library, "normal_out", "CompositeExplicitAutograd")
def _normal_out(seed: Tensor, step: Tensor, sample: Tensor, stream: int, out: Tensor) -> None:
    reference.normal_out(Keys(seed, step, sample), stream, out)


@torch.library.impl(_library, "update_out", "CompositeExplicitAutograd")
def _update_out(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    sample: Tensor | None,
    history: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    out: Tensor,
    x_0: Tensor | None,
    model_input: Tensor | None,
    epsilon: Tensor | None,
) -> None:
    reference.update_out(
        x,
        model_output,
        table,
        row,
        noise=noise,
        keys=_keys(seed, step, sample),
        history=history,
        mask=mask,
        known=known,
        out=out,
        x_0=x_0,
        model_input=model_input,
        epsilon=epsilon,
    )


def _keys(seed: Tensor | None, step: Tensor | None, sample: Tensor | None) -> Keys | None:
    if seed is None or step is None or sample is None:
        return None
    return Keys(seed, step, sample)


@torch.library.impl(_library, "update", "CompositeExplicitAutograd")
def _update(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    x_prev, x_0 = torch.empty_like(x), torch.empty_like(x)
    torch.ops.fastddim.update_out(x, *inputs, x_prev, x_0, None, None)
    return x_prev, x_0


@torch.library.impl(_library, "step", "CompositeExplicitAutograd")
def _step(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    inputs = (x, model_output, table, row, noise, *(None,) * 6)
    x_prev, x_0 = torch.empty_like(x), torch.empty_like(x)
    torch.ops.fastddim.update_out(*inputs, x_prev, x_0, None, None)
    return x_prev, x_0


@torch.library.impl(_library, "backward_out", "CompositeExplicitAutograd")
def _backward_out(
    grad_x_prev: Tensor | None,
    grad_x_0: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    mask: Tensor | None,
    grad_x: Tensor,
    grad_model_output: Tensor,
) -> None:
    known = None if mask is None else torch.zeros_like(x)
    with torch.enable_grad():
        inputs = (x.detach().requires_grad_(), model_output.detach().requires_grad_())
        outputs = reference.update(
            *inputs, table, row, noise=None, keys=None, mask=mask, known=known
        )
        pairs = [
            (o, g) for o, g in zip(outputs, (grad_x_prev, grad_x_0), strict=True) if g is not None
        ]
        grads = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs])
    grad_x.copy_(grads[0])
    grad_model_output.copy_(grads[1])


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(
    grad_x_prev: Tensor | None, grad_x_0: Tensor | None, x: Tensor, model_output: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    # Channels that are not read (learned variance) have no gradient and are not written.
    grad_x, grad_model_output = torch.empty_like(x), torch.zeros_like(model_output)
    torch.ops.fastddim.backward_out(
        grad_x_prev, grad_x_0, x, model_output, *rest, grad_x, grad_model_output
    )
    return grad_x, grad_model_output


def _fake_out(*inputs: Any) -> None:
    return None


def _fake_update(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _fake_backward(
    grad_x_prev: Any, grad_x_0: Any, x: Tensor, model_output: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(model_output)


for _name, _fake in (
    ("update_out", _fake_out),
    ("backward_out", _fake_out),
    ("normal_out", _fake_out),
    ("advance", _fake_out),
    ("fit_rows", _fake_out),
    ("update", _fake_update),
    ("step", _fake_update),
    ("backward", _fake_backward),
):
    torch.library.register_fake(f"fastddim::{_name}", _fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, model_output, table, row, noise, _, _, _, history, mask, known = inputs
    if mask is not None and mask.requires_grad:
        raise NotImplementedError("mask: expected a tensor that does not require grad")
    ctx.save_for_backward(x, model_output, table, row, mask)
    ctx.dtypes = [None if other is None else other.dtype for other in (noise, history, known)]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_x_prev: Tensor | None, grad_x_0: Tensor | None) -> tuple[Any, ...]:
    x, model_output, table, row, mask = ctx.saved_tensors
    grads = dict.fromkeys(("x", "model_output", "noise", "history", "known"))
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grads["x"], grads["model_output"] = torch.ops.fastddim.backward(
            grad_x_prev, grad_x_0, x, model_output, table, row, mask
        )
    if grad_x_prev is not None:
        columns = table.index_select(0, row).reshape(-1, len(Row._fields), *[1] * (x.ndim - 1))
        pn, ph = (columns[:, Row._fields.index(name)] for name in ("pn", "ph"))
        kept = grad_x_prev if mask is None else grad_x_prev * (1 - mask)
        known = None if mask is None else grad_x_prev * mask
        grads |= {"noise": pn * kept, "history": ph * kept, "known": known}
    for name, dtype in zip(("noise", "history", "known"), ctx.dtypes, strict=True):
        grad = grads[name]
        grads[name] = None if grad is None or dtype is None else grad.to(dtype)
    return (
        grads["x"],
        grads["model_output"],
        None,
        None,
        grads["noise"],
        *(None,) * 3,
        grads["history"],
        None,
        grads["known"],
    )


torch.library.register_autograd(
    "fastddim::update", _gradients, setup_context=_setup_context, lib=_library
)


def update_through(
    operator: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`update` of a backend whose operator has the schema of `fastddim::update`."""

    def update(
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor,
        *,
        noise: Tensor | None,
        keys: Keys | None,
        history: Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x_0); see `fastddim.backends.Backend.update`."""
        seed, step, sample = keys if keys is not None else (None, None, None)
        inputs = (x, model_output, table, row, noise, seed, step, sample, history, mask, known)
        return operator(*inputs)

    return update


update = update_through(torch.ops.fastddim.update.default)
"""See `fastddim.backends.Backend.update`."""
