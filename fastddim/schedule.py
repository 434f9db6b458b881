"""Noise schedules: the cumulative product ᾱ_t of every schedule in use, in float64.

The paper calls `alphas_cumprod[t]` α_t (arXiv 2010.02502, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim import elementary
from fastddim.validation import (
    check_int,
    check_noise,
    check_number,
    check_state,
    check_timestep,
)


class Schedule:
    """The noise schedule a model was trained with.

    Attributes:
        alphas_cumprod: float64 tensor `[T]` on the CPU, strictly decreasing, inside [0, 1).

    Build one with a named constructor: `linear`, `scaled_linear`, `cosine`, `sigmoid`,
    `from_betas`, `from_alphas_cumprod` or `from_diffusers`.
    """

    alphas_cumprod: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = _validated(alphas_cumprod)

    @property
    def T(self) -> int:
        """Number of training timesteps; `t` runs from 0 to T − 1."""
        return self.alphas_cumprod.shape[0]

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0].item(), self.alphas_cumprod[-1].item()
        return f"Schedule(T={self.T}, alphas_cumprod={first:.6g}…{last:.6g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and torch.equal(
            self.alphas_cumprod, other.alphas_cumprod
        )

    def __hash__(self) -> int:
        return hash(self.alphas_cumprod.numpy().tobytes())

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """β linear from `beta_start` to `beta_end`: DDPM's and the DDIM paper's choice."""
        return cls.from_betas(np.linspace(*_beta_range(beta_start, beta_end), _length(T)))

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> Schedule:
        """√β linear between √`beta_start` and √`beta_end`: latent diffusion's choice."""
        start, end = _beta_range(beta_start, beta_end)
        roots = np.linspace(math.sqrt(start), math.sqrt(end), _length(T))
        return cls.from_betas(roots * roots)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """ᾱ(u) = cos²((u + s)/(1 + s)·π/2), β capped at `max_beta` (arXiv 2102.09672, eq. 17)."""
        check_number("s", s, 0.0)
        u = np.arange(_length(T) + 1, dtype=np.float64) / T
        root = elementary.cos((u + s) / (1 + s) * math.pi / 2)
        return cls._from_curve(root * root, max_beta)

    @classmethod
    def sigmoid(
        cls,
        T: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
    ) -> Schedule:
        """ᾱ(u) falls as a logistic curve from `start` to `end` of temperature `tau` (arXiv
        2212.11972).
        """
        check_number("start", start)
        check_number("end", end, start, open_low=True)
        check_number("tau", tau, 0.0, open_low=True)
        u = np.arange(_length(T) + 1, dtype=np.float64) / T
        low, high = _logistic(np.array([start, end]) / tau)
        falling = high - _logistic((u * (end - start) + start) / tau)
        return cls._from_curve(falling / (high - low), max_beta)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float] | np.ndarray) -> Schedule:
        """Make a schedule from β_t, shape `[T]`, each in (0, 1]: ᾱ_t = Π (1 − β).

        Raises:
            TypeError: `betas` does not hold numbers.
            ValueError: a β is NaN or outside (0, 1], or `betas` is not a non-empty vector.
        """
        values = _vector("betas", betas)
        bad = ~((values > 0) & (values <= 1))
        if bad.any():
            t = int(bad.nonzero()[0])
            raise ValueError(
                f"betas: expected values in (0, 1], got betas[{t}] = {values[t].item()}"
            )
        return cls(torch.from_numpy(np.cumprod(1.0 - values.numpy())))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float] | np.ndarray) -> Schedule:
        """Make a schedule from ᾱ_t, shape `[T]`, strictly decreasing inside [0, 1).

        Raises:
            TypeError: `alphas_cumprod` does not hold numbers.
            ValueError: a value is NaN, outside [0, 1) or not below the one before it.
        """
        return cls(_vector("alphas_cumprod", alphas_cumprod))

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> Schedule:
        """Make a schedule from a diffusers scheduler or its config.

        A scheduler has a float32 `alphas_cumprod`, which is taken unchanged. A config (a mapping)
        is evaluated in float64 from `beta_schedule`, `beta_start`, `beta_end`,
        `num_train_timesteps`, `trained_betas` and `rescale_betas_zero_snr`.

        Raises:
            TypeError: `scheduler` is neither a scheduler nor a config.
            ValueError: the config names an unknown `beta_schedule`.
        """
        if isinstance(scheduler, Mapping):
            return cls._from_diffusers_config(scheduler)
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas_cumprod, Tensor):
            raise TypeError(
                "scheduler: expected a diffusers scheduler with alphas_cumprod, or its config "
                f"mapping, got {type(scheduler).__name__}"
            )
        return cls(alphas_cumprod)

    @classmethod
    def _from_diffusers_config(cls, config: Mapping[str, Any]) -> Schedule:
        T = int(config.get("num_train_timesteps", 1000))
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        name = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            schedule = cls.from_betas(np.asarray(config["trained_betas"], dtype=np.float64))
        elif name == "linear":
            schedule = cls.linear(T, start, end)
        elif name == "scaled_linear":
            schedule = cls.scaled_linear(T, start, end)
        elif name == "squaredcos_cap_v2":
            schedule = cls.cosine(T)
        elif name == "sigmoid":
            # diffusers' "sigmoid" is a logistic curve in β; that of `Schedule.sigmoid` is in ᾱ.
            schedule = cls.from_betas(_logistic(np.linspace(-6, 6, T)) * (end - start) + start)
        else:
            raise ValueError(
                "beta_schedule: expected linear, scaled_linear, squaredcos_cap_v2 or sigmoid, "
                f"got {name!r}"
            )
        return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    @classmethod
    def _from_curve(cls, curve: np.ndarray, max_beta: float) -> Schedule:
        check_number("max_beta", max_beta, 0.0, 1.0, open_low=True)
        return cls.from_betas(np.minimum(1.0 - curve[1:] / curve[:-1], max_beta))

    def zero_terminal_snr(self) -> Schedule:
        """Shift and scale √ᾱ so that ᾱ_{T−1} = 0 and ᾱ_0 stays (arXiv 2305.08891, algorithm 1)."""
        if self.T < 2:
            raise ValueError("zero_terminal_snr: expected a schedule with T >= 2, got T = 1")
        root = elementary.sqrt(self.alphas_cumprod)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return Schedule(root * root)

    def add_noise(
        self,
        x_0: Tensor,
        t: int | Tensor,
        noise: Tensor | None = None,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        sample_offset: int = 0,
    ) -> Tensor:
        """Draw x_t from the marginal q(x_t | x_0) = N(√ᾱ_t·x_0, (1 − ᾱ_t)·I).

        Args:
            x_0: clean data `[B, …]`, floating point.
            t: timestep in [0, T), a number or an integer tensor `[B]`.
            noise: standard normal noise shaped like `x_0`. By default the latents of `seed`, which
                are the `x_T` that `sample(seed=seed, sample_offset=sample_offset)` starts from.
            seed: as in `fastddim.sample`; by default a fresh one.

        Returns:
            x_t, with the shape, dtype and device of `x_0`.

        Raises:
            TypeError: `x_0` is not floating point or `t` is not an integer.
            ValueError: `t` is out of range, or a shape does not fit.
        """
        from fastddim.philox import initial_latents

        check_state("x_0", x_0)
        index = check_timestep("t", t, x_0.shape[0], self.T)
        if noise is None:
            noise = initial_latents(
                x_0.shape, seed, sample_offset=sample_offset, dtype=x_0.dtype, device=x_0.device
            )
        else:
            check_noise("noise", noise, x_0)
        dtype = torch.float64 if x_0.dtype == torch.float64 else torch.float32
        shape = (-1,) + (1,) * (x_0.ndim - 1)
        a = self.alphas_cumprod[index].reshape(shape)
        signal, sigma = (elementary.sqrt(v).to(x_0.device, dtype) for v in (a, 1 - a))
        return (signal * x_0.to(dtype) + sigma * noise.to(dtype)).to(x_0.dtype)


def _logistic(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1.0 / (1.0 + elementary.exp(-values))
    return result


def _length(T: int) -> int:
    return check_int("T", T, 1, 2**31)


def _beta_range(beta_start: float, beta_end: float) -> tuple[float, float]:
    return (
        check_number("beta_start", beta_start, 0.0, 1.0, open_low=True),
        check_number("beta_end", beta_end, 0.0, 1.0, open_low=True),
    )


def _vector(name: str, values: Tensor | Sequence[float] | np.ndarray) -> Tensor:
    try:
        # NumPy converts Python floats, which torch would round to float32.
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, float))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a vector of numbers, got {values!r}") from error
    tensor = tensor.detach().to("cpu", torch.float64).clone()
    if tensor.ndim != 1 or tensor.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty vector [T], got shape {tuple(tensor.shape)}"
        )
    return tensor


def _validated(alphas_cumprod: Tensor) -> Tensor:
    values = _vector("alphas_cumprod", alphas_cumprod)
    bad = ~((values >= 0) & (values < 1))
    if bad.any():
        t = int(bad.nonzero()[0])
        raise ValueError(
            "alphas_cumprod: expected values in [0, 1), "
            f"got alphas_cumprod[{t}] = {values[t].item()}"
        )
    rising = values[1:] >= values[:-1]
    if rising.any():
        t = int(rising.nonzero()[0]) + 1
        raise ValueError(
            "alphas_cumprod: expected strictly decreasing values, got "
            f"alphas_cumprod[{t}] = {values[t].item()} after {values[t - 1].item()}"
        )
    return values
