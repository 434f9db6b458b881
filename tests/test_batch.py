"""A shape without B is refused if the model tells its samples, and otherwise named in its error."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim

SAMPLE = (3, 4, 4)
X = torch.zeros(SAMPLE)


class Network(nn.Module):
    """A network that needs B, as blocks with an embedding of t do."""

    def __init__(self, **told: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        vars(self).update(told)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.conv(x) * t[:, None, None, None], x])[: len(x)]


def telling() -> nn.Module:
    return Network(sample_shape=SAMPLE, schedule=fastddim.Schedule.linear()).eval()


def silent() -> nn.Module:
    return Network(schedule=fastddim.Schedule.linear()).eval()


CALLS: dict[str, Any] = {
    "sample": lambda net, shape, out: fastddim.sample(net, 2, shape=shape),
    "Sampler": lambda net, shape, out: fastddim.Sampler(net, 2, shape=shape),
    "Stream": lambda net, shape, out: fastddim.Stream(net, shape=shape),
    "generate": lambda net, shape, out: fastddim.generate(net, 2, out / "run", stop=2, shape=shape),
    "tune": lambda net, shape, out: fastddim.tune(net, 2, shape=shape, progress=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("shape", [SAMPLE, (3, 8, 8)], ids=["the model's", "another"])
def test_a_shape_of_one_sample_is_refused(call: Any, shape: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^shape: ") as caught:
        call(telling(), shape, tmp_path)
    assert str(caught.value) == (
        f"shape: expected (B, 3, 4, 4), got {shape}, which is one sample; "
        f"for one write shape={(1, *shape)}"
    )


def test_a_tensor_of_one_sample_is_refused() -> None:
    one = r"expected \(B, 3, 4, 4\), got \(3, 4, 4\), which is one sample; for one write "
    with pytest.raises(ValueError, match=rf"^x_T: {one}x_T\[None\]$"):
        fastddim.sample(telling(), 2, x_T=X)
    with pytest.raises(ValueError, match=rf"^x_0: {one}x_0\[None\]$"):
        fastddim.invert(telling(), X, 2)
    for x in (X[None], X[None, 0]):
        assert fastddim.sample(lambda x, t: x, 2, x_T=x).shape == x.shape


def test_a_config_is_compared_with_the_shape_itself() -> None:
    """A config is compared with the shape itself: networks of diffusers for audio have a
    `sample_size` of one dimension too.
    """
    net = Network(config={"in_channels": 3, "sample_size": 4}).eval()
    net.schedule = fastddim.Schedule.linear()
    with pytest.raises(ValueError, match=r"got \(3, 4, 4\), which is one sample"):
        fastddim.sample(net, 2, shape=SAMPLE)

    class Audio(nn.Module):
        config = MappingProxyType({"in_channels": 2, "sample_size": 16})
        schedule = fastddim.Schedule.linear()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * 0.5

    assert fastddim.sample(Audio().eval(), 2, shape=(4, 2, 16)).shape == (4, 2, 16)


@pytest.mark.parametrize(
    "run",
    [
        lambda net: fastddim.sample(net, 2, shape=SAMPLE),
        lambda net: fastddim.sample(lambda x, t: 2 * net(x, t), 2, shape=SAMPLE),
        lambda net: fastddim.sample(net, 2, x_T=X),
        lambda net: fastddim.invert(net, X, 2),
        lambda net: fastddim.Sampler(net, 2, shape=SAMPLE)(),
    ],
    ids=["sample", "a function", "x_T", "invert", "Sampler"],
)
def test_the_error_of_a_silent_model_says_what_a_batch_is(run: Any) -> None:
    with pytest.raises(RuntimeError, match="same number of dimensions") as caught:
        run(silent())
    assert str(caught.value).endswith(
        "\nshape: got (3, 4, 4), where the convolutions of the model take 4 dimensions; "
        "a batch of one sample is (1, 3, 4, 4)"
    )
    assert type(caught.value) is type(caught.value.__cause__) is RuntimeError


def test_requests_of_a_stream_say_it_too() -> None:
    stream = fastddim.Stream(silent(), shape=SAMPLE)
    ticket = stream.submit(2)
    stream.run()
    assert "a batch of one sample is (1, 3, 4, 4)" in str(ticket.exception())


class Policy(nn.Module):
    """Actions [B, T, D] given a picture, whose convolutions say nothing of the actions' shape."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.encoder, self.error = nn.Conv2d(1, 1, 3), error

    def forward(self, actions: Tensor, t: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return actions * self.encoder(torch.ones(1, 1, 3, 3)).detach().reshape(1, 1, 1)


class RobotError(RuntimeError):
    """An error that the caller handles."""


def test_convolutions_refuse_nothing() -> None:
    shape = (1, 16, 7)
    policy = Policy().eval()
    assert fastddim.sample(policy, 2, shape=shape).shape == shape
    with pytest.raises(RobotError, match=r"^stuck$") as caught:
        fastddim.sample(Policy(RobotError("stuck")).eval(), 2, shape=shape)
    assert caught.value.__cause__ is None
    # A batch has the convolutions' dimensions: another error is left as it is.
    with pytest.raises(ValueError, match=r"^other$"):
        fastddim.sample(Policy(ValueError("other")).eval(), 2, shape=(1, 1, 16, 7))
