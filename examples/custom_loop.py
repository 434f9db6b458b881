"""A loop of your own around `fastddim.step`: complete an image from one known half.

After every step the known half is restored, noised to the level of the state. Planners and robot
policies fix the current state of a trajectory in the same way.

python examples/custom_loop.py --out runs/custom_loop.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import fastddim

STEPS, ETA, COMPLETIONS = 100, 1.0, 12


def complete(model: fastddim.models.UNet, known: Tensor, mask: Tensor, *, seed: int) -> Tensor:
    """Samples that equal `known` `[B, C, H, W]` wherever `mask` is True."""
    schedule = model.schedule
    timesteps = fastddim.select_timesteps(schedule.T, STEPS).tolist()
    a = schedule.alphas_cumprod.tolist()
    x = fastddim.philox.initial_latents(known.shape, seed, device=known.device)
    for s, t in enumerate(timesteps):
        last = s == STEPS - 1
        eps = model(x, torch.full((len(x),), t, device=x.device))
        alpha_prev = 1.0 if last else a[timesteps[s + 1]]
        fastddim.step(x, eps, a[t], alpha_prev, eta=ETA, seed=seed, step_index=s, out=x)
        noised = known if last else schedule.add_noise(known, timesteps[s + 1], seed=seed)
        x = torch.where(mask, noised, x)
    return x


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/custom_loop.png"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = fastddim.models.load("digits", device=args.device)
    whole = fastddim.sample(model, 50, seed=0)
    top = torch.zeros(8, 8, dtype=torch.bool, device=args.device)
    top[:4] = True
    known = whole.repeat(COMPLETIONS, 1, 1, 1)
    x = complete(model, known, top, seed=1)
    assert torch.equal(x[:, :, :4], known[:, :, :4])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    shown = torch.cat([whole, torch.where(top, whole, 0.0), x])
    fastddim.images.save_png(args.out, shown, columns=7)
    print(args.out)


if __name__ == "__main__":
    main()
