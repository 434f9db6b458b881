"""The probability flow ODE of the galaxy networks, solved in their own time by Runge–Kutta methods.

It is dx/dt = −(x + score(x, t)) / 2, from t = 10 to t = 0 (arXiv 2011.13456, eq. 13 with β = 1),
the ODE that fastddim's steps solve (arXiv 2010.02502, eq. 14).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from third_party.galaxygrad import LAST_TIME, ScoreNetwork

# Tsitouras' method of order 5 (2011). The last row is that of the result.
_NODES = (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0)
_TABLEAU = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (
        5.86145544294642,
        -12.92096931784711,
        8.159367898576159,
        -0.071584973281401,
        -0.028269050394068383,
    ),
    (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
    ),
)
OWN_STEPS = 400
OWN_EVALUATIONS = 6 * OWN_STEPS + 1
"""Steps and network calls of galaxygrad's sampler: six a step, and one more after the last."""


def slope(network: ScoreNetwork, x: Tensor, time: float) -> Tensor:
    """dx/dt at a time in [0, 10]."""
    return -0.5 * (x + network.score(x, time))


def own_sampler(network: ScoreNetwork, x: Tensor, steps: int = OWN_STEPS) -> Tensor:
    """Draw samples of latents like the package of the networks, by Tsitouras' method.

    The steps are equal; by default they have the length 0.025, as in the package.
    """
    h = -LAST_TIME / steps
    for step in range(steps):
        slopes = []
        for node, weights in zip(_NODES, ((), *_TABLEAU[:-1]), strict=True):
            time = LAST_TIME + (step + node) * h
            slopes.append(slope(network, _moved(x, h, weights, slopes), time))
        x = _moved(x, h, _TABLEAU[-1], slopes)
    return x


def adaptive(network: ScoreNetwork, x: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Draw samples of latents by the method of Dormand and Prince, which chooses its steps, and
    count its calls of the network.

    All latents take the same steps. The state is float64; the network computes in its own dtype.

    Args:
        network: network whose ODE is solved.
        x: latents `[B, C, H, W]`.
        tolerance: absolute and relative tolerance, for the root mean square over all elements.
    """
    from scipy.integrate import solve_ivp

    dtype = next(network.parameters()).dtype

    def flat_slope(time: float, values: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(values).to(dtype).reshape(x.shape)
        return slope(network, state, time).double().numpy().ravel()

    start = x.double().numpy().ravel()
    solution = solve_ivp(flat_slope, (LAST_TIME, 0.0), start, rtol=tolerance, atol=tolerance)
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape), solution.nfev


def _moved(x: Tensor, h: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, value in zip(weights, slopes, strict=True):
        x = x + (h * weight) * value
    return x
