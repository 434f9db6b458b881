"""The navigation task of the examples, its planner, and the policy that learns from it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from policies.success import navigation

import fastddim

TINY = replace(navigation.QUICK, width=32, episodes=40, steps=60, warmup=10, batch=64, ema=0.9)


def robots(*starts, goal=(0.95, 0.0)):
    return navigation.Episodes(np.array(starts, float), np.tile(goal, (len(starts), 1)))


def planned_to_the_end(count, seed):
    """Episodes after the planner has driven them, and all positions, `[ticks + 1, N, 2]`."""
    episodes = navigation.Episodes.draw(count, seed)
    sides = np.random.default_rng(seed).choice([-1.0, 1.0], (count, len(navigation.DISCS)))
    places = [episodes.position]
    for _ in range(navigation.LIMIT):
        episodes.tick(navigation.planned(episodes, sides))
        places.append(episodes.position)
    return episodes, np.stack(places)


def test_no_robot_is_faster_than_it_may_be():
    episodes = robots(*[(-0.9, 0.0)] * 3)
    episodes.tick(np.array([(0.0, 10.0), (0.6, -0.8), (-0.3, 0.0)]))
    moved = (episodes.position - episodes.before) / navigation.SPEED
    np.testing.assert_allclose(moved, [(0.0, 1.0), (0.6, -0.8), (-0.3, 0.0)], atol=1e-12)


def test_a_robot_that_touches_a_disc_stands_still():
    x, y, radius = navigation.DISCS[1]
    # The first drives at the center; the second over the rim, and is free before and after.
    rim = y + radius - 5e-4
    episodes = robots((x - radius - 0.02, y), (x - navigation.SPEED / 2, rim))
    assert (navigation.clearance(episodes.position) > 0).all()
    episodes.tick(np.array([(1.0, 0.0)] * 2))
    assert episodes.crashed.all()
    assert navigation.clearance(episodes.position)[1] > 0
    there = episodes.position
    episodes.tick(np.array([(-1.0, 0.0)] * 2))
    assert (episodes.position == there).all()
    assert not episodes.arrived.any()


def test_a_robot_that_has_arrived_stands_still():
    episodes = robots((0.87, 0.0), (0.86, 0.0))
    episodes.tick(np.array([(1.0, 0.0)] * 2))
    assert episodes.arrived.tolist() == [True, True]
    there = episodes.position
    episodes.tick(np.array([(0.0, 1.0)] * 2))
    assert (episodes.position == there).all()
    far = robots((0.7, 0.0))
    far.tick(np.array([(1.0, 0.0)]))
    assert not far.over.any()


def test_episodes_are_those_of_their_seed():
    first, again, other = (navigation.Episodes.draw(50, seed) for seed in (3, 3, 4))
    assert (first.position == again.position).all()
    assert (first.goal == again.goal).all()
    assert (first.position != other.position).all()
    anywhere = navigation.Episodes.draw(200, 3, anywhere=True).position
    assert (navigation.clearance(anywhere) > navigation.CLEARANCE).all()
    assert anywhere[:, 0].max() > 0.8 > -0.9 >= first.position[:, 0].max()


def test_the_planner_arrives_on_either_side():
    episodes, places = planned_to_the_end(1000, 5)
    assert episodes.arrived.mean() > 0.99
    assert navigation.clearance(places).min() > navigation.CLEARANCE - 0.01
    passing = np.abs(places[:, :, 0] - navigation.CENTERS[0, 0]).argmin(0)
    above = places[passing, np.arange(1000), 1] > navigation.CENTERS[0, 1]
    assert 0.4 < above.mean() < 0.6


def test_an_observation_has_the_last_two_positions_and_the_goal():
    episodes = robots((-0.9, 0.3), goal=(0.92, 0.1))
    expected = [-0.9, 0.3, 0.0, 0.0, 0.92, 0.1]
    assert episodes.observation()[0].tolist() == pytest.approx(expected)
    episodes.tick(np.array([(0.6, 0.8)]))
    expected = [-0.9 + 0.6 * navigation.SPEED, 0.3 + 0.8 * navigation.SPEED, 0.6, 0.8, 0.92, 0.1]
    assert episodes.observation()[0].tolist() == pytest.approx(expected)


def test_demonstrations_go_on_from_tick_to_tick():
    observed, actions = navigation.demonstrations(30, 7)
    assert observed.shape == (30 * navigation.EXECUTED, navigation.OBSERVED)
    assert actions.shape == (len(observed), navigation.HORIZON, 2)
    assert actions.norm(dim=2).max() < 1 + 1e-6
    assert torch.equal(actions[:-30, 1:], actions[30:, :-1])
    # The velocity of a tick is the move that is seen at the next, but where it was the last.
    driving = actions[:-30, 0].norm(dim=1) > 0
    torch.testing.assert_close(observed[30:, 2:4][driving], actions[:-30, 0][driving])


def test_epsilon_follows_from_v(monkeypatch):
    policy = navigation.Policy(8, 1)
    clean, noise = torch.rand(5, 16, 2) * 2 - 1, torch.randn(5, 16, 2)
    t = torch.tensor([0, 10, 50, 90, 99])
    a = policy.schedule.alphas_cumprod[t].float()[:, None, None]
    v = a.sqrt() * noise - (1 - a).sqrt() * clean
    monkeypatch.setattr(policy, "velocity", lambda *_: v)
    noised = a.sqrt() * clean + (1 - a).sqrt() * noise
    torch.testing.assert_close(policy(noised, t, torch.zeros(5, 6)), noise)


def test_the_policy_heeds_all_it_is_told():
    torch.manual_seed(0)
    policy = navigation.Policy(16, 1).eval()
    chunk, t = torch.randn(1, 16, 2), torch.tensor([50])
    plain = policy(chunk, t, torch.zeros(1, 6))
    for i in range(navigation.OBSERVED):
        seen = torch.zeros(1, 6)
        seen[0, i] = 0.1
        assert (policy(chunk, t, seen) - plain).abs().max() > 1e-5, i
    late = policy.velocity(chunk, torch.tensor([60]), torch.zeros(1, 6))
    assert (late - policy.velocity(chunk, t, torch.zeros(1, 6))).abs().max() > 1e-5


def test_a_few_steps_of_training_lower_the_loss():
    trainer = navigation.Trainer(TINY)
    start = trainer.averaged.leave.weight.clone()
    losses = [trainer.train_step() for _ in range(TINY.steps)]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:10])
    # The average follows the weights, some steps behind.
    behind = (trainer.averaged.leave.weight - trainer.policy.leave.weight).norm()
    assert 0 < behind < (start - trainer.policy.leave.weight).norm()
    again = navigation.Trainer(TINY)
    assert [again.train_step() for _ in range(3)] == losses[:3]


def test_the_command_line_saves_what_it_trained(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(navigation, "QUICK", TINY)
    threads = torch.get_num_threads()
    arguments = ["--quick", "--seed", "4", "--episodes", "20", "--out", str(tmp_path / "run")]
    navigation.main([*arguments, "--threads", str(threads)])
    path = tmp_path / "run" / "policy.safetensors"
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, ("DDPM, 100 steps", "DDIM, 10 steps"), strict=True):
        assert re.fullmatch(rf"{name}: \d+\.\d% arrive", line)
    recipe = replace(TINY, seed=4)
    assert navigation.recipe_of(path) == recipe
    with safetensors.safe_open(path, framework="pt") as file:
        assert "--quick --seed 4" in file.metadata()["command"]
        assert json.loads(file.metadata()["recipe"])["width"] == TINY.width
    saved = navigation.load(path)
    assert not saved.training
    trained = navigation.trained(recipe).state_dict()
    for name, weight in saved.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, trained[name], rtol=1e-3, atol=1e-6)


@pytest.mark.deep
def test_minutes_of_training_bring_robots_to_the_goal():
    recipe = replace(navigation.QUICK, width=96, blocks=2, episodes=8000, steps=2500, batch=256)
    arrived = []
    for steps in (0, recipe.steps):
        policy = navigation.trained(replace(recipe, steps=steps)).eval()
        episodes = navigation.Episodes.draw(300, 1)
        navigation.drive(navigation.sampler_of(policy, 300, 10, 1, order=2), episodes)
        arrived.append(episodes.arrived.mean())
    assert arrived[0] < 0.02
    assert arrived[1] > 0.3


def test_ddpm_is_that_of_diffusers():
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    policy = navigation.Policy(16, 1).requires_grad_(False).eval()
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    seen = torch.rand(3, navigation.OBSERVED)
    x_T, noise = torch.randn(3, 16, 2), torch.randn(100, 3, 16, 2)
    drawn = iter(noise)
    x = x_T
    for t in range(99, -1, -1):
        output = policy(x, torch.full((3,), t), seen)
        x = _their_step(scheduler, output, t, x, next(drawn))
    told = {"model_kwargs": {"observation": seen}, "clip": 1.0, **navigation.DDPM}
    ours = fastddim.sample(policy, 100, x_T=x_T, noise=noise, **told)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


def _their_step(scheduler, output, t, x, noise):
    """A step of diffusers' DDPM with this noise in place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        where = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
        patch.setattr(where, lambda *_, **__: noise)
        return scheduler.step(output, t, x).prev_sample
