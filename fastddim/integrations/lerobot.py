"""Prepared sampling for LeRobot's diffusion policies.

```python
import fastddim.integrations.lerobot
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
policy = DiffusionPolicy.from_pretrained("lerobot/diffusion_pusht")  # or yours, in eval mode
fastddim.integrations.lerobot.install(policy)
action = policy.select_action(observation)
```

The policy's actions stay the same to rounding. Noise is drawn by the same calls from the same
generator. Only the loop over the scheduler is replaced: it is prepared once, without Python between
the evaluations of the U-Net, and on CUDA it is one graph. A tick encodes its observations as
before, and copies the features to the memory that the graph reads.

The first tick prepares a sampler. Another one is prepared when something changes that the sampler
depends on: the number of environments, `num_inference_steps`, the scheduler or its config, the
dtype or the device. The last four samplers are kept. Weights may be loaded or trained in between.
Copies and pickles of the policy have samplers of their own, and loading a pickle needs fastddim.
Threads that share a policy wait for each other.

A policy that PEFT has wrapped is handled as the policy inside it. You may also wrap it afterwards.
A CUDA graph keeps the adapter that it was captured with: `install` again after you set another
adapter or disable them.

LeRobot's own loop runs instead, with a warning that gives the reason, for a policy in training
mode, a learned variance, and schedulers that are neither DDPM's nor DDIM's or have steps of their
own. It also runs, without a warning, when gradients are requested, and inside the caller's programs
of `torch.compile` and CUDA graphs. LeRobot makes such a program of `predict_action_chunk` for a
rollout with `use_torch_compile`. Its `compile_model` compiles only the U-Net, which a sampler
evaluates; modes of the compiler with CUDA graphs of their own are untested in a captured loop.

Two things differ. In half precision and under autocast, a step is computed in float32 and rounded
once, while diffusers rounds every operation. The scheduler's own `timesteps` are not set.

Compared with lerobot 0.6.1 on Python 3.12 and 3.13, with 0.4.4 on older ones, and by hand with
0.3.3, 0.4.0, 0.5.0, 0.5.1 and 0.6.0. LeRobot 0.6 needs Python 3.12 and a torch below 2.12, and has
diffusers in an extra: `pip install "lerobot[diffusion]"`. Earlier releases need a torch below 2.11,
and fastddim a newer one: pip cannot satisfy both.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastddim.choices import Graph, Impl
from fastddim.integrations._conditional_sample import METHOD, ConditionalSample
from fastddim.integrations._hooks import Hooks
from fastddim.integrations._policies import LoopCall

_Policy = TypeVar("_Policy")

_CLASS = "DiffusionModel"


def install(policy: _Policy, *, graph: Graph = "auto", impl: Impl = "auto") -> _Policy:
    """Let a `DiffusionPolicy` sample with prepared samplers. Call it again to change the options.

    Args:
        policy: a policy of LeRobot. Its class and other policies stay unchanged.
        graph, impl: as in `fastddim.Sampler`.

    Returns:
        The policy.

    Raises:
        TypeError: it is not a diffusion policy of LeRobot, or its scheduler is neither DDPM's nor
            DDIM's.
        ValueError: its `conditional_sample` is not LeRobot's, or an option is unknown.
    """
    _ConditionalSample.install(_diffusion_of(policy), graph, impl)
    return policy


def uninstall(policy: _Policy) -> _Policy:
    """Undo `install` on a policy, or on a copy of one; without `install`, do nothing.

    Returns:
        The policy.

    Raises:
        TypeError: it is not a diffusion policy of LeRobot.
    """
    _ConditionalSample.uninstall(_diffusion_of(policy))
    return policy


def _diffusion_of(policy: Any) -> Any:
    """The `DiffusionModel` of a policy, known by its class name, since LeRobot is not imported."""
    diffusion = getattr(policy, "diffusion", None)
    if all(base.__name__ != _CLASS for base in type(diffusion).__mro__):
        raise TypeError(
            f"policy: expected a DiffusionPolicy of LeRobot, got {type(policy).__qualname__}"
        )
    return diffusion


class _ConditionalSample(ConditionalSample):
    """The `conditional_sample` of a `DiffusionModel`."""

    peer = "lerobot"
    hooks = Hooks(METHOD, of=(_CLASS,))

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
            generator: generator of the noise; None for torch's own.
            noise: x_T `[B, horizon, action_dim]`; None to draw it.

        Returns:
            Actions `[B, horizon, action_dim]`.
        """
        if self._samplers.takes(self._owner.unet, global_cond, noise):
            call = self._call(batch_size, global_cond, noise)
            sampler = self._samplers.find(call)
            if sampler is not None:
                return sampler.draw(call.model_kwargs, generator, noise)
        # LeRobot 0.3.3 does not have the argument noise.
        given = {} if noise is None else {"noise": noise}
        return self._own_loop(batch_size, global_cond, generator, **given)

    def _call(self, batch_size: int, global_cond: Tensor | None, noise: Tensor | None) -> LoopCall:
        diffusion = self._owner
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
