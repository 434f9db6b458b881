"""LeRobot's diffusion policy with a small network, and its actions over some ticks."""

from __future__ import annotations

import copy
import types
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .peers import lerobot

STATE, ENVIRONMENT, IMAGE = "observation.state", "observation.environment_state", (3, 12, 12)


def make_policy(*, cameras: int = 0, **config: Any) -> Any:
    """A policy in eval mode that observes 3 numbers, and 4 of the environment or images.

    Weights are random, and so are the biases, so that timestep and observation matter.
    """
    peer = lerobot()
    feature, kind = peer.types.PolicyFeature, peer.types.FeatureType
    inputs = {STATE: feature(kind.STATE, (3,))}
    for camera in range(cameras):
        inputs[f"observation.images.{camera}"] = feature(kind.VISUAL, IMAGE)
    if not cameras:
        inputs[ENVIRONMENT] = feature(kind.ENV, (4,))
    small = {
        "crop_shape": None,
        "pretrained_backbone_weights": None,
        "down_dims": (8,),
        "n_groups": 4,
        "diffusion_step_embed_dim": 8,
        "horizon": 4,
    }
    peer.modeling.torchvision = types.SimpleNamespace(models=types.SimpleNamespace(resnet18=_Eye))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = peer.modeling.DiffusionPolicy(
            peer.configuration.DiffusionConfig(
                input_features=inputs,
                output_features={"action": feature(kind.ACTION, (2,))},
                device="cpu",
                n_action_steps=2,
                **{**small, **config},
            )
        )
    encoder = made.diffusion.unet.diffusion_step_encoder
    encoder[0].register_forward_hook(_Converted(encoder[1]))
    return made.eval()


class _Converted:
    """Converts the embedding of timesteps, which is float32 in LeRobot, to the dtype of weights."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output.to(self._layer.weight.dtype)


class _Eye(nn.Module):
    """A vision network in the place of torchvision's, whose last two children are not used."""

    def __init__(self, weights: None = None) -> None:
        super().__init__()
        self.features = nn.Conv2d(IMAGE[0], 16, 3, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(16, 10)


def observations(policy: Any, environments: int, seed: int = 1) -> Any:
    """Observations without end, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(policy.parameters()).dtype
    while True:
        yield {
            name: torch.randn(environments, *feature.shape, generator=generator).to(dtype)
            for name, feature in policy.config.input_features.items()
        }


def history(policy: Any, environments: int) -> dict[str, Tensor]:
    """One observation with those before that the policy sees with it, `[environments, seen, …]`."""
    seen = [*islice(observations(policy, environments), policy.config.n_obs_steps)]
    return {name: torch.stack([one[name] for one in seen], dim=1) for name in seen[0]}


def actions(policy: Any, ticks: int = 3, environments: int = 1) -> Tensor:
    """`[ticks, environments, action_dim]`; every second tick plans a chunk."""
    policy.reset()
    given = observations(policy, environments)
    return torch.stack([policy.select_action(next(given)) for _ in range(ticks)])


def untouched(policy: Any) -> Any:
    """A copy of a policy that nothing is installed on."""
    made = copy.deepcopy(policy)
    vars(made.diffusion).pop("conditional_sample", None)
    return made
