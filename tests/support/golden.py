"""SHA-256 digests of everything that has the same bits on every CPU: all tables, and
the noise.

    python tests/support/golden.py

writes them to `tests/data/golden.json`. They change only where a formula is changed on purpose.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim import Schedule, backends, philox, process, select_timesteps
from fastddim.models import UNet, UNetConfig
from fastddim.plan import (
    PREDICTIONS,
    SPACINGS,
    VARIANCES,
    Plan,
    Update,
    known_rows,
    make_inversion_plan,
    make_plan,
    stack_row,
    to_table,
    unchecked_row,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden.json"

LINEAR = Schedule.linear()
ETAS = (0.0, 0.3, 1.0)
# Per sample, as numbers of each would be.
TENSORS = {
    "eta": torch.tensor([0.0, 0.7], dtype=torch.float64),
    "temperature": torch.tensor([0.9, 1.0], dtype=torch.float64),
    "guidance_scale": torch.tensor([1.5, 7.5], dtype=torch.float64),
}


def schedules() -> Iterator[Tensor]:
    made = [
        *(Schedule.linear(T) for T in (1, 2, 10, 1000, 4000)),
        Schedule.linear(1000, 1e-5, 0.011),
        *(Schedule.scaled_linear(T) for T in (2, 10, 1000)),
        *(Schedule.cosine(T) for T in (1, 2, 10, 1000)),
        Schedule.cosine(1000, 0.02, 0.99),
        *(Schedule.sigmoid(T) for T in (2, 10, 1000)),
        Schedule.sigmoid(1000, 0.0, 3.0, 0.7, 0.99),
        Schedule.from_betas([0.01, 0.3, 0.2]),
    ]
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        made.append(Schedule.from_diffusers({"beta_schedule": name}))
    yield from (s.alphas_cumprod for s in made)
    yield from (s.zero_terminal_snr().alphas_cumprod for s in made if s.T > 1)


def timesteps() -> Iterator[Tensor]:
    for T, spacing in itertools.product((77, 1000), SPACINGS):
        for steps in range(1, T + 1, 7):
            yield select_timesteps(T, steps, spacing)
    yield select_timesteps(1000, 50, "leading", 1)


def plans(prediction: str) -> Iterator[Tensor]:
    divided = prediction in ("epsilon", "score")
    schedule = LINEAR if divided else Schedule.cosine().zero_terminal_snr()
    limits: list[dict[str, Any]] = [{}, {"clip": 0.7, "rederive_eps": True}]
    kinds = itertools.product(SPACINGS, ETAS, VARIANCES, limits, (1, 13))
    for spacing, eta, variance, limit, steps in kinds:
        update = Update(eta=eta, variance=variance, prediction=prediction, **limit)
        for hooked in (False, True):
            yield from _numbers(make_plan(schedule, steps, update, spacing=spacing, split=hooked))
        if eta == 0:
            yield from _numbers(make_plan(schedule, steps, update, spacing=spacing, order=2))
    update = Update(prediction=prediction, **TENSORS).checked(2)
    yield from _numbers(make_plan(schedule, 9, update, spacing="uniform"))
    yield from _numbers(make_plan(schedule, 1000, Update(eta=1.0, prediction=prediction)))
    each = Update(eta=(0.0, 0.5, 1.0), temperature=(1.0, 0.9, 0.8), prediction=prediction)
    yield from _numbers(make_plan(schedule, 3, each, spacing="uniform"))


def inversions(*predictions: str) -> Iterator[Tensor]:
    for spacing, prediction in itertools.product(SPACINGS, predictions):
        for order in (1, 2):
            update = Update(prediction=prediction, guidance_scale=3.0)
            yield from _numbers(
                make_inversion_plan(LINEAR, 13, update, spacing=spacing, order=order)
            )


def tables() -> Iterator[Tensor]:
    """Rows of tensors, and rows in float32."""
    alphas = LINEAR.alphas_cumprod
    for prediction, variance in itertools.product(PREDICTIONS, VARIANCES):
        for eta in ETAS:
            update = Update(eta=eta, variance=variance, prediction=prediction)
            rows = stack_row(unchecked_row(alphas[20:], alphas[:-20], update))
            yield rows
            yield to_table(rows, torch.float32, rows.device)


def known_data() -> Iterator[Tensor]:
    plan = make_plan(LINEAR, 50, Update(), spacing="uniform")
    yield known_rows(plan.alphas_cumprod)


def gaussians() -> Iterator[Tensor]:
    alphas = LINEAR.alphas_cumprod
    a, p = alphas[1:], alphas[:-1]
    sigma = process.sigma(a, p, 0.6)
    yield from (sigma, process.sigma_hat(a, p), process.gamma(LINEAR, 0.005))
    x, y = _states(len(a))
    for gaussian in (
        process.marginal(x, a),
        process.posterior(x, y, a, p, sigma),
        process.forward_kernel(x, y, a, p, sigma),
        process.generative(x, y, a, p, sigma),
    ):
        yield from gaussian
    yield process.predicted_x_0(x, y, a)
    yield LINEAR.add_noise(x, torch.arange(len(x)), y)


def words() -> Iterator[Tensor]:
    counter = [torch.arange(5000), torch.tensor(3), torch.tensor(2**32 - 1), torch.tensor(1)]
    yield from philox.philox4x32(counter, (torch.tensor(0x9E3779B9), torch.tensor(7)))


def noise(impl: str) -> Iterator[Tensor]:
    backend = backends.choose(impl, torch.device("cpu"))
    for stream in (philox.LATENTS, philox.STEP_NOISE):
        for seed in (0, [2**64 - 1, 5, 17]):
            out = torch.empty(3, 3, 17, 19)
            backend.normal_out(philox.make_keys(seed, 3, step_index=stream * 41), stream, out)
            yield out


def digests() -> dict[str, str]:
    """Digests of everything except the noise of compiled backends, which is that of the
    reference.
    """
    groups: Mapping[str, Callable[[], Iterator[Tensor]]] = {
        "schedules": schedules,
        "timesteps": timesteps,
        **{f"plans, {name}": functools.partial(plans, name) for name in PREDICTIONS},
        "inversions": lambda: inversions("epsilon", "v_prediction"),
        "inversions, score": lambda: inversions("score"),
        "known data": known_data,
        "rows of tensors": tables,
        "gaussians": gaussians,
        "network's coefficients": lambda: iter([_network().coefficient_bits]),
        "words": words,
        "noise": lambda: noise("reference"),
    }
    return {name: digest(group()) for name, group in groups.items()}


def digest(tensors: Iterator[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _numbers(plan: Plan) -> Iterator[Tensor]:
    yield from (plan.timesteps, plan.alphas_cumprod, plan.table)
    if plan.first_half is not None:
        yield plan.first_half


def _states(count: int) -> tuple[Tensor, Tensor]:
    """Two states of any numbers, without a generator whose numbers torch may change."""
    values = np.arange(count * 6, dtype=np.float64).reshape(2, count, 3)
    x, y = torch.from_numpy(values * math.pi % 4 - 2)
    return x, y


def _network() -> UNet:
    return UNet(UNetConfig(sample_shape=(1, 8, 8), channels=(8, 16)), LINEAR)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(digests(), indent=1) + "\n")
