"""Timesteps and indices of every type, read as the peers read them or refused by name."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import Schedule
from fastddim.integrations import ermongroup, k_diffusion, webui

from ..support.dropins import ermongroup as of_ermongroup
from ..support.dropins import guided_diffusion as of_guided
from ..support.dropins import latent_diffusion as of_latent
from ..support.dropins.diffusers import CLASSES, DDIM, assert_alike, diffusers, ours, pair
from ..support.dropins.k_diffusion import denoiser, levels
from ..support.dropins.peers import assert_same, default_dtype, same_draws
from ..support.dropins.webui import WebuiModel, peer_webui
from ..support.tuned import random_steps

SHAPE = (2, 3, 4, 5)
REFUSALS = (IndexError, TypeError, ValueError)
NOISING = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler")

SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
OTHERS = (
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
)

# Among the timesteps of 50 steps; within int8.
T = 100
SINGLE = {
    "int": T,
    "negative": -3,
    "too large": 1000,
    "float": float(T),
    "fraction": 0.5,
    "nan": float("nan"),
    "True": True,
    "False": False,
    "complex": 1j,
    "str": str(T),
    "None": None,
    "list": [T],
    "tuple": (T,),
    **{f"np.{d.__name__}": d(T) for d in (np.int64, np.int32, np.uint8, np.uint64)},
    **{f"np.{d.__name__}": d(T) for d in (np.float32, np.float64, np.bool_)},
    "array": np.array(T),
    "array [1]": np.array([T]),
    "array of floats": np.array(float(T)),
    **{f"{d}": torch.tensor(T, dtype=d) for d in (*SIGNED, *OTHERS)},
    **{f"{d} [1]": torch.tensor([T], dtype=d) for d in (torch.int64, torch.int32, *OTHERS)},
    "[1, 1]": torch.tensor([[T]]),
    "[0]": torch.tensor([], dtype=torch.int64),
    "[B]": torch.tensor([T, 20]),
    "[B] of one value": torch.tensor([T, T]),
    "[B] of floats": torch.tensor([float(T), 20.0]),
    "array [B]": np.array([T, 20]),
}

ACCIDENTS = {
    ("DDIMInverseScheduler", "torch.int8"): "diffusers compares it with 999, which no int8 can be",
    ("DDPMScheduler", "array of floats"): "diffusers takes this one kind of floats",
    ("DDPMScheduler", "[1, 1]"): "diffusers takes the number of the row for that of the step",
}


def outcome(call: Any) -> Any:
    torch.manual_seed(7)
    try:
        return call()
    except Exception as error:
        return error


def assert_same_outcome(argument: str, theirs: Any, own: Any) -> None:
    """Asserts the same value, or an error of ours that names the argument and is of the kind that a
    user may catch for the peer.
    """
    if not isinstance(theirs, Exception):
        assert not isinstance(own, Exception), own
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-6)
        else:
            assert_alike(theirs, own)
        return
    assert isinstance(own, REFUSALS), own
    assert str(own).startswith(f"{argument}: expected "), own
    if isinstance(theirs, IndexError):
        assert isinstance(own, IndexError)


def draw() -> tuple[Tensor, Tensor]:
    x, m = torch.randn((2, *SHAPE), dtype=torch.float64)
    return x, m


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
class TestStep:
    """A timestep for all samples."""

    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("case", SINGLE)
    def test_as_in_diffusers(self, cls: str, case: str) -> None:
        if (cls, case) in ACCIDENTS:
            pytest.skip(ACCIDENTS[cls, case])
        (x, m), t = draw(), SINGLE[case]
        theirs, own = pair(cls)
        result = outcome(lambda: own.step(m, t, x))
        assert_same_outcome("timestep", outcome(lambda: theirs.step(m, t, x)), result)
        # A table that is there changes nothing.
        own.step(m, T, x)
        assert type(outcome(lambda: own.step(m, t, x))) is type(result)

    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("kind", ["philox", "tuned", "overridden", "integers"])
    def test_no_step_takes_another_type(self, cls: str, kind: str) -> None:
        (x, m), own = draw(), pair(cls)[1]
        if kind == "philox":
            own.set_noise("philox", 3)
        if kind == "overridden":
            own._get_variance = lambda *_: torch.tensor(0.1)
        if kind == "integers":
            x = x.long()
        if kind == "tuned":
            if cls not in DDIM:
                pytest.skip("only the two DDIM schedulers take tuned steps")
            own = getattr(ours, cls).from_config({"clip_sample": False})
            own.set_tuned(random_steps(5, schedule=Schedule.from_diffusers(own)))
            own.set_timesteps(5)
        eta = {"eta": 1.0} if cls in DDIM and kind != "tuned" else {}
        for t in (0.5, True, "1", None, torch.tensor(1.0), torch.tensor([5, 5])):
            with pytest.raises(REFUSALS, match=r"^timestep: expected "):
                own.step(m, t, x, **eta)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_more_than_one_is_told_what_to_do(self, cls: str) -> None:
        (x, m), own = draw(), pair(cls)[1]
        for device in ("cpu", "meta"):
            t = torch.tensor([980, 500], device=device)
            with pytest.raises(
                ValueError, match=r"got 2; .*batch_step_no_noise .*Stream"
            ) as raised:
                own.step(m.to(device), t, x.to(device))
            assert str(raised.value).startswith("timestep: expected one for all samples")

    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("dtype", OTHERS)
    def test_on_a_device(self, cls: str, dtype: torch.dtype) -> None:
        """Timesteps on a device serve if nothing reads their value. "meta" stands in
        for a device.
        """
        x, own = torch.zeros(SHAPE, device="meta"), pair(cls)[1]
        with pytest.raises(IndexError, match=f"^timestep: expected an integer.* got {dtype}"):
            own.step(x, torch.zeros((), dtype=dtype, device="meta"), x)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_timesteps_of_another_type(self, cls: str) -> None:
        (x, m), own = draw(), pair(cls)[1]
        own.timesteps = own.timesteps.float()
        with pytest.raises(IndexError, match=r"^timestep: .* got torch.float32 of shape \(\)"):
            own.step(m, own.timesteps[3], x)


MANY = {
    **{f"{d} [B]": torch.tensor([T, 20], dtype=d) for d in (*SIGNED, *OTHERS)},
    **{f"{d} [1]": torch.tensor([T], dtype=d) for d in (*SIGNED, *OTHERS)},
    **{f"{d}": torch.tensor(T, dtype=d) for d in (*SIGNED, *OTHERS)},
    "fractions": torch.tensor([0.5, 0.99]),
    "int": T,
    "float": 0.5,
    "list": [T, 20],
    "array": np.array([T, 20]),
    "None": None,
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
class TestManyTimesteps:
    """A timestep for each sample."""

    @pytest.mark.parametrize("cls", NOISING)
    @pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
    @pytest.mark.parametrize("case", MANY)
    def test_as_in_diffusers(self, cls: str, method: str, case: str) -> None:
        (x, m), t = draw(), MANY[case]
        theirs, own = (outcome(lambda s=s: getattr(s, method)(x, m, t)) for s in pair(cls))
        assert_same_outcome("timesteps", theirs, own)

    @pytest.mark.parametrize("cls", NOISING)
    @pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
    def test_masks(self, cls: str, method: str, dtype: torch.dtype) -> None:
        """Masks select among all timesteps, as an index of tensors does: here with a sample for
        each.
        """
        mask = torch.zeros(1000, dtype=dtype)
        mask[[3, 700]] = 1
        x, m = draw()
        theirs, own = (getattr(s, method)(x, m, mask) for s in pair(cls))
        assert torch.equal(theirs, own)
        x = torch.randn(1000, 3)
        theirs, own = (outcome(lambda s=s: getattr(s, method)(x, x, mask)) for s in pair(cls))
        assert type(theirs) is type(own) is RuntimeError

    @pytest.mark.parametrize("case", MANY)
    def test_batch_steps(self, case: str) -> None:
        (x, m), t = draw(), MANY[case]
        theirs, own = (
            outcome(lambda s=s: s.batch_step_no_noise(m, t, x))
            for s in pair("DDIMParallelScheduler")
        )
        assert_same_outcome("timesteps", theirs, own)


MOVING = [
    *((cls, method) for cls in NOISING for method in ("add_noise", "get_velocity")),
    ("DDIMParallelScheduler", "batch_step_no_noise"),
]


class TestWhereTablesLive:
    """diffusers moves ᾱ to the samples, and training code reads it there. "meta" is a device."""

    @staticmethod
    def call(scheduler: Any, method: str, x: Tensor, t: Tensor) -> Tensor:
        if method == "batch_step_no_noise":
            return scheduler.batch_step_no_noise(x, t, x)
        return getattr(scheduler, method)(x, x, t)

    @pytest.mark.parametrize(("cls", "method"), MOVING)
    @pytest.mark.parametrize("broadcast", [False, True])
    def test_as_in_diffusers(self, cls: str, method: str, broadcast: bool) -> None:
        theirs, own = pair(cls)
        x, t = torch.zeros(SHAPE, device="meta"), torch.tensor([3, 500], device="meta")
        x = x[:1] if broadcast else x
        for scheduler in (theirs, own):
            self.call(scheduler, method, x, t)
        for name in ("alphas_cumprod", "final_alpha_cumprod", "timesteps", "betas"):
            if hasattr(theirs, name):
                assert getattr(own, name).device == getattr(theirs, name).device, name
        assert own.alphas_cumprod.device.type == "meta"

    @pytest.mark.parametrize(("cls", "method"), MOVING)
    def test_values_stay(self, cls: str, method: str) -> None:
        """Values stay on the host, and tables are made of them once: "meta" has no
        values to read.
        """
        own = pair(cls)[1]
        on_device = torch.zeros(SHAPE, device="meta")
        for _ in range(3):
            self.call(own, method, on_device, torch.tensor([3, 500], device="meta"))
            own.step(on_device, T, on_device)
            assert len(own._fastddim_work.tables) == 2
        x, m = draw()
        expected = outcome(lambda: pair(cls)[1].step(m, T, x))
        assert_alike(expected, outcome(lambda: own.step(m, T, x)))

    @pytest.mark.parametrize("inference", [False, True])
    def test_what_is_moved_may_change(self, inference: bool) -> None:
        """A new ᾱ after a move is read; the copy on the host is of the one before."""
        theirs, own = pair("DDIMScheduler")
        x, m = draw()
        with torch.inference_mode(inference):
            own.add_noise(*[torch.zeros(SHAPE, device="meta")] * 2, torch.tensor([3, 4]))
        own.step(m, T, x)
        for scheduler in (theirs, own):
            scheduler.alphas_cumprod = diffusers.DDIMScheduler().alphas_cumprod ** 2
        assert_alike(theirs.step(m, T, x), own.step(m, T, x))


class TestOtherDropIns:
    """The indices that each of the other drop-ins takes."""

    INDICES = ((torch.int64, torch.int32), (torch.int16, *OTHERS))

    @pytest.mark.parametrize("spaced", [None, "ddim20"])
    @pytest.mark.parametrize("hooked", [False, True])
    def test_guided_diffusion(self, spaced: str | None, hooked: bool) -> None:
        diffusion, x = of_guided.make(spaced=spaced), draw()[0]
        if hooked:
            diffusion.p_mean_variance = functools.partial(diffusion.p_mean_variance)
        own, model = of_guided.fast(diffusion), of_guided.Model()
        for dtype in self.INDICES[0]:
            t = torch.tensor([3, 11], dtype=dtype)
            result, expected = same_draws(
                lambda: own.ddim_sample(model, x, t),  # noqa: B023
                lambda: diffusion.ddim_sample(model, x, t),  # noqa: B023
            )
            assert_same(result, expected, 1e-10)
        for t in (*(torch.tensor([3, 11]).to(d) for d in self.INDICES[1]), torch.tensor([0.5, 3])):
            for method in ("ddim_sample", "ddim_reverse_sample"):
                theirs = outcome(lambda: getattr(diffusion, method)(model, x, t))  # noqa: B023
                assert isinstance(theirs, Exception)
                with pytest.raises(IndexError, match=f"^t: expected an int64 .* got {t.dtype}$"):
                    getattr(own, method)(model, x, t)
        with pytest.raises(TypeError, match=r"^t: expected an int64 tensor, got \[3, 11\]$"):
            own.ddim_sample(model, x, [3, 11])

    def test_latent_diffusion_steps(self) -> None:
        with default_dtype(torch.float64):
            sampler = of_latent.make("eps", eta=0.4)
            own = of_latent.fast_of(sampler)
            x, c = draw()[0], torch.tensor([0.2, -0.4])
            t = torch.full((2,), int(sampler.ddim_timesteps[6]))
            for index in (6, np.int64(6), np.int32(6), torch.tensor(6), -4):
                result, expected = same_draws(
                    lambda: own.p_sample_ddim(x, c, t, index),  # noqa: B023
                    lambda: sampler.p_sample_ddim(x, c, t, index),  # noqa: B023
                )
                assert_same(result, expected, 1e-10)
            for index in (6.0, 0.5, True, "6", None, torch.tensor(6.0), torch.tensor([6, 3])):
                theirs = outcome(lambda: sampler.p_sample_ddim(x, c, t, index))  # noqa: B023
                assert isinstance(theirs, Exception)
                with pytest.raises(REFUSALS, match=r"^index: expected "):
                    own.p_sample_ddim(x, c, t, index)

    @pytest.mark.parametrize("original", [False, True])
    def test_latent_diffusion_noise(self, original: bool) -> None:
        with default_dtype(torch.float64):
            sampler, x = of_latent.make("eps"), draw()[0]
            own = of_latent.fast_of(sampler)
            for dtype in self.INDICES[0]:
                t = torch.tensor([3, 7], dtype=dtype)
                result, expected = same_draws(
                    lambda: own.stochastic_encode(x, t, original),  # noqa: B023
                    lambda: sampler.stochastic_encode(x, t, original),  # noqa: B023
                )
                assert_same(result, expected, 1e-10)
            for dtype in self.INDICES[1]:
                with pytest.raises(RuntimeError, match="index"):
                    sampler.stochastic_encode(x, torch.tensor([3, 7]).to(dtype), original)
                with pytest.raises(IndexError, match=f"^t: expected an int64 .* got {dtype}$"):
                    own.stochastic_encode(x, torch.tensor([3, 7]).to(dtype), original)

    @pytest.mark.parametrize(
        "seq",
        [
            [0, 250, 500],
            [0.0, 250.7, 500.2],
            np.array([0, 250, 500]),
            np.array([0.5, 250.0, 500.25]),
            torch.tensor([0, 250, 500]),
            torch.tensor([0.5, 250.0, 500.25]),
            [False, np.float32(250.5), torch.tensor(500, dtype=torch.int16)],
        ],
        ids=str,
    )
    def test_ermongroup(self, seq: Any) -> None:
        """ermongroup's code takes any number: the model gets it unchanged, and ᾱ is that of its
        integral part.
        """
        b, x = of_ermongroup.LINEAR, draw()[0]

        def alpha(b: Tensor, t: Any) -> Tensor:
            return whole(b, int(t))

        with pytest.MonkeyPatch.context() as patch:
            whole = of_ermongroup.alpha
            patch.setattr(of_ermongroup, "alpha", alpha)
            for fast, peer in (
                (ermongroup.generalized_steps, of_ermongroup.peer_generalized),
                (ermongroup.ddpm_steps, of_ermongroup.peer_ddpm),
            ):
                own, expected = same_draws(
                    lambda: fast(x, seq, of_ermongroup.model, b),  # noqa: B023
                    lambda: peer(x, list(seq), of_ermongroup.model, b),  # noqa: B023
                )
                assert_same(own, expected, 1e-10)

    @pytest.mark.parametrize("seq", [["1"], "12", [torch.tensor([1, 2])]], ids=str)
    def test_ermongroup_refuses_what_is_no_number(self, seq: Any) -> None:
        with pytest.raises(TypeError, match=r"^seq: expected numbers, got "):
            ermongroup.generalized_steps(draw()[0], seq, lambda x, t: x, of_ermongroup.LINEAR)

    @pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
    def test_webui(self) -> None:
        model, x = WebuiModel(torch.linspace(0.99, 0.01, 200)), draw()[0]
        for dtype in (*self.INDICES[0], *self.INDICES[1]):
            t = torch.tensor([1, 50, 120]).to(dtype)
            if dtype in self.INDICES[0]:
                own, expected = same_draws(
                    lambda: webui.ddim(model, x, t, disable=True),  # noqa: B023
                    lambda: peer_webui(model, x, t),  # noqa: B023
                )
                assert_same(own, expected, 1e-5)
                continue
            assert isinstance(outcome(lambda: peer_webui(model, x, t)), IndexError)  # noqa: B023
            with pytest.raises(IndexError, match=f"^timesteps: .* got {dtype}$"):
                webui.ddim(model, x, t, disable=True)

    def test_k_diffusion_takes_a_list_of_levels(self) -> None:
        x, sigmas = draw()[0], levels(torch.float64)
        own, expected = (
            k_diffusion.sample_ddim(denoiser, x, given, disable=True)
            for given in (sigmas.tolist(), sigmas)
        )
        assert torch.equal(own, expected)
