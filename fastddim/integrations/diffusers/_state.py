"""The state of a scheduler besides diffusers' own, and its place in copies and pickles."""

from __future__ import annotations

import copy
from typing import Any

from fastddim.cache import Cache
from fastddim.integrations.diffusers._graph import unique
from fastddim.integrations.diffusers._moved import Moved
from fastddim.integrations.diffusers._noise import DrawnSeeds
from fastddim.integrations.diffusers._timesteps import GivenTimesteps, HostTimesteps
from fastddim.integrations.diffusers._tuned import TunedRun
from fastddim.philox import Keys
from fastddim.tuned import TunedSteps

_TABLES_KEPT = 16

# One tensor for each step of a long run, since making them waits for the device.
_KEYS_KEPT = 1024


class FusedState:
    """The state that a scheduler adds to the attributes of diffusers.

    A copy of the scheduler has the same noise, tuned steps and given timesteps, and its own tables.
    """

    def __init__(
        self,
        seed: Any = None,
        sample_offset: int = 0,
        tuned: TunedRun | None = None,
        given: GivenTimesteps | None = None,
    ) -> None:
        """Make the state of a new scheduler.

        Args:
            seed, sample_offset: arguments of philox noise; the seed is `FRESH` if each run draws
                its own, and None if torch draws the noise.
            tuned: the run of tuned steps, if the scheduler has any.
            given: the timesteps that `set_timesteps` was given, if any.
        """
        self.seed = seed
        self.sample_offset = sample_offset
        self.tuned = tuned
        self.given = given
        self.drawn: DrawnSeeds | None = None
        self.tables: Cache[Any] = Cache(_TABLES_KEPT)
        self.keys: Cache[Keys] = Cache(_KEYS_KEPT)
        self.timesteps: HostTimesteps | None = None
        # Identifies the timesteps of `set_timesteps`; empty without any.
        self.visiting = ""
        # Distinguishes this config from all others.
        self.configured = unique()
        self.moved: dict[str, Moved] = {}
        self.overridden: str | None = None

    def __copy__(self) -> FusedState:
        state = FusedState(self.seed, self.sample_offset, copy.copy(self.tuned), self.given)
        state.timesteps, state.moved = self.timesteps, dict(self.moved)
        state.visiting, state.drawn = self.visiting, self.drawn
        return state

    def __deepcopy__(self, memo: Any) -> FusedState:
        tuned = copy.deepcopy(self.tuned, memo)
        state = FusedState(self.seed, self.sample_offset, tuned, self.given)
        state.drawn, timesteps = self.drawn, self.timesteps
        if timesteps is not None and timesteps.current:
            # The copy of the scheduler holds the same copy of its timesteps.
            tensor = copy.deepcopy(timesteps.tensor, memo)
            state.timesteps = HostTimesteps.of(tensor, timesteps.values)
            state.visiting = self.visiting
        return state

    def __reduce__(self) -> Any:
        tuned = None if self.tuned is None else self.tuned.steps
        given = None if self.given is None else self.given.timesteps
        return _restored, (self.seed, self.sample_offset, tuned, given)


def _restored(
    seed: Any,
    sample_offset: int,
    tuned: TunedSteps | None = None,
    given: tuple[int, ...] | None = None,
) -> FusedState:
    """Make the state of a scheduler that was pickled. Pickles hold the name of this function."""
    return FusedState(
        seed,
        sample_offset,
        None if tuned is None else TunedRun(tuned),
        None if given is None else GivenTimesteps(given),
    )
