"""`ActionSampler`: chunks planned from the last one, against code that a user writes by
hand.

Guided chunks are compared with Jacobians, and live with LeRobot's real-time chunking.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import fastddim
from fastddim import ActionSampler, Sampler, Schedule
from fastddim.actions.chunking import LAST, guided
from fastddim.actions.chunks import Chunks

from .support.dropins.rtc import lerobot_rtc
from .support.environment import CPU_IMPLS
from .support.recorded_graph import RecordedGraph, recorded_graphs

S, W = 5, 2
SHAPE = B, H, A = (2, 6, 3)
# Far enough from ᾱ = 0 that a network which is not trained keeps to small numbers.
SCHEDULE = Schedule.from_alphas_cumprod(torch.linspace(0.99, 0.02, 100, dtype=torch.float64))
SEED = 7
TICKS = 4
EXECUTED, FROZEN = [2, 1], [3, 0]


class Net(nn.Module):
    """A network in which every action depends on every other, on t and on the observation."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(H * A, H * A, generator=generator, dtype=torch.float64) / 5
        self.weight = nn.Parameter(weight.to(dtype))
        self.eval()

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        time = torch.cos(t.to(x.dtype) / 40)[:, None]
        return torch.tanh(x.flatten(1) @ self.weight + obs + time).view(x.shape)


def observed(tick: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"model_kwargs": {"obs": torch.tensor([[0.1], [-0.2]], dtype=dtype) * (tick + 1)}}


def made(network: Any = None, steps: Any = S, **kind: Any) -> ActionSampler:
    dtype = kind.get("dtype", torch.float32)
    given = {"shape": SHAPE, "schedule": SCHEDULE, "seed": SEED, **observed(0, dtype), **kind}
    return ActionSampler(Net(dtype) if network is None else network, steps, **given)


def ticks(
    sampler: ActionSampler,
    count: int = TICKS,
    *,
    executed: Any = EXECUTED,
    frozen: Any = FROZEN,
    **call: Any,
) -> list[Tensor]:
    return [
        sampler(**observed(sampler.tick, sampler.dtype), executed=executed, frozen=frozen, **call)
        for _ in range(count)
    ]


def moved_on(chunk: Tensor, executed: list[int]) -> Tensor:
    """The rest of each environment's chunk, its last action repeated."""
    rows = [
        torch.cat([row[done:], row[-1:].expand(done, -1)])
        for row, done in zip(chunk, executed, strict=True)
    ]
    return torch.stack(rows)


def frozen_mask(frozen: list[int]) -> Tensor:
    return (torch.arange(H) < torch.tensor(frozen)[:, None])[:, :, None]


def by_hand(chunking: str | None, warm_start: int | None, **kind: Any) -> list[Tensor]:
    """The chunks by a `Sampler`, `add_noise` and their arguments."""
    dtype = kind.get("dtype", torch.float32)
    given = {"shape": SHAPE, "schedule": SCHEDULE, **observed(0, dtype), **kind}
    sampler = Sampler(Net(dtype), S, **given)
    chunks: list[Tensor] = []
    for tick in range(TICKS):
        call = {**observed(tick, dtype), "seed": SEED, "sample_offset": tick * B}
        if chunks:
            known = moved_on(chunks[-1], EXECUTED)
            if warm_start is not None:
                first = S - warm_start
                at = int(sampler.plan.timesteps[first])
                x_T = SCHEDULE.add_noise(known, at, seed=SEED, sample_offset=tick * B)
                call |= {"x_T": x_T, "first_step": first}
            if chunking is not None:
                call |= {"mask": frozen_mask(FROZEN), "known": known}
        chunks.append(sampler(**call))
    return chunks


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"eta": 1.0, "clip": 0.7},
    "float64": {"dtype": torch.float64, "prediction": "sample"},
    "bfloat16": {"dtype": torch.bfloat16},
    "order 2": {"order": 2},
}
MODES = [(None, None), (None, W), ("freeze", None), ("freeze", W)]
# Warm starts are of order 1. The reference, which is slow, stands for other backends with one kind.
CASES = [
    pytest.param(
        KINDS[name], chunking, warm_start, impl, id=f"{name}-{chunking}-{warm_start}-{impl}"
    )
    for impl in CPU_IMPLS
    for name in (KINDS if impl == CPU_IMPLS[0] else ["noise"])
    for chunking, warm_start in MODES
    if not (warm_start and name == "order 2")
]


class TestByHand:
    @pytest.mark.parametrize(("kind", "chunking", "warm_start", "impl"), CASES)
    def test_equals(self, kind: Any, chunking: Any, warm_start: Any, impl: str) -> None:
        own = ticks(made(chunking=chunking, warm_start=warm_start, impl=impl, **kind))
        expected = by_hand(chunking, warm_start, impl=impl, **kind)
        dtype = kind.get("dtype", torch.float32)
        for got, want in zip(own, expected, strict=True):
            # The update may round a product and a sum at once.
            atol = 8 * torch.finfo(dtype).eps * float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=0, atol=atol)
        assert (own[-1] - own[-2]).abs().max() > 0.01

    def test_numbers_for_all_environments(self) -> None:
        for one, each in ((1, [1, 1]), (np.int64(2), torch.tensor([2, 2]))):
            kind: dict[str, Any] = {"chunking": "freeze", "warm_start": W}
            own, expected = (ticks(made(**kind), executed=n, frozen=n) for n in (one, each))
            for got, want in zip(own, expected, strict=True):
                assert torch.equal(got, want)

    def test_numbers_that_change(self) -> None:
        """Numbers may change from tick to tick, and back."""
        sampler, last = made(chunking="freeze"), None
        for executed, frozen in ((1, 2), (1, 2), (3, 3), (1, 5), (H, 0), (1, 2)):
            chunk = sampler(executed=executed, frozen=frozen)
            if last is not None:
                kept = last[:, executed : executed + frozen]
                assert torch.equal(chunk[:, :frozen], kept)
                assert not torch.equal(chunk[:, frozen], moved_on(last, [executed] * B)[:, frozen])
            last = chunk


class TestTicks:
    def test_noise_by_the_tick(self) -> None:
        """Without anything to take over, tick k is the samples from k·B on."""
        sampler = Sampler(Net(), S, shape=SHAPE, schedule=SCHEDULE, **observed(0))
        for tick, chunk in enumerate(ticks(made())):
            expected = sampler(**observed(tick), seed=SEED, sample_offset=tick * B)
            assert torch.equal(chunk, expected)

    @pytest.mark.parametrize("chunking", [None, "freeze", "guide"])
    def test_an_episode_ends(self, chunking: Any) -> None:
        """The chunk after the end of an episode is drawn from noise; the number of the tick goes
        on.
        """
        sampler, plain = made(chunking=chunking, warm_start=W), made()
        ticks(sampler, 2)
        sampler.reset()
        assert sampler.tick == 2
        plain.restore(2)
        assert torch.equal(ticks(sampler, 1)[0], ticks(plain, 1)[0])
        plain.restore(3)
        assert not torch.equal(ticks(sampler, 1)[0], ticks(plain, 1)[0])

    def test_a_tick_that_fails_is_none(self) -> None:
        failing = False

        def network(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
            if failing and t[0] < 50:
                raise ArithmeticError
            return Net.forward(net, x, t, obs)

        net = Net()
        sampler, expected = made(network, chunking="freeze"), ticks(made(chunking="freeze"))
        assert torch.equal(ticks(sampler, 1)[0], expected[0])
        failing = True
        out = torch.ones(SHAPE)
        with pytest.raises(ArithmeticError):
            ticks(sampler, 1, out=out)
        assert torch.equal(out, torch.ones(SHAPE))
        with pytest.raises(ValueError, match="frozen"):
            sampler(frozen=9)
        failing = False
        for own, want in zip(ticks(sampler, TICKS - 1), expected[1:], strict=True):
            assert torch.equal(own, want)

    @pytest.mark.parametrize("chunking", [None, "guide"])
    def test_out_is_the_callers(self, chunking: Any) -> None:
        sampler, out = made(chunking=chunking), torch.empty(SHAPE)
        for want in ticks(made(chunking=chunking)):
            (own,) = ticks(sampler, 1, out=out)
            assert own is out
            assert torch.equal(out, want)
            out.fill_(torch.nan)
        (chunk,) = ticks(sampler, 1)
        assert chunk.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()

    def test_go_on_from_a_chunk(self) -> None:
        whole = ticks(made(chunking="guide", warm_start=W))
        for at in range(1, TICKS):
            sampler = made(chunking="guide", warm_start=W)
            sampler.restore(at, whole[at - 1])
            for own, want in zip(ticks(sampler, TICKS - at), whole[at:], strict=True):
                assert torch.equal(own, want)

    def test_prepare_changes_nothing(self) -> None:
        sampler, other = (made(chunking="guide", warm_start=W) for _ in range(2))
        sampler.prepare()
        assert sampler.tick == 0
        for own, want in zip(ticks(sampler), ticks(other), strict=True):
            assert torch.equal(own, want)

    @pytest.mark.parametrize("chunking", [None, "freeze", "guide"])
    def test_in_every_mode_of_the_caller(self, chunking: Any) -> None:
        kind: dict[str, Any] = {"chunking": chunking, "warm_start": W}
        expected = ticks(made(**kind))
        with torch.inference_mode():
            inside, out = made(Net(), **kind) if chunking != "guide" else None, torch.empty(SHAPE)
        sampler = inside or made(**kind)
        with torch.inference_mode():
            assert torch.equal(ticks(sampler, 1, out=out)[0], expected[0])
        with torch.no_grad():
            assert torch.equal(ticks(sampler, 1)[0], expected[1])
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(ticks, sampler, 1).result()[0], expected[2])
        last = ticks(sampler, 1)[0]
        assert torch.equal(last, expected[3])
        assert not last.requires_grad
        assert not last.is_inference()

    @pytest.mark.parametrize("chunking", [None, "freeze"])
    def test_the_network_is_in_the_mode_of_the_caller(self, chunking: Any) -> None:
        def network(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return (x + obs[:, :, None]).tanh()

        seen: list[tuple[bool, bool]] = []
        sampler, expected = (made(network, chunking=chunking, warm_start=W) for _ in range(2))
        want = ticks(expected)
        assert set(seen) == {(False, False)}
        for own in want:
            seen.clear()
            with torch.inference_mode() if sampler.tick % 2 else torch.no_grad():
                assert torch.equal(ticks(sampler, 1)[0], own)
            assert set(seen) == {(sampler.tick % 2 == 0, False)}

    def test_one_call_at_a_time(self) -> None:
        def network(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
            if again:
                again.pop()()
            return x

        again: list[Callable[[], Any]] = []
        sampler = made(network)
        for call in (sampler, sampler.reset, lambda: sampler.restore(3)):
            again.append(call)
            with pytest.raises(RuntimeError, match="ActionSampler: expected one call at a time"):
                sampler()
        assert sampler.tick == 0

    def test_the_last_sample_index(self) -> None:
        sampler = made()
        sampler.restore(2**32 // B - 1)
        sampler()
        with pytest.raises(RuntimeError, match=r"indices below 2\*\*32, got tick 2147483648 of 2"):
            sampler()

    def test_shown(self) -> None:
        shown = repr(made(warm_start=W, chunking="guide"))
        assert shown.startswith("ActionSampler(Net, shape=(2, 6, 3), steps=5 (99 to 19, trailing)")
        assert shown.endswith("seed=7, warm_start=2, chunking='guide')")


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("chunking", ["freeze", "guide"])
def test_copies_go_on(copied: Callable[[Any], Any], chunking: Any) -> None:
    """Copies go on from the same tick and chunk, independently of each other."""
    sampler = made(chunking=chunking, warm_start=W, eta=0.5)
    ticks(sampler, 2)
    other = copied(sampler)
    first, second = ticks(sampler), ticks(other)
    for own, want in zip(second, first, strict=True):
        assert torch.equal(own, want)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_made_in_inference_mode(copied: Callable[[Any], Any]) -> None:
    sampler = made(chunking="freeze", warm_start=W)
    ticks(sampler, 1)
    with torch.inference_mode():
        other = copied(sampler)
    for own, want in zip(ticks(other), ticks(sampler), strict=True):
        assert torch.equal(own, want)


def test_a_copied_module_has_a_sampler_of_the_copy() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.actions = made(self.net, chunking="guide")

    holder = Holder()
    other = copy.deepcopy(holder)
    with torch.no_grad():
        other.net.weight.mul_(0.5)
    assert not torch.equal(ticks(other.actions)[-1], ticks(holder.actions)[-1])
    other.actions.restore(0)
    expected = ticks(made(other.net, chunking="guide"))
    for own, want in zip(ticks(other.actions), expected, strict=True):
        assert torch.equal(own, want)


def soft_mask(executed: int, frozen: int) -> list[float]:
    """Equation 5 of arXiv 2506.07339 with H − s = `left` old actions and d = `frozen`."""
    left = H - executed
    weights = []
    for i in range(H):
        c = (left - i) / (left - frozen + 1)
        weight = 1.0 if i < frozen else c * (math.exp(c) - 1) / (math.e - 1)
        weights.append(weight if i < left else 0.0)
    return weights


EVERY_SPLIT = [(e, f) for e in range(H + 1) for f in range(H - e + 1)]


class TestSoftMask:
    def chunks(self) -> Chunks:
        return Chunks((len(EVERY_SPLIT), H, A), torch.float64, torch.device("cpu"))

    def weights(self) -> Tensor:
        chunks = self.chunks()
        chunks.shift(*np.array(EVERY_SPLIT).T)
        return chunks.weights[:, :, 0]

    def test_is_that_of_the_paper(self) -> None:
        expected = torch.tensor([soft_mask(*split) for split in EVERY_SPLIT], dtype=torch.float64)
        torch.testing.assert_close(self.weights(), expected, rtol=0, atol=1e-15)

    def test_is_lerobots(self) -> None:
        rtc = lerobot_rtc()
        schedule = rtc.types.RTCAttentionSchedule.EXP
        config = rtc.configuration.RTCConfig(prefix_attention_schedule=schedule)
        processor = rtc.modeling.RTCProcessor(config)
        for (executed, frozen), own in zip(EVERY_SPLIT, self.weights(), strict=True):
            theirs = processor.get_prefix_weights(frozen, H - executed, H)
            torch.testing.assert_close(own.float(), theirs, rtol=0, atol=1e-6)


PREDICTED = ("epsilon", "sample", "v_prediction", "score")
TIMESTEPS = (0, 20, 50, 80, 99)
BETA = 5.0


def as_flow(a: float) -> tuple[float, float]:
    """(τ, the factor that makes a state of the diffusion from a state of the flow)."""
    scale = math.sqrt(a) + math.sqrt(1 - a)
    return math.sqrt(a) / scale, scale


def x_0_of(prediction: str, a: float, x: Tensor, output: Tensor) -> Tensor:
    """Equation 9 of arXiv 2010.02502, and the definitions of v and the score."""
    signal, sigma = math.sqrt(a), math.sqrt(1 - a)
    return {
        "epsilon": (x - sigma * output) / signal,
        "sample": output,
        "v_prediction": signal * x - sigma * output,
        "score": (x + (1 - a) * output) / signal,
    }[prediction]


class Guided:
    """A guided network next to its parts, in float64."""

    def __init__(self, prediction: str = "epsilon", executed: int = 2, frozen: int = 1) -> None:
        self.net, self.prediction = Net(torch.float64), prediction
        self.split = executed, frozen
        generator = torch.Generator().manual_seed(3)
        last, self.x = torch.randn((2, *SHAPE), generator=generator, dtype=torch.float64)
        self.obs = observed(0, torch.float64)["model_kwargs"]["obs"]
        chunks = Chunks(SHAPE, torch.float64, torch.device("cpu"))
        chunks.last.copy_(last)
        chunks.shift(executed, frozen)
        self.target = moved_on(last, [executed] * B)
        self.weights = torch.tensor(soft_mask(executed, frozen), dtype=torch.float64)[:, None]
        self.last = chunks.guide
        place = {"dtype": torch.float64, "device": self.x.device}
        self.model = guided(self.net, SCHEDULE, prediction, BETA, **place)

    def x_0(self, t: int, x: Tensor) -> Tensor:
        output = self.net(x, torch.full((B,), t), self.obs)
        return x_0_of(self.prediction, SCHEDULE.alphas_cumprod[t].item(), x, output)

    def own(self, t: int) -> Tensor:
        """The guided x̂_0."""
        output = self.model(self.x, torch.full((B,), t), obs=self.obs, **{LAST: self.last})
        return x_0_of(self.prediction, SCHEDULE.alphas_cumprod[t].item(), self.x, output)


class TestGuidance:
    @pytest.mark.parametrize("prediction", PREDICTED)
    def test_is_the_jacobians(self, prediction: str) -> None:
        case, bounded = Guided(prediction), set()
        for t in TIMESTEPS:
            a = SCHEDULE.alphas_cumprod[t].item()
            x_0 = case.x_0(t, case.x).detach()
            error = case.weights * (case.target - x_0)
            J = jacobian(lambda x, t=t: case.x_0(t, x), case.x)
            pulled = torch.einsum("ijklmn,ijk->lmn", J, error)
            bounds = (BETA * math.sqrt(1 - a), 1 / math.sqrt(a))
            bounded.add(bounds[0] < bounds[1])
            expected = x_0 + min(bounds) * pulled
            torch.testing.assert_close(case.own(t), expected, rtol=1e-9, atol=1e-9)
            assert (expected - x_0).abs().max() > 1e-3
        assert bounded == {False, True}

    @pytest.mark.parametrize("t", TIMESTEPS)
    def test_is_lerobots(self, t: int) -> None:
        """Guidance is LeRobot's: one step of its flow, whose velocity is ε − x_0 and whose time is
        1 − τ.
        """
        rtc, case = lerobot_rtc(), Guided()
        executed, frozen = case.split
        tau, scale = as_flow(SCHEDULE.alphas_cumprod[t].item())
        time = 1 - tau

        def velocity(x: Tensor) -> Tensor:
            # Its processor asks for gradients after this call, too late for those of the network.
            x.requires_grad_(True)
            return (x - case.x_0(t, x * scale)) / time

        config = rtc.configuration.RTCConfig(
            prefix_attention_schedule=rtc.types.RTCAttentionSchedule.EXP, max_guidance_weight=BETA
        )
        state = case.x / scale
        theirs = rtc.modeling.RTCProcessor(config).denoise_step(
            state, case.target, frozen, time, velocity, execution_horizon=H - executed
        )
        x_0 = (state - time * theirs).detach()
        # Its weights are of float32.
        torch.testing.assert_close(case.own(t), x_0, rtol=1e-6, atol=1e-6)

    def test_a_whole_tick(self) -> None:
        """A whole tick is that of a `Sampler` of a network that is guided by Jacobians, with known
        data.
        """
        dtype = torch.float64
        net, chunks = Net(dtype), ticks(made(chunking="guide", dtype=dtype, max_guidance_weight=2))
        alphas = SCHEDULE.alphas_cumprod
        weights = torch.tensor([soft_mask(*n) for n in zip(EXECUTED, FROZEN, strict=True)])

        for tick in range(1, TICKS):
            known = moved_on(chunks[tick - 1], EXECUTED)

            def by_jacobian(x: Tensor, t: Tensor, obs: Tensor, known: Tensor = known) -> Tensor:
                a = alphas[t[0]].item()
                signal, sigma = math.sqrt(a), math.sqrt(1 - a)

                def x_0_at(x: Tensor) -> Tensor:
                    return (x - sigma * net(x, t, obs)) / signal

                x_0 = x_0_at(x)
                error = weights.to(dtype)[:, :, None] * (known - x_0)
                with torch.enable_grad():
                    J = jacobian(x_0_at, x.clone())
                pull = min(2 * sigma, 1 / signal) * torch.einsum("ijklmn,ijk->lmn", J, error)
                return (x - signal * (x_0 + pull)) / sigma

            given = {"shape": SHAPE, "schedule": SCHEDULE, "dtype": dtype, **observed(tick, dtype)}
            expected = Sampler(by_jacobian, S, **given)(
                seed=SEED, sample_offset=tick * B, mask=frozen_mask(FROZEN), known=known
            )
            torch.testing.assert_close(chunks[tick], expected, rtol=1e-5, atol=1e-5)

    def test_what_is_frozen_is_exact(self) -> None:
        chunks = ticks(made(chunking="guide", warm_start=W, clip=1.0))
        for last, chunk in pairwise(chunks):
            assert torch.equal(chunk[0, :3], last[0, 2:5])

    def test_the_network_collects_no_gradients(self) -> None:
        net = Net()
        ticks(made(net, chunking="guide"))
        assert net.weight.requires_grad
        assert net.weight.grad is None

    def test_observations_of_inference_mode(self) -> None:
        """Observations may be of inference mode, as of an encoder that runs in it; the network
        multiplies by them.
        """

        class Scaled(Net):
            def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
                return super().forward(x, t, obs) * obs[:, :, None]

        sampler, expected = (made(Scaled(), chunking="guide") for _ in range(2))
        for tick in range(TICKS):
            with torch.inference_mode():
                own = sampler(**observed(tick))
            assert torch.equal(own, expected(**observed(tick)))

    def test_networks_that_autograd_cannot_follow(self) -> None:
        with torch.inference_mode():
            inside = Net()
        with pytest.raises(ValueError, match=r"model: expected parameters .* got weight made insi"):
            made(inside, chunking="guide")
        kinds: dict[str, Any] = {
            "to depend on x": torch.no_grad()(Net().forward),
            r"shape \(2, 6, 3\) with chunking='guide', got \(2, 12, 3\)": lambda x, t, obs: (
                torch.cat([x, x], 1)
            ),
        }
        for match, network in kinds.items():
            sampler = made(network, chunking="guide")
            sampler()
            with pytest.raises(ValueError, match=f"model output: expected {match}"):
                sampler()
        with pytest.raises(ValueError, match="guidance_scale: expected None with chunking='guide'"):
            made(chunking="guide", guidance_scale=2.0, uncond_kwargs={"obs": 0.0})


class TwoWays(nn.Module):
    """A network with the exact ε for actions close to +1 or to −1 throughout, both
    equally likely.
    """

    WIDTH = 0.05

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = SCHEDULE.alphas_cumprod.to(x.dtype)[t][:, None, None]
        variance = a * self.WIDTH**2 + 1 - a
        way = torch.tanh(a.sqrt() * x.sum((1, 2), keepdim=True) / variance)
        return (1 - a).sqrt() / variance * (x - a.sqrt() * way)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ({}, 20, 80),
        ({"chunking": "freeze"}, 20, 80),
        ({"warm_start": 4}, 0, 0),
        ({"chunking": "guide"}, 0, 5),
    ],
    ids=["from noise", "freeze", "warm start", "guide"],
)
def test_a_chunk_keeps_the_side_of_the_last(kind: dict[str, Any], least: int, most: int) -> None:
    """A chunk keeps the side of the last one. From noise, 16 environments in 5 ticks change it in
    half of the ticks.
    """
    sampler = ActionSampler(TwoWays(), 10, shape=(16, 8, 1), schedule=SCHEDULE, **kind)
    sides = torch.stack([sampler(executed=2, frozen=2).mean((1, 2)) for _ in range(6)])
    assert (sides.abs() - 1).abs().median() < 0.1
    changes = int((sides[1:].sign() != sides[:-1].sign()).sum())
    assert least <= changes <= most


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Graphs by recording, on the CPU."""
    with recorded_graphs(monkeypatch) as graphs:
        yield graphs


GRAPHS = [(chunking, warm) for chunking in (None, "freeze", "guide") for warm in (None, W)]


@pytest.mark.parametrize("mode", ["auto", True, "loop"])
@pytest.mark.parametrize(("chunking", "warm_start"), GRAPHS)
def test_captured_ticks(chunking: Any, warm_start: Any, mode: Any, recorded: list[Any]) -> None:
    kind: dict[str, Any] = {"chunking": chunking, "warm_start": warm_start, "eta": 0.5}
    expected = ticks(made(graph=False, **kind))
    sampler = made(graph=mode, **kind)
    sampler.prepare()
    captured = len(recorded)
    for own, want in zip(ticks(sampler), expected, strict=True):
        assert torch.equal(own, want)
    assert len(recorded) == captured > 0


BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "one chunk": (ValueError, {"shape": (6, 3)}, r"shape: expected \(B, horizon, action_dim\)"),
    "no action": (ValueError, {"shape": (2, 0, 3)}, r"shape: expected .* got \(2, 0, 3\)"),
    "seed": (TypeError, {"seed": None}, "seed: expected an integer, got None"),
    "seeds": (ValueError, {"seed": -1}, r"seed: expected an integer in \[0, "),
    "all steps": (ValueError, {"warm_start": S}, r"warm_start: expected an integer in \[1, 4\]"),
    "no step": (ValueError, {"warm_start": 0}, r"warm_start: expected an integer in \[1, 4\]"),
    "one step": (ValueError, {"steps": 1, "warm_start": 1}, "warm_start: expected None with a sin"),
    "order": (ValueError, {"warm_start": W, "order": 2}, "warm_start: expected None at order 2"),
    "chunking": (ValueError, {"chunking": "guided"}, "chunking: expected one of .* mean 'guide'"),
    "weight": (ValueError, {"max_guidance_weight": -1.0}, "max_guidance_weight: expected a finite"),
    "eta": (ValueError, {"eta": -1.0}, "eta: expected"),
}
BAD_CALLS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "fraction": (TypeError, {"executed": 0.5}, "executed: expected an integer, got 0.5"),
    "negative": (ValueError, {"executed": -1}, r"executed: .* in \[0, 6\], got -1"),
    "too far": (ValueError, {"executed": H + 1}, r"executed: expected an integer in \[0, 6\], got"),
    "more than are left": (ValueError, {"executed": 4, "frozen": 3}, r"frozen: .* in \[0, 2\]"),
    "of all": (ValueError, {"executed": [4, 1], "frozen": 3}, r"frozen: .* in \[0, 2\], got 3"),
    "of one": (
        ValueError,
        {"executed": [4, 1], "frozen": [2, 6]},
        r"frozen\[1\]: expected an integer in \[0, 5\], got 6",
    ),
    "three": (ValueError, {"frozen": [1, 1, 1]}, r"one for each environment, 2, got shape \(3,\)"),
    "true": (TypeError, {"frozen": [True, False]}, "frozen: expected integers, got "),
    "a word": (TypeError, {"frozen": "2"}, "frozen: expected an integer, got '2'"),
    "of int32": (
        TypeError,
        {"frozen": torch.ones(2, dtype=torch.int32)},
        "frozen: expected an int64 tensor, got dtype torch.int32",
    ),
    "of no dimension": (ValueError, {"frozen": torch.tensor(1)}, r"frozen: .* got shape \(\)"),
    "elsewhere": (
        ValueError,
        {"executed": torch.ones(2, dtype=torch.int64, device="meta")},
        "executed: expected a tensor on cpu, got one on meta",
    ),
    "out": (ValueError, {"out": torch.empty(2, 6)}, "out: expected the shape of the state"),
    "out dtype": (ValueError, {"out": torch.empty(SHAPE).double()}, "out: expected dtype"),
    "observation": (ValueError, {"model_kwargs": {"o": torch.ones(1)}}, r"model_kwargs\['o'\]"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_options(case: tuple[type[Exception], dict[str, Any], str]) -> None:
    error, given, match = case
    with pytest.raises(error, match=match):
        made(**given)


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(case: tuple[type[Exception], dict[str, Any], str]) -> None:
    """Bad calls are refused on the first tick too, before anything is executed or frozen."""
    error, given, match = case
    sampler = made(chunking="freeze")
    for _ in range(2):
        with pytest.raises(error, match=match):
            sampler(**given)
        sampler()


def test_programs_go_round_it() -> None:
    sampler, expected = made(chunking="freeze"), ticks(made(chunking="freeze"))

    def plan(obs: Tensor) -> Tensor:
        chunk = sampler(model_kwargs={"obs": obs * 1}, executed=EXECUTED, frozen=FROZEN)
        return chunk * 2

    compiled = torch.compile(plan, backend="eager")
    for tick, want in enumerate(expected):
        assert torch.equal(compiled(observed(tick)["model_kwargs"]["obs"]), want * 2)
    with pytest.raises(RuntimeError, match="ActionSampler: expected calls outside of programs"):
        torch.jit.trace(lambda x: sampler() + x, (torch.ones(1),))
    assert sampler.tick == TICKS
    assert fastddim.ActionSampler is ActionSampler
