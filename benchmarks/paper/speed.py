"""The parts of a step's time by network, and an update against its floor.

On a CPU a step has three parts:

- the network: `network alone` of policies-cpu.json, as many evaluations as the loop makes, divided
  by its steps. The null model returns its input, and its time counts as none.
- the update: one call of step-cpu.json on a state of as many numbers. That of the null model has
  the shape of its state, [1, 4, 64, 64]; that of policies has 64 numbers, and theirs has 32: so
  small an update costs its call. fastddim's is `Stepper`, a step that was prepared before, as loops
  prepare theirs; that of diffusers is `DDIMScheduler.step`.
- the host: what the loop takes besides. An update is timed by repeating it, so what it takes longer
  after a network has used the processor's caches counts as the host's.

A loop's time is that of `network alone` times the median of the ratios, which were taken tick by
tick. Where it is no longer than the network, all of it is the network's: the rest is less than the
measurement can tell.

On a GPU no network but the latent U-Net was timed alone. There a loop in CUDA graphs is the measure
of what the GPU itself has to do, network and update. In the rest of a loop's time the GPU waits for
the host. That the update of diffusers is several kernels counts as the host's too.

At η = 1 the update of diffusers took longer in step-cpu.json than a whole step of its loop in
loops-cpu.json, so parts are shown at η = 0 alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_cells import duration
from policy_tables import millions

from .rows import Bar, Bars, Dots, Group, Mark, Scale
from .style import BLUE, FAINT, GREEN, ORANGE, PURPLE, TEXT

Rows = Sequence[Mapping[str, Any]]

NETWORK, UPDATE, HOST = "network (on the GPU with the update)", "update", "host"
COLORS = {NETWORK: BLUE, UPDATE: ORANGE, HOST: FAINT}
MEASURE = "time of a step; the bars of diffusers have one length"
POLICIES = ("MLP", "small U-Net", "transformer", "default U-Net")
"""Those at batch 1 and of 10 steps, from small to large."""
GPU_NETWORKS = ("null model", "policy head", "digits U-Net", "fashion U-Net", "diffusers U-Net")
LATENT = "latent U-Net"


def parts(total: float, network: float, update: float) -> dict[str, float]:
    """The seconds of a step by what they go to; what is not the network's is the update's first."""
    network = min(network, total)
    update = min(update, total - network)
    return {NETWORK: network, UPDATE: update, HOST: total - network - update}


def cpu_time(loops: Rows, steps: Rows, policies: Rows) -> Bars:
    """The parts of a step without a network and with those of policies, from small to large."""
    null = _found(loops, case="null model", eta=0.0)
    update = _updates(steps, "1×4×64×64")
    seconds = {name: null["timings"][name]["seconds"] / null["steps"] for name in update}
    groups = [
        Group(
            f"no network, {math.prod(null['shape']):,} numbers",
            [_bar(name, parts(seconds[name], 0.0, update[name])) for name in update],
        )
    ]
    update = _updates(steps, "64")
    for case in POLICIES:
        row = _found(policies, case=case)
        timings = row["timings"]
        network = timings["network alone"]["seconds"] / row["steps"]
        ratios = {
            "diffusers": timings["LeRobot"]["ratio"],
            "fastddim": timings["fastddim"]["ratio"],
        }
        of = {name: parts(network * ratios[name], network, update[name]) for name in update}
        title = f"{case}, {millions(row['parameters'])} parameters"
        groups.append(Group(title, [_bar(*bar) for bar in of.items()]))
    return Bars("CPU, batch of 1", MEASURE, groups, COLORS)


def _updates(steps: Rows, shape: str) -> dict[str, float]:
    """Seconds of an update of each loop."""
    timings = _found(steps, case=f"η = 0, {shape}")["timings"]
    return {
        "diffusers": timings["diffusers"]["seconds"],
        "fastddim": timings["Stepper"]["seconds"],
    }


def gpu_time(rows: Rows) -> Bars:
    """The share of a step in which the GPU works, and that in which it waits."""
    timed = {row["measure"]: row for row in rows if "measure" in row}
    groups = []
    for case in GPU_NETWORKS:
        measure = f"loop, {case}, eta 0, "
        batch = timed[f"{measure}diffusers"]["shape"][0]
        name = "no network" if case == "null model" else case
        groups.append(_captured(f"{name}, batch of {batch}", measure, timed))
    (parameters,) = (row["parameters"] for row in rows if "parameters" in row)
    title = f"{LATENT}, {millions(parameters)} parameters"
    groups.append(_captured(title, f"{LATENT}, ", timed))
    return Bars("NVIDIA H100", MEASURE, groups, {NETWORK: BLUE, HOST: FAINT})


def _captured(title: str, measure: str, timed: Mapping[str, Mapping[str, Any]]) -> Group:
    """The bars of a network on the GPU; fastddim is the loop with a graph for each step."""
    own, whole, theirs = (
        timed[f"{measure}{loop}"]["seconds"]["median"]
        for loop in ("graph=True", "graph=loop", "diffusers")
    )
    busy = min(own, whole)
    of = {"diffusers": theirs, "fastddim": own}
    return Group(
        title, [_bar(name, {NETWORK: busy, HOST: total - busy}) for name, total in of.items()]
    )


def _bar(label: str, of: dict[str, float]) -> Bar:
    return Bar(label, of, duration(sum(of.values())))


def _found(rows: Rows, **wanted: Any) -> Mapping[str, Any]:
    """The one row with these values."""
    (row,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return row


MARKS = (
    Mark("fastddim.step", BLUE, "o"),
    Mark("Stepper", GREEN, "D", hollow=True),
    Mark("torch.compile", PURPLE, "^"),
    Mark("diffusers", ORANGE, "s"),
    Mark("eager", TEXT, "x"),
)


def update_dots(rows: Rows) -> Scale:
    """An update as a multiple of its floor, without noise and with it."""
    cases: dict[str, dict[str, dict[str, float]]] = {"η = 0": {}, "η = 1": {}}
    for row in rows:
        eta, _, case = row["case"].partition(", ")
        ratios = {mark.label: row["timings"][mark.label]["ratio"] for mark in MARKS}
        cases[eta][case] = ratios
    # The large ones first, and last those that were measured without noise alone.
    sizes = {row["case"].partition(", ")[2]: row["elements"] for row in rows}
    order = sorted(cases["η = 0"], key=lambda case: (case not in cases["η = 1"], -sizes[case]))
    panels = [
        Dots(f"one update, {title}", {case: found[case] for case in order if case in found})
        for title, found in (("η = 0", cases["η = 0"]), ("with noise, η = 1", cases["η = 1"]))
    ]
    return Scale(panels, MARKS, "time as a multiple of the floor", "floor: one torch.add")
