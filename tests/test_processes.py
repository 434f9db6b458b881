"""Samplers and streams that are made in one process and draw in another."""

from __future__ import annotations

from pathlib import Path

import pytest

from .support.environment import RunPython

MODEL = """

import torch
from torch import nn

import fastddim

SHAPE = (2, 3, 64, 64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3, generator=generator) / 5)

    def forward(self, x, t):
        return torch.tanh(nn.functional.conv2d(x, self.weight, padding=1) + t[0] / 1000)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.sampler = fastddim.Sampler(self.net, 3, shape=SHAPE, eta=1.0)
        self.stream = fastddim.Stream(self.net, shape=SHAPE, max_steps=3)


def draw(policy, seed):
    ticket = policy.stream.submit(3, seed=seed)
    policy.stream.run()
    return policy.sampler(seed=seed), ticket.result(0)


def equal(pair, other):
    return all(map(torch.equal, pair, other))
"""

WORKERS = """
import torch.multiprocessing as multiprocessing
from model import Policy, draw, equal

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        policy = Policy()
        # What has drawn already is sent as well.
        before = draw(policy, 1)
        with multiprocessing.get_context(method).Pool(1) as pool:
            drawn = pool.apply(draw, (policy, 1))
            assert equal(drawn, before), method
            assert equal(pool.apply(draw, (policy, 2)), draw(policy, 2)), method
            try:
                pool.apply(draw, (policy.stream.submit(3), 1))
            except TypeError as error:
                assert "Ticket: expected to stay where its stream is" in str(error)
            else:
                raise AssertionError("a ticket was sent")
"""

FORK = """
import os
from model import Policy, draw, equal
import torch

torch.set_num_threads(2)
policy = Policy()
before = draw(policy, 1)
child = os.fork()
if not child:
    # As for all of PyTorch: the threads of the parent are not there.
    torch.set_num_threads(1)
    os._exit(0 if equal(draw(policy, 1), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert equal(draw(policy, 1), before)
"""

SAVE = """
from model import Policy, draw
import torch

policy = Policy()
torch.save(policy, "policy.pt")
torch.save(draw(policy, 1), "drawn.pt")
"""

LOAD = """
import torch
from model import draw, equal

policy = torch.load("policy.pt", weights_only=False)
assert equal(draw(policy, 1), torch.load("drawn.pt"))
"""


@pytest.mark.parametrize(
    "scripts", [[WORKERS], [FORK], [SAVE, LOAD]], ids=["workers", "fork", "file"]
)
def test_a_sampler_draws_the_same_in_another_process(
    scripts: list[str], run_python: RunPython, tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    for i, script in enumerate(scripts):
        path = tmp_path / f"script_{i}.py"
        path.write_text(script)
        result = run_python(path, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
