"""Train one of the bundled models from its data set.

    python examples/train.py digits --out runs/digits
    python examples/train.py fashion --out runs/fashion

`digits` reads scikit-learn's 8×8 digits; `fashion` reads Fashion-MNIST from the Debian package
dataset-fashion-mnist, or from the folder `--data`. From the first checkpoint on, you can load the
averaged weights with `fastddim.models.load("runs/digits")`. `--resume` continues an interrupted
run, to exactly the weights that it would have had.

The bundled models, in `fastddim/models/weights/`, are copies of `model.safetensors` and
`model.json`: those of the first run for digits, and of a third run for fashion. The second run of
fashion starts from the weights of the first, and the third, on a GPU, from those of the second:

    python examples/train.py fashion --start runs/fashion --seed 1 --steps 15000 \\
        --learning-rate 1e-3 --out runs/fashion-2
    python examples/train.py fashion --start runs/fashion-2 --seed 2 --steps 13017 \\
        --learning-rate 2e-3 --batch 512 --device cuda --checkpoint-every 4000 --out runs/fashion-3

A second run of digits (10,000 steps) learns its 1,437 images by heart: the loss on held-out images
rises from 0.33 to 0.50 at timestep 50.

On a GPU, images, timesteps and noise are drawn there, and a step's draw, forward and backward pass
are one CUDA graph (`--no-graph` launches them one by one). The third run of fashion took two
minutes on an NVIDIA H100. It was given `--seconds` instead of `--steps`. The number of steps is
then the one that fits the seconds, judged by the time of 200 discarded steps, and the weights are
averaged over a tenth of them, if that is more than in the recipe. The record has both numbers, and
`--steps` and `--ema` with these numbers repeat such a run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import gzip
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fastddim.files import atomic_file
from fastddim.models import UNet, UNetConfig, load, locate, save
from fastddim.processor import has_bfloat16
from fastddim.schedule import Schedule

SCHEDULE: dict[str, Any] = {"T": 1000, "beta_start": 1e-4, "beta_end": 0.02}
HELD_OUT_TIMESTEPS = (1, 10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
# Held-out images behind the quoted losses: a few at every checkpoint, and many at the end.
FEW, MANY = 64, 2000
HELD_OUT = 360  # of the digits
# Steps between two readings of the loss, each of which waits for the GPU.
LOOK_EVERY = 20
# Calls before a capture; untimed steps, then timed ones; the share of `--seconds` for steps, since
# checkpoints take the rest.
WARM_UPS, UNTIMED, TIMED, SHARE = 3, 20, 200, 0.93
FUSED_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Recipe:
    """The settings that a model is trained with; every field is in its record."""

    config: UNetConfig
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    ema: float = 0.9995
    bfloat16: bool = False
    seed: int = 0
    start: str | None = None  # a model for `load`, whose weights the run begins with
    device: str = "cpu"


RECIPES = {
    "digits": Recipe(
        UNetConfig(sample_shape=(1, 8, 8), channels=(32, 64)),
        steps=5000,
        batch=128,
        learning_rate=2e-3,
    ),
    "fashion": Recipe(
        UNetConfig(sample_shape=(1, 28, 28), channels=(48, 96), patch=2),
        steps=13500,
        batch=64,
        learning_rate=1.5e-3,
        bfloat16=has_bfloat16(),
    ),
}


@dataclass(frozen=True)
class Data:
    """Images `[N, C, H, W]` in [−1, 1], and their source."""

    train: Tensor
    held_out: Tensor
    source: dict[str, str]


def digits_data() -> Data:
    """The 1,797 digits of scikit-learn, 360 of them held out."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    order = digits_order(len(images))
    source = {
        "name": "Optical Recognition of Handwritten Digits, test part, as in scikit-learn",
        "authors": "E. Alpaydin and C. Kaynak (1998), doi:10.24432/C50P49",
        "licence": "CC BY 4.0",
        "held_out": "the first 360 of torch.randperm(1797) with seed 0",
    }
    return Data(images[order[HELD_OUT:]], images[order[:HELD_OUT]], source)


def digits_order(count: int) -> Tensor:
    """The digits' indices; the first `HELD_OUT` are held out."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def fashion_data(folder: Path) -> Data:
    """Fashion-MNIST, 60,000 images to train on and 10,000 held out."""
    source = {
        "name": "Fashion-MNIST",
        "authors": "H. Xiao, K. Rasul and R. Vollgraf (2017), arXiv 1708.07747; Zalando SE",
        "licence": "MIT",
        "held_out": "the test images (t10k)",
    }
    train, held_out = (f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k"))
    return Data(scale(read_idx(folder / train)), scale(read_idx(folder / held_out)), source)


def read_idx(path: Path) -> np.ndarray:
    """The content of a gzipped IDX file of bytes: images `[N, H, W]` or classes `[N]`, uint8."""
    if not path.is_file():
        raise SystemExit(
            f"no {path}: install the Debian package (apt-get install dataset-fashion-mnist), or "
            "get the .gz files of https://github.com/zalandoresearch/fashion-mnist and name their "
            "folder with --data"
        )
    with gzip.open(path) as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def scale(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W]` to float32 `[N, 1, H, W]` in [−1, 1]."""
    return torch.from_numpy(images.copy())[:, None].float() / 127.5 - 1


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def stream_seed(seed: int, index: int) -> int:
    """The seed of the random numbers of a step (`index` = step) or an epoch (2³¹ + epoch)."""
    # torch's CPU generator uses 32 bits; no two runs below 1,000,003 steps share a stream.
    return (seed * 1_000_003 + index) % 2**32


def stream(seed: int, index: int) -> torch.Generator:
    """A CPU generator at `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, index))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch visits the images."""
    return torch.randperm(count, generator=stream(seed, 2**31 + epoch))


def draw_batch(recipe: Recipe, images: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and noise of one step: a function of the seed and the step alone."""
    count, batch = len(images), recipe.batch
    positions = range(step * batch, (step + 1) * batch)
    index = [int(epoch_order(recipe.seed, p // count, count)[p % count]) for p in positions]
    generator = stream(recipe.seed, step)
    t = spread(torch.rand(batch, generator=generator))
    return images[index], t, torch.randn(images[index].shape, generator=generator)


def draw_batch_on_gpu(recipe: Recipe, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the GPU's own generator, and without epochs: every image is drawn anew."""
    batch, device = recipe.batch, images.device
    index = torch.randint(len(images), (batch,), device=device)
    t = spread(torch.rand(batch, device=device))
    return images[index], t, torch.randn(batch, *images.shape[1:], device=device)


def spread(uniform: Tensor) -> Tensor:
    """One timestep from each of N equal parts of [0, T), which keeps the loss from jumping.

    Args:
        uniform: the place of each within its part, `[N]` in [0, 1).
    """
    count = len(uniform)
    part = (torch.arange(count, device=uniform.device) + uniform) / count
    t: Tensor = (part * SCHEDULE["T"]).long().clamp(max=SCHEDULE["T"] - 1)
    return t


def diffuse(alphas_cumprod: Tensor, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = √ᾱ·x_0 + √(1−ᾱ)·ε (arXiv 2010.02502, eq. 4), all on one device."""
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a.sqrt().float() * x_0 + (1 - a).sqrt().float() * noise


def start_from(model: UNet, path: str) -> None:
    """Give `model` the weights of the model at `path`, which must be of the same architecture."""
    start = load(path)
    if start.config != model.config:
        raise SystemExit(f"--start: expected a model of {model.config}, got one of {start.config}")
    model.load_state_dict(start.state_dict())


def training_of(path: str) -> dict[str, Any]:
    """The training of the model at `path`, from its record."""
    training: dict[str, Any] = json.loads(locate(path).with_suffix(".json").read_text())["training"]
    return training


def captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`function` as one CUDA graph, which repeats its kernels on the same memory.

    The function may read only tensors that stay in place, and the next call overwrites its result.
    Its random numbers are those of torch's CUDA generator at the time of the call.

    Raises:
        RuntimeError: the graph gives another result than `function` itself.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The first calls choose and compile kernels, which a capture does not allow.
        for _ in range(WARM_UPS):
            torch.cuda.manual_seed(0)
            expected = function().item()
    torch.cuda.current_stream().wait_stream(side)
    # Collecting an earlier graph as garbage during a capture would spoil the capture.
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    torch.cuda.manual_seed(0)
    found = replay().item()
    if not math.isclose(found, expected, rel_tol=1e-2):
        raise RuntimeError(f"the captured step has a loss of {found}, the step itself {expected}")
    return replay


class Trainer:
    """A model, its averaged copy and its optimiser, at a step.

    Args:
        recipe: settings of the run.
        images: images to train on; they are copied to the recipe's device.
        graph: whether the work for a CUDA device becomes a graph.
    """

    def __init__(self, recipe: Recipe, images: Tensor, *, graph: bool = True) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.step = 0
        self.minutes = 0.0
        self.history: list[dict[str, float]] = []
        self.device = torch.device(recipe.device)
        self.images = images.to(self.device)
        schedule = Schedule.linear(**SCHEDULE)
        self.alphas_cumprod = schedule.alphas_cumprod.to(self.device)
        self.model = UNet(recipe.config, schedule)
        if recipe.start is not None:
            start_from(self.model, recipe.start)
        self.model.to(self.device)
        self.averaged = UNet(recipe.config, schedule).to(self.device)
        self.averaged.load_state_dict(self.model.state_dict())
        self.averaged.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.backward: Callable[[], Tensor] = self.loss_and_gradients
        if graph and self.device.type == "cuda":
            self.backward = captured(self.loss_and_gradients)

    def loss_and_gradients(self) -> Tensor:
        """The loss of the step's batch; its gradients go where the optimiser reads them."""
        recipe, kind = self.recipe, self.device.type
        self.optimizer.zero_grad()
        if kind == "cuda":
            x_0, t, noise = draw_batch_on_gpu(recipe, self.images)
        else:
            x_0, t, noise = draw_batch(recipe, self.images, self.step)
        x_t = diffuse(self.alphas_cumprod, x_0, t, noise)
        # Scaled dot products of 49 tokens: on CPUs the plain formula has the faster backward pass.
        backends = FUSED_ATTENTION if kind == "cuda" else [SDPBackend.MATH]
        # A weight is used once a step, and a graph may not read copies that autocast keeps outside.
        with (
            sdpa_kernel(backends),
            torch.autocast(kind, torch.bfloat16, recipe.bfloat16, cache_enabled=False),
        ):
            predicted = self.model(x_t, t)
        loss: Tensor = (predicted - noise).square().mean()
        loss.backward()
        return loss.detach()

    def train_step(self) -> Tensor:
        """Take one update, and return the loss, which the next step overwrites."""
        recipe = self.recipe
        if self.device.type == "cuda":
            torch.cuda.manual_seed(stream_seed(recipe.seed, self.step))
        loss = self.backward()

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.step += 1
        # The average forgets its first, untrained weights quickly.
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay
        )
        return loss

    def save_checkpoint(self, path: Path) -> None:
        """Everything that the rest of the run depends on, in one file."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"mean.{name}"] = moments["exp_avg"]
            tensors[f"square.{name}"] = moments["exp_avg_sq"]
        for name, parameter in self.averaged.named_parameters():
            tensors[f"averaged.{name}"] = parameter
        progress = {"step": self.step, "minutes": self.minutes, "history": self.history}
        metadata = {"recipe": json.dumps(asdict(self.recipe)), "progress": json.dumps(progress)}
        with atomic_file(path) as file:
            file.write(safetensors.torch.save(tensors, metadata))

    def load_checkpoint(self, path: Path) -> None:
        """Continue from `save_checkpoint`'s file, which must be of the same recipe."""
        if not path.is_file():
            raise SystemExit(f"no {path} to resume: start the run without --resume")
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["recipe"] != json.dumps(asdict(self.recipe)):
            raise SystemExit(f"{path} is of another recipe: {metadata['recipe']}")
        progress = json.loads(metadata["progress"])
        self.step, self.minutes = progress["step"], progress["minutes"]
        self.history = progress["history"]
        with torch.no_grad():
            for name, parameter in self.averaged.named_parameters():
                parameter.copy_(tensors[f"averaged.{name}"])
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step), device=self.device),
                    "exp_avg": torch.zeros_like(parameter).copy_(tensors[f"mean.{name}"]),
                    "exp_avg_sq": torch.zeros_like(parameter).copy_(tensors[f"square.{name}"]),
                }


@torch.no_grad()
def held_out_loss(model: UNet, images: Tensor) -> dict[int, float]:
    """The epsilon loss at each of `HELD_OUT_TIMESTEPS`, with the same noise for every model."""
    device = model.coefficient_bits.device
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(device)
    images, alphas_cumprod = images.to(device), model.schedule.alphas_cumprod.to(device)
    losses = {}
    for timestep in HELD_OUT_TIMESTEPS:
        errors = []
        for x_0, epsilon in zip(images.split(250), noise.split(250), strict=True):
            t = torch.full((len(x_0),), timestep, device=device)
            predicted = model(diffuse(alphas_cumprod, x_0, t, epsilon), t)
            errors.append((predicted - epsilon).square().mean(dim=(1, 2, 3)))
        losses[timestep] = float(f"{torch.cat(errors).mean():.5g}")
    return losses


def export(trainer: Trainer, name: str, data: Data, out: Path, counts: Sequence[int]) -> float:
    """Write the averaged model and its record; the recorded quality is that of the written file.

    Returns:
        The mean of the losses on the most held-out images.
    """
    recipe = asdict(trainer.recipe)
    del recipe["config"]
    if recipe["start"] is not None:
        recipe["start"] = training_of(recipe["start"])
    record: dict[str, Any] = {
        "name": name,
        "schedule": SCHEDULE,
        "data": data.source,
        "training": {
            **recipe,
            "loss": "mean squared error of epsilon, all timesteps weighted alike",
            "optimizer": "AdamW, linear warm-up, cosine to zero",
            "steps_done": trainer.step,
            "minutes": round(trainer.minutes, 1),
            **processor(trainer.device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "loss_at_step": {point["step"]: point["loss"] for point in trainer.history},
        },
    }
    model = load(save(trainer.averaged, out, record), device=trainer.device)
    losses = []
    for images in (data.held_out[:count] for count in counts):
        at_timestep = held_out_loss(model, images)
        losses.append({"images": len(images), "at_timestep": at_timestep})
    record["quality"] = {"held_out_epsilon_loss": losses}
    save(trainer.averaged, out, record)
    return float(np.mean(list(at_timestep.values())))


def processor(device: torch.device) -> dict[str, Any]:
    """The machine of a run, for its record."""
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device)}
    return {"threads": torch.get_num_threads()}


def steps_until(end: float, recipe: Recipe, data: Data, *, graph: bool = True) -> int:
    """The number of steps that a run has time for until `end`, by the clock `time.monotonic`.

    Some steps are taken to measure it, and discarded.
    """
    trainer = Trainer(recipe, data.train, graph=graph)
    times = []
    for count in (UNTIMED, TIMED):
        began = time.monotonic()
        for _ in range(count):
            loss = trainer.train_step()
        loss.item()
        now = time.monotonic()
        times.append(now - began)
    return max(1, int(SHARE * (end - now) * TIMED / times[-1]))


def train(
    name: str,
    recipe: Recipe,
    data: Data,
    out: Path,
    *,
    checkpoint_every: int,
    resume: bool,
    graph: bool = True,
) -> None:
    """Train to the recipe's last step, with a checkpoint and an export at regular intervals."""
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists() and not resume:
        raise SystemExit(f"{checkpoint} exists: continue it with --resume, or name another --out")
    trainer = Trainer(recipe, data.train, graph=graph)
    if resume:
        trainer.load_checkpoint(checkpoint)
    out.mkdir(parents=True, exist_ok=True)

    losses: list[Tensor] = []
    started = time.monotonic() - 60 * trainer.minutes
    # In a log, a line now and then is enough.
    interval = 0.1 if sys.stderr.isatty() else 20.0
    with tqdm(
        total=recipe.steps, initial=trainer.step, desc=name, unit="step", mininterval=interval
    ) as progress:
        while trainer.step < recipe.steps:
            losses.append(trainer.train_step().clone())
            progress.update()
            due = trainer.step % checkpoint_every == 0 or trainer.step == recipe.steps
            if due or trainer.step % LOOK_EVERY == 0:
                recent = mean(losses[-100:])
                if not math.isfinite(recent):
                    raise SystemExit(f"the loss is {recent} at step {trainer.step}")
                progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
            if due:
                point = {"step": trainer.step, "loss": round(mean(losses), 5)}
                trainer.history.append(point)
                trainer.minutes = (time.monotonic() - started) / 60
                losses.clear()
                trainer.save_checkpoint(checkpoint)
                held_out = export(trainer, name, data, out, counts=(FEW,))
                progress.write(
                    f"step {trainer.step}: loss {point['loss']}, held out {held_out:.5f}",
                    file=sys.stderr,
                )
    export(trainer, name, data, out, counts=(FEW, MANY))


def mean(losses: Sequence[Tensor]) -> float:
    """The mean of one-element tensors."""
    return torch.stack(tuple(losses)).double().mean().item()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("model", choices=sorted(RECIPES))
    option("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    option("--data", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST")
    option("--steps", type=int, help="length of the run, in place of the recipe's")
    option("--seconds", type=float, help="length of the run, for as many steps as that holds")
    option("--batch", type=int, help="images of a step, in place of the recipe's")
    option("--learning-rate", type=float, help="its peak, in place of the recipe's")
    option("--ema", type=float, help="what the average keeps at a step, in place of the recipe's")
    option("--start", help="a model's name or folder: begin with its weights")
    option("--seed", type=int, default=0, help="of the weights, the order and the noise")
    option("--threads", type=int, default=1, help="CPU threads")
    option("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    option("--no-graph", action="store_true", help="no CUDA graph")
    option("--checkpoint-every", type=int, default=500, help="steps between checkpoints")
    option("--resume", action="store_true", help="continue the run in --out")
    args = parser.parse_args(argv)
    if args.seconds is not None and (args.steps is not None or args.resume):
        parser.error("--seconds: not with --steps or --resume, which have their number of steps")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu where there is no CUDA device, got cuda")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    began = time.monotonic()
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    names = ("steps", "batch", "learning_rate", "ema", "seed", "start", "device")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = replace(RECIPES[args.model], **given)
    if args.device == "cuda":
        recipe = replace(recipe, bfloat16=torch.cuda.is_bf16_supported())
        torch.backends.cudnn.benchmark = True
        # Losses on held-out images are those of float32.
        torch.backends.cudnn.allow_tf32 = False
    data = digits_data() if args.model == "digits" else fashion_data(args.data)
    graph = not args.no_graph
    if args.seconds is not None:
        steps = steps_until(began + args.seconds, recipe, data, graph=graph)
        ema = recipe.ema if args.ema is not None else max(recipe.ema, round(1 - 10 / steps, 6))
        recipe = replace(recipe, steps=steps, ema=ema)
        print(f"{steps} steps, averaged by {recipe.ema}", file=sys.stderr, flush=True)
    train(
        args.model,
        recipe,
        data,
        args.out,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        graph=graph,
    )


if __name__ == "__main__":
    main()
