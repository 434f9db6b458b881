"""Objects kept between calls serve every mode of PyTorch, whatever mode they were made in."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastddim
from fastddim import kept, single, transfer
from fastddim.integrations import ermongroup, k_diffusion, webui
from fastddim.plan import Update, stack_row, unchecked_row
from fastddim.steptable import StepTable

from .support.dropins import guided_diffusion, latent_diffusion
from .support.dropins.diffusers import CLASSES, assert_alike, diffusers, ours, pair
from .support.dropins.peers import same_draws
from .support.dropins.webui import WebuiModel
from .support.recorded_graph import RecordedGraph

SHAPE = (2, 3, 4, 4)
TIMES = torch.tensor([3, 50])
DTYPES = [torch.float32, torch.float64]

Run = Callable[[Tensor], Tensor]


def draw(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def step_of(**kwargs: Any) -> Callable[[], Run]:
    def make() -> Run:
        single._remembered_step.cache_clear()
        return lambda x: fastddim.step(x, x * 0.5, 0.37, 0.71, **kwargs)  # type: ignore[return-value]

    return make


def table_of(**kwargs: Any) -> Callable[[], Run]:
    def make() -> Run:
        update = Update(**kwargs).checked(None)
        a = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64, device="cpu")
        table = StepTable(stack_row(unchecked_row(a, a + 0.2, update)), rescaling=update.rescaling)
        return lambda x: table(x, x * 0.5, 1)[0]

    return make


def scheduler_of(
    name: str, run: Callable[[Any, Tensor], Tensor], *, philox: bool = False, **config: Any
) -> Callable[[], Run]:
    def make() -> Run:
        scheduler = getattr(ours, name)(num_train_timesteps=100, **config)
        scheduler.set_timesteps(10)
        if philox:
            scheduler.set_noise("philox", seed=3)
        return lambda x: run(scheduler, x)

    return make


def stepping(t: Any, **kwargs: Any) -> Callable[[Any, Tensor], Tensor]:
    def run(scheduler: Any, x: Tensor) -> Tensor:
        return scheduler.step(x * 0.5, t(scheduler), x, **kwargs).prev_sample

    return run


def mixing(method: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda scheduler, x: getattr(scheduler, method)(x, x * 0.5, TIMES)


def guided() -> Run:
    own = guided_diffusion.fast(guided_diffusion.make())
    times = torch.tensor([5, 7])
    return lambda x: own.ddim_reverse_sample(lambda x, t: x * 0.5, x, times)["sample"]


def latent() -> Run:
    own = latent_diffusion.fast_of(latent_diffusion.make())
    own.model.apply_model = lambda x, t, c: x * 0.5
    times = torch.tensor([3, 3])
    return lambda x: own.stochastic_encode(x, times, noise=x * 0.5)


def int_t(scheduler: Any) -> int:
    return 50


def tensor_t(scheduler: Any) -> Tensor:
    return scheduler.timesteps[4]


# Each makes a step that nothing is kept of yet.
MEMBERS: dict[str, Callable[[], Run]] = {
    "step": step_of(),
    "step, philox": step_of(eta=1.0, seed=3),
    "step, thresholded": step_of(dynamic_thresholding_ratio=0.9),
    "StepTable": table_of(),
    "StepTable, thresholded": table_of(dynamic_thresholding_ratio=0.9),
    "guided-diffusion": guided,
    **{f"{name}, int": scheduler_of(name, stepping(int_t)) for name in CLASSES[:3]},
    **{f"{name}, tensor": scheduler_of(name, stepping(tensor_t)) for name in CLASSES[:3]},
    **{
        f"{name}, philox": scheduler_of(name, stepping(int_t, **eta), philox=True)
        for name, eta in zip(
            (*CLASSES[:2], "DDPMScheduler"), ({"eta": 1.0},) * 2 + ({},), strict=True
        )
    },
    "DDIMScheduler, thresholded": scheduler_of("DDIMScheduler", stepping(int_t), thresholding=True),
    **{
        f"{name}, {method}": scheduler_of(name, mixing(method))
        for name in ("DDIMScheduler", "DDPMScheduler")
        for method in ("add_noise", "get_velocity")
    },
    "DDIMParallelScheduler, batch": scheduler_of(
        "DDIMParallelScheduler",
        lambda scheduler, x: scheduler.batch_step_no_noise(x * 0.5, TIMES, x),
    ),
}

# Without gradients.
OTHERS: dict[str, Callable[[], Run]] = {
    "latent-diffusion": latent,
    "k-diffusion": lambda: (
        lambda x: k_diffusion.sample_ddim(
            lambda x, sigma: x * 0.5, x, torch.tensor([3.0, 1.0, 0.0], device="cpu"), disable=True
        )
    ),
    "ermongroup": lambda: (
        lambda x: ermongroup.generalized_steps(
            x, range(0, 100, 50), lambda x, t: x * 0.5, torch.full((100,), 0.01, device="cpu")
        )[0][-1]
    ),
    "webui": lambda: (
        lambda x: webui.ddim(
            WebuiModel(torch.linspace(0.99, 0.1, 100, device="cpu")),
            x,
            torch.arange(1, 100, 40, device="cpu"),
            disable=True,
        )
    ),
}


def in_transform(transform: Callable[..., Any]) -> Callable[[Run, Tensor], None]:
    return lambda run, x: transform(lambda x: run(x).sum())(x)


def within(mode: Callable[[], AbstractContextManager[Any]]) -> Callable[[Run, Tensor], None]:
    def call(run: Run, x: Tensor) -> None:
        with mode():
            run(x.clone())

    return call


def fake(run: Run, x: Tensor) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = mode.from_tensor(x)
    with mode:
        assert run(made).shape == x.shape


def strictly_fake(run: Run, x: Tensor) -> None:
    """A fake mode with torch's default: tensors from outside are refused, whoever has them."""
    mode = FakeTensorMode()
    made = mode.from_tensor(x)
    try:
        with mode:
            run(made)
    except AssertionError as error:
        assert "convert all Tensors to FakeTensors first" in str(error)  # noqa: PT017


def on_meta(run: Run, x: Tensor) -> None:
    """The meta device: tensors have no values, and neither has the state."""
    with torch.device("meta"):
        run(x)


def inferring_on_meta(run: Run, x: Tensor) -> None:
    with torch.inference_mode(), torch.device("meta"):
        run(x)


MODES: dict[str, Callable[[Run, Tensor], None]] = {
    "inference": within(torch.inference_mode),
    "no grad": within(torch.no_grad),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "fake": fake,
    "strictly fake": strictly_fake,
    "grad": in_transform(torch.func.grad),
    "grad of grad": in_transform(lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())),
    "functionalize": in_transform(torch.func.functionalize),
    "meta": on_meta,
    "meta, inference": inferring_on_meta,
}


def gradient(run: Run, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    result = run(leaf)
    assert type(result) is Tensor
    assert not result.is_inference()
    result.square().sum().backward()
    assert leaf.grad is not None
    return result.detach(), leaf.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("member", MEMBERS)
def test_made_in_a_mode(member: str, mode: str) -> None:
    for dtype in DTYPES:
        x = draw(dtype)
        expected = gradient(MEMBERS[member](), x)
        run = MEMBERS[member]()
        MODES[mode](run, x)
        for got, want in zip(gradient(run, x), expected, strict=True):
            assert torch.equal(got, want), dtype


@pytest.mark.parametrize("member", OTHERS)
@pytest.mark.parametrize("mode", ["inference", "autocast", "meta", "meta, inference"])
def test_without_gradients(member: str, mode: str) -> None:
    x = draw()
    torch.manual_seed(1)
    expected = OTHERS[member]()(x)
    run = OTHERS[member]()
    MODES[mode](run, x)
    torch.manual_seed(1)
    assert torch.equal(run(x), expected)


@pytest.mark.parametrize("member", {**MEMBERS, **OTHERS})
def test_a_mode_changes_no_value(member: str) -> None:
    make = {**MEMBERS, **OTHERS}[member]
    x = draw(torch.float64)
    contexts: tuple[Callable[[], Any], ...] = (
        nullcontext,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    )
    results = []
    for context in contexts:
        torch.manual_seed(1)
        run = make()
        with context():
            results.append(run(x).clone())
    assert all(torch.equal(result, results[0]) for result in results[1:])


ORDERS = list(itertools.product([False, True], repeat=3))


@contextmanager
def inferring(inside: bool) -> Iterator[None]:
    with torch.inference_mode() if inside else nullcontext():
        yield


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_orders_of_inference_mode(name: str, order: tuple[bool, bool, bool]) -> None:
    """Objects are made, set and used inside of inference mode or outside, in every order."""
    x, m = draw(), draw(seed=1)
    schedulers = []
    for module in (diffusers, ours):
        with inferring(order[0]):
            scheduler = getattr(module, name)()
        with inferring(order[1]):
            scheduler.set_timesteps(10)
        schedulers.append(scheduler)
    for inside in (order[2], not order[2], order[2]):
        with inferring(inside):
            for t in (900, schedulers[0].timesteps[-2]):
                theirs, own = same_draws(*(lambda s=s, t=t: s.step(m, t, x) for s in schedulers))
                assert_alike(theirs, own, 1e-5)
            if hasattr(schedulers[0], "add_noise"):
                times = torch.tensor([3, 500])
                theirs, own = (s.add_noise(x, m, times) for s in schedulers)
                torch.testing.assert_close(own, theirs)
    leaf = x.clone().requires_grad_()
    schedulers[1].step(m, 900, leaf).prev_sample.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_alphas_that_change(name: str, made: bool, changed: bool) -> None:
    """The next step has changed ᾱ, in place or as a new tensor, from any mode."""
    x, m = draw(), draw(seed=1)
    with inferring(made):
        theirs, own = pair(name, 10)

    def alike() -> None:
        for inside in (False, True):
            with inferring(inside):
                assert_alike(
                    *same_draws(*(lambda s=s: s.step(m, 900, x) for s in (theirs, own))), 1e-5
                )

    alike()
    for scheduler in (theirs, own):
        with inferring(changed or scheduler.alphas_cumprod.is_inference()):
            scheduler.alphas_cumprod.mul_(0.9)
    alike()
    for scheduler in (theirs, own):
        with inferring(changed):
            scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    alike()
    for scheduler in (theirs, own):
        with inferring(changed or scheduler.alphas_cumprod.is_inference()):
            scheduler.alphas_cumprod.mul_(0.9)
    alike()


@pytest.mark.parametrize("name", CLASSES)
def test_copies_in_inference_mode(name: str, tmp_path: Any) -> None:
    x, m = draw(), draw(seed=1)
    _, own = pair(name, 10)
    with torch.inference_mode():
        copies = [copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))]
        own.save_pretrained(tmp_path)
        loaded = type(own).from_pretrained(tmp_path)
        loaded.set_timesteps(10)
    expected, *results = same_draws(
        *(lambda s=s: s.step(m, 900, x) for s in (own, *copies, loaded))
    )
    for result in results:
        assert_alike(expected, result, 0)


@pytest.mark.parametrize("name", CLASSES)
def test_a_scheduler_of_a_fake_mode(name: str) -> None:
    """A scheduler of a fake mode has shapes and no values, as in diffusers."""
    with FakeTensorMode():
        x = torch.randn(SHAPE)
        for module in (diffusers, ours):
            scheduler = getattr(module, name)()
            scheduler.set_timesteps(10)
            result = scheduler.step(x, 900, x).prev_sample if name != "DDPMScheduler" else x
            assert result.shape == SHAPE
            assert type(result) is type(x)


# The stand-in takes the host's part for the device's: numbers become tensors there, and are read.
CAPTURED = [name for name in MEMBERS if "step" not in name and "tensor" not in name]


@pytest.mark.parametrize("member", CAPTURED)
def test_first_used_under_capture(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values made under a capture have their numbers after a replay, and serve only the graph."""
    run, x = MEMBERS[member](), draw(torch.float64)
    # What the host computes is no part of a graph, but would be of the stand-in's.
    run(x.float())
    expected = MEMBERS[member]()(x)
    results: list[Tensor] = []
    buffer = x.clone()
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "captured", lambda device: True)
        with torch.no_grad():
            graph = RecordedGraph(lambda: results.append(run(buffer)))
    graph.replay()
    assert torch.equal(results[0], expected)
    assert torch.equal(run(x), expected)


def test_an_ordinary_value_is_made_here() -> None:
    """An ordinary value is made in the caller's thread, and elsewhere only if a mode would have a
    say in it, with the error that it raises.
    """
    import threading

    here = threading.get_ident()
    assert kept.ordinary(threading.get_ident) == here
    for mode in (torch.inference_mode, FakeTensorMode):
        with mode():
            assert kept.ordinary(threading.get_ident) != here
            with pytest.raises(ZeroDivisionError):
                kept.ordinary(lambda: 1 / 0)
            assert type(kept.ordinary(lambda: torch.zeros(2, device="cpu") + 1)) is Tensor


def test_no_step_takes_longer_for_it() -> None:
    """No step takes longer for it: a kept table is found again, in any mode of the next call."""
    run = MEMBERS["DDIMScheduler, int"]()
    x = draw()
    run(x)
    made = io.StringIO()
    original = kept.ordinary

    def counted(make: Callable[[], Any]) -> Any:
        made.write("x")
        return original(make)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "ordinary", counted)
        for context in (nullcontext, torch.inference_mode, torch.no_grad):
            with context():
                run(x)
    assert made.getvalue() == ""
