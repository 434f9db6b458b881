"""The library run in batches, whose size never changes the noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor
from tqdm import tqdm

import fastddim
from fastddim import backends
from fastddim.cli.classes import ClassLabels
from fastddim.cli.options import Machine, shows_progress
from fastddim.cli.program import usage_errors
from fastddim.cli.sources import Source
from fastddim.options import Update
from fastddim.plan import make_inversion_plan


class Drawing:
    """Sampling with options that are checked before anything is drawn.

    Raises:
        click.UsageError: `arguments`, those of `fastddim.Sampler`, are refused.
    """

    def __init__(
        self,
        source: Source,
        machine: Machine,
        count: int,
        arguments: Mapping[str, Any],
        labels: ClassLabels | None = None,
    ) -> None:
        self._source, self._machine, self._count = source, machine, count
        self._arguments = arguments if labels is None else {**arguments, **labels.guided()}
        self._condition = {} if labels is None else labels.condition(machine.torch_device)
        self._sampler = cache(self._new_sampler)
        self._sampler(min(count, machine.batch_size))

    def batches(
        self,
        *,
        seed: int | None = None,
        sample_offset: int = 0,
        latents: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> Iterator[Tensor]:
        """Give all samples `[b, C, H, W]`, one batch at a time.

        Args:
            latents: `[count, C, H, W]` to start from, instead of the seed's latents.
            return_trajectory: give all states of each batch, `[S + 1, b, C, H, W]`.
        """
        for start, stop in _spans("sampling", self._count, self._machine):
            x_T = None if latents is None else _state(latents[start:stop], self._machine)
            yield self._sampler(stop - start)(
                seed=seed,
                sample_offset=sample_offset + start,
                x_T=x_T,
                model_kwargs=self._rows(start, stop),
                progress=_shows_steps(self._count, self._machine),
                return_trajectory=return_trajectory,
            )

    def _rows(self, start: int, stop: int) -> dict[str, Tensor] | None:
        """The labels of a batch as an argument of the model."""
        rows = {name: labels[start:stop] for name, labels in self._condition.items()}
        return rows or None

    def _new_sampler(self, batch: int) -> fastddim.Sampler:
        with usage_errors():
            return fastddim.Sampler(
                self._source.model,
                shape=(batch, *self._source.sample_shape),
                schedule=self._source.schedule,
                prediction=self._source.prediction,
                device=self._machine.torch_device,
                dtype=self._machine.torch_dtype,
                impl=self._machine.impl,
                model_kwargs=self._rows(0, batch),
                **self._arguments,
            )


class Encoding:
    """Inversion with options that are checked before anything is computed.

    Raises:
        click.UsageError: `visits`, the steps of `fastddim.invert`, is refused.
    """

    def __init__(self, source: Source, machine: Machine, visits: Mapping[str, Any]) -> None:
        self._source, self._machine, self._visits = source, machine, visits
        update = Update(prediction=source.prediction)
        with usage_errors():
            make_inversion_plan(source.schedule, update=update, **visits)
            backends.choose(machine.impl, machine.torch_device)

    def batches(self, x_0: Tensor) -> Iterator[Tensor]:
        """Give the latents of `x_0` `[N, C, H, W]`, one batch at a time."""
        count = len(x_0)
        for start, stop in _spans("encoding", count, self._machine):
            yield fastddim.invert(
                self._source.model,
                _state(x_0[start:stop], self._machine),
                schedule=self._source.schedule,
                prediction=self._source.prediction,
                impl=self._machine.impl,
                progress=_shows_steps(count, self._machine),
                **self._visits,
            )


def _state(x: Tensor, machine: Machine) -> Tensor:
    return x.to(machine.torch_device, machine.torch_dtype)


def _spans(task: str, count: int, machine: Machine) -> Iterator[tuple[int, int]]:
    """Give (start, stop) of each batch, with one progress bar for all if there are several."""
    size = machine.batch_size
    hidden = count <= size or not shows_progress(machine.progress)
    with tqdm(total=count, desc=task, unit="image", disable=hidden) as bar:
        for start in range(0, count, size):
            stop = min(start + size, count)
            yield start, stop
            bar.update(stop - start)


def _shows_steps(count: int, machine: Machine) -> bool:
    return count <= machine.batch_size and shows_progress(machine.progress)
