"""Predictions for a GPU follow from what is counted here, and a measurement stands beside them.

No time is measured. What is counted anew is compared where the tools are those that the committed
file was made with.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_tables
import pytest
import tables
import torch
from gpucheck import measures, predict_updates
from gpucheck.assumptions import ASSUMPTIONS, assumed
from gpucheck.machine_code import nvcc, nvcc_version, tool
from gpucheck.main_path import main_path
from gpucheck.operations import counted

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = json.loads((ROOT / "benchmarks/results/gpu-predicted.json").read_text())
ROWS = {row["measure"]: row for row in COMMITTED["rows"]}
UPDATES = [row for row in COMMITTED["rows"] if row["measure"].startswith("update")]
LOOPS = [row for row in COMMITTED["rows"] if not row["measure"].startswith("update")]


def seconds(measure: str) -> float:
    return float(ROWS[measure]["seconds"])


def made_with(**versions: Callable[[], str]) -> None:
    """Skip where the committed file was made with other tools."""
    for name, here in versions.items():
        there = COMMITTED["machine"][name]
        if here() != there:
            pytest.skip(f"predicted with {name} {there}, here is {here()}")


def test_every_measure_is_predicted_and_nothing_else() -> None:
    assert [row["measure"] for row in COMMITTED["rows"]] == list(measures.every())
    assert (len(UPDATES), len(LOOPS)) == (40, 28 + 4 + 8 + 2)


def test_measures_are_of_the_models_there_are() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from loops import MODELS

    assert list(measures.LOOP_ETAS) == list(MODELS)
    assert {*measures.DDPM_MODELS, *measures.COMPILED_MODELS} <= set(MODELS)


def test_the_file_says_what_it_depends_on() -> None:
    machine = COMMITTED["machine"]
    assert "H100" in machine["gpu"]
    assert all(machine[name] for name in ("commit", "nvcc", "triton", "torch", "diffusers"))
    assert machine["modified"] is False
    assert COMMITTED["assumptions"] == {
        name: found._asdict() for name, found in ASSUMPTIONS.items()
    }


def test_every_assumption_has_a_source_and_is_used() -> None:
    package = ROOT / "benchmarks/gpucheck"
    used = "".join(
        file.read_text() for file in package.glob("*.py") if file.name != "assumptions.py"
    )
    for name, found in ASSUMPTIONS.items():
        assert found.source, name
        assert found.value > 0, name
        assert f'"{name}"' in used, name


# Counts.

needs_disassembler = pytest.mark.skipif(
    tool("nvdisasm") is None, reason="there is no nvdisasm (Triton brings it)"
)


@needs_disassembler
@pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
def test_instructions_are_those_of_the_cuda_kernels() -> None:
    made_with(nvcc=nvcc_version)
    found = predict_updates.cuda_counts()
    assert found == {k: v for k, v in COMMITTED["instructions"].items() if k.startswith("cuda")}


@needs_disassembler
def test_instructions_are_those_of_the_triton_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    made_with(triton=lambda: version("triton"))
    found = predict_updates.triton_counts()
    assert found == {k: v for k, v in COMMITTED["instructions"].items() if k.startswith("triton")}


@pytest.fixture(scope="module")
def loops() -> Any:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    made_with(torch=lambda: torch.__version__, diffusers=lambda: version("diffusers"))
    from gpucheck import predict_loops

    return predict_loops.count_models(), predict_loops.count_schedulers()


def test_operations_are_those_of_the_models(loops: Any) -> None:
    from gpucheck.predict import operations_of

    assert operations_of(*loops) == COMMITTED["operations"]


def test_predictions_of_loops_follow_from_the_operations(loops: Any) -> None:
    from gpucheck.predict_loops import predicted_loops

    assert predicted_loops(*loops) == LOOPS


def test_predictions_of_updates_follow_from_the_instructions() -> None:
    predicted = predict_updates.predicted_updates(COMMITTED["instructions"])
    assert predicted == UPDATES


LISTING = """
	.section	.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.U16 R4, desc[UR6][R2.64] ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/               @P1 LDG.E.EF.128 R4, desc[UR6][R2.64] ;
.L_x_2:
        /*0050*/              @!P2 BRA `(.L_x_5) ;
        /*0060*/                   MUFU.RSQ R6, R5 ;
        /*0070*/              @!P3 BRA `(.L_x_3) ;
        /*0080*/                   CALL.REL.NOINC `($slow) ;
        /*0090*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   FMUL.FTZ R0, R5, R6 ;
        /*00a8*/                   FMUL.FTZ R7, R6, 0.5 ;
        /*00ac*/                   FFMA R0, R7, R0, R5 ;
.L_x_4:
        /*00b0*/                   IMAD.MOV.U32 R9, RZ, RZ, R0 ;
.L_x_5:
        /*00c0*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*00d0*/               @P4 EXIT ;
        /*00e0*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*00f0*/                   EXIT ;
$slow:
        /*0100*/                   RET.REL.NODEC R24 `(kernel) ;
.L_x_6:
        /*0110*/                   BRA `(.L_x_6);
"""


def test_the_main_path_moves_words_draws_noise_and_calls_nothing() -> None:
    common = Counter(
        ["ISETP.NE.AND", "LDG.E.EF.128", "MUFU.RSQ", "FFMA", "IMAD.MOV.U32", "STG.E.128"]
    )
    common += Counter({"BRA": 3, "FMUL.FTZ": 2})
    assert main_path(LISTING, words=2) == common + Counter(["EXIT"])
    assert main_path(LISTING, words=3) == common + Counter(["STG.E.128", "EXIT", "EXIT"])


def test_a_path_that_is_not_there() -> None:
    message = "words: expected as many as some way without a call has, [1, 2, 3], got 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        main_path(LISTING, words=4)


def test_the_busiest_unit_counts() -> None:
    assert predict_updates.cycles({"FFMA": 7, "LDG": 2}) == 9
    assert predict_updates.cycles({"FFMA": 1, "LOP3": 4, "IADD3": 3}) == 14
    assert predict_updates.cycles({"FFMA": 1, "IMAD": 5}) == 10
    assert predict_updates.cycles({"FFMA": 10, "MUFU": 1, "F2I": 1}) == 16


def test_operations_by_kind() -> None:
    """Views and numbers of a schedule launch nothing; a wait is seen."""
    alpha, t = torch.tensor(0.5), torch.tensor(3)
    x, weight, matrix = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), torch.zeros(8, 5)

    def run() -> None:
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        y = torch.nn.functional.group_norm(y, 2) * (1 - alpha).sqrt()
        y.add_(t + 1)
        torch.mm(y.view(64, 8), matrix)
        t.item()

    found = counted(run)
    expected = {"convolution": 1, "norm": 1, "pointwise": 3, "product": 1, "scalar": 2, "wait": 1}
    assert found.operations == {**expected, "view": 1}
    assert found.kernels == 3 + 3 + 3 + 1
    assert found.flops == 2 * (2 * 4 * 64) * (3 * 9) + 2 * 64 * 8 * 5
    assert found.host == pytest.approx(
        sum(n * assumed(f"host_{kind}") for kind, n in found.operations.items())
    )
    small = 8 * assumed("small_kernel") + assumed("small_convolution") + assumed("small_product")
    assert found.device == pytest.approx({"launches": small})


def test_large_operations_are_bound_by_bytes_or_arithmetic() -> None:
    a = torch.empty(64, 65536, device="meta")
    bytes_alone = counted(lambda: a + a).device
    assert bytes_alone == pytest.approx({"bytes": 3 * a.nbytes / assumed("copy_bandwidth")})
    b = torch.empty(4096, 4096, device="meta", dtype=torch.float16)
    rate = assumed("tensor_float16") * assumed("arithmetic_share")
    assert counted(lambda: b @ b).device == pytest.approx({"arithmetic": 2 * 4096**3 / rate})


# What no prediction can be.


@pytest.mark.parametrize("impl", measures.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", measures.DTYPES)
@pytest.mark.parametrize("eta", measures.UPDATE_ETAS)
def test_no_update_beats_its_bytes_or_its_instructions(impl: str, dtype: str, eta: float) -> None:
    counts = COMMITTED["instructions"][f"{impl}, {dtype}, eta {eta:g}"]
    for mib in measures.MEBIBYTES:
        row = ROWS[measures.update(impl, dtype, eta, mib)]
        size = mib * 2**20
        assert row["bytes"] == 3 * size
        # The data sheet's bandwidth, and the clock that is seen.
        assert row["seconds"] > row["bytes"] / 3.35e12
        warps = size // 16 // 32
        assert row["seconds"] > warps * sum(counts.values()) / (132 * 4 * 1.98e9)
        copy = 2 * size / (2 * size / 3.0e12 + assumed("kernel"))
        share = row["bytes"] / row["seconds"] / copy
        assert row["share_of_copy_bandwidth"] == pytest.approx(share, rel=1e-3)
        assert 0.6 < share < 1


def test_noise_costs_time_only_in_half_precision() -> None:
    """The finding of the count: float32 hides its noise behind its bytes, bfloat16 does not."""
    for impl in measures.IMPLEMENTATIONS:
        ratios = {
            dtype: seconds(measures.update(impl, dtype, 1.0, 1024))
            / seconds(measures.update(impl, dtype, 0.0, 1024))
            for dtype in measures.DTYPES
        }
        assert ratios["float32"] == 1
        assert ratios["bfloat16"] > 1.1
        bound = ROWS[measures.update(impl, "bfloat16", 1.0, 1024)]["bound"]
        assert bound == "instructions"


def test_fewer_launches_take_less_time() -> None:
    for model, etas in measures.LOOP_ETAS.items():
        for eta in etas:
            loop, step, eager, diffusers = (
                seconds(measures.loop(model, eta, contender))
                for contender in ("graph=loop", "graph=True", "graph=False", "diffusers")
            )
            kernels = COMMITTED["operations"][model]["kernels"] + 2
            assert kernels * assumed("small_kernel") < loop < step < eager < diffusers


def test_no_model_beats_the_peak() -> None:
    for contender in measures.LATENT_CONTENDERS:
        flops = COMMITTED["operations"]["latent U-Net"]["flops"]
        assert 1.5e12 < flops < 1.7e12
        assert seconds(measures.latent(contender)) > flops / 989e12


def test_runs_are_their_steps() -> None:
    for model in measures.DDPM_MODELS:
        same = {"fastddim, 50": "graph=loop", "diffusers DDIM, 50": "diffusers"}
        for contender, mode in same.items():
            whole = seconds(measures.ddpm(model, contender))
            assert whole == pytest.approx(50 * seconds(measures.loop(model, 0, mode)), rel=1e-3)
        slow, fast = (seconds(measures.ddpm(model, f"fastddim, {n}")) for n in (1000, 50))
        assert 19 < slow / fast < 21


# Tables.


def test_the_page_shows_the_committed_predictions() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    assert tables.updated(page, gpu_tables.blocks()) == page


def measured(value: float, missing: str) -> dict[str, Any]:
    rows = [
        {"stage": "loops", "measure": measure, "seconds": {"median": value, "low": 0, "high": 1}}
        for measure in measures.every()
        if measure != missing
    ]
    stages = [{"name": "smoke", "result": "ok", "seconds": 8.04}]
    machine = {"gpu": "NVIDIA H100 80GB HBM3"}
    return {"machine": machine, "stages": stages, "rows": [*rows, {"stage": "smoke", "bits": 1}]}


def test_a_measurement_stands_beside_its_prediction(tmp_path: Path) -> None:
    missing, there = measures.latent("diffusers"), measures.latent("graph=loop")
    predicted = seconds(there)
    for name in ("h100", "h200"):
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(measured(predicted / 1.25, missing)))
    (tmp_path / "gpu-predicted.json").write_text(json.dumps(COMMITTED))
    blocks = gpu_tables.blocks(tmp_path)
    cells = [line.split(" | ") for line in blocks["gpu-loops"].split("\n")]
    lines = {name: found for name, _, _, _, *found in (row for row in cells if len(row) > 1)}
    assert lines["| measure"] == ["measured (h100)", "error", "measured (h200) |"]
    shown = gpu_tables.duration(predicted / 1.25)
    assert lines[f"| {there}"] == [shown, "+25%", f"{shown} |"]
    assert lines[f"| {missing}"] == ["not measured yet", "–", "not measured yet |"]
    assert "NVIDIA H100 80GB HBM3" in blocks["gpu-stages"]
    assert "| smoke | ok | 8.0 |" in blocks["gpu-stages"]


def test_without_a_measurement_the_page_says_so(tmp_path: Path) -> None:
    (tmp_path / "gpu-predicted.json").write_text(json.dumps(COMMITTED))
    blocks = gpu_tables.blocks(tmp_path)
    for name in ("gpu-updates", "gpu-loops"):
        rows = blocks[name].split("\n")[2:]
        assert all(row.endswith("| not measured yet | – |") for row in rows)
    assert blocks["gpu-stages"].startswith("No result file is there")
