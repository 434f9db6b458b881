"""Train a diffusion policy that steers round obstacles, and count how often it arrives.

    python examples/navigation.py --out runs/navigation
    python examples/navigation.py --out runs/navigation --quick

A point robot drives between three discs to a goal, as fast as it may. The demonstrations pass every
disc on one side or the other, by the toss of a coin, and the mean of both ways hits the disc. The
policy is a small version of Diffusion Policy (arXiv 2303.04137): it gets the last two positions and
the goal, and predicts the epsilon of the next 16 velocities, of which 8 are executed before it is
asked again. Its schedule is the squared cosine with T = 100, samples are clipped to ±1, and its
weights are averaged. All timesteps count equally in v. In epsilon, those with much noise would
hardly count, although they choose the side.

The weights go to `policy.safetensors` in the folder `--out`, with the recipe and the command.
Training takes some minutes on one core, and seconds with `--quick`, which learns less.
`benchmarks/policies/success.py` measures the trained policy by its number of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import fastddim
from fastddim.files import atomic_file

Numbers = npt.NDArray[np.float64]

# Lengths are in units of half the arena's side, and times in ticks.
DISCS = np.array([(-0.3, 0.0, 0.3), (0.4, 0.4, 0.2), (0.4, -0.4, 0.2)])  # x, y, radius
CENTERS, RADII = DISCS[:, :2], DISCS[:, 2]
SPEED = 0.05
ARRIVED = 0.05  # the largest distance from the goal that counts as arrived
LIMIT = 72  # ticks of an episode
CLEARANCE = 0.1  # distance of the demonstrations from a disc

HORIZON, EXECUTED = 16, 8
OBSERVED = 6


def clearance(points: Numbers) -> Numbers:
    """The distance from points `[..., 2]` to the nearest disc's edge, negative inside: `[...]`."""
    away = np.linalg.norm(points[..., None, :] - CENTERS, axis=-1) - RADII
    nearest: Numbers = away.min(-1)
    return nearest


class Episodes:
    """Robots that drive in parallel, each on its own, by a velocity each tick.

    Attributes:
        goal: `[N, 2]`.
        position, before: now and a tick ago, `[N, 2]`.
        arrived, crashed: `[N]`, of which at most one is ever true; such a robot stands still.
    """

    def __init__(self, start: Numbers, goal: Numbers) -> None:
        self.goal = goal
        self.position = self.before = start
        self.arrived, self.crashed = np.zeros((2, len(start)), bool)

    @classmethod
    def draw(cls, count: int, seed: int, *, anywhere: bool = False) -> Episodes:
        """Draw random episodes, the same for the same seed: from the left, or from any free place
        with `anywhere`, to a goal on the right.
        """
        rng = np.random.default_rng(seed)
        goal = rng.uniform((0.9, -0.2), (1.0, 0.2), (count, 2))
        right, start = 1.0 if anywhere else -0.9, np.empty((0, 2))
        while len(start) < count:
            more = rng.uniform((-1, -0.8), (right, 0.8), (count, 2))
            start = np.concatenate([start, more[clearance(more) > CLEARANCE]])
        return cls(start[:count], goal)

    @property
    def over(self) -> npt.NDArray[np.bool_]:
        return self.arrived | self.crashed

    def tick(self, velocity: Numbers) -> None:
        """Move by velocities `[N, 2]` in units of the greatest speed; larger ones are shortened.

        The whole way of a tick has to be free, not only its end.
        """
        speed = np.linalg.norm(velocity, axis=1, keepdims=True)
        moved = self.position + SPEED * velocity / np.maximum(speed, 1)
        moved = np.where(self.over[:, None], self.position, moved)
        way = np.linspace(self.position, moved, 5, axis=1)
        self.crashed = self.crashed | (clearance(way).min(1) < 0)
        near = np.linalg.norm(self.goal - moved, axis=1) < ARRIVED
        self.arrived = self.arrived | (near & ~self.crashed)
        self.before, self.position = self.position, moved

    def observation(self) -> Tensor:
        """The last two positions and the goal as the policy gets them, `[N, OBSERVED]`."""
        moved = (self.position - self.before) / SPEED
        return torch.from_numpy(np.concatenate([self.position, moved, self.goal], 1)).float()


def planned(episodes: Episodes, sides: Numbers) -> Numbers:
    """The velocities `[N, 2]` of the demonstrations: to the goal, or along the tangent of the disc
    in the way, and then of the disc in the way of that tangent.

    Args:
        sides: side on which each disc is passed, −1 or 1, `[N, len(DISCS)]`.
    """
    here = episodes.position
    centers, reach = CENTERS - here[:, None], RADII + CLEARANCE
    distance = np.linalg.norm(centers, axis=2)
    wide = np.arcsin(np.minimum(1, reach / distance))
    bearing = np.arctan2(centers[..., 1], centers[..., 0])
    # Tangents are as long as the disc is far away; discs beyond the end are not obstacles yet.
    tangent = np.sqrt(np.maximum(0, distance**2 - reach**2))
    goal = episodes.goal - here
    heading, ahead = np.arctan2(goal[:, 1], goal[:, 0]), np.linalg.norm(goal, axis=1)
    each = np.arange(len(here))
    for _ in DISCS:
        off = np.abs(_wrapped(bearing - heading[:, None]))
        blocks = (off < wide - 1e-9) & (tangent < ahead[:, None])
        first = np.where(blocks, tangent, np.inf).argmin(1)
        blocked = blocks[each, first]
        aside = (bearing + sides * wide)[each, first]
        heading = np.where(blocked, aside, heading)
        ahead = np.where(blocked, tangent[each, first], ahead)
    speed = np.minimum(1, np.linalg.norm(goal, axis=1) / SPEED)
    velocity: Numbers = speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1)
    return velocity


def _wrapped(angle: Numbers) -> Numbers:
    """The same angle in [−π, π)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def demonstrations(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The observations and actions of the planner in the first `EXECUTED` ticks of episodes.

    The episodes begin anywhere, and each has its own sides, so the policy sees the choice between
    two ways as often as it will have to make it.

    Returns:
        Observations `[M, OBSERVED]`, and the velocities of the `HORIZON` ticks from each on,
        `[M, HORIZON, 2]` in [−1, 1], which are 0 after the arrival.
    """
    episodes = Episodes.draw(count, seed, anywhere=True)
    rng = np.random.default_rng([seed, 1])
    sides = rng.choice([-1.0, 1.0], (count, len(DISCS)))
    seen, done = [], []
    for _ in range(EXECUTED + HORIZON - 1):
        seen.append(episodes.observation())
        done.append(planned(episodes, sides) * ~episodes.over[:, None])
        episodes.tick(done[-1])
    chunks = np.lib.stride_tricks.sliding_window_view(np.stack(done), HORIZON, axis=0)
    actions = chunks.swapaxes(2, 3).reshape(-1, HORIZON, 2)
    return torch.cat(seen[:EXECUTED]), torch.tensor(actions, dtype=torch.float32)


@dataclass(frozen=True)
class Recipe:
    """The settings that a policy is made with; every field is in its file."""

    width: int = 128
    blocks: int = 2
    episodes: int = 40000
    steps: int = 16000
    batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    warmup: int = 200
    ema: float = 0.999
    seed: int = 0


QUICK = Recipe(width=64, blocks=1, episodes=1000, steps=300, batch=256, ema=0.98)


class Block(nn.Module):
    """Two layers with a residual path; the context scales and shifts the features between them
    (arXiv 1709.07871).
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(context, 2 * width)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.modulation(context).chunk(2, 1)
        inner = self.first(self.norm(h)) * (1 + scale) + shift
        result: Tensor = h + self.second(nn.functional.silu(inner))
        return result


class Policy(nn.Module):
    """ε of chunks of actions `[B, HORIZON, 2]`, given observations `[B, OBSERVED]`."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.schedule = fastddim.Schedule.cosine(T=100)
        self.alphas_cumprod: Tensor
        self.frequencies: Tensor
        a = self.schedule.alphas_cumprod.float()
        self.register_buffer("alphas_cumprod", a, persistent=False)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(4), persistent=False)
        context = 3 * width // 4
        seen = OBSERVED + (1 + 4) * 2 * len(self.frequencies)
        self.look = nn.Sequential(
            nn.Linear(seen, context), nn.SiLU(), nn.Linear(context, context), nn.SiLU()
        )
        self.enter = nn.Linear(2 * HORIZON, width)
        self.blocks = nn.ModuleList(Block(width, context) for _ in range(blocks))
        self.leave = nn.Linear(width, 2 * HORIZON)

    def forward(self, actions: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        a = self.alphas_cumprod[t][:, None, None]
        return (1 - a).sqrt() * actions + a.sqrt() * self.velocity(actions, t, observation)

    def velocity(self, actions: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """v = √ᾱ·ε − √(1−ᾱ)·x_0 (arXiv 2202.00512, appendix D), equally large at every t."""
        told = torch.cat([t[:, None] / self.schedule.T, observation[:, [0, 1, 4, 5]]], 1)
        phases = (told[:, :, None] * self.frequencies).flatten(1)
        context = self.look(torch.cat([observation, phases.sin(), phases.cos()], 1))
        h = self.enter(actions.flatten(1))
        for block in self.blocks:
            h = block(h, context)
        result: Tensor = self.leave(h).view_as(actions)
        return result


class Trainer:
    """A policy, its averaged copy and its optimiser, at a step."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.observed, self.actions = demonstrations(recipe.episodes, recipe.seed)
        self.policy = Policy(recipe.width, recipe.blocks)
        self.averaged = Policy(recipe.width, recipe.blocks).requires_grad_(False)
        self.averaged.load_state_dict(self.policy.state_dict())
        self.averaged.eval()
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), weight_decay=recipe.weight_decay, fused=True
        )
        self.step = 0

    def loss(self) -> Tensor:
        """Mean squared error of ε on a random batch (arXiv 2010.02502, eq. 5 with γ = 1)."""
        batch = self.recipe.batch
        index = torch.randint(len(self.actions), (batch,))
        t = torch.randint(self.policy.schedule.T, (batch,))
        noise = torch.randn(batch, HORIZON, 2)
        a = self.policy.schedule.alphas_cumprod[t].float()[:, None, None]
        clean = self.actions[index]
        noised = a.sqrt() * clean + (1 - a).sqrt() * noise
        v = a.sqrt() * noise - (1 - a).sqrt() * clean
        return (self.policy.velocity(noised, t, self.observed[index]) - v).square().mean()

    def train_step(self) -> float:
        """Take one update, and return its loss."""
        recipe = self.recipe
        rate = recipe.learning_rate * min(1.0, (self.step + 1) / recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.step / recipe.steps))
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        # The average forgets its first, untrained weights quickly.
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.averaged.parameters()), list(self.policy.parameters()), 1 - decay
        )
        return loss.item()


def trained(recipe: Recipe) -> Policy:
    """The averaged policy after all steps of a recipe."""
    trainer, losses = Trainer(recipe), []
    while trainer.step < recipe.steps:
        losses.append(trainer.train_step())
        if trainer.step % max(1, recipe.steps // 10) == 0:
            print(f"step {trainer.step}: loss {np.mean(losses[-100:]):.4f}", file=sys.stderr)
    return trainer.averaged


def save(policy: Policy, path: Path, recipe: Recipe, command: str) -> None:
    """Write the weights, in float16, with the recipe and the command that made them."""
    metadata = {"recipe": json.dumps(asdict(recipe)), "command": command}
    tensors = {name: tensor.half() for name, tensor in policy.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def recipe_of(path: Path) -> Recipe:
    """The recipe of a saved policy."""
    with safetensors.safe_open(path, framework="pt") as file:
        return Recipe(**json.loads(file.metadata()["recipe"]))


def load(path: Path) -> Policy:
    """Load a saved policy, in float32 and eval mode."""
    recipe = recipe_of(path)
    policy = Policy(recipe.width, recipe.blocks)
    policy.load_state_dict(safetensors.torch.load_file(path))
    return policy.requires_grad_(False).eval()


# DDPM as in training: its mean is one of x_t and the clipped x_0, and so is this with ε re-derived.
DDPM: dict[str, Any] = {"eta": 1.0, "rederive_eps": True}


def sampler_of(
    policy: nn.Module, count: int, steps: Any, seed: int, **options: Any
) -> fastddim.ActionSampler:
    """A sampler of the chunks of `count` robots."""
    return fastddim.ActionSampler(
        policy,
        steps,
        shape=(count, HORIZON, 2),
        clip=1.0,
        model_kwargs={"observation": torch.zeros(count, OBSERVED)},
        seed=seed,
        **options,
    )


def drive(sampler: fastddim.ActionSampler, episodes: Episodes) -> None:
    """Drive until the time is up, executing `EXECUTED` ticks of each chunk."""
    for _ in range(LIMIT // EXECUTED):
        seen = {"observation": episodes.observation()}
        actions = sampler(model_kwargs=seen, executed=EXECUTED)
        for velocity in actions[:, :EXECUTED].double().numpy().swapaxes(0, 1):
            episodes.tick(velocity)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder for the policy")
    option("--quick", action="store_true", help="train for seconds")
    option("--seed", type=int, default=0, help="of the demonstrations, the weights and the noise")
    option("--episodes", type=int, default=1000, help="of which the share that arrives is printed")
    option("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = replace(QUICK if args.quick else Recipe(), seed=args.seed)
    command = "python examples/navigation.py --out OUT" + (" --quick" if args.quick else "")
    path = args.out / "policy.safetensors"
    save(trained(recipe), path, recipe, f"{command} --seed {args.seed} --threads {args.threads}")
    policy = load(path)
    for name, steps, options in (("DDPM", 100, DDPM), ("DDIM", 10, {"order": 2})):
        episodes = Episodes.draw(args.episodes, args.seed + 1)
        drive(sampler_of(policy, args.episodes, steps, args.seed, **options), episodes)
        print(f"{name}, {steps} steps: {episodes.arrived.mean():.1%} arrive")


if __name__ == "__main__":
    main()
