"""The memory that sampling holds, counted in bytes alive, which does not grow with calls."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastddim

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model
from .support.probes import LiveStorage

SHAPE = (2, 3, 64, 64)
STATE = 4 * 2 * 3 * 64 * 64
# Counters, keys, timesteps, and the coefficient table of a few steps.
SMALL = 4096
CALLS = 1000


class Model(nn.Module):
    """A model that allocates only its output."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.scale


CASES = [
    (torch.float32, None, 0.0, 1.0),
    (torch.float32, 2.0, 2.0, 2.0),
    (torch.bfloat16, None, 0.5, 0.5),
    (torch.bfloat16, 2.0, 1.0, 1.0),
]


@pytest.mark.skipif("cpu" not in CPU_IMPLS, reason="the reference makes temporaries")
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "guidance_scale", "model_input", "output"), CASES)
class TestPeak:
    """Peaks in units of a state: the model's input is a tensor of its own under guidance or in
    another dtype.
    """

    def test_of_a_step(self, eta, dtype, guidance_scale, model_input, output):
        """A step allocates only what the model allocates."""
        loop = fastddim.Sampler(
            Model(dtype), 5, shape=SHAPE, eta=eta, guidance_scale=guidance_scale, impl="cpu"
        )._loop
        loop.counters.rewind()
        with torch.no_grad(), LiveStorage() as probe:
            loop.step.take(loop.counters.now, None)
        assert probe.peak == output * STATE

    def test_of_a_call(self, eta, dtype, guidance_scale, model_input, output):
        """A call holds the state, in which x_T is drawn, the predicted x_0, the model's input, and
        the larger of the model's output and the result.
        """
        model = Model(dtype)
        with LiveStorage() as probe:
            fastddim.sample(
                model, 5, shape=SHAPE, eta=eta, guidance_scale=guidance_scale, impl="cpu"
            )
        expected = (2 + model_input + max(output, 1)) * STATE
        assert expected <= probe.peak <= expected + SMALL

    def test_of_a_stream(self, eta, dtype, guidance_scale, model_input, output):
        """A stream of two slots, with four requests one after the other, holds the state, the
        model's input and output, and the results of half a state each that the caller keeps.
        """
        stream = fastddim.Stream(
            Model(dtype), shape=SHAPE, guided=guidance_scale is not None, max_steps=5, impl="cpu"
        )
        for _ in range(4):
            stream.submit(3, eta=eta, guidance_scale=guidance_scale)
        with LiveStorage() as probe:
            tickets = stream.run()
        assert len(tickets) == 4
        # LiveStorage sees buffers made before where an operator of torch's writes them.
        most = (1 + model_input + output + 4 / 2) * STATE + SMALL
        assert output * STATE < probe.peak <= most


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(v), Tensor) for v in gc.get_objects())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestGrowth:
    """The memory does not grow: one state kept per call would be CALLS tensors and CALLS·STATE / 4
    bytes, 25 MB.
    """

    SHAPE = (2, 3, 32, 32)

    def check(self, call):
        # Until what is remembered of earlier calls has its full size.
        for i in range(100):
            call(i)
        tensors, resident = live_tensors(), resident_bytes()
        for i in range(CALLS):
            call(i)
        assert live_tensors() <= tensors + 5
        assert resident_bytes() - resident < CALLS * STATE / 16

    @pytest.mark.parametrize("kind", [{"eta": 1.0}, {"order": 2}])
    def test_sampler(self, kind):
        sampler = fastddim.Sampler(elementwise_model, 2, shape=self.SHAPE, **kind)
        self.check(lambda i: sampler(seed=i))

    def test_sample(self):
        self.check(lambda i: fastddim.sample(elementwise_model, 1, shape=self.SHAPE, seed=i))

    def test_stream(self):
        """A stream with other plans and conditions at each request, some of them cancelled or
        failing, holds no more memory.
        """
        failing = False

        def model(x, t, shift):
            if failing:
                raise ValueError("boom")
            return elementwise_model(x, t) + shift

        stream = fastddim.Stream(model, shape=self.SHAPE)

        def request(i):
            nonlocal failing
            shift = torch.full((1, 1, 1, 1), i / CALLS)
            ticket = stream.submit(1 + i % 3, eta=i / CALLS, model_kwargs={"shift": shift})
            if i % 7 == 0:
                ticket.cancel()
            failing = i % 10 == 0
            stream.step()

        self.check(request)
        assert stream.pending + stream.running <= 2
