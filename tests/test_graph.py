"""CUDA graphs: their contents, the values that a replay follows, and the objects kept between
calls.

Without a GPU, `RecordedGraph` stands in for a captured graph and real CPU kernels run in
it; tests/support/gpuless/capture.py runs the loop on fake CUDA tensors. Marked `gpu`: the real
thing.
"""

from __future__ import annotations

import functools
import gc
import json
import re
import shutil
import subprocess
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastddim
from fastddim import Sampler, Schedule, graph, ops, philox, transfer
from fastddim.loop import capture, cuda, model_state, pool, program, programs, stream_order
from fastddim.loop import driver as driver_module
from fastddim.loop.counters import Counters
from fastddim.loop.cuda import CaptureError

from .support.environment import CPU_IMPLS
from .support.models import SmallNet, elementwise_model
from .support.probes import NoSync
from .support.recorded_graph import RecordedGraph

SHAPE = (2, 3, 6, 6)
LINEAR = Schedule.linear()
CPU = torch.device("cpu")
CAPTURED = [True, "loop"]

GPULESS = Path(__file__).parent / "support" / "gpuless"


def latents(shape=SHAPE, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def generator(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


class Captures(list):
    """The graphs captured so far."""

    def record(self, body, warm_up, device, generators):
        for _ in range(cuda.WARM_UPS):
            warm_up()
        try:
            recorded = RecordedGraph(body)
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        self.append(recorded)
        return recorded


@pytest.fixture
def captures(monkeypatch):
    """Records captures on the CPU, from an empty pool."""
    captures = Captures()
    monkeypatch.setattr(cuda, "record", captures.record)
    monkeypatch.setattr(cuda, "available", lambda device: True)
    graph.clear()
    yield captures
    graph.clear()


def sample(model, mode, steps=4, **kwargs):
    if "x_T" not in kwargs:
        kwargs.setdefault("shape", SHAPE)
    kwargs.setdefault("schedule", LINEAR)
    kwargs.setdefault("seed", 0)
    return fastddim.sample(model, steps, graph=mode, **kwargs)


def follows(mode, model, calls, **shared):
    """Asserts that every call with a graph equals the eager one bit for bit, and that no two calls
    are alike.

    A callable value is called for each of the two.
    """
    results = []
    for call in calls:
        expected, own = (
            sample(
                model,
                which,
                **{k: v() if callable(v) else v for k, v in {**shared, **call}.items()},
            )
            for which in (False, mode)
        )
        assert torch.equal(own, expected), call
        assert expected.isfinite().all()
        assert not any(torch.equal(own, before) for before in results), call
        results.append(own)


class Scaled(nn.Module):
    """A network with a tensor among its keyword arguments."""

    def __init__(self):
        super().__init__()
        self.net = SmallNet()

    def forward(self, x, t, scale=1.0, **others):
        return self.net(x, t) * scale


@pytest.mark.parametrize("mode", CAPTURED)
@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestReplay:
    """One graph serves every value; each result has the eager one's bits."""

    def test_values_are_data(self, mode, impl, captures):
        follows(
            mode,
            SmallNet(),
            [
                {},
                {"seed": 5},
                {"seed": [3, 2**64 - 1]},
                {"sample_offset": 7},
                {"x_T": latents()},
                {"eta": 0.25},
                {"variance": "large"},
                {"spacing": "uniform"},
                {"steps": [981, 500, 77, 3]},
                {"schedule": Schedule.cosine()},
                {"prediction": "v_prediction"},
                {"prediction": "score"},
                {"clip": 0.5},
                {"clip": 0.5, "rederive_eps": True},
            ],
            impl=impl,
            eta=1.0,
        )
        # The graph of all steps draws the latents too, unless they are given.
        assert len(captures) == (2 if mode == "loop" else 1)

    def test_without_noise(self, mode, impl, captures):
        follows(mode, SmallNet(), [{}, {"spacing": "uniform"}, {"seed": 9}], impl=impl)
        assert len(captures) == 1

    def test_guidance(self, mode, impl, captures):
        strengths = torch.tensor([1.0, 1.0, 0.5, 0.25]).view(4, 1, 1, 1)
        follows(
            mode,
            lambda x, t: elementwise_model(x, t) * strengths,
            [
                {"guidance_scale": 2.0},
                {"guidance_scale": 3.5},
                {"guidance_scale": 2.0, "seed": 1},
            ],
            impl=impl,
        )
        assert len(captures) == 1

    def test_rows(self, mode, impl, captures):
        follows(
            mode,
            SmallNet(),
            [{"eta": torch.tensor(eta)} for eta in ([0.0, 1.0], [1.0, 0.0], [0.5, 0.25])],
            impl=impl,
        )
        assert len(captures) == 1

    @pytest.mark.parametrize(
        ("model_dtype", "dtype"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
        ids=str,
    )
    @pytest.mark.parametrize("guidance_scale", [None, 2.0])
    def test_dtypes(self, mode, impl, model_dtype, dtype, guidance_scale, captures):
        net = SmallNet(3, outputs=6).to(model_dtype)
        kind = {"dtype": dtype, "guidance_scale": guidance_scale, "eta": 1.0}
        follows(mode, net, [{}, {"seed": 4}], impl=impl, **kind)
        assert len(captures) == 1

    @pytest.mark.parametrize("inside", [False, True], ids=["staged", "registered"])
    def test_noise(self, mode, impl, inside, captures, monkeypatch):
        monkeypatch.setattr(capture, "draws_inside", lambda generators, device: inside)
        kind = {"eta": 1.0, "impl": impl, "x_T": latents()}
        net = SmallNet()
        follows(mode, net, [{"noise": latents((4, *SHAPE), seed=s)} for s in (1, 2)], **kind)
        follows(mode, net, [{"noise": latents((4, *SHAPE), 3, torch.float16)}], **kind)
        assert len(captures) == 2
        streams = generator(1), generator(2)
        for source in (streams[0], list(streams), streams[0]):
            before = [g.get_state() for g in streams]
            expected = sample(net, False, noise=source, **kind)
            after = [g.get_state() for g in streams]
            for g, state in zip(streams, before, strict=True):
                g.set_state(state)
            assert torch.equal(sample(net, mode, noise=source, **kind), expected)
            assert all(torch.equal(g.get_state(), s) for g, s in zip(streams, after, strict=True))
        assert len(captures) == 4

    def test_generator_draws_x_T_first(self, mode, impl, captures):
        kind = {"eta": 1.0, "impl": impl, "noise": lambda: generator(5)}
        follows(mode, SmallNet(), [kind])

    def test_tensors_among_the_arguments(self, mode, impl, captures):
        model, scale = Scaled(), torch.full((2, 1, 1, 1), 0.5)
        before = None
        for change in (lambda: None, lambda: scale.mul_(1.5), lambda: None):
            change()
            # The caller's own tensor with new values; then another of the same shape.
            for given in (scale, scale + 0.125):
                kind = {"impl": impl, "model_kwargs": {"scale": given}}
                own = sample(model, mode, **kind)
                assert torch.equal(own, sample(model, False, **kind))
                assert before is None or not torch.equal(own, before)
                before = own
        assert torch.equal(scale, torch.full((2, 1, 1, 1), 0.75))
        assert len(captures) == 1

    def test_watching(self, mode, impl, captures):
        kind = {"impl": impl, "eta": 1.0, "return_trajectory": True}
        net = SmallNet()
        for seed in (1, 2):
            calls = {False: [], mode: []}
            for which, seen in calls.items():
                watch = {} if mode == "loop" else {"callback": lambda *a, seen=seen: seen.append(a)}
                calls[which] = [sample(net, which, seed=seed, **kind, **watch), seen]
            assert torch.equal(calls[mode][0], calls[False][0])
            assert len(calls[mode][1]) == (0 if mode == "loop" else 4)
            for own, expected in zip(calls[mode][1], calls[False][1], strict=True):
                assert own[:2] == expected[:2]
                assert torch.equal(own[2], expected[2])
                assert torch.equal(own[3], expected[3])
        assert len(captures) == 1

    def test_progress(self, mode, impl, captures, capsys):
        own = sample(elementwise_model, mode, impl=impl, progress=True)
        assert "4/4" in capsys.readouterr().err
        assert torch.equal(own, sample(elementwise_model, False, impl=impl))

    def test_inversion(self, mode, impl, captures):
        net = SmallNet()
        for x in (latents(), latents(seed=1)):
            own, expected = (fastddim.invert(net, x, 4, graph=g, impl=impl) for g in (mode, False))
            assert torch.equal(own, expected)
        assert len(captures) == 1

    def test_order_2(self, mode, impl, captures):
        calls = [{}, {"seed": 1}, {"spacing": "uniform"}, {"clip": 0.5}]
        follows(mode, SmallNet(), calls, impl=impl, order=2)
        assert len(captures) == 1

    def test_refined_inversion(self, mode, impl, captures):
        net = SmallNet()
        for seed in (1, 2):
            own, expected = (
                fastddim.invert(net, latents(seed=seed), 4, refine=2, impl=impl, graph=graph)
                for graph in (mode, False)
            )
            assert torch.equal(own, expected)
        assert len(captures) == 1

    def test_values_that_change_from_step_to_step(self, mode, impl, captures):
        calls = [{"eta": [1.0, 0.5, 0.0, 0.0]}, {"eta": 1.0}, {"temperature": [0.0, 1.0, 2.0, 1.0]}]
        follows(mode, SmallNet(), calls, impl=impl, eta=0.5)
        assert len(captures) == 1

    def test_fitted_rows(self, mode, impl, captures):
        rescaling = {"dynamic_thresholding_ratio": 0.8, "guidance_rescale": 0.5}
        strengths = torch.tensor([1.0, 1.0, 0.5, 0.25]).view(4, 1, 1, 1)
        calls = [{"seed": 1}, {"seed": 2}, {"guidance_scale": 4.0}]
        model = lambda x, t: elementwise_model(x, t) * strengths  # noqa: E731
        follows(mode, model, calls, impl=impl, guidance_scale=2.0, eta=1.0, **rescaling)
        assert len(captures) == 1

    def test_masks(self, mode, impl, captures):
        """The known elements are data, but a mask or none makes another graph."""
        known = [{"known": latents(seed=s), "mask": torch.rand(6)} for s in (1, 2)]
        follows(mode, SmallNet(), [*known, {}, {**known[0], "seed": 3}], impl=impl, eta=1.0)
        assert len(captures) == 2

    def test_a_function_of_x_0(self, mode, impl, captures):
        """A function of x_0 may hold parameters, which a replay follows; its graph is not kept
        between calls.
        """
        shift = nn.Parameter(torch.zeros(3, 1, 1))

        class Shift(nn.Module):
            def __init__(self):
                super().__init__()
                self.shift = shift

            def forward(self, x_0, t):
                return x_0 + self.shift * t[:, None, None, None]

        kind = {"denoised_fn": Shift(), "impl": impl, "shape": SHAPE}
        sampler, results = Sampler(SmallNet(), 4, graph=mode, **kind), []
        for value in (0.0, 0.01):
            with torch.no_grad():
                shift.fill_(value)
            results.append(sampler(seed=0))
            assert torch.equal(results[-1], sample(SmallNet(), False, **kind))
        assert not torch.equal(*results)
        assert len(captures) == 1
        sample(SmallNet(), mode, **kind)
        assert len(pool.POOL) == 0

    def test_a_random_model(self, mode, impl, captures):
        """A random model repeats its draws: dropout takes the numbers that it would take eagerly,
        and leaves as many.
        """
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Unflatten(1, SHAPE[1:]))
        results = []
        for which in (False, mode, mode):
            torch.manual_seed(3)
            first = sample(lambda x, t: net(x), which, impl=impl)
            results.append((first, sample(lambda x, t: net(x), which, impl=impl), torch.rand(1)))
        assert not torch.equal(results[0][0], results[0][1])
        for own in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(own, results[0], strict=True))

    def test_autocast(self, mode, impl, captures):
        """Autocast casts a weight in the graph, and uses no cast that it cached before."""
        net, seen = SmallNet(), []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                net(latents(), torch.zeros(2))
                seen.append(sample(net, mode, impl=impl))
                assert torch.is_autocast_cache_enabled()
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(seen[-1], sample(net, False, impl=impl))
            with torch.no_grad():
                net.weight.mul_(0.5)
        assert not torch.equal(*seen)
        assert len(captures) == 1

    def test_results_are_the_callers(self, mode, impl, captures):
        net = SmallNet()
        for kind in ({}, {"return_trajectory": True}):
            result = sample(net, mode, impl=impl, **kind)
            then = result.clone()
            sample(net, mode, impl=impl, seed=1, **kind)
            assert torch.equal(result, then)
            result.zero_()
            assert torch.equal(sample(net, mode, impl=impl, **kind), then)
        assert len(captures) == (2 if mode == "loop" else 1)

    @pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
    def test_grad_modes(self, mode, impl, context, captures):
        net = SmallNet()
        with context():
            kept = sample(net, mode, impl=impl)
        own = sample(net, mode, impl=impl, seed=1)
        assert not kept.is_inference()
        assert torch.equal(own, sample(net, False, impl=impl, seed=1))
        assert len(captures) == 1

    def test_capture_leaves_the_callers_things_alone(self, mode, impl, captures):
        x_T, noise = latents(), latents((4, *SHAPE), seed=1)
        scale, seeds = torch.ones(2, 1, 1, 1), torch.tensor([1, 2])
        before = [v.clone() for v in (x_T, noise, scale, seeds)]
        state = torch.get_rng_state()
        kind = {"eta": 1.0, "impl": impl, "seed": seeds, "model_kwargs": {"scale": scale}}
        sample(Scaled(), mode, x_T=x_T, noise=noise, **kind)
        pairs = zip((x_T, noise, scale, seeds), before, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(torch.get_rng_state(), state)

    def test_one_step(self, mode, impl, captures):
        follows(
            mode, SmallNet(), [{}, {"seed": 2}], steps=1, impl=impl, spacing="trailing", eta=1.0
        )


@pytest.mark.parametrize("mode", CAPTURED)
class TestRecorder:
    """The stand-in is as blind as a graph: it does not follow what a graph would not follow."""

    def test_a_python_number_is_frozen(self, mode, captures):
        def model(x, t):
            return elementwise_model(x, t) * model.number

        for model.number in (1.0, 0.5):
            expected = sample(model, False)
            own = sample(model, mode)
            assert torch.equal(own, expected) == (model.number == 1.0)
        assert len(captures) == 1

    def test_a_rebound_tensor_is_not_followed(self, mode, captures):
        def model(x, t):
            return elementwise_model(x, t) * model.scale

        model.scale = torch.ones(1)
        sample(model, mode)
        model.scale.fill_(0.5)
        assert torch.equal(sample(model, mode), sample(model, False))
        model.scale = torch.full((1,), 0.25)
        assert not torch.equal(sample(model, mode), sample(model, False))

    @pytest.mark.parametrize("value", ["item", "constant", "nonzero"])
    def test_host_work_is_refused(self, mode, value, captures):
        def model(x, t):
            if value == "item":
                x.sum().item()
            if value == "nonzero":
                x.nonzero()
            return x * (torch.tensor(0.5) if value == "constant" else 0.5)

        with pytest.raises(ValueError, match="capture fails"):
            sample(model, mode)


def test_a_host_step_index_is_caught(captures, monkeypatch):
    """A step index on the host is caught: the defect that counters in device memory prevent."""
    taken = []

    def advance(counters, backend):
        taken.append(None)
        counters.counting.add_(1)
        counters.now.t.fill_(750 - 250 * (len(taken) % 4))

    expected = sample(elementwise_model, False)
    monkeypatch.setattr(Counters, "advance", advance)
    assert torch.equal(sample(elementwise_model, False), expected)
    assert not torch.equal(sample(elementwise_model, True), expected)


def test_a_loop_that_keeps_its_first_timesteps_is_caught(captures, monkeypatch):
    steps = [981, 500, 77, 3]
    expected = sample(elementwise_model, False, steps)
    sample(elementwise_model, "loop")
    monkeypatch.setattr(Counters, "load", lambda counters, timesteps: None)
    assert not torch.equal(sample(elementwise_model, "loop", steps), expected)


@functools.cache
def zeros(shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def same(x, t, **kwargs):
    """An output that no operator of the model's makes."""
    return zeros(tuple(x.shape), x.dtype)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"eta": 1.0},
        {"eta": torch.tensor([0.0, 1.0]), "clip": 1.0},
        {"guidance_scale": 2.0, "dtype": torch.bfloat16},
        {"eta": 1.0, "guidance_scale": torch.tensor([1.0, 2.0])},
    ],
    ids=["ddim", "ddpm", "rows", "guided", "guided rows"],
)
def test_operators_of_a_step(kind, steps, captures):
    """A step has these operators besides the model: one update, which writes the next input as
    well, and one advance if the steps are not known. If all are known, the latents are drawn before
    them, unless they are given.
    """
    step = ["fastddim::update_out", "fastddim::advance"]
    inputs = 2 if "guidance_scale" in kind else 0
    sample(same, True, steps, callback=lambda *_: None, **kind)
    sample(same, True, steps, **kind)
    sample(same, "loop", steps, **kind)
    sample(same, "loop", steps, x_T=latents(dtype=kind.get("dtype", torch.float32)), **kind)
    whole = ["aten::copy_"] * inputs + step[:1] * steps
    assert [g.launched for g in captures] == [step, step, ["fastddim::normal_out", *whole], whole]


@pytest.mark.parametrize("mode", [True, "loop"])
def test_a_known_row_is_read_without_an_index(mode, captures):
    """Each step that a graph of all steps takes has a table of its row alone, with known data too;
    rows that samples have of their own are found by indices.
    """
    masked = {"mask": torch.ones(1, 1, 1, 1), "known": zeros(SHAPE, torch.float32)}
    sample(same, mode, 3, eta=1.0, **masked)
    sample(same, mode, 3, eta=torch.tensor([0.0, 1.0]))
    shared, own = (graph.arguments_of("fastddim::update_out") for graph in captures)
    rows = [(len(table), None if row is None else len(row)) for _, _, table, row, *_ in shared]
    assert rows == ([(1, None)] * 6 if mode == "loop" else [(3, 1)] * 2)
    assert {(len(table), len(row)) for _, _, table, row, *_ in own} == {(6, 2)}


def test_given_noise_adds_no_work_to_the_graph(captures):
    sample(same, "loop", 2, eta=1.0, noise=latents((2, *SHAPE)), x_T=latents())
    assert captures[0].launched == ["fastddim::update_out"] * 2


def test_a_trajectory_adds_a_copy_a_step(captures):
    sample(same, "loop", 2, return_trajectory=True, x_T=latents())
    assert captures[0].launched == ["aten::copy_", *["fastddim::update_out", "aten::copy_"] * 2]


OF_A_STEP = ["fastddim::update_out", "fastddim::advance"]
OF_ALL_STEPS = ["fastddim::normal_out", *["fastddim::update_out"] * 4]


class TestAuto:
    """One graph of all steps if nothing watches and its nodes are few, otherwise one for a step."""

    def test_a_small_model(self, captures):
        sampler = Sampler(same, 4, shape=SHAPE, schedule=LINEAR, eta=1.0)
        for seed in (1, 2, 1):
            assert torch.equal(sampler(seed=seed), sample(same, False, seed=seed, eta=1.0))
        assert [g.launched for g in captures] == [OF_A_STEP, OF_ALL_STEPS]
        x_T = latents()
        assert torch.equal(sampler(x_T=x_T, seed=3), sample(same, False, x_T=x_T, seed=3, eta=1.0))
        assert [g.launched for g in captures] == [OF_A_STEP, OF_ALL_STEPS, OF_ALL_STEPS[1:]]

    @pytest.mark.parametrize(
        "watch",
        [{"progress": True}, {"return_trajectory": True}, {"callback": lambda *_: None}],
        ids=lambda watch: next(iter(watch)),
    )
    def test_what_watches(self, watch, captures, capsys):
        """A bar moves at every step, and a callback and a trajectory see each."""
        sample(same, "auto", **watch)
        assert [g.launched for g in captures] == [OF_A_STEP]

    @pytest.mark.parametrize(
        "call",
        [
            {"noise": latents((4, *SHAPE)), "eta": 1.0},
            {"noise": generator(1), "eta": 1.0},
        ],
        ids=["a tensor of noise", "a generator on the host"],
    )
    def test_what_takes_a_graph_a_step(self, call, captures):
        sample(same, "auto", **call)
        assert [g.launched for g in captures] == [OF_A_STEP]

    def test_the_middle_of_a_run(self, captures):
        """The middle of a run has a graph of its own for the rest of the steps, as long as there
        are few such.
        """
        sampler = Sampler(same, 8, shape=SHAPE, schedule=LINEAR, eta=1.0)
        x_T, rest = latents(), ["fastddim::update_out"]
        firsts = (3, 6, 3, 1, 5, 7, 3, 0)
        for first in firsts:
            call = {"x_T": x_T, "first_step": first, "seed": first}
            expected = sample(same, False, 8, eta=1.0, **call)
            assert torch.equal(sampler(**call), expected)
        lengths = [8 - first for first in (3, 6, 1, 5, 0)]  # 7 is one too many
        assert [g.launched for g in captures] == [OF_A_STEP, *(rest * n for n in lengths)]

    def test_a_generator_whose_draws_a_graph_holds(self, captures, monkeypatch):
        monkeypatch.setattr(capture, "draws_inside", lambda generators, device: True)
        follows("auto", SmallNet(), [{"noise": lambda: generator(5), "eta": 1.0}])
        assert len(captures) == 2

    @pytest.mark.parametrize("over", [False, True])
    def test_the_bound(self, over, captures, monkeypatch):
        """The bound counts nodes; a step here has two of them, the update and the advance."""
        monkeypatch.setattr(program, "MOST_NODES", 2 * 4 - over)
        follows("auto", same, [{"eta": 1.0}, {"eta": 1.0, "seed": 1}])
        assert len(captures) == (1 if over else 2)

    def test_more_steps_may_be_too_many(self, captures):
        most = program.MOST_NODES // 2
        sample(same, "auto", most + 1, schedule=Schedule.linear(1000))
        assert [len(g.launched) for g in captures] == [2]
        sample(same, "auto", most, schedule=Schedule.linear(1000))
        assert [len(g.launched) for g in captures] == [2, 2, most + 1]

    def test_nodes_that_cannot_be_counted(self, captures, monkeypatch):
        monkeypatch.setattr(RecordedGraph, "nodes", None)
        follows("auto", same, [{"eta": 1.0}])
        assert len(captures) == 1

    def test_all_steps_that_cannot_be_captured(self, captures, monkeypatch):
        """If all steps cannot be captured, such as for want of memory, the graph of a step goes on
        serving, and the capture is not tried again.
        """
        record, tried = captures.record, []

        def once(*args):
            tried.append(None)
            if len(tried) > 1:
                raise CaptureError("out of memory")
            return record(*args)

        monkeypatch.setattr(cuda, "record", once)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            follows("auto", SmallNet(), [{}, {"seed": 1}])
        assert len(tried) == 2

    def test_both_serve_one_loop(self, captures):
        """Watched and unwatched calls of one loop use the same buffers in turn."""
        model = SmallNet()
        sampler, expected = (
            Sampler(model, 4, shape=SHAPE, eta=1.0, graph=mode) for mode in ("auto", False)
        )
        for seed in (1, 2, 3):
            own = sampler(seed=seed)
            trajectory = sampler(seed=seed, return_trajectory=True)
            assert torch.equal(trajectory, expected(seed=seed, return_trajectory=True))
            assert torch.equal(own, trajectory[-1])
        assert len(captures) == 2

    def test_programs_of_all_steps_go_with_that_of_a_step(self, captures):
        model = Scaled()
        sampler = Sampler(model, 4, shape=SHAPE)
        sampler()
        refs = [weakref.ref(captures.pop()) for _ in range(2)]
        model.net.weight = nn.Parameter(model.net.weight.detach() * 0.5)
        sampler()
        assert [ref() for ref in refs] == [None, None]


class TestWhatIsWrittenAgain:
    """Numbers that lie on the device are not written again; others are."""

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_keys(self, mode, captures):
        sampler = Sampler(SmallNet(), 4, shape=SHAPE, schedule=LINEAR, eta=1.0, graph=mode)
        x_T = latents()
        seeds = torch.tensor([1, 2])
        calls = [
            *({"seed": 0}, {"seed": 0}, {"seed": 5}, {"seed": 5, "sample_offset": 3}),
            *({"seed": 5}, {"seed": seeds}, {"seed": 5}, {"seed": [5, 5]}, {"seed": 0}),
        ]
        for call in calls:
            expected = sample(sampler._setup.model, False, x_T=x_T, eta=1.0, **call)
            assert torch.equal(sampler(x_T=x_T, **call), expected), call
        seeds.add_(1)
        expected = sample(sampler._setup.model, False, x_T=x_T, eta=1.0, seed=seeds)
        assert torch.equal(sampler(x_T=x_T, seed=seeds), expected)

    def test_after_a_graph_of_the_callers_wrote_them(self, captures, outer):
        model = SmallNet()
        sampler, results = Sampler(model, 4, shape=SHAPE, schedule=LINEAR, eta=1.0), []
        mask, known = torch.ones(1, 1, 6, 6).tril(), latents(seed=8)
        kinds = [{}, {"mask": mask, "known": known}]
        sampler(seed=2)
        theirs = outer(lambda: results.append(sampler(seed=4, sample_offset=7)))
        for kind in kinds:
            expected = sample(model, False, eta=1.0, seed=2, **kind)
            for _ in range(2):
                theirs.replay()
                assert torch.equal(sampler(seed=2, **kind), expected)

    def test_what_only_a_graph_of_the_callers_has_written(self, captures, outer):
        """A graph of the caller's writes at its replays, of which there was none: a capture writes
        nothing.
        """
        known, model = {"mask": torch.ones(1, 1, 6, 6).tril(), "known": latents(seed=8)}, SmallNet()
        sampler = Sampler(model, 4, shape=SHAPE, schedule=LINEAR, eta=1.0)
        # Of the run alone: on the host, a call looks at the values of its mask.
        outer(lambda: sampler._loop.run(None, samples=philox.check_samples(4, 2), **known))
        sampler._loop.step.inpainting.table.fill_(torch.nan)
        sampler._loop.counters.now.keys.seed.fill_(-1)
        expected = sample(model, False, eta=1.0, seed=4, **known)
        assert torch.equal(sampler(seed=4, **known), expected)

    @pytest.mark.parametrize("mode", ["auto", *CAPTURED])
    def test_tables(self, mode, captures):
        """Other coefficients, timesteps, and levels of known data reach the kept loop."""
        model, mask = SmallNet(), torch.ones(1, 1, 6, 6).tril()
        calls = [
            *({}, {}, {"clip": 0.5}, {"spacing": "uniform"}, {"schedule": Schedule.cosine()}),
            *({"spacing": "uniform"}, {"clip": 0.5}, {}),
        ]
        for kind in ({}, {"mask": mask, "known": latents(seed=8)}):
            for call in calls:
                expected = sample(model, False, eta=1.0, **kind, **call)
                assert torch.equal(sample(model, mode, eta=1.0, **kind, **call), expected)


class Launches(TorchDispatchMode):
    """The operators that run within, except those that only make views or memory."""

    QUIET = ("select", "slice", "split", "chunk", "view", "expand", "unsqueeze", "empty")

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not name.startswith(self.QUIET):
            self.ran.append(name)
        return func(*args, **(kwargs or {}))


REWOUND, TAKEN, RESULT = ["copy_"], ["copy_"], ["clone"]


@pytest.mark.parametrize(
    ("mode", "call", "expected"),
    [
        ("loop", {"seed": 1}, RESULT),
        ("loop", {"seed": 2}, ["fill_", *RESULT]),
        ("loop", {"seed": 1, "sample_offset": 2}, ["arange", *RESULT]),
        ("loop", {"seed": 1, "x_T": latents()}, [*TAKEN, *RESULT]),
        ("loop", {"seed": 1, "return_trajectory": True}, RESULT),
        (True, {"seed": 1}, [*REWOUND, "normal_out", *RESULT]),
        (True, {"seed": 2}, [*REWOUND, "fill_", "normal_out", *RESULT]),
        (True, {"seed": 1, "x_T": latents()}, [*REWOUND, *TAKEN, *RESULT]),
    ],
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_launches_beside_the_graph(mode, call, expected, eta, captures, monkeypatch):
    """A call launches these operators besides its graphs, for a seed that it had before or a new
    one.
    """
    sampler = Sampler(same, 4, shape=SHAPE, schedule=LINEAR, eta=eta, graph=mode)
    sampler(**call)
    sampler(seed=1)
    monkeypatch.setattr(RecordedGraph, "replay", lambda self: None)
    with Launches() as mode:
        sampler(**call)
    if eta == 0 and "x_T" in call:
        expected = [name for name in expected if name != "fill_"]
    assert mode.ran == expected


def test_given_noise_of_all_steps_is_one_copy(captures, monkeypatch):
    sampler = Sampler(same, 4, shape=SHAPE, schedule=LINEAR, eta=1.0, graph="loop")
    call = {"x_T": latents(), "noise": latents((4, *SHAPE))}
    sampler(**call)
    monkeypatch.setattr(RecordedGraph, "replay", lambda self: None)
    with Launches() as mode:
        sampler(**call)
    assert mode.ran == [*TAKEN, "copy_", *RESULT]


class Name(str):
    """A string subclass with methods of its own."""


class TestKey:
    """Calls that share a graph, and calls that do not."""

    def count(self, captures, calls, model=None):
        """The number of graphs captured after each call, all of them correct."""
        model = Scaled() if model is None else model
        counts = []
        for call in calls:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message="fastddim: model: expected a network in")
                own = sample(model, **{"mode": True, **call})
            assert own is not None
            counts.append(len(captures))
        return counts

    @pytest.mark.parametrize(
        "change",
        [
            {"shape": (3, 3, 6, 6)},
            {"dtype": torch.float64},
            {"steps": 5},
            {"mode": "loop"},
            {"mode": "auto", "progress": True},
            {"impl": "reference"},
            {"eta": 1.0},
            {"eta": torch.tensor([0.0, 1.0])},
            {"guidance_scale": 2.0},
            {"guidance_scale": torch.tensor([1.0, 2.0])},
            {"callback": lambda *_: None},
            {"mode": "loop", "return_trajectory": True},
            {"eta": 1.0, "noise": latents((4, *SHAPE))},
            {"eta": 1.0, "noise": latents((4, *SHAPE), dtype=torch.float64)},
            {"eta": 1.0, "noise": generator(1)},
            {"model_kwargs": {"scale": 0.5}},
            {"model_kwargs": {"scale": torch.ones(2, 1, 1, 1)}},
            {"model_kwargs": {"scale": torch.ones(1, 1, 1, 1)}},
            {"model_kwargs": {"scale": torch.ones(2, 1, 1, 1, dtype=torch.float64)}},
            {"model_kwargs": {"label": "cat"}},
            {"model_kwargs": {"label": ["cat"]}},
            {"model_kwargs": {"label": -0.0}},
            {"model_kwargs": {"label": 0.0}},
        ],
        ids=lambda change: ",".join(f"{k}={str(v)[:24]}" for k, v in change.items()),
    )
    def test_what_needs_another(self, change, captures):
        # Twice: a graph of its own, then that graph again; and the first is still there.
        assert self.count(captures, [{}, change, {}, change]) == [1, 2, 2, 2]

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"eta": 1.0}, {"eta": torch.tensor([0.0, 1.0])}),
            ({"mode": "loop"}, {"mode": "loop", "return_trajectory": True}),
            ({"eta": 1.0}, {"eta": 1.0, "noise": latents((4, *SHAPE))}),
        ],
        ids=["rows", "trajectory of a loop", "noise"],
    )
    def test_what_differs_in_one_thing(self, first, second, captures):
        assert self.count(captures, [first, second, first, second]) == [1, 2, 2, 2]

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"label": 1}, {"label": 1.0}),
            ({"label": 1}, {"label": True}),
            ({"label": 0.0}, {"label": -0.0}),
            ({"label": (1, 2)}, {"label": [1, 2]}),
            ({"label": None}, {}),
            ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
            ({"label": object()}, {"label": object()}),
            ({"label": "cat"}, {"label": Name("cat")}),
            ({"label": torch.float32}, {"label": torch.float64}),
        ],
        # Without addresses, which differ from one worker of pytest-xdist to the next.
        ids=lambda kwargs: str(kwargs).partition(" at 0x")[0],
    )
    def test_arguments_that_are_alike(self, first, second, captures):
        calls = [{"model_kwargs": kwargs} for kwargs in (first, second, first, second)]
        assert self.count(captures, calls) == [1, 2, 2, 2]

    def test_what_shares_one(self, captures):
        calls = [
            {"eta": 1.0},
            {"eta": 0.5},
            {"eta": 1.0, "seed": [5, 6]},
            {"eta": 1.0, "x_T": latents()},
            {"eta": 1.0, "progress": True},
            {"eta": 1.0, "return_trajectory": True},
            {"eta": 1.0, "schedule": Schedule.cosine(), "spacing": "leading", "clip": 1.0},
            {"eta": 1.0, "model_kwargs": {}},
        ]
        assert self.count(captures, calls) == [1] * len(calls)

    def test_registered_generators_by_identity(self, captures, monkeypatch):
        monkeypatch.setattr(capture, "draws_inside", lambda generators, device: True)
        one, other = generator(1), generator(1)
        calls = [{"eta": 1.0, "noise": g} for g in (one, other, one, [one, other], [one, other])]
        assert self.count(captures, calls) == [1, 2, 2, 3, 3]

    @pytest.mark.parametrize(
        ("enter", "leave"),
        [
            (lambda m: m.train(), lambda m: m.eval()),
            (lambda m: m.net.train(), lambda m: m.net.eval()),
            (
                lambda m: torch.set_default_dtype(torch.float64),
                lambda m: torch.set_default_dtype(torch.float32),
            ),
            (
                lambda m: torch.use_deterministic_algorithms(False),
                lambda m: torch.use_deterministic_algorithms(True, warn_only=True),
            ),
        ],
        ids=["training", "inner training", "default dtype", "deterministic"],
    )
    def test_states(self, enter, leave, captures):
        model = Scaled().eval()
        counts = self.count(captures, [{}], model)
        try:
            enter(model)
            counts += self.count(captures, [{}, {}], model)
        finally:
            leave(model)
        counts += self.count(captures, [{}], model)
        assert counts == [1, 2, 2, 2]

    def test_autocast(self, captures):
        model, counts = Scaled(), []
        for dtype in (None, torch.bfloat16, torch.float16, torch.bfloat16, None):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                counts += self.count(captures, [{}], model)
        assert counts == [1, 2, 3, 3, 3]

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda net: net,
            lambda net: net.forward,
            functools.partial,
            lambda net: functools.partial(Scaled.forward, net),
            lambda net: lambda x, t: net(x, t) * 1,
            lambda net: type("Wrapper", (), {"__call__": lambda s, x, t: s.inner(x, t)})(),
        ],
        ids=["module", "method", "partial", "partial of a function", "closure", "instance"],
    )
    def test_parameters_that_moved(self, wrap, captures):
        net = Scaled()
        model = wrap(net)
        if type(model).__name__ == "Wrapper":
            model.inner = net
        assert self.count(captures, [{}, {}], model) == [1, 1]
        with torch.no_grad():
            net.net.weight.mul_(0.5)
        assert torch.equal(sample(model, True), sample(model, False))
        assert len(captures) == 1
        net.net.weight = nn.Parameter(net.net.weight.detach() * 2)
        assert torch.equal(sample(model, True), sample(model, False))
        assert len(captures) == 2

    def test_dtype_of_the_model(self, captures):
        model = Scaled()
        assert self.count(captures, [{}], model) == [1]
        model.double()
        assert torch.equal(sample(model, True), sample(model, False))
        assert len(captures) == 2

    def test_unused_values_do_not_count(self, captures):
        """Unused values do not count: noise that no step adds is not part of anything."""
        calls = [{}, {"noise": latents((4, *SHAPE))}]
        assert self.count(captures, calls) == [1, 1]


class Nested(nn.Module):
    """A module with modules in modules, buffers, and names registered as None."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2))])
        self.register_parameter("none", None)
        self.register_module("no_module", None)
        self.register_buffer("shift", torch.zeros(2))


def swapped(net):
    torch.utils.swap_tensors(net.blocks[0].weight, nn.Parameter(torch.ones(2, 2)))


def reborn(net):
    vars(net.blocks[0]).update(vars(nn.Linear(2, 2)))


MOVED = {
    "data": lambda net: setattr(net.blocks[0].weight, "data", torch.ones(2, 2)),
    "parameter": lambda net: setattr(net.blocks[0], "bias", nn.Parameter(torch.ones(2))),
    "a parameter in place of none": lambda net: setattr(net, "none", nn.Parameter(torch.ones(2))),
    "no parameter any more": lambda net: setattr(net.blocks[0], "bias", None),
    "buffer": lambda net: setattr(net, "shift", torch.ones(2)),
    "inner buffer": lambda net: setattr(net.blocks[1][0], "running_mean", torch.ones(2)),
    "another buffer": lambda net: net.blocks[0].register_buffer("scale", torch.ones(2)),
    "dtype": lambda net: net.double(),
    "dtype alone": lambda net: setattr(net.shift, "data", net.shift.data.view(torch.int32)),
    "assigned state": lambda net: net.load_state_dict(
        {name: value.clone() for name, value in net.state_dict().items()}, assign=True
    ),
    "module": lambda net: net.blocks.__setitem__(0, nn.Linear(2, 2)),
    "inner module": lambda net: net.blocks[1].__setitem__(0, nn.BatchNorm1d(2)),
    "another module": lambda net: net.blocks.append(nn.Linear(2, 2)),
    "a module in place of none": lambda net: setattr(net, "no_module", nn.Linear(2, 2)),
    "a module in a leaf": lambda net: net.blocks[0].add_module("inner", nn.Linear(2, 2)),
    "one module less": lambda net: net.blocks.pop(0),
    "parametrization": lambda net: nn.utils.parametrizations.weight_norm(net.blocks[0]),
    "swapped": swapped,
    "everything of a module": reborn,
}

TRAINING = {
    "all": lambda net: net.eval(),
    "one": lambda net: net.blocks[1][0].eval(),
    "a list": lambda net: setattr(net.blocks, "training", False),
}

UNCHANGED = {
    "nothing": lambda net: None,
    "values": lambda net: net.blocks[0].weight.data.mul_(0.5),
    "loaded state": lambda net: net.load_state_dict(net.state_dict()),
    "the same dtype": lambda net: net.float().train(),
    "gradients": lambda net: net.requires_grad_(False),
}


class TestModelState:
    """Changes that drop a graph are seen without walking the model again."""

    @pytest.mark.parametrize("change", MOVED)
    def test_what_moves(self, change):
        net = Nested()
        state = model_state.ModelState(net)
        before = state.read()
        MOVED[change](net)
        after = state.read()
        assert after[0] != before[0]
        assert state.read() == after == model_state.ModelState(net).read()

    @pytest.mark.parametrize("change", TRAINING)
    def test_what_trains(self, change):
        net = Nested()
        state = model_state.ModelState(net)
        before = state.read()
        TRAINING[change](net)
        assert state.read()[0] == before[0]
        assert state.read()[1] != before[1]

    @pytest.mark.parametrize("change", UNCHANGED)
    def test_what_stays(self, change):
        net = Nested()
        state = model_state.ModelState(net)
        before = state.read()
        UNCHANGED[change](net)
        assert state.read() == before
        assert hash(state.read()) == hash(before)

    def test_models_that_show_others(self):
        """A cell, an attribute or the arguments of a partial may show another module."""

        class Holder:
            def __call__(self, x, t):
                return self.net(x)

        holder, cell = Holder(), nn.Linear(2, 2)
        holder.net = nn.Linear(2, 2)
        state = model_state.ModelState(holder, lambda x, t: cell(x), None)
        seen = [state.read()]
        holder.net = nn.Linear(2, 2)
        seen.append(state.read())
        cell = nn.Linear(2, 2)
        seen.append(state.read())
        assert len(set(seen)) == 3
        assert state.read() == seen[-1]

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
    def test_a_scripted_model(self):
        net = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
        state = model_state.ModelState(net)
        before = state.read()
        assert state.read() == before
        net.double()
        assert state.read()[0] != before[0]
        assert len(before[0][0]) == 2

    def test_tensors_without_an_address(self):
        """Tensors without an address count by identity."""
        net = nn.LazyLinear(2)
        state = model_state.ModelState(net, nn.Linear(2, 2, device="meta"))
        before = state.read()
        assert state.read() == before
        net(torch.zeros(1, 2))
        assert state.read()[0] != before[0]

    def test_the_model_is_walked_once(self, monkeypatch):
        net = Nested()
        state = model_state.ModelState(net)
        before = state.read()

        def walked(*args, **kwargs):
            raise AssertionError("the model is walked again")

        for name in ("named_modules", "named_parameters", "named_buffers", "children"):
            monkeypatch.setattr(nn.Module, name, walked)
        with NoSync() as mode:
            assert state.read() == before
        assert mode.calls == 0
        net.shift = torch.ones(2)
        assert state.read() != before
        net.blocks = nn.ModuleList()
        with pytest.raises(AssertionError, match="walked again"):
            state.read()

    def test_replaced_parameters_are_not_held(self):
        net = Nested()
        state = model_state.ModelState(net)
        state.read()
        ref = weakref.ref(net.blocks[0].weight)
        net.blocks[0].weight = nn.Parameter(torch.ones(2, 2))
        assert ref() is None


class TestShelf:
    """The pool: loops that wait for the next call."""

    def test_bound(self, captures):
        models = [Scaled() for _ in range(programs.KEPT + 1)]
        for model in models:
            sample(model, True)
        assert len(pool.POOL) == programs.KEPT
        for model in models[1:]:
            sample(model, True)
        assert len(captures) == len(models)
        sample(models[0], True)
        assert len(captures) == len(models) + 1
        sample(models[1], True)
        assert len(captures) == len(models) + 2

    def test_graphs_of_a_loop_are_bounded(self, captures):
        model = Scaled()
        # The first is used again before the last pushes one out.
        for label in (*range(programs.KEPT), 0, programs.KEPT):
            sample(model, True, model_kwargs={"label": label})
        alive = [weakref.ref(captured) for captured in captures]
        captures.clear()
        kept = [ref() is not None for ref in alive]
        assert kept == [True, False] + [True] * (programs.KEPT - 1)

    def test_nothing_is_kept_without_graphs(self, captures):
        sample(Scaled(), False)
        sample(Scaled(), "auto", check_finite=True)
        assert len(pool.POOL) == 0
        assert len(captures) == 0

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_a_model_that_dies_takes_its_loop_along(self, mode, captures):
        net = Scaled()
        models = [Scaled(), lambda x, t: x * 0.5, functools.partial(same)]
        for model in (*models, net.forward):
            sample(model, mode)
        assert len(pool.POOL) == 4
        refs = [weakref.ref(captured) for captured in captures]
        captures.clear()
        gc.collect()
        gc.disable()
        try:
            del model
            for left in (3, 2, 1):
                models.pop(0)
                assert len(pool.POOL) == left
            del net
            assert len(pool.POOL) == 0
            assert [ref() for ref in refs] == [None] * 4
        finally:
            gc.enable()

    def test_methods_of_one_object(self, captures):
        class Two:
            def first(self, x, t):
                return x * 0.5

            def second(self, x, t):
                return x * 0.25

        two, other = Two(), Two()
        for method in (two.first, two.second, two.first, other.first, two.second):
            assert torch.equal(sample(method, True), sample(method, False))
        assert len(captures) == 3

    def test_a_model_that_cannot_be_watched(self, captures):
        class Slots:
            __slots__ = ()

            def __call__(self, x, t):
                return x * 0.5

        model = Slots()
        for _ in range(2):
            assert torch.equal(sample(model, True), sample(model, False))
        assert len(captures) == 2
        assert len(pool.POOL) == 0

    def test_calls_within_calls_have_loops_of_their_own(self, captures):
        model, inner = Scaled(), []

        def callback(s, t, x_t, x_0):
            inner.append(sample(model, True, seed=s))

        own = sample(model, True, seed=9, callback=callback)
        assert torch.equal(own, sample(model, False, seed=9))
        for s, drawn in enumerate(inner):
            assert torch.equal(drawn, sample(model, False, seed=s))
        # The outer call's; the inner calls' first, which the others found again.
        assert len(captures) == 2

    def test_threads_have_loops_of_their_own(self, captures):
        model = Scaled()
        expected = [sample(model, False, seed=seed) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            own = list(pool.map(lambda seed: sample(model, True, seed=seed), range(8)))
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))

    def test_an_error_discards_the_loop(self, captures):
        model = Scaled()

        def callback(s, t, x_t, x_0):
            if s == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample(model, True, callback=callback)
        assert len(pool.POOL) == 0
        assert torch.equal(sample(model, True), sample(model, False))
        assert len(captures) == 2

    def test_wrong_input_does_not_cost_a_graph(self, captures):
        model = Scaled()
        sample(model, True)
        with pytest.raises(ValueError, match=r"^eta"):
            sample(model, True, eta=-1.0)
        with pytest.raises(ValueError, match=r"^alphas_cumprod"):
            sample(model, True, schedule=Schedule.linear(20000), spacing="trailing")
        sample(model, True)
        assert len(captures) == 1

    def test_clear(self, captures):
        model = Scaled()
        sample(model, True)
        ref = weakref.ref(captures.pop())
        graph.clear()
        assert ref() is None
        sample(model, True)
        assert len(captures) == 1

    def test_the_loop_holds_nothing_of_the_callers(self, captures):
        scale, schedule = torch.ones(1, 1, 1, 1), Schedule.cosine()
        refs = [weakref.ref(v) for v in (scale, schedule)]
        model = Scaled()
        sample(model, True, model_kwargs={"scale": scale}, schedule=schedule)
        del scale, schedule
        assert [ref() for ref in refs] == [None, None]
        assert len(pool.POOL) == 1


class TestSamplerObject:
    @pytest.mark.parametrize("mode", CAPTURED)
    def test_calls_share_a_graph(self, mode, captures):
        model, scale = Scaled(), torch.ones(1, 1, 1, 1)
        kind = {"shape": SHAPE, "eta": 1.0, "model_kwargs": {"scale": scale}}
        sampler = Sampler(model, 4, graph=mode, **kind)
        eager = Sampler(model, 4, graph=False, **kind)
        for call in ({"seed": 1}, {"x_T": latents(), "seed": 2}, {"seed": [1, 2]}):
            assert torch.equal(sampler(**call), eager(**call))
            scale.mul_(0.75)
        count = 2 if mode == "loop" else 1  # with the latents in it, and without
        assert len(captures) == count
        assert len(pool.POOL) == 0
        model.net.weight = nn.Parameter(model.net.weight.detach() * 0.5)
        assert torch.equal(sampler(seed=0), eager(seed=0))
        assert len(captures) == count + 1

    def test_graphs_of_moved_parameters_go(self, captures):
        model = Scaled()
        sampler = Sampler(model, 4, shape=SHAPE, graph=True)
        sampler()
        ref = weakref.ref(captures.pop())
        model.net.weight = nn.Parameter(model.net.weight.detach() * 0.5)
        sampler()
        assert ref() is None

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_graph_and_buffers_go_with_the_sampler(self, mode, captures):
        model = Scaled()
        gc.collect()
        gc.disable()
        try:
            sampler = Sampler(model, 4, shape=SHAPE, graph=mode, eta=1.0)
            sampler(return_trajectory=True)
            sampler(noise=latents((4, *SHAPE)))
            things = [sampler, sampler._loop, sampler._loop.buffers.state, *captures]
            refs = [weakref.ref(thing) for thing in things]
            captures.clear()
            del sampler, things
            assert [ref() for ref in refs] == [None] * 5
        finally:
            gc.enable()

    def test_a_failed_capture_leaves_no_cycle(self, captures):
        def model(x, t):
            return x * x.sum().item()

        gc.collect()
        gc.disable()
        try:
            sampler = Sampler(model, 4, shape=SHAPE)
            with pytest.warns(UserWarning, match="without a CUDA graph"):
                sampler()
            ref = weakref.ref(sampler._loop)
            del sampler
            assert ref() is None
        finally:
            gc.enable()

    def test_one_call_at_a_time(self, captures):
        sampler = Sampler(Scaled(), 4, shape=SHAPE, graph=True)
        expected = sampler(seed=1)
        with pytest.raises(RuntimeError, match=r"^Sampler: expected one call at a time"):
            sampler(callback=lambda *_: sampler())
        assert torch.equal(sampler(seed=1), expected)


@pytest.fixture
def outer(captures, monkeypatch):
    """Captures the calls of the user, as `torch.cuda.graph` would."""

    def capture(body):
        with monkeypatch.context() as patch:
            patch.setattr(transfer, "captured", lambda device: True)
            return RecordedGraph(body)

    return capture


class TestInACaptureOfTheCallers:
    """Everything runs eagerly, into the caller's graph."""

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize(
        ("used_before", "call"),
        [
            (False, {"seed": 3}),
            (True, {"x_T": latents(), "seed": 4}),
            (True, {"noise": latents((4, *SHAPE)), "seed": 4, "sample_offset": 7}),
        ],
        ids=["seed", "x_T", "noise"],
    )
    def test_a_sampler(self, impl, used_before, call, captures, outer):
        model = SmallNet()
        kind = {"shape": SHAPE, "eta": 1.0, "impl": impl}
        sampler, results = Sampler(model, 4, **kind), []
        if used_before:
            sampler(seed=1, return_trajectory=True)
        expected = Sampler(model, 4, graph=False, **kind)(**call, return_trajectory=True)
        theirs = outer(lambda: results.append(sampler(**call, return_trajectory=True)))
        assert len(captures) == used_before
        assert results[0].isnan().all()
        for seed in (5, 6):
            theirs.replay()
            assert torch.equal(results[0], expected)
            assert not torch.equal(sampler(seed=seed), expected[-1])
        assert len(captures) <= 2

    def test_follows_what_is_written_in_place(self, captures, outer):
        model, x_T, results = SmallNet(), latents(), []
        sampler = Sampler(model, 4, shape=SHAPE)
        theirs = outer(lambda: results.append(sampler(x_T=x_T)))
        for factor in (1.0, 0.5):
            x_T.mul_(factor)
            model.weight.data.mul_(factor)
            theirs.replay()
            assert torch.equal(results[0], sample(model, False, x_T=x_T))

    def test_sample(self, captures, monkeypatch):
        """`sample` takes no loop from the pool: a later call would load other values into it."""
        model = SmallNet()
        sample(model, "auto")
        (kept,) = pool.POOL._entries.values()
        for call in ({}, {"seed": 3}, {"seed": [1, 2]}):
            expected = sample(model, False, **call)
            with monkeypatch.context() as patch:
                patch.setattr(transfer, "captured", lambda device: True)
                patch.setattr(RecordedGraph, "replay", None)
                assert torch.equal(sample(model, "auto", **call), expected)
                inverted = fastddim.invert(model, expected, 4)
            assert torch.equal(inverted, fastddim.invert(model, expected, 4, graph=False))
        (left,) = pool.POOL._entries.values()
        assert left is kept
        assert len(captures) == 2

    def test_a_stream(self, captures, monkeypatch):
        stream = fastddim.Stream(elementwise_model, shape=(2, *SHAPE[1:]))
        stream.submit(4, seed=9)
        stream.run()
        assert len(captures) == 1
        monkeypatch.setattr(transfer, "captured", lambda device: True)
        monkeypatch.setattr(RecordedGraph, "replay", None)
        tickets = [stream.submit(4, seed=s, eta=1.0) for s in range(3)]
        stream.run()
        for s, ticket in enumerate(tickets):
            expected = sample(elementwise_model, False, shape=(1, *SHAPE[1:]), seed=s, eta=1.0)
            assert torch.equal(ticket.result(0), expected)
        assert len(captures) == 1

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_a_graph_of_our_own_is_refused(self, mode, captures, monkeypatch):
        def untouched(x, t):
            raise AssertionError("called")

        sampler = Sampler(untouched, 4, shape=SHAPE, graph=mode)
        stream = fastddim.Stream(untouched, shape=SHAPE, graph=True)
        ticket = stream.submit(4)
        monkeypatch.setattr(transfer, "captured", lambda device: True)
        for call in (
            lambda: sample(untouched, mode),
            lambda: fastddim.invert(untouched, latents(), 4, graph=mode),
            lambda: Sampler(untouched, 4, shape=SHAPE, graph=mode),
            sampler,
        ):
            with NoSync() as probe, pytest.raises(ValueError, match=r"^graph: ") as caught:
                call()
            assert probe.calls <= 1  # on which device is asked
            assert str(caught.value) == (
                "graph: expected 'auto' or False while a CUDA graph is being captured, which "
                f"cannot hold the capture of another, got {mode!r}"
            )
        for call in (lambda: fastddim.Stream(untouched, shape=SHAPE, graph=True), stream.step):
            with pytest.raises(ValueError, match=r"^graph: expected 'auto' or False while"):
                call()
        assert not ticket.done()
        assert (stream.pending, stream.running) == (1, 0)

    def test_waiting_is_refused(self, captures, monkeypatch):
        sampler = Sampler(elementwise_model, 4, shape=SHAPE, check_finite=True)
        stream = fastddim.Stream(elementwise_model, shape=SHAPE, check_finite=True)
        monkeypatch.setattr(transfer, "captured", lambda device: True)
        for call in (
            lambda: sample(elementwise_model, "auto", check_finite=True),
            lambda: fastddim.Stream(elementwise_model, shape=SHAPE, check_finite=True),
            sampler,
            stream.step,
        ):
            with pytest.raises(ValueError, match=r"^check_finite: expected False while a CUDA gr"):
                call()
        for noise in (generator(1), [generator(1), generator(2)]):
            with pytest.raises(ValueError, match=r"^noise: .*cannot draw on the host, got one on"):
                sample(elementwise_model, "auto", eta=1.0, noise=noise)
            with pytest.raises(ValueError, match=r"^noise: "):
                fastddim.step(latents(), latents(), 0.5, 0.75, eta=1.0, noise=noise)

    def test_a_step_keeps_nothing_for_later_calls(self, captures, monkeypatch):
        from fastddim import single

        x = latents()
        expected = fastddim.step(x, x, 0.375, 0.75, eta=1.0, seed=3)
        single._remembered_step.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(transfer, "captured", lambda device: True)
            assert torch.equal(fastddim.step(x, x, 0.375, 0.75, eta=1.0, seed=3), expected)
        assert single._remembered_step.cache_info().currsize == 0


def doubled(x, t):
    return torch.cat([x, x], 1)


ODD = {
    "a step's noise": {"eta": 1.0, "make_noise": True},
    "rows": {"eta": torch.tensor([0.0, 1.0, 0.5]), "make_noise": True},
    "drawn": {"eta": 1.0, "guidance_scale": 2.0},
    "guided": {"guidance_scale": torch.tensor([1.0, 2.0, 3.0]), "guidance_rescale": 0.5},
    "order 2": {"order": 2},
    "thresholding": {"dynamic_thresholding_ratio": 0.9, "eta": 0.5, "make_noise": True},
    "x_0 hook": {"denoised_fn": lambda x_0, t: x_0 * 0.5},
    "mask": {"mask": torch.ones(1)},
    "learned variance": {"model": doubled, "eta": 1.0, "make_noise": True},
}


def draw_odd(kind, inner, dtype, impl, mode="loop"):
    kind = dict(kind)
    shape = (3, *inner)
    if kind.pop("make_noise", False):
        kind["noise"] = latents((4, *shape), dtype=dtype)
    if "mask" in kind:
        kind["known"] = latents(shape, dtype=dtype)
    model = kind.pop("model", same)
    return sample(model, mode, shape=shape, dtype=dtype, impl=impl, **kind)


@pytest.fixture
def specialized(monkeypatch):
    """The kernels of Triton that a warm-up asks for, and those that the body under capture asks
    for.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    from gpucheck import triton_jit

    from fastddim.backends import triton

    launched, warm, captured = [], [], []

    def record(body, warm_up, device, generators):
        launched.clear()
        warm_up()
        warm.extend(launched)
        launched.clear()
        recorded = RecordedGraph(body)
        captured.extend(launched)
        return recorded

    monkeypatch.setattr(cuda, "record", record)
    monkeypatch.setattr(cuda, "available", lambda device: True)
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    # Counters do not advance here.
    monkeypatch.setattr(triton, "rescale_rows", lambda *_: None)
    with triton_jit.compiled_for(
        triton_jit.SM_90, launched.append, stand_in=triton_jit.Specializer
    ):
        yield warm, captured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [(1,), (3, 5, 7), (3, 2, 2)], ids=str)
class TestAlignment:
    """No step of a graph asks for other kernels than the warm-up had compiled."""

    @pytest.mark.parametrize("kind", ODD)
    def test_loops(self, kind, inner, dtype, specialized):
        draw_odd(ODD[kind], inner, dtype, "triton")
        latents = set() if "mask" in ODD[kind] else {"normal_kernel"}
        self.check(*specialized, {*latents, "update_kernel"})

    @pytest.mark.parametrize("guided", [False, True])
    def test_streams(self, guided, inner, dtype, specialized):
        kind = {"guided": guided, "dtype": dtype, "impl": "triton", "graph": True}
        stream = fastddim.Stream(same, shape=(3, *inner), **kind)
        tickets = [
            stream.submit(s, seed=s, eta=1.0, guidance_scale=2.0 if guided else None)
            for s in (3, 1, 2, 2)
        ]
        stream.run()
        assert [ticket.exception(0) for ticket in tickets] == [None] * 4
        self.check(*specialized, {"update_kernel", "advance_kernel"})

    def check(self, warm, captured, launched):
        assert {name for name, *_ in captured} == launched
        assert set(captured) <= set(warm)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_given_noise(self, impl, inner, dtype, captures, monkeypatch):
        """Rows of given noise begin where tensors of their own would, and hold the given values."""
        backend = fastddim.backends.BACKENDS[impl]
        original, addresses = backend.update_out, []

        def update_out(*args, noise, **rest):
            addresses.append(noise.data_ptr() % 16)
            assert noise.is_contiguous()
            return original(*args, noise=noise, **rest)

        expected = draw_odd(ODD["a step's noise"], inner, dtype, impl, mode=False)
        monkeypatch.setattr(backend, "update_out", update_out)
        own = draw_odd(ODD["a step's noise"], inner, dtype, impl)
        assert torch.equal(own, expected)
        assert len(addresses) > cuda.WARM_UPS
        assert not any(addresses)


def uncapturable(x, t, **kwargs):
    return x * 0.5 + x.sum().item() * 0


class TestFallback:
    def test_one_warning_that_says_why(self, captures):
        expected = sample(uncapturable, False)
        with pytest.warns(UserWarning, match="fastddim") as caught:
            assert torch.equal(sample(uncapturable, "auto"), expected)
        assert [str(w.message) for w in caught] == [
            "fastddim: graph='auto' runs without a CUDA graph: AssertionError: "
            "host synchronisation in the loop: aten._local_scalar_dense.default"
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(sample(uncapturable, "auto"), expected)
        sampler = Sampler(uncapturable, 4, shape=SHAPE)
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            sampler(seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(sampler(seed=0), expected)

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_a_named_mode_raises(self, mode, captures):
        for call in (
            lambda: sample(uncapturable, mode),
            Sampler(uncapturable, 4, shape=SHAPE, graph=mode),
            lambda: fastddim.invert(uncapturable, latents(), 4, graph=mode),
        ):
            with pytest.raises(ValueError, match=r"^graph: ") as caught:
                call()
            assert str(caught.value) == (
                "graph: expected 'auto' or False where capture fails (AssertionError: host "
                f"synchronisation in the loop: aten._local_scalar_dense.default), got {mode!r}"
            )
            assert isinstance(caught.value.__cause__, CaptureError)

    def test_generators_are_as_before(self, captures):
        """Generators are as before a failed capture: x_T is drawn before it, and the noise of the
        steps after it.
        """
        own, expected = generator(3), generator(3)
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            result = sample(uncapturable, "auto", eta=1.0, noise=own)
        assert torch.equal(result, sample(uncapturable, False, eta=1.0, noise=expected))
        assert torch.equal(own.get_state(), expected.get_state())

    @pytest.mark.parametrize("mode", ["auto", *CAPTURED])
    def test_a_model_that_raises_raises(self, mode, captures):
        class OwnError(Exception):
            pass

        def model(x, t):
            raise OwnError("in the model")

        state = torch.get_rng_state()
        with pytest.raises(OwnError, match=r"^in the model$"):
            sample(model, mode)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.is_autocast_cache_enabled()
        with pytest.raises(ValueError, match=r"^model output: expected shape"):
            sample(lambda x, t: x[:1], mode)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (
                torch.ones(2, 1, 1, 1, device="meta"),
                "a tensor on meta, whose values a graph on cpu",
            ),
            (latents().numpy(), "a NumPy array, whose values a graph would not follow"),
        ],
        ids=["device", "array"],
    )
    def test_arguments_whose_values_would_be_frozen(self, value, reason, captures):
        def model(x, t, extra):
            return x * 0.5

        kwargs = {"model_kwargs": {"extra": [value]}}
        with pytest.raises(ValueError, match=rf"^graph: expected .*{re.escape(reason)}.* got True"):
            sample(model, True, **kwargs)
        with pytest.warns(UserWarning, match=re.escape(reason)):
            own = sample(model, "auto", **kwargs)
        assert torch.equal(own, sample(model, False, **kwargs))
        assert len(captures) == 0
        kwargs["model_kwargs"]["extra"] = torch.ones(1)
        sample(model, "auto", **kwargs)
        assert len(captures) == 2

    def test_check_finite(self, captures):
        def untouched(x, t):
            raise AssertionError("called")

        for call in (
            lambda mode: sample(untouched, mode, check_finite=True),
            lambda mode: Sampler(untouched, 4, shape=SHAPE, graph=mode, check_finite=True),
            lambda mode: fastddim.invert(untouched, latents(), 4, graph=mode, check_finite=True),
        ):
            for mode in CAPTURED:
                with pytest.raises(ValueError, match=r"^graph: ") as caught:
                    call(mode)
                assert str(caught.value) == (
                    "graph: expected 'auto' or False with check_finite=True, which waits for the "
                    f"device at every step, got {mode!r}"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            own = sample(elementwise_model, "auto", check_finite=True)
        assert torch.equal(own, sample(elementwise_model, False))
        assert len(captures) == 0

    def test_callback_of_a_whole_loop(self, captures):
        def untouched(x, t):
            raise AssertionError("called")

        for call in (
            lambda **k: sample(untouched, "loop", **k),
            Sampler(untouched, 4, shape=SHAPE, graph="loop"),
            lambda **k: fastddim.invert(untouched, latents(), 4, graph="loop", **k),
        ):
            with pytest.raises(ValueError, match=r"^callback: ") as caught:
                call(callback=print)
            assert str(caught.value) == (
                "callback: expected None with graph='loop', which runs all steps as one, "
                f"got {print!r}"
            )


def test_compiled_models(captures):
    torch._dynamo.reset()
    model = Scaled()
    compiled = torch.compile(model, backend="aot_eager")
    expected = sample(model, False)
    for mode in CAPTURED:
        torch.testing.assert_close(sample(compiled, mode), expected)
        torch.testing.assert_close(sample(compiled, mode), expected)
    assert len(captures) == 2


class Driver:
    """A record of the calls of torch.cuda by `cuda.record` and `StreamOrder`, in order."""

    def __init__(self, monkeypatch, end_fails=False):
        self.log = log = []
        self.streams = ["current"]
        driver = self

        class Stream:
            def __init__(self, name="side"):
                self.name, self.cuda_stream = name, hash(name)

            def __eq__(self, other):
                return self.name == other.name

            __hash__ = None

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                log.append(f"{self.name} waits for the event on {event.stream.name}")

        class Event:
            def record(self, stream):
                self.stream = stream
                log.append(f"event on {stream.name}")

        class CUDAGraph:
            def register_generator_state(self, generator):
                log.append("register")

            def capture_begin(self, pool, capture_error_mode):
                log.append(f"begin on {driver.streams[-1]}, {capture_error_mode}, {pool}")

            def capture_end(self):
                nonlocal end_fails
                failing, end_fails = end_fails, False
                log.append("end fails" if failing else "end")
                if failing:
                    raise RuntimeError("invalidated")

            def replay(self):
                log.append("replay")

        @contextmanager
        def stream(entered):
            driver.streams.append(entered.name)
            try:
                yield
            finally:
                driver.streams.pop()

        @contextmanager
        def device(entered):
            log.append(f"on {entered}")
            yield
            log.append("off")

        pools = iter(("pool 1", "pool 2"))
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "device": device,
            "current_stream": lambda *_: Stream(driver.streams[-1]),
            "graph_pool_handle": lambda: next(pools),
            "synchronize": lambda: log.append("synchronize"),
            "empty_cache": lambda: log.append("empty"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("clearCublasWorkspaces", "endAllocateToPool", "releasePool"):
            monkeypatch.setattr(
                torch._C,
                f"_cuda_{name}",
                lambda *a, name=name: log.append(" ".join([name, *map(str, a)])),
                raising=False,
            )
        monkeypatch.setattr(
            torch._C,
            "_cuda_getCurrentRawStream",
            lambda index: hash(driver.streams[-1]),
            raising=False,
        )
        monkeypatch.setattr(cuda, "_side_streams", {})
        nodes = {hash("side"): 7}
        monkeypatch.setattr(driver_module, "captured_nodes", nodes.__getitem__)
        self.captured = False
        monkeypatch.setattr(transfer, "captured", lambda device: self.captured)

    def record(self, body=None, warm_up=None, generators=()):
        log = self.log
        return cuda.record(
            body or (lambda: log.append("body")),
            warm_up or (lambda: log.append(f"warm up on {self.streams[-1]}")),
            CPU,
            generators,
        )


BEFORE = ["on cpu", "side waits for current", *["warm up on side"] * 2, "synchronize", "empty"]
BEGIN = ["clearCublasWorkspaces", "begin on side, thread_local, pool 1"]
AFTER = ["clearCublasWorkspaces", "current waits for side"]


class TestDriver:
    """The order of the calls that a capture makes to CUDA."""

    def test_capture(self, monkeypatch):
        driver = Driver(monkeypatch)
        recorded = driver.record()
        assert driver.log == [*BEFORE, *BEGIN, "body", "end", *AFTER, "off"]
        recorded.replay()
        assert driver.log.pop() == "replay"
        assert recorded.nodes == 7

    def test_generators_are_registered_before(self, monkeypatch):
        driver = Driver(monkeypatch)
        driver.record(generators=[generator(1), generator(2)])
        begin = driver.log.index(BEGIN[1])
        assert driver.log[begin - 2 : begin] == ["register", "register"]

    @pytest.mark.parametrize("error", [OSError("from the body"), KeyboardInterrupt("stop")])
    def test_a_body_that_fails(self, monkeypatch, error):
        driver = Driver(monkeypatch)

        def body():
            raise error

        expected = CaptureError if isinstance(error, Exception) else type(error)
        with pytest.raises(expected) as caught:
            driver.record(body)
        if isinstance(error, Exception):
            assert str(caught.value) == "OSError: from the body"
            assert caught.value.__cause__ is error
        assert driver.log == [*BEFORE, *BEGIN, "end", *AFTER]
        assert driver.streams == ["current"]

    @pytest.mark.parametrize("body_fails", [False, True])
    def test_an_end_that_fails(self, monkeypatch, body_fails):
        """An end that fails gives the pool up, and a trivial capture ends well; the body's error is
        the reason.
        """
        driver = Driver(monkeypatch, end_fails=True)

        def body():
            if body_fails:
                raise RuntimeError("operation not permitted when stream is capturing")

        reason = "operation not permitted when stream is capturing" if body_fails else "invalidated"
        with pytest.raises(CaptureError) as caught:
            driver.record(body, generators=[generator(1)])
        assert str(caught.value) == f"RuntimeError: {reason}"
        assert driver.log == [
            *BEFORE,
            BEGIN[0],
            "register",
            BEGIN[1],
            "end fails",
            "endAllocateToPool None pool 1",
            "releasePool None pool 1",
            "register",
            "begin on side, thread_local, pool 2",
            "end",
            *AFTER,
        ]

    def test_a_warm_up_that_fails(self, monkeypatch):
        driver = Driver(monkeypatch)

        def warm_up():
            raise OSError("from the model")

        with pytest.raises(OSError, match="from the model"):
            driver.record(warm_up=warm_up)
        assert driver.log == ["on cpu", "side waits for current", "current waits for side"]

    def test_turns(self, monkeypatch):
        driver = Driver(monkeypatch)
        turns = stream_order.StreamOrder(torch.device("cuda", 0))
        held = []

        class Buffer:
            def record_stream(self, stream):
                held.append(stream.name)

        for name in ("current", "other", "other", "current"):
            driver.streams = [name]
            with turns.use(lambda: [Buffer()]):
                driver.log.append("work")
        assert driver.log == [
            *("event on current", "work", "event on current"),
            *("other waits for the event on current", "work", "event on other"),
            *("work", "event on other"),
            *("current waits for the event on other", "work", "event on current"),
        ]
        assert held == ["other", "current"]
        with pytest.raises(KeyboardInterrupt), turns.use(lambda: []):
            raise KeyboardInterrupt
        assert driver.log[-1] == "event on current"

    def test_no_turns_in_a_capture_of_the_callers(self, monkeypatch):
        """No stream waits in a capture of the caller's: its stream may neither wait for an event
        from outside nor record one for outside.
        """
        driver = Driver(monkeypatch)
        before = stream_order.StreamOrder(torch.device("cuda", 0))
        driver.captured, driver.streams = True, ["captured"]
        inside = stream_order.StreamOrder(torch.device("cuda", 0))
        for turns in (before, inside):
            with turns.use(lambda: pytest.fail("a graph's replays are on any stream")):
                driver.log.append("work")
        assert driver.log == ["event on current", "work", "work"]
        driver.captured, driver.streams = False, ["other"]
        driver.log.clear()
        with before.use(lambda: []):
            driver.log.append("work")
        assert driver.log == ["other waits for the event on current", "work", "event on other"]


DRIVER = """
#include <stddef.h>
#include <stdint.h>

/* As CUDA's driver answers: a capture of five nodes on stream 7, one that failed on 8. */
int cuStreamGetCaptureInfo_v3(void *stream, int *status, uint64_t *id, void **graph,
                              const void ***nodes, const void **edges, size_t *count) {
  if (stream == (void *)9) return 400;
  *status = stream == (void *)7 ? 1 : stream == (void *)8 ? 2 : 0;
  *id = 1;
  *graph = (void *)0x123456789abcdef0;
  *nodes = NULL;
  *edges = NULL;
  *count = 1;
  return 0;
}

int cuGraphGetNodes(void *graph, void **nodes, size_t *count) {
  if (graph != (void *)0x123456789abcdef0 || nodes) return 1;
  *count = 5;
  return 0;
}
"""


@pytest.fixture
def fresh_driver():
    driver_module._library.cache_clear()
    yield
    driver_module._library.cache_clear()


@pytest.mark.usefixtures("fresh_driver")
class TestNodes:
    """The number of nodes in a capture so far, by the driver."""

    def test_are_counted(self, tmp_path, monkeypatch):
        compiler = shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs gcc for a library in the driver's place")
        source, library = tmp_path / "driver.c", tmp_path / "driver.so"
        source.write_text(DRIVER)
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
        monkeypatch.setattr(driver_module, "_LIBRARY", str(library))
        assert driver_module.captured_nodes(7) == 5
        # Nothing is captured there, the capture has failed, and the stream is none.
        assert [driver_module.captured_nodes(stream) for stream in (0, 8, 9)] == [None] * 3

    @pytest.mark.parametrize("library", ["libno-such-driver.so", "libm.so.6"])
    def test_no_such_driver(self, library, monkeypatch):
        monkeypatch.setattr(driver_module, "_LIBRARY", library)
        assert driver_module.captured_nodes(7) is None


def test_auto_is_eager_on_the_cpu():
    graph.clear()
    model = Scaled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(model, "auto"), sample(model, False))
    assert len(pool.POOL) == 0


class TestAdvance:
    """The operator: counters up by one, then the timesteps they stand at."""

    def arguments(self):
        counters = torch.tensor([2, 0, 1, 7, 2**40])
        timesteps = torch.tensor([900, 500, 300, 100, 2**33])
        return counters, timesteps, torch.full((3,), -1)

    @pytest.mark.parametrize("impl", [*CPU_IMPLS, "operator"])
    def test_values(self, impl):
        counters, timesteps, t = self.arguments()
        before = timesteps.clone()
        backend = ops if impl == "operator" else fastddim.backends.BACKENDS[impl]
        backend.advance(counters, timesteps, t)
        assert counters.tolist() == [3, 1, 2, 8, 2**40 + 1]
        assert t.tolist() == [100, 500, 300]
        assert torch.equal(timesteps, before)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_one_and_none(self, impl):
        backend = fastddim.backends.BACKENDS[impl]
        for n in (0, 1):
            counters = torch.full((n,), -1)
            t = torch.full((n,), 5)
            backend.advance(counters, torch.tensor([7]), t)
            assert t.tolist() == [7] * n
            assert counters.tolist() == [0] * n

    def test_opcheck(self):
        torch.library.opcheck(
            torch.ops.fastddim.advance.default,
            self.arguments(),
            test_utils=(
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_dynamic",
            ),
        )


@pytest.fixture(scope="session")
def probed(run_python, tmp_path_factory):
    """The findings of the probe on fake CUDA tensors for each case of
    tests/support/gpuless/capture.py.
    """
    arguments = []
    if torch.version.cuda is None and torch.version.hip is None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++ for the device guard of fake CUDA tensors")
        arguments = [build_guard(compiler, tmp_path_factory.mktemp("guard") / "guard.so")]
    result = run_python(GPULESS / "capture.py", *arguments, cwd=GPULESS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def build_guard(compiler, target):
    root = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-fPIC", "-shared", GPULESS / "guard.cpp", "-o", target]
    command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


# What gives each seeded defect away.
DEFECTS = {
    "item": "_local_scalar_dense",
    "tolist": "_local_scalar_dense",
    "int of t": "_local_scalar_dense",
    "branch on a value": "_local_scalar_dense",
    "index by a 0-dim tensor": "_local_scalar_dense",
    "mask": "by a mask",
    "nonzero": "aten.nonzero",
    "constant from the host": "aten.lift_fresh",
    "host to device": "result on the cpu",
    "device to host": "_to_copy.default to cpu",
    "0-dim host tensor": "copy between devices in the loop: aten.mul",
    "tensor on the host": "result on the cpu",
    "loop reads a counter": "_local_scalar_dense",
    "loop uploads": "aten.lift_fresh",
    "loop adds a host tensor": "copy between devices in the loop: aten.add_",
}


class TestFakeCuda:
    """The loop on fake CUDA tensors: eager, and the captured body of both modes."""

    @pytest.mark.parametrize("mode", [False, *CAPTURED])
    def test_no_host_work(self, probed, mode):
        said = {k: v for k, v in probed.items() if k.startswith("clean") and f"/{mode}/" in k}
        assert len(said) == (24 if mode is False else 28)
        assert not any(said.values()), said

    @pytest.mark.parametrize("mode", [False, *CAPTURED])
    def test_the_probe_catches(self, probed, mode):
        said = {
            k.rpartition("/")[2]: v for k, v in probed.items() if k.startswith(f"defect/{mode}/")
        }
        assert said.keys() == DEFECTS.keys()
        for name, words in DEFECTS.items():
            assert words in said[name], (name, said[name])

    @pytest.mark.parametrize("mode", [False, *CAPTURED])
    def test_whole_calls_do_not_wait(self, probed, mode):
        """Whole calls do not wait: seeds, keys, tables and the numbers of a stream reach the device
        meanwhile.
        """
        said = {k: v for k, v in probed.items() if k.startswith(f"whole/{mode}/")}
        assert len(said) == (9 if mode == "loop" else 11)
        assert not any(said.values()), said

    def test_ticks_of_a_robot_do_not_wait(self, probed):
        assert probed["ticks"] == ""

    def test_nothing_of_the_host_goes_into_a_graph_of_the_callers(self, probed):
        """No value of the host goes into a graph of the caller's, since a replay would find other
        values there. Nor is anything captured, or waited for.
        """
        said = {k: v for k, v in probed.items() if k.startswith("captured/")}
        assert len(said) == 10
        assert not any(said.values()), said

    def test_the_probe_catches_copies_that_wait(self, probed):
        for kind in ("from memory of the host", "without a stream's order"):
            assert probed[f"waiting/{kind}"] == (
                "waits for the device: aten.copy_.default from memory of the host"
            )

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_frozen_arguments_are_refused(self, probed, mode):
        assert (
            "a tensor on cpu, whose values a graph on cuda:0 would not follow"
            in (probed[f"refused/{mode}/kwargs on the host"])
        )


@pytest.fixture
def emptied():
    graph.clear()
    yield
    graph.clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
class TestOnCuda:
    @pytest.fixture(params=["cuda:0", "cuda:1"])
    def device(self, request):
        if int(request.param[-1]) >= torch.cuda.device_count():
            pytest.skip(f"needs {request.param}, there are {torch.cuda.device_count()} devices")
        return torch.device(request.param)

    def net(self, device):
        # Elementwise: its bits depend on no library's choice of algorithm.
        scale = torch.tensor(0.75, device=device)
        return lambda x, t: elementwise_model(x, t) * scale

    def kinds(self, device):
        return [
            {},
            {"eta": 1.0},
            {"eta": torch.tensor([0.0, 1.0], device=device), "clip": 1.0},
            {"eta": 0.5, "guidance_scale": 2.0},
            {"dtype": torch.bfloat16, "eta": 1.0},
            {"dtype": torch.float64, "prediction": "v_prediction"},
        ]

    @pytest.mark.parametrize("mode", ["auto", *CAPTURED])
    def test_equals_eager(self, device, mode):
        model = self.net(device)
        for kind in self.kinds(device):
            results = []
            for call in ({"seed": 1}, {"seed": 2}, {"seed": 1, "spacing": "uniform"}):
                kwargs = {**kind, **call, "device": device}
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    own = sample(model, mode, 10, **kwargs)
                assert torch.equal(own, sample(model, False, 10, **kwargs))
                assert not any(torch.equal(own, before) for before in results)
                results.append(own)

    def test_nodes(self, device):
        x = torch.zeros(4, device=device)

        def body():
            for _ in range(3):
                x.add_(1)
            x.copy_(x * 2)

        recorded = cuda.record(body, body, device, ())
        assert recorded.nodes == (5 if torch.version.cuda else None)

    def test_auto_takes_one_graph_for_all_steps(self, device):
        sampler = Sampler(self.net(device), 10, shape=SHAPE, eta=1.0, device=device)
        sampler(seed=1)
        (of_a_step,) = sampler._loop._programs.values()
        assert of_a_step.all_steps[0, True].graph.nodes == 1 + 10 * (of_a_step.graph.nodes - 1)

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_equals_the_cpu(self, device, mode):
        own = sample(elementwise_model, mode, 10, eta=1.0, seed=7, device=device)
        assert torch.equal(own.cpu(), sample(elementwise_model, False, 10, eta=1.0, seed=7))

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_inputs_change_between_replays(self, device, mode):
        model, scale = Scaled().to(device), torch.ones(2, 1, 1, 1, device=device)
        kind = {"shape": SHAPE, "eta": 1.0, "device": device, "model_kwargs": {"scale": scale}}
        sampler = Sampler(model, 10, graph=mode, **kind)
        eager = Sampler(model, 10, graph=False, **kind)
        results = []
        for seed in range(3):
            noise = latents((10, *SHAPE), seed=seed, device=device)
            call = {"x_T": latents(seed=9 + seed, device=device), "noise": noise}
            own = sampler(**call, return_trajectory=True)
            assert torch.equal(own, eager(**call, return_trajectory=True))
            assert not any(torch.equal(own, before) for before in results)
            results.append(own)
            scale.mul_(0.75)
        model.double().float()
        assert torch.equal(sampler(**call), eager(**call))

    @pytest.mark.parametrize("mode", CAPTURED)
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("where", ["cpu", "cuda"])
    def test_generators(self, device, mode, count, where):
        model = self.net(device)
        place = device if where == "cuda" else "cpu"
        sources = [[generator(i, place) for i in range(count)] for _ in range(2)]
        for _ in range(2):
            own, expected = (
                sample(model, m, 10, eta=1.0, device=device, noise=s[0] if count == 1 else s)
                for m, s in zip((mode, False), sources, strict=True)
            )
            assert torch.equal(own, expected)
        for own, expected in zip(*sources, strict=True):
            assert torch.equal(own.get_state(), expected.get_state())

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_a_random_model(self, device, mode):
        def model(x, t):
            return nn.functional.dropout(x, 0.5)

        results = []
        for which in (False, mode, mode):
            torch.cuda.manual_seed_all(3)
            drawn = [sample(model, which, 10, device=device) for _ in range(2)]
            results.append([*drawn, torch.rand(4, device=device)])
        for own in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(own, results[0], strict=True))

    @pytest.mark.parametrize("mode", [False, *CAPTURED])
    def test_no_synchronisation(self, device, mode):
        sampler = Sampler(self.net(device), 10, shape=SHAPE, eta=1.0, device=device, graph=mode)
        sampler()
        samples = philox.check_samples(3, SHAPE[0])
        x_T = latents(device=device)
        noise = latents((10, *SHAPE), device=device)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            own = sampler._loop.run(x_T, samples=samples)
            with pytest.raises(RuntimeError, match="synchroniz"):
                own.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert torch.equal(own, sampler(x_T=x_T, seed=3))
        sampler(x_T=x_T, noise=noise)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler._loop.run(x_T, noise=noise)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @pytest.mark.parametrize("mode", [False, *CAPTURED])
    def test_whole_calls_do_not_synchronise(self, device, mode):
        model = self.net(device)
        sampler = Sampler(model, 10, shape=SHAPE, eta=1.0, device=device, graph=mode)
        stream = fastddim.Stream(model, shape=SHAPE, device=device, graph=bool(mode))
        x = latents(device=device)

        def everything():
            for seed in (3, [5, 2**64 - 1]):
                sampler(seed=seed)
                fastddim.step(x, x, 0.5, 0.75, eta=1.0, seed=seed)
            tickets = [stream.submit(3, seed=seed, eta=1.0) for seed in (3, 2**64 - 1)]
            stream.run()
            return [sampler(seed=7), *(ticket.result(0) for ticket in tickets)]

        expected = everything()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            own = everything()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))

    @pytest.mark.parametrize("impl", ["cuda", "triton"])
    @pytest.mark.parametrize("inner", [(1,), (3, 5, 7)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_given_noise_of_odd_size(self, device, impl, inner, dtype):
        shape = (3, *inner)
        noise = latents((10, *shape), dtype=dtype, device=device)
        kind = {"eta": 1.0, "dtype": dtype, "shape": shape, "noise": noise, "impl": impl}
        own, eager = (
            sample(self.net(device), mode, 10, device=device, **kind) for mode in ("loop", False)
        )
        assert torch.equal(own, eager)

    @pytest.mark.parametrize("capture_error_mode", ["global", "thread_local", "relaxed"])
    @pytest.mark.parametrize("what", ["Sampler", "sample", "step", "Stream"])
    def test_in_a_capture_of_the_callers(self, device, what, capture_error_mode):
        model, x = self.net(device), latents(device=device)
        kind = {"shape": SHAPE, "eta": 1.0, "device": device}
        sampler = Sampler(model, 10, **kind)
        stream = fastddim.Stream(model, shape=SHAPE, device=device)

        def stepped():
            tickets = [stream.submit(5, seed=seed, eta=1.0) for seed in range(3)]
            stream.run()
            return torch.cat([ticket.result(0) for ticket in tickets])

        draw = {
            "Sampler": lambda: sampler(seed=[3, 2**64 - 1]),
            "sample": lambda: fastddim.sample(model, 10, seed=3, **kind),
            "step": lambda: fastddim.step(x, x, 0.5, 0.75, eta=1.0, seed=[3, 4]),
            "Stream": stepped,
        }[what]
        expected = draw()
        theirs, stream_of_theirs = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        how = {"stream": stream_of_theirs, "capture_error_mode": capture_error_mode}
        with torch.cuda.graph(theirs, **how):
            own = draw()
        for _ in range(2):
            own.fill_(torch.nan)
            theirs.replay()
            assert torch.equal(own, expected)
            # Between the replays, of other values in the same buffers.
            sampler(seed=9)
        assert torch.equal(draw(), expected)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), **how):
            with pytest.raises(ValueError, match=r"^graph: expected 'auto' or False while"):
                fastddim.sample(model, 10, graph=True, **kind)
            x.add(1)

    @pytest.mark.parametrize("mode", [False, *CAPTURED])
    def test_streams(self, device, mode):
        sampler = Sampler(self.net(device), 50, shape=(8, 3, 64, 64), device=device, graph=mode)
        expected = [sampler(seed=seed) for seed in range(4)]
        streams = [torch.cuda.Stream(device) for _ in range(2)]
        torch.cuda.synchronize(device)
        own = []
        for seed in range(4):
            with torch.cuda.stream(streams[seed % 2]):
                own.append(sampler(seed=seed))
        torch.cuda.synchronize(device)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))

    def test_the_current_stream_and_device_stay(self, device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(0), torch.cuda.stream(stream):
            before = torch.cuda.current_device(), torch.cuda.current_stream(device)
            sample(self.net(device), True, device=device)
            with pytest.warns(UserWarning, match="without a CUDA graph"):
                sample(uncapturable, "auto", device=device)
            assert (torch.cuda.current_device(), torch.cuda.current_stream(device)) == before

    def test_after_a_failed_capture(self, device):
        """After a failed capture the device, its allocator and its generators work on, and the next
        capture succeeds.
        """
        torch.cuda.manual_seed_all(5)
        expected = torch.rand(4, device=device)
        torch.cuda.manual_seed_all(5)
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            own = sample(uncapturable, "auto", device=device)
        assert torch.equal(own, sample(uncapturable, False, device=device))
        assert torch.equal(torch.rand(4, device=device), expected)
        with pytest.raises(ValueError, match="capture fails"):
            sample(uncapturable, True, device=device)
        model = self.net(device)
        for mode in CAPTURED:
            assert torch.equal(
                sample(model, mode, device=device), sample(model, False, device=device)
            )

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_memory_goes_with_the_sampler(self, device, mode):
        model = self.net(device)

        def use():
            sampler = Sampler(model, 10, shape=(8, 3, 256, 256), device=device, graph=mode)
            sampler(return_trajectory=True)
            return torch.cuda.memory_reserved(device)

        use()
        levels = []
        for _ in range(3):
            during = use()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            levels.append(torch.cuda.memory_reserved(device))
            assert during > levels[-1]
        assert levels[0] == levels[1] == levels[2]

    @pytest.mark.parametrize("mode", CAPTURED)
    def test_compiled_models(self, device, mode):
        torch._dynamo.reset()
        model = Scaled().to(device)
        compiled = torch.compile(model)
        expected = sample(model, False, device=device)
        for _ in range(2):
            own = sample(compiled, mode, device=device)
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
