"""Prepared sampling for the diffusion policies of real-stanford/diffusion_policy.

```python
import torch, fastddim.integrations.diffusion_policy as fast
fast.install(policy)  # such as the ema_model of a workspace, in eval mode
with torch.inference_mode():
    action = policy.predict_action(obs)["action"]
```

`install` gives one policy another `conditional_sample`, in which the loop over a scheduler of
diffusers is one call of a prepared `fastddim.Sampler`: on a GPU, one launch of a CUDA graph a tick.
The policy itself encodes the observation once a tick, and the result is copied into the memory that
the graph reads. Actions, and the state of the generator afterwards, are those of the original to
rounding. Two properties of the original are kept:

- known data, such as inpainted observations, are clean at every step, while `mask` and `known` of
  `fastddim.sample` mix them to the noise level of the step: the network reads known data in place
  of the state, and they overwrite the result;
- the steps are those of diffusers' `DDIMScheduler` or `DDPMScheduler`, including their deviations
  from the paper.

Three things differ. The network gets a timestep for each sample, `[B]`, while the original gives it
one. In half precision and under autocast, a step is computed in float32 and rounded once. The
scheduler's own `timesteps` are not set.

The policy's own loop runs instead, with a warning that gives the reason, for a network in training
mode, for a scheduler that is neither DDPM's nor DDIM's or learns its variance, for dynamic
thresholding, whose threshold depends on known data, for a mask without the shape of the data, and
for arguments of the scheduler's `step` other than `eta` and `use_clipped_model_output`. It also
runs, without a warning, when gradients are requested, and inside the caller's programs of
`torch.compile` and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fastddim.choices import Graph, Impl
from fastddim.integrations._conditional_sample import METHOD, ConditionalSample
from fastddim.integrations._hooks import Hooks
from fastddim.integrations._policies import LoopCall

_Policy = TypeVar("_Policy")

_UNETS = (
    "DiffusionUnetLowdimPolicy",
    "DiffusionUnetImagePolicy",
    "DiffusionUnetHybridImagePolicy",
    "DiffusionUnetVideoPolicy",
)
_TRANSFORMERS = ("DiffusionTransformerLowdimPolicy", "DiffusionTransformerHybridImagePolicy")


def install(policy: _Policy, *, graph: Graph = "auto", impl: Impl = "auto") -> _Policy:
    """Let a policy sample with prepared samplers. Call it again to change the options.

    Copies and pickles of the policy, such as averaged ones, do the same, each with its own network.
    You may train, replace, convert or move the network later, and set another scheduler and
    `num_inference_steps`.

    Args:
        policy: one of the repository's six diffusion policies, or of a subclass that does not
            override `conditional_sample`. Its class and other policies stay unchanged.
        graph, impl: as in `fastddim.Sampler`.

    Returns:
        The policy.

    Raises:
        TypeError: it is not such a policy, or its scheduler is neither DDPM's nor DDIM's.
        ValueError: its `conditional_sample` is not the repository's, or an option is unknown.
    """
    _kind_of(policy).install(policy, graph, impl)
    return policy


def uninstall(policy: _Policy) -> _Policy:
    """Undo `install` on a policy, or on a copy of one; without `install`, do nothing.

    Returns:
        The policy.

    Raises:
        TypeError: it is none of the repository's diffusion policies.
    """
    _kind_of(policy).uninstall(policy)
    return policy


def _kind_of(policy: Any) -> type[_OfUnet] | type[_OfTransformer]:
    """The class for a policy's way of calling its network, by the names of the policy's classes,
    since nothing of the repository is imported.
    """
    names = {base.__name__ for base in type(policy).__mro__}
    if not names.isdisjoint(_UNETS):
        return _OfUnet
    if not names.isdisjoint(_TRANSFORMERS):
        return _OfTransformer
    known = ", ".join((*_UNETS, *_TRANSFORMERS))
    raise TypeError(f"policy: expected one of {known}, got {type(policy).__qualname__}")


class _ConditionalSample(ConditionalSample):
    """The `conditional_sample` of a policy."""

    peer = "diffusion_policy"
    hooks = Hooks(METHOD, of=(*_UNETS, *_TRANSFORMERS))

    _evaluate: ClassVar[Callable[..., Any]]
    """`(network, x, t, *, data, mask, ...)`, where `...` are the conditions by name."""

    def _build(self) -> None:
        super()._build()
        self._model: Any = None

    def _sample(
        self,
        data: Tensor,
        mask: Tensor,
        conditions: Mapping[str, Tensor | None],
        generator: torch.Generator | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Sample as the policy does.

        Args:
            data: `[B, T, D]`, floating point; known data where `mask` is true.
            mask: bool `[B, T, D]`.
            conditions: further arguments of the network, by name.
            generator: generator of x_T and the noise, or None for torch's own.
            kwargs: further arguments of the scheduler's `step`.

        Returns:
            The samples `[B, T, D]`.
        """
        given = {name: value for name, value in conditions.items() if value is not None}
        if self._takes(data, mask, *given.values()):
            given |= {"data": data, "mask": mask}
            call = self._call(data, given, kwargs)
            sampler = self._samplers.find(call)
            if sampler is not None:
                return torch.where(mask, data, sampler.draw(given, generator))
        return self._own_loop(data, mask, **conditions, generator=generator, **kwargs)

    def _takes(self, data: Tensor, mask: Tensor, *conditions: Tensor) -> bool:
        """Tell whether a sampler may replace the loop, as far as the steps do not matter."""
        if not self._samplers.takes(self._owner.model, data, mask, *conditions):
            return False
        scheduler, reason = self._owner.noise_scheduler, None
        if mask.dtype is not torch.bool or mask.shape != data.shape:
            reason = f"condition_mask is not a bool tensor of shape {tuple(data.shape)}"
        elif getattr(scheduler.config, "thresholding", False):
            # There, the sampler's state has values other than the known ones.
            reason = "its scheduler has thresholding=True, whose threshold depends on known data"
        if reason is not None:
            self._samplers.warn(reason)
        return reason is None

    def _call(
        self, data: Tensor, given: Mapping[str, Tensor], kwargs: Mapping[str, Any]
    ) -> LoopCall:
        return LoopCall(
            self._inpainting(self._owner.model),
            self._owner.noise_scheduler,
            self._owner.num_inference_steps,
            tuple(data.shape),
            data.dtype,
            data.device,
            given,
            kwargs,
        )

    def _inpainting(self, network: Any) -> Any:
        """The network as samplers evaluate it: the same object while the network is the same."""
        model = self._model
        if model is None or model.args[0] is not network:
            model = self._model = partial(self._evaluate, network)
        return model


def _evaluate_unet(
    network: Any,
    x: Tensor,
    t: Tensor,
    *,
    data: Tensor,
    mask: Tensor,
    local_cond: Tensor | None = None,
    global_cond: Tensor | None = None,
) -> Any:
    x = torch.where(mask, data, x)
    return network(x, t, local_cond=local_cond, global_cond=global_cond)


class _OfUnet(_ConditionalSample):
    _evaluate = staticmethod(_evaluate_unet)

    def __call__(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        conditions = {"local_cond": local_cond, "global_cond": global_cond}
        return self._sample(condition_data, condition_mask, conditions, generator, kwargs)


def _evaluate_transformer(
    network: Any,
    x: Tensor,
    t: Tensor,
    *,
    data: Tensor,
    mask: Tensor,
    cond: Tensor | None = None,
) -> Any:
    return network(torch.where(mask, data, x), t, cond)


class _OfTransformer(_ConditionalSample):
    _evaluate = staticmethod(_evaluate_transformer)

    def __call__(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self._sample(condition_data, condition_mask, {"cond": cond}, generator, kwargs)
