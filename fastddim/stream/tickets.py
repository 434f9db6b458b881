"""Tickets: the requests of a stream, as their owners see them."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from torch import Tensor


class Ticket(Future[Tensor]):
    """A request to a `Stream`, as a `concurrent.futures.Future` of its sample `[1, …]`.

    `result()` waits for another thread to take the steps; without one, call `Stream.run` or
    `Stream.step` first. `cancel()` works until the sample is there, even between two steps, and
    frees the slot at the next step. `asyncio.wrap_future` makes a ticket awaitable.

    Attributes:
        index: the number of requests that the stream got before.
        steps: S of the request.
        taken: the number of steps that are done, those before `first_step` included.
    """

    def __init__(self, steps: int, taken: int = 0) -> None:
        super().__init__()
        self.index = -1
        self.steps = steps
        self.taken = taken

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"Ticket: expected to stay where its stream is, got a copy or pickle of request "
            f"{self.index}; its result() can be copied"
        )


def settle(ticket: Ticket, outcome: Tensor | BaseException) -> None:
    """Give a ticket its outcome, unless it was cancelled, or settled before an interrupt."""
    with suppress(InvalidStateError):
        if not (ticket.done() or ticket.running()) or ticket.cancelled():
            ticket.set_running_or_notify_cancel()
        if isinstance(outcome, Tensor):
            ticket.set_result(outcome)
        else:
            ticket.set_exception(outcome)


def in_order(tickets: list[Ticket]) -> list[Ticket]:
    """The tickets that were not cancelled, in the order of their index."""
    done = [ticket for ticket in tickets if not ticket.cancelled()]
    return sorted(done, key=lambda ticket: ticket.index)
