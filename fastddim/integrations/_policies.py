"""Prepared samplers for robot policies, whose own loops walk a scheduler of diffusers.

Such a loop draws x_T, and then takes `scheduler.step(model(x_t, t, ...), t, x_t)` down the
scheduler's timesteps. `Samplers` prepares a `fastddim.Sampler` of the same steps, which draws the
same noise with the same calls from the same generators.

An integration asks `Samplers.takes` first, describes the call as a `LoopCall`, and draws with the
sampler from `Samplers.find`. If either refuses, it calls the policy's own loop.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastddim import transfer
from fastddim.adapter import Model, check_eval, output_tensor
from fastddim.cache import Cache
from fastddim.choices import Graph, Impl
from fastddim.integrations._scheduler_steps import SchedulerSteps, Uncovered
from fastddim.integrations._tables import version
from fastddim.kept import elsewhere
from fastddim.loop.capture import GRAPH_MODES
from fastddim.loop.setup import make_setup, resolve_placement
from fastddim.notices import warn_once
from fastddim.options import SamplerOptions
from fastddim.plan import Plan
from fastddim.sampler import Sampler
from fastddim.tracing import PLAIN, in_program
from fastddim.transforms import transformed
from fastddim.validation import check_choice

_KEPT = 4
"""The number of samplers that are kept for one policy."""


_SETTINGS = ("config", "variance_type", "alphas_cumprod", "final_alpha_cumprod")
"""Attributes of schedulers that determine their steps."""


class LoopCall(NamedTuple):
    """A call of a policy's loop.

    Attributes:
        model: `model(x_t, t, **model_kwargs)`, a network or its stand-in; the same object in every
            call.
        scheduler: a scheduler of diffusers.
        steps: `num_inference_steps`.
        shape: (B, …) of the state.
        dtype: dtype of the state.
        device: device of the state.
        model_kwargs: tensors with one row, or one for each sample, and other values.
        step_kwargs: arguments of the scheduler's `step` besides a generator.
    """

    model: Model
    scheduler: Any
    steps: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    model_kwargs: Mapping[str, Any] = MappingProxyType({})
    step_kwargs: Mapping[str, Any] = MappingProxyType({})

    @property
    def key(self) -> Hashable:
        """All that a sampler depends on except the values of tensors; objects count by `id`."""
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        return (
            *map(id, self.sources),
            None if alphas is None else version(alphas),
            self.steps,
            self.shape,
            self.dtype,
            self.device,
            _autocast_dtype(self.device),
            *map(_leaf_key, self.model_kwargs.items()),
            *map(_leaf_key, self.step_kwargs.items()),
        )

    @property
    def sources(self) -> tuple[Any, ...]:
        """The objects in the key. A scheduler with changed settings has a new config."""
        scheduler = self.scheduler
        return self.model, scheduler, *(getattr(scheduler, name, None) for name in _SETTINGS)


class Samplers:
    """The prepared samplers of one policy, each found by all that it depends on.

    Threads may share the samplers.
    """

    def __init__(self, peer: str, *, graph: Graph = "auto", impl: Impl = "auto") -> None:
        """Prepare for one policy.

        Args:
            peer: the code base of the loop, as warnings name it.
            graph, impl: as in `fastddim.Sampler`.

        Raises:
            ValueError: an option is unknown.
        """
        check_choice("graph", graph, GRAPH_MODES)
        check_choice("impl", impl, get_args(Impl))
        self._peer, self._graph, self._impl = peer, graph, impl
        # A string gives the reason why there is no sampler.
        self._kept: Cache[PolicySampler | str] = Cache(_KEPT)

    def find(self, call: LoopCall) -> PolicySampler | None:
        """The sampler for a call; None, with a warning, if only the policy's own loop can take it.

        Raises:
            ValueError: the scheduler refuses the number of steps, in its own words.
        """
        key = call.key
        found = self._kept.get(key)
        if found is None or (isinstance(found, PolicySampler) and not found.current):
            found = self._prepared(call)
            self._kept.put(key, found, call.sources)
        if isinstance(found, str):
            self.warn(found)
            return None
        return found

    def _prepared(self, call: LoopCall) -> PolicySampler | str:
        try:
            # Prepared outside the caller's modes, since the steps are kept.
            steps = elsewhere(
                lambda: SchedulerSteps.of(call.scheduler, call.steps, call.step_kwargs)
            )
        except Uncovered as reason:
            return str(reason)
        options = SamplerOptions(
            model=call.model,
            steps=call.steps,
            shape=call.shape,
            dtype=call.dtype,
            model_dtype=call.dtype,
            device=call.device,
            graph=self._graph,
            impl=self._impl,
            model_kwargs=dict(call.model_kwargs),
        )
        return PolicySampler(steps, options)

    def warn(self, reason: str) -> None:
        """Warn, once in a process, of a reason why the policy's own loop is used."""
        warn_once(
            f"{self._peer}: the policy's own loop is taken, since {reason}", self._peer, reason
        )

    def takes(self, network: nn.Module, *tensors: Tensor | None) -> bool:
        """Tell whether a sampler can replace the loop now: not in programs, under transforms, in
        the caller's capture, or when gradients are requested. A network in training mode is refused
        with a warning.

        Args:
            tensors: all tensors that the loop is given.
        """
        if in_program() or transformed():
            return False
        given = [tensor for tensor in tensors if tensor is not None]
        if any(type(t) not in PLAIN or transfer.captured(t.device) for t in given):
            return False
        if network.training and _trains(network):
            self.warn("its network is in training mode; call policy.eval()")
            return False
        return not torch.is_grad_enabled() or not any(
            t.requires_grad for t in (*given, *network.parameters())
        )


class PolicySampler:
    """A sampler of the steps of a policy's loop, with the noise of that loop.

    Calls from several threads wait for each other.
    """

    def __init__(self, steps: SchedulerSteps, options: SamplerOptions) -> None:
        """Prepare the sampler.

        Args:
            steps: steps of the scheduler.
            options: all options except the steps.
        """
        self._sampler = _Planned(steps.plan, options)
        self._steps = steps
        self._noise_dtype = self._sampler.dtype
        if steps.drawn:
            # The loop draws noise like the model's output, whose dtype may differ.
            self._noise_dtype = _output(options, self._sampler, steps.plan.timesteps[0]).dtype
        # Reentrant, so a network that samples from its own policy gets an error, not a deadlock.
        self._alone = threading.RLock()

    @property
    def current(self) -> bool:
        """Tell whether the network still has the device and the dtype that it had."""
        try:
            for weight in self._sampler._weights:
                weight.check()
        except ValueError:
            return False
        return True

    def draw(
        self,
        model_kwargs: Mapping[str, Any],
        generator: torch.Generator | None = None,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Draw the samples `[B, …]` of the loop into a new tensor.

        Args:
            model_kwargs: like those that the sampler was made for.
            generator: generator of x_T and of the noise, left in the state in which the loop leaves
                it; None for torch's own generator of the device.
            x_T: starting state, instead of one that is drawn.

        Raises:
            RuntimeError: x_T is drawn, and the generator belongs to another device.
        """
        sampler = self._sampler
        with self._alone:
            if x_T is None:
                x_T = torch.randn(
                    sampler.shape, generator=generator, dtype=sampler.dtype, device=sampler.device
                )
            # The policy's loop evaluates the network in the caller's mode.
            sampler._evaluate_in_inference_mode(torch.is_inference_mode_enabled())
            drawn: Tensor = sampler(
                model_kwargs=model_kwargs or None, x_T=x_T, noise=self._noise(generator)
            )
        return drawn

    def _noise(self, generator: torch.Generator | None) -> Tensor | None:
        """The noise `[S, B, …]` of all steps, drawn only for steps that draw it in the loop."""
        if not self._steps.drawn:
            return None
        shape = (self._steps.plan.steps, *self._sampler.shape)
        noise = torch.empty(shape, dtype=self._noise_dtype, device=self._sampler.device)
        rows = noise.unbind()
        for s in self._steps.drawn:
            _draw(rows[s], generator)
        return noise


def _trains(network: nn.Module) -> bool:
    """Tell whether a network itself, not only a wrapper around it, is in training mode."""
    try:
        check_eval(network)
    except ValueError:
        return True
    return False


def _output(options: SamplerOptions, sampler: Sampler, timestep: Tensor) -> Tensor:
    """The output of the model at a timestep."""
    x = torch.zeros(sampler.shape, dtype=sampler.dtype, device=sampler.device)
    t = torch.full((len(x),), int(timestep), device=x.device)
    with torch.no_grad():
        output: Tensor = output_tensor(options.model(x, t, **(options.model_kwargs or {})))
    return output


def _draw(out: Tensor, generator: torch.Generator | None) -> None:
    """Fill a tensor with standard normals as diffusers draws them, on the CPU for a CPU generator.

    The numbers are those of `torch.randn`, which fills its result with `normal_`.
    """
    if generator is None or generator.device.type == out.device.type:
        out.normal_(generator=generator)
    else:
        out.copy_(
            torch.randn(out.shape, generator=generator, dtype=out.dtype, device=generator.device)
        )


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in, or None without autocast."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _leaf_key(item: tuple[str, Any]) -> Hashable:
    name, value = item
    if isinstance(value, Tensor):
        return name, value.shape, value.dtype, value.device
    return name, value if isinstance(value, bool | int | float | str | None) else id(value)


class _Planned(Sampler):
    """A sampler of a given plan, rather than one made from a schedule."""

    @torch.inference_mode(False)
    def __init__(self, plan: Plan, options: SamplerOptions) -> None:
        dtype, device = resolve_placement(options, options.model)
        assert options.shape is not None
        shape = tuple(options.shape)
        self._prepare(options, make_setup(options, plan, shape, dtype=dtype, device=device))
