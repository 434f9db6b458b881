"""The update as PyTorch operators: schemas and fakes, each in one place.

`fastddim::update_out` writes into tensors it is given. `fastddim::update` returns new ones; its
derivatives are in `fastddim.derivatives`. `fastddim::fit_rows` takes factors of coefficients from
the data, `fastddim::normal_out` draws normals, and `fastddim::advance` moves a loop to its next
step. The compiled extension implements `update_out`, `backward_out`, `fit_rows`, `normal_out` and
`advance`, or some of them; `fastddim.backends.reference` implements those that it does not.
"""

from __future__ import annotations

import importlib
import string
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastddim.extension import why_missing
from fastddim.philox import Keys
from fastddim.plan import Rescaling


class Inputs(NamedTuple):
    """The tensors that an update reads, in the order of the schemas.

    `fastddim.backends.Backend.update_out` explains each; `seed`, `step` and `sample` are its keys.
    """

    x: Tensor
    model_output: Tensor
    table: Tensor
    row: Tensor | None = None
    noise: Tensor | None = None
    seed: Tensor | None = None
    step: Tensor | None = None
    sample: Tensor | None = None
    history: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None

    @property
    def keys(self) -> Keys | None:
        """The keys of noise that the kernel draws, or None where it is given or there is none."""
        if self.seed is None or self.step is None or self.sample is None:
            return None
        return Keys(self.seed, self.step, self.sample)


class Outputs(NamedTuple):
    """The tensors that an update writes, in the order of the schemas."""

    out: Tensor
    x_0: Tensor | None = None
    model_input: Tensor | None = None
    epsilon: Tensor | None = None


LoopStep: TypeAlias = Callable[[Tensor], bool]
"""A loop's step: `take(output)` updates the state in place (and history and model input), advances
the counters and returns True. Where `output` has another layout, it does nothing and returns False.
"""


class Blending(NamedTuple):
    """The tensors of masked steps alone: those that they read, and `known`, which they write first.

    Attributes:
        mask: weight of the known data in the state; like the state.
        known: the data at the noise level after the step; like the state, written.
        data: the known data; like the state.
        x_T: the latents that they are mixed with; like the state.
        known_table: the rows `[R, K]` of updates of `data` into `known`, without noise and with
            `x_T` as the model output.
        known_row: int64 `[1]` or `[B]`, the row of each sample.
    """

    mask: Tensor
    known: Tensor
    data: Tensor
    x_T: Tensor
    known_table: Tensor
    known_row: Tensor


def split_operands(operands: tuple[Any, ...]) -> tuple[Inputs, Outputs]:
    """The inputs and outputs among the arguments of `fastddim::update_out`."""
    count = len(Inputs._fields)
    return Inputs(*operands[:count]), Outputs(*operands[count:])


def _arguments(operands: type[Inputs] | type[Outputs]) -> str:
    """The operands as a schema lists them; each that is written has an alias of its own."""
    arguments = []
    for letter, name in zip(string.ascii_lowercase, operands._fields, strict=False):
        alias = f"({letter}!)" if operands is Outputs else ""
        optional = "?" if name in operands._field_defaults else ""
        arguments.append(f"Tensor{alias}{optional} {name}")
    return ", ".join(arguments)


_INPUTS = _arguments(Inputs)

_library = torch.library.Library("fastddim", "DEF")
_library.define(f"update_out({_INPUTS}, {_arguments(Outputs)}) -> ()")
_library.define(f"update({_INPUTS}) -> (Tensor x_prev, Tensor x_0)")
_library.define(
    "step(Tensor x, Tensor model_output, Tensor table, Tensor? row, Tensor? noise) "
    "-> (Tensor x_prev, Tensor x_0)"
)
_library.define(
    "backward_out(Tensor? grad_x_prev, Tensor? grad_x_0, Tensor x, Tensor model_output, "
    "Tensor table, Tensor? row, Tensor? mask, Tensor(a!) grad_x, Tensor(b!) grad_model_output) "
    "-> ()"
)
_library.define(
    "backward(Tensor? grad_x_prev, Tensor? grad_x_0, Tensor x, Tensor model_output, "
    "Tensor table, Tensor? row, Tensor? mask) -> (Tensor grad_x, Tensor grad_model_output)"
)
_library.define(
    "normal_out(Tensor seed, Tensor step, Tensor sample, int stream, Tensor(a!) out) -> ()"
)
_library.define(
    "fit_rows(Tensor x, Tensor model_output, Tensor table, Tensor? row, float rescale, "
    "float ratio, float limit, Tensor(a!) out) -> ()"
)
_library.define("advance(Tensor(a!) counters, Tensor timesteps, Tensor(b!) t) -> ()")
_library.define(
    "make_loop_step(Tensor state, Tensor model_output, Tensor table, Tensor row, Tensor? seed, "
    "Tensor? step, Tensor? sample, Tensor? history, Tensor? model_input, Tensor counters, "
    "Tensor timesteps, Tensor t, Tensor? mask=None, Tensor? known=None, Tensor? data=None, "
    "Tensor? x_T=None, Tensor? known_table=None, Tensor? known_row=None) -> int"
)

# Resolved once: looking an overload up costs a tenth of a small update.
_advance_op = torch.ops.fastddim.advance.default
_normal_op = torch.ops.fastddim.normal_out.default
_step_op = torch.ops.fastddim.step.default

EXTENSION_ERROR: str | None = None
"""The reason that the compiled extension cannot be used, or None where it can."""

try:
    # Registers the CPU implementations.
    importlib.import_module("fastddim._C")
except ImportError as error:
    EXTENSION_ERROR = why_missing(error)


def update_out_through(
    operator: Callable[..., None], *, differentiable: bool = False
) -> Callable[..., None]:
    """`update_out` of a backend, by an operator that takes the arguments of `fastddim::update_out`.

    Unless the operator is differentiable, an input that requires grad is refused in grad mode.
    """

    def update_out(
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor | None,
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
        """One update into `out`; the arguments are those of `fastddim.backends.Backend.update_out`.

        Raises:
            RuntimeError: grad mode is on and an input requires grad (`torch.ops.fastddim.update` is
                differentiable), or a tensor does not fit.
        """
        if (
            not differentiable
            and torch.is_grad_enabled()
            and any(
                tensor is not None and tensor.requires_grad
                for tensor in (x, model_output, noise, history, mask, known, out)
            )
        ):
            raise RuntimeError(
                "out: writing into a given tensor is not differentiable; "
                "call without out=, or under torch.no_grad()"
            )
        seed, step, sample = keys if keys is not None else (None, None, None)
        # Passed one by one: a tuple of them costs a small update 4 % of its time.
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


def update_through(
    operator: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`update` of a backend, by an operator that takes the arguments of `fastddim::update`."""

    def update(
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor | None,
        *,
        noise: Tensor | None,
        keys: Keys | None,
        **others: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x_0); see `fastddim.backends.Backend.update`."""
        drawn = {} if keys is None else keys._asdict()
        return operator(*Inputs(x, model_output, table, row, noise, **drawn, **others))

    return update


update = update_through(torch.ops.fastddim.update.default)
"""See `fastddim.backends.Backend.update`."""


def step(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x_prev, x_0) in new tensors, without gradients.

    The arguments are those of `fastddim.backends.Backend.update_out`.
    """
    results: tuple[Tensor, Tensor] = _step_op(x, model_output, table, row, noise)
    return results


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """See `fastddim.backends.Backend.normal_out`."""
    _normal_op(*keys, stream, out)


def rescale_rows(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    rescaling: Rescaling,
    out: Tensor,
) -> None:
    """See `fastddim.backends.Backend.rescale_rows`."""
    torch.ops.fastddim.fit_rows(x, model_output, table, row, *rescaling, out)


def advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    """See `fastddim.backends.Backend.advance`."""
    _advance_op(counters, timesteps, t)


@torch.library.impl(_library, "update", "CompositeExplicitAutograd")
def _update(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    x_prev, x_0 = torch.empty_like(x), torch.empty_like(x)
    torch.ops.fastddim.update_out(x, *inputs, *Outputs(x_prev, x_0))
    return x_prev, x_0


@torch.library.impl(_library, "step", "CompositeExplicitAutograd")
def _step(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    inputs = Inputs(x, model_output, table, row, noise)
    x_prev, x_0 = torch.empty_like(x), torch.empty_like(x)
    torch.ops.fastddim.update_out(*inputs, *Outputs(x_prev, x_0))
    return x_prev, x_0


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(
    grad_x_prev: Tensor | None, grad_x_0: Tensor | None, x: Tensor, model_output: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    grads = new_gradients(x, model_output)
    torch.ops.fastddim.backward_out(grad_x_prev, grad_x_0, x, model_output, *rest, *grads)
    return grads


def new_gradients(x: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for the gradients of x and of the model output.

    Channels that are not read (learned variance) have a gradient of 0 that no kernel writes.
    """
    all_read = model_output.shape[1:] == x.shape[1:]
    new_like = torch.empty_like if all_read else torch.zeros_like
    return torch.empty_like(x), new_like(model_output)


def _fake_out(*inputs: Any) -> None:
    return None


def _fake_update(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _fake_backward(
    grad_x_prev: Any, grad_x_0: Any, x: Tensor, model_output: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(model_output)


_FAKES: dict[str, Callable[..., Any]] = {
    "update_out": _fake_out,
    "backward_out": _fake_out,
    "normal_out": _fake_out,
    "advance": _fake_out,
    "fit_rows": _fake_out,
    "update": _fake_update,
    "step": _fake_update,
    "backward": _fake_backward,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"fastddim::{_name}", _fake, lib=_library)


def define_like(library: torch.library.Library, name: str, original: str) -> None:
    """Define `fastddim::name` with the schema and the fake of `original`."""
    schema = str(getattr(torch.ops.fastddim, original).default._schema)
    library.define(schema.replace(f"fastddim::{original}", name))
    torch.library.register_fake(f"fastddim::{name}", _FAKES[original], lib=library)
