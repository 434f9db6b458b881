"""Whole runs have the bits of `tests/data/golden_runs.json`, and earlier versions' files serve."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import fastddim

from .support import golden_runs
from .support.environment import CPU_IMPLS
from .support.probes import OtherProcessor

GOLDEN = json.loads(golden_runs.GOLDEN.read_text())
DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("group", golden_runs.GROUPS)
def test_runs(group: str, impl: str) -> None:
    assert golden_runs.digests(group, impl) == GOLDEN[impl][group]


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_runs_on_another_processor(impl: str) -> None:
    with OtherProcessor(shortest=1):
        assert golden_runs.digests("sample", impl) == GOLDEN[impl]["sample"]


def test_a_folder_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """A folder of an earlier version goes on: one missing shard is drawn again and has its old
    bytes.
    """
    kept = DATA / "run"
    folder = tmp_path / "run"
    shutil.copytree(kept, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    fresh = fastddim.generate(
        golden_runs.model, out=tmp_path / "fresh", impl="reference", **golden_runs.RUN
    )
    now = json.loads((fresh.folder / "manifest.json").read_text())
    # Of another machine and other releases, which a run is refused for.
    for machine in ("computation", "versions"):
        manifest[machine] = now[machine]
    assert now == manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lost = sorted(folder.glob("*.npz"))[1]
    for path in (lost, lost.with_suffix(".sha256")):
        path.unlink()
    run = fastddim.generate(golden_runs.model, out=folder, impl="reference", **golden_runs.RUN)
    assert (run.drawn, run.digest) == (2, fresh.digest)
    for path in sorted(kept.iterdir()):
        if path.name != "manifest.json":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_folder_of_another_default_spacing_is_refused(tmp_path: Path) -> None:
    """A folder of another default spacing is refused: its timesteps were those of `uniform`, and
    must not mix with those of `trailing`.
    """
    kept = DATA / "run"
    folder = tmp_path / "run"
    run = {**golden_runs.RUN, "out": folder, "impl": "reference"}
    fastddim.generate(golden_runs.model, **run)
    lost = sorted(folder.glob("*.npz"))[1]
    lost.unlink()
    before = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    del run["spacing"]
    with pytest.raises(
        fastddim.runs.ManifestMismatchError,
        match=r"timesteps: \[800, 600, 400, 200, 0\] in the folder, \[999, ",
    ):
        fastddim.generate(golden_runs.model, **run)
    assert {path.name: path.read_bytes() for path in sorted(folder.iterdir())} == before
    old, new = (json.loads((path / "manifest.json").read_text()) for path in (kept, folder))
    assert old["plan"] == new["plan"]


def test_a_saved_pipeline_of_an_earlier_version_loads() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    ours = importlib.import_module("fastddim.integrations.diffusers")
    pipe = diffusers.DDPMPipeline.from_pretrained(DATA / "pipeline")
    assert type(pipe.scheduler) is ours.DDIMScheduler
    assert pipe.scheduler.config["beta_schedule"] == "squaredcos_cap_v2"
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=2, output_type="np", generator=torch.Generator()).images
    theirs = diffusers.DDPMPipeline(
        pipe.unet, diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(num_inference_steps=2, output_type="np", generator=torch.Generator()).images
    assert images.shape == (1, 8, 8, 3)
    assert abs(images - expected).max() < 1e-5
