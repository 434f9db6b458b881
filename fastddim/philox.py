"""The noise specification: the float32 normal that each element gets at each step.

Noise is a pure function of (seed, step, sample, element), so it does not depend on batch size,
chunking, thread count or device. This module defines it in PyTorch integers and correctly rounded
float32 operations. Every compiled backend gives the same bits.

- Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
- Key: the 64-bit seed, low word first.
- Counter: (q, s, b, c) = (element // 4, step index, sample index, stream).
- A word r becomes u = r·2⁻³² + 2⁻³³ in float32, inside (0, 1]; words (0, 1) and (2, 3) become two
  normals each by Box–Muller: √(−2 ln u₀)·cos 2πu₁ and √(−2 ln u₀)·sin 2πu₁.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastddim import transfer
from fastddim.tracing import in_program
from fastddim.transfer import filled, upload
from fastddim.transforms import bare
from fastddim.validation import check_sample_range, check_seed, check_step_index, readable

LATENTS, STEP_NOISE = 0, 1
"""Streams: the last word of the counter, which separates initial latents from step noise."""

_CPU = torch.device("cpu")
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Minimax fits with float32 coefficients, lowest power first; largest error over the range of u:
# 1.41 ulp (ln), 0.88 ulp (sin, cos).
_LN = tuple(
    float.fromhex(c)
    for c in (
        "-0x1.fffffap-2",
        "0x1.5556f6p-2",
        "-0x1.0004cap-2",
        "0x1.98d22cp-3",
        "-0x1.53522ap-3",
        "0x1.3174c8p-3",
        "-0x1.25183ap-3",
        "0x1.6607fep-4",
    )
)
_LN_2 = float.fromhex("0x1.62e430p-1")
_SIN = tuple(
    float.fromhex(c)
    for c in ("-0x1.a32bd0p-23", "-0x1.4abbbap+5", "0x1.465eeap+6", "-0x1.2da156p+6")
)
_TWO_PI = float.fromhex("0x1.921fb6p+2")
_COS = tuple(
    float.fromhex(c)
    for c in ("0x1.0p+0", "-0x1.3bd3ccp+4", "0x1.03c1aep+6", "-0x1.55b146p+6", "0x1.d47d48p+5")
)
_SQRT_HALF_BITS = 0x3F3504F3


class Keys(NamedTuple):
    """The keys of the noise of a batch; each an int64 tensor `[B]` on the state's device.

    Attributes:
        seed: the 64 bits of the seed.
        step: the step's index in the plan, in [0, 2³²).
        sample: the sample's index, in [0, 2³²).
    """

    seed: Tensor
    step: Tensor
    sample: Tensor


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors holding unsigned 32-bit words, broadcastable against each other.
        key: two such tensors.

    Returns:
        Four int64 tensors holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """float32 u = r·2⁻³² + 2⁻³³ in (0, 1] of an unsigned 32-bit word, which is rounded to float32
    once.
    """
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def box_muller(u_0: Tensor, u_1: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two float32 uniforms in (0, 1]."""
    # Computed in float64, since torch's square root is not correctly rounded on every CPU: the root
    # of a float32 lies at least 4 ulp of float64 from where its rounding to float32 changes.
    radius = (ln(u_0) * -2.0).double().sqrt().to(torch.float32)
    sine, cosine = sincos_2pi(u_1)
    return radius * cosine, radius * sine


def ln(u: Tensor) -> Tensor:
    """float32 ln u for u in [2⁻³³, 1]: exactly 0 at 1 and negative below."""
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return _fma(exponent.to(torch.float32), _LN_2, _fma(f * f, _polynomial(_LN, f), f))


def sincos_2pi(u: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (sin 2πu, cos 2πu) for u in [0, 1]: reduced exactly to an eighth of a turn."""
    quarter = (u * 4.0 + 0.5).to(torch.int32)
    r = u - quarter.to(torch.float32) * 0.25
    square = r * r
    sine = _fma(r, _TWO_PI, r * _polynomial(_SIN, square))
    cosine = _polynomial(_COS, square)
    swapped = (quarter & 1) == 1
    sine, cosine = torch.where(swapped, cosine, sine), torch.where(swapped, sine, cosine)
    return (
        torch.where((quarter & 2) != 0, -sine, sine),
        torch.where(((quarter + 1) & 2) != 0, -cosine, cosine),
    )


def normal(keys: Keys, sample_shape: Sequence[int], stream: int) -> Tensor:
    """Standard normals of one stream.

    Args:
        keys: seed, step and sample index of each row, `[B]`.
        sample_shape: shape of one sample; its elements are counted in row-major order.
        stream: `LATENTS` or `STEP_NOISE`.

    Returns:
        float32 tensor `[B, *sample_shape]`, contiguous.

    Raises:
        ValueError: a sample has more than 2³⁴ elements, which the counter cannot hold.
    """
    count = math.prod(sample_shape)
    if count > 4 << 32:
        raise ValueError(f"shape: expected at most 2**34 elements a sample, got {count}")
    seed, step, sample = (k[:, None] for k in keys)
    quads = torch.arange((count + 3) // 4, device=seed.device)[None]
    stream_word = torch.full_like(seed, stream)
    words = philox4x32((quads, step, sample, stream_word), (seed & _WORD, (seed >> 32) & _WORD))
    u = [uniform(word) for word in words]
    z = torch.stack([*box_muller(u[0], u[1]), *box_muller(u[2], u[3])], dim=-1)
    return z.flatten(1)[:, :count].reshape(len(keys.seed), *sample_shape)


class Samples(NamedTuple):
    """The samples of a batch, by the numbers that key their noise.

    Attributes:
        seed: 64 bits as a signed integer; int64 `[B]` if each sample has its own seed; int64 `[]`
            for a seed from `fresh_seed` whose value is not known yet.
        first: index of the first sample, from which the others count; None if each sample has its
            own seed, and index 0.
    """

    seed: int | Tensor
    first: int | None


def fresh_seed(device: torch.device) -> int | Tensor:
    """A seed in [0, 2⁶³) from torch's default generator of the CPU, for noise on a device.

    `torch.manual_seed` determines the seed. Drawing it does not wait for the device.

    Returns:
        A number, or int64 `[]` if its value is not known yet: in a program, which draws a seed
        whenever it runs, under a transform of `torch.func`, whose rules of randomness apply, and
        in a mode of fake tensors.

    Raises:
        ValueError: a CUDA graph is being captured on the device. All its replays would have the
            noise of this one seed.
    """
    traced = in_program()
    if not traced:
        check_uncaptured(device)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return seed if traced or not readable(seed) else int(seed)


def check_uncaptured(device: torch.device) -> None:
    """Refuse a fresh seed while a CUDA graph is being captured on the device."""
    if transfer.captured(device):
        raise ValueError(
            "seed: expected an int, or an int64 tensor [B] to write to between replays, while a "
            "CUDA graph is being captured, since all replays would have the noise of one fresh "
            "seed, got None"
        )


def check_samples(
    seed: int | Sequence[int] | Tensor | None,
    batch: int,
    *,
    sample_offset: int = 0,
    device: torch.device = _CPU,
) -> Samples:
    """The `Samples` that the arguments of `make_keys` describe.

    Raises:
        TypeError, ValueError: see `make_keys`.
    """
    seeds = fresh_seed(device) if seed is None else check_seed("seed", seed, batch)
    per_sample = isinstance(seeds, Tensor) and seeds.ndim > 0
    check_sample_range(sample_offset, batch, per_sample_seed=per_sample)
    return Samples(seeds, None if per_sample else int(sample_offset))


def write_seed(seed: int | Tensor, keys: Keys) -> None:
    """Write the seed or seeds of `Samples` into keys, without waiting for their device."""
    if not isinstance(seed, Tensor):
        keys.seed.fill_(seed)
    elif seed.ndim == 0:
        keys.seed.copy_(_on_device(seed, len(keys.seed), keys.seed.device))
    else:
        transfer.write(seed.contiguous(), keys.seed)


def write_sample_indices(first: int | None, keys: Keys) -> None:
    """Write the sample indices of `Samples` into keys."""
    if first is None:
        keys.sample.zero_()
    elif len(keys.sample) == 1:
        # This takes half the time of `arange`, and happens at every tick of a robot.
        keys.sample.fill_(first)
    else:
        end = first + len(keys.sample)
        torch.arange(first, end, out=keys.sample, device=keys.sample.device)


def make_keys(
    seed: int | Sequence[int] | Tensor | None,
    batch: int,
    *,
    sample_offset: int = 0,
    step_index: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Keys:
    """Keys of a batch: one seed and consecutive sample indices, or a seed per sample and sample
    index 0.

    Args:
        seed: int in [0, 2⁶⁴), a sequence of `batch` such ints, or an int64 tensor `[batch]` read as
            unsigned bits; None for a `fresh_seed`.
        batch: number of samples.
        sample_offset: global index of the first sample; 0 if each sample has its own seed.
        step_index: index of the step in the plan, or an integer tensor `[batch]`.
        device: device of the keys, which is not waited for; by default the CPU.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """
    place = _CPU if device is None else torch.device(device)
    seeds, first = check_samples(seed, batch, sample_offset=sample_offset, device=place)
    steps = check_step_index("step_index", step_index, batch)
    samples = (
        filled(0, batch, place)
        if first is None
        else torch.arange(first, first + batch, dtype=torch.int64, device=place)
    )
    return Keys(_on_device(seeds, batch, place), _on_device(steps, batch, place), samples)


def _on_device(value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if value.ndim == 0 and bare(value):
            # The kernel of an addition takes the value as an argument; a copy does not.
            return filled(0, batch, device) + value
        return upload(value.expand(batch).contiguous(), device)
    return filled(value, batch, device)


def initial_latents(
    shape: Sequence[int],
    seed: int | Sequence[int] | Tensor | None = None,
    *,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """x_T ~ N(0, I) of shape `[B, …]`: the latents that `sample` starts from with these arguments.

    Raises:
        TypeError, ValueError: see `make_keys`.
    """
    keys = make_keys(seed, shape[0], sample_offset=sample_offset, device=device)
    return normal(keys, shape[1:], LATENTS).to(dtype)


def step_noise(
    shape: Sequence[int],
    step_index: int | Tensor,
    seed: int | Sequence[int] | Tensor | None = None,
    *,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """z of step `step_index` (from 0, in the order visited), shape `[B, …]`: the noise that the
    fused update adds.

    Raises:
        TypeError, ValueError: see `make_keys`.
    """
    keys = make_keys(
        seed, shape[0], sample_offset=sample_offset, step_index=step_index, device=device
    )
    return normal(keys, shape[1:], STEP_NOISE).to(dtype)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = _fma(value, x, c)
    return value


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """float32 a·b + c rounded once.

    The product is exact in float64. There the sum is rounded to odd (Boldo and Melquiond,
    "Emulation of a FMA and correctly rounded sums", 2008), so the rounding to float32 is the only
    one that counts.
    """
    product = a.double() * (b.double() if isinstance(b, Tensor) else b)
    addend = c.double() if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(torch.float64).to(torch.float32)
