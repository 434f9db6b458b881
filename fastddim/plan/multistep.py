"""Weights of the epsilons of earlier steps, by which a step integrates the ODE to a higher order.

A step of any order is that of eq. 12 plus Σ_k w_k·(eps − h_k), where h_k is the eps of k steps
before. Tuned steps have weights of eps and of h_1 themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from fastddim.elementary import sqrt

HistoryWeights: TypeAlias = Sequence[float]
"""w_k of each earlier eps, the last one first."""

ORDERS = (1, 2)
"""The orders of the solvers."""

NO_HISTORY: HistoryWeights = (0.0,)
"""The history weights of a step that reads no earlier epsilon."""


class EpsilonWeights(NamedTuple):
    """The coefficients of the epsilons in the new state, numbers or tensors `[B]`.

    Attributes:
        direction: the coefficient of the eps of this step.
        history: the coefficient of the eps of the step before.
    """

    direction: Any
    history: Any


Weights: TypeAlias = HistoryWeights | EpsilonWeights
"""The weights of one step."""


def epsilon_weights(direction: Any, weights: Weights) -> EpsilonWeights:
    """The coefficients that follow from history weights, or tuned ones as they are given.

    Args:
        direction: √(1 − ᾱ_prev − σ²) of eq. 12.
        weights: a solver's, or tuned ones.
    """
    if isinstance(weights, EpsilonWeights):
        return weights
    return EpsilonWeights(direction + sum(weights), -weights[0])


def history_weights(order: int, b: float, a: float, p: float) -> HistoryWeights:
    """The weights of a step from ᾱ = `a` to ᾱ = `p` that comes after one from `b`."""
    return NO_HISTORY if order == 1 else (_adams_bashforth(b, a, p),)


def _adams_bashforth(b: float, a: float, p: float) -> float:
    """Weight of eps(a) − eps(b).

    Eq. 14 is dx̄ = eps dσ with x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ). Two-step Adams–Bashforth with the
    steps h = σ(p) − σ(a) and h_b = σ(a) − σ(b) adds h²/(2·h_b)·(eps(a) − eps(b)) to the step of
    order 1.
    """
    if 0 in (a, b, p):
        return 0.0  # σ is infinite at 0, and no line goes through it
    sigma_b, sigma_a, sigma_p = (sqrt((1 - v) / v) for v in (b, a, p))
    h, h_b = sigma_p - sigma_a, sigma_a - sigma_b
    return float(sqrt(p) * h * h / (2 * h_b))
