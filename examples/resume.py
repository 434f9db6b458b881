"""Stop a run in the middle and continue it later, with the bits of a run without a stop.

A callback stops the run after 20 of 50 steps. Its state goes into a file, together with the next
step and the seed; a second call reads the file. Noise is a function of seed and step, so this works
at every η.

python examples/resume.py --out runs/resume.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import fastddim

STEPS, ETA, SEED = 50, 1.0, 3
STOP_AFTER = 20


def stop(step_index: int, timestep: int, x_t: Tensor, x_0: Tensor) -> object:
    """A callback that stops a run after `STOP_AFTER` steps."""
    return fastddim.STOP if step_index + 1 == STOP_AFTER else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/resume.safetensors"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = fastddim.models.load("digits", device=args.device)

    half_way = fastddim.sample(model, STEPS, batch_size=4, eta=ETA, seed=SEED, callback=stop)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = {"x": half_way, "first_step": torch.tensor(STOP_AFTER), "seed": torch.tensor(SEED)}
    safetensors.torch.save_file(state, args.out)

    state = safetensors.torch.load_file(args.out, device=args.device)
    first_step, seed = int(state["first_step"]), int(state["seed"])
    x = fastddim.sample(model, STEPS, x_T=state["x"], first_step=first_step, eta=ETA, seed=seed)

    at_once = fastddim.sample(model, STEPS, batch_size=4, eta=ETA, seed=SEED)
    print(f"{args.out}: the state after {first_step} of {STEPS} steps")
    print(f"equal to the bit to the run without a stop: {torch.equal(x, at_once)}")


if __name__ == "__main__":
    main()
