"""Methods that a peer's code calls on its own objects are called when a user overrides them."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch

from fastddim import Schedule
from fastddim.integrations import denoising_diffusion_pytorch as lucidrains
from fastddim.integrations import guided_diffusion
from fastddim.integrations import latent_diffusion as latent
from fastddim.integrations._hooks import Hooks

from ..support.dropins import guided_diffusion as of_guided
from ..support.dropins import latent_diffusion as of_latent
from ..support.dropins import lucidrains as of_lucidrains
from ..support.dropins.diffusers import CLASSES, DDIM, assert_alike, diffusers, ours, pair
from ..support.dropins.hooks import WAYS, overriding
from ..support.dropins.peers import assert_same, default_dtype, same_draws
from ..support.tuned import random_steps

SHAPE = (2, 3, 4, 5)


class Peer:
    def method(self) -> int:
        return 1


class Second(Peer):
    def method(self) -> int:
        return 2


class TestHooks:
    """The signs of an override."""

    hooks = Hooks("method", of=("Peer", "Second"), attributes=("value",))

    @pytest.mark.parametrize("peer", [Peer, Second])
    def test_of_none(self, peer: Any) -> None:
        assert self.hooks.overridden(peer()) is None
        assert self.hooks.overridden(type("Own", (peer,), {})()) is None
        owner = peer()
        owner.value = 1
        assert self.hooks.overridden(owner) is None

    @pytest.mark.parametrize("peer", [Peer, Second])
    @pytest.mark.parametrize("way", WAYS)
    def test_of_a_method(self, peer: Any, way: str) -> None:
        owner = overriding(peer(), way, "method", lambda result: -result, lambda _: None)
        assert owner.method() == -peer().method()
        assert self.hooks.overridden(owner) == "method"
        inherited = copy.copy(owner)
        inherited.__class__ = type("Inherited", (type(owner),), {})
        assert self.hooks.overridden(inherited) == "method"

    def test_of_a_class_named_like_the_peer(self) -> None:
        def method(self: Any) -> int:
            return 3

        method.__qualname__, method.__module__ = "Peer.method", "elsewhere"
        assert self.hooks.overridden(type("Peer", (Peer,), {"method": method})()) == "method"

    def test_of_the_peer_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Peer, "method", lambda self: 3)
        assert self.hooks.overridden(Peer()) == "method"
        assert self.hooks.overridden(Second()) is None

    def test_of_an_attribute(self) -> None:
        changed = type("Own", (Peer,), {"value": property(lambda self: 3)})
        assert self.hooks.overridden(changed()) == "value"

    def test_of_no_peer(self) -> None:
        assert self.hooks.overridden(type("Other", (), {"method": len})()) == "method"
        assert self.hooks.overridden(types.SimpleNamespace(method=len)) == "method"
        assert self.hooks.overridden(types.SimpleNamespace()) is None


THRESHOLDING = {"thresholding": True, "sample_max_value": 1.7}
# A method's name, what changes its result, and a config whose steps the change shows in.
SCHEDULER_HOOKS = [
    *((name, "_get_variance", lambda v: 0.3 * v, {}) for name in (*DDIM, "DDPMScheduler")),
    *(
        (name, "_threshold_sample", lambda x: 0.5 * x, THRESHOLDING)
        for name in (*DDIM, "DDPMScheduler")
    ),
    ("DDPMScheduler", "previous_timestep", lambda t: t - 1, {}),
    # η is 0 there, so only what is no number shows.
    ("DDIMParallelScheduler", "_batch_get_variance", lambda v: v * float("nan"), {}),
]


def take(scheduler: Any, name: str = "") -> Any:
    """A step that calls the method of the name."""
    torch.manual_seed(5)
    x, m = torch.randn((2, *SHAPE), dtype=torch.float64) * 2
    if name == "_batch_get_variance":
        return (scheduler.batch_step_no_noise(m, torch.tensor([500, 20]), x),)
    eta = {"eta": 0.7} if isinstance(scheduler, tuple(getattr(diffusers, n) for n in DDIM)) else {}
    return scheduler.step(m, 500, x, **eta)


@pytest.mark.parametrize(("cls", "name", "change", "config"), SCHEDULER_HOOKS)
class TestSchedulers:
    @pytest.mark.parametrize("way", WAYS)
    def test_steps_call_it(self, cls: str, name: str, change: Any, config: Any, way: str) -> None:
        theirs, own = pair(cls, **config)
        plain = take(own, name)
        theirs, own = (
            overriding(scheduler, way, name, change, lambda s: take(s, name))
            for scheduler in (theirs, own)
        )
        expected, result = take(theirs, name), take(own, name)
        assert_alike(expected, result)
        assert not torch.equal(result[0], plain[0])
        for scheduler in (copy.copy(own), copy.deepcopy(own)):
            assert_alike(expected, take(scheduler, name))

    def test_not_once_it_is_gone(self, cls: str, name: str, change: Any, config: Any) -> None:
        theirs, own = pair(cls, **config)
        changed = overriding(own, "object", name, change, take)
        take(changed, name)
        delattr(changed, name)
        assert_alike(take(theirs, name), take(changed, name))

    def test_of_the_peer(
        self, cls: str, name: str, change: Any, config: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An override on the peer is seen from the next `set_timesteps` on."""
        theirs, own = pair(cls, **config)
        plain = take(own, name)
        peer = getattr(diffusers, cls)
        original = getattr(peer, name)
        monkeypatch.setattr(peer, name, lambda *args, **kwargs: change(original(*args, **kwargs)))
        own.set_timesteps(50)
        assert_alike(take(theirs, name), take(own, name))
        assert not torch.equal(take(own, name)[0], plain[0])


class TestWhatASchedulerHas:
    @pytest.mark.parametrize("cls", CLASSES)
    def test_a_property(self, cls: str) -> None:
        """A property for ᾱ may give another tensor each time."""

        def halved(self: Any) -> Any:
            return vars(self)["kept"] * 0.5

        def keep(self: Any, value: Any) -> None:
            vars(self)["kept"] = value

        made = []
        for base in (getattr(diffusers, cls), getattr(ours, cls)):
            scheduler = type("Own", (base,), {"alphas_cumprod": property(halved, keep)})()
            scheduler.set_timesteps(50)
            made.append(scheduler)
        theirs, own = made
        assert_alike(take(theirs), take(own))
        assert not own._fastddim_work.tables.values()

    @pytest.mark.parametrize("cls", CLASSES)
    def test_a_plain_subclass_takes_steps_from_rows(self, cls: str) -> None:
        own = type("Own", (getattr(ours, cls),), {"own": lambda self: None})()
        own.set_timesteps(50)
        own.own_value = 3
        take(own)
        assert len(own._fastddim_work.tables) == 1

    def test_a_copy_has_a_cache_of_its_own(self) -> None:
        """A copy has a cache of its own. Otherwise an override of one of them would be seen in the
        other, or missed.
        """
        theirs, own = pair("DDIMScheduler")
        other = copy.copy(own)
        other._get_variance = lambda *_: torch.tensor(0.01)
        expected = take(theirs)
        for _ in range(2):
            assert_alike(expected, take(own))
            assert not torch.equal(take(other).prev_sample, expected.prev_sample)


class TestNoise:
    @pytest.mark.parametrize("cls", DDIM)
    def test_philox_goes_to_a_step_of_diffusers(self, cls: str) -> None:
        own = getattr(ours, cls).from_config({}, noise="philox", seed=3)
        own.set_timesteps(50)
        expected = take_at(own, 0)
        own._get_variance = types.MethodType(getattr(diffusers, cls)._get_variance, own)
        assert own._fastddim_hooks.overridden(own) == "_get_variance"
        assert_alike(expected, take_at(own, 1), 1e-6)

    def test_philox_is_refused_where_diffusers_draws(self) -> None:
        own = ours.DDPMScheduler.from_config({}, noise="philox", seed=3)
        own.set_timesteps(50)
        own.previous_timestep = lambda t: t - 1
        with pytest.raises(ValueError, match=r"^noise: expected 'torch' where prev"):
            take(own)


class TestTunedSteps:
    @pytest.mark.parametrize("cls", DDIM)
    @pytest.mark.parametrize("name", ["_get_variance", "_threshold_sample"])
    def test_are_refused(self, cls: str, name: str) -> None:
        theirs, own = pair(cls, steps=None, clip_sample=False)
        steps = random_steps(5, schedule=Schedule.from_diffusers(theirs))
        refusal = rf"^tuned: expected None where {name} is overridden"
        changed = overriding(own, "object", name, lambda v: v, take)
        with pytest.raises(ValueError, match=refusal):
            changed.set_tuned(steps)
        own.set_tuned(steps)
        own.set_timesteps(5)
        x = torch.randn(SHAPE)
        own.step(x, steps.timesteps[0], x)
        setattr(own, name, lambda *_: x)
        with pytest.raises(ValueError, match=refusal):
            own.step(x, steps.timesteps[1], x)


def take_at(own: Any, seed: int) -> Any:
    """A step whose noise does not depend on torch's seed."""
    torch.manual_seed(2)
    x, m = torch.randn((2, *SHAPE), dtype=torch.float64)
    torch.manual_seed(seed)
    return own.step(m, 500, x, eta=0.7)


def moved(out: dict[str, Any]) -> dict[str, Any]:
    return {**out, "pred_xstart": 0.5 * out["pred_xstart"]}


GUIDED_HOOKS = [
    ("EPSILON", "p_mean_variance", moved),
    ("EPSILON", "condition_score", moved),
    ("EPSILON", "_predict_xstart_from_eps", lambda x_0: 0.7 * x_0),
    ("PREVIOUS_X", "_predict_xstart_from_xprev", lambda x_0: 0.7 * x_0),
    ("START_X", "_predict_eps_from_xstart", lambda eps: 0.7 * eps),
    ("EPSILON", "_scale_timesteps", lambda t: (t + 1) % 20),
    ("EPSILON", "_wrap_model", lambda wrapped: lambda x, t: 0.5 * wrapped(x, t)),
    # What DDIM takes of it is not its result.
    ("EPSILON", "q_posterior_mean_variance", lambda result: result),
]


class TestGuidedDiffusion:
    @staticmethod
    def steps(diffusion: Any, dtype: torch.dtype = torch.float64) -> list[Any]:
        torch.manual_seed(3)
        x, t, model = torch.randn(SHAPE, dtype=dtype), torch.tensor([7, 19]), of_guided.Model()
        return [
            diffusion.ddim_sample(model, x, t, eta=0.6),
            diffusion.ddim_sample(model, x, t, cond_fn=lambda x, t: -0.3 * x, model_kwargs={}),
            diffusion.ddim_sample(model, x, t, clip_denoised=False, denoised_fn=lambda x: 0.8 * x),
            diffusion.ddim_reverse_sample(model, x, t),
            diffusion.ddim_sample_loop(model, SHAPE, noise=x, eta=0.4),
        ]

    @staticmethod
    def installed(diffusion: Any) -> Any:
        """An object of a class that the drop-ins are installed on."""
        own = copy.copy(diffusion)
        own.__class__ = type("Installed", (type(diffusion),), {})
        guided_diffusion.install(own.__class__)
        return own

    @pytest.mark.parametrize("spaced", [None, "ddim20"])
    @pytest.mark.parametrize(("kind", "name", "change"), GUIDED_HOOKS)
    @pytest.mark.parametrize("way", WAYS)
    def test_steps_call_it(
        self, spaced: str | None, kind: str, name: str, change: Any, way: str
    ) -> None:
        diffusion = of_guided.make(kind, spaced=spaced)
        if not hasattr(diffusion, name):
            pytest.skip(f"GaussianDiffusion has no {name}")
        plain = self.steps(diffusion)
        own, theirs = (
            overriding(d, way, name, change, self.steps)
            for d in (self.installed(diffusion), diffusion)
        )
        expected = self.steps(theirs)
        assert_same(self.steps(own), expected, 1e-10)
        changed = [
            not torch.equal(a["sample"], b["sample"])
            for a, b in zip(plain[:4], expected[:4], strict=True)
        ]
        assert any(changed) == (name != "q_posterior_mean_variance")

    def test_half_precision(self) -> None:
        diffusion = of_guided.make("EPSILON")
        own, theirs = (
            overriding(d, "subclass", "p_mean_variance", moved, None)
            for d in (self.installed(diffusion), diffusion)
        )
        result = self.steps(own, torch.float16)
        assert_same(result, self.steps(theirs, torch.float16), 1e-3)
        assert result[0]["sample"].dtype is torch.float32

    def test_on_the_peer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        diffusion = of_guided.make("EPSILON")
        own = self.installed(diffusion)
        self.steps(own)
        (peer,) = (c for c in type(own).__mro__ if c.__name__ == "GaussianDiffusion")
        original = peer._predict_xstart_from_eps
        monkeypatch.setattr(
            peer, "_predict_xstart_from_eps", lambda *args, **kw: 0.7 * original(*args, **kw)
        )
        assert_same(self.steps(own), self.steps(diffusion), 1e-10)


LUCIDRAINS_HOOKS = [
    ("pred_noise", "predict_start_from_noise", lambda x_0: 0.7 * x_0),
    ("pred_x0", "predict_noise_from_start", lambda eps: 0.7 * eps),
    ("pred_v", "predict_start_from_v", lambda x_0: 0.7 * x_0),
    *(
        (objective, "model_predictions", lambda p: p._replace(pred_x_start=0.7 * p.pred_x_start))
        for objective in ("pred_noise", "pred_x0", "pred_v")
    ),
]
LUCIDRAINS = {
    "ddim_sample": lambda objective: of_lucidrains.make(
        torch.float64, self_condition=True, objective=objective, ddim_sampling_eta=0.4
    ),
    "ddim_sample_1d": lambda objective: of_lucidrains.make_1d(
        torch.float64, self_condition=True, objective=objective, ddim_sampling_eta=0.4
    ),
    "guided_ddim_sample": lambda objective: of_lucidrains.make_other(
        "guided_diffusion", torch.float64, objective=objective, ddim_sampling_eta=0.4
    ),
    "classifier_free_ddim_sample": lambda objective: of_lucidrains.make_guided(
        torch.float64, objective=objective, ddim_sampling_eta=0.4, use_cfg_plus_plus=True
    ),
}


class TestLucidrains:
    @staticmethod
    def drawn(diffusion: Any, drop_in: str) -> Any:
        torch.manual_seed(2)
        if drop_in == "classifier_free_ddim_sample":
            return diffusion.ddim_sample(torch.tensor([0, 3, 1]), of_lucidrains.SHAPE, 2.5)
        shape = (3, 2, 10) if drop_in == "ddim_sample_1d" else of_lucidrains.SHAPE
        return diffusion.ddim_sample(shape)

    @pytest.mark.parametrize("drop_in", LUCIDRAINS)
    @pytest.mark.parametrize(("objective", "name", "change"), LUCIDRAINS_HOOKS)
    @pytest.mark.parametrize("way", WAYS)
    def test_steps_call_it(
        self, drop_in: str, objective: str, name: str, change: Any, way: str
    ) -> None:
        with default_dtype(torch.float64):
            diffusion = LUCIDRAINS[drop_in](objective)
            own = copy.copy(diffusion)
            own.__class__ = type("Installed", (type(diffusion),), {})
            lucidrains.install(own.__class__)
            assert own.ddim_sample.__func__ is getattr(lucidrains, drop_in)
            plain = self.drawn(own, drop_in)
            own, theirs = (
                overriding(d, way, name, change, lambda d: self.drawn(d, drop_in))
                for d in (own, diffusion)
            )
            expected = self.drawn(theirs, drop_in)
            assert_same(self.drawn(own, drop_in), expected, 1e-10)
            assert not torch.equal(expected, plain)

    @pytest.mark.parametrize("every", [False, True])
    def test_all_states(self, every: bool) -> None:
        with default_dtype(torch.float64):
            for drop_in in ("ddim_sample", "guided_ddim_sample"):
                diffusion = LUCIDRAINS[drop_in]("pred_noise")
                diffusion.predict_start_from_noise = lambda x, t, noise: 0.3 * x - 0.1 * noise
                own = copy.copy(diffusion)
                lucidrains.install(own)
                result, expected = same_draws(
                    lambda: own.ddim_sample(of_lucidrains.SHAPE, every),  # noqa: B023
                    lambda: diffusion.ddim_sample(of_lucidrains.SHAPE, every),  # noqa: B023
                )
                assert_same(result, expected, 1e-10)


class TestLatentDiffusion:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["predict_start_from_z_and_v", "predict_eps_from_z_and_v"])
    @pytest.mark.parametrize("options", [
        {},
        {"quantize_denoised": True},
        {"use_original_steps": True, "temperature": 0.7},
        {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": torch.zeros(2)},
    ], ids=str)  # fmt: skip
    def test_steps_call_it(self, way: str, name: str, options: dict[str, Any]) -> None:
        with default_dtype(torch.float64):
            sampler = of_latent.make("v")
            x, c = torch.randn(2, 4, 5, 3), torch.tensor([0.2, -0.4])
            t = torch.full((2,), int(sampler.ddim_timesteps[6]))
            index = int(t[0]) if options.get("use_original_steps") else 6

            def step(model: Any) -> Any:
                sampler.model = model
                return of_latent.compare(
                    sampler, lambda s: s.p_sample_ddim(x, c, t, index, **options), 1e-10
                )

            plain = step(sampler.model)
            changed = step(overriding(sampler.model, way, name, lambda v: 0.7 * v, step))
            assert not torch.equal(changed[0], plain[0])

    def test_a_step_is_called_where_it_is_overridden(self) -> None:
        sampler, c = of_latent.make("eps", eta=0.3), torch.tensor([0.2, -0.4])
        own = copy.copy(sampler)
        own.__class__ = type("Installed", (type(sampler),), {})
        latent.install(own.__class__)
        own, theirs = (
            overriding(s, "object", "p_sample_ddim", lambda r: (0.7 * r[0], r[1]), None)
            for s in (own, sampler)
        )
        for run in (
            lambda s: s.ddim_sampling(c, (2, 4, 5, 3)),
            lambda s: s.decode(torch.ones(2, 4, 5, 3), c, 4),
        ):
            result, expected = same_draws(lambda: run(own), lambda: run(theirs))  # noqa: B023
            assert_same(result, expected, 1e-5)
