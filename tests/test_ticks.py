"""The cost of a tick of an `ActionSampler` besides the network: no allocation, no wait,
one launch.

On the CPU, memory is what torch's profiler tells of its allocator. `RecordedGraph` stands in for a
captured graph, whose launches are counted; tests/support/gpuless/capture.py has what a tick adds on
fake CUDA tensors. Marked `gpu`: the counters of CUDA's own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastddim import ActionSampler, Schedule

from .support.environment import CPU_IMPLS
from .support.probes import NoSync
from .support.recorded_graph import RecordedGraph, recorded_graphs

SHAPE = B, H, A = (2, 6, 3)
MANY = 10_000
SCHEDULE = Schedule.linear()


class Quiet(nn.Module):
    """A network that allocates nothing: its output is memory of its own."""

    def __init__(self, batch: int = B) -> None:
        super().__init__()
        self.register_buffer("output", torch.zeros(batch, H, A), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.output: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return torch.mul(x, self.scale, out=self.output).add_(obs)


class Followed(Quiet):
    """A network that autograd can follow."""

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return x * self.scale + obs


def always(executed: Any, frozen: Any) -> Callable[[int], dict[str, Any]]:
    return lambda tick: {"executed": executed, "frozen": frozen}


CHANGING = [{"executed": [n, 1], "frozen": torch.tensor([2 - n, 2])} for n in range(3)]


def changing(tick: int) -> dict[str, Any]:
    """Other numbers for each environment at every tick."""
    return CHANGING[tick % 3]


COUNTS = {"one number": always(2, 1), "one of each": always([2, 1], [1, 0]), "changing": changing}
KINDS: dict[str, dict[str, Any]] = {
    "cold": {},
    "warm": {"warm_start": 2},
    "frozen": {"chunking": "freeze"},
    "warm, frozen": {"chunking": "freeze", "warm_start": 2},
}
GUIDED = {"guided": {"chunking": "guide"}, "warm, guided": {"chunking": "guide", "warm_start": 2}}


class Robot:
    """A control loop with an observation and a place for the actions."""

    def __init__(
        self,
        counts: Callable[[int], dict[str, Any]],
        steps: int = 3,
        device: str = "cpu",
        **kind: Any,
    ) -> None:
        network = (Followed if kind.get("chunking") == "guide" else Quiet)().to(device).eval()
        first = {"obs": torch.zeros(B, 1, 1, device=device)}
        self.obs: dict[str, Tensor] | None = {"obs": torch.ones(B, 1, 1, device=device)}
        self.out = torch.empty(SHAPE, device=device)
        self.counts = counts
        given = {"shape": SHAPE, "schedule": SCHEDULE, "model_kwargs": first}
        self.sampler = ActionSampler(network, steps, **given, **kind)

    def tick(self) -> None:
        self.sampler(model_kwargs=self.obs, out=self.out, **self.counts(self.sampler.tick))

    def live(self, ticks: int) -> None:
        for _ in range(ticks):
            self.tick()


def allocations(work: Callable[[], None]) -> list[int]:
    """The bytes that torch's allocator on the CPU was asked for, and was given back as negative
    numbers.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return [e.self_cpu_memory_usage for e in profiler.events() if e.self_cpu_memory_usage != 0]


@pytest.mark.skipif("cpu" not in CPU_IMPLS, reason="the reference makes temporaries")
class TestAllocations:
    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_none(self, kind: dict[str, Any], counts: Any) -> None:
        robot = Robot(counts, **kind)
        robot.live(4)
        assert allocations(lambda: robot.live(20)) == []

    def test_one_is_seen(self) -> None:
        robot = Robot(COUNTS["one number"], chunking="freeze")
        robot.live(2)
        robot.sampler._chunks.keep_frozen = robot.out.clone  # type: ignore[method-assign]
        made = allocations(lambda: robot.live(3))
        assert sum(size > 0 for size in made) == 3

    def test_those_of_autograd_go_again(self) -> None:
        """Allocations of autograd are freed again: a guided network allocates for its backward
        pass, in eager steps.
        """
        robot = Robot(COUNTS["changing"], chunking="guide")
        robot.live(3)
        made = allocations(lambda: robot.live(20))
        assert sum(made) == 0
        assert max(made) > 0


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(v), Tensor) for v in gc.get_objects())


class Launches(TorchDispatchMode):
    """Counts operators that make memory, outside of graphs, and replays of graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.replays, self.made = 0, list[str]()
        replay = RecordedGraph.replay

        def counted(graph: RecordedGraph) -> None:
            self.replays += 1
            with _disable_current_modes():
                replay(graph)

        monkeypatch.setattr(RecordedGraph, "replay", counted)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {v.untyped_storage()._cdata for v in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if any(v.untyped_storage()._cdata not in given for v in _tensors(result)):
            self.made.append(func._schema.name)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(tree) if isinstance(v, Tensor)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Graphs by recording, on the CPU."""
    with recorded_graphs(monkeypatch) as graphs:
        yield graphs


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("kind", (KINDS | GUIDED).values(), ids=KINDS | GUIDED)
def test_one_launch_a_tick(
    kind: dict[str, Any],
    mode: Any,
    recorded: list[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tick is one launch, of a graph of all its steps, without an allocation or a wait for the
    device.
    """
    robot = Robot(changing, graph=mode, **kind)
    robot.sampler.prepare()
    captured, launches = len(recorded), Launches(monkeypatch)
    with launches, NoSync():
        robot.live(20)
        robot.counts = COUNTS["one number"]
        robot.live(10)
    assert launches.replays == 30
    assert launches.made == []
    assert len(recorded) == captured


def test_ten_thousand_ticks(recorded: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand ticks make as many launches, and neither a tensor nor a graph more than the
    first ones.
    """
    robot = Robot(COUNTS["one number"], 2, graph="loop", warm_start=1)
    robot.obs = None
    robot.sampler.prepare()
    launches = Launches(monkeypatch)
    robot.live(2)
    before = live_tensors()
    robot.live(MANY - 2)
    assert launches.replays == robot.sampler.tick == MANY
    assert live_tensors() == before
    assert len(recorded) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", (KINDS | GUIDED).values(), ids=KINDS | GUIDED)
def test_ten_thousand_ticks_on_a_gpu(kind: dict[str, Any]) -> None:
    """Ten thousand ticks on a GPU allocate and wait for nothing, by the counters of CUDA's
    allocator and its mode that refuses to wait.
    """
    robot = Robot(COUNTS["one number"], device="cuda", **kind)
    robot.sampler.prepare()
    robot.live(2)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        robot.live(MANY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        robot.live(10)
    launched = [e for e in profiler.events() if e.name == "cudaGraphLaunch"]
    assert len(launched) == 10
