"""Tables of the GPU check's measurements, with the goals and the predictions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gpu_predictions
import gpu_results
import gpu_tables
import pytest
from gpucheck import measures

PREDICTED = gpu_predictions.predictions()
ROWS = {row["measure"]: row for row in PREDICTED["rows"]}
FIRST = gpu_results.read(gpu_results.RESULTS / f"{gpu_results.FIRST}.json")
MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    **dict.fromkeys(("driver", "torch", "triton", "diffusers", "fastddim", "commit"), "1"),
}


def seconds(measure: str) -> float:
    return float(ROWS[measure]["seconds"])


def test_every_measure_is_predicted() -> None:
    """Every measure is predicted, except the one that was added after the first run."""
    later = measures.latent(measures.LATENT_ALONE)
    assert list(ROWS) == [name for name in measures.every() if name != later]


def test_measures_are_of_the_models_there_are() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from loops import MODELS

    assert list(measures.LOOP_ETAS) == list(MODELS)
    assert {*measures.DDPM_MODELS, *measures.COMPILED_MODELS} <= set(MODELS)


def test_results_say_where_they_come_from() -> None:
    for result in (FIRST, *gpu_results.measured_results().values()):
        assert all(result.machine[name] for name in ("gpu", "driver", "torch", "triton", "commit"))
        assert result.machine["modified"] is False
    assert PREDICTED["machine"]["modified"] is False


# Predictions.


def committed() -> list[gpu_predictions.Compared]:
    return gpu_predictions.compared(PREDICTED, gpu_results.measured_results())


def test_every_large_error_is_explained() -> None:
    unexplained = [
        f"{pair.measure}: {pair.error:+.0%}"
        for pair in gpu_predictions.far_off(committed())
        if gpu_predictions.explanation_of(pair) is None
    ]
    assert not unexplained


def test_each_prediction_is_in_one_group() -> None:
    for name in ROWS:
        assert sum(bool(re.fullmatch(p, name)) for p in gpu_predictions.GROUPS.values()) == 1, name


def test_numbers_in_the_explanations_are_those_of_the_first_run() -> None:
    kernels = {name: found.get("kernels") for name, found in PREDICTED["operations"].items()}
    an_eager_kernel = [
        1e6 * (FIRST.seconds(measures.loop(name, eta, "graph=False")) or 0) / kernels[name]
        for name, etas in measures.LOOP_ETAS.items()
        if "U-Net" in name
        for eta in etas
    ]
    assert (round(min(an_eager_kernel)), round(max(an_eager_kernel))) == (16, 25)

    besides_bytes = []
    for dtype in measures.DTYPES:
        for eta in measures.UPDATE_ETAS:
            name = measures.update("cuda", dtype, eta, 1)
            parts = ROWS[name]["parts"]
            longest = max(parts["bytes"], parts["instructions"])
            besides_bytes.append(1e6 * ((FIRST.seconds(name) or 0) - longest))
            assert parts["launch"] == pytest.approx(3.2e-6)
    assert (round(min(besides_bytes)), round(max(besides_bytes))) == (5, 6)

    noisy, plain = (
        FIRST.seconds(measures.loop("null model", eta, "graph=loop")) or 0 for eta in (1.0, 0.0)
    )
    assert round(1e6 * (noisy - plain), 1) == 2.8

    # The fourth launch of the CUDA kernel is bfloat16 with noise.
    counters = [row for row in FIRST.rows if row["stage"] == "counters"][3]
    assert counters["sm__issue_active.avg.pct_of_peak_sustained_elapsed"] == "77.80 %"
    assert counters["sm__warps_active.avg.pct_of_peak_sustained_active"] == "68.38 %"
    assert counters["launch__registers_per_thread"] == "40 register/thread"


# Tables.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results with predictions only."""
    shutil.copy(gpu_results.RESULTS / f"{gpu_results.PREDICTED}.json", tmp_path)
    return tmp_path


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    stages = [{"name": "smoke", "result": "ok", "seconds": 8.04}]
    stages += [{"name": "bits", "result": "out of time", "seconds": 75.0}]
    content = {"machine": MACHINE, "stages": stages, "rows": [{"stage": "smoke", "at": 1.0}, *rows]}
    (folder / f"gpu-{name}.json").write_text(json.dumps(content))


def row(measure: str, median: float, **more: float) -> dict[str, Any]:
    found: dict[str, Any] = {"stage": "loops", "at": 2.0, "measure": measure}
    for name, value in {"seconds": median, **more}.items():
        found[name] = {"median": value, "low": value, "high": value}
    return found


def cells(block: str, first: str) -> list[str]:
    """The rest of the only line of a table that begins so."""
    lines = [line.strip("| ").split(" | ") for line in block.split("\n")]
    (found,) = [rest for name, *rest in lines if name == first]
    return found


def test_a_measurement_stands_beside_its_prediction(folder: Path) -> None:
    there, missing = measures.latent("graph=loop"), measures.latent("diffusers")
    predicted = seconds(there)
    write(folder, "h100", row(there, predicted / 1.25))
    write(folder, "h200", row(there, predicted / 2))
    loops = gpu_tables.blocks(folder)["gpu-loops"]
    assert cells(loops, "measure")[-4:] == ["first measured", "error", "now (h100)", "now (h200)"]
    here, other = gpu_tables.duration(predicted / 1.25), gpu_tables.duration(predicted / 2)
    assert cells(loops, there)[-4:] == [here, "+25 %", here, other]
    assert cells(loops, missing)[-4:] == ["not measured yet", "–", *["not measured yet"] * 2]


def test_predictions_are_compared_with_the_first_run(folder: Path) -> None:
    both, later = measures.latent("graph=loop"), measures.latent("graph=True")
    write(folder, "h100", row(both, 9.0), row(later, seconds(later) / 0.6))
    write(folder, "first", row(both, seconds(both) / 1.1))
    blocks = gpu_tables.blocks(folder)
    error, now = cells(blocks["gpu-loops"], both)[-2:]
    assert (error, now) == ("+10 %", "9 s")
    assert cells(blocks["gpu-loops"], later)[-2] == "-40 %"
    assert "median error is 25 %**, over the 2 of 82" in blocks["gpu-errors"]
    title = "the latent U-Net in graphs (1)"
    assert cells(blocks["gpu-explained"], title)[0] == "-40 %"


def test_an_error_without_an_explanation_is_shown(folder: Path) -> None:
    name = measures.update("cuda", "float32", 0.0, 1024)
    write(folder, "h100", row(name, 1.0))
    assert cells(gpu_tables.blocks(folder)["gpu-explained"], name) == [
        "-100 %",
        "Not explained yet.",
    ]


def test_without_a_measurement_the_page_says_so(folder: Path) -> None:
    blocks = gpu_tables.blocks(folder)
    for name in ("gpu-updates", "gpu-loops"):
        rows = blocks[name].split("\n")[2:]
        assert all(line.endswith("| not measured yet | – |") for line in rows)
    for name in ("gpu-goals", "gpu-graphs"):
        assert blocks[name].startswith("No result file is there")
    assert blocks["gpu-errors"] == "Nothing has been measured yet."
    assert cells(blocks["gpu-stages"], "`smoke`")[0] == "40"


def test_goals(folder: Path) -> None:
    """Each goal is judged by its worst case, and a goal that has not run is not judged."""
    null = measures.loop("null model", 0.0, "graph=loop")
    ddpm = dict.fromkeys(measures.DDPM_MODELS, 0.1) | {"fashion U-Net": 0.2}
    latent = {"graph=False": 4.0, "graph=True": 2.0, "graph=loop": 2.2, "diffusers": 4.1}
    write(
        folder,
        "h100",
        row(null, 2.9e-6, host_seconds=61e-6),
        *(
            row(measures.update(impl, dtype, eta, 64), 1.0, share_of_copy_bandwidth=share)
            for impl in measures.IMPLEMENTATIONS
            for dtype, eta, share in (("float32", 0.0, 0.95), ("bfloat16", 1.0, 0.74))
        ),
        *(row(measures.ddpm(name, "fastddim, 50"), value) for name, value in ddpm.items()),
        *(row(measures.ddpm(name, "diffusers DDPM, 1000"), 9.0) for name in ddpm),
        *(row(measures.latent(contender), value) for contender, value in latent.items()),
        row(measures.latent(measures.LATENT_ALONE), 1.99),
        {"stage": "bits", "at": 3.0, "passed": 3, "failed": 1, "skipped": 0},
    )
    block = gpu_tables.blocks(folder)["gpu-goals"]
    assert [cells(block, goal) for goal in gpu_tables.GOALS] == [
        ["bits: 3 passed; 1 failed", "no"],
        ["cuda 95 %, triton 95 %", "yes"],
        ["cuda 74 %, triton 74 %", "no"],
        ["2.9 µs at η = 0", "yes"],
        ["61 µs at η = 0", "no"],
        ["not measured yet", "–"],
        ["digits U-Net 90×, fashion U-Net 45×", "no"],
        ['`False` 1.02×, `True` 2.05×, `"loop"` 1.86×', "yes"],
        ["+0.5 %", "yes"],
    ]


def test_the_kinds_of_graph(folder: Path) -> None:
    def loop(contender: str, median: float, **more: float) -> dict[str, Any]:
        return row(measures.loop("digits U-Net", 0.0, contender), median, **more)

    write(
        folder,
        "h100",
        loop("graph=False", 4.0, host_seconds=200.0),
        loop("graph=True", 2.0, host_seconds=100.0),
        loop("graph=loop", 2.1, host_seconds=50.0),
        loop("diffusers", 6.0),
    )
    block = gpu_tables.blocks(folder)["gpu-graphs"]
    times = ["4 s", "2 s", "2.1 s", "6 s"]
    assert cells(block, "digits U-Net, η = 0") == [*times, "`True`", "3.00×", "100 s", "50 s"]
    assert "takes 5 % longer than a graph of one step around: digits U-Net, η = 0." in block


def test_stages_and_their_ends(folder: Path) -> None:
    write(folder, "h100")
    block = gpu_tables.blocks(folder)["gpu-stages"]
    assert cells(block, "`smoke`")[1] == "8.0"
    assert cells(block, "`bits`")[1] == "75.0 out of time"
    assert cells(block, "`loops`")[1] == "–"
    assert "On h100 the stages took 83 s in all, after 1 s" in block
