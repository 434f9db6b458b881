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
from fastddim.cache import Cache
from fastddim.integrations._indices import is_one_index, one_index
from fastddim.integrations.diffusers._graph import IN_GRAPH, InGraph, unique
from fastddim.integrations.diffusers._moved import Moved
from fastddim.integrations.diffusers._rows import valid
from fastddim.integrations.diffusers._timesteps import (
    ONE_EACH,
    HostTimesteps,
)
from fastddim.integrations.diffusers._tuned import TunedRun
from fastddim.kept import keep, ordinary
from fastddim.philox import STEP_NOISE, Keys, make_keys, normal
from fastddim.tracing import PLAIN, is_traced
from fastddim.tuned import TunedSteps
from fastddim.validation import STATE_DTYPES, check_choice

_TABLES_KEPT = 16

# One for each step of a long run, since making them waits for the device.
_KEYS_KEPT = 1024


class FusedState:
    """The state that a scheduler adds to the attributes that diffusers gives it.

    A copy of the scheduler has the same noise and tuned steps, and its own tables.
    """

    def __init__(
        self, seed: Any = None, sample_offset: int = 0, tuned: TunedRun | None = None
    ) -> None:
        """
        Args:
            seed, sample_offset: of philox noise; no seed where torch draws the noise.
            tuned: the run of tuned steps, if the scheduler has such.
        """
        self.seed = seed
        self.sample_offset = sample_offset
        self.tuned = tuned
        self.tables: Cache[Any] = Cache(_TABLES_KEPT)
        self.keys: Cache[Keys] = Cache(_KEYS_KEPT)
        self.timesteps: HostTimesteps | None = None
        # What tells the timesteps of `set_timesteps` from others, or nothing.
        self.visiting = ""
        # Tells this config from all others.
        self.configured = unique()
        self.moved: dict[str, Moved] = {}
        self.overridden: str | None = None

    def __copy__(self) -> FusedState:
        state = FusedState(self.seed, self.sample_offset, copy.copy(self.tuned))
        state.timesteps, state.moved = self.timesteps, dict(self.moved)
        state.visiting = self.visiting
        return state

    def __deepcopy__(self, memo: Any) -> FusedState:
        state = FusedState(self.seed, self.sample_offset, copy.deepcopy(self.tuned, memo))
        timesteps = self.timesteps
        if timesteps is not None and timesteps.current:
            # The scheduler's copy has the same copy of its timesteps.
            tensor = copy.deepcopy(timesteps.tensor, memo)
            state.timesteps = HostTimesteps.of(tensor, timesteps.values)
            state.visiting = self.visiting
        return state

    def __reduce__(self) -> Any:
        tuned = None if self.tuned is None else self.tuned.steps
        return _restored, (self.seed, self.sample_offset, tuned)


def _restored(seed: Any, sample_offset: int, tuned: TunedSteps | None = None) -> FusedState:
    """Make the state of a scheduler that was pickled. Pickles hold the name of this function."""
    return FusedState(seed, sample_offset, None if tuned is None else TunedRun(tuned))


class Fused(InGraph):
    """The base that comes before diffusers' class in the order of bases."""

    # Set by diffusers.
    alphas_cumprod: Tensor
    num_inference_steps: int | None

    # Its name is that in pickles, those of earlier versions too.
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
        noise: str = "torch",
        seed: Any = 0,
        sample_offset: int = 0,
        **kwargs: Any,
    ) -> Any:
        """As in diffusers; `noise`, `seed` and `sample_offset` go to `set_noise`."""
        if kwargs.get("tuned") is not None:
            raise ValueError(f"tuned: expected None for {cls.__name__}, got {kwargs['tuned']!r}")
        made = super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]
        (made[0] if return_unused_kwargs else made).set_noise(noise, seed, sample_offset)
        return made

    def set_noise(self, noise: str, seed: Any = 0, sample_offset: int = 0) -> None:
        """Choose where the noise of the steps comes from.

        Args:
            noise: "torch": drawn as diffusers draws it, or "philox": drawn in the kernel, keyed by
                the seed, the step's index in `timesteps` and the sample.
            seed, sample_offset: as in `fastddim.sample`; of philox.

        Raises:
            ValueError: `noise` is neither.
        """
        check_choice("noise", noise, ("torch", "philox"))
        fused = self._fastddim_work
        fused.seed, fused.sample_offset = (seed if noise == "philox" else None), sample_offset
        fused.keys.clear()

    def __copy__(self) -> Any:
        made = object.__new__(type(self))
        vars(made).update(vars(self), _fastddim_work=copy.copy(self._fastddim_work))
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_internal_dict":  # where diffusers puts a new config
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
        """Drop the tables where a method of diffusers has been overridden, or no longer is.

        Tables are made where none is, so that a step that finds one need not look.
        """
        fused, found = self._fastddim_work, self._fastddim_hooks.overridden(self)
        if found != fused.overridden:
            fused.overridden = found
            fused.tables.clear()

    def _covered(self) -> bool:
        """Return True where steps have rows; diffusers takes the others, or raises the error."""
        return (
            valid(self.config)
            and self._fastddim_hooks.overridden(self) is None
            and all(map(self._has_values, self._fastddim_hooks.attributes))
        )

    def _has_values(self, name: str) -> bool:
        """Whether the values of a tensor of the scheduler can be read now."""
        if self._moved(name) is not None:
            return True
        tensor = getattr(self, name)
        readable = type(tensor) in PLAIN and not tensor.is_meta
        return readable and not transfer.captured(tensor.device)

    def _count_changes(self, *names: str) -> bool:
        """Put copies that count their changes in place of tensors of inference mode, which do not.

        Return False where the class does not let its attributes be set.
        """
        if any(hasattr(type(self), name) for name in names):
            return False
        for name in names:
            tensor = getattr(self, name)
            if tensor.is_inference():
                setattr(self, name, ordinary(tensor.clone))
        return True

    def _state(self, sample: Tensor, model_output: Tensor) -> Tensor | None:
        """The state in the dtype of the result; None where the kernel does not take these two."""
        shape, dtype = sample.shape, sample.dtype
        if not shape or shape != model_output.shape or dtype not in STATE_DTYPES:
            return None
        if dtype is model_output.dtype:
            return sample
        # A model that predicts x_0 sets the dtype of x_0 in diffusers; the kernel's is the state's.
        if model_output.dtype not in STATE_DTYPES or self.config["prediction_type"] == "sample":
            return None
        return sample.to(torch.promote_types(dtype, model_output.dtype))

    def _move_timesteps(self, device: Any) -> None:
        """Move the timesteps, which are on the host, to the device, and remember their values."""
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
        if type(moved) is Tensor:  # and not a stand-in for one, as under a fake mode
            setattr(self, name, moved)
            self._fastddim_work.moved[name] = Moved.of(moved, host)

    def _on_host(self, name: str) -> Tensor:
        """A tensor of the scheduler on the CPU, without waiting for the device that it is on."""
        moved, tensor = self._moved(name), getattr(self, name)
        if moved is not None:
            return moved.host
        # Of a real tensor, some fake modes make a fake one.
        return tensor if tensor.is_cpu else ordinary(lambda: tensor.to("cpu"))  # type: ignore[no-any-return]

    def _moved(self, name: str) -> Moved | None:
        """A tensor of the scheduler that was moved and has not changed since."""
        moved = self._fastddim_work.moved.get(name)
        known = moved is not None and moved.tensor is getattr(self, name) and moved.current
        return moved if known else None

    def _host_timesteps(self) -> HostTimesteps:
        """The timesteps; read once where they do not come from `set_timesteps`."""
        fused, timesteps = self._fastddim_work, self.timesteps
        known = fused.timesteps
        if known is None or known.tensor is not timesteps or not known.current:
            known = fused.timesteps = HostTimesteps.of(timesteps, timesteps.tolist())
        return known

    def _host_value(self, timestep: Any) -> int | None:
        """The value of a timestep; None where it would have to be read from a device."""
        t = one_index("timestep", timestep, ONE_EACH)
        if t is not None:
            return t
        known = self._fastddim_work.timesteps
        return None if known is None else known.value_of(timestep)

    def _read(self, timestep: Any) -> int:
        """The value of a timestep, wherever it lies."""
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

    def _philox_keys(self, timestep: Any, sample: Tensor) -> Keys:
        if is_traced(sample):
            return self._keys_in_graph(timestep, sample)
        fused, t = self._fastddim_work, self._read(timestep)
        step = self._host_timesteps().step_of.get(t)
        if step is None:
            raise ValueError(
                f"timestep: expected one of the scheduler's timesteps with noise='philox', got {t}"
            )
        key = (step, sample.shape[0], sample.device)
        return fused.keys.get(key) or keep(
            fused.keys,
            key,
            lambda: make_keys(
                fused.seed,
                sample.shape[0],
                sample_offset=fused.sample_offset,
                step_index=step,
                device=sample.device,
            ),
            device=sample.device,
        )

    def _philox_noise(self, timestep: Any, like: Tensor) -> Tensor | None:
        """The noise of a step that diffusers takes; None where torch draws it."""
        if self._fastddim_work.seed is None or not like.ndim:
            return None
        return normal(self._philox_keys(timestep, like), like.shape[1:], STEP_NOISE).to(like.dtype)


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
    """The output object of diffusers, whose own constructor takes longer than a small step, but is
    what compilers know.
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
