"""The schedulers, given timesteps instead of their number."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim

from ..support.dropins.diffusers import CLASSES, DDIM, diffusers, ours
from ..support.models import elementwise_model

SHAPE = (2, 3, 4, 5)
VISITED = [981, 620, 333, 50, 7]


def scheduler_of(name: str = "DDIMScheduler", **config: Any) -> Any:
    config.setdefault("clip_sample", False)
    return getattr(ours, name).from_config(config)


def drawn(scheduler: Any, x: Tensor, **options: Any) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(elementwise_model(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("name", DDIM)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"prediction_type": "v_prediction"}, {"prediction": "v_prediction"}),
        ({"clip_sample": True}, {"clip": 1.0}),
    ],
    ids=["epsilon", "v", "clip"],
)
def test_they_give_what_sample_gives(
    name: str, eta: float, config: dict[str, Any], options: dict[str, Any]
) -> None:
    scheduler, x_T = scheduler_of(name, **config), torch.randn(SHAPE)
    scheduler.set_noise("philox", seed=4)
    expected = fastddim.sample(
        elementwise_model,
        VISITED,
        x_T=x_T,
        eta=eta,
        seed=4,
        schedule=fastddim.Schedule.from_diffusers(scheduler),
        **options,
    )
    for timesteps in (VISITED, np.array(VISITED), torch.tensor(VISITED)):
        scheduler.set_timesteps(timesteps=timesteps)
        assert scheduler.timesteps.tolist() == VISITED
        assert scheduler.num_inference_steps == len(VISITED)
        torch.testing.assert_close(drawn(scheduler, x_T, eta=eta), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DDIM)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("one", [True, False])
def test_those_of_a_number_are_the_steps_of_that_number(name: str, eta: float, one: bool) -> None:
    scheduler, x = scheduler_of(name, set_alpha_to_one=one), torch.randn(SHAPE)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    expected = drawn(scheduler, x, eta=eta)
    scheduler.set_timesteps(timesteps=scheduler.timesteps)
    torch.manual_seed(0)
    assert torch.equal(drawn(scheduler, x, eta=eta), expected)


def test_a_number_follows_timesteps() -> None:
    scheduler, x = scheduler_of(), torch.randn(SHAPE)
    scheduler.set_timesteps(5)
    expected = drawn(scheduler, x)
    scheduler.set_timesteps(timesteps=VISITED)
    assert not torch.equal(drawn(scheduler, x), expected)
    scheduler.set_timesteps(5)
    assert torch.equal(drawn(scheduler, x), expected)


def test_the_inverse_goes_back() -> None:
    """The inverse ends where it has begun, with the same ε at both ends of each step."""
    inverse, forward = scheduler_of("DDIMInverseScheduler"), scheduler_of()
    x, m = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    inverse.set_timesteps(timesteps=VISITED[::-1])
    forward.set_timesteps(timesteps=VISITED)
    encoded = x
    for t in inverse.timesteps:
        encoded = inverse.step(m, t, encoded).prev_sample
    decoded = encoded
    for t in forward.timesteps:
        decoded = forward.step(m, t, decoded).prev_sample
    assert (encoded - x).abs().max() > 0.5
    torch.testing.assert_close(decoded, x, rtol=0, atol=1e-4)


def test_inverse_timesteps_of_a_number_are_the_steps_of_that_number() -> None:
    scheduler, x = scheduler_of("DDIMInverseScheduler"), torch.randn(SHAPE)
    scheduler.set_timesteps(10)
    expected = drawn(scheduler, x)
    scheduler.set_timesteps(timesteps=scheduler.timesteps)
    torch.testing.assert_close(drawn(scheduler, x), expected, rtol=0, atol=0)


def test_many_timesteps_at_once() -> None:
    scheduler, x = scheduler_of("DDIMParallelScheduler"), torch.randn(SHAPE)
    scheduler.set_timesteps(timesteps=VISITED)
    together = scheduler.batch_step_no_noise(x, torch.tensor([620, 7]), x)
    for i, t in enumerate((620, 7)):
        alone = scheduler.step(x[i : i + 1], t, x[i : i + 1]).prev_sample
        assert torch.equal(together[i : i + 1], alone)
    assert scheduler.batch_step_no_noise(x, torch.tensor([620, 8]), x)[1].isnan().all()


@pytest.mark.parametrize("name", CLASSES)
def test_copies_and_pickles_have_them(name: str) -> None:
    scheduler, x = scheduler_of(name), torch.randn(SHAPE)
    visited = VISITED[::-1] if name == "DDIMInverseScheduler" else VISITED
    scheduler.set_timesteps(timesteps=visited)
    torch.manual_seed(0)
    expected = drawn(scheduler, x)
    for copied in (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        torch.manual_seed(0)
        assert torch.equal(drawn(copied(scheduler), x), expected)


def test_on_a_device_their_values_are_known() -> None:
    """The values of timesteps on a device are known. "meta" stands in for a device: reading a
    tensor there fails.
    """
    scheduler = scheduler_of()
    scheduler.set_timesteps(timesteps=VISITED, device="meta")
    x = torch.zeros(SHAPE, device="meta")
    for t in scheduler.timesteps:
        assert scheduler.step(x, t, x).prev_sample.shape == SHAPE


def test_in_graphs() -> None:
    scheduler, x = scheduler_of(), torch.randn(SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: scheduler.step(x.tanh(), 620, x, return_dict=False)[0],
        backend="eager",
        fullgraph=True,
    )
    for timesteps in (VISITED, [620, 10, 9, 8, 7], [700, 620]):
        scheduler.set_timesteps(timesteps=timesteps)
        expected = scheduler.step(x.tanh(), 620, x).prev_sample
        assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CLASSES)
def test_pipelines_find_the_argument(name: str) -> None:
    assert "timesteps" in inspect.signature(getattr(ours, name).set_timesteps).parameters


class TestErrors:
    @pytest.mark.parametrize(
        ("timesteps", "message"),
        [
            ([], r"^timesteps: expected one or more, got none"),
            ([3, 5], r"^timesteps: expected decreasing ones, got 3 and then 5 at 1"),
            ([5, 5], r"^timesteps: expected decreasing ones, got 5 and then 5 at 1"),
            ([1000, 5], r"^timesteps\[0\]: expected a timestep in \[0, 1000\), got 1000"),
            ([5, -1], r"^timesteps\[1\]: expected a timestep in \[0, 1000\), got -1"),
        ],
    )
    def test_values(self, timesteps: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            scheduler_of().set_timesteps(timesteps=timesteps)

    def test_of_the_inverse(self) -> None:
        with pytest.raises(ValueError, match=r"^timesteps: expected increasing ones, got 5 and"):
            scheduler_of("DDIMInverseScheduler").set_timesteps(timesteps=[5, 3])

    @pytest.mark.parametrize("value", [0.5, True, "3", None])
    def test_no_integers(self, value: Any) -> None:
        with pytest.raises((TypeError, IndexError), match=r"^timesteps\[1\]: expected an integer"):
            scheduler_of().set_timesteps(timesteps=[5, value])

    @pytest.mark.parametrize("name", CLASSES[:3])
    def test_one_of_both(self, name: str) -> None:
        message = r"^num_inference_steps, timesteps: expected one of them, got "
        with pytest.raises(ValueError, match=message + "both"):
            scheduler_of(name).set_timesteps(5, timesteps=[1])
        with pytest.raises(ValueError, match=message + "neither"):
            scheduler_of(name).set_timesteps()

    @pytest.mark.parametrize("name", CLASSES[:3])
    def test_a_timestep_that_is_none_of_them(self, name: str) -> None:
        scheduler, x = scheduler_of(name), torch.randn(SHAPE)
        scheduler.set_timesteps(timesteps=[3])
        for t in (4, torch.tensor(4), -997):
            with pytest.raises(IndexError, match=r"^timestep: expected one of the timesteps that"):
                scheduler.step(x, t, x)

    @pytest.mark.parametrize("name", CLASSES[:3])
    def test_steps_of_diffusers(self, name: str) -> None:
        scheduler, x = scheduler_of(name), torch.randn(SHAPE)
        scheduler.set_timesteps(timesteps=[50])
        with pytest.raises(ValueError, match=r"^timesteps: .*for a case that the kernel does not"):
            scheduler.step(x, 50, x[:1])

    def test_overridden_methods(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        scheduler._get_variance = lambda *_: torch.tensor(0.01)
        scheduler.set_timesteps(timesteps=VISITED)
        with pytest.raises(ValueError, match=r"^timesteps: .*diffusers' own of _get_variance"):
            scheduler.step(x, 50, x, 1.0)


def test_diffusers_refuses_them_still() -> None:
    """diffusers still refuses these timesteps; if it takes them, ours have to be compared."""
    assert "timesteps" not in inspect.signature(diffusers.DDIMScheduler.set_timesteps).parameters
