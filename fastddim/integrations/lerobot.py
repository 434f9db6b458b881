"""Sampling of LeRobot's diffusion policy by prepared samplers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.choices import Graph, Impl
from fastddim.integrations._policies import LoopCall, Samplers
from fastddim.loop.copying import Rebuilt


def install(policy: Any, *, graph: Graph = "auto", impl: Impl = "auto") -> Any:
    diffusion = policy.diffusion
    diffusion.conditional_sample = ConditionalSample(diffusion, graph, impl)
    return policy


class ConditionalSample(Rebuilt):
    """`conditional_sample` of one model, in place of its own method."""

    def __init__(self, diffusion: Any, graph: Graph, impl: Impl) -> None:
        self._diffusion, self._graph, self._impl = diffusion, graph, impl
        self._rebuild()

    def _build(self) -> None:
        self._samplers = Samplers("lerobot", graph=self._graph, impl=self._impl)

    def _functions(self) -> tuple[Any, ...]:
        return ()

    def __call__(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        diffusion = self._diffusion
        if self._samplers.takes(diffusion.unet, global_cond, noise):
            call = self._call(batch_size, global_cond, noise)
            sampler = self._samplers.find(call)
            if sampler is not None:
                return sampler.draw(call.model_kwargs, generator, noise)
        own: Tensor = type(diffusion).conditional_sample(
            diffusion, batch_size, global_cond, generator, noise
        )
        return own

    def _call(self, batch_size: int, global_cond: Tensor | None, noise: Tensor | None) -> LoopCall:
        diffusion = self._diffusion
        like = next(diffusion.parameters()) if noise is None else noise
        if noise is None:
            config = diffusion.config
            shape: tuple[int, ...] = (batch_size, config.horizon, config.action_feature.shape[0])
        else:
            shape = tuple(noise.shape)
        return LoopCall(
            diffusion.unet,
            diffusion.noise_scheduler,
            diffusion.num_inference_steps,
            shape,
            like.dtype,
            like.device,
            {"global_cond": global_cond},
        )
