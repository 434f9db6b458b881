"""The Fréchet distance between two sets of features, and its error.

This is the distance of Heusel et al. (arXiv 1706.08500) between Gaussians fitted to both sets. It
is not called FID here, since that name stands for Inception's features. Another network gives other
numbers, and numbers of two networks or two data sets cannot be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Mean `[D]` and covariance `[D, D]` of a set of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def statistics(features: np.ndarray) -> Statistics:
    """The statistics of features `[N, D]`, N ≥ 2, with the unbiased covariance.

    Raises:
        ValueError: `features` is not `[N, D]` with N ≥ 2, or not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: expected [N, D] with N >= 2, got {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError("features: expected finite values, got NaN or infinity")
    features = features.astype(np.float64)
    return Statistics(
        features.mean(axis=0),
        np.cov(features, rowvar=False).reshape(features.shape[1], features.shape[1]),
    )


def distance(a: Statistics, b: Statistics) -> float:
    """|μ_a − μ_b|² + tr(C_a + C_b − 2·(C_a^½·C_b·C_a^½)^½)."""
    root = _square_root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    overlap = np.sqrt(np.clip(cross, 0, None)).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap)


def bootstrap(features: np.ndarray, reference: Statistics, draws: int = 20, seed: int = 0) -> float:
    """The standard deviation of the distance when the set `[N, D]` is resampled from itself."""
    generator = np.random.default_rng(seed)
    values = [
        distance(
            statistics(features[generator.integers(len(features), size=len(features))]), reference
        )
        for _ in range(draws)
    ]
    return float(np.std(values, ddof=1))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
