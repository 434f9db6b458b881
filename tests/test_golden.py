"""Tables and noise have the bits of `tests/data/golden.json`, whatever the CPU and torch."""

from __future__ import annotations

import json

import pytest
import torch

from .support import golden
from .support.environment import CPU_IMPLS
from .support.probes import OtherProcessor

GOLDEN = json.loads(golden.GOLDEN.read_text())


def test_this_processor() -> None:
    assert golden.digests() == GOLDEN


def test_another_processor() -> None:
    with OtherProcessor(shortest=1) as other:
        assert golden.digests() == GOLDEN
    # The noise of the reference takes torch's root in float64, and rounds it to float32.
    assert other.calls > 0


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_noise(impl: str) -> None:
    assert golden.digest(golden.noise(impl)) == GOLDEN["noise"]


def test_a_digest_sees_the_last_bit() -> None:
    values = torch.rand(5, dtype=torch.float64)
    other = values.clone()
    other[3] = torch.nextafter(values[3], torch.tensor(2.0, dtype=torch.float64))
    assert golden.digest(iter([values])) == golden.digest(iter([values.clone()]))
    assert golden.digest(iter([values])) != golden.digest(iter([other]))
    assert golden.digest(iter([values])) != golden.digest(iter([values[:4], values[4:]]))
