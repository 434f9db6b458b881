"""Numbers of the host on a device; tests/support/gpuless/capture.py shows that nothing waits."""

from __future__ import annotations

import math

import pytest
import torch

from fastddim import philox, transfer

from .support.probes import NoSync

CPU = torch.device("cpu")
VALUES = {
    torch.float32: [0.0, -0.0, 1.0, -2.5, 1e-45, 3.4e38, math.inf, -math.inf, math.nan, 1 / 3],
    torch.float64: [0.0, -0.0, 5e-324, 1.7e308, 1 / 3, math.nan],
    torch.int64: [0, -1, 2**63 - 1, -(2**63), 2**53 + 1],
}


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("columns", [1, 2])
def test_values_that_come_as_arguments(dtype, columns):
    values = torch.tensor(VALUES[dtype] * 2, dtype=dtype).view(-1, columns)
    for given in (values, values.t(), values[:0]):
        made = transfer._by_arguments(given, CPU)
        assert made.dtype == dtype
        assert torch.equal(bits(made), bits(given))


def test_arguments_are_not_copied():
    values = torch.arange(6.0).view(2, 3)
    with NoSync() as mode:
        made = transfer._by_arguments(values, torch.device("meta"))
    assert made.shape == values.shape
    assert mode.calls


def bits(values):
    return values.contiguous().view({4: torch.int32, 8: torch.int64}[values.element_size()])


@pytest.mark.parametrize("device", [None, "cpu", CPU])
@pytest.mark.parametrize("step_index", [0, 2**32 - 1, torch.tensor([7, 2**32 - 1, 0])])
@pytest.mark.parametrize(
    ("seed", "offset", "bits", "samples"),
    [
        (0, 0, [0] * 3, [0, 1, 2]),
        (2**63 - 1, 5, [2**63 - 1] * 3, [5, 6, 7]),
        (2**63, 2**32 - 3, [-(2**63)] * 3, [2**32 - 3, 2**32 - 2, 2**32 - 1]),
        (torch.tensor(9), 0, [9] * 3, [0, 1, 2]),
        ([2**64 - 1, 0, 2**63], 0, [-1, 0, -(2**63)], [0] * 3),
        (torch.tensor([3, -1, 4, -5])[::2].repeat(2)[:3], 0, [3, 4, 3], [0] * 3),
    ],
    ids=["zero", "signed", "unsigned", "0-dim", "list", "tensor"],
)
def test_keys(device, step_index, seed, offset, bits, samples):
    keys = philox.make_keys(seed, 3, sample_offset=offset, step_index=step_index, device=device)
    steps = step_index.tolist() if isinstance(step_index, torch.Tensor) else [step_index] * 3
    assert [key.tolist() for key in keys] == [bits, steps, samples]
    for key in keys:
        assert key.dtype == torch.int64
        assert key.is_contiguous()
        assert key.device == CPU


def test_keys_are_made_where_the_state_is():
    assert {key.device.type for key in philox.make_keys(3, 2, device="meta")} == {"meta"}
    with torch.device("meta"):
        assert {key.device.type for key in philox.make_keys(3, 2)} == {"cpu"}
