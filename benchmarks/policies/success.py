"""The success of the trained policy of `examples/navigation.py`, by its number of steps.

    python benchmarks/policies/success.py

writes `benchmarks/results/policy-success.json`. For each way to take S steps, the file has the
share of the same episodes that arrive, and the distance of chunks of actions from the exact
solution. The distance is measured on the same network without training too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import navigation
from harness import machine

import fastddim
from fastddim import philox
from fastddim.files import atomic_file

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "navigation.safetensors"
RESULTS = FOLDER.parent / "results" / "policy-success.json"

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 16, 20)
ALL = 100
"""The steps of the policy's schedule, and so of DDPM and of the exact solution."""
# Seeds of demonstrations and episodes that training does not use.
SEED, TUNED_SEED, HELD_OUT_SEED = 2026, 2027, 2028


@dataclass(frozen=True)
class Way:
    """A way to take steps.

    Attributes:
        label: its name in the results.
        options: options of `fastddim.ActionSampler`.
        tuned: whether the steps are those tuned for the policy.
        warm: whether all chunks after an episode's first take only the last of `WARM_OF` steps.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = False
    warm: bool = False

    @property
    def solves(self) -> bool:
        """Tell whether its chunks follow from their latents by the ODE, so a solution exists."""
        return not self.warm and not self.options.get("eta")


WARM_OF = 10
WAYS = (
    Way("η = 1", navigation.DDPM),
    Way("order 1, leading", {"spacing": "leading"}),
    Way("order 1"),
    Way("order 2", {"order": 2}),
    Way("tuned", tuned=True),
    Way("warm start", warm=True),
)


@dataclass(frozen=True)
class Work:
    """The amount of measurements; the default is that of the committed results."""

    steps: Sequence[int] = STEPS
    episodes: int = 2000
    observations: int = 512
    """The number of demonstrations to tune with, and of others to measure with."""
    tuning: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `fastddim.tune`."""

    def cells(self) -> Iterator[tuple[Way, int]]:
        """Each way with its numbers of steps; all steps are one unless they are tuned or warm."""
        for way in WAYS:
            few = [steps for steps in self.steps if not (way.warm and steps >= WARM_OF)]
            numbers = few if way.tuned or way.warm else [*few, ALL]
            yield from ((way, steps) for steps in numbers)


def observations(count: int, seed: int) -> Tensor:
    """Observations of the demonstrator at random moments, `[count, OBSERVED]`."""
    seen, _ = navigation.demonstrations(count, seed)
    return seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))[:count]]


def tuned_steps(policy: torch.nn.Module, work: Work) -> dict[int, fastddim.TunedSteps]:
    """Steps for the policy at the observations to tune with, row i of which belongs to latent i.

    The tuner chooses and reports with latents that it has not fitted, at the same observations.
    """
    seen = observations(work.observations, TUNED_SEED)
    found = fastddim.tune(
        policy,
        list(work.steps),
        shape=(len(seen), navigation.HORIZON, 2),
        clip=1.0,
        model_kwargs={"observation": seen},
        progress=False,
        **work.tuning,
    )
    assert isinstance(found, dict)
    return found


def arrivals(policy: torch.nn.Module, steps: Any, work: Work, **options: Any) -> dict[str, float]:
    """The share of the episodes that arrive, with its standard error, and the share that crash.

    Episodes and noise are the same for all.
    """
    episodes = navigation.Episodes.draw(work.episodes, SEED)
    navigation.drive(navigation.sampler_of(policy, work.episodes, steps, SEED, **options), episodes)
    return share(int(episodes.arrived.sum()), work.episodes) | {
        "crashed": round(float(episodes.crashed.mean()), 4)
    }


def share(arrived: int, count: int) -> dict[str, float]:
    """The share, and the standard deviation of the mean of so many tosses of a coin."""
    success = arrived / count
    return {
        "success": round(success, 4),
        "error": round((success * (1 - success) / count) ** 0.5, 4),
    }


class Held:
    """Held-out observations with their latents, and the exact solution for both."""

    def __init__(self, policy: torch.nn.Module, work: Work) -> None:
        self.policy = policy
        self.seen = observations(work.observations, HELD_OUT_SEED)
        self.x_T = philox.initial_latents((len(self.seen), navigation.HORIZON, 2), HELD_OUT_SEED)
        self.solution = self.chunks(ALL, order=2)

    def chunks(self, steps: Any, **options: Any) -> Tensor:
        seen = {"observation": self.seen}
        return fastddim.sample(
            self.policy, steps, x_T=self.x_T, clip=1.0, model_kwargs=seen, **options
        )

    def missed(self, steps: Any, **options: Any) -> dict[str, float]:
        """The root mean square of the distance to the solution, in units of the greatest speed, and
        the median distance of a chunk.
        """
        chunks = self.chunks(steps, **options)
        squares = (chunks - self.solution).double().square().flatten(1).mean(1)
        return {
            "distance": float(f"{squares.mean().sqrt().item():.4g}"),
            "median": float(f"{squares.median().sqrt().item():.4g}"),
        }


def measure(name: str, policy: torch.nn.Module, work: Work, *, drive: bool) -> Iterator[Any]:
    """Measure one row for each way and number of steps.

    Args:
        name: name of the policy in the rows.
        drive: whether to count arrivals too.
    """
    tuned, held = tuned_steps(policy, work), Held(policy, work)
    for way, steps in work.cells():
        if not (drive or way.solves):
            continue
        began = time.perf_counter()
        row: dict[str, Any] = {"policy": name, "way": way.label, "steps": steps}
        taken, options = steps, dict(way.options)
        if way.tuned:
            taken = tuned[steps]
            row |= {"chosen": taken.chosen, "timesteps": list(taken.timesteps)}
        if way.warm:
            taken, options["warm_start"] = WARM_OF, steps
        if drive:
            row |= arrivals(policy, taken, work, **options)
        # All steps of order 2 are the solution itself.
        if way.solves and (way.label, steps) != ("order 2", ALL):
            row |= held.missed(taken, **options)
        yield row | {"seconds": round(time.perf_counter() - began, 1)}


def untrained(recipe: navigation.Recipe) -> navigation.Policy:
    """The policy at the start of a training."""
    torch.manual_seed(recipe.seed)
    return navigation.Policy(recipe.width, recipe.blocks).requires_grad_(False).eval()


def fingerprint(path: Path) -> str:
    """The first 16 digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def run(path: Path, weights: Path, work: Work) -> dict[str, Any]:
    """Measure all, write the result file, and return its content."""
    recipe = navigation.recipe_of(weights)
    policy = navigation.load(weights)
    result: dict[str, Any] = {
        "machine": machine(),
        "weights": fingerprint(weights),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "recipe": asdict(recipe),
        "episodes": work.episodes,
        "observations": work.observations,
        "seed": SEED,
        "rows": [],
    }
    for name, network in (("trained", policy), ("untrained", untrained(recipe))):
        for row in measure(name, network, work, drive=name == "trained"):
            result["rows"].append(row)
            print(row, flush=True)
    with atomic_file(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--weights", type=Path, default=WEIGHTS, help="a policy of examples/navigation.py")
    option("--results", type=Path, default=RESULTS)
    option("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(args.results, args.weights, Work())


if __name__ == "__main__":
    main()
