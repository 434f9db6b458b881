"""Methods that a peer's code calls on its own objects are called where somebody overrides them."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch

from fastddim import Schedule
from fastddim.integrations._hooks import Hooks

from ..support.dropins.diffusers import CLASSES, DDIM, assert_alike, diffusers, ours, pair
from ..support.dropins.hooks import WAYS, overriding
from ..support.tuned import random_steps

SHAPE = (2, 3, 4, 5)


class Peer:
    def method(self) -> int:
        return 1


class Second(Peer):
    def method(self) -> int:
        return 2


class TestHooks:
    """What tells an override."""

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
        assert self.hooks.overridden(types.SimpleNamespace()) == "method"


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
        """Seen from the next `set_timesteps` on."""
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
        """Of ᾱ, which gives another tensor each time."""

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
        """Else an override of one of them would be seen in the other, or missed."""
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
