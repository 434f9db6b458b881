"""Chunks that are guided to the last one under a limit of x_0: every step is the formula's."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import fastddim
from fastddim import philox

SHAPE = (2, 8, 3)
SCHEDULE = fastddim.Schedule.cosine(100)


def network(x, t):
    """A network with ε of data from N(0, 4·I): linear, so that the effect of guidance is known."""
    a = SCHEDULE.alphas_cumprod.to(x.dtype)[t][:, None, None]
    return (1 - a).sqrt() / (4 * a + 1 - a) * x


def action_sampler(**options):
    return fastddim.ActionSampler(network, 6, shape=SHAPE, schedule=SCHEDULE, **options)


def written_out(last, latents, *, clip, weight, executed, frozen):
    """The second tick in float64: each step predicts x_0, guides it, limits it, and derives ε."""
    horizon = SHAPE[1]
    left, end = horizon - executed, last[:, -1:].expand(-1, executed, -1)
    old = torch.cat([last[:, executed:], end], dim=1)
    c = [min(max((left - i) / (left - frozen + 1), 0), 1) for i in range(horizon)]
    w = torch.tensor([v * math.expm1(v) / math.expm1(1) for v in c], dtype=torch.float64)[:, None]
    plan = fastddim.select_timesteps(SCHEDULE.T, 6).tolist()
    levels = [*SCHEDULE.alphas_cumprod[plan].tolist(), 1.0]
    x = latents
    for a, p in pairwise(levels):
        signal, sigma = math.sqrt(a), math.sqrt(1 - a)
        slope = 4 * signal / (4 * a + 1 - a)  # of x_0, which is the posterior mean
        x_0 = slope * x
        x_0 = x_0 + min(weight * sigma, 1 / signal) * slope * w * (old - x_0)
        if clip is not None:
            x_0 = x_0.clamp(-clip, clip)
        x = math.sqrt(p) * x_0 + math.sqrt(1 - p) * (x - signal * x_0) / sigma
        x[:, :frozen] = (math.sqrt(p) * old + math.sqrt(1 - p) * latents)[:, :frozen]
    return x


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_guided_chunk_is_what_the_formula_says(clip):
    """A guided chunk is the formula's, also with a limit of x_0, which it exceeds in the early
    steps.
    """
    weight = 40.0
    options = {"max_guidance_weight": weight, "dtype": torch.float64, "seed": 3}
    sampler = action_sampler(chunking="guide", clip=clip, **options)
    last = 0.4 * philox.initial_latents(SHAPE, seed=0, dtype=torch.float64).clamp(-1, 1)
    sampler.restore(1, last)
    drawn = sampler(executed=2, frozen=3)
    latents = philox.initial_latents(SHAPE, seed=3, sample_offset=SHAPE[0], dtype=torch.float64)
    expected = written_out(last, latents, clip=clip, weight=weight, executed=2, frozen=3)
    torch.testing.assert_close(drawn, expected, rtol=1e-11, atol=1e-11)


def test_a_stream_derives_epsilon_as_a_sampler_does():
    """A stream derives epsilon as a sampler does, in its first chunks, which are not guided, as
    well as in guided ones.
    """
    options = {"chunking": "guide", "clip": 0.5, "max_guidance_weight": 40.0, "seed": 3}
    sampler = action_sampler(**options)
    stream = fastddim.ActionStream(network, 6, shape=SHAPE, schedule=SCHEDULE, **options)
    for _ in range(3):
        chunk = sampler(executed=2, frozen=3)
        tickets = [stream.submit(e, executed=2, frozen=3) for e in range(SHAPE[0])]
        stream.run()
        assert torch.equal(torch.stack([ticket.result() for ticket in tickets]), chunk)
