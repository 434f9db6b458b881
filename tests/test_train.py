"""`examples/train.py`: its data, its steps and its checkpoints, on runs of a few steps."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddim import models
from fastddim.processor import has_bfloat16

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(train: ModuleType) -> Any:
    """A recipe with the parts of the real ones: autocast, channels-last weights, several epochs."""
    config = models.UNetConfig(sample_shape=(1, 8, 8), channels=(8, 16))
    return train.Recipe(
        config, steps=6, batch=8, learning_rate=1e-2, warmup=2, bfloat16=has_bfloat16()
    )


@pytest.fixture
def data(train: ModuleType) -> Any:
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return train.Data(images[:15], images[15:], {"name": "noise", "licence": "none"})


def run(train: ModuleType, recipe: Any, data: Any, out: Path, *, resume: bool = False) -> None:
    train.train("digits", recipe, data, out, checkpoint_every=2, resume=resume)


def run_interrupted(
    train: ModuleType, recipe: Any, data: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends in its fourth step."""
    train_step = train.Trainer.train_step

    def interrupted(trainer: Any) -> torch.Tensor:
        if trainer.step == 3:
            raise KeyboardInterrupt
        loss: torch.Tensor = train_step(trainer)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(train, recipe, data, out)


def test_a_resumed_run_equals_an_uninterrupted_one(
    train: ModuleType, tiny: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(train, tiny, data, tmp_path / "whole")

    run_interrupted(train, tiny, data, tmp_path / "parts", monkeypatch)
    torch.manual_seed(123)
    run(train, tiny, data, tmp_path / "parts", resume=True)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    name = "model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
    records = [json.loads((folder / "model.json").read_text()) for folder in (whole, parts)]
    for record in records:
        del record["training"]["minutes"]
    assert records[0] == records[1]
    assert list(records[0]["training"]["loss_at_step"]) == ["2", "4", "6"]


def test_the_result_loads_and_has_learnt(
    train: ModuleType, tiny: Any, data: Any, tmp_path: Path
) -> None:
    constant = train.Data(torch.full((4, 1, 8, 8), 0.5), torch.full((2, 1, 8, 8), 0.5), data.source)
    run(train, replace(tiny, steps=40), constant, tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    untrained = models.UNet(tiny.config, models.load(tmp_path).schedule).requires_grad_(False)
    before = train.held_out_loss(untrained, constant.held_out)[100]
    few, many = record["quality"]["held_out_epsilon_loss"]
    assert few["images"] == many["images"] == 2
    assert few["at_timestep"]["100"] < 0.5 * before
    assert record["training"]["steps_done"] == 40


def test_a_finished_run_is_only_exported_again(
    train: ModuleType, tiny: Any, data: Any, tmp_path: Path
) -> None:
    run(train, tiny, data, tmp_path)
    weights, record = ((tmp_path / f"model.{end}").read_bytes() for end in ("safetensors", "json"))
    (tmp_path / "model.json").unlink()
    run(train, tiny, data, tmp_path, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "model.json").read_bytes() == record


def test_a_run_starts_from_another_models_weights(
    train: ModuleType, tiny: Any, data: Any, tmp_path: Path
) -> None:
    run(train, tiny, data, tmp_path / "first")
    again = replace(tiny, start=str(tmp_path / "first"), seed=1)
    given = models.load(tmp_path / "first").state_dict()
    trainer = train.Trainer(again, data.train)
    for model in (trainer.model, trainer.averaged):
        for name, value in model.state_dict().items():
            assert torch.equal(value, given[name])
    run(train, again, data, tmp_path / "second")
    first, second = (
        json.loads((tmp_path / name / "model.json").read_text())["training"]
        for name in ("first", "second")
    )
    assert second["start"] == first
    assert first["start"] is None
    other = models.UNetConfig(sample_shape=(1, 8, 8), channels=(16, 16))
    with pytest.raises(SystemExit, match=r"--start: expected a model of .*16, 16.*got one of"):
        train.Trainer(replace(again, config=other), data.train)


def test_refusals(train: ModuleType, tiny: Any, data: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no .*checkpoint.safetensors to resume"):
        run(train, tiny, data, tmp_path / "out", resume=True)
    assert not list(tmp_path.iterdir())
    run(train, replace(tiny, steps=2), data, tmp_path)
    with pytest.raises(SystemExit, match="exists: continue it with --resume"):
        run(train, tiny, data, tmp_path)
    with pytest.raises(SystemExit, match="is of another recipe"):
        run(train, tiny, data, tmp_path, resume=True)


class Graph(TorchDispatchMode):
    """A CUDA graph on the CPU: writes operations down, and repeats them into the same memory.

    Stricter than CUDA, which runs nothing during a capture, in that what waits for the device is an
    error there and here alike; laxer, in that copies between devices cannot be told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.written.append((func, args, kwargs or {}, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.written:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new in zip(made, again, strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Stream:
    def wait_stream(self, _: Stream) -> None:
        pass


@contextmanager
def capturing(graph: Graph, *, stream: Stream) -> Iterator[None]:
    assert isinstance(stream, Stream)
    with graph:
        yield


@pytest.fixture
def on_gpu(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes trainers that do the work of a GPU on the CPU."""
    fakes = {
        "Stream": Stream,
        "stream": nullcontext,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "graph": capturing,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
    monkeypatch.setattr(
        train, "draw_batch", lambda recipe, images, _: train.draw_batch_on_gpu(recipe, images)
    )

    class OnGpu(train.Trainer):  # type: ignore[misc, name-defined]
        def __init__(self, recipe: Any, images: torch.Tensor, *, graph: bool = True) -> None:
            super().__init__(recipe, images)
            if graph:
                self.backward = train.captured(self.loss_and_gradients)

        def train_step(self) -> torch.Tensor:
            torch.manual_seed(train.stream_seed(self.recipe.seed, self.step))
            loss: torch.Tensor = super().train_step()
            return loss

    return OnGpu


def test_a_captured_step_is_the_step_itself(
    train: ModuleType, tiny: Any, data: Any, on_gpu: Callable[..., Any]
) -> None:
    one_by_one, captured = (on_gpu(tiny, data.train, graph=graph) for graph in (False, True))
    assert captured.backward is not captured.loss_and_gradients
    losses = [[trainer.train_step().item() for _ in range(5)] for trainer in (one_by_one, captured)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5
    for name, value in one_by_one.averaged.state_dict().items():
        assert torch.equal(value, captured.averaged.state_dict()[name])


def test_a_captured_run_resumes(
    train: ModuleType,
    tiny: Any,
    data: Any,
    tmp_path: Path,
    on_gpu: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "Trainer", on_gpu)
    run(train, tiny, data, tmp_path / "whole")
    run_interrupted(train, tiny, data, tmp_path / "parts", monkeypatch)
    run(train, tiny, data, tmp_path / "parts", resume=True)
    whole, parts = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts


def test_a_graph_of_something_else_is_refused(train: ModuleType, on_gpu: Any) -> None:
    values = iter([1.0, 1.0, 1.0, 2.0])
    with pytest.raises(RuntimeError, match=r"captured step has a loss of 2.0, the step itself 1.0"):
        train.captured(lambda: torch.tensor(next(values)))


@pytest.mark.gpu
def test_a_step_captured_on_a_gpu_is_the_step_itself(
    train: ModuleType, tiny: Any, data: Any
) -> None:
    recipe = replace(tiny, device="cuda", bfloat16=True)
    one_by_one, captured = (
        train.Trainer(recipe, data.train, graph=graph) for graph in (False, True)
    )
    start = torch.nn.utils.parameters_to_vector(one_by_one.model.parameters()).detach().clone()
    for _ in range(5):
        losses = [trainer.train_step().item() for trainer in (captured, one_by_one)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    own, other = (
        torch.nn.utils.parameters_to_vector(trainer.model.parameters())
        for trainer in (one_by_one, captured)
    )
    assert (own - other).norm() < 0.1 * (own - start).norm()


def test_draws_of_a_gpu(train: ModuleType, tiny: Any) -> None:
    images = torch.arange(24.0).view(24, 1, 1, 1)
    x_0, t, noise = train.draw_batch_on_gpu(replace(tiny, batch=5000), images)
    assert x_0.shape == noise.shape == (5000, 1, 1, 1)
    assert set(x_0.flatten().tolist()) == set(range(24))
    assert torch.equal(t // 20, torch.arange(5000) // 100)
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_a_time_gives_a_number_of_steps(
    train: ModuleType, tiny: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(train, "UNTIMED", 1)
    monkeypatch.setattr(train, "TIMED", 2)
    # Two steps a second, from the third look at the clock on.
    assert train.steps_until(103, tiny, data) == 186


def test_a_run_stops_where_the_loss_is_no_number(
    train: ModuleType, tiny: Any, data: Any, tmp_path: Path
) -> None:
    broken = train.Data(data.train * torch.nan, data.held_out, data.source)
    with pytest.raises(SystemExit, match="the loss is nan at step 2"):
        run(train, tiny, broken, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seconds", "9", "--steps", "2"), "--seconds: not with --steps or --resume"),
        (("--seconds", "9", "--resume"), "--seconds: not with --steps or --resume"),
        (("--device", "cuda"), "--device: expected cpu where there is no CUDA device"),
    ],
)
def test_options_that_do_not_fit(
    train: ModuleType,
    options: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train.parse_args(["digits", "--out", "out", *options])
    assert said in capsys.readouterr().err


def test_an_epoch_visits_every_image_once(train: ModuleType, tiny: Any) -> None:
    images = torch.arange(24.0).view(24, 1, 1, 1)
    epochs = [
        torch.cat([train.draw_batch(tiny, images, step)[0] for step in steps]).flatten()
        for steps in (range(3), range(3, 6))
    ]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(24.0))
    assert not torch.equal(*epochs)


def test_timesteps_cover_the_schedule_evenly(train: ModuleType, tiny: Any) -> None:
    recipe = replace(tiny, batch=50)
    drawn = torch.stack([train.draw_batch(recipe, torch.zeros(1, 1, 1, 1), i)[1] for i in range(9)])
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn // 20, torch.arange(50).expand(9, 50))
    assert len(drawn[:, 0].unique()) > 1


def test_a_step_depends_on_the_seed(train: ModuleType, tiny: Any) -> None:
    images = torch.arange(24.0).view(24, 1, 1, 1)
    first, other = (train.draw_batch(replace(tiny, seed=s), images, 0) for s in (0, 1))
    again = train.draw_batch(tiny, images, 0)
    for a, b, c in zip(first, other, again, strict=True):
        assert torch.equal(a, c)
        assert not torch.equal(a, b)


def test_learning_rate_rises_and_falls_to_zero(train: ModuleType, tiny: Any) -> None:
    recipe = replace(tiny, steps=100, warmup=10, learning_rate=1.0)
    rates = [train.learning_rate(recipe, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.97
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_digits_are_scaled_and_split(train: ModuleType) -> None:
    data = train.digits_data()
    assert data.train.shape == (1437, 1, 8, 8)
    assert data.held_out.shape == (360, 1, 8, 8)
    assert data.train.aminmax() == (-1, 1)


def test_fashion_is_read_from_a_folder(train: ModuleType, tmp_path: Path) -> None:
    with np.load(Path(__file__).parent / "data" / "fashion_test.npz") as stored:
        images = stored["images"]
    header = np.array([0x803, *images.shape], ">i4").tobytes()
    for part, content in (("train", images), ("t10k", 255 - images)):
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + content.tobytes())
    data = train.fashion_data(tmp_path)
    expected = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    assert torch.equal(data.train, expected)
    torch.testing.assert_close(data.held_out, -expected, rtol=0, atol=1e-6)


def test_command_line_says_how_to_get_missing_data(run_python: Any, tmp_path: Path) -> None:
    arguments = ("fashion", "--data", tmp_path / "none", "--out", tmp_path / "out")
    result = run_python(TRAIN, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert "apt-get install dataset-fashion-mnist" in result.stderr
    assert "--data" in result.stderr
    assert "Traceback" not in result.stderr


def test_command_line_trains(run_python: Any, tmp_path: Path) -> None:
    result = run_python(TRAIN, "digits", "--steps", "2", "--out", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "loss=" in result.stderr
    record = json.loads((tmp_path / "out" / "model.json").read_text())
    assert record["training"]["steps_done"] == 2
    assert [entry["images"] for entry in record["quality"]["held_out_epsilon_loss"]] == [64, 360]
    assert models.load(tmp_path / "out").sample_shape == (1, 8, 8)
