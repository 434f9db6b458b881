"""Logs of control loops: every tick can be drawn again from its line, with its bits."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim
from fastddim import ActionSampler
from fastddim.actions import ActionLog, replay
from fastddim.actions.log import LoggedTick, LogWriter, observation_digest
from fastddim.loop.arguments import ModelArguments

from .support.models import elementwise_model

S, SHAPE = 4, (2, 5, 3)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"eta": torch.tensor([1.0, 0.5])},
    "warm": {"warm_start": 2},
    "freeze": {"chunking": "freeze"},
    "guide": {"chunking": "guide", "max_guidance_weight": 2.0},
    "warm and frozen": {"warm_start": 3, "chunking": "freeze", "eta": [0.5, 0.0, 1.0, 0.5]},
    "warm and guided": {"warm_start": 1, "chunking": "guide"},
}
RESETS = (3, 4)
CALLS: list[dict[str, Any]] = [
    {},
    {"executed": 2, "frozen": 1},
    {"executed": [1, 4], "frozen": [3, 0]},
    {"executed": torch.tensor([5, 0]), "frozen": 0},
    {"executed": 1},
    {"executed": 2, "frozen": [0, 3]},
]


def network(x: Tensor, t: Tensor, *, state: dict[str, Tensor]) -> Tensor:
    return elementwise_model(x, t) + state["place"][:, None, :] * state["gain"][:, None, None]


def observation(tick: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(tick)
    place, gain = torch.rand(2, 3, generator=draw), torch.rand(2, generator=draw)
    return {"state": {"place": place, "gain": gain}}


OBSERVATIONS = [observation(tick) for tick in range(len(CALLS))]


def sampler_of(model: Any = network, steps: int = S, **options: Any) -> ActionSampler:
    given: dict[str, Any] = {"shape": SHAPE, "schedule": fastddim.Schedule.cosine(), "clip": 1.0}
    if model is network:
        given["model_kwargs"] = observation(0)
    return ActionSampler(model, steps, **given | options)


def run(sampler: ActionSampler) -> list[Tensor]:
    chunks = []
    for tick, (call, seen) in enumerate(zip(CALLS, OBSERVATIONS, strict=True)):
        if tick in RESETS:
            sampler.reset()
        chunks.append(sampler(model_kwargs=seen, **call))
    return chunks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
class TestReplay:
    def test_has_the_bits_from_any_tick(self, kind: dict[str, Any], path: Path) -> None:
        chunks = run(sampler_of(seed=7, log=path, **kind))
        again = sampler_of(seed=7, **kind)
        for first in (0, 1, 2, 3, 5):
            ticks = list(replay(path, again, OBSERVATIONS[first:], first_tick=first))
            assert [it.tick for it in ticks] == list(range(first, len(CALLS)))
            for tick, actions, logged in ticks:
                assert torch.equal(actions, chunks[tick])
                assert torch.equal(logged, chunks[tick])
            assert again.tick == len(CALLS)

    def test_begins_with_the_chunk_in_the_log(self, kind: dict[str, Any], path: Path) -> None:
        """A replay begins with the chunk in the log: another last chunk than the sampler would have
        drawn itself.
        """
        run(sampler_of(seed=7, log=path, **kind))
        lines = path.read_text().splitlines()
        entry = json.loads(lines[2])
        entry["actions"] = (torch.tensor(entry["actions"]) * 0.5).tolist()
        lines[2] = json.dumps(entry)
        path.write_text("\n".join(lines) + "\n")
        again = sampler_of(seed=7, **kind)
        alone = sampler_of(seed=7, **kind)
        alone.restore(2, torch.tensor(entry["actions"]))
        expected = alone(model_kwargs=OBSERVATIONS[2], **CALLS[2])
        ticks = replay(path, again, OBSERVATIONS[2:], first_tick=2, exact=False)
        assert torch.equal(next(ticks).actions, expected)


def test_lines_say_what_happened(path: Path) -> None:
    chunks = run(sampler_of(log=path, warm_start=2))
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert (header["format"], header["version"]) == ("fastddim actions", 1)
    assert header["versions"] == {"fastddim": fastddim.__version__, "torch": torch.__version__}
    assert header["plan"]["timesteps"] == sampler_of().plan.timesteps.tolist()
    assert header["plan"]["clip"] == 1.0
    own = ("shape", "dtype", "seed", "warm_start", "chunking", "max_guidance_weight")
    assert [header[name] for name in own] == [list(SHAPE), "float32", 0, 2, None, 5.0]
    assert [line["tick"] for line in lines] == list(range(6))
    assert [line["sample"] for line in lines] == [0, 2, 4, 6, 8, 10]
    assert [line["executed"] for line in lines] == [0, 2, [1, 4], [5, 0], 1, 2]
    assert [line["frozen"] for line in lines] == [0, 1, [3, 0], 0, 0, [0, 3]]
    assert [line["before"] for line in lines] == [False, True, True, False, False, True]
    assert [line["actions"] for line in lines] == [chunk.tolist() for chunk in chunks]
    assert len({line["observation"] for line in lines}) == 6


class TestDigest:
    def digest(self, model_kwargs: Any, uncond_kwargs: Any = None) -> str:
        given = ModelArguments.of(
            model_kwargs, uncond_kwargs, batch=2, guided=uncond_kwargs is not None, apart=False
        )
        return observation_digest(given)

    def test_does_not_depend_on_the_order_of_mappings(self) -> None:
        a, b = torch.rand(2, 3), torch.rand(2, 1)
        one = self.digest({"a": a, "more": {"b": b, "c": a}, "name": "fixed"})
        other = self.digest({"name": "fixed", "more": {"c": a.clone(), "b": b}, "a": a})
        assert one == other

    def test_depends_on_all_else(self) -> None:
        a = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
        changed = a.clone()
        changed[1, 0] = -0.0
        given: list[Any] = [
            ({"a": a}, None),
            ({"b": a}, None),
            ({"a": {"a": a}}, None),
            ({"a": a.double()}, None),
            ({"a": a[:, None]}, None),
            ({"a": a.mT}, None),
            ({"a": changed}, None),
            ({"a": a, "b": a}, None),
            ({"a": a}, {"a": a}),
            ({"a": a}, {"a": 0.0}),
            ({"a": a}, {"a": 1.0}),
        ]
        digests = [self.digest(*it) for it in given]
        assert len(set(digests)) == len(given)

    def test_of_a_sampler_has_what_it_was_made_with(self) -> None:
        sampler = sampler_of()
        assert (
            sampler.observed()
            == sampler.observed(observation(0))
            != sampler.observed(observation(1))
        )
        assert sampler.observed({"state": {"gain": observation(0)["state"]["gain"]}}) == (
            sampler.observed()
        )


def test_conditions_of_both_halves(path: Path) -> None:
    unconditional = {"state": {"place": torch.zeros(2, 3)}}
    given = {"guidance_scale": 2.0, "uncond_kwargs": unconditional}
    sampler = sampler_of(log=path, **given)
    calls = [
        ({"state": {"gain": torch.rand(2)}}, {"state": {"place": torch.rand(2, 3)}})
        for _ in range(2)
    ]
    for model_kwargs, uncond_kwargs in calls:
        sampler(model_kwargs=model_kwargs, uncond_kwargs=uncond_kwargs)
    assert len(list(replay(path, sampler_of(**given), calls))) == 2
    with pytest.raises(ValueError, match="observations: expected that of tick 0, with digest"):
        next(replay(path, sampler_of(**given), [calls[0][0]]))


class TestRefusals:
    def test_of_another_observation(self, path: Path) -> None:
        run(sampler_of(log=path))
        ticks = replay(path, sampler_of(), [*OBSERVATIONS[:2], OBSERVATIONS[3]])
        assert [next(ticks).tick, next(ticks).tick] == [0, 1]
        with pytest.raises(ValueError, match="observations: expected that of tick 2, with digest"):
            next(ticks)
        ticks = replay(path, sampler_of(), OBSERVATIONS[:1])
        next(ticks)
        with pytest.raises(ValueError, match="observations: expected one of tick 1, got no more"):
            next(ticks)

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"seed": 1}, "seed: 0 in the log, 1 here"),
            ({"steps": 3}, "steps: 4 in the log, 3 here"),
            ({"clip": 0.5}, "clip: 1.0 in the log, 0.5 here"),
            ({"eta": 0.5}, "eta: 0.0 in the log, 0.5 here"),
            ({"warm_start": 1}, "warm_start: null in the log, 1 here"),
            ({"chunking": "freeze"}, 'chunking: null in the log, "freeze" here'),
            ({"max_guidance_weight": 1}, "max_guidance_weight: 5.0 in the log, 1.0 here"),
            ({"dtype": torch.float64}, 'dtype: "float32" in the log, "float64" here'),
            ({"schedule": fastddim.Schedule.linear()}, "noise levels of the schedule: others in"),
            ({"prediction": "sample"}, 'prediction: "epsilon" in the log, "sample" here'),
        ],
    )
    def test_of_another_sampler(self, options: dict[str, Any], line: str, path: Path) -> None:
        sampler_of(log=path)(model_kwargs=OBSERVATIONS[0])
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"^log: expected one of the same sampler") as raised:
            sampler_of(log=path, **options)
        assert line in str(raised.value)
        assert path.read_bytes() == before
        with pytest.raises(ValueError, match=r"^log: expected one of the same sampler") as raised:
            replay(path, sampler_of(**options), OBSERVATIONS)
        assert line in str(raised.value)

    def test_of_other_weights(self, path: Path) -> None:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gain = nn.Parameter(torch.rand(()))
                self.eval()

            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return elementwise_model(x, t) * self.gain

        net = Network()
        sampler_of(net, log=path)()
        assert len(list(replay(path, sampler_of(net), [None]))) == 1
        with pytest.raises(ValueError, match="weights of the model: others in the log than here"):
            replay(path, sampler_of(Network()), [None])

    def test_of_other_actions_alone(self, path: Path) -> None:
        """A log of another machine or version is drawn again, and only other actions
        are reported.
        """
        run(sampler_of(log=path))
        header, *lines = map(json.loads, path.read_text().splitlines())
        header["versions"]["torch"] = "1.0"
        header["computation"]["threads"] = 99
        lines[2]["actions"][1][4][0] += 0.25
        path.write_text("".join(json.dumps(it) + "\n" for it in (header, *lines)))
        ticks = replay(path, sampler_of(), OBSERVATIONS)
        assert [next(ticks).tick, next(ticks).tick] == [0, 1]
        message = (
            r"actions: expected those of tick 2 in the log, got others in 1 of 30 values, up to "
            r"0\.25 away; the log is of fastddim .* with torch 1\.0, these are of"
        )
        with pytest.raises(ValueError, match=message):
            next(ticks)
        ticks = replay(path, sampler_of(), OBSERVATIONS, exact=False)
        assert [torch.equal(it.actions, it.logged) for it in ticks] == [True] * 2 + [False] + (
            [True] * 3
        )

    def test_of_bad_arguments(self, path: Path) -> None:
        sampler = sampler_of(log=path)
        run(sampler)
        with pytest.raises(ValueError, match=r"first_tick: expected a tick of .*, got 6"):
            replay(path, sampler_of(), [], first_tick=6)
        with pytest.raises(TypeError, match="sampler: expected an ActionSampler, got function"):
            replay(path, network, [])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="exact: expected True or False, got 1"):
            replay(path, sampler_of(), [], exact=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="log: expected None to restore, replay, copy or"):
            replay(path, sampler, [])
        with pytest.raises(ValueError, match="log: expected None to restore, replay, copy or"):
            sampler.restore(3, torch.zeros(SHAPE))
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(ValueError, match="log: expected None to restore, replay, copy or"):
                copied(sampler)

    def test_of_what_is_no_log(self, path: Path, tmp_path: Path) -> None:
        for content in ("hello", '{"format": "other"}\n', "[]\n", '{"format": "fastddim acting'):
            path.write_text(content)
            with pytest.raises(ValueError, match="expected a log of actions"):
                sampler_of(log=path)
            assert path.read_text() == content
            with pytest.raises(ValueError, match="expected a log of actions"):
                ActionLog(path)
        with pytest.raises(OSError, match="directory"):
            sampler_of(log=tmp_path)
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="log: expected an ordinary file or a new name"):
            sampler_of(log=tmp_path / "pipe")
        with pytest.raises(TypeError, match="log: expected a path, got 3"):
            sampler_of(log=3)

    def test_leave_no_file(self, path: Path) -> None:
        with pytest.raises(ValueError, match="chunking: expected one of"):
            sampler_of(log=path, chunking="frozen")
        assert not path.exists()

    def test_of_a_log_in_use(self, path: Path) -> None:
        first = sampler_of(log=path)
        with pytest.raises(BlockingIOError, match="log: expected a file of this sampler alone"):
            sampler_of(log=path)
        del first
        sampler_of(log=path)

    def test_without_locks_warn(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.warns(UserWarning, match="this file system has no locks"):
            sampler_of(log=path)


class TestFile:
    def test_goes_on_with_the_next_tick(self, path: Path) -> None:
        first = sampler_of(log=path, warm_start=2)
        run(first)
        del first
        second = sampler_of(log=path, warm_start=2)
        assert second.tick == len(CALLS)
        chunk = second(model_kwargs=OBSERVATIONS[0], executed=1)
        ticks = list(ActionLog(path))
        assert [it.tick for it in ticks] == list(range(len(CALLS) + 1))
        assert (ticks[-1].before, ticks[-1].actions) == (False, chunk.tolist())
        again = replay(path, sampler_of(warm_start=2), [*OBSERVATIONS, OBSERVATIONS[0]])
        assert len(list(again)) == len(CALLS) + 1

    def test_torn_anywhere_in_its_last_line(self, path: Path) -> None:
        run(sampler_of(log=path))
        whole = path.read_bytes()
        *kept, _ = whole.splitlines(keepends=True)
        before = len(b"".join(kept))
        for end in (before, before + 1, (before + len(whole)) // 2, len(whole) - 1):
            path.write_bytes(whole[:end])
            assert [it.tick for it in ActionLog(path)] == list(range(5))
            sampler = sampler_of(log=path)
            assert path.read_bytes() == whole[:before]
            assert sampler.tick == 5
            sampler(model_kwargs=OBSERVATIONS[5])
            assert [it.tick for it in ActionLog(path)] == list(range(6))
            del sampler

    def test_torn_in_its_header_begins_anew(self, path: Path) -> None:
        sampler_of(log=path)
        header = path.read_bytes()
        for end in (0, 1, len(header) - 1):
            path.write_bytes(header[:end])
            sampler_of(log=path)
            assert path.read_bytes() == header

    def test_broken_in_the_middle(self, path: Path) -> None:
        run(sampler_of(log=path))
        lines = path.read_text().splitlines()
        for broken in ("{", "[1]", '{"tick": 1}', lines[1].replace('"tick": 0', '"tick": "0"')):
            path.write_text("\n".join([lines[0], broken, *lines[2:]]) + "\n")
            with pytest.raises(ValueError, match="expected a tick of a log in line 2, got"):
                list(ActionLog(path))

    def test_each_tick_is_one_write(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[bytes] = []
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, it: written.append(it) or write(fd, it))
        run(sampler_of(log=path))
        assert len(written) == 1 + len(CALLS)
        assert b"".join(written) == path.read_bytes()
        assert all(it.count(b"\n") == 1 and it.endswith(b"\n") for it in written)

    def test_a_full_disk_leaves_whole_lines(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler = sampler_of(log=path)
        sampler(model_kwargs=OBSERVATIONS[0])
        before, write = path.read_bytes(), os.write
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda fd, it: write(fd, it[:9]))
            with pytest.raises(OSError, match=r"expected room for .* bytes, got 9 of them written"):
                sampler(model_kwargs=OBSERVATIONS[1])
        assert path.read_bytes() == before
        assert sampler.tick == 2

    def test_ticks_that_prepare_are_not_in_it(self, path: Path) -> None:
        sampler = sampler_of(log=path, warm_start=1)
        sampler.prepare()
        assert list(ActionLog(path)) == []
        sampler(model_kwargs=OBSERVATIONS[0])
        assert [it.tick for it in ActionLog(path)] == [0]

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
    )
    def test_keeps_the_bits_of_every_value(self, dtype: torch.dtype, path: Path) -> None:
        limits = torch.finfo(dtype)
        special = [0.0, -0.0, 1 / 3, limits.max, limits.min, limits.tiny, limits.eps]
        special += [limits.tiny * limits.eps, float("inf"), float("-inf"), float("nan")]
        actions = torch.tensor([*special, *torch.rand(19).tolist()]).to(dtype).view(2, 5, 3)
        log = LogWriter(path, sampler_of(dtype=dtype).header())
        log.write(LoggedTick(0, 0, 0, 0, False, "", actions.tolist()))
        read = ActionLog(path)
        (tick,) = read
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        found = read.actions(tick)
        same = found.view(bits) == actions.view(bits)
        assert found.dtype == dtype
        assert (same | actions.isnan()).all()
        assert found.isnan().equal(actions.isnan())
