"""Sampling of LeRobot's diffusion policies by prepared samplers.

```python
import fastddim.integrations.lerobot
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
policy = DiffusionPolicy.from_pretrained("lerobot/diffusion_pusht")  # or yours, in eval mode
fastddim.integrations.lerobot.install(policy)
action = policy.select_action(observation)
```

The policy's actions stay the same to rounding, with noise that is drawn by the same calls from the
same generator. Only the loop over the scheduler is another one: prepared once, without Python
between the evaluations of the U-Net, and on CUDA one graph. A tick encodes its observations as
before, and copies the features to where the graph reads them.

A sampler is prepared at the first tick, and again where something changes that it depends on: the
number of environments, `num_inference_steps`, the scheduler or its config, the dtype or the device.
The last four are kept. Weights may be loaded or trained in between. Copies and pickles of the
policy have samplers of their own, and a pickle needs fastddim where it is loaded. Threads that
share a policy wait for each other.

LeRobot's own loop is taken, with a warning that says why, for a policy in training mode, a learned
variance, and schedulers that are neither DDPM's nor DDIM's or have steps of their own. So it is,
without one, where gradients are asked for, and in programs of `torch.compile` and CUDA graphs of
the caller's.

Different: in half precision and under autocast a step is computed in float32 and rounded once,
where diffusers rounds every operation. The scheduler's own `timesteps` are not set.

Compared with lerobot 0.4.4, whose `conditional_sample` is that of 0.3.3 and 0.4.0.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastddim.choices import Graph, Impl
from fastddim.integrations._hooks import Hooks
from fastddim.integrations._policies import LoopCall, Samplers
from fastddim.integrations._scheduler_steps import SCHEDULERS, scheduler_kind
from fastddim.loop.copying import Rebuilt

Policy = TypeVar("Policy")

_METHOD = "conditional_sample"
_HOOKS = Hooks(_METHOD, of=("DiffusionModel",))


def install(policy: Policy, *, graph: Graph = "auto", impl: Impl = "auto") -> Policy:
    """Let a `DiffusionPolicy` sample by prepared samplers; again, to change the options.

    Args:
        policy: of LeRobot. Its class and other policies stay as they are.
        graph, impl: as in `fastddim.Sampler`.

    Returns:
        The policy.

    Raises:
        TypeError: it is no diffusion policy of LeRobot, or its scheduler neither DDPM's nor DDIM's.
        ValueError: its `conditional_sample` is not LeRobot's, or an option is unknown.
    """
    diffusion = _diffusion_of(policy)
    if not is_installed(diffusion):
        if _HOOKS.overridden(diffusion):
            raise ValueError(
                f"policy: expected LeRobot's own {_METHOD}, got {type(diffusion).__qualname__} "
                "with another"
            )
        scheduler = diffusion.noise_scheduler
        if scheduler_kind(scheduler) is None:
            raise TypeError(
                f"policy: expected a scheduler of {' or '.join(SCHEDULERS)}, "
                f"got {type(scheduler).__qualname__}"
            )
    setattr(diffusion, _METHOD, ConditionalSample(diffusion, graph, impl))
    return policy


def uninstall(policy: Policy) -> Policy:
    """Take back what `install` has done to a policy, if anything.

    Returns:
        The policy.

    Raises:
        TypeError: it is no diffusion policy of LeRobot.
    """
    diffusion = _diffusion_of(policy)
    if is_installed(diffusion):
        delattr(diffusion, _METHOD)
    return policy


def is_installed(diffusion: Any) -> bool:
    return isinstance(vars(diffusion).get(_METHOD), ConditionalSample)


def _diffusion_of(policy: Any) -> Any:
    """The `DiffusionModel` of a policy, told by the name of its class: LeRobot is not imported."""
    diffusion = getattr(policy, "diffusion", None)
    if all(base.__name__ != "DiffusionModel" for base in type(diffusion).__mro__):
        raise TypeError(
            f"policy: expected a DiffusionPolicy of LeRobot, got {type(policy).__qualname__}"
        )
    return diffusion


class ConditionalSample(Rebuilt):
    """`DiffusionModel.conditional_sample` of one model, on the model itself.

    A copy of the model has one that samples with the copy.
    """

    def __init__(self, diffusion: Any, graph: Graph, impl: Impl) -> None:
        """
        Args:
            diffusion: the `DiffusionModel`.
            graph, impl: as in `install`.
        """
        self._diffusion, self._graph, self._impl = diffusion, graph, impl
        self._rebuild()

    def _build(self) -> None:
        self._samplers = Samplers("lerobot", graph=self._graph, impl=self._impl)

    def _functions(self) -> tuple[Any, ...]:
        return (self._diffusion,)

    def __call__(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample action chunks, as LeRobot does.

        Args:
            batch_size: B, the number of environments.
            global_cond: features of the observations `[B, …]`.
            generator: of the noise; None for torch's own.
            noise: x_T `[B, horizon, action_dim]`; None to draw it.

        Returns:
            Actions `[B, horizon, action_dim]`.
        """
        diffusion = self._diffusion
        if self._samplers.takes(diffusion.unet, global_cond, noise):
            call = self._loop_call(batch_size, global_cond, noise)
            sampler = self._samplers.find(call)
            if sampler is not None:
                return sampler.draw(call.model_kwargs, generator, noise)
        own = getattr(type(diffusion), _METHOD)
        actions: Tensor = own(diffusion, batch_size, global_cond, generator, noise)
        return actions

    def _loop_call(
        self, batch_size: int, global_cond: Tensor | None, noise: Tensor | None
    ) -> LoopCall:
        diffusion = self._diffusion
        shape: tuple[int, ...]
        if noise is None:
            like, config = next(diffusion.parameters()), diffusion.config
            shape = (batch_size, config.horizon, config.action_feature.shape[0])
        else:
            like, shape = noise, tuple(noise.shape)
        return LoopCall(
            diffusion.unet,
            diffusion.noise_scheduler,
            diffusion.num_inference_steps,
            shape,
            like.dtype,
            like.device,
            {"global_cond": global_cond},
        )
