"""LeRobot's loops around a policy's network: its own, compiled, and with fastddim installed.

The other loops do not need LeRobot. It is imported without most of its requirements.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_loops import AGREEMENT, COMPILED_AGREEMENT, Contender, Policy
from policy_networks import ACTION_DIM, HORIZON, OBSERVATION_DIM, OBSERVATIONS
from policy_tables import COMPILED, INSTALLED, THEIRS
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))


def around_lerobot(
    policy: Policy, *, compiled: bool
) -> tuple[dict[str, Contender], dict[str, str]]:
    """LeRobot's loops, and the reasons why some are left out.

    Args:
        compiled: whether to include the loop under `torch.compile`, which takes half a minute.
    """
    try:
        package = importlib.import_module("tests.support.dropins.peers").lerobot()
    except pytest.skip.Exception as reason:
        return {}, dict.fromkeys((INSTALLED, THEIRS, COMPILED), str(reason))
    contenders = {
        INSTALLED: _contender(policy, _with_fastddim(_made(package, policy, policy.network))),
        THEIRS: _contender(policy, _made(package, policy, policy.network)),
    }
    left_out = {}
    compiler = os.environ.get("CXX", "g++")
    if not compiled:
        left_out[COMPILED] = "timed in other cases"
    elif policy.device.type == "cpu" and shutil.which(compiler) is None:
        left_out[COMPILED] = f"no C++ compiler ({compiler})"
    else:
        torch.compiler.reset()
        # As in LeRobot if its configuration has `compile_model`.
        network = torch.compile(policy.network, mode="reduce-overhead")
        made = _made(package, policy, network)
        contenders[COMPILED] = _contender(policy, made, COMPILED_AGREEMENT)
    return contenders, left_out


def _made(package: Any, policy: Policy, network: Any) -> Any:
    """A `DiffusionPolicy` with LeRobot's defaults except its scheduler and network."""
    kinds, case = package.types, policy.case
    environment = OBSERVATION_DIM - ACTION_DIM
    config = package.configuration.DiffusionConfig(
        input_features={
            "observation.state": kinds.PolicyFeature(kinds.FeatureType.STATE, (ACTION_DIM,)),
            "observation.environment_state": kinds.PolicyFeature(
                kinds.FeatureType.ENV, (environment,)
            ),
        },
        output_features={"action": kinds.PolicyFeature(kinds.FeatureType.ACTION, (ACTION_DIM,))},
        n_obs_steps=OBSERVATIONS,
        horizon=HORIZON,
        noise_scheduler_type="DDPM" if case.ddpm else "DDIM",
        num_inference_steps=case.steps,
        # The size of the network that is replaced.
        down_dims=(8, 8),
    )
    made = package.modeling.DiffusionPolicy(config).to(policy.device).eval()
    made.diffusion.unet = network
    return made


def _with_fastddim(made: Any) -> Any:
    return importlib.import_module("fastddim.integrations.lerobot").install(made)


def _contender(policy: Policy, made: Any, agreement: float = AGREEMENT) -> Contender:
    """The loop of a policy; a tick enters it with the features of the observation."""
    batch, sample = policy.case.batch, made.diffusion.conditional_sample

    def tick(number: int) -> Tensor:
        actions: Tensor = sample(batch, global_cond=policy.condition(number))
        return actions

    def actions(number: int) -> Tensor:
        condition, x_T = policy.condition(number), policy.x_T.clone()
        made: Tensor = sample(batch, global_cond=condition, noise=x_T, generator=policy.noise())
        return made

    return Contender(tick, actions, agreement)
