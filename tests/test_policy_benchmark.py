"""The benchmark of robots' policies: its networks, its loops at toy sizes, its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import harness
import policy_cases
import policy_tables
import pytest
import torch
from cpu_results import result_of
from lerobot_loops import around_lerobot
from policy_loops import Case, Policy, assert_parity, percentile, prepared, timed
from policy_networks import NETWORKS, ConditionalUnet, MlpPolicy, TransformerPolicy
from policy_tables import COMPILED, FLOOR, INSTALLED, OURS, THEIRS
from torch import nn

from .support.dropins import peers

TOYS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: MlpPolicy(width=8, step_width=4),
    "small U-Net": lambda: ConditionalUnet((8, 16), step_width=8),
    "transformer": lambda: TransformerPolicy(width=16, layers=1, heads=2),
}


def toy(case: Case) -> Policy:
    torch.manual_seed(0)
    return Policy(case, "cpu", TOYS[case.network]().eval().requires_grad_(False))


def their_unet(widths: tuple[int, ...]) -> Any:
    """LeRobot's U-Net for the observations of the benchmark."""
    package = peers.lerobot()
    kinds = package.types
    config = package.configuration.DiffusionConfig(
        output_features={"action": kinds.PolicyFeature(kinds.FeatureType.ACTION, (2,))},
        down_dims=widths,
    )
    return package.modeling.DiffusionConditionalUnet1d(config, 36)


class TestNetworks:
    def test_the_default_unet_has_the_parameters_of_lerobot(self) -> None:
        with torch.device("meta"):
            own, theirs = NETWORKS["default U-Net"](), their_unet((512, 1024, 2048))
        shapes = {name: weight.shape for name, weight in theirs.state_dict().items()}
        assert {name: weight.shape for name, weight in own.state_dict().items()} == shapes
        assert sum(shape.numel() for shape in shapes.values()) > 248e6

    @torch.no_grad()
    def test_the_unet_has_the_output_of_lerobot(self) -> None:
        torch.manual_seed(0)
        own, theirs = ConditionalUnet((8, 16, 24)), their_unet((8, 16, 24))
        own.load_state_dict(theirs.state_dict())
        x, condition = torch.randn(3, 16, 2), torch.randn(3, 36)
        t = torch.tensor([0, 37, 99])
        expected = theirs(x, t, global_cond=condition)
        torch.testing.assert_close(own(x, t, condition), expected, rtol=1e-5, atol=1e-6)

    @torch.no_grad()
    def test_an_action_is_not_told_of_later_ones(self) -> None:
        network = TOYS["transformer"]().eval()
        x, t, condition = torch.randn(1, 16, 2), torch.tensor([5]), torch.randn(1, 36)
        changed = x.clone()
        changed[:, 9:] += 1
        same = (network(x, t, condition) == network(changed, t, condition)).all(2)[0]
        assert same.tolist() == [True] * 9 + [False] * 7


class TestLoops:
    @pytest.fixture(autouse=True)
    def no_grad(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    @pytest.mark.parametrize(
        "case",
        [
            Case("MLP"),
            Case("small U-Net", batch=3),
            Case("transformer"),
            Case("MLP", batch=2, ddpm=True),
        ],
        ids=lambda case: case.name,
    )
    def test_a_case(self, case: Case) -> None:
        """All loops make the same actions, and each is timed at every tick."""
        peers.lerobot()
        row = policy_cases.measured(toy(case), seconds=0, most=2)
        assert set(row["timings"]) == {FLOOR, OURS, INSTALLED, THEIRS}
        assert list(row["left_out"]) == [COMPILED]
        assert row["ticks"] == 2
        for timing in row["timings"].values():
            assert 0 < timing["returned_seconds"] <= timing["seconds"]
        text = policy_tables.policies_as_markdown({"machine": harness.machine(), "rows": [row]})
        assert f"| {case.name} |" in text

    @pytest.mark.parametrize("ddpm", [False, True])
    def test_other_actions_are_found(self, ddpm: bool) -> None:
        policy = toy(Case("MLP", ddpm=ddpm))
        right = prepared(policy)
        wrong = replace(right, actions=lambda number: right.actions(number) + 1e-4)
        assert_parity(policy, {"right": right})
        with pytest.raises(AssertionError, match="wrong: Tensor-likes are not close"):
            assert_parity(policy, {"right": right, "wrong": wrong})

    def test_without_lerobot_the_others_are_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "lerobot", lambda: pytest.skip("lerobot is not installed"))
        theirs, left_out = around_lerobot(toy(Case("MLP")), compiled=True)
        assert not theirs
        assert left_out == dict.fromkeys((INSTALLED, THEIRS, COMPILED), "lerobot is not installed")

    def test_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        peers.lerobot()
        monkeypatch.setenv("CXX", "no-such-compiler")
        _, left_out = around_lerobot(toy(Case("MLP")), compiled=True)
        assert left_out == {COMPILED: "no C++ compiler (no-such-compiler)"}

    def test_every_round_begins_with_another_loop(self) -> None:
        called: list[str] = []

        def noting(name: str) -> Any:
            return lambda number: called.append(f"{name}{number}")

        ticks = {name: noting(name) for name in "abc"}
        times = timed(ticks, torch.device("cpu"), seconds=60, most=4, least=1)
        assert " ".join(called) == "a0 b0 c0 b1 c1 a1 c2 a2 b2 a3 b3 c3"
        assert [len(found.done) for found in times.values()] == [4, 4, 4]
        called.clear()
        timed(ticks, torch.device("cpu"), seconds=-1, most=4, least=2)
        assert " ".join(called) == "a0 b0 c0 b1 c1 a1"


def test_percentiles() -> None:
    assert percentile([float(value) for value in range(1, 101)], 0.99) == 99
    assert percentile([float(value) for value in range(1, 1001)], 0.99) == 990
    assert percentile([1.0] * 99, 0.99) is None


class TestResults:
    def test_they_say_where_they_come_from(self) -> None:
        result = result_of("policies-cpu")
        machine = result["machine"]
        assert all(machine[key] for key in ("cpu", "instruction_set", "torch", "commit"))
        assert machine["modified"] is False, "measured on uncommitted code"
        assert [row["case"] for row in result["rows"]] == [c.name for c in policy_cases.CASES]
        for row in result["rows"]:
            timed = {*row["timings"], *row["left_out"]}
            assert timed == {FLOOR, OURS, INSTALLED, THEIRS, COMPILED}
            for timing in row["timings"].values():
                assert 0 < timing["ratio_low"] <= timing["ratio"] <= timing["ratio_high"]
