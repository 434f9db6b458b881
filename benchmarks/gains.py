"""The README's table: the gains of fastddim, and the case without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_tables
from cpu_results import result_of
from gpu_results import Result
from gpucheck import measures
from headline import equal_quality
from markdown_cells import gain, table, three
from quality_tables import TUNED, quality_of

FAULTS = Path(__file__).resolve().parents[1] / "tests" / "faults" / "results.json"
NOTHING = 1.05
"""A loop that is shorter by less than this has gained nothing: rounds differ by as much."""


def gains_as_markdown(measured: Mapping[str, Result]) -> str:
    """The table of the README, with a row for each kind of gain.

    Args:
        measured: the result of each GPU, by its name.
    """
    rows = [
        ["**Fewer calls**", "`fastddim.tune`", _fewer_calls()],
        ["**Small networks**", "`fastddim.Sampler`", _small_networks(measured)],
        ["**One update**", "`fastddim.step`", _one_update()],
        ["**Requests a second**", "`fastddim.Stream`", _requests()],
        ["**Exact replay**", "`seed=`, `fastddim.generate`", _replay()],
        ["**A large U-Net**", "the same number of calls", _large_network(measured)],
    ]
    machines = [result_of("loops-cpu")["machine"]["cpu"]]
    machines += [found.machine["gpu"] for found in measured.values()]
    source = (
        f"Measured on {' and '.join(machines)}: [Performance](docs/results/speed.md) and "
        "[Quality](docs/results/quality.md) have all rows, with versions, spread and commit."
    )
    return "\n".join([table(["gain in", "with", "measured"], rows), "", source])


def _fewer_calls() -> str:
    quality, timed = quality_of("digits"), result_of("sampling-cpu")["rows"]
    own = [row for row in timed if row["case"] == "digits U-Net"]
    found = equal_quality(quality, own, [TUNED])
    if found is None:
        return "no number of tuned calls measured is as good as DDPM's 1000"
    speedup = "" if found.speedup is None else f": **{gain(found.speedup)}×** faster"
    return f"{found.steps} tuned calls draw digits as good as DDPM's of 1000{speedup}"


def _small_networks(measured: Mapping[str, Result]) -> str:
    ratio = _loop("policy head")["diffusers"]["ratio"]
    sentence = f"**{gain(ratio)}×** as fast as diffusers' loop around a policy head on a CPU"
    for gpu, on_gpu in _on_gpus(measured, gpu_tables.without_noise("policy head")):
        sentence += f", **{gain(on_gpu)}×** on an {gpu}"
    return sentence


def _one_update() -> str:
    case = "η = 0, 1×4×64×64"
    timings = next(row["timings"] for row in result_of("step-cpu")["rows"] if row["case"] == case)
    own, theirs = (timings[name]["ratio"] for name in ("fastddim.step", "diffusers"))
    return (
        f"**{gain(own)}×** the time of one `torch.add` of the same latent; "
        f"diffusers' `step` takes {gain(theirs)}×"
    )


def _requests() -> str:
    rows = [row for row in result_of("stream-cpu")["rows"] if row["case"] == "digits U-Net"]
    most = max(rows, key=_load)
    alone, shared = (
        most["timings"][name]["requests_per_second"] for name in ("one after the other", "stream")
    )
    return f"**{three(shared)}** digits under overload; one after the other {three(alone)}"


def _load(row: Mapping[str, Any]) -> float:
    return float(row["load"])


def _replay() -> str:
    kills = _faults()["SIGKILL at a random moment"]
    whole = kills["tries"] - kills["losses"]
    return (
        "the same noise in every batch, order and number of threads; "
        f"**{whole} of {kills['tries']}** killed runs ended with the bytes of a run left alone"
    )


def _faults() -> dict[str, dict[str, int]]:
    return {row["fault"]: row for row in json.loads(FAULTS.read_text())["rows"]}


def _large_network(measured: Mapping[str, Result]) -> str:
    ratio = _loop("diffusers U-Net")["diffusers"]["ratio"]
    amount = "nothing" if ratio < NOTHING else "little"
    sentence = f"the loop itself gains **{amount}** on a CPU ({gain(ratio)}×)"
    for gpu, on_gpu in _on_gpus(measured, measures.latent):
        sentence += f"; on an {gpu} a CUDA graph saves Python's launches: {gain(on_gpu)}×"
    return sentence


def _loop(case: str) -> Any:
    rows: Sequence[dict[str, Any]] = result_of("loops-cpu")["rows"]
    return next(row["timings"] for row in rows if (row["case"], row["eta"]) == (case, 0))


def _on_gpus(
    measured: Mapping[str, Result], of: Callable[[str], str]
) -> Iterator[tuple[str, float]]:
    """Each GPU with the gain over diffusers there, if `of` was measured."""
    for gpu, result in measured.items():
        ratio = gpu_tables.gain_over_diffusers(result, of)
        if ratio is not None:
            yield gpu.upper(), ratio
