"""Philox noise of schedulers: its entry in a config, and seeds drawn from generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from fastddim.philox import Keys
from fastddim.transfer import filled, upload
from fastddim.validation import check_choice, check_sample_range, check_seed

CONFIG_KEY = "_fastddim_noise"
"""The key of the noise in a config. Other classes keep entries that begin with an underscore."""

FRESH = "fresh"
"""The seed of philox noise without a given seed: each run draws its own."""

_BITS = 2**64


def noise_entry(noise: str, seed: Any, sample_offset: int) -> dict[str, Any] | None:
    """The arguments of `set_noise` as a config holds them; None for torch's noise.

    Raises:
        ValueError, TypeError: an argument is not one that `set_noise` expects.
    """
    check_choice("noise", noise, ("torch", "philox"))
    if noise == "torch":
        return None
    if seed is None:
        check_sample_range(sample_offset, 1, per_sample_seed=False)
        return {"noise": noise, "seed": None, "sample_offset": int(sample_offset)}
    one = not hasattr(seed, "__len__") or (isinstance(seed, Tensor) and seed.ndim == 0)
    bits = check_seed("seed", seed, 1 if one else len(seed))
    per_sample = isinstance(bits, Tensor)
    check_sample_range(sample_offset, 1, per_sample_seed=per_sample)
    plain = [value % _BITS for value in bits.tolist()] if isinstance(bits, Tensor) else bits % _BITS
    return {"noise": noise, "seed": plain, "sample_offset": int(sample_offset)}


def chosen_noise(
    config: Mapping[str, Any], noise: str | None, seed: Any, sample_offset: int | None
) -> dict[str, Any]:
    """The arguments of `set_noise`: the given ones, and those of a config for the others."""
    given = {"noise": noise, "seed": seed, "sample_offset": sample_offset}
    kept = config.get(CONFIG_KEY) or {"noise": "torch"}
    return {**kept, **{name: value for name, value in given.items() if value is not None}}


class DrawnSeeds(NamedTuple):
    """The seeds of a run, drawn from the generators by its first step with noise."""

    generators: tuple[Generator, ...]
    seed: Tensor
    """int64 `[B]` on the device of the state, like the indices of the samples."""
    sample: Tensor
    step: int
    """The index of the last step that used these seeds."""

    def at(self, step: int) -> DrawnSeeds:
        """The same seeds, at a later step."""
        return self._replace(step=step)

    def go_on(self, generators: tuple[Generator, ...], step: int, batch: int, at: Any) -> bool:
        """Tell whether a step, by its index, is a later one of the same run.

        Args:
            at: device of the state of the step.
        """
        return (
            step > self.step
            and self.generators == generators
            and len(self.seed) == batch
            and self.seed.device == at
        )

    @property
    def keys(self) -> Keys:
        """The keys of the noise of step `step`."""
        return Keys(self.seed, filled(self.step, len(self.seed), self.seed.device), self.sample)


def draw_seeds(
    generators: tuple[Generator, ...], step: int, batch: int, device: Any, sample_offset: int
) -> DrawnSeeds:
    """Draw one seed from each generator, without waiting for a device.

    Args:
        generators: one for each sample, or one for all.
        step: index of the step that draws the seeds.
        sample_offset: index of the first sample, for one generator.

    Raises:
        ValueError: there is an offset, and a generator for each sample.
    """
    per_sample = len(generators) > 1
    check_sample_range(sample_offset, batch, per_sample_seed=per_sample)
    # Later steps may be outside the mode of this one.
    with torch.inference_mode(False):
        each = [
            torch.empty(1, dtype=torch.int64, device=g.device).random_(generator=g)
            for g in generators
        ]
        seed = upload(torch.cat(each).expand(batch).contiguous(), device)
        sample = filled(0, batch, device)
        if not per_sample:
            sample = torch.arange(sample_offset, sample_offset + batch, device=device)
    return DrawnSeeds(generators, seed, sample, step)


def generators_of(generator: Any, batch: int, device: torch.device) -> tuple[Generator, ...]:
    """The generators of a step: one for all samples, or one for each.

    Raises:
        TypeError: an argument is not a generator.
        ValueError: the number of generators is not that of the samples, or one is on a device other
            than those of the state and the host.
    """
    given = tuple(generator) if isinstance(generator, list | tuple) else (generator,)
    for one in given:
        if not isinstance(one, Generator):
            raise TypeError(f"generator: expected a torch.Generator or a list of them, got {one!r}")
        if one.device.type not in ("cpu", device.type):
            raise ValueError(
                "generator: expected one on the CPU or on the device of the sample, "
                f"{device.type}, got one on {one.device.type}"
            )
    if len(given) not in (1, batch):
        raise ValueError(f"generator: expected one per sample, {batch}, got {len(given)}")
    return given
