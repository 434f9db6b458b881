"""The part that all schedulers share: configuration, noise, timesteps and tables."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.compiler import is_compiling

from fastddim import transfer
from fastddim.integrations._coefficients import valid
from fastddim.integrations._indices import is_one_index, one_index
from fastddim.integrations.diffusers._graph import IN_GRAPH, InGraph, unique
from fastddim.integrations.diffusers._moved import Moved
from fastddim.integrations.diffusers._noise import (
    CONFIG_KEY,
    FRESH,
    chosen_noise,
    draw_seeds,
    generators_of,
    noise_entry,
)
from fastddim.integrations.diffusers._state import FusedState
from fastddim.integrations.diffusers._timesteps import ONE_EACH, GivenTimesteps, HostTimesteps
from fastddim.kept import keep, ordinary
from fastddim.philox import STEP_NOISE, Keys, check_uncaptured, make_keys, normal
from fastddim.tracing import PLAIN, is_traced
from fastddim.validation import STATE_DTYPES


class Fused(InGraph):
    """The base that precedes diffusers' class in the order of bases."""

    # Set by diffusers.
    alphas_cumprod: Tensor
    num_inference_steps: int | None
    register_to_config: Any

    # The name of this attribute is in pickles, also in those of earlier versions.
    _fastddim_work: FusedState

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        made = super().__new__(cls)
        vars(made)["_fastddim_work"] = FusedState()
        return made

    @classmethod
    def from_config(
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        *,
        noise: str | None = None,
        seed: Any = None,
        sample_offset: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a scheduler, as in diffusers. `noise`, `seed` and `sample_offset` go to `set_noise`;
        by default they are those of the config.
        """
        if kwargs.get("tuned") is not None:
            raise ValueError(f"tuned: expected None for {cls.__name__}, got {kwargs['tuned']!r}")
        made = super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]
        scheduler = made[0] if return_unused_kwargs else made
        scheduler.set_noise(**chosen_noise(scheduler.config, noise, seed, sample_offset))
        return made

    def set_noise(self, noise: str, seed: Any = None, sample_offset: int = 0) -> None:
        """Choose the source of the steps' noise, which becomes a part of the config.

        Args:
            noise: "torch": drawn as diffusers draws it, or "philox": drawn in the kernel, keyed by
                the seed, the step's index in `timesteps` and the sample.
            seed, sample_offset: as in `fastddim.sample`, for philox. If a step is given a
                generator, or one for each sample, the seeds are drawn from these: one 64-bit number
                from each, at the first step of a run. With neither a seed nor a generator, the seed
                is drawn from torch's default generator of the CPU.

        Raises:
            ValueError: `noise` is neither, or the seed or the offset is out of range.
            TypeError: the seed is not an integer, nor a list or a tensor of integers.
        """
        entry = noise_entry(noise, seed, sample_offset)
        if entry != self.config.get(CONFIG_KEY):
            self.register_to_config(**{CONFIG_KEY: entry})
        fused = self._fastddim_work
        given = FRESH if seed is None else seed
        fused.seed, fused.sample_offset = (given if noise == "philox" else None), sample_offset
        fused.drawn = None
        fused.keys.clear()

    def __copy__(self) -> Any:
        made = object.__new__(type(self))
        vars(made).update(vars(self), _fastddim_work=copy.copy(self._fastddim_work))
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_internal_dict":  # diffusers puts a new config here
            self._fastddim_work.configured = unique()
        if name == "timesteps":
            self._fastddim_work.visiting = IN_GRAPH if is_compiling() else ""
        if name in self._fastddim_hooks.methods:
            self._look_for_hooks()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in self._fastddim_hooks.methods:
            self._look_for_hooks()

    def _look_for_hooks(self) -> None:
        """Drop the tables if a method of diffusers has been overridden, or no longer is.

        A step without a table makes one, so a step that finds a table need not look for hooks.
        """
        fused, found = self._fastddim_work, self._fastddim_hooks.overridden(self)
        if found != fused.overridden:
            fused.overridden = found
            fused.tables.clear()

    def _covered(self) -> bool:
        """Tell whether steps have rows; diffusers takes other steps, or raises the error."""
        return (
            valid(self.config)
            and self._fastddim_hooks.overridden(self) is None
            and all(map(self._has_values, self._fastddim_hooks.attributes))
        )

    def _has_values(self, name: str) -> bool:
        """Tell whether the values of a tensor of the scheduler can be read now."""
        if self._moved(name) is not None:
            return True
        tensor = getattr(self, name)
        readable = type(tensor) in PLAIN and not tensor.is_meta
        return readable and not transfer.captured(tensor.device)

    def _count_changes(self, *names: str) -> bool:
        """Replace tensors of inference mode, which do not count their changes, by copies that do.

        Return False if the class does not let its attributes be set.
        """
        if any(hasattr(type(self), name) for name in names):
            return False
        for name in names:
            tensor = getattr(self, name)
            if tensor.is_inference():
                setattr(self, name, ordinary(tensor.clone))
        return True

    def _state(self, sample: Tensor, model_output: Tensor) -> Tensor | None:
        """The state in the dtype of the result; None if the kernel does not take these tensors."""
        shape, dtype = sample.shape, sample.dtype
        if not shape or shape != model_output.shape or dtype not in STATE_DTYPES:
            return None
        if dtype is model_output.dtype:
            return sample
        # A model that predicts x_0 sets the dtype of x_0 in diffusers; here the state does.
        if model_output.dtype not in STATE_DTYPES or self.config["prediction_type"] == "sample":
            return None
        return sample.to(torch.promote_types(dtype, model_output.dtype))

    def _give_timesteps(self, given: GivenTimesteps) -> None:
        """Take given timesteps; the timesteps of graphs are another configuration."""
        self._fastddim_work.given = given
        self._fastddim_work.configured = unique()
        self.num_inference_steps = len(given.timesteps)
        self.timesteps = torch.tensor(given.timesteps, device="cpu")

    def _refuse_given(self) -> None:
        """Refuse a step of diffusers' own code, which does not know the next of given timesteps."""
        if self._fastddim_work.given is not None:
            hook = self._fastddim_hooks.overridden(self)
            case = "for a case that the kernel does not cover" if hook is None else f"of {hook}"
            raise ValueError(
                "timesteps: expected set_timesteps to be called with num_inference_steps, since "
                f"this step is diffusers' own {case}, got timesteps"
            )

    def _move_timesteps(self, device: Any) -> None:
        """Move the timesteps from the host to the device, and remember their values. A new run
        begins.
        """
        self._fastddim_work.drawn = None
        if is_compiling() or type(self.timesteps) is not Tensor:
            self.timesteps, self._fastddim_work.timesteps = self.timesteps.to(device), None
            return
        values = self.timesteps.tolist()
        # Only tensors made outside inference mode count their changes.
        with torch.inference_mode(False):
            self.timesteps = self.timesteps.to(device, copy=self.timesteps.is_inference())
        fused = self._fastddim_work
        fused.timesteps = HostTimesteps.of(self.timesteps, values)
        fused.visiting = str(hash(tuple(values)))
        self._look_for_hooks()

    def _move(self, name: str, device: torch.device) -> None:
        """Move a tensor of the scheduler, as diffusers does, and remember its values."""
        host = self._on_host(name)
        if host.is_inference():
            host = ordinary(host.clone)
        # Only tensors made outside inference mode count their changes.
        with torch.inference_mode(False):
            moved = getattr(self, name).to(device)
        if type(moved) is Tensor:  # not a stand-in, as under a fake mode
            setattr(self, name, moved)
            self._fastddim_work.moved[name] = Moved.of(moved, host)

    def _on_host(self, name: str) -> Tensor:
        """A tensor of the scheduler on the CPU, without waiting for the device that it is on."""
        moved, tensor = self._moved(name), getattr(self, name)
        if moved is not None:
            return moved.host
        # Some fake modes turn a real tensor into a fake one.
        return tensor if tensor.is_cpu else ordinary(lambda: tensor.to("cpu"))  # type: ignore[no-any-return]

    def _moved(self, name: str) -> Moved | None:
        """A tensor of the scheduler that was moved and has not changed since."""
        moved = self._fastddim_work.moved.get(name)
        known = moved is not None and moved.tensor is getattr(self, name) and moved.current
        return moved if known else None

    def _host_timesteps(self) -> HostTimesteps:
        """The timesteps; read once if they do not come from `set_timesteps`."""
        fused, timesteps = self._fastddim_work, self.timesteps
        known = fused.timesteps
        if known is None or known.tensor is not timesteps or not known.current:
            known = fused.timesteps = HostTimesteps.of(timesteps, timesteps.tolist())
        return known

    def _host_value(self, timestep: Any) -> int | None:
        """The value of a timestep; None if it would have to be read from a device."""
        t = one_index("timestep", timestep, ONE_EACH)
        if t is not None:
            return t
        known = self._fastddim_work.timesteps
        return None if known is None else known.value_of(timestep)

    def _read(self, timestep: Any) -> int:
        """The value of a timestep on any device."""
        t = self._host_value(timestep)
        return int(timestep) if t is None else t

    def _row(self, timestep: Any, device: torch.device) -> int | Tensor:
        """The row of a timestep in a `SignedTable`, for a state on the device."""
        if is_traced(timestep):
            if type(timestep) is int:
                return timestep
            if is_one_index(timestep):
                return self._rows(timestep, device)
        t = self._host_value(timestep)
        return self._rows(timestep, device) if t is None else t

    def _rows(self, timesteps: Tensor, device: torch.device) -> Tensor:
        """The rows of timesteps in a `SignedTable`, read on the device."""
        rows: Tensor = timesteps.reshape(-1).to(device, torch.int64)
        return rows.remainder(2 * self.alphas_cumprod.shape[0])

    def _philox_keys(self, timestep: Any, sample: Tensor, generator: Any) -> Keys:
        """The keys of a step's noise, with seeds from the generators if there are any."""
        if is_traced(sample):
            return self._keys_in_graph(timestep, sample, generator)
        fused, t, batch = self._fastddim_work, self._read(timestep), sample.shape[0]
        step = self._host_timesteps().step_of.get(t)
        if step is None:
            raise ValueError(
                f"timestep: expected one of the scheduler's timesteps with noise='philox', got {t}"
            )
        if generator is None and isinstance(fused.seed, str):
            check_uncaptured(sample.device)
            generator = torch.default_generator
        if generator is not None:
            return self._drawn_keys(generator, step, batch, sample.device)
        key = (step, batch, sample.device)
        return fused.keys.get(key) or keep(
            fused.keys,
            key,
            lambda: make_keys(
                fused.seed,
                batch,
                sample_offset=fused.sample_offset,
                step_index=step,
                device=sample.device,
            ),
            device=sample.device,
        )

    def _drawn_keys(self, generator: Any, step: int, batch: int, device: torch.device) -> Keys:
        """The keys of a step in a run whose first step draws the seeds."""
        fused, generators = self._fastddim_work, generators_of(generator, batch, device)
        drawn = fused.drawn
        if drawn is not None and drawn.go_on(generators, step, batch, device):
            fused.drawn = drawn.at(step)
        else:
            fused.drawn = draw_seeds(generators, step, batch, device, fused.sample_offset)
        return fused.drawn.keys

    def _philox_noise(self, timestep: Any, like: Tensor, generator: Any) -> Tensor | None:
        """The noise of a step as a tensor; None if torch draws it."""
        if self._fastddim_work.seed is None or not like.ndim:
            return None
        keys = self._philox_keys(timestep, like, generator)
        return normal(keys, like.shape[1:], STEP_NOISE).to(like.dtype)


def drawn_like(like: Tensor, generator: Any) -> Tensor:
    """Noise in the shape of a tensor, drawn as diffusers draws it."""
    noise: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=like.dtype
    )
    return noise


_set_item = OrderedDict.__setitem__


def output_object(
    cls: Any, prev_sample: Tensor, pred_original_sample: Tensor, in_graph: bool
) -> Any:
    """The output object of diffusers, made without its constructor, which takes longer than a small
    step; compilers know only the constructor.
    """
    if in_graph:
        return cls(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
    output = cls.__new__(cls)
    _set_item(output, "prev_sample", prev_sample)
    _set_item(output, "pred_original_sample", pred_original_sample)
    fields = output.__dict__
    fields["prev_sample"] = prev_sample
    fields["pred_original_sample"] = pred_original_sample
    return output
