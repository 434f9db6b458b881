"""Every entry point on a real GPU, by a model that gives the same bits on every device.

Skipped, visibly, where there is no CUDA device; tests/test_gpu.py has the kernels themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import fastddim
from fastddim import Schedule, philox, process
from fastddim.cli import main
from fastddim.integrations import ermongroup, k_diffusion

from .support.models import elementwise_model
from .support.tuned import random_steps

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPE = (3, 2, 6, 5)
GRAPHS = ["auto", False, True, "loop"]

Entry = Callable[[torch.device], Any]


def normal(seed: int, device: torch.device, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_same_bits(entry: Entry) -> None:
    expected, got = (flat(entry(torch.device(device))) for device in ("cpu", DEVICE))
    assert len(got) == len(expected) > 0
    for own, other in zip(got, expected, strict=True):
        assert own.device.type == torch.device(DEVICE).type
        assert torch.equal(own.cpu(), other)
        assert other.isfinite().all()


def mode(graph: bool | str, device: torch.device) -> bool | str:
    """The kind of graph on a GPU; the CPU has none."""
    return graph if device.type == "cuda" else False


def flat(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [part for v in values for part in flat(v)]


def scaled(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
    return elementwise_model(x, t) * scale


SAMPLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"eta": 1.0, "seed": [3, 2**64 - 1, 5]},
    "offset": {"eta": 0.5, "sample_offset": 9},
    "rows": {"eta": torch.tensor([0.0, 0.5, 1.0]), "clip": 1.0},
    "guided": {"guidance_scale": 2.0, "eta": 1.0},
    "order 2": {"order": 2},
    "tuned": {"steps": random_steps(6)},
    "bfloat16": {"dtype": torch.bfloat16, "eta": 1.0},
    "float64": {"dtype": torch.float64, "eta": 1.0},
    "re-derived": {"clip": 0.5, "rederive_eps": True},
    "hook": {"denoised_fn": lambda x_0, t: x_0 * 0.75},
    "many steps": {"steps": 100, "eta": 1.0, "variance": "large"},
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", SAMPLES)
def test_sample(kind: str, graph: bool | str) -> None:
    options: dict[str, Any] = {"steps": 10, "shape": SHAPE, "seed": 0, **SAMPLES[kind]}

    def entry(device: torch.device) -> Tensor:
        result = fastddim.sample(
            elementwise_model, device=device, graph=mode(graph, device), **options
        )
        assert isinstance(result, Tensor)
        return result

    assert_same_bits(entry)


def test_tuning() -> None:
    """Tuning searches on the model's device; its sums are rounded differently there."""
    options: dict[str, Any] = {"shape": (16, 2, 3), "samples": 16, "teacher_steps": 20}
    cpu, gpu = (
        fastddim.tune(elementwise_model, 4, device=device, progress=False, **options)
        for device in ("cpu", DEVICE)
    )
    assert isinstance(cpu, fastddim.TunedSteps)
    assert isinstance(gpu, fastddim.TunedSteps)
    assert gpu.errors["order 2"] == pytest.approx(cpu.errors["order 2"], rel=1e-4)
    assert gpu.errors["tuned"] < 0.9 * gpu.errors["order 2"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_a_call_is_given(graph: bool | str) -> None:
    """A call may get x_T, noise, a mask, keyword arguments and the trajectory, twice on the same
    graphs.
    """

    def entry(device: torch.device) -> list[Any]:
        results = []
        for seed in (1, 2):
            options: dict[str, Any] = {
                "x_T": normal(seed, device),
                "noise": normal(seed, device, (7, *SHAPE)),
                "mask": torch.ones(5, device=device) * 0.5,
                "known": normal(seed + 5, device),
                "model_kwargs": {"scale": torch.full((3, 1, 1, 1), 0.5 * seed, device=device)},
                "return_trajectory": True,
            }
            results.append(
                fastddim.sample(scaled, 7, eta=1.0, graph=mode(graph, device), **options)
            )
        return results

    assert_same_bits(entry)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_sampler_is_used_again(graph: bool | str) -> None:
    def entry(device: torch.device) -> list[Any]:
        sampler = fastddim.Sampler(
            elementwise_model, 6, shape=SHAPE, eta=1.0, device=device, graph=mode(graph, device)
        )
        calls = ({"seed": 1}, {"x_T": normal(4, device)}, {"seed": [1, 2, 3]}, {"seed": 1})
        results = [sampler(**call) for call in calls]
        assert torch.equal(flat(results[0])[0], flat(results[3])[0])
        return results

    assert_same_bits(entry)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("graph", GRAPHS)
def test_halves_of_guidance(graph: bool | str, models: int) -> None:
    """Halves of guidance come from numbers and rows, of calls and of the sampler, with one model
    and with two.
    """

    def entry(device: torch.device) -> list[Any]:
        scale = torch.arange(3.0, device=device).reshape(3, 1, 1, 1) / 4
        sampler = fastddim.Sampler(
            scaled,
            6,
            shape=SHAPE,
            guidance_scale=2.0,
            model_kwargs={"scale": scale},
            uncond_kwargs={"scale": 0.5},
            uncond_model=partial(scaled) if models == 2 else None,
            device=device,
            graph=mode(graph, device),
        )
        calls: list[dict[str, Any]] = [
            {},
            {"model_kwargs": {"scale": scale + 1}},
            {"model_kwargs": {"scale": scale[:1]}, "uncond_kwargs": {"scale": scale}},
            {"uncond_kwargs": {"scale": 0.25}},
            {},
        ]
        results = [sampler(seed=1, **call) for call in calls]
        assert torch.equal(results[0], results[4])
        assert not any(torch.equal(results[0], other) for other in results[1:4])
        return results

    assert_same_bits(entry)


@pytest.mark.parametrize("graph", GRAPHS)
def test_invert(graph: bool | str) -> None:
    def entry(device: torch.device) -> Any:
        return fastddim.invert(elementwise_model, normal(1, device), 8, graph=mode(graph, device))

    assert_same_bits(entry)


@pytest.mark.parametrize("graph", [False, True, "auto"])
@pytest.mark.parametrize("guided", [False, True])
def test_stream(graph: bool | str, guided: bool) -> None:
    def entry(device: torch.device) -> list[Tensor]:
        stream = fastddim.Stream(
            elementwise_model, shape=SHAPE, guided=guided, device=device, graph=mode(graph, device)
        )
        tickets = [
            stream.submit(
                steps,
                seed=steps,
                eta=eta,
                guidance_scale=1.5 if guided else None,
                x_T=normal(steps, device, (1, *SHAPE[1:])) if steps == 5 else None,
            )
            for steps, eta in ((3, 0.0), (7, 1.0), (5, 0.5), (1, 0.0), (7, 1.0), (20, 1.0))
        ]
        stream.run()
        return [ticket.result(timeout=0) for ticket in tickets]

    assert_same_bits(entry)


def test_generate(tmp_path: Path) -> None:
    def entry(device: torch.device) -> Tensor:
        folder = tmp_path / device.type
        fastddim.generate(
            elementwise_model,
            5,
            folder,
            stop=7,
            shape=(3, *SHAPE[1:]),
            format="safetensors",
            model_id="elementwise",
            eta=1.0,
            device=device,
        )
        # The same files; whatever the test compares is on the device.
        content = b"".join(file.read_bytes() for file in sorted(folder.glob("samples-*")))
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)

    assert_same_bits(entry)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_step(dtype: torch.dtype, eta: float) -> None:
    def entry(device: torch.device) -> Any:
        x, e = normal(1, device).to(dtype), normal(2, device).to(dtype)
        options: dict[str, Any] = {"eta": eta, "clip": 1.0, "seed": 4, "step_index": 3}
        a, p = (
            torch.tensor(values, dtype=torch.float64, device=device)
            for values in ([0.3, 0.5, 0.8], [0.4, 0.9, 1.0])
        )
        return [
            fastddim.step(x, e, *alphas, return_x0=True, **options)
            for alphas in ((0.3, 0.5), (a, p))
        ]

    assert_same_bits(entry)


def test_gradients() -> None:
    def entry(device: torch.device) -> list[Tensor]:
        x, e = normal(1, device).requires_grad_(), normal(2, device).requires_grad_()
        result = fastddim.step(x, e, 0.3, 0.5, clip=1.0)
        assert isinstance(result, Tensor)
        result.backward(normal(3, device))
        assert x.grad is not None
        assert e.grad is not None
        return [x.grad, e.grad]

    assert_same_bits(entry)


def test_noise() -> None:
    assert_same_bits(lambda device: philox.initial_latents(SHAPE, 7, device=device))
    assert_same_bits(lambda device: philox.step_noise(SHAPE, 3, [1, 2, 3], device=device))
    assert_same_bits(lambda device: [*philox.make_keys(5, 3, sample_offset=2, device=device)])


def test_marginals() -> None:
    """Marginals agree to rounding: the process is written in operations of torch, whose roots are
    each device's own.
    """
    expected, got = (
        process.marginal(normal(1, torch.device(device)), 0.3) for device in ("cpu", DEVICE)
    )
    torch.testing.assert_close(got.mean.cpu(), expected.mean)


def test_k_diffusion() -> None:
    def entry(device: torch.device) -> Tensor:
        sigmas = torch.cat([torch.linspace(8, 0.5, 6), torch.zeros(1)]).to(device)
        draws = iter(range(10))
        return k_diffusion.sample_ddim(
            elementwise_model,
            normal(1, device) * 8,
            sigmas,
            disable=True,
            eta=0.5,
            noise_sampler=lambda *_: normal(20 + next(draws), device),
        )

    assert_same_bits(entry)


def test_ermongroup() -> None:
    def entry(device: torch.device) -> Tensor:
        betas = torch.linspace(1e-4, 0.02, 1000).to(device)
        states, _ = ermongroup.generalized_steps(
            normal(1, device), range(0, 1000, 100), elementwise_model, betas
        )
        return states[-1].to(device)

    assert_same_bits(entry)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"eta": 1.0},
    "DDIMParallelScheduler": {"eta": 0.5},
    "DDIMInverseScheduler": {},
    "DDPMScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusers(name: str) -> None:
    """The drop-in has the same bits on both devices, and diffusers' numbers on this one."""
    theirs = pytest.importorskip("diffusers", reason="diffusers is not installed")
    ours = importlib.import_module("fastddim.integrations.diffusers")

    def entry(device: torch.device, package: Any = ours) -> Tensor:
        scheduler = getattr(package, name)(clip_sample=False)
        scheduler.set_timesteps(10, device=device)
        random = {"generator": torch.Generator().manual_seed(3)} if "Inverse" not in name else {}
        x = normal(1, device)
        for t in scheduler.timesteps:
            output = elementwise_model(x, t.expand(len(x)))
            x = scheduler.step(output, t, x, **SCHEDULERS[name], **random).prev_sample
        return x

    assert_same_bits(entry)
    own, other = entry(torch.device(DEVICE)), entry(torch.device(DEVICE), theirs)
    torch.testing.assert_close(own, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_bundled_models(name: str, graph: bool | str) -> None:
    """Networks of bundled models round differently on each device, so pictures are compared with a
    tolerance, which TF32 would exceed.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        images = []
        for device, kind in (("cpu", False), (DEVICE, graph)):
            model = fastddim.models.load(name).to(device)
            image = fastddim.sample(model, 10, batch_size=4, seed=5, graph=kind)
            assert isinstance(image, Tensor)
            images.append(image.cpu())
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert (images[0] - images[1]).abs().max() < 2e-3


def test_command_line(tmp_path: Path) -> None:
    for device in ("cpu", DEVICE):
        words = ["sample", "digits", "--steps", "5", "--device", device]
        result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / f"{device}.png")])
        assert result.exit_code == 0, result.output
    assert (tmp_path / f"{DEVICE}.png").stat().st_size > 100


def test_schedules_reach_the_device() -> None:
    """Two schedules and two spacings reach the device through one pool of graphs."""

    def entry(device: torch.device) -> list[Any]:
        draw = partial(fastddim.sample, elementwise_model, 6, shape=SHAPE, device=device)
        return [
            draw(schedule=schedule, spacing=spacing)
            for schedule in (Schedule.linear(), Schedule.cosine())
            for spacing in ("uniform", "trailing")
        ]

    assert_same_bits(entry)
    assert all(not torch.equal(a, b) for a, b in pairwise(flat(entry(torch.device(DEVICE)))))
