"""Class labels and classifier-free guidance: draw the digits 0 to 9 by name.

The exact ε of noised digits has a formula, which takes the place of a network, so nothing has to be
trained. Like a network, the model takes a label `y` for each sample, and a null label for no class.
Each row of the picture has its own guidance scale; the first row has no label.

Guidance is a trade: samples are further away from the other classes, and differ less from each
other. The printed numbers show both.

Needs scikit-learn, for its 8×8 digits (`pip install scikit-learn`).

python examples/class_conditional.py --out runs/class_conditional.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastddim

NULL = 10  # the label for no class
STEPS = 25
SCALES = (1.0, 3.0, 8.0)


class LabelledDigits(nn.Module):
    """The ε that the best possible network would predict for noised digits.

    The data are scikit-learn's 1,797 digits, each widened to a Gaussian of standard deviation
    `width`. A label selects the digits of its class.
    """

    sample_shape = (1, 8, 8)
    num_classes = 10
    schedule = fastddim.Schedule.linear()

    def __init__(self, width: float = 0.15) -> None:
        super().__init__()
        digits = load_digits()
        self.width = width
        self.images: Tensor
        self.labels: Tensor
        self.alphas_cumprod: Tensor
        self.register_buffer("images", torch.tensor(digits.images / 8 - 1).float().flatten(1))
        self.register_buffer("labels", torch.tensor(digits.target))
        self.register_buffer("alphas_cumprod", self.schedule.alphas_cumprod.float())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """ε `[B, 1, 8, 8]` for the state `x`, timesteps `t` `[B]` and labels `y` `[B]`."""
        a = self.alphas_cumprod[t][:, None]
        variance = a * self.width**2 + 1 - a
        state = x.flatten(1)
        distance = a.sqrt() * torch.cdist(state / a.sqrt(), self.images)
        asked = (y[:, None] == NULL) | (y[:, None] == self.labels)
        likely = (-(distance**2) / (2 * variance)).masked_fill(~asked, -torch.inf).softmax(1)
        epsilon = (1 - a).sqrt() / variance * (state - a.sqrt() * (likely @ self.images))
        return epsilon.view_as(x)


def draw(model: LabelledDigits, labels: Tensor, guidance_scale: float, seed: int) -> Tensor:
    """One digit for each label."""
    return fastddim.sample(
        model,
        STEPS,
        batch_size=len(labels),
        model_kwargs={"y": labels},
        uncond_kwargs={"y": NULL},
        guidance_scale=guidance_scale,
        seed=seed,
    )


def margin(model: LabelledDigits, x: Tensor, labels: Tensor) -> float:
    """The margin by which the nearest digit of the given class is closer than that of any other.

    It is negative if another class is closer; the result is a mean over the samples.
    """
    distance = torch.cdist(x.flatten(1), model.images)
    own = labels[:, None] == model.labels
    nearest = distance.masked_fill(~own, torch.inf).amin(1)
    other = distance.masked_fill(own, torch.inf).amin(1)
    return (other - nearest).mean().item()


def spread(x: Tensor, labels: Tensor) -> float:
    """The standard deviation of a pixel within a class; a mean over pixels and classes."""
    return (
        torch.stack([x[labels == label].std(0).mean() for label in labels.unique()]).mean().item()
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/class_conditional.png"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = LabelledDigits().to(args.device).eval()
    labels = torch.arange(10, device=args.device).repeat(20)

    unlabelled = fastddim.sample(
        model,
        STEPS,
        batch_size=len(labels),
        model_kwargs={"y": torch.full_like(labels, NULL)},
        seed=0,
    )
    drawn = [("no label", unlabelled)]
    drawn += [(f"guidance {scale:g}", draw(model, labels, scale, seed=0)) for scale in SCALES]
    for name, x in drawn:
        print(f"{name:10}  margin {margin(model, x, labels):5.2f}  spread {spread(x, labels):.3f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fastddim.images.save_png(args.out, torch.cat([x[:10] for _, x in drawn]), columns=10)
    print(args.out)


if __name__ == "__main__":
    main()
