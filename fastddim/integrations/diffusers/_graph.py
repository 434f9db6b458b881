"""Steps of schedulers as parts of a graph that is traced, by `torch.compile` or `torch.export`.

Tables are constants of the graph, made while it is traced. If a number that they depend on changes,
or one of the scheduler's tensors is replaced, another graph is made; a graph does not notice a
tensor that is changed in place. Timesteps may be ints, or tensors whose values are read when the
graph runs.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fastddim.integrations._hooks import Hooks
from fastddim.philox import Keys, make_keys
from fastddim.plan import Rescaling
from fastddim.steptable import StepTable, TracedTable
from fastddim.tracing import HELD, constant, specialized

IN_GRAPH = "in the graph"
"""Marks timesteps that a graph sets, and whose values it holds."""

Table: TypeAlias = StepTable | TracedTable


_numbers = itertools.count()


def unique() -> str:
    """Return a string that no other call in this process returns."""
    return f"{next(_numbers)}"


class InGraph:
    """The steps of a scheduler while they are traced."""

    # Set by diffusers and by the schedulers.
    config: Any
    timesteps: Tensor
    _fastddim_hooks: ClassVar[Hooks]
    _fastddim_work: Any

    def _in_graph(
        self,
        find: str,
        state: Tensor,
        *arguments: Any,
        rescaling: Rescaling | None = None,
        kind: type[StepTable] = StepTable,
    ) -> TracedTable | None:
        """The table that the method `find` has for the arguments, or None.

        Args:
            find: name of the method; besides its arguments, it reads only `config` and the
                attributes of hooks.
            arguments: numbers and strings.
            rescaling, kind: those of the table.
        """
        watched = [id(getattr(self, name)) for name in self._fastddim_hooks.attributes]
        name = self._name_in_graph(
            find,
            state.dtype,
            state.device,
            (self._fastddim_work.configured, self._fastddim_work.overridden, *watched),
            *[specialized(v) if isinstance(v, (int, float)) else v for v in arguments],
        )
        if not name:
            return None
        return TracedTable(getattr(HELD, name), kind.position, rescaling)

    @constant
    def _name_in_graph(
        self, find: str, dtype: torch.dtype, device: torch.device, _watched: Any, *arguments: Any
    ) -> str:
        table: StepTable | None = getattr(self, find)(*arguments)
        return "" if table is None else table.name_in_graph(dtype, device)

    def _visited_in_graph(self) -> str | int | None:
        """The `timesteps` as a constant of the graph; None if the graph itself makes them."""
        fused = self._fastddim_work
        if fused.visiting == IN_GRAPH:
            return None
        return fused.visiting or id(self.timesteps)

    def _keys_in_graph(self, timestep: int | Tensor, state: Tensor, generator: Any) -> Keys:
        """The keys of philox noise; those of the first step for a timestep that is none of the
        scheduler's. Without a seed, the graph draws one at each step.

        Raises:
            ValueError: there is a generator, from which no graph can draw.
        """
        if generator is not None:
            raise ValueError(
                "generator: expected None with noise='philox' while a step is traced, since a "
                "graph cannot draw a seed from it; use set_noise('philox', seed) instead"
            )
        fused, batch = self._fastddim_work, state.shape[0]
        seed = None if isinstance(fused.seed, str) else fused.seed
        t = timestep.to(self.timesteps.device) if isinstance(timestep, Tensor) else timestep
        step = (self.timesteps == t).to(torch.int64).argmax()
        return make_keys(
            seed,
            batch,
            sample_offset=fused.sample_offset,
            step_index=step.expand(batch),
            device=state.device,
        )
