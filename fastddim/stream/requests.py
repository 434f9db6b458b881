"""Requests, checked and worked out before they wait for a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim import philox
from fastddim.loop.masks import check_known
from fastddim.loop.start import LateStart, check_first_step
from fastddim.loop.stream_order import StreamOrder
from fastddim.options import (
    Direction,
    Noising,
    Reading,
    RequestOptions,
    StreamOptions,
    Thresholding,
    Update,
    Visited,
)
from fastddim.plan import StepKind, make_plan, to_table
from fastddim.reference import compute_dtype
from fastddim.schedule import Schedule
from fastddim.signatures import shared
from fastddim.stream.conditions import copied, copied_conditions
from fastddim.stream.tickets import Ticket
from fastddim.tuned import TunedSteps
from fastddim.validation import check_initial, check_int, check_sample_range, signed_bits

_KEPT_ROUTES = 64


class Route(NamedTuple):
    """The timesteps and rows of a request; tables are in the dtype that is computed in."""

    timesteps: Tensor  # [S]
    alphas_cumprod: Tensor  # [S + 1]
    rows: Tensor  # [S, K]
    first_half: Tensor | None  # [S, K]
    noisy: bool
    late_start: LateStart | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One sample to draw, with tensors of its own."""

    ticket: Ticket
    route: Route
    seed: int  # its 64 bits, signed
    sample: int
    x_T: Tensor | None  # [1, …]
    inpainting: tuple[Tensor, Tensor] | None  # mask and known data, [1, …] both
    arguments: tuple[dict[str, Any], ...]  # of each model, the unconditional one's first
    conditions: list[Tensor]  # [1 or 2, …], the tensors among the arguments
    ready: StreamOrder  # orders reads of the tensors after the caller's writes

    @property
    def tensors(self) -> list[Tensor]:
        x_T = [] if self.x_T is None else [self.x_T]
        return [*self.conditions, *x_T, *(self.inpainting or ())]

    def nonfinite_error(self) -> ValueError:
        return ValueError(
            f"model output: expected finite values, got NaN or infinity {self._place()}"
        )

    def batch_error(self, others: Sequence[str], error: BaseException) -> RuntimeError:
        """The error of this request after a step raised one for the whole batch."""
        beside = f", in a batch with {', '.join(others)}" if others else ""
        named = RuntimeError(
            f"request {self.ticket.index} failed {self._place()}{beside}: "
            f"{type(error).__name__}: {error}"
        )
        named.__cause__ = error
        return named

    def _place(self) -> str:
        s = self.ticket.taken
        return f"at step {s} (timestep {int(self.route.timesteps[s])})"


class Requests:
    """Makes the requests of a stream."""

    def __init__(
        self,
        options: StreamOptions,
        kind: StepKind,
        schedule: Schedule,
        shape: tuple[int, ...],
        max_steps: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._options, self._kind = options, kind
        self._routes = Routes(options, schedule, dtype, max_steps)
        self._state = torch.empty((1, *shape[1:]), dtype=dtype, device=device)

    def make(self, options: RequestOptions) -> Request:
        """A request for one sample.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
        """
        common, state = self._options, self._state
        _check_given("guidance_scale", options.guidance_scale, "a number", guided=common.guided)
        _check_given("mask", options.mask, "a tensor", masked=common.masked)
        route = self._routes.of(options)
        if options.seed is not None:
            check_int("seed", options.seed, 0, 2**64 - 1)
        check_sample_range(options.sample_offset, 1, per_sample_seed=False)
        first = check_first_step(options, len(route.timesteps), self._kind)
        x_T, mask, known = options.x_T, options.mask, options.known
        if x_T is not None:
            check_initial("x_T", x_T, tuple(state.shape), state.dtype, state.device)
        elif route.late_start is not None:
            route.late_start.warn()
        if mask is not None or known is not None:
            mask, known = check_known(mask, known, state, route.alphas_cumprod[0] == 1)
        with torch.inference_mode(False), torch.no_grad():
            arguments, conditions = copied_conditions(options, self._kind, state.device)
            return Request(
                ticket=Ticket(len(route.timesteps), taken=first),
                route=route,
                seed=_seed_bits(options, route, state.device),
                sample=int(options.sample_offset),
                x_T=None if x_T is None else copied(x_T),
                inpainting=(
                    None
                    if mask is None or known is None
                    else (copied(mask.expand_as(state)), copied(known))
                ),
                arguments=arguments,
                conditions=conditions,
                ready=StreamOrder(state.device),
            )


def _seed_bits(options: RequestOptions, route: Route, device: torch.device) -> int:
    """The 64 bits of a checked seed, or of a fresh one where noise is drawn."""
    if options.seed is not None:
        return signed_bits(int(options.seed))
    return int(philox.fresh_seed(device)) if options.x_T is None or route.noisy else 0


def _check_given(name: str, value: object, expected: str, **kind: bool) -> None:
    """Refuse an option that no request of the stream has, and the lack of one that all have."""
    ((wanted, given),) = kind.items()
    if given != (value is not None):
        raise ValueError(
            f"{name}: expected {expected if given else 'None'} in a stream with {wanted}={given}, "
            f"got {value!r}"
        )


_HASHED = (int, float, str, type(None), TunedSteps)
_ROUTING = ("steps", *(f.name for group in (Visited, Direction, Noising) for f in fields(group)))


class Routes:
    """The routes of a stream's requests; those of plain numbers or tuned steps are kept for later
    ones.
    """

    def __init__(
        self, options: StreamOptions, schedule: Schedule, dtype: torch.dtype, max_steps: int
    ) -> None:
        self._options = options
        self._common = vars(shared(Reading, options)) | vars(shared(Thresholding, options))
        self._schedule = schedule
        self._dtype = compute_dtype(dtype)
        self._max_steps = max_steps
        self._kept: Callable[..., Route] = lru_cache(_KEPT_ROUTES, typed=True)(self._make)

    def of(self, request: RequestOptions) -> Route:
        """The route of a request.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
        """
        values = [getattr(request, name) for name in _ROUTING]
        plain = all(isinstance(value, _HASHED) for value in values)
        return (self._kept if plain else self._make)(*values)

    def _make(self, *values: Any) -> Route:
        given = dict(zip(_ROUTING, values, strict=True))
        steps, spacing = given.pop("steps"), given.pop("spacing")
        steps_offset = given.pop("steps_offset")
        split = self._options.denoised_fn is not None
        order, tuned = self._options.order, isinstance(steps, TunedSteps)
        if tuned and order == 1:
            raise ValueError(
                "steps: expected a number or timesteps in a stream with order=1, which keeps no "
                f"history; a stream with order=2 takes tuned steps too, got {steps!r}"
            )
        update = Update(**self._common, **given).checked(1, per_step=True)
        if split and update.rederive_eps:
            raise ValueError("rederive_eps: expected False in a stream with denoised_fn, got True")
        plan = make_plan(
            self._schedule,
            steps,
            update,
            spacing=spacing,
            steps_offset=steps_offset,
            order=1 if tuned else order,
            split=split,
        )
        if plan.steps > self._max_steps:
            raise ValueError(
                f"steps: expected at most max_steps = {self._max_steps}, got {plan.steps}"
            )
        return Route(
            plan.timesteps,
            plan.alphas_cumprod,
            self._table(plan.table),
            None if plan.first_half is None else self._table(plan.first_half),
            plan.kind.noisy,
            LateStart.of(plan, steps, spacing),
        )

    def _table(self, rows: Tensor) -> Tensor:
        return to_table(rows, self._dtype, rows.device)
