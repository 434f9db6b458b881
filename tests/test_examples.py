"""The examples run, and the claims in them are true."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastddim

from .support.text_to_image import pipeline_of

ROOT = Path(__file__).parents[1]


# They write one file, and have options that name it and the device.
WITH_OPTIONS = {
    "custom_loop": "custom_loop.png",
    "img2img": "img2img.png",
    "class_conditional": "class_conditional.png",
    "class_balanced": "run",
    "text_to_image": "image.png",
    "trajectory_gif": "trajectory.gif",
    "resume": "half_way.safetensors",
}
WITHOUT = {"quickstart", "diffusers_unet", "warm_start", "control_loop", "train", "navigation"}


@pytest.fixture(autouse=True)
def examples_import_each_other(monkeypatch):
    """Examples can import each other, as for a script, whose own folder comes first."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield
    for name in WITHOUT | set(WITH_OPTIONS):
        sys.modules.pop(name, None)


def load_example(name):
    return importlib.import_module(name)


def run_example(name, capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)
    if name in WITH_OPTIONS:
        load_example(name).main(["--out", WITH_OPTIONS[name], "--device", "cpu"])
    else:
        load_example(name).main()
    return capsys.readouterr().out.strip()


def cells(path, rows, columns):
    """float64 `[rows, columns, 8, 8]` in [−1, 1] of a grid of enlarged digits."""
    with Image.open(path) as image:
        levels = np.array(image)
    size = 8 * 8 + 2
    assert levels.shape == (rows * size + 2, columns * size + 2)
    framed = levels[2:, 2:].reshape(rows, size, columns, size).swapaxes(1, 2)
    return framed[:, :, :64:8, :64:8] / 127.5 - 1


def test_every_example_is_tested_here_or_with_training():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == WITHOUT | set(WITH_OPTIONS)


def test_examples_run_as_their_docstrings_say(run_python, tmp_path):
    for path in (ROOT / "examples").glob("*.py"):
        assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))
    result = run_python(ROOT / "examples/quickstart.py", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "runs/quickstart.png\n"), result.stderr


def test_quickstart(capsys, monkeypatch, tmp_path):
    out = run_example("quickstart", capsys, monkeypatch, tmp_path)
    x = fastddim.sample(fastddim.models.load("digits"), 50, batch_size=16, seed=0)
    drawn = cells(out, 4, 4).reshape(16, 1, 8, 8)
    assert np.abs(drawn - x.clamp(-1, 1).numpy()).max() < 1 / 127.5


def test_img2img_keeps_less_of_the_sketch_the_later_it_starts(capsys, monkeypatch, tmp_path):
    table = cells(run_example("img2img", capsys, monkeypatch, tmp_path), 4, 5)
    sketch = load_example("img2img").read_sketch().numpy()[0, 0]
    assert (table[:, 0] == sketch).all()
    distance = ((table - sketch) ** 2).mean(axis=(0, 2, 3))
    assert distance[1] > 0
    assert (np.diff(distance) > 0).all(), distance
    assert len({table[i, 4].tobytes() for i in range(4)}) == 4


def test_custom_loop_completes_the_known_half(capsys, monkeypatch, tmp_path):
    rows = cells(run_example("custom_loop", capsys, monkeypatch, tmp_path), 2, 7).reshape(14, 8, 8)
    whole, masked, completions = rows[0], rows[1], rows[2:]
    assert (masked[:4] == whole[:4]).all()
    assert (completions[:, :4] == whole[:4]).all()
    assert len({c.tobytes() for c in completions}) == 12


def test_custom_loop_without_a_known_part_is_sample():
    example = load_example("custom_loop")
    model = fastddim.models.load("digits")
    nothing = torch.zeros(3, 1, 8, 8)
    x = example.complete(model, nothing, torch.zeros(8, 8, dtype=torch.bool), seed=4)
    expected = fastddim.sample(model, example.STEPS, eta=example.ETA, batch_size=3, seed=4)
    assert torch.equal(x, expected)


def test_diffusers_unet_gives_the_images_of_diffusers(capsys, monkeypatch, tmp_path):
    out = run_example("diffusers_unet", capsys, monkeypatch, tmp_path)
    error = float(re.fullmatch(r"largest difference, relative .*: (\S+)", out)[1])
    assert 0 < error < 1e-5


def nearest_classes(model, x):
    """The class of the digit in the data that is closest to each of `x` `[N, 1, 8, 8]`."""
    return model.labels[torch.cdist(x.flatten(1), model.images).argmin(1)].tolist()


def test_class_conditional_draws_the_digits_asked_for(capsys, monkeypatch, tmp_path):
    *lines, path = run_example("class_conditional", capsys, monkeypatch, tmp_path).splitlines()
    names, numbers = zip(*(line.split("  margin ") for line in lines), strict=True)
    assert [name.strip() for name in names] == [
        "no label",
        "guidance 1",
        "guidance 3",
        "guidance 8",
    ]
    margin, spread = zip(*(map(float, line.split("  spread ")) for line in numbers), strict=True)
    assert margin[0] < 0 < margin[1] < margin[2] < margin[3]
    assert spread[0] > spread[1] > spread[2] > spread[3] > 0.2

    model = load_example("class_conditional").LabelledDigits()
    for row in cells(path, 4, 10)[1:]:
        drawn = torch.from_numpy(row.reshape(10, 1, 8, 8)).float()
        assert nearest_classes(model, drawn) == list(range(10))


def test_class_conditional_s_model_is_the_gradient_of_the_noised_density():
    """ε = −√(1 − ᾱ)·∇ log p_t, with p_t written out as a sum of Gaussians."""
    example = load_example("class_conditional")
    model = example.LabelledDigits().double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    t, y = torch.tensor([5, 200, 600, 999]), torch.tensor([3, example.NULL, 7, 0])
    a = model.schedule.alphas_cumprod[t]
    model.alphas_cumprod = model.schedule.alphas_cumprod
    variance = a * model.width**2 + 1 - a
    apart = x.flatten(1)[:, None] - a.sqrt()[:, None, None] * model.images
    exponent = -apart.square().sum(2) / (2 * variance[:, None])
    allowed = (model.labels == y[:, None]) | (y == example.NULL)[:, None]
    density = exponent.masked_fill(~allowed, -torch.inf).logsumexp(1).sum()
    (score,) = torch.autograd.grad(density, x)
    expected = -(1 - a).sqrt()[:, None, None, None] * score
    torch.testing.assert_close(model(x.detach(), t, y), expected, rtol=1e-9, atol=1e-9)


def test_class_balanced_run_grows_and_has_its_labels(capsys, monkeypatch, tmp_path):
    first, second, last = run_example("class_balanced", capsys, monkeypatch, tmp_path).splitlines()
    assert first.startswith("200 samples, SHA-256 ")
    assert second.startswith("300 samples, SHA-256 ")
    assert first.split()[-1] != second.split()[-1]
    assert last.endswith(f"of each class {[30] * 10}")

    example = load_example("class_balanced")
    with np.load("run/samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, labels.tolist()) == ((300, 8, 8, 3), [i % 10 for i in range(300)])
    x = fastddim.images.from_uint8(images[..., :1].copy())
    assert nearest_classes(example.LabelledDigits(), x) == labels.tolist()

    monkeypatch.setattr(example, "COUNTS", (300,))
    example.main(["--out", "at_once"])
    assert Path("at_once/samples.npz").read_bytes() == Path("run/samples.npz").read_bytes()


def test_text_to_image_is_what_the_pipeline_draws(capsys, monkeypatch, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    path = run_example("text_to_image", capsys, monkeypatch, tmp_path)
    example = load_example("text_to_image")
    parts = example.random_parts()
    pipe = pipeline_of(parts)
    prompt, empty = example.embed(parts, example.PROMPT), example.embed(parts, ())
    x_T = fastddim.philox.initial_latents((2, 4, 8, 8), seed=0)
    theirs = pipe(
        prompt_embeds=prompt.expand(2, -1, -1),
        negative_prompt_embeds=empty.expand(2, -1, -1),
        latents=x_T,
        guidance_scale=example.GUIDANCE,
        num_inference_steps=example.STEPS,
        output_type="pt",
    ).images
    ours = example.draw(parts, prompt, empty, x_T)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.01
    assert (ours[0] - ours[1]).abs().max() > 0.1
    # The prompt counts, and so does the guidance by the empty one.
    assert (example.draw(parts, empty, empty, x_T) - ours).abs().max() > 1e-3
    assert (example.draw(parts, prompt, prompt, x_T) - ours).abs().max() > 1e-3
    with Image.open(path) as image:
        assert image.size == (2 * (16 * 4 + 2) + 2, 16 * 4 + 4)


def test_warm_start_keeps_its_side(capsys, monkeypatch, tmp_path):
    lines = run_example("warm_start", capsys, monkeypatch, tmp_path).splitlines()
    (cold, changes), (warm, kept) = (
        map(
            int,
            re.fullmatch(r"\D+(\d+) evaluations, (\d+) changes of side in 24 ticks", line).groups(),
        )
        for line in lines
    )
    assert (cold, warm, kept) == (240, 10 + 23 * 4, 0)
    assert changes > 5


@pytest.mark.parametrize("warm", [False, True])
def test_warm_start_goes_round_the_obstacle(warm):
    example = load_example("warm_start")
    places = example.drive(example.make_sampler(warm=warm))
    way = [np.sin(np.pi * example.PACE * tick) for tick in range(1, example.TICKS + 1)]
    # A maximum over 24 draws of a normal of this width.
    assert max(abs(abs(p) - w) for p, w in zip(places, way, strict=True)) < 4 * example.WIDTH


class SimulatedTime:
    """Stands for `time` and for an executor of one thread: nothing passes but what is slept."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    @contextmanager
    def executor(self, workers, name):
        assert workers == 1
        yield self

    def submit(self, work, *args, **kwargs):
        began = self.now
        result = work(*args, **kwargs)
        ready, self.now = self.now, began
        return SimpleNamespace(done=lambda: self.now >= ready, result=lambda: result)


@pytest.fixture
def simulated_drive(monkeypatch):
    """A function that drives for 24 ticks of 100 ms with chunks of a kind."""
    example, simulated = load_example("control_loop"), SimulatedTime()
    monkeypatch.setattr(example, "time", simulated)
    monkeypatch.setattr(example, "ThreadPoolExecutor", simulated.executor)

    def drive(name, seconds):
        planner = example.Planner(example.Network(seconds), example.CHUNKS[name])
        return example.drive(planner, rate=10.0, ticks=24)

    return drive


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("independent", 1.5, 2.5),
        ("frozen", 0.5, 2.5),
        ("guided", 0.0, 0.4),
        ("frozen, warm start", 0.0, 0.2),
    ],
)
def test_control_loop_goes_on_from_what_it_executes(simulated_drive, name, least, most):
    """The control loop goes on from the actions that it executes. A plan takes 250 ms, or 100 ms
    from a warm start: whole ticks, and a part of another.
    """
    driven = simulated_drive(name, 0.025)
    delay = 1 if "warm" in name else 3
    assert driven.missed == 0
    assert len(driven.actions) == 24
    assert least < driven.largest_change() < most
    borders = [chunk.first + delay for chunk in driven.chunks[1:]]
    spans = pairwise([0, *borders, 24])
    expected = [
        chunk.actions[tick - chunk.first]
        for chunk, (start, stop) in zip(driven.chunks, spans, strict=True)
        for tick in range(start, stop)
    ]
    assert driven.actions == expected
    for before, after in pairwise(driven.chunks) if name != "independent" else ():
        executed = after.first - before.first
        assert executed >= 4
        assert after.actions[:delay] == before.actions[executed : executed + delay]


def test_control_loop_counts_the_ticks_that_no_chunk_reaches(simulated_drive):
    """The control loop counts the ticks that no chunk reaches. A plan of 2 s is ready at tick 24,
    when chunks of 16 ticks have ended.
    """
    driven = simulated_drive("guided", 0.2)
    assert driven.missed == 24 - 16
    assert driven.actions[16:] == [driven.chunks[0].actions[-1]] * 8


def test_control_loop_raises_what_its_planner_raises():
    example = load_example("control_loop")
    planner = example.Planner(example.Network(0.0), {})
    plan, ticks = planner.plan, []

    def failing(tick, **counts):
        ticks.append(tick)
        if tick > 0:
            raise RuntimeError("no camera")
        return plan(tick, **counts)

    planner.plan = failing
    with pytest.raises(RuntimeError, match="no camera"):
        example.drive(planner, rate=200.0, ticks=1000)
    assert ticks == [0, example.REPLAN]
    assert not any(thread.name.startswith("planner") for thread in threading.enumerate())


def test_control_loop_reports_each_kind_of_chunks(capsys):
    example = load_example("control_loop")
    example.main(["--rate", "100", "--seconds", "0.12", "--call-ms", "0.5"])
    lines = capsys.readouterr().out.splitlines()
    pattern = r"(\D+): \d+ chunks, \d+ ms \(p99 \d+\); \d+ of 12 ticks missed; .* \d\.\d\d"
    assert [re.fullmatch(pattern, line)[1] for line in lines] == list(example.CHUNKS)


def test_trajectory_gif_ends_with_the_samples(capsys, monkeypatch, tmp_path):
    path = run_example("trajectory_gif", capsys, monkeypatch, tmp_path)
    x = fastddim.sample(fastddim.models.load("digits"), 50, batch_size=16, seed=0)
    fastddim.images.save_gif("last.gif", torch.stack([x, x]))
    with Image.open(path) as film, Image.open("last.gif") as last:
        assert film.n_frames == 51
        first = np.array(film.convert("L"))
        film.seek(50)
        last.seek(last.n_frames - 1)
        assert (np.array(film.convert("L")) == np.array(last.convert("L"))).all()
        assert (first != np.array(film.convert("L"))).any()


def test_resume_is_the_run_without_a_stop(capsys, monkeypatch, tmp_path):
    lines = run_example("resume", capsys, monkeypatch, tmp_path).splitlines()
    assert lines == [
        "half_way.safetensors: the state after 20 of 50 steps",
        "equal to the bit to the run without a stop: True",
    ]
    # A resumed run that took no notice of the step, or of the seed, would be another.
    example = load_example("resume")
    model = fastddim.models.load("digits")
    whole = fastddim.sample(model, 50, batch_size=4, eta=1.0, seed=3, return_trajectory=True)
    for first_step, seed in ((19, 3), (20, 4)):
        other = fastddim.sample(
            model, 50, x_T=whole[20], first_step=first_step, eta=example.ETA, seed=seed
        )
        assert not torch.equal(other, whole[-1])


def test_importing_the_examples_does_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unused"])
    for path in (ROOT / "examples").glob("*.py"):
        load_example(path.stem)
    assert not list(tmp_path.iterdir())
