"""Steps in graphs: `torch.compile`, `torch.export` and `torch.jit.trace` of loops around them.

A step is one operator of the graph, and the graph gives the bits that the step gives eagerly.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fastddim
from fastddim.integrations import ermongroup, k_diffusion
from fastddim.tracing import TAKES_OBJECTS

from .support.dropins import ermongroup as peer_ermongroup
from .support.dropins import guided_diffusion, latent_diffusion
from .support.dropins.diffusers import CLASSES, DDIM, ours, pair
from .support.environment import RunPython

SHAPE = (2, 3, 4, 4)
TIMESTEPS = [750, 500, 250, 0]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def thinned(every: int, *lists: Any) -> list[Any]:
    """The product of lists, of which each `every`-th case is quick and the others are deep."""
    cases = list(itertools.product(*lists)) if len(lists) > 1 else [(case,) for case in lists[0]]
    return [
        pytest.param(*case, marks=[pytest.mark.deep] if i % every else [], id=None)
        for i, case in enumerate(cases)
    ]


class Compiled:
    """A function in graphs without breaks, whose operators are counted."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.graphs: list[Counter[str]] = []
        self._function = function
        backend = aot_autograd(fw_compiler=self._count, bw_compiler=lambda graph, _: graph.forward)
        options.setdefault("fullgraph", True)
        self._compiled = torch.compile(function, backend=backend, **options)

    def _count(self, graph: Any, _inputs: Any) -> Any:
        self.graphs.append(Counter(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    def check(self, *arguments: Any) -> None:
        """Checks that the graph gives the bits that the function gives, from the same draws."""
        results = []
        for function in (self._function, self._compiled):
            torch.manual_seed(3)
            results.append(flat(function(*arguments)))
        for got, expected in zip(*reversed(results), strict=True):
            assert torch.equal(got, expected)
            assert got.dtype == expected.dtype

    @property
    def updates(self) -> list[int]:
        """The number of updates in each graph."""
        assert not any(
            "update_out" in name or "functionalized" in name for g in self.graphs for name in g
        )
        return [graph["fastddim.update.default"] for graph in self.graphs]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [result[name] for name in result] if isinstance(result, dict) else list(result)


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scheduler_of(name: str, steps: int = 4, **config: Any) -> Any:
    scheduler = getattr(ours, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def loop_of(scheduler: Any, kind: str, **kwargs: Any) -> Callable[[Tensor], Any]:
    def loop(x: Tensor) -> Any:
        last: Any = None
        for t in scheduler.timesteps if kind == "tensor" else TIMESTEPS:
            last = scheduler.step(torch.tanh(x), t, x, **kwargs)
            x = last[0]
        return last

    return loop


class TestLoops:
    @pytest.mark.parametrize(
        ("name", "kind", "return_dict"), thinned(3, CLASSES, ["int", "tensor"], [True, False])
    )
    def test_one_graph(self, name: str, kind: str, return_dict: bool) -> None:
        compiled = Compiled(loop_of(scheduler_of(name), kind, return_dict=return_dict))
        for seed in range(2):
            compiled.check(draw(seed=seed))
        assert compiled.updates == [4]

    @pytest.mark.parametrize("name", thinned(2, DDIM))
    @pytest.mark.parametrize(
        "config",
        [
            {"prediction_type": "v_prediction", "clip_sample": False},
            {"prediction_type": "sample"},
            {"thresholding": True},
            {"set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1},
            {"rescale_betas_zero_snr": True},
        ],
        ids=str,
    )
    def test_configs(self, name: str, config: dict) -> None:
        compiled = Compiled(loop_of(scheduler_of(name, **config), "tensor"))
        compiled.check(draw())
        assert [graph["fastddim.update.default"] for graph in compiled.graphs] == [4]

    @pytest.mark.parametrize(
        ("name", "kind", "noise"), thinned(5, DDIM, ["int", "tensor"], ["torch", "philox", "given"])
    )
    def test_noise(self, name: str, kind: str, noise: str) -> None:
        scheduler = scheduler_of(name)
        scheduler.set_noise("philox" if noise == "philox" else "torch", 7)
        given = {"variance_noise": draw(seed=9)} if noise == "given" else {}
        compiled = Compiled(
            loop_of(scheduler, kind, eta=0.5, use_clipped_model_output=True, **given)
        )
        compiled.check(draw())
        assert compiled.updates == [4]

    @pytest.mark.parametrize(
        ("variance", "kind"),
        thinned(
            4,
            ["learned_range", "fixed_small", "learned", "fixed_large", "fixed_small_log"],
            ["int", "tensor"],
        ),
    )
    def test_ancestral_variances(self, variance: str, kind: str) -> None:
        scheduler = scheduler_of("DDPMScheduler", variance_type=variance)
        learned = variance.startswith("learned")

        def loop(x: Tensor) -> Tensor:
            for t in scheduler.timesteps if kind == "tensor" else TIMESTEPS:
                m = torch.cat([torch.tanh(x), x.sigmoid()], 1) if learned else torch.tanh(x)
                x = scheduler.step(m, t, x).prev_sample
            return x

        # Of a tensor, bounds of a learned variance are diffusers' own to read, with its breaks.
        ranged = variance == "learned_range" and kind == "tensor"
        compiled = Compiled(loop, fullgraph=not ranged)
        if ranged:
            torch.manual_seed(3)
            expected = loop(draw())
            torch.manual_seed(3)
            torch.testing.assert_close(compiled._compiled(draw()), expected, rtol=0, atol=1e-5)
        else:
            compiled.check(draw())
            assert compiled.updates == [4]

    @pytest.mark.parametrize("philox", [False, True])
    def test_ancestral_noise(self, philox: bool) -> None:
        scheduler = scheduler_of("DDPMScheduler")
        scheduler.set_noise("philox" if philox else "torch", 7)
        compiled = Compiled(loop_of(scheduler, "tensor"))
        compiled.check(draw())
        assert compiled.updates == [4]

    @pytest.mark.parametrize("name", thinned(2, CLASSES))
    def test_dtypes(self, name: str) -> None:
        scheduler = scheduler_of(name)
        compiled = Compiled(lambda m, t, x: scheduler.step(m, t, x, return_dict=False))
        t = torch.tensor(500)
        for state, output in [
            (torch.float32, torch.float16),
            (torch.bfloat16, torch.float32),
            (torch.float64, torch.float64),
        ]:
            compiled.check(draw(dtype=output, seed=1), t, draw(dtype=state))
        assert compiled.updates == [1, 1, 1]

    @pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
    @pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
    def test_mixing(self, name: str, method: str) -> None:
        scheduler = scheduler_of(name)
        compiled = Compiled(getattr(scheduler, method))
        for t in ([3, 999], [0, 5]):
            compiled.check(draw(), draw(seed=1), torch.tensor(t))
        assert compiled.updates == [1]

    def test_a_timestep_for_each_sample(self) -> None:
        scheduler = scheduler_of("DDIMParallelScheduler")
        compiled = Compiled(scheduler.batch_step_no_noise)
        for t in ([3, 999], [0, 750]):
            compiled.check(draw(seed=1), torch.tensor(t), draw())
        assert compiled.updates == [1]

    @pytest.mark.parametrize("name", CLASSES)
    def test_gradients(self, name: str) -> None:
        scheduler = scheduler_of(name)
        compiled = Compiled(lambda x: scheduler.step(torch.tanh(x), 500, x).prev_sample)
        grads = []
        for function in (compiled._function, compiled._compiled):
            leaf = draw().requires_grad_()
            torch.manual_seed(3)
            function(leaf).square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)

    def test_by_inductor(self) -> None:
        loop = loop_of(scheduler_of("DDIMScheduler"), "tensor", return_dict=False)
        compiled = torch.compile(loop, fullgraph=True)
        for got, expected in zip(compiled(draw()), loop(draw()), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


class TestOneGraphForMany:
    @pytest.mark.parametrize(("name", "kind"), thinned(3, CLASSES, ["int", "tensor"]))
    def test_timesteps(self, name: str, kind: str) -> None:
        """One graph serves all timesteps that are tensors. An int gets a second graph, in which it
        is an input, and for DDPM a third one for the step without noise.
        """
        scheduler = scheduler_of(name, 50)
        compiled = Compiled(lambda m, t, x: scheduler.step(m, t, x, return_dict=False))
        for t in scheduler.timesteps[::4]:
            compiled.check(draw(seed=1), int(t) if kind == "int" else t, draw())
        compiled.check(draw(seed=1), 0 if kind == "int" else torch.tensor(0), draw())
        most = {"tensor": 1, "int": 3 if name == "DDPMScheduler" else 2}[kind]
        assert len(compiled.graphs) <= most

    @pytest.mark.parametrize("name", thinned(2, CLASSES))
    def test_batches(self, name: str) -> None:
        scheduler = scheduler_of(name)
        # torch draws no batch of any size in a graph of its 2.13.
        scheduler.set_noise("philox" if name == "DDPMScheduler" else "torch", 7)
        compiled = Compiled(loop_of(scheduler, "tensor"))
        for batch in (3, 5, 8):
            x = draw(batch, *SHAPE[1:])
            torch._dynamo.mark_dynamic(x, 0)
            compiled.check(x)
        assert compiled.updates == [4]

    @pytest.mark.parametrize("name", thinned(2, CLASSES))
    def test_set_timesteps_again(self, name: str) -> None:
        scheduler = scheduler_of(name, 50)
        compiled = Compiled(lambda m, t, x: scheduler.step(m, t, x, return_dict=False))
        t = torch.tensor(500)
        for _ in range(3):
            scheduler.set_timesteps(50)
            compiled.check(draw(seed=1), t, draw())
        assert compiled.updates == [1]


class TestChanges:
    """A change takes another graph, with the present values of the step."""

    @pytest.mark.parametrize("name", thinned(2, CLASSES))
    def test_number_of_steps(self, name: str) -> None:
        scheduler = scheduler_of(name, 10)
        compiled = Compiled(lambda x: scheduler.step(torch.tanh(x), scheduler.timesteps[1], x)[0])
        for steps in (10, 20, 25, 10, 20):
            scheduler.set_timesteps(steps)
            compiled.check(draw())
        assert compiled.updates == [1, 1, 1]

    def test_eta(self) -> None:
        scheduler, noise = scheduler_of("DDIMScheduler"), draw(seed=5)
        compiled = Compiled(
            lambda x, eta: scheduler.step(torch.tanh(x), 500, x, eta, variance_noise=noise)[0]
        )
        for eta in (0.0, 0.5, 1.0, 0.25, 0.5, 0.0):
            compiled.check(draw(), eta)

    @pytest.mark.parametrize("name", thinned(3, CLASSES))
    def test_alphas_and_config(self, name: str) -> None:
        scheduler = scheduler_of(name)
        compiled = Compiled(lambda x: scheduler.step(torch.tanh(x), 500, x)[0])
        compiled.check(draw())
        scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
        compiled.check(draw())
        scheduler.register_to_config(prediction_type="v_prediction", clip_sample=False)
        compiled.check(draw())
        assert compiled.updates == [1, 1, 1]

    @pytest.mark.parametrize("name", thinned(4, CLASSES))
    def test_another_scheduler(self, name: str) -> None:
        """Two schedulers in one graph, and the same function with one and then the other."""
        schedulers = [scheduler_of(name), scheduler_of(name, beta_end=0.01)]

        def both(x: Tensor) -> Tensor:
            for scheduler in schedulers:
                x = scheduler.step(torch.tanh(x), 500, x)[0]
            return x

        Compiled(both).check(draw())
        compiled = Compiled(lambda x, which: schedulers[which].step(torch.tanh(x), 500, x)[0])
        for which in (0, 1, 0):
            compiled.check(draw(), which)

    def test_timesteps_of_ddpm(self) -> None:
        """The next timestep is a part of DDPM's step."""
        scheduler = scheduler_of("DDPMScheduler")
        compiled = Compiled(lambda x: scheduler.step(torch.tanh(x), 500, x)[0])
        for timesteps in ([900, 500, 300], [900, 500, 100], [900, 500, 300]):
            scheduler.set_timesteps(timesteps=timesteps)
            compiled.check(draw())
        scheduler.timesteps = torch.tensor([800, 500, 77])
        compiled.check(draw())

    @pytest.mark.parametrize("name", thinned(4, CLASSES))
    def test_timesteps_set_in_the_graph(self, name: str) -> None:
        scheduler = scheduler_of(name, 10)

        def run(x: Tensor, steps: int) -> Tensor:
            scheduler.set_timesteps(steps)
            return scheduler.step(torch.tanh(x), 500, x)[0]

        compiled = torch.compile(run, backend="aot_eager")
        for steps in (4, 10, 4):
            torch.manual_seed(3)
            got = compiled(draw(), steps)
            torch.manual_seed(3)
            torch.testing.assert_close(got, run(draw(), steps), rtol=0, atol=1e-5)


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "x_0": {"return_x0": True, "clip": 1.0, "rederive_eps": True},
    "philox": {"eta": 1.0, "seed": 3, "step_index": 7},
    "keys of each": {"eta": 0.5, "seed": [3, 4], "step_index": torch.tensor([7, 9])},
    "noise": {"eta": 0.5, "noise": draw(seed=4)},
    "large variance": {"eta": 1.0, "variance": "large", "noise": draw(seed=4)},
    "thresholding": {"dynamic_thresholding_ratio": 0.9},
    "v": {"prediction": "v_prediction"},
}


class TestStep:
    @pytest.mark.parametrize("kind", thinned(3, STEPS))
    def test_constants(self, kind: str) -> None:
        def loop(x: Tensor) -> Any:
            result: Any = x
            for a, p in ((0.1, 0.3), (0.3, 0.7), (0.7, 1.0)):
                result = fastddim.step(x, torch.tanh(x), a, p, **STEPS[kind])
                x = result[0] if isinstance(result, tuple) else result
            return result

        compiled = Compiled(loop)
        compiled.check(draw())
        assert [graph["fastddim.update.default"] for graph in compiled.graphs] == [3]

    @pytest.mark.parametrize("kind", thinned(3, STEPS))
    def test_numbers_that_change(self, kind: str) -> None:
        """Numbers that change are inputs of the graph from the second call on; one graph serves all
        values.
        """
        compiled = Compiled(lambda x, a, p: fastddim.step(x, torch.tanh(x), a, p, **STEPS[kind]))
        for a in (0.11, 0.23, 0.37, 0.51):
            compiled.check(draw(), a, a + 0.3)
        compiled.check(draw(), 0.77, 1.0)
        assert len(compiled.graphs) <= 3

    def test_bad_numbers(self) -> None:
        compiled = torch.compile(
            lambda x, a: fastddim.step(x, torch.tanh(x), a, 1.0), backend="aot_eager"
        )
        for a in (0.1, 0.2):
            compiled(draw(), a)
        for a in (1.5, -0.5, float("nan")):
            with pytest.raises(ValueError, match=r"alpha_t: expected a number in \[0, 1"):
                compiled(draw(), a)

    def test_eta_that_changes(self) -> None:
        compiled = Compiled(
            lambda x, eta, g: fastddim.step(
                x, torch.cat([x, torch.tanh(x)]), 0.3, 0.6, eta=eta, guidance_scale=g, seed=1
            )
        )
        for eta, g in ((0.2, 2.0), (0.4, 3.0), (0.6, 4.0), (0.0, 5.0), (0.0, 6.0)):
            compiled.check(draw(), eta, g)
        assert len(compiled.graphs) <= 4

    @pytest.mark.parametrize("shape", [(), (2,)])
    def test_tensors(self, shape: tuple[int, ...]) -> None:
        compiled = Compiled(lambda x, a, p: fastddim.step(x, torch.tanh(x), a, p))
        for a in (0.1, 0.4):
            values = torch.full(shape, a, dtype=torch.float64)
            compiled.check(draw(), values, values + 0.3)
        assert compiled.updates == [1]

    def test_batches(self) -> None:
        compiled = Compiled(lambda x: fastddim.step(x, torch.tanh(x), 0.3, 0.6, eta=1.0, seed=2))
        for batch in (3, 5, 8):
            x = draw(batch, *SHAPE[1:])
            torch._dynamo.mark_dynamic(x, 0)
            compiled.check(x)
        assert compiled.updates == [1]

    def test_out(self) -> None:
        def run(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            fastddim.step(x, torch.tanh(x), 0.3, 0.6, out=out)
            return out

        Compiled(run).check(draw())

    def test_gradients(self) -> None:
        compiled = Compiled(lambda x, a: fastddim.step(x, torch.tanh(x), a, 0.9))
        for a in (0.3, 0.4, 0.5):
            grads = []
            for function in (compiled._function, compiled._compiled):
                leaf = draw().requires_grad_()
                function(leaf, a).square().sum().backward()
                grads.append(leaf.grad)
            assert torch.equal(*grads)


class TestOtherDropIns:
    def test_guided_diffusion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """guided-diffusion is one graph, as the original is, even before any step; with torch 2.11
        it breaks.
        """
        import sys

        own, model = guided_diffusion.fast(guided_diffusion.make()), guided_diffusion.Model()
        # Dynamo looks the module of the peer up by its name.
        peer = guided_diffusion.load_peer()
        monkeypatch.setitem(sys.modules, peer.__name__, peer)
        t = torch.tensor([5, 7])
        compiled = Compiled(
            lambda x: own.ddim_sample(model, x, t, eta=0.5), fullgraph=TAKES_OBJECTS
        )
        torch.manual_seed(3)
        compiled._compiled(draw())
        compiled.check(draw(seed=1))
        assert not TAKES_OBJECTS or compiled.updates == [1]

    @pytest.mark.deep
    def test_loops_with_breaks(self) -> None:
        """Loops that read values of their arguments on the host break the graph, as they must."""
        sampler = latent_diffusion.fast_of(latent_diffusion.make())
        t, c = torch.tensor([3, 3]), torch.ones(2)
        sigmas = torch.tensor([3.0, 2.0, 1.0, 0.0])
        betas = torch.linspace(1e-4, 0.02, 100)
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            "latent-diffusion": lambda x: sampler.p_sample_ddim(x, c, t, 3)[0],
            "k-diffusion": lambda x: k_diffusion.sample_ddim(
                lambda x, sigma: torch.tanh(x), x, sigmas, disable=True, eta=0.5
            ),
            "ermongroup": lambda x: ermongroup.generalized_steps(
                x, range(0, 100, 50), peer_ermongroup.model, betas, eta=0.5
            )[0][-1],
        }
        for run in runs.values():
            torch._dynamo.reset()
            x = draw(2, 4, 4, 4)
            compiled = torch.compile(run, backend="aot_eager")
            results = []
            for function in (compiled, run, compiled):
                torch.manual_seed(3)
                results.append(function(x))
            assert all(torch.equal(result, results[1]) for result in results)


class Loop(nn.Module):
    """A network and a loop around it."""

    def __init__(self, take: Callable[[Tensor, Tensor, Any], Tensor], timesteps: Any) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 3, 1)
        self.take, self.timesteps = take, timesteps

    def forward(self, x: Tensor) -> Tensor:
        for t in self.timesteps:
            x = self.take(self.net(x), t, x)
        return x


class One(Loop):
    """One step from a timestep that is an input."""

    def forward(self, x: Tensor, t: Any) -> Tensor:  # type: ignore[override]
        return self.take(self.net(x), t, x)


def taking(scheduler: Any, **kwargs: Any) -> Callable[[Tensor, Tensor, Any], Tensor]:
    return lambda m, t, x: scheduler.step(m, t, x, return_dict=False, **kwargs)[0]


def module_of(name: str, kind: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "step":
        alphas = dict(zip(TIMESTEPS, (0.1, 0.3, 0.6, 0.9), strict=True))
        return Loop(lambda m, t, x: fastddim.step(x, m, alphas[t], alphas[t] + 0.1), TIMESTEPS)
    scheduler = scheduler_of(name)
    if name == "DDPMScheduler":
        scheduler.set_noise("philox", 7)
    return Loop(taking(scheduler), TIMESTEPS if kind == "int" else scheduler.timesteps)


EXPORTED = [("step", "int"), *((name, kind) for name in CLASSES for kind in ("int", "tensor"))]


class TestExport:
    @pytest.mark.parametrize(("case", "strict"), thinned(3, EXPORTED, [True, False]))
    def test_cold(self, case: tuple[str, str], strict: bool) -> None:
        """A graph is made cold, before any step, for batches of any size; steps are real ones after
        it.
        """
        module, x = module_of(*case), draw()
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(module, (x,), strict=strict, dynamic_shapes=({0: batch},))
        with torch.no_grad():
            expected = module(x)
            assert type(expected) is Tensor
            assert torch.equal(expected, module_of(*case)(x))
            stored = io.BytesIO()
            torch.export.save(program, stored)
            stored.seek(0)
            loaded = torch.export.load(stored).module()
            for again in (program.module(), loaded):
                assert torch.equal(again(x), expected)
                larger = draw(5, *SHAPE[1:], seed=1)
                assert torch.equal(again(larger), module(larger))

    @pytest.mark.parametrize("name", CLASSES)
    def test_where_nothing_has_gradients(self, name: str) -> None:
        module = module_of(name, "int").requires_grad_(False)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(module, (draw(),), dynamic_shapes=({0: batch},))
        larger = draw(5, *SHAPE[1:], seed=1)
        assert torch.equal(program.module()(larger), module(larger))

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("name", CLASSES[:3])
    def test_timesteps_as_inputs(self, name: str, strict: bool) -> None:
        module, x = One(taking(scheduler_of(name)), None), draw()
        program = torch.export.export(module, (x, torch.tensor(500)), strict=strict).module()
        for t in (750, 500, 0):
            assert torch.equal(program(x, torch.tensor(t)), module(x, torch.tensor(t)))

    def test_gradients_of_a_program(self) -> None:
        module = module_of("DDIMScheduler", "int")
        program = torch.export.export(module, (draw(),), strict=False).module()
        grads = []
        for function in (module, program):
            leaf = draw(seed=1).requires_grad_()
            function(leaf).square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)

    @pytest.mark.deep
    def test_in_another_process(self, tmp_path: Path, run_python: RunPython) -> None:
        """The operators come with `import fastddim`."""
        module, x = module_of("DDIMScheduler", "tensor"), draw()
        torch.export.save(torch.export.export(module, (x,)), tmp_path / "loop.pt2")
        torch.save({"x": x, "expected": module(x).detach()}, tmp_path / "values.pt")
        code = (
            "import torch, fastddim\n"
            "values = torch.load('values.pt')\n"
            "result = torch.export.load('loop.pt2').module()(values['x'])\n"
            "assert torch.equal(result, values['expected'])\n"
        )
        done = run_python("-c", code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


class TestTrace:
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize(
        ("case", "size", "warm"), thinned(9, EXPORTED, [512, 4], [False, True])
    )
    def test_loops(self, case: tuple[str, str], size: int, warm: bool) -> None:
        """Loops are right for other states of the same shape; large ones have memory
        that is lent.
        """
        module, shape = module_of(*case), (2, 3, size, size)
        with torch.no_grad():
            if warm:
                module(draw(*shape))
            traced = torch.jit.trace(module, (draw(*shape),), check_trace=False)
            results = [traced(draw(*shape, seed=seed)) for seed in range(3)]
            for seed, result in enumerate(results):
                assert torch.equal(result, module(draw(*shape, seed=seed)))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("name", thinned(4, CLASSES))
    def test_timesteps_as_inputs(self, name: str) -> None:
        scheduler = scheduler_of(name)
        if name == "DDPMScheduler":
            scheduler.set_noise("philox", 7)
        module, x = One(taking(scheduler), None), draw()
        with torch.no_grad():
            traced = torch.jit.trace(module, (x, torch.tensor(500)), check_trace=False)
            for t in (750, 500, 0):
                assert torch.equal(traced(x, torch.tensor(t)), module(x, torch.tensor(t)))


@pytest.mark.deep
def test_pairs_are_alike_in_graphs() -> None:
    """The graph of a drop-in gives the results of the graph of diffusers' original."""
    for name in CLASSES[:3]:
        results = [
            torch.compile(loop_of(s, "int", return_dict=False), backend="aot_eager")(draw())[0]
            for s in pair(name, 4)
        ]
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)
