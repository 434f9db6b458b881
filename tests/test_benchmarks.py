"""The numbers in the README and the documentation are those of the committed results."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import gains
import harness
import headline
import loops
import pytest
import quality_tables
import sampling_loops
import speed_tables
import tables
import torch
import version_tables
from cpu_results import result_of
from gpu_results import Result
from headline import equal_quality
from quality import grid
from quality_tables import Kind, images_seen, quality_as_markdown

import fastddim

from .support.tuned import steps_of_order

ROOT = Path(__file__).resolve().parent.parent

# Of other processors.
STAND_INS = (
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"MKL_CBWR": "COMPATIBLE"},
)


@pytest.mark.parametrize("page", tables.PAGES)
def test_pages_show_the_committed_results(page: str, request: pytest.FixtureRequest) -> None:
    if page == "docs/versions.md" and request.config.getoption("--record"):
        pytest.skip("the record is being written")
    shown = (ROOT / page).read_text()
    made = tables.PAGES[page]()
    assert re.findall(r"<!-- ([\w-]+):begin -->", shown) == re.findall(
        r"<!-- ([\w-]+):end -->", shown
    )
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", shown)) == set(made)
    assert tables.updated(shown, made) == shown


def test_the_versions_are_those_that_passed(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--record"):
        pytest.skip("the record is being written")
    page = (ROOT / "docs/versions.md").read_text()
    assert tables.updated(page, version_tables.blocks()) == page
    recorded = version_tables.results()
    for result in recorded:
        assert result["machine"]["modified"] is False, "run with uncommitted code"
        assert result["tests"]["failed"] == result["tests"]["error"] == 0
        assert result["tests"]["passed"] > 4000
    releases = {result["machine"]["torch"].rpartition(".")[0] for result in recorded}
    assert {"2.11", "2.13", "2.14"} <= releases
    settings = [result["settings"] for result in recorded]
    assert all(setting in settings for setting in STAND_INS)


def test_the_releases_of_diffusers_are_those_that_passed() -> None:
    oldest, newest = recorded = version_tables.compat_results()
    for result in recorded:
        assert result["machine"]["modified"] is False, "run with uncommitted code"
        assert result["tests"]["failed"] == result["tests"]["error"] == 0
        assert result["tests"]["passed"] > 1000
    makefile, project = ((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    for result, place in ((oldest, "oldest"), (newest, "newest")):
        release = result["machine"]["diffusers"]
        assert f".venv-compat-{place},diffusers=={release})" in makefile
    floor = ".".join(oldest["machine"]["diffusers"].split(".")[:2])
    assert project.count(f'"diffusers>={floor}"') == project.count('"diffusers>=') == 2


@pytest.mark.parametrize("name", tables.TABLES)
def test_results_say_where_they_come_from(name: str) -> None:
    result = result_of(name)
    machine = result["machine"]
    assert all(machine[key] for key in ("cpu", "instruction_set", "threads", "torch", "commit"))
    assert machine["modified"] is False, "measured on uncommitted code"
    cases = [
        str({k: v for k, v in row.items() if k != "seconds" and not isinstance(v, dict)})
        for row in result["rows"]
    ]
    assert len(set(cases)) == len(cases) >= 7


@pytest.mark.parametrize("name", ["step-cpu", "dropins-cpu", "loops-cpu", "sampling-cpu"])
def test_timings_have_their_spread(name: str) -> None:
    result = result_of(name)
    for row in result["rows"]:
        for timing in row["timings"].values():
            assert 0 < timing["ratio_low"] <= timing["ratio"] <= timing["ratio_high"]


@pytest.mark.parametrize("name", ["quality-digits", "quality-fashion"])
def test_quality_is_that_of_the_bundled_model(name: str) -> None:
    result = result_of(name)
    assert {row["weights"] for row in result["rows"]} == {grid.fingerprint(result["data"])}
    tuned = fastddim.models.load(result["data"]).tuned
    for row in result["rows"]:
        if row["spacing"] == "tuned":
            assert row["tuned"] == grid.tuned_digest(tuned[row["steps"]])
        assert row["classifier"]["distance"] > 0 < row["classifier"]["error"]


def test_a_quality_table_says_where_its_samples_were_drawn() -> None:
    result = result_of("quality-digits")
    cpu, versions = result["machine"]["cpu"], f"torch {result['machine']['torch']}, fastddim "
    assert "drawn on" not in quality_as_markdown(result)
    drawn = [{**row, "gpu": "NVIDIA H100"} for row in result["rows"]]
    for rows, devices in ((drawn, "NVIDIA H100"), (drawn[1:] + result["rows"][:1], None)):
        text = quality_as_markdown({**result, "rows": rows})
        assert f"Samples drawn on {devices or f'{cpu} or NVIDIA H100'}, the network in" in text
        assert f"judged on a CPU, {cpu}, {versions}" in text


def test_images_of_training_are_those_of_every_run() -> None:
    first = {"steps_done": 3, "batch": 2}
    second = {"steps_done": 5, "batch": 4, "start": first}
    assert images_seen(first) == 6
    assert images_seen({"steps_done": 1, "batch": 100, "start": second}) == 126


def test_equal_quality_is_the_fewest_steps_within_the_error() -> None:
    def quality(steps: int, eta: float, distance: float, order: int = 1) -> dict[str, Any]:
        return quality_row(Kind("", "uniform", order, eta), steps, distance)

    def timings(steps: int) -> dict[str, Any]:
        ratios = {
            "diffusers": steps / 1000,
            "diffusers against fastddim": 1.25,
            "fastddim": steps / 1250,
            "fastddim, η = 1": steps / 500,
            "fastddim, order 2": steps / 1000,
        }
        row = {name: {"ratio": ratio} for name, ratio in ratios.items()}
        return {"case": "digits U-Net", "steps": steps, "timings": row}

    distances = [
        quality(1000, 1.0, 2.0),
        quality(10, 0.0, 2.43),
        quality(20, 0.0, 2.42),
        quality(50, 0.0, 1.0),
        quality(20, 0.5, 2.1),
        quality(20, 0.2, 2.2),
        quality(10, 0.0, 3.0, order=2),
        quality(50, 0.0, 2.0, order=2),
    ]
    measured = {"rows": distances}, [timings(steps) for steps in (5, 10, 20, 50)]
    # √(0.3² + 0.3²) is 0.424.
    kinds = {eta: Kind("", "uniform", eta=eta) for eta in (0.0, 0.2, 0.5, 1.0)}
    plain = equal_quality(*measured, [kinds[0.0]])
    assert plain is not None
    assert (plain.steps, plain.kind.eta, plain.close) == (20, 0.0, False)
    assert plain.speedup == pytest.approx(50 * 1.25)
    noisy = equal_quality(*measured, [kinds[eta] for eta in (0.0, 0.2, 0.5)])
    assert noisy is not None
    assert (noisy.steps, noisy.kind.eta, noisy.close) == (20, 0.5, True)
    assert noisy.speedup == pytest.approx(25)
    second = equal_quality(*measured, [Kind("", "uniform", order=2)])
    assert second is not None
    assert (second.steps, second.speedup) == (50, pytest.approx(20))
    untimed = equal_quality(measured[0], measured[1][:3], [Kind("", "uniform", order=2)])
    assert untimed is not None
    assert (untimed.steps, untimed.speedup) == (50, None)
    # DDPM's own 1000 steps are no answer.
    assert equal_quality(measured[0], [timings(1000)], [kinds[1.0]]) is None


def quality_row(kind: Kind, steps: int, distance: float) -> dict[str, Any]:
    cell = {"count": 10, "distance": distance, "error": 0.3}
    plan = {"spacing": kind.spacing, "order": kind.order, "eta": kind.eta, "variance": "small"}
    return {**plan, "steps": steps, "classifier": cell}


@pytest.fixture
def without_tuned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Copies of the results that have no tuned steps, and that all tables are made of."""
    found = {name: copy.deepcopy(result_of(name)) for name in tables.TABLES}
    for result in found.values():
        result["rows"] = [row for row in result["rows"] if row.get("spacing") != "tuned"]
    timed = found["sampling-cpu"]["rows"]
    found["sampling-cpu"]["rows"] = [row for row in timed if "fastddim" in row["timings"]]
    for row in found["sampling-cpu"]["rows"]:
        row["timings"].pop("fastddim, tuned", None)
    for module in (tables, headline, quality_tables, gains):
        monkeypatch.setattr(module, "result_of", lambda name: found.get(name) or result_of(name))
    return found


def test_without_tuned_steps_the_others_are_shown(without_tuned: dict[str, Any]) -> None:
    made = tables.performance() | tables.quality()
    for place in ("headline", "quality-few", "quality-digits", "sampling-cpu"):
        assert "tuned" not in made[place]
    assert "Digits as good as DDPM's of 1000 steps in 50 steps, " in made["headline"]
    assert "| digits, order 2 | " in made["quality-few"]


def test_tuned_steps_lead_where_they_were_measured(without_tuned: dict[str, Any]) -> None:
    digits = without_tuned["quality-digits"]["rows"]
    digits += [quality_row(quality_tables.TUNED, *cell) for cell in ((4, 9.0), (8, 1.1), (10, 0.9))]
    made = tables.performance() | tables.quality()
    columns, *few = made["quality-few"].split("\n")
    tuned = next(row for row in few if row.startswith("| digits, tuned |"))
    shown = dict(zip(columns.split(" | "), tuned.split(" | "), strict=True))
    assert [shown[f"S = {S}"] for S in (4, 5, 8, 10, 20)] == [
        *("9 ± 0.3", "–", "1.1 ± 0.3", "0.9 ± 0.3", "–")
    ]
    assert "fashion, tuned" not in made["quality-few"]
    assert (
        "of 1000 steps in 8 [tuned](../tune.md) steps**, with 125 times fewer calls"
        in (made["headline"])
    )
    assert "| digits, tuned | 8 | – | 1.1 ± 0.3 | 0.861 ± 0.16 |" in made["headline"]
    assert "at uniform spacing except where tuned" in made["headline"]
    # Of the paper's numbers of steps.
    assert "| η = 0, tuned | – | 0.9 ± 0.3 | – | – | – | – |" in made["quality-digits"]

    timing = {"seconds": 0.05, "ratio": 1 / 120}
    row = {"case": "digits U-Net", "steps": 8, "timings": {"fastddim, tuned": timing}}
    without_tuned["sampling-cpu"]["rows"].append(row)
    made = tables.performance() | tables.quality()
    assert "| digits U-Net | 8 | 50 ms | 120× | 1.1 ± 0.3 | 0.861 ± 0.2 |" in made["sampling-cpu"]
    assert "in 8 [tuned](../tune.md) steps, 120 times faster** than" in made["headline"]
    assert "| digits, tuned | 8 | 120× | 1.1 ± 0.3 | 0.861 ± 0.16 |" in made["headline"]


def test_tuned_steps_that_are_not_enough_lead_nothing(without_tuned: dict[str, Any]) -> None:
    digits = without_tuned["quality-digits"]["rows"]
    digits.append(quality_row(quality_tables.TUNED, 20, 1.3))
    made = tables.performance()["headline"]
    assert "Digits as good as DDPM's of 1000 steps in 50 steps, " in made
    assert "| digits, tuned | none measured below 1000 | – | – | 0.861 ± 0.16 |" in made


def test_tuned_steps_are_timed_once_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loops.Policy()
    model.tuned = {3: steps_of_order(2, [999, 500, 100])}
    x_T = torch.randn(1, 112)
    found = sampling_loops.agreeing(model, x_T, 3)
    assert list(found) == ["fastddim, tuned"]
    assert torch.equal(found["fastddim, tuned"](), fastddim.sample(model, model.tuned[3], x_T=x_T))
    assert not sampling_loops.tuned_steps(loops.null_model)

    def disagree(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(sampling_loops, "assert_agree", disagree)
    with pytest.raises(AssertionError):
        sampling_loops.agreeing(model, x_T, 3)


def test_the_first_table_has_a_row_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first table has a row of each GPU, compared with DDPM's 1000 steps, or with diffusers' 50
    if those have not run.
    """
    machine = dict.fromkeys(("driver", "torch", "triton", "diffusers", "fastddim", "commit"), "1")
    medians = {
        "h100": {
            "ddpm, digits U-Net, diffusers DDPM, 1000": 6.0,
            "ddpm, digits U-Net, fastddim, 50": 0.1,
            "loop, null model, eta 0, diffusers": 9.0,
            "loop, null model, eta 0, graph=True": 2.0,
            "loop, null model, eta 0, graph=loop": 1.0,
        },
        "rtx-4090": {
            "loop, fashion U-Net, eta 0, diffusers": 8.0,
            "loop, fashion U-Net, eta 0, graph=loop": 2.0,
        },
    }
    found = {
        gpu: Result(
            {"gpu": gpu, **machine},
            [],
            [{"measure": name, "seconds": {"median": value}} for name, value in seconds.items()],
        )
        for gpu, seconds in medians.items()
    }
    monkeypatch.setattr(tables, "measured_results", lambda: found)
    text = tables.performance()["headline"]
    rows = [line for line in text.split("\n") if "one graph on" in line]
    assert rows == [
        "| digits, η = 0, one graph on an H100 | 50 | 60× | – | – |",
        "| fashion, η = 0, one graph on an RTX-4090, against diffusers' 50 steps "
        "| 50 | 4.00× | – | – |",
    ]
    assert "On an H100, and with the fastest kind of CUDA graph here" in text
    assert "it is 9.00 times around the null model." in text
    assert "it is 4.00 times around the fashion U-Net." in text
    assert "h100, driver 1, torch 1" in text
    table = tables.performance()["gpu"]
    assert '| null model, η = 0 | 1 s | `"loop"` | 9 s | 9.00× |' in table
    assert "50 steps in one graph take 100 ms, and the 1000 of diffusers' DDPM 6 s: 60" in table
    assert '| fashion U-Net, η = 0 | 2 s | `"loop"` | 8 s | 4.00× |' in table


def test_without_a_gpu_the_first_table_has_no_such_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "measured_results", dict)
    made = tables.performance() | tables.quality()
    assert "graph on" not in made["headline"]
    assert made["gpu"].startswith("No result file is there")


def test_the_readme_s_gains_follow_the_results(without_tuned: dict[str, Any]) -> None:
    """Numbers of another result file are in the table, and a GPU only where one was measured."""
    loops_, steps = without_tuned["loops-cpu"]["rows"], without_tuned["step-cpu"]["rows"]
    for rows, case, contender, ratio in (
        (loops_, "policy head", "diffusers", 3.25),
        (loops_, "diffusers U-Net", "diffusers", 1.2),
        (steps, "η = 0, 1×4×64×64", "fastddim.step", 1.75),
    ):
        for row in rows:
            if row["case"] == case:
                row["timings"][contender]["ratio"] = ratio
    served = without_tuned["stream-cpu"]["rows"][4]
    assert (served["case"], served["load"]) == ("digits U-Net", 8.0)
    served["timings"]["stream"]["requests_per_second"] = 123.4
    table = gains.gains_as_markdown({})
    assert "no number of tuned calls measured is as good as DDPM's 1000" in table
    assert "| **3.25×** as fast as diffusers' loop around a policy head on a CPU |" in table
    assert "| **1.75×** the time of one `torch.add`" in table
    assert "| **123** digits under overload; one after the other 21.6 |" in table
    assert "the loop itself gains **little** on a CPU (1.20×) |" in table
    assert "H100" not in table

    timing = {"seconds": 0.05, "ratio": 1 / 120}
    row = {"case": "digits U-Net", "steps": 8, "timings": {"fastddim, tuned": timing}}
    without_tuned["sampling-cpu"]["rows"].append(row)
    without_tuned["quality-digits"]["rows"].append(quality_row(quality_tables.TUNED, 8, 0.9))
    table = gains.gains_as_markdown({})
    assert "| 8 tuned calls draw digits as good as DDPM's of 1000: **120×** faster |" in table


def test_gains_are_those_measured() -> None:
    ratios = {"diffusers": 0.1, "diffusers against fastddim": 1.2, "fastddim": 0.08}
    row = {"timings": {name: {"ratio": ratio} for name, ratio in ratios.items()}}
    assert speed_tables.gains(row) == pytest.approx((10, 1.2, 12.5))


def test_results_are_of_modified_code_only_if_code_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are of modified code only if code is modified: a report writes its results one after
    the other into the tree that it measures.
    """

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code, result = tmp_path / "csrc" / "a.cpp", tmp_path / "benchmarks" / "results" / "a.json"
    for file in (code, result, tmp_path / "README.md"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.machine()["modified"] is False
    result.write_text("2")
    (tmp_path / "README.md").write_text("2")
    assert harness.machine()["modified"] is False
    code.write_text("2")
    assert harness.machine()["modified"] is True


def test_machines_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert (harness.machine()["commit"], harness.machine()["modified"]) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (harness.machine()["commit"], harness.machine()["modified"]) == (None, None)
