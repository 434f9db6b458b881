"""The Philox noise of the schedulers: seeds from generators, and their place in a config."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from fastddim.philox import STEP_NOISE, Keys, normal

from ..support.dropins.diffusers import DDIM, diffusers, ours

scheduling_ddpm = importlib.import_module("diffusers.schedulers.scheduling_ddpm")

SHAPE = (2, 3, 4, 5)
NOISY = (*DDIM, "DDPMScheduler")


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def scheduler_of(name: str = "DDIMScheduler", **config: Any) -> Any:
    made = getattr(ours, name).from_config(config, noise="philox", seed=9)
    made.set_timesteps(4)
    return made


def drawn(scheduler: Any, generator: Any, x: Tensor, timesteps: Any = None) -> Tensor:
    """The loop of a pipeline, around a model that returns its input."""
    eta = {} if isinstance(scheduler, ours.DDPMScheduler) else {"eta": 1.0}
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(x, t, x, generator=generator, **eta).prev_sample
    return x


class TestGenerators:
    @pytest.mark.parametrize("name", NOISY)
    def test_they_give_the_seed(self, name: str) -> None:
        scheduler, x = scheduler_of(name), torch.randn(SHAPE)
        five, six = (drawn(scheduler, *seeded(seed), x) for seed in (5, 6))
        assert not torch.equal(five, six)
        assert torch.equal(drawn(scheduler, *seeded(5), x), five)
        other = scheduler_of(name)
        other.set_noise("philox", seed=1)
        assert torch.equal(drawn(other, *seeded(5), x), five), "of the scheduler's seed"
        assert not torch.equal(drawn(scheduler, None, x), five)
        assert torch.equal(drawn(scheduler, None, x), drawn(scheduler, None, x))

    def test_two_runs_with_one_generator_differ(self) -> None:
        """Two runs with one generator differ, as with torch's noise. With the same noise, chains
        from other x_T would run together.
        """
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        (generator,) = seeded(5)
        runs = [drawn(scheduler, generator, x) for _ in range(3)]
        assert len({run.sum().item() for run in runs}) == 3
        scheduler.set_timesteps(4)
        first_only = [drawn(scheduler, generator, x, scheduler.timesteps[:1]) for _ in range(2)]
        assert not torch.equal(*first_only)
        generator.manual_seed(5)
        assert torch.equal(drawn(scheduler, generator, x), runs[0])

    @pytest.mark.parametrize("name", NOISY)
    def test_without_a_seed_every_run_draws_one(self, name: str) -> None:
        """A run without a seed draws one from torch's default generator, whose seed repeats it."""
        scheduler, x = scheduler_of(name), torch.randn(SHAPE)
        scheduler.set_noise("philox")
        scheduler = pickle.loads(pickle.dumps(type(scheduler).from_config(scheduler.config)))
        scheduler.set_timesteps(4)
        torch.manual_seed(5)
        runs = [drawn(scheduler, None, x) for _ in range(3)]
        assert len({run.sum().item() for run in runs}) == 3
        torch.manual_seed(5)
        assert torch.equal(drawn(scheduler, None, x), runs[0])
        assert torch.equal(drawn(scheduler, *seeded(5), x), runs[0])

    def test_a_graph_without_a_seed_draws_at_each_run(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        scheduler.set_noise("philox")

        def step(x: Tensor) -> Tensor:
            return scheduler.step(x, 500, x, 1.0, return_dict=False)[0]

        torch._dynamo.reset()
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        torch.manual_seed(5)
        first, second = compiled(x), compiled(x)
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(compiled(x), first)
        torch._dynamo.reset()

    def test_a_run_begins_with_set_timesteps(self) -> None:
        """A run begins with `set_timesteps`, even if a pipeline begins later than the run before
        has ended.
        """
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        (generator,) = seeded(5)
        results = []
        for again in (False, True):
            generator.manual_seed(5)
            drawn(scheduler, generator, x, scheduler.timesteps[:2])
            if again:
                scheduler.set_timesteps(4)
            results.append(drawn(scheduler, generator, x, scheduler.timesteps[2:]))
        assert not torch.equal(*results)

    def test_one_number_is_drawn_a_run(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        generator, expected = seeded(5, 5)
        drawn(scheduler, generator, x)
        bits = torch.empty(1, dtype=torch.int64).random_(generator=expected)
        assert torch.equal(generator.get_state(), expected.get_state())
        given = copy.deepcopy(scheduler)
        given.set_noise("philox", seed=bits.item())
        assert torch.equal(drawn(scheduler, *seeded(5), x), drawn(given, None, x))

    def test_nothing_is_drawn_without_noise(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        generator, fresh = seeded(5, 5)
        for t in scheduler.timesteps:
            scheduler.step(x, t, x, eta=0.0, generator=generator)
        assert torch.equal(generator.get_state(), fresh.get_state())

    @pytest.mark.parametrize("name", NOISY)
    def test_of_a_list_each_sample_has_its_own(self, name: str) -> None:
        """With a list of generators each sample has its own noise, whatever else is in
        the batch.
        """
        scheduler, x = scheduler_of(name), torch.randn(SHAPE)
        together = drawn(scheduler, seeded(3, 4), x)
        for i, seed in enumerate((3, 4)):
            scheduler.set_timesteps(4)
            alone = drawn(scheduler, seeded(seed), x[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)

    def test_a_list_of_one_is_that_one(self) -> None:
        """A list of one generator is that generator, as diffusers reads it."""
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        assert torch.equal(drawn(scheduler, seeded(3), x), drawn(scheduler, *seeded(3), x))

    def test_samples_are_counted_from_the_offset(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        whole = drawn(scheduler, *seeded(3), x)
        scheduler.set_noise("philox", sample_offset=1)
        assert torch.equal(drawn(scheduler, *seeded(3), x[1:]), whole[1:])
        with pytest.raises(ValueError, match=r"^sample_offset: expected 0 where each sample"):
            drawn(scheduler, seeded(3, 4), x)

    @pytest.mark.parametrize("name", DDIM)
    def test_they_go_to_a_step_of_diffusers(self, name: str) -> None:
        """Steps go to diffusers if η is no number, since the kernel cannot draw their noise."""
        scheduler, x = scheduler_of(name), torch.randn(SHAPE)
        t = scheduler.timesteps[1]
        fused = scheduler.step(x, t, x, 0.5, generator=seeded(3)[0]).prev_sample
        scheduler.set_timesteps(4)
        eta = torch.tensor(0.5)
        theirs = scheduler.step(x, t, x, eta, generator=seeded(3)[0]).prev_sample
        torch.testing.assert_close(theirs, fused, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("variance", ["learned", "learned_range"])
    def test_learned_variances(self, variance: str) -> None:
        """With learned variances the noise is a tensor, which is scaled before the step."""
        scheduler = scheduler_of("DDPMScheduler", variance_type=variance, clip_sample=False)
        x, t = torch.randn(SHAPE), 500
        m = torch.cat([x, torch.full_like(x, 0.25)], 1)
        drawn_bits = torch.empty(1, dtype=torch.int64).random_(generator=seeded(3)[0]).item()
        for generator, bits in ((None, 9), (seeded(3)[0], drawn_bits)):
            got = scheduler.step(m, t, x, generator=generator).prev_sample
            keys = Keys(torch.full((2,), bits), torch.full((2,), 1), torch.arange(2))
            z = normal(keys, SHAPE[1:], STEP_NOISE)
            theirs = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False)
            theirs.set_timesteps(4)
            with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=z):
                expected = theirs.step(m, t, x).prev_sample
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    def test_the_mode_of_the_first_step_is_not_that_of_the_others(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        expected = drawn(scheduler, *seeded(5), x)
        (generator,) = seeded(5)
        with torch.inference_mode():
            begun = drawn(scheduler, generator, x, scheduler.timesteps[:2])
        leaf = begun.clone().requires_grad_()
        got = drawn(scheduler, generator, leaf, scheduler.timesteps[2:])
        assert torch.equal(got, expected)
        got.sum().backward()
        assert leaf.grad.isfinite().all()

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
    def test_a_copy_goes_on(self, copied: Any) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        expected = drawn(scheduler, *seeded(5), x)
        (generator,) = seeded(5)
        begun = drawn(scheduler, generator, x, scheduler.timesteps[:2])
        other = copied(scheduler)
        assert torch.equal(drawn(other, generator, begun, other.timesteps[2:]), expected)

    def test_errors(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        with pytest.raises(ValueError, match=r"^generator: expected one per sample, 2, got 3"):
            drawn(scheduler, seeded(1, 2, 3), x)
        with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator or a list"):
            drawn(scheduler, 5, x)
        with pytest.raises(
            ValueError, match=r"^generator: expected one on the CPU or .*got one on cuda"
        ):
            drawn(scheduler, _OnCuda(), x)

    def test_given_noise_counts(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        given = scheduler.step(x, 500, x, 1.0, variance_noise=x).prev_sample
        scheduler.set_noise("torch")
        assert torch.equal(scheduler.step(x, 500, x, 1.0, variance_noise=x).prev_sample, given)
        scheduler.set_noise("philox")
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            scheduler.step(x, 500, x, 1.0, generator=seeded(1)[0], variance_noise=x)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_graphs_do_not_draw_from_them(self) -> None:
        scheduler, x = scheduler_of(), torch.randn(SHAPE)
        message = "generator: expected None with noise='philox' where a step is traced"

        def step(x: Tensor) -> Tensor:
            generator = Generator().manual_seed(5)
            return scheduler.step(x, 500, x, 1.0, generator=generator, return_dict=False)[0]

        with pytest.raises(ValueError, match=message):
            torch.jit.trace(step, (x,), check_trace=False)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(step, backend="eager", fullgraph=True)(x)
        torch._dynamo.reset()


class _OnCuda(Generator):
    """A generator that reports a device that this machine lacks."""

    device = torch.device("cuda")


class TestConfig:
    @pytest.mark.parametrize("name", NOISY)
    @pytest.mark.parametrize(
        "seed",
        [
            7,
            2**64 - 1,
            [3, 2**64 - 1],
            np.array([3, 4]),
            torch.tensor([-1, 4]),
            np.int64(5),
            torch.tensor(6),
        ],
        ids=["one", "large", "list", "array", "tensor", "scalar", "scalar tensor"],
    )
    def test_a_saved_scheduler_has_it(self, name: str, seed: Any, tmp_path: Path) -> None:
        offset = 0 if np.ndim(seed) else 2
        own = getattr(ours, name).from_config({}, noise="philox", seed=seed, sample_offset=offset)
        own.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "scheduler_config.json").read_text())
        entry = content["_fastddim_noise"]
        assert (entry["noise"], entry["sample_offset"]) == ("philox", offset)
        x = torch.randn(SHAPE)
        own.set_timesteps(4)
        expected = drawn(own, None, x)
        for loaded in (
            getattr(ours, name).from_pretrained(tmp_path),
            getattr(ours, name).from_config(own.config),
            pickle.loads(pickle.dumps(own)),
        ):
            loaded.set_timesteps(4)
            assert torch.equal(drawn(loaded, None, x), expected)

    def test_other_classes_carry_it_along(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        own = ours.DDIMScheduler.from_config({}, noise="philox", seed=3)
        own.save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path)
            other = diffusers.DPMSolverMultistepScheduler.from_config(theirs.config)
        assert "_fastddim_noise" not in caplog.text
        for config in (theirs.config, other.config):
            back = ours.DDIMScheduler.from_config(config)
            assert (back._fastddim_work.seed, back._fastddim_work.sample_offset) == (3, 0)

    def test_arguments_go_before_the_config(self) -> None:
        config = ours.DDIMScheduler.from_config({}, noise="philox", seed=3, sample_offset=2).config

        def state(**given: Any) -> tuple[Any, int]:
            work = ours.DDIMScheduler.from_config(config, **given)._fastddim_work
            return work.seed, work.sample_offset

        assert state() == (3, 2)
        assert state(noise="philox") == (3, 2)
        assert state(seed=5) == (5, 2)
        assert state(sample_offset=0) == (3, 0)
        assert state(noise="torch")[0] is None

    def test_torch_noise_is_no_entry(self) -> None:
        own = ours.DDIMScheduler.from_config({})
        assert "_fastddim_noise" not in own.config
        own.set_noise("philox", 3)
        own.set_noise("torch")
        assert own.config["_fastddim_noise"] is None
        assert ours.DDIMScheduler.from_config(own.config)._fastddim_work.seed is None

    def test_the_same_noise_again_leaves_the_tables(self) -> None:
        own = scheduler_of()
        config = own.config
        own.set_noise("philox", 9)
        assert own.config is config

    def test_seeds_are_checked_at_once(self) -> None:
        own = ours.DDIMScheduler()
        with pytest.raises(ValueError, match=r"^seed: expected .*, got -1"):
            own.set_noise("philox", -1)
        with pytest.raises(TypeError, match=r"^seed: expected "):
            own.set_noise("philox", 0.5)
        with pytest.raises(ValueError, match=r"^sample_offset: expected 0 where each sample"):
            own.set_noise("philox", [1, 2], 3)
