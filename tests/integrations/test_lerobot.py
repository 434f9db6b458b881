"""Live comparison with LeRobot's `DiffusionPolicy`, through its own `select_action`."""

from __future__ import annotations

import copy
import io
import sys
import threading
import types
from importlib.metadata import version
from itertools import product

import pytest
import torch

from fastddim import notices
from fastddim.integrations import lerobot

from ..support.dropins.lerobot import actions, history, make_policy, observations, untouched
from ..support.dropins.peers import TOLERANCE, assert_same, modules_named, run_example, same_draws
from ..support.dropins.peers import lerobot as peer
from ..support.optional import optional
from ..support.recorded_graph import RecordedGraph, recorded_graphs

diffusers = optional("diffusers")

DDIM = {"noise_scheduler_type": "DDIM"}
CONFIGS = {
    "DDPM": {},
    "DDPM, 7": {"num_inference_steps": 7},
    "DDPM, 1": {"num_inference_steps": 1},
    "DDPM of x_0": {"prediction_type": "sample", "num_inference_steps": 12},
    "DDPM without clip": {"clip_sample": False, "num_inference_steps": 7},
    "DDPM, linear": {"beta_schedule": "linear", "num_inference_steps": 30},
    "DDIM, 10": {**DDIM, "num_inference_steps": 10},
    "DDIM, 7, wide clip": {**DDIM, "num_inference_steps": 7, "clip_sample_range": 2.5},
    "DDIM, 1": {**DDIM, "num_inference_steps": 1},
    "DDIM of x_0": {**DDIM, "prediction_type": "sample", "num_inference_steps": 16},
    "DDIM without clip": {**DDIM, "clip_sample": False, "num_inference_steps": 10},
    "DDIM, scaled": {
        **DDIM,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 50,
        "num_inference_steps": 15,
    },
}


@pytest.fixture(autouse=True)
def no_warning_given(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())


@pytest.fixture
def policy():
    """A policy of five DDIM steps, for samplers to be installed on."""
    return lerobot.install(make_policy(**DDIM, num_inference_steps=5))


def same_actions(policy, tolerance=1e-5, **run):
    """The policy gives the actions of its own loop, and leaves torch's generator as that does."""
    own, expected = same_draws(
        *[lambda p=p: actions(p, **run) for p in (policy, untouched(policy))]
    )
    assert_same(own, expected, tolerance)
    return own


def prepared(policy):
    """The samplers that were prepared so far."""
    return policy.diffusion.conditional_sample._samplers._kept.values()


@pytest.mark.parametrize("config", CONFIGS)
def test_actions(config, some):
    """Actions agree with LeRobot's. A random network magnifies the rounding of float32 to 1e-5 and
    beyond in 100 steps of DDIM, LeRobot's too, so these are compared in float64 only.
    """
    for dtype, environments in some([*product(TOLERANCE, (1, 3))], config, quick=1):
        policy = lerobot.install(make_policy(**CONFIGS[config]).to(dtype))
        same_actions(policy, TOLERANCE[dtype], environments=environments)
        assert len(prepared(policy)) == 1


def test_ddim_of_all_steps():
    same_actions(lerobot.install(make_policy(**DDIM).double()), 1e-10, ticks=1)


@pytest.mark.parametrize("cameras", [1, 2])
def test_images(cameras):
    """Encoders of images are LeRobot's own code, and run before the sampler."""
    separate = cameras == 2
    policy = make_policy(
        cameras=cameras, use_separate_rgb_encoder_per_camera=separate, num_inference_steps=4
    )
    same_actions(lerobot.install(policy), environments=2)


def test_chunks(policy):
    """LeRobot's other ways to the loop: `predict_action_chunk` after `select_action`, and a batch
    of observations with their history, as a dataset has them, which it takes too since 0.6.
    """
    since_0_6 = tuple(map(int, version("lerobot").split(".")[:2])) >= (0, 6)

    def chunks(policy):
        policy.reset()
        with torch.no_grad():
            yield policy.diffusion.generate_actions(history(policy, 4))
        if since_0_6:
            yield policy.predict_action_chunk(history(policy, 4))
        given = next(observations(policy, 3))
        policy.select_action(given)
        yield policy.predict_action_chunk(given)

    own, expected = same_draws(lambda: [*chunks(policy)], lambda: [*chunks(untouched(policy))])
    assert_same(own, expected, 1e-5)
    assert len(prepared(policy)) == 2


def test_noise_that_is_given(policy):
    given = next(observations(policy, 3))
    noise = torch.randn(3, 4, 2)

    def chunk(policy):
        policy.reset()
        return policy.select_action(given, noise=noise)

    own, expected = same_draws(lambda: chunk(policy), lambda: chunk(untouched(policy)))
    assert_same(own, expected, 1e-5)


@pytest.mark.parametrize("noise", [None, torch.ones(2, 4, 2)], ids=["drawn", "given"])
@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
def test_generator(scheduler, noise):
    policy = make_policy(noise_scheduler_type=scheduler, num_inference_steps=3)
    condition, states = torch.randn(2, 14), []

    def chunk(policy):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            result = policy.diffusion.conditional_sample(2, condition, generator, noise=noise)
        states.append(generator.get_state())
        return result

    own, expected = same_draws(*[
        lambda p=p: chunk(p) for p in (lerobot.install(policy), untouched(policy))
    ])  # fmt: skip
    assert_same(own, expected, 1e-5)
    assert torch.equal(*states)


def test_condition_of_now(policy):
    """A sampler that is prepared once reads the observation of each tick."""
    diffusion, conditions = policy.diffusion, torch.randn(3, 1, 14)
    noise, expected = torch.randn(1, 4, 2), untouched(policy).diffusion
    with torch.no_grad():
        own = [diffusion.conditional_sample(1, c, noise=noise) for c in conditions]
        theirs = [expected.conditional_sample(1, c, noise=noise) for c in conditions]
    assert_same(own, theirs, 1e-5)
    assert (own[0] - own[1]).abs().max() > 1e-3
    assert len(prepared(policy)) == 1


class TestModes:
    @pytest.mark.parametrize("prepared_in", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("used_in", [torch.no_grad, torch.inference_mode])
    def test_samplers_serve_all(self, prepared_in, used_in):
        policy = lerobot.install(make_policy(num_inference_steps=3))
        with prepared_in():
            actions(policy, ticks=1)
        with used_in():
            same_actions(policy)
        assert len(prepared(policy)) == 1

    def test_gradients(self, policy):
        """LeRobot's loop runs if gradients are asked for, and has them."""
        condition, noise = torch.randn(1, 14), torch.randn(1, 4, 2)
        own, expected = (
            p.diffusion.conditional_sample(1, condition.requires_grad_(), noise=noise)
            for p in (policy, untouched(policy))
        )
        assert_same(own, expected, 0)
        assert own.requires_grad
        assert not prepared(policy)

    def test_no_gradients_of_frozen_weights(self, policy):
        policy.requires_grad_(False)
        own = policy.diffusion.conditional_sample(1, torch.randn(1, 14))
        assert not own.requires_grad
        assert len(prepared(policy)) == 1

    def test_training_mode(self, policy):
        policy.train()
        with pytest.warns(UserWarning, match="lerobot: .* training mode; call policy.eval()"):
            same_actions(policy, 0)
        policy.eval()
        same_actions(policy)
        assert len(prepared(policy)) == 1

    def test_autocast(self, policy):
        """Under autocast steps are rounded once, as LeRobot's are for an output in float32."""
        expected = untouched(policy)
        expected.diffusion.unet.register_forward_hook(lambda _module, _inputs, y: y.float())
        with torch.autocast("cpu", torch.bfloat16):
            own, theirs = same_draws(lambda: actions(policy), lambda: actions(expected))
        assert_same(own, theirs, 1e-5)
        same_actions(policy)
        assert len(prepared(policy)) == 2

    def test_noise_under_autocast(self):
        """Under autocast noise is drawn in the dtype of the network's output, as
        LeRobot draws it.
        """
        policy = lerobot.install(make_policy(num_inference_steps=5))
        with torch.autocast("cpu", torch.bfloat16):
            same_actions(policy, 0.03, environments=3)

    def test_transforms(self, policy):
        noise, condition = torch.randn(2, 1, 4, 2), torch.randn(1, 14)
        expected = untouched(policy).diffusion

        def sampled(diffusion):
            return torch.func.vmap(lambda z: diffusion.conditional_sample(1, condition, noise=z))(
                noise
            )

        with torch.no_grad():
            assert_same(sampled(policy.diffusion), sampled(expected), 0)

    @pytest.mark.deep
    def test_compiled_programs(self, policy):
        condition, noise = torch.randn(1, 14), torch.randn(1, 4, 2)
        expected = untouched(policy).diffusion.conditional_sample(1, condition, noise=noise)

        @torch.compile(backend="eager")
        def sampled(condition, noise):
            return policy.diffusion.conditional_sample(1, condition, noise=noise)

        # torch.compile looks modules up by the names of their functions.
        with torch.no_grad(), modules_named(peer().modules):
            assert_same(sampled(condition, noise), expected, 1e-5)


class TestChanges:
    """Changes, between ticks, of everything that a sampler depends on."""

    def test_number_of_steps(self, policy):
        for steps in (5, 4, 5, 30, 1, 3):
            policy.diffusion.num_inference_steps = steps
            same_actions(policy, ticks=1)
        assert len(prepared(policy)) == 4

    def test_number_of_steps_that_the_scheduler_refuses(self, policy):
        policy.diffusion.num_inference_steps = 101
        errors = []
        for p in (policy, untouched(policy)):
            with pytest.raises(ValueError, match="cannot be larger than") as raised:
                actions(p)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]

    def test_scheduler(self, policy):
        own = same_actions(policy)
        diffusion = policy.diffusion
        diffusion.noise_scheduler.register_to_config(clip_sample_range=0.3)
        assert same_actions(policy).abs().max() < own.abs().max()
        diffusion.noise_scheduler = diffusers.DDPMScheduler.from_config(
            diffusion.noise_scheduler.config
        )
        same_actions(policy)
        diffusion.noise_scheduler.alphas_cumprod *= 0.9
        same_actions(policy)
        assert len(prepared(policy)) == 4

    def test_weights(self, policy):
        before = same_actions(policy)
        other = make_policy(**DDIM)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
        policy.load_state_dict(other.state_dict())
        assert (same_actions(policy) - before).abs().max() > 1e-3
        policy.load_state_dict(make_policy().state_dict(), assign=True)
        assert_same(same_actions(policy), before, 0)
        assert len(prepared(policy)) == 1

    def test_dtype(self, policy):
        for dtype in (torch.float32, torch.float64, torch.float32):
            same_actions(policy.to(dtype), TOLERANCE[dtype])
        assert len(prepared(policy)) == 2

    def test_dtype_of_the_network_alone(self):
        """The dtype of the state is that of the image encoder."""
        policy = lerobot.install(make_policy(**DDIM, cameras=1, num_inference_steps=5))
        expected = untouched(policy)
        expected.diffusion.unet.register_forward_hook(lambda _module, _inputs, y: y.float())
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                own, theirs = same_draws(lambda: actions(policy), lambda: actions(expected))
                assert_same(own, theirs, 1e-5)
                for p in (policy, expected):
                    p.diffusion.unet.bfloat16()

    def test_network(self, policy):
        same_actions(policy)
        policy.diffusion.unet = make_policy(diffusion_step_embed_dim=4).diffusion.unet
        same_actions(policy)
        assert len(prepared(policy)) == 2

    @pytest.mark.deep
    def test_compiled_network(self, policy):
        policy.diffusion.unet = torch.compile(policy.diffusion.unet, backend="eager")
        same_actions(policy)
        assert len(prepared(policy)) == 1

    def test_environments(self, policy):
        for environments in (1, 2, 1):
            same_actions(policy, environments=environments)
        assert len(prepared(policy)) == 2


class TestCopies:
    def test_deep_copy(self, policy):
        """A deep copy samples with its own network, before and after the original has."""
        for _ in range(2):
            copied = copy.deepcopy(policy)
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.add_(0.1)
            assert (same_actions(copied) - same_actions(policy)).abs().max() > 1e-3
        lerobot.uninstall(copied)
        assert "conditional_sample" in vars(policy.diffusion)

    def test_pickle(self, policy):
        expected, file = same_actions(policy), io.BytesIO()
        with modules_named(peer().modules):
            torch.save(policy, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
        assert_same(same_actions(loaded), expected, 0)
        assert len(prepared(loaded)) == 1

    def test_state_dict(self, policy):
        assert policy.state_dict().keys() == untouched(policy).state_dict().keys()


def test_threads(policy):
    """Threads wait for each other, and get the actions that they would get alone."""
    conditions = torch.randn(4, 1, 14)

    def chunk(i):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            return policy.diffusion.conditional_sample(1, conditions[i], generator)

    expected, own = [chunk(i) for i in range(4)], {}
    start = threading.Barrier(4)

    def run(i):
        start.wait()
        own[i] = [chunk(i) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same([own[i] for i in range(4)], [[chunk] * 3 for chunk in expected], 0)


@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
def test_one_replay_a_tick(scheduler, monkeypatch):
    """Each tick is one replay of a graph of the whole loop, which is captured at the first tick and
    gets the observation of each.
    """
    policy = make_policy(noise_scheduler_type=scheduler, num_inference_steps=5)
    replays = []
    monkeypatch.setattr(
        RecordedGraph, "replay", lambda graph, of=RecordedGraph.replay: replays.append(of(graph))
    )
    with recorded_graphs(monkeypatch) as graphs:
        lerobot.install(policy, graph="loop")
        same_actions(policy)
        assert len(replays) == 2
        (graph,) = graphs
        assert graph.launched
        same_actions(policy, ticks=1)
        assert len(replays) == 3
        assert len(graphs) == 1


class TestInstall:
    def test_only_the_policy_changes(self):
        policy, other = make_policy(**DDIM), make_policy(**DDIM)
        before = dict(vars(policy.diffusion))
        assert lerobot.install(policy) is policy
        assert vars(policy.diffusion).keys() - before == {"conditional_sample"}
        assert vars(other.diffusion).keys() == before.keys()
        assert lerobot.uninstall(policy) is policy
        assert vars(policy.diffusion) == before

    def test_twice(self, policy):
        lerobot.install(lerobot.install(policy), graph=False, impl="reference")
        same_actions(policy)
        assert "impl='reference', graph=False" in repr(prepared(policy)[0]._sampler)
        lerobot.uninstall(lerobot.uninstall(policy))
        assert "conditional_sample" not in vars(policy.diffusion)

    @pytest.mark.parametrize("function", [lerobot.install, lerobot.uninstall])
    @pytest.mark.parametrize("other", [None, torch.nn.Linear(1, 1), "policy"], ids=str)
    def test_no_policy(self, function, other):
        with pytest.raises(TypeError, match="policy: expected a DiffusionPolicy of LeRobot, got "):
            function(other)

    def test_scheduler(self):
        policy = make_policy()
        policy.diffusion.noise_scheduler = diffusers.DPMSolverMultistepScheduler()
        with pytest.raises(TypeError, match="DDIMScheduler or DDPMScheduler, got DPMSolver"):
            lerobot.install(policy)

    def test_another_method(self):
        policy = make_policy()
        policy.diffusion.conditional_sample = lambda *_args, **_kwargs: None
        with pytest.raises(ValueError, match="lerobot's own conditional_sample, got Diff"):
            lerobot.install(policy)

    @pytest.mark.parametrize("option", ["graph", "impl"])
    def test_options(self, option):
        with pytest.raises(ValueError, match=f"{option}: expected one of .*, got 'none'"):
            lerobot.install(make_policy(), **{option: "none"})


@pytest.mark.parametrize("kind", ["another", "subclass"])
def test_other_schedulers(policy, kind):
    """Schedulers without a sampler run in LeRobot's own loop, with one warning."""

    class Halved(diffusers.DDIMScheduler):
        def step(self, model_output, *args, **kwargs):
            return super().step(model_output / 2, *args, **kwargs)

    policy.diffusion.noise_scheduler, reason = {
        "another": (diffusers.LCMScheduler(100), "its scheduler is none of .*: LCMScheduler"),
        "subclass": (Halved(100), "the step of its scheduler, Halved, at timestep 80 is neither"),
    }[kind]
    with pytest.warns(
        UserWarning, match=f"lerobot: the policy's own loop is taken, since {reason}"
    ):
        same_actions(policy, 0)
    same_actions(policy, 0)


def test_example(policy):
    name = "lerobot.policies.diffusion.modeling_diffusion"
    parts = name.split(".")
    imports = {".".join(parts[: n + 1]): types.SimpleNamespace(__path__=[]) for n in range(4)}
    loaded = types.SimpleNamespace(from_pretrained=lambda _name: lerobot.uninstall(policy))
    imports[name] = types.SimpleNamespace(DiffusionPolicy=loaded)
    given = next(observations(policy, 1))
    names = run_example(sys.modules[lerobot.__name__], imports, observation=given)
    assert names["action"].shape == (1, 2)
    assert len(prepared(policy)) == 1
