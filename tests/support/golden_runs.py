"""SHA-256 digests of whole runs: `sample`, `Sampler`, `invert`, `Stream` and `generate`.

    python tests/support/golden_runs.py

writes them to `tests/data/golden_runs.json`, for each backend that runs on the CPU. The models use
correctly rounded operations only, so that a run has the same bits on every CPU. The digests change
only where what a call gives is changed on purpose.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastddim

GOLDEN = Path(__file__).parent.parent / "data" / "golden_runs.json"

SHAPE = (2, 3, 5, 7)
TIMESTEPS = (900, 500, 499, 3, 0)


def ramp(*shape: int, factor: float = 1.0) -> Tensor:
    """Numbers in [−2, 2] in no order, without a generator whose numbers torch may change."""
    count = torch.Size(shape).numel()
    values = torch.arange(count, dtype=torch.float64) * 0.7390851332151607 * factor % 4 - 2
    return values.reshape(shape).float()


def model(x: Tensor, t: Tensor) -> Tensor:
    time = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * (1 / 1024)
    return x * 0.75 / (1 + x * x) + (time - 0.5) * 0.25


def conditioned(x: Tensor, t: Tensor, *, shift: Tensor) -> Tensor:
    return model(x, t) + shift


def learned_variance(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(x, t), x], dim=1)


def halved(x_0: Tensor, t: Tensor) -> Tensor:
    return x_0.mul_(0.5) + t.reshape(-1, *[1] * (x_0.ndim - 1)) * (1 / 4096)


class Network(nn.Module):
    """`model`, times a parameter of the given dtype."""

    sample_shape = SHAPE[1:]

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5], dtype=dtype))
        self.schedule = fastddim.Schedule.cosine()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == self.weight.dtype
        return model(x, t) * self.weight


def sampling() -> dict[str, dict[str, Any]]:
    """Arguments of `sample` besides the model."""
    data, noise = ramp(*SHAPE), ramp(5, *SHAPE, factor=1.7)
    mask = (ramp(SHAPE[0], 1, *SHAPE[2:]) > 0).float() * 0.75
    shift = {"shift": ramp(2 * SHAPE[0], 1, 1, 1)}
    per_sample = torch.tensor([0.25, 0.75], dtype=torch.float64)
    cosine = fastddim.Schedule.cosine().zero_terminal_snr()
    guided = {"guidance_scale": 3.0, "model_kwargs": shift, "model": conditioned}
    cases: dict[str, dict[str, Any]] = {
        "ddim": {},
        "ddpm": {"eta": 1.0},
        "ddpm, larger variance": {"eta": 1.0, "variance": "large"},
        "eta of each step": {"eta": [0.0, 0.5, 1.0, 0.25, 0.5]},
        "eta of each sample": {"eta": per_sample, "temperature": per_sample},
        "temperature of each step": {"eta": 0.5, "temperature": [1.0, 0.5, per_sample, 0.0, 1.0]},
        "sample": {"prediction": "sample", "eta": 0.3},
        "v": {"prediction": "v_prediction", "schedule": cosine, "spacing": "trailing"},
        "score": {"prediction": "score", "eta": 0.3},
        "score, order 2": {"prediction": "score", "order": 2},
        "clip": {"clip": 0.6},
        "rederived": {"clip": 0.6, "rederive_eps": True, "eta": 0.5},
        "guided": guided,
        "guided, each step": {**guided, "guidance_scale": [1.0, 2.0, 3.0, per_sample, 0.0]},
        "rescaled": {**guided, "guidance_rescale": 0.7},
        "rescaled and thresholded": {
            **guided,
            "guidance_rescale": 0.7,
            "dynamic_thresholding_ratio": 0.9,
        },
        "thresholded": {"dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5, "eta": 1.0},
        "order 2": {"order": 2},
        "order 2, guided": {**guided, "order": 2, "clip": 1.0, "rederive_eps": True},
        "seeds": {"seed": [2**64 - 1, 7], "eta": 1.0},
        "offset": {"seed": 3, "sample_offset": 11, "eta": 1.0},
        "given noise": {"noise": noise, "eta": 1.0},
        "given latents": {"x_T": data},
        "inpainted": {"mask": mask.expand(SHAPE), "known": data, "eta": 0.5},
        "inpainted, order 2": {"mask": mask.expand(SHAPE), "known": data, "order": 2},
        "changed x_0": {"denoised_fn": halved, "clip": 1.0},
        "changed x_0, rederived": {"denoised_fn": halved, "rederive_eps": True, "eta": 0.5},
        "changed x_0, guided": {
            **guided,
            "denoised_fn": halved,
            "guidance_rescale": 0.5,
            "dynamic_thresholding_ratio": 0.9,
        },
        "changed x_0, order 2": {"denoised_fn": halved, "order": 2},
        "learned variance": {"model": learned_variance, "eta": 1.0},
        "finite": {"check_finite": True, "eta": 0.5},
        "trajectory": {"return_trajectory": True, "eta": 1.0},
        "one step": {"steps": 1, "eta": 1.0, "spacing": "trailing"},
        "quadratic": {"steps": 13, "spacing": "quadratic"},
        "leading": {"steps": 10, "spacing": "leading", "steps_offset": 1},
        "linspace": {"steps": 10, "spacing": "linspace"},
        "trailing": {"steps": 10},
        "vectors": {"shape": (3,), "eta": 1.0, "steps": 4, "spacing": "uniform"},
        "small": {"shape": (2, 1), "eta": 1.0, "steps": 4, "order": 1, "spacing": "uniform"},
        "no sample": {"shape": (0, 4), "steps": 3},
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        cases[f"state in {dtype}"] = {"dtype": dtype, "eta": 0.5}
        cases[f"model in {dtype}"] = {"model": Network(dtype), "eta": 0.5, "shape": None}
        cases[f"model in {dtype}, order 2"] = {"model": Network(dtype), "order": 2, "batch_size": 2}
    common = {"steps": TIMESTEPS, "model": model, "seed": 0}
    return {name: {**common, **_shaped(case)} for name, case in cases.items()}


def _shaped(case: dict[str, Any]) -> dict[str, Any]:
    known_shape = {"shape", "batch_size", "x_T"} & set(case)
    return case if known_shape else {"shape": SHAPE, **case}


def sampled(impl: str) -> Iterator[tuple[str, list[Tensor]]]:
    for name, case in sampling().items():
        yield f"sample, {name}", _listed(fastddim.sample(**case, impl=impl), case)
    seen: list[Tensor] = []
    fastddim.sample(
        model,
        TIMESTEPS,
        shape=SHAPE,
        eta=0.5,
        seed=0,
        impl=impl,
        callback=lambda s, t, x, x_0: seen.extend((torch.tensor([s, t]), x, x_0)),
    )
    yield "sample, callback", seen


PER_CALL = ("seed", "sample_offset", "noise", "x_T", "mask", "known", "return_trajectory")


def prepared(impl: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Results of each `Sampler`, drawn from twice, with calls of other kinds between."""
    for name, case in sampling().items():
        per_call = {key: case.pop(key) for key in PER_CALL if key in case}
        if "x_T" in per_call:
            case["shape"] = per_call["x_T"].shape
        sampler = fastddim.Sampler(**case, impl=impl)
        first = _listed(sampler(**per_call), per_call)
        seen: list[Tensor] = []
        sampler(seed=5, callback=lambda s, t, x, x_0, seen=seen: seen.append(x_0))
        again = _listed(sampler(**per_call), per_call)
        yield f"Sampler, {name}", [*first, *seen, *again]


def inverted(impl: str) -> Iterator[tuple[str, list[Tensor]]]:
    data = ramp(*SHAPE)
    guided = {"guidance_scale": 1.5, "model_kwargs": {"shift": ramp(4, 1, 1, 1)}}
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "order 2": {"order": 2},
        "refined": {"refine": 2},
        "v": {"prediction": "v_prediction", "schedule": fastddim.Schedule.cosine()},
        "score": {"prediction": "score"},
        "guided": {**guided, "model": conditioned, "guidance_rescale": 0.3},
        "guided, refined": {**guided, "model": conditioned, "refine": 1},
        "trajectory": {"return_trajectory": True, "spacing": "trailing", "steps": 7},
        "float64": {"x_0": data.double()},
        "float16": {"x_0": data.half(), "model": Network(torch.float16)},
    }
    for name, case in cases.items():
        arguments = {"model": model, "x_0": data, "steps": TIMESTEPS, **case}
        yield f"invert, {name}", _listed(fastddim.invert(**arguments, impl=impl), case)


def streamed(impl: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Results of three slots for requests of many kinds, each of which comes when others are on
    their way.
    """
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "order 2": {"order": 2},
        "guided": {"guided": True, "model": conditioned},
        "guided, rescaled": {"guided": True, "model": conditioned, "guidance_rescale": 0.7},
        "thresholded": {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
        "v, finite": {
            "prediction": "v_prediction",
            "schedule": fastddim.Schedule.cosine(),
            "check_finite": True,
        },
        "score": {"prediction": "score"},
        "float16": {"model": Network(torch.float16)},
        "float64": {"dtype": torch.float64},
    }
    for name, kind in kinds.items():
        stream = fastddim.Stream(
            **{"model": model, "shape": (3, *SHAPE[1:]), "max_steps": 20, **kind}, impl=impl
        )
        tickets = []
        for request in _requests(kind, stream.dtype):
            tickets.append(stream.submit(**request))
            stream.step()
        stream.run()
        yield f"Stream, {name}", [ticket.result() for ticket in tickets]


def _requests(kind: dict[str, Any], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    noisy = kind.get("order", 1) == 1
    guided = kind.get("guided", False)
    thresholded = "dynamic_thresholding_ratio" in kind
    for i, steps in enumerate((5, 1, 3, [900, 40, 3], 8, 2, 13)):
        request: dict[str, Any] = {"steps": steps, "seed": 2**64 - 1 - i, "sample_offset": i % 2}
        request["spacing"] = "uniform"
        if noisy and i % 3:
            request |= {"eta": 0.5 * (i % 3), "temperature": 1 - i / 16}
        if not thresholded and i % 2:
            request |= {"clip": 0.75, "rederive_eps": i % 4 == 1}
        if guided:
            request |= {
                "guidance_scale": 1.0 + i,
                "model_kwargs": {"shift": ramp(2, 1, 1, 1, factor=i + 0.3)},
            }
        if i == 3:
            request["x_T"] = ramp(1, *SHAPE[1:]).to(dtype)
        yield request


RUN: dict[str, Any] = {
    "steps": 5,
    "spacing": "uniform",
    "stop": 7,
    "start": 2,
    "seed": 9,
    "shape": (2, 1, 4, 6),
    "eta": 0.5,
    "clip": 1.0,
    "model_id": "golden",
}


def generated(impl: str) -> Iterator[tuple[str, list[Tensor]]]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run = fastddim.generate(model, out=out, format="safetensors", impl=impl, **RUN)
        files = sorted(out.glob("*.safetensors"))
        yield "generate", [load_file(path)["samples"] for path in files]
        words = json.dumps([path.name for path in sorted(out.iterdir())]) + run.digest
        yield "generate, names and digest", [torch.tensor(list(words.encode()))]
        manifest = json.loads((out / "manifest.json").read_text())
        for machine in ("computation", "versions"):
            del manifest[machine]
        words = json.dumps(manifest, sort_keys=True)
        yield "generate, manifest", [torch.tensor(list(words.encode()))]


GROUPS: dict[str, Callable[[str], Iterator[tuple[str, list[Tensor]]]]] = {
    "sample": sampled,
    "Sampler": prepared,
    "invert": inverted,
    "Stream": streamed,
    "generate": generated,
}


def digests(group: str, impl: str) -> dict[str, str]:
    return {name: _digest(tensors) for name, tensors in GROUPS[group](impl)}


def _digest(tensors: list[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return found.hexdigest()


def _listed(result: Tensor, case: dict[str, Any]) -> list[Tensor]:
    return [result[-1], result] if "return_trajectory" in case else [result]


if __name__ == "__main__":
    impls = ("reference", "cpu")
    written = {impl: {group: digests(group, impl) for group in GROUPS} for impl in impls}
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
