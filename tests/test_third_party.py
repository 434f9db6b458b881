"""The networks that others trained: the reading of their files, and their outputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import third_party_tables
import torch
from third_party import galaxygrad, ode, report

import fastddim

CHANNELS, PATCH, SIDE, WIDTHS, BLOCKS = 6, 4, 12, (5, 7), 2
PATCHES = (SIDE // PATCH) ** 2


def shapes():
    """The shapes of the arrays in a file, in its order."""
    yield from ((CHANNELS, 2, PATCH, PATCH), (CHANNELS, 1, 1))
    yield from ((1, CHANNELS, PATCH, PATCH), (1, 1, 1))
    for _ in range(BLOCKS):
        for size, width in zip((PATCHES, CHANNELS), WIDTHS, strict=True):
            yield from ((width, size), (width,), (size, width), (size,))
        yield from 2 * ((CHANNELS, PATCHES),)
        yield from 2 * ((PATCHES, CHANNELS),)
    yield from 2 * ((CHANNELS, PATCHES),)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(3)
    weights = [generator.standard_normal(shape, np.float32) / 2 for shape in shapes()]
    return [*weights, np.array(galaxygrad.LAST_TIME)]


@pytest.fixture
def file(tmp_path: Path, arrays):
    path = tmp_path / "network.eqx"
    with path.open("wb") as stream:
        for array in arrays:
            np.save(stream, array)
    return path


def written_out(arrays, x, time):
    """The score of one image `[H, W]` in float64, patch by patch."""
    values = iter([array.astype(np.float64) for array in arrays])

    def norm(h, weight, bias):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-5) * weight + bias

    patch_in, bias_in, patch_out, bias_out = (next(values) for _ in range(4))
    planes = np.stack([x, np.full_like(x, time / galaxygrad.LAST_TIME)])
    places = [
        (slice(row, row + PATCH), slice(column, column + PATCH))
        for row in range(0, SIDE, PATCH)
        for column in range(0, SIDE, PATCH)
    ]
    h = np.stack(
        [np.einsum("ocij,cij->o", patch_in, planes[:, r, c]) for r, c in places], axis=1
    ) + bias_in.reshape(-1, 1)
    for _ in range(BLOCKS):
        layers = [[next(values) for _ in range(4)] for _ in range(2)]
        for w1, b1, w2, b2 in layers:
            hidden = np.maximum(norm(h, next(values), next(values)) @ w1.T + b1, 0)
            h = (h + hidden @ w2.T + b2).T
    h = norm(h, next(values), next(values))
    score = np.empty_like(x)
    for patch, (r, c) in enumerate(places):
        # The kernel of a transposed convolution that is not flipped.
        score[r, c] = np.einsum("c,cij->ij", h[:, patch], patch_out[0, :, ::-1, ::-1])
    return score + bias_out.item()


def test_arrays_are_read_as_they_were_saved(file, arrays):
    read = galaxygrad.read_arrays(file)
    assert len(read) == len(arrays)
    for array, expected in zip(read, arrays, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_no_object_is_unpickled(tmp_path):
    path = tmp_path / "network.eqx"
    with path.open("wb") as stream:
        np.save(stream, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        galaxygrad.read_arrays(path)


def test_the_shape_of_a_network_is_that_of_its_arrays(file, arrays):
    network = galaxygrad.load(file)
    assert network.sample_shape == (1, SIDE, SIDE)
    assert len(network.blocks) == BLOCKS
    assert not network.training
    parameters = list(network.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)
    assert sum(p.numel() for p in parameters) == sum(a.size for a in arrays[:-1])


@pytest.mark.parametrize("time", [0.0, 0.3, galaxygrad.LAST_TIME])
def test_the_score_is_the_formula(file, arrays, time):
    network = galaxygrad.load(file)
    x = torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    score = network.score(x, time)
    assert score.shape == x.shape
    for image, own in zip(x, score, strict=True):
        expected = written_out(arrays, image[0].double().numpy(), time)
        np.testing.assert_allclose(own[0].numpy(), expected, rtol=2e-5, atol=2e-5)


def test_timesteps_are_those_of_the_schedule(file):
    network = galaxygrad.load(file)
    x = torch.randn(3, 1, SIDE, SIDE)
    t = torch.tensor([0, 400, 999])
    times = -network.schedule.alphas_cumprod[t].log()
    assert torch.equal(network(x, t), network.score(x, times))
    alone = [network.score(x[i : i + 1], times[i].item()) for i in range(3)]
    torch.testing.assert_close(network(x, t), torch.cat(alone))


def test_samples_need_no_more_than_the_network_and_its_prediction(file):
    network = galaxygrad.load(file)
    samples = fastddim.sample(network, 3, batch_size=2, prediction=network.prediction)
    assert samples.shape == (2, 1, SIDE, SIDE)
    assert samples.isfinite().all()


def test_the_noise_of_the_schedule_is_on_the_grid():
    schedule = galaxygrad.galaxy_schedule(50)
    alphas = schedule.alphas_cumprod
    roots = ((1 - alphas) / alphas) ** (1 / 14)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(49), rtol=1e-6, atol=0)
    assert -math.log(alphas[0]) == pytest.approx(galaxygrad.FIRST_TIME)
    assert -math.log(alphas[-1]) == pytest.approx(galaxygrad.LAST_TIME)


class Normal(torch.nn.Module):
    """A network with the score of data from N(0, s²·I), whose ODE scales the latents."""

    schedule = galaxygrad.galaxy_schedule()

    def __init__(self, s):
        super().__init__()
        self.variance = torch.nn.Parameter(torch.tensor(s * s, dtype=torch.float64))

    def marginal(self, time):
        return 1 + (self.variance - 1) * math.exp(-time)

    def score(self, x, time):
        return -x / self.marginal(time)


@torch.no_grad()
def test_solvers_and_steps_agree_where_the_solution_is_known():
    network = Normal(0.3)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    expected = x * (network.variance / network.marginal(galaxygrad.LAST_TIME)).sqrt()
    coarse, fine = ((ode.own_sampler(network, x, n) - expected).norm() for n in (40, 80))
    assert 2**4.7 < coarse / fine < 2**5.3
    samples, calls = ode.adaptive(network, x, 1e-8)
    torch.testing.assert_close(samples, expected, rtol=1e-6, atol=1e-6)
    assert calls % 6 == 2
    alphas = network.schedule.alphas_cumprod

    steps = fastddim.sample(
        lambda x, t: network.score(x, -math.log(alphas[t[0]].item())),
        500,
        x_T=x,
        schedule=network.schedule,
        prediction="score",
        order=2,
    )
    torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-3)


def test_a_report_measures_only_what_is_missing(file, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "KEPT", tmp_path)
    monkeypatch.setattr(report, "NETWORKS", {"galaxy": file.stem})
    monkeypatch.setattr(report, "REFERENCE_STEPS", 20)
    cells = [report.Cell("galaxy", "order 2", steps, count=4) for steps in (4, 20)]
    monkeypatch.setattr(report, "machine", lambda: {"commit": "0123456"})
    monkeypatch.setattr(report, "cells", lambda _: iter(cells))
    results = tmp_path / "third-party.json"
    report.run(results, tmp_path, ["galaxy"])
    written = results.read_text()
    rows = report.json.loads(written)["rows"]
    assert [row["steps"] for row in rows] == [4, 20]
    assert rows[0]["distance"] > 1e-3
    assert rows[1]["distance"] < 1e-5
    monkeypatch.setattr(report, "measure", None)
    report.run(results, tmp_path, ["galaxy"])
    assert results.read_text() == written


def test_calls_are_the_fewest_that_come_as_near_as_the_own_sampler():
    def row(method, steps, distance, count=8, calls=None):
        own = {"network": "galaxy", "method": method, "steps": steps, "count": count, "seed": 1}
        near = {"distance": distance, "of_few": distance, "apart": 2.0, "calls": calls or steps}
        return own | near

    rows = [
        row("accurate", None, 2e-4, calls=300),
        row("own sampler", 2401, 0.02),
        row("adaptive", None, 0.1, calls=90),
        *(row("order 1", steps, 1 / steps, count=32) for steps in (10, 20)),
        *(row("order 2", steps, 4 / steps**2, count=32) for steps in (10, 20)),
    ]
    line = third_party_tables.own_as_markdown({"rows": rows}).splitlines()[-1]
    cells = "galaxy | 2 | 0.01 % | 2,401: 1 % | 90: 5 % | > 20 | 20 | –"
    assert line == f"| {cells} |"
