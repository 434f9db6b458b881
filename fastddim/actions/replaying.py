"""Logged ticks drawn again, and compared with the logged actions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastddim._version import __version__
from fastddim.actions.log import ActionLog, LoggedTick, Path, refuse_other
from fastddim.actions.sampler import ActionSampler
from fastddim.validation import check_bool, check_int

# Entries that may differ between log and sampler: the actions show whether the difference matters.
_CIRCUMSTANCES = ("versions", "computation")


Arguments: TypeAlias = Mapping[str, Any] | None
Observation: TypeAlias = Arguments | tuple[Arguments, Arguments]
"""The `model_kwargs` of a tick, or these and its `uncond_kwargs`."""


class Replayed(NamedTuple):
    """A tick that was drawn again.

    Attributes:
        tick: number of the tick.
        actions: the new actions `[B, horizon, action_dim]`, on the sampler's device.
        logged: the logged actions, on the CPU.
    """

    tick: int
    actions: Tensor
    logged: Tensor


def replay(
    log: Path | ActionLog,
    sampler: ActionSampler,
    observations: Iterable[Observation],
    *,
    first_tick: int = 0,
    exact: bool = True,
) -> Iterator[Replayed]:
    """Draw the ticks of a log again, from their observations.

        for tick, actions, logged in replay("run.jsonl", sampler, observations):
            ...

    Every tick continues from the last chunk in the log, so a replay may begin at any tick. The bits
    are the same on the same kind of machine with the same versions, which the header of the log
    names. Afterwards the sampler continues after the last tick that was drawn.

    Args:
        log: a file that an `ActionSampler` with `log=` has written, or an `ActionLog` of it.
        sampler: a sampler without a log, made with the arguments and the weights of the one that
            wrote the log.
        observations: the `model_kwargs` of each call from `first_tick` on, in order; None for a
            call without any, and `(model_kwargs, uncond_kwargs)` for a call with both. Surplus
            observations are not read.
        first_tick: number of the tick to begin with.
        exact: whether actions that differ from the logged ones are an error. Pass False to compare
            with another machine.

    Yields:
        `(tick, actions, logged)`, a `Replayed`, for each tick.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the log is of another sampler or has no such tick. While iterating: an
            observation is missing or is not that of its tick, or actions differ; the message names
            the tick.
        OSError: the log cannot be read.
    """
    found = log if isinstance(log, ActionLog) else ActionLog(log)
    if not isinstance(sampler, ActionSampler):
        raise TypeError(f"sampler: expected an ActionSampler, got {type(sampler).__name__}")
    check_bool("exact", exact)
    first = check_int("first_tick", first_tick, 0, 2**62)
    sampler._check_unlogged()
    refuse_other(_compared(found.header), _compared(sampler.header()), found.path)
    if first and not any(entry.tick == first for entry in found):
        raise ValueError(f"first_tick: expected a tick of {found.path!r}, got {first}")
    return _replayed(found, sampler, iter(observations), first, exact)


def _replayed(
    log: ActionLog,
    sampler: ActionSampler,
    observations: Iterator[Observation],
    first: int,
    exact: bool,
) -> Iterator[Replayed]:
    last: Tensor | None = None
    for entry in log:
        logged = log.actions(entry)
        if entry.tick >= first:
            yield _drawn_again(log, sampler, entry, last, logged, observations, exact)
        last = logged


def _drawn_again(
    log: ActionLog,
    sampler: ActionSampler,
    entry: LoggedTick,
    last: Tensor | None,
    logged: Tensor,
    observations: Iterator[Observation],
    exact: bool,
) -> Replayed:
    try:
        given = next(observations)
    except StopIteration:
        raise ValueError(f"observations: expected one for tick {entry.tick}, got no more") from None
    model_kwargs, uncond_kwargs = given if isinstance(given, tuple) else (given, None)
    digest = sampler.observed(model_kwargs, uncond_kwargs)
    if digest != entry.observation:
        raise ValueError(
            f"observations: expected that of tick {entry.tick}, with digest {entry.observation}, "
            f"got one with {digest}"
        )
    before = None
    if entry.before:
        if last is None:
            raise ValueError(f"log: expected the tick before tick {entry.tick}, got none")
        before = last.to(sampler.device)
    sampler.restore(entry.tick, before)
    actions = sampler(
        model_kwargs=model_kwargs,
        uncond_kwargs=uncond_kwargs,
        executed=entry.executed,
        frozen=entry.frozen,
    )
    if exact:
        _check_actions(actions.cpu(), logged, entry.tick, log)
    return Replayed(entry.tick, actions, logged)


def _compared(header: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in header.items() if name not in _CIRCUMSTANCES}


def _check_actions(actions: Tensor, logged: Tensor, tick: int, log: ActionLog) -> None:
    same = same_bits(actions, logged)
    if same.all():
        return
    gap = (actions.double() - logged.double()).abs()[~same].max().item()
    versions = log.header["versions"]
    raise ValueError(
        f"actions: expected those of tick {tick} in the log, got others in {(~same).sum().item()} "
        f"of {same.numel()} values, up to {gap:.3g} away; the log is of fastddim "
        f"{versions['fastddim']} with torch {versions['torch']}, these are of {__version__} with "
        f"{torch.__version__}"
    )


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """A mask of values that are equal to the bit, with signs of zeros; any two NaN are equal."""
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
