"""The other tests rely on these: an output that a kernel leaves unwritten must show."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uninitialised_floats_are_nan(dtype):
    like = torch.zeros(5, dtype=dtype)
    for tensor in (
        torch.empty(5, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((5,), (2,), dtype=dtype),
        like.new_empty(5),
        like.new_empty_strided((5,), (2,)),
    ):
        assert tensor.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_uninitialised_integers_are_the_largest(dtype):
    assert (torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all()


def test_seeds():
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
