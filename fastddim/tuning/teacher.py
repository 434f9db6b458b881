"""The exact solution, by many small steps, and the paths through it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastddim.tuning.candidate import Numbers
from fastddim.tuning.trials import Trace

# The most elements of the states that are kept to find paths.
_ELEMENTS = 1 << 26
# Where √ᾱ is 0, x/√ᾱ is infinite.
_LEAST_SIGNAL = 1e-3


def kept(steps: int, x_T: Tensor) -> int:
    """The number of samples whose states are kept, all of which fit into memory."""
    return min(len(x_T), max(1, _ELEMENTS // (3 * steps * x_T[0].numel())))


def jump_costs(trace: Trace, alphas: Sequence[float]) -> Numbers:
    """`[S + 1, S + 1]`: the error of one step of order 1 from each of the teacher's states to each
    later one.

    It is the root mean square in units of x/√ᾱ, in which the ODE (eq. 14) carries an error to the
    end unchanged.

    Args:
        trace: the teacher's.
        alphas: ᾱ of its states.
    """
    count = len(trace.x_0)
    signal, sigma = np.sqrt(alphas), np.sqrt(1 - np.array(alphas))
    inner = _inner_products([*trace.states, *trace.x_0, *trace.epsilon])
    costs = np.full((count + 1, count + 1), np.inf)
    for i in range(count):
        x_0, epsilon = count + 1 + i, 2 * count + 1 + i
        j = np.arange(i + 1, count + 1)
        p, q = signal[j], sigma[j]
        # The square of p·x_0 + q·ε − x_j.
        square = (p * p * inner[x_0, x_0] + q * q * inner[epsilon, epsilon] + inner[j, j]) + 2 * (
            p * q * inner[x_0, epsilon] - p * inner[x_0, j] - q * inner[epsilon, j]
        )
        mean = np.maximum(square, 0) / trace.states[0].numel()
        costs[i, j] = np.sqrt(mean) / np.maximum(p, _LEAST_SIGNAL)
    return costs


def _inner_products(tensors: Sequence[Tensor]) -> Numbers:
    """The inner products of each two tensors."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    flat = torch.stack([tensor.flatten() for tensor in tensors])
    for part in flat.split(1 << 16, dim=1):
        exact = part.double()
        total += (exact @ exact.mT).cpu()
    products: Numbers = total.numpy()
    return products


def shortest_path(costs: Numbers, steps: int, power: float) -> list[int]:
    """The states at which `steps` jumps begin that have the least sum of costs ** power.

    Dynamic programming, as in arXiv 2106.03802 and 2405.11326.
    """
    costs = costs**power
    best = np.full(len(costs), np.inf)
    best[0] = 0
    origins = []
    for _ in range(steps):
        through = best[:, None] + costs
        origins.append(through.argmin(0))
        best = through.min(0)
    path = [len(costs) - 1]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return path[:0:-1]
