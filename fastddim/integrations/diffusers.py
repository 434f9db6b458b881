"""Drop-ins for the schedulers of diffusers, whose step is one pass over memory.

```python
import diffusers, fastddim.integrations.diffusers
unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 32, 32, 32))
pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())  # or any of yours
pipe.scheduler = fastddim.integrations.diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
image = pipe(num_inference_steps=2).images[0]
```

Every class is a subclass of the one that it is named after, takes what that takes and gives what
that gives, to rounding: noise is drawn with the same calls from the same generators, roots are
those that diffusers takes, one timestep at a time in the dtype of `alphas_cumprod`, and what
diffusers does against the paper is done here too:

- the timestep before is `t - T // N`, whatever timesteps are visited next;
- `set_alpha_to_one=False` adds noise in the last step where that does not end at t = 0;
- `timestep_spacing="trailing"` visits t = -1, which reads the last ᾱ, for 62 values of N;
- epsilon is divided by √ᾱ = 0 at zero terminal SNR, which only clipping hides: infinite without
  it in diffusers, of the order of 1e30 here;
- an η for which 1 − ᾱ_prev − σ² < 0 gives NaN, and so does `fixed_large_log`.

Where only rounding takes 1 − ᾱ_prev − σ² below 0, as η = 1 does at zero terminal SNR, diffusers
gives NaN and this gives the limit.

`fastddim.sample` does none of this. A half-precision state is computed in float32 and rounded once,
where diffusers rounds every operation. What the kernel has no case for (tensors that broadcast, an
η that is not a number ≥ 0, integer samples) goes to diffusers' own code.

Nothing waits for a device: timesteps that `set_timesteps` has put there are known on the host too.
Only `DDPMScheduler` and philox noise read a timestep that lies on a device and comes from
elsewhere, since they need its value.

`from_config(..., noise="philox", seed=0, sample_offset=0)`, or `set_noise` later, takes the noise
of the steps from the seed instead of from torch: see `fastddim.sample`. It is no part of the
config, and a saved pipeline does not have it.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# Imported by name: a pipeline that is loaded looks for SchedulerMixin in the scheduler's module.
from diffusers import SchedulerMixin
from diffusers.schedulers import scheduling_ddim as _ddim
from diffusers.schedulers import scheduling_ddim_inverse as _ddim_inverse
from diffusers.schedulers import scheduling_ddim_parallel as _ddim_parallel
from diffusers.schedulers import scheduling_ddpm as _ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddim import transfer
from fastddim.integrations._shared import each
from fastddim.philox import Keys, make_keys
from fastddim.plan import (
    PREDICTIONS,
    Fit,
    Row,
    Scales,
    Update,
    mixing_row,
    prediction_coefficients,
    row_of,
    settled,
    stack_row,
)
from fastddim.steptable import StepTable
from fastddim.validation import STATE_DTYPES, check_choice

__all__ = [
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "SchedulerMixin",
]

# In the place of 1/0, so that infinity is not taken from infinity before the clip.
_HUGE = 1e30

_TABLES_KEPT = 16


class _Known(NamedTuple):
    """A tensor of timesteps, as it was when its values were on the host."""

    tensor: Tensor
    version: int
    values: list[int]
    step_of: dict[int, int]

    @classmethod
    def of(cls, tensor: Tensor, values: list[int]) -> _Known:
        step_of = {t: s for s, t in reversed(list(enumerate(values)))}
        return cls(tensor, tensor._version, values, step_of)

    def value_of(self, element: Tensor) -> int | None:
        """The value of an element of the tensor, by where it lies; None where it is none."""
        own = self.tensor
        if (
            element.untyped_storage()._cdata != own.untyped_storage()._cdata
            or own._version != self.version
            or element.dtype is not own.dtype
            or element.numel() != 1
        ):
            return None
        distance = int(element.storage_offset()) - int(own.storage_offset())
        index, rest = divmod(distance, own.stride(0))
        return self.values[index] if rest == 0 and 0 <= index < len(self.values) else None


class _Cached(NamedTuple):
    """Tables, and what they were worked out from."""

    objects: tuple[Any, ...]
    numbers: tuple[Any, ...]
    tables: dict[Any, Any]


class _Work:
    """What a scheduler works with besides its own state; a copy of the scheduler starts anew."""

    def __init__(self) -> None:
        self.cached: dict[str, _Cached] = {}
        self.last: tuple[Any, ...] = (None,)
        self.known: _Known | None = None
        self.seed: Any = None
        self.sample_offset = 0
        self.keys: dict[Any, Keys] = {}

    def __deepcopy__(self, memo: Any) -> _Work:
        work, known = _restored(self.seed, self.sample_offset), self.known
        if known is not None and known.version == known.tensor._version:
            # The scheduler's copy has the same copy of its timesteps.
            work.known = _Known.of(copy.deepcopy(known.tensor, memo), known.values)
        return work

    def __reduce__(self) -> Any:
        return _restored, (self.seed, self.sample_offset)


def _restored(seed: Any, sample_offset: int) -> _Work:
    work = _Work()
    work.seed, work.sample_offset = seed, sample_offset
    return work


class _Fused:
    """What the schedulers share. Comes before diffusers' class in the order of bases."""

    # Set by diffusers.
    config: Any
    alphas_cumprod: Tensor
    timesteps: Tensor
    num_inference_steps: int | None

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
        made = super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]
        (made[0] if return_unused_kwargs else made).set_noise(noise, seed, sample_offset)
        return made

    def set_noise(self, noise: str, seed: Any = 0, sample_offset: int = 0) -> None:
        """Where the noise of the steps comes from.

        Args:
            noise: "torch": drawn as diffusers draws it, or "philox": drawn in the kernel, keyed by
                the seed, the step's index in `timesteps` and the sample.
            seed, sample_offset: as in `fastddim.sample`; of philox.

        Raises:
            ValueError: `noise` is neither.
        """
        check_choice("noise", noise, ("torch", "philox"))
        work = self._work
        work.seed, work.sample_offset = (seed if noise == "philox" else None), sample_offset
        work.keys.clear()

    # Found in the instance once it is made, which a property would slow down.
    _fastddim_work: _Work | None = None

    @property
    def _work(self) -> _Work:
        if self._fastddim_work is None:
            self._fastddim_work = _Work()
        return self._fastddim_work

    def _tables(
        self, kind: str, objects: tuple[Any, ...] = (), numbers: tuple[Any, ...] = ()
    ) -> dict[Any, Any]:
        """The tables of a kind that are right for the state at hand.

        For objects identity does: a config that changes is another one, and tensors count their
        changes.
        """
        alphas = self.alphas_cumprod
        objects = (self.__dict__["_internal_dict"], alphas, *objects)
        numbers = (alphas._version, *numbers)
        cached = self._work.cached.get(kind)
        if (
            cached is None
            or cached.numbers != numbers
            or not all(map(operator.is_, cached.objects, objects))
            or len(cached.tables) > _TABLES_KEPT
        ):
            cached = self._work.cached[kind] = _Cached(objects, numbers, {})
        return cached.tables

    def _state(self, sample: Tensor, model_output: Tensor) -> Tensor | None:
        """The state in the dtype of the result; None where the kernel does not take these two."""
        shape, dtype = sample.shape, sample.dtype
        if len(shape) == 0 or shape != model_output.shape or dtype not in STATE_DTYPES:
            return None
        if dtype is model_output.dtype:
            return sample
        # x_0 has the dtype of the model output where it is the model output.
        if model_output.dtype not in STATE_DTYPES or self.config["prediction_type"] == "sample":
            return None
        return sample.to(torch.promote_types(dtype, model_output.dtype))

    def _keep_host_copy(self, device: Any) -> None:
        """Move the timesteps, which are on the host, to the device."""
        values = self.timesteps.tolist()
        self.timesteps = self.timesteps.to(device)
        self._work.known = _Known.of(self.timesteps, values)
        self._work.keys.clear()

    def _on_host(self) -> _Known:
        """The timesteps; fetched, once, where `set_timesteps` is not what has put them there."""
        work, timesteps = self._work, self.timesteps
        known = work.known
        if known is None or known.tensor is not timesteps or known.version != timesteps._version:
            known = work.known = _Known.of(timesteps, timesteps.tolist())
        return known

    def _host_value(self, timestep: Any) -> int | None:
        """The value of a timestep; None where it lies on a device and would have to be fetched."""
        if not isinstance(timestep, Tensor) or timestep.is_cpu:
            return int(timestep)
        known = self._work.known
        return None if known is None else known.value_of(timestep)

    def _row(self, timestep: Any, device: torch.device) -> int | Tensor:
        """Its row in a table of both signs, for a state on the device."""
        if type(timestep) is int:
            return timestep
        t = self._host_value(timestep)
        if t is None:
            row: Tensor = timestep.reshape(1).to(device, torch.int64)
            return row.remainder(2 * self.alphas_cumprod.shape[0])
        return t

    def _philox_keys(self, timestep: Any, sample: Tensor) -> Keys:
        work = self._work
        t = self._host_value(timestep)
        t = int(timestep) if t is None else t
        step = self._on_host().step_of.get(t)
        if step is None:
            raise ValueError(
                f"timestep: expected one of the scheduler's timesteps with noise='philox', got {t}"
            )
        key = (step, sample.shape[0], sample.device)
        if key not in work.keys:
            keys = make_keys(
                work.seed,
                sample.shape[0],
                sample_offset=work.sample_offset,
                step_index=step,
                device=sample.device,
            )
            if transfer.captured(sample.device):
                return keys
            transfer.wait(sample.device)  # Another stream may use them.
            work.keys[key] = keys
        return work.keys[key]


class _Noising(_Fused):
    """`add_noise` and `get_velocity` of the schedulers that have them."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t·original_samples + √(1 − ᾱ_t)·noise, as in diffusers."""
        mixed = self._mixed("add_noise", original_samples, noise, timesteps)
        if mixed is None:
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc,no-any-return]
        return mixed

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t·noise − √(1 − ᾱ_t)·sample, as in diffusers."""
        mixed = self._mixed("get_velocity", sample, noise, timesteps)
        if mixed is None:
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc,no-any-return]
        return mixed

    def _mixed(self, kind: str, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor | None:
        """None where it is a case for diffusers."""
        state = self._state(x, noise)
        if state is None or timesteps.numel() not in (1, x.shape[0]):
            return None
        if timesteps.is_cpu:
            values = timesteps.reshape(-1).tolist()
            if not values or min(values) < 0 or max(values) >= len(self.alphas_cumprod):
                return None
        tables = self._tables("mix")
        table: StepTable | None = tables.get(kind)
        if table is None:
            alphas = self.alphas_cumprod.to("cpu")
            signal, sigma = _roots(alphas), _roots(1 - alphas)
            of_x, of_noise = (signal, sigma) if kind == "add_noise" else (-sigma, signal)
            table = tables[kind] = StepTable(stack_row(mixing_row(of_x, of_noise)).double())
        row = timesteps.reshape(-1).to(x.device, torch.int64)
        return table(state, noise, row, return_x0=False)[0]


def _strided(alphas: Tensor, stride: int, past_the_end: Tensor) -> Tensor:
    """ᾱ of the timestep a stride before each."""
    before = torch.arange(len(alphas), device="cpu") - stride
    return torch.where(before >= 0, alphas[before.clamp(min=0)], past_the_end)


def _doubled(at_t: Tensor, before: Tensor, past_the_end: Tensor) -> tuple[Tensor, Tensor]:
    """(ᾱ_t, ᾱ_prev) for t in [−T, T), so that indexing by t is right for a negative t as well:
    that reads ᾱ from the end, and has nothing before it.
    """
    return torch.cat([at_t, at_t]), torch.cat([before, past_the_end.expand_as(before)])


def _roots(values: Tensor) -> Tensor:
    # To the power of 0.5, as diffusers writes it, is torch's square root.
    return each(torch.sqrt, values)


def _scales(a: Tensor, p: Tensor, eta: float = 0.0) -> Scales:
    """Steps from ᾱ = a to ᾱ = p by the operations of diffusers, in the dtype of a; then float64."""
    signal, next_signal = _roots(torch.stack([a, p]))
    sigma, direction = _roots(torch.stack([1 - a, 1 - p]))
    noise = torch.zeros_like(a)
    if eta > 0:
        noise = eta * _roots((1 - p) / (1 - a) * (1 - a / p))
        direction = _roots(settled(1 - p - noise**2))
    return Scales(*(v.double() for v in (signal, sigma, next_signal, direction, noise)))


class _BothSigns(StepTable):
    """Rows made from `_doubled`, which are those of t in [−T, T)."""

    def _index(self, indices: Tensor, single: dict[int, Tensor], row: int) -> Tensor:
        count = self.rows.shape[0] // 2
        if not -count <= row < count:
            raise IndexError(
                f"timestep: expected an index of alphas_cumprod, in [{-count}, {count}), got {row}"
            )
        return super()._index(indices, single, row)


def _finite(row: Row) -> Row:
    """1/0 as a huge number."""
    return Row(
        *(
            v.nan_to_num(nan=float("nan"), posinf=_HUGE, neginf=-_HUGE)
            if isinstance(v, Tensor)
            else v
            for v in row
        )
    )


def _valid(config: Any) -> bool:
    """Whether there are rows for it; else diffusers says what is wrong."""
    thresholded = not config.get("thresholding") or 0 < config["dynamic_thresholding_ratio"] <= 1
    return thresholded and config["prediction_type"] in PREDICTIONS


def _limits(config: Any) -> tuple[float | None, Fit | None]:
    """(clip, fit) of a config."""
    if config.get("thresholding"):
        return None, Fit(0.0, config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return (config["clip_sample_range"] if config["clip_sample"] else None), None


def _output(cls: Any, prev_sample: Tensor, pred_original_sample: Tensor) -> Any:
    """The output object of diffusers, whose own constructor takes longer than a small step."""
    output = cls.__new__(cls)
    OrderedDict.__setitem__(output, "prev_sample", prev_sample)
    OrderedDict.__setitem__(output, "pred_original_sample", pred_original_sample)
    fields = output.__dict__
    fields["prev_sample"] = prev_sample
    fields["pred_original_sample"] = pred_original_sample
    return output


class _Ddim(_Noising):
    """`step` of the two DDIM schedulers."""

    final_alpha_cumprod: Tensor
    _output_class: Any

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As in diffusers."""
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._keep_host_copy(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step, as in diffusers, in one pass.

        Args:
            model_output, sample: `[B, …]`, floating point.
            timestep: an int, or a tensor with one; need not be among `timesteps`.
            eta: η of eq. 16 of arXiv 2010.02502.
            use_clipped_model_output: re-derive epsilon from the clipped x_0.
            generator, variance_noise: of the noise where η > 0; at most one of them.
            return_dict: return diffusers' output object instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, each shaped like `sample`.

        Raises:
            ValueError: both kinds of noise are given, `set_timesteps` was not called, or the
                config's prediction type is unknown.
            IndexError: the timestep is no index of `alphas_cumprod`.
        """
        state = self._state(sample, model_output)
        table = None if state is None else self._table(eta, use_clipped_model_output)
        if state is None or table is None:
            return super().step(  # type: ignore[misc]
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        keys = None
        if eta > 0:
            if variance_noise is not None:
                if generator is not None:
                    raise ValueError(
                        "Cannot pass both generator and variance_noise. Please make sure that "
                        "either `generator` or `variance_noise` stays `None`."
                    )
                if variance_noise.shape != sample.shape:
                    variance_noise = variance_noise.expand(sample.shape)
            elif generator is None and self._work.seed is not None:
                keys = self._philox_keys(timestep, state)
            else:
                variance_noise = randn_tensor(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device,
                    dtype=model_output.dtype,
                )
        else:
            variance_noise = None
        row = self._row(timestep, state.device)
        results = table(state, model_output, row, noise=variance_noise, keys=keys)
        return _output(self._output_class, *results) if return_dict else results

    def _table(self, eta: Any, rederive_eps: bool, final: Tensor | None = None) -> StepTable | None:
        """None where diffusers has to say what is wrong, or to do what the kernel does not."""
        alphas, final_alpha = self.alphas_cumprod, self.final_alpha_cumprod
        steps = self.num_inference_steps
        numbers = (eta, rederive_eps, steps, alphas._version, final_alpha._version)
        work = self._work
        last = work.last
        # `_tables` asks the same; here it costs less.
        if (
            last[0] == numbers
            and last[1] is alphas
            and last[2] is final_alpha
            and last[3] is self.__dict__["_internal_dict"]
            and last[4] is final
        ):
            known: StepTable = last[5]
            return known
        tables = self._tables("step", (final_alpha,), (final_alpha._version, steps))
        key = (eta, rederive_eps, final)
        table: StepTable | None = tables.get(key) if eta.__class__ in (float, int) else None
        if table is None:
            config = self.config
            if steps is None or not _valid(config):
                return None
            if not isinstance(eta, float | int) or eta < 0:
                return None
            table = tables[key] = self._make_table(config, steps, eta, rederive_eps, final)
        work.last = (numbers, alphas, final_alpha, self.__dict__["_internal_dict"], final, table)
        return table

    def _make_table(
        self, config: Any, steps: int, eta: float, rederive_eps: bool, final: Tensor | None
    ) -> StepTable:
        alphas = self.alphas_cumprod.to("cpu")
        last = (self.final_alpha_cumprod if final is None else final).to(alphas)
        previous = _strided(alphas, config["num_train_timesteps"] // steps, last)
        clip, fit = _limits(config)
        update = Update(
            eta=float(eta),
            prediction=config["prediction_type"],
            clip=clip,
            rederive_eps=bool(rederive_eps),
        )
        scales = _scales(*_doubled(alphas, previous, last), float(eta))
        return _BothSigns(stack_row(_finite(row_of(scales, update))), fit=fit)


class DDIMScheduler(_Ddim, _ddim.DDIMScheduler):  # type: ignore[misc]
    """diffusers' `DDIMScheduler` with fused steps; see the module for what is the same.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDIMScheduler()
    scheduler = fastddim.integrations.diffusers.DDIMScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.ones(1, 3, 8, 8))
    ```
    """

    _output_class = _ddim.DDIMSchedulerOutput


class DDIMParallelScheduler(_Ddim, _ddim_parallel.DDIMParallelScheduler):  # type: ignore[misc]
    """diffusers' `DDIMParallelScheduler` with fused steps; see the module for what is the same.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDIMParallelScheduler()
    scheduler = fastddim.integrations.diffusers.DDIMParallelScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.batch_step_no_noise(torch.zeros(2, 8), torch.tensor([980, 0]), torch.ones(2, 8))
    ```
    """

    _output_class = _ddim_parallel.DDIMParallelSchedulerOutput

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """A step of each sample from its own timestep, as in diffusers.

        After the last timestep ᾱ is 1 here even where `set_alpha_to_one` is False.

        Args:
            model_output, sample: `[B, …]`.
            timesteps: `[B]`.
            eta: 0.

        Returns:
            The samples at the timesteps before, in float32 at least.
        """
        state, table = self._state(sample, model_output), None
        if state is not None and eta == 0 and timesteps.numel() in (1, len(sample)):
            table = self._table(0.0, use_clipped_model_output, _ONE)
        if state is None or table is None:
            return super().batch_step_no_noise(
                model_output, timesteps, sample, eta, use_clipped_model_output
            )
        # ᾱ of many timesteps has a part in the dtype of the result, unlike ᾱ of one.
        state = state.to(torch.promote_types(state.dtype, self.alphas_cumprod.dtype))
        row = timesteps.reshape(-1).to(state.device, torch.int64)
        row = row.remainder(2 * len(self.alphas_cumprod))
        return table(state, model_output, row, return_x0=False)[0]


_ONE = torch.tensor(1.0, device="cpu")


class DDIMInverseScheduler(_Fused, _ddim_inverse.DDIMInverseScheduler):  # type: ignore[misc]
    """diffusers' `DDIMInverseScheduler` with fused steps; see the module for what is the same.

    The model is to be run at the timestep that a step ends at, an explicit guess;
    `fastddim.invert(refine=…)` iterates on it.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDIMInverseScheduler()
    scheduler = fastddim.integrations.diffusers.DDIMInverseScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.ones(1, 3, 8, 8))
    ```
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As in diffusers."""
        super().set_timesteps(num_inference_steps)
        self._keep_host_copy(device)

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """One step up to `timestep`, as in diffusers, in one pass.

        Args:
            model_output, sample: `[B, …]`, floating point.
            timestep: an int, or a tensor with one.
            return_dict: return diffusers' output object instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, each shaped like `sample`.

        Raises:
            IndexError: the timestep is no index of `alphas_cumprod`.
        """
        state = self._state(sample, model_output)
        table = None if state is None else self._table()
        if state is None or table is None:
            return super().step(model_output, timestep, sample, return_dict)
        results = table(state, model_output, self._row(timestep, state.device))
        return _output(_ddim_inverse.DDIMSchedulerOutput, *results) if return_dict else results

    def _table(self) -> StepTable | None:
        steps, config = self.num_inference_steps, self.config
        initial = self.initial_alpha_cumprod
        tables = self._tables("step", (initial,), (initial._version, steps))
        if "step" not in tables:
            if steps is None or not _valid(config):
                return None
            alphas = self.alphas_cumprod.to("cpu")
            initial = initial.to(alphas)
            at_start = _strided(alphas, config["num_train_timesteps"] // steps, initial)
            clip = config["clip_sample_range"] if config["clip_sample"] else None
            update = Update(prediction=config["prediction_type"], clip=clip)
            ends, starts = _doubled(alphas, at_start, initial)
            row = row_of(_scales(starts, ends), update)
            tables["step"] = _BothSigns(stack_row(_finite(row)))
        table: StepTable = tables["step"]
        return table


class DDPMScheduler(_Noising, _ddpm.DDPMScheduler):  # type: ignore[misc]
    """diffusers' `DDPMScheduler` with fused steps; see the module for what is the same.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDPMScheduler()
    scheduler = fastddim.integrations.diffusers.DDPMScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.ones(1, 3, 8, 8))
    ```
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As in diffusers."""
        super().set_timesteps(num_inference_steps, timesteps=timesteps)  # type: ignore[arg-type]
        self._keep_host_copy(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One ancestral step (arXiv 2006.11239, eq. 7), as in diffusers, in one pass.

        Args:
            model_output: `[B, C, …]`, or `[B, 2C, …]` where the variance is learned.
            timestep: an int, or a tensor with one, among `timesteps` once these are set.
            sample: `[B, C, …]`, floating point.
            generator: of the noise, which is added where t > 0.
            return_dict: return diffusers' output object instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, each shaped like `sample`.

        Raises:
            IndexError: the timestep is not among `timesteps`.
            ValueError: the config's prediction type is unknown.
        """
        learned = self.variance_type in ("learned", "learned_range")
        predicted = None
        mean = model_output
        if learned and model_output.shape[1] == 2 * sample.shape[1]:
            mean, predicted = model_output.split(sample.shape[1], dim=1)
        state = self._state(sample, mean)
        table = None if state is None else self._table()
        t = self._host_value(timestep)
        t = int(timestep) if t is None else t
        missing = learned and predicted is None
        if state is None or table is None or t not in table.visited or missing:
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise, keys = None, None
        if t > 0:
            if predicted is None and generator is None and self._work.seed is not None:
                keys = self._philox_keys(t, state)
            else:
                noise = randn_tensor(
                    mean.shape, generator=generator, device=mean.device, dtype=mean.dtype
                )
        if noise is not None and predicted is not None:
            noise = self._deviation(table, t, predicted) * noise
        results = table(state, mean, t, noise=noise, keys=keys)
        return _output(_ddpm.DDPMSchedulerOutput, *results) if return_dict else results

    def _deviation(self, table: _Ancestral, t: int, predicted: Tensor) -> Tensor:
        """Standard deviation of the noise of each element, where it is learned."""
        if self.variance_type == "learned":
            return predicted**0.5
        low, high = table.log_variances[t]
        fraction = (predicted + 1) / 2
        return torch.exp(0.5 * (fraction * high + (1 - fraction) * low))

    def _table(self) -> _Ancestral | None:
        steps, config = self.num_inference_steps, self.config
        timesteps = self.timesteps
        numbers = (timesteps._version, steps, self.custom_timesteps, self.variance_type)
        tables = self._tables("step", (timesteps,), numbers)
        table: _Ancestral | None = tables.get("step")
        if table is None:
            if self.variance_type != config["variance_type"] or not _valid(config):
                return None
            table = tables["step"] = self._make_table(config)
        return table

    def _make_table(self, config: Mapping[str, Any]) -> _Ancestral:
        alphas = self.alphas_cumprod.to("cpu")
        count = len(alphas)
        if self.custom_timesteps or self.num_inference_steps:
            visited = self._on_host().values
            # Where a timestep is there twice, diffusers finds the first.
            pairs = list(zip(visited, [*visited[1:], -1], strict=True))[::-1]
            previous = dict(pairs)
        else:
            previous = {t: t - 1 for t in range(count)}
        before = torch.ones_like(alphas).repeat(2)
        for t, earlier in previous.items():
            if earlier >= 0:
                before[t] = alphas[earlier]
        a, p = alphas.repeat(2), before
        k0, kx, variance, large = _posterior(a, p)
        signal, sigma = _roots(a).double(), _roots(1 - a).double()
        cx, cm, _, _ = prediction_coefficients(signal, sigma, config["prediction_type"])
        clip, fit = _limits(config)
        row = Row(
            cx=cx,
            cm=cm,
            r=float("inf") if clip is None else clip,
            k0=k0.double(),
            kx=kx.double(),
            km=0.0,
            pn=_fixed_deviation(config["variance_type"], variance, large).double(),
            g=1.0,
        )
        table = _Ancestral(stack_row(_finite(row)), fit=fit)
        table.visited = frozenset(previous)
        if config["variance_type"] == "learned_range":
            logs = [each(torch.log, v[:count]) for v in (variance, large)]
            table.log_variances = torch.stack(logs, dim=1).tolist()
        return table


class _Ancestral(_BothSigns):
    """Rows of DDPM's steps."""

    visited: frozenset[int]
    log_variances: list[list[float]]
    """(smallest, largest) of each timestep, where the variance is learned between them."""


def _posterior(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of x_0 and x_t in the posterior mean, and the smaller and the larger variance
    (arXiv 2006.11239, eq. 7 and section 3.2).
    """
    ratio = a / p
    large = 1 - ratio
    k0 = _roots(p) * large / (1 - a)
    kx = _roots(ratio) * (1 - p) / (1 - a)
    variance = ((1 - p) / (1 - a) * large).clamp(min=1e-20)
    return k0, kx, variance, large


def _fixed_deviation(variance_type: str, variance: Tensor, large: Tensor) -> Tensor:
    """Standard deviation of the noise of each timestep; 1 where the noise is scaled before."""
    if variance_type == "fixed_small":
        return _roots(variance)
    if variance_type == "fixed_small_log":
        return each(lambda v: torch.exp(0.5 * torch.log(v)), variance)
    if variance_type == "fixed_large":
        return _roots(large)
    if variance_type == "fixed_large_log":
        return _roots(each(torch.log, large))
    return torch.ones_like(variance)
