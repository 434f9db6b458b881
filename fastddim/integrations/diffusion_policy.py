"""Prepared sampling for the diffusion policies of real-stanford/diffusion_policy.

```python
import torch, fastddim.integrations.diffusion_policy as fast
fast.install(policy)  # such as the ema_model of a workspace, in eval mode
with torch.inference_mode():
    action = policy.predict_action(obs)["action"]
```

`install` gives one policy another `conditional_sample`, in which the loop over a scheduler of
diffusers is one call of a prepared `fastddim.Sampler`: on a GPU one launch of a CUDA graph a tick.
The observation is encoded once a tick, by the policy itself, and copied into what was captured.
Actions are those of the original to rounding, and so is the state of the generator afterwards. Kept
from the original:

- known data, such as inpainted observations, are clean at every step, where `mask` and `known` of
  `fastddim.sample` mix them to the noise level of the step: the network reads them in the place of
  the state, and they are written over the result;
- the steps are those of diffusers' `DDIMScheduler` or `DDPMScheduler`, its deviations from the
  paper included.

Different: the network gets a timestep for each sample, `[B]`, where the original gives it one; the
scheduler's own timesteps are left as they were.

The policy's own loop is taken, with a warning, for another scheduler, a network in training mode,
dynamic thresholding, whose threshold known data have a part in, a mask that has not the shape of
the data, and arguments of the scheduler's `step` other than `eta` and `use_clipped_model_output`;
and without a warning where gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastddim.choices import Graph, Impl
from fastddim.integrations._hooks import Hooks
from fastddim.integrations._policies import LoopCall, Samplers
from fastddim.loop.copying import Rebuilt

_UNETS = (
    "DiffusionUnetLowdimPolicy",
    "DiffusionUnetImagePolicy",
    "DiffusionUnetHybridImagePolicy",
    "DiffusionUnetVideoPolicy",
)
_TRANSFORMERS = ("DiffusionTransformerLowdimPolicy", "DiffusionTransformerHybridImagePolicy")

_HOOKS = Hooks("conditional_sample", of=(*_UNETS, *_TRANSFORMERS))


def install(policy: Any, *, graph: Graph = "auto", impl: Impl = "auto") -> Any:
    """Let a policy sample through a prepared `fastddim.Sampler`.

    Copies and pickles of the policy, such as averaged ones, do so too, each with its own network.
    The network may be trained, replaced, converted or moved later, and the scheduler and
    `num_inference_steps` set anew.

    Args:
        policy: a policy of one of the repository's six diffusion classes, or of a subclass that
            does not override `conditional_sample`.
        graph, impl: as in `fastddim.Sampler`.

    Returns:
        The policy.

    Raises:
        TypeError: it is none.
    """
    names = {base.__name__ for base in type(policy).__mro__}
    if names.isdisjoint((*_UNETS, *_TRANSFORMERS)):
        known = ", ".join((*_UNETS, *_TRANSFORMERS))
        raise TypeError(f"policy: expected one of {known}, got {type(policy).__name__}")
    if not _installed(policy) and _HOOKS.overridden(policy) is not None:
        raise TypeError(
            "policy: expected the repository's own conditional_sample, got the one of "
            f"{type(policy).__name__}, which may sample in another way"
        )
    kind = _OfTransformer if names.isdisjoint(_UNETS) else _OfUnet
    policy.conditional_sample = kind(policy, graph, impl)
    return policy


def uninstall(policy: Any) -> None:
    """Let a policy sample by its own loop again.

    Raises:
        ValueError: `install` was not called with it, nor with what it is a copy of.
    """
    if not _installed(policy):
        raise ValueError(
            f"policy: expected one that install was called with, got {type(policy).__name__}"
        )
    del policy.conditional_sample


def _installed(policy: Any) -> bool:
    own = getattr(policy, "__dict__", {}).get("conditional_sample")
    return isinstance(own, _ConditionalSample)


class _ConditionalSample(Rebuilt):
    """`conditional_sample` of one policy; a copy belongs to the policy's copy."""

    _evaluate: ClassVar[Callable[..., Any]]
    """`(network, x, t, *, data, mask, ...)`, where `...` are the conditions by name."""

    def __init__(self, policy: Any, graph: Graph, impl: Impl) -> None:
        self._policy, self._graph, self._impl = policy, graph, impl
        self._rebuild()

    def _build(self) -> None:
        self._samplers = Samplers("diffusion_policy", graph=self._graph, impl=self._impl)
        self._model: Any = None

    def _functions(self) -> tuple[Any, ...]:
        return ()

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
            data: `[B, T, D]`, floating point; where `mask` is true, what is known.
            mask: bool `[B, T, D]`.
            conditions: further arguments of the network, by name.
            generator: of x_T and the noise, or None for torch's own.
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
        own: Tensor = type(self._policy).conditional_sample(
            self._policy, data, mask, **conditions, generator=generator, **kwargs
        )
        return own

    def _takes(self, data: Tensor, mask: Tensor, *conditions: Tensor) -> bool:
        """Whether a sampler may stand for the loop, as far as that does not depend on the steps."""
        if not self._samplers.takes(self._policy.model, data, mask, *conditions):
            return False
        scheduler, reason = self._policy.noise_scheduler, None
        if mask.dtype is not torch.bool or mask.shape != data.shape:
            reason = f"condition_mask is no bool tensor of shape {tuple(data.shape)}"
        elif getattr(scheduler.config, "thresholding", False):
            # The sampler's state has other values there than the known ones.
            reason = "its scheduler has thresholding=True, whose threshold depends on known data"
        if reason is not None:
            self._samplers.warn(reason)
        return reason is None

    def _call(
        self, data: Tensor, given: Mapping[str, Tensor], kwargs: Mapping[str, Any]
    ) -> LoopCall:
        return LoopCall(
            self._inpainting(self._policy.model),
            self._policy.noise_scheduler,
            self._policy.num_inference_steps,
            tuple(data.shape),
            data.dtype,
            data.device,
            given,
            kwargs,
        )

    def _inpainting(self, network: Any) -> Any:
        """The network as samplers evaluate it: one object as long as the network is the same."""
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
