"""Policies of real-stanford/diffusion_policy against their own loop, written out in
`tests/support/dropins/diffusion_policy.py`, around the schedulers of diffusers.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim.integrations.diffusion_policy as fast
from fastddim import notices

from ..support.dropins.diffusion_policy import (
    KINDS,
    DiffusionUnetLowdimPolicy,
    Policy,
    make,
    observation,
)
from ..support.dropins.peers import TOLERANCE, assert_same, run_example, same_draws
from ..support.environment import Some
from ..support.optional import optional
from ..support.probes import NoSync
from ..support.recorded_graph import RecordedGraph, recorded_graphs

diffusers = optional("diffusers")

T, STEPS = 20, 5
UNET = ("inpainting", "local", "global")


def scheduler(name: str = "DDIM", **config: Any) -> Any:
    """The scheduler of the repository's configurations, with fewer timesteps."""
    config = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2", **config}
    return getattr(diffusers, f"{name}Scheduler")(**config)


def in_float64(scheduler: Any) -> Any:
    """The scheduler with ᾱ in float64, so that coefficients are in float64 too."""
    for name in {"alphas_cumprod", "final_alpha_cumprod", "one"} & vars(scheduler).keys():
        setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def policies(kind: str, scheduler: Any, **options: Any) -> tuple[Any, Any]:
    """(one that samples through a `Sampler`, the same with its own loop)."""
    options = {"num_inference_steps": STEPS, **options}
    own, theirs = (make(kind, copy.deepcopy(scheduler), **options) for _ in range(2))
    fast.install(own)
    return own, theirs


@torch.no_grad()
def ticks(policy: Any, batches: Any = (2, 2, 2), dtype: torch.dtype = torch.float32) -> list[Any]:
    """The answers of a policy, tick after tick."""
    given = (observation(tick, batch, dtype) for tick, batch in enumerate(batches))
    return [policy.predict_action(now) for now in given]


def compare(own: Any, theirs: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Both policies give the same answers from the same draws."""
    runs = same_draws(*[lambda p=p: ticks(p, dtype=dtype, **options) for p in (own, theirs)])
    assert_same(*runs, TOLERANCE[dtype])
    assert all(value.isfinite().all() for answer in runs[0] for value in answer.values())
    return runs[0]


@pytest.fixture
def own_loops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The policies that sampled by their own loop, each time it was taken."""
    taken: list[Any] = []
    before = Policy._denoise

    def watched(self: Any, *arguments: Any) -> Tensor:
        taken.append(self)
        return before(self, *arguments)

    monkeypatch.setattr(Policy, "_denoise", watched)
    return taken


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_policy(kind: str, name: str, own_loops: list[Any]) -> None:
    own, theirs = policies(kind, scheduler(name, clip_sample=name == "DDIM"))
    compare(own, theirs, batches=(2, 2))
    assert set(own_loops) == {theirs}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_configurations(name: str, prediction: str, some: Some, own_loops: list[Any]) -> None:
    """Actions agree over spacings, ends of the schedule and numbers of steps, some of which do not
    divide T. All are in float64, in which 1/√ᾱ does not magnify rounding.
    """
    every = itertools.product(
        ("leading", "trailing", "linspace"), (0, 1), (1, 3, 7, 8, None), *[(True, False)] * 2
    )
    # All leading steps with an offset begin beyond the schedule, where the peer fails too.
    inside = [case for case in every if case[:3] != ("leading", 1, None)]
    for spacing, offset, steps, one, clip in some(inside, name, prediction, quick=4, deep=60):
        config: dict[str, Any] = {
            "timestep_spacing": spacing,
            "steps_offset": offset,
            "prediction_type": prediction,
            "clip_sample": clip,
            "clip_sample_range": 0.9,
        }
        if name == "DDIM":
            config["set_alpha_to_one"] = one
        else:
            config["variance_type"] = "fixed_small" if one else "fixed_large"
        given = in_float64(scheduler(name, **config))
        own, theirs = policies("inpainting", given, num_inference_steps=steps)
        compare(own.double(), theirs.double(), torch.float64, batches=(2, 2))
    assert own not in own_loops


@pytest.mark.parametrize(
    "kwargs", [{"eta": 0.7}, {"eta": 0.0}, {"eta": 1.0, "use_clipped_model_output": True}], ids=str
)
def test_arguments_of_the_step(kwargs: dict[str, Any], own_loops: list[Any]) -> None:
    own, theirs = policies("inpainting", scheduler(), **kwargs)
    compare(own, theirs)
    assert own not in own_loops


def test_numbers_of_environments_change(own_loops: list[Any]) -> None:
    own, theirs = policies("image", scheduler("DDPM"))
    compare(own, theirs, batches=(1, 3, 1, 2, 3))
    assert own not in own_loops


def test_settings_change_between_ticks(own_loops: list[Any]) -> None:
    own, theirs = policies("global", scheduler())
    for name, value in [
        ("num_inference_steps", 3),
        ("kwargs", {"eta": 0.5}),
        ("kwargs", {}),
        ("noise_scheduler", scheduler("DDPM", clip_sample=False)),
        ("num_inference_steps", T),
        ("model", copy.deepcopy(own.model).requires_grad_(False)),
    ]:
        for policy in (own, theirs):
            setattr(policy, name, value)
        if name == "model":
            value.last.bias.data += 0.1
        compare(own, theirs, batches=(1, 1))
    assert own not in own_loops


def test_a_generator() -> None:
    """A given generator is drawn from, and no other."""
    own, theirs = policies("global", scheduler("DDPM"))
    data, mask = torch.zeros(2, 8, 2), torch.zeros(2, 8, 2, dtype=torch.bool)
    features = torch.randn(2, 6)

    def sample(policy: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            chunks = [
                policy.conditional_sample(data, mask, global_cond=features, generator=generator)
                for _ in range(2)
            ]
        return torch.stack(chunks), generator.get_state()

    (chunks, state), (expected, theirs_after) = same_draws(
        lambda: sample(own), lambda: sample(theirs)
    )
    assert torch.equal(state, theirs_after)
    assert not torch.equal(chunks[0], chunks[1])
    assert_same(chunks, expected, 1e-5)


class Spoiled(nn.Module):
    """A network whose output is useless for known elements."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model, self.mask = model, mask
        self.seen: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> Tensor:
        self.seen.append(sample.clone())
        return self.model(sample, timestep, **kwargs).masked_fill(self.mask, 1e4)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_known_elements_reach_others_through_the_network_alone(name: str) -> None:
    """The update of known elements has no effect, to the last bit, for any mask."""
    policy, theirs = policies("inpainting", scheduler(name))
    mask = torch.rand(3, 8, 5) < 0.4
    data = torch.randn(3, 8, 5)

    def sample(policy: Any, data: Tensor) -> Tensor:
        torch.manual_seed(8)
        with torch.no_grad():
            chunk: Tensor = policy.conditional_sample(data, mask)
        return chunk

    chunk = sample(policy, data)
    assert torch.equal(chunk[mask], data[mask])
    assert_same(chunk, sample(theirs, data), 1e-5)
    assert_same(chunk, sample(policy, data.masked_fill(~mask, 1e4)), 0)
    spoiled = policy.model = Spoiled(policy.model, mask).eval()
    assert torch.equal(sample(policy, data), chunk)
    assert len(spoiled.seen) >= STEPS
    assert all(torch.equal(x[mask], data[mask]) for x in spoiled.seen)


def test_what_is_given_is_left_alone() -> None:
    policy, _ = policies("inpainting", scheduler())
    data, mask = torch.randn(2, 8, 5), torch.rand(2, 8, 5) < 0.5
    before = data.clone(), mask.clone()
    with torch.no_grad():
        first = policy.conditional_sample(data, mask)
        kept = first.clone()
        policy.conditional_sample(data + 1, ~mask)
    assert torch.equal(data, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        ({"thresholding": True, "sample_max_value": 1.5}, {}),
        ({}, {"variance_noise": torch.zeros(2, 8, 5)}),
    ],
    ids=["thresholding", "variance_noise"],
)
def test_other_cases_are_sampled_by_the_policy(
    config: dict[str, Any],
    kwargs: dict[str, Any],
    own_loops: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notices, "_given", set())
    own, theirs = policies("inpainting", scheduler(**config), **kwargs)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        answers = ticks(own)
    torch.manual_seed(1)
    assert_same(answers, ticks(theirs), 0)
    assert own_loops == [own] * 3 + [theirs] * 3
    (warning,) = given
    assert next(iter(config | kwargs)) in str(warning.message)
    # At the policy's call.
    assert Path(warning.filename).name == "diffusion_policy.py"
    assert "fastddim" not in Path(warning.filename).parts[-3:]


def test_a_mask_of_another_shape_is_left_to_the_policy(
    own_loops: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of another shape is left to the policy, since indexing takes one of the first
    dimensions too.
    """
    monkeypatch.setattr(notices, "_given", set())
    own, theirs = policies("inpainting", scheduler())
    data, mask = torch.randn(8, 8, 5), torch.rand(8, 8) < 0.5

    def sample(policy: Any) -> Tensor:
        torch.manual_seed(6)
        chunk: Tensor = policy.conditional_sample(data, mask)
        return chunk

    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"own loop.*condition_mask"):
            chunk = sample(own)
        assert_same(chunk, sample(theirs), 0)
    assert torch.equal(chunk[mask], data[mask])
    assert own_loops == [own, theirs]


def test_gradients_are_those_of_the_policy(own_loops: list[Any]) -> None:
    own, theirs = policies("global", scheduler())

    def gradient(policy: Any) -> Tensor:
        policy.predict_action(observation(0))["action"].square().sum().backward()
        return policy.model.first.weight.grad

    assert_same(*same_draws(lambda: gradient(own), lambda: gradient(theirs)), 0)
    assert own_loops == [own, theirs]


def test_errors_of_the_step_are_those_of_diffusers() -> None:
    own, theirs = policies("inpainting", scheduler("DDPM"), eta=0.5)
    for policy in (own, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(TypeError, match="eta"):
                ticks(policy)


def test_in_inference_mode_and_out_of_it() -> None:
    own, theirs = policies("inpainting", scheduler("DDPM"))
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            compare(own, theirs, batches=(2,))


def test_in_threads() -> None:
    """A control loop in one thread and an evaluation in another do not disturb each other."""
    own, theirs = policies("transformer", scheduler())
    data, mask = torch.zeros(1, 8, 2), torch.zeros(1, 8, 2, dtype=torch.bool)
    cond = torch.randn(1, 2, 3)

    def sample(policy: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            chunk: Tensor = policy.conditional_sample(data, mask, cond, generator)
        return chunk

    results: dict[int, Tensor] = {}

    def run(seed: int) -> None:
        for _ in range(3):
            results[seed] = sample(own, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(results, {seed: sample(theirs, seed) for seed in range(3)}, 1e-5)


@pytest.mark.parametrize("kind", UNET)
def test_converted_and_back(kind: str, own_loops: list[Any]) -> None:
    own, theirs = policies(kind, scheduler())
    for dtype in (torch.float32, torch.float64, torch.float32):
        for policy in (own, theirs):
            policy.to(dtype)
        (first, *_) = compare(own, theirs, dtype)
        assert first["action"].dtype == dtype
    assert own not in own_loops


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
def test_averaged_copies(copied: Any, used: bool, own_loops: list[Any]) -> None:
    """A copy, which training averages into, samples with its own weights."""
    own, theirs = policies("global", scheduler())
    if used:
        ticks(own)
        own_loops.clear()
    average = copied(own)
    with torch.no_grad():
        for policy in (average, theirs):
            for weight in policy.model.parameters():
                weight.mul_(0.9)
    averaged, expected = same_draws(lambda: ticks(average), lambda: ticks(theirs))
    assert_same(averaged, expected, 1e-5)
    assert set(own_loops) == {theirs}
    (other,) = same_draws(lambda: ticks(own))
    assert not torch.equal(other[0]["action"], averaged[0]["action"])


def test_weights_change_in_place() -> None:
    own, theirs = policies("global", scheduler())
    compare(own, theirs)
    theirs.model.last.bias.data += 0.3
    own.load_state_dict(theirs.state_dict())
    compare(own, theirs)


@pytest.mark.parametrize("kind", ["inpainting", "transformer"])
def test_a_tick_is_one_replay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick is one replay: data, mask and observation are copied into the captured tensors."""
    replays: list[RecordedGraph] = []
    replay = RecordedGraph.replay

    def counted(graph: RecordedGraph) -> None:
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(RecordedGraph, "replay", counted)
    with recorded_graphs(monkeypatch) as graphs:
        own, theirs = policies(kind, scheduler())
        compare(own, theirs, batches=(1,))
        captured = len(graphs)
        replays.clear()
        compare(own, theirs, batches=(1,) * 4)
        assert len(graphs) == captured
        assert replays == [replays[0]] * 4


def test_a_tick_does_not_wait_for_the_device() -> None:
    """A tick does not wait for the device. The policy's own loop waits, for each index
    by its mask.
    """
    own, theirs = policies("inpainting", scheduler())
    data, mask = torch.randn(1, 8, 5), torch.rand(1, 8, 5) < 0.5
    with torch.no_grad():
        own.conditional_sample(data, mask)
        with NoSync():
            own.conditional_sample(data, mask)
        with pytest.raises(AssertionError, match="synchronisation"), NoSync():
            theirs.conditional_sample(data, mask)


def test_uninstall() -> None:
    own, theirs = policies("inpainting", scheduler())
    ticks(own)
    copied = copy.deepcopy(own)
    assert fast.uninstall(own) is own
    assert vars(own).keys() == vars(theirs).keys()
    torch.manual_seed(2)
    answers = ticks(own)
    torch.manual_seed(2)
    assert_same(answers, ticks(theirs), 0)
    assert fast.uninstall(own) is own
    assert "conditional_sample" in vars(copied)
    fast.install(own)
    compare(own, theirs)


class Guided(DiffusionUnetLowdimPolicy):
    """A subclass that samples in another way."""

    def conditional_sample(self, *arguments: Any, **kwargs: Any) -> Tensor:
        return super().conditional_sample(*arguments, **kwargs) / 2


def test_options_of_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of the latest `install` count, for instance where graphs were captured and are
    not wanted any more.
    """
    with recorded_graphs(monkeypatch) as graphs:
        own, theirs = policies("inpainting", scheduler())
        assert fast.install(own, graph=False) is own
        compare(own, theirs)
        assert not graphs
        fast.install(own, graph="loop", impl="reference")
        compare(own, theirs)
        assert graphs


def test_what_is_no_such_policy_is_refused() -> None:
    for other in (nn.Linear(2, 2), None, "policy", make):
        for function in (fast.install, fast.uninstall):
            with pytest.raises(TypeError, match=r"policy: expected .*DiffusionUnetLowdimPolicy"):
                function(other)
    policy = make("inpainting", scheduler())
    with pytest.raises(ValueError, match="graph: expected"):
        fast.install(policy, graph="sometimes")
    policy.noise_scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(TypeError, match=r"policy: expected a scheduler .* got DDIMInverse"):
        fast.install(policy)
    policy.__class__ = Guided
    with pytest.raises(ValueError, match=r"policy: expected .* conditional_sample, got Guided"):
        fast.install(policy)
    assert "conditional_sample" not in vars(policy)


def test_example() -> None:
    names = run_example(fast, policy=make("inpainting", scheduler()), obs=observation(0))
    assert names["action"].shape == (1, 4, 2)
