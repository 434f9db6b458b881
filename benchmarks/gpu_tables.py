"""Tables of what the GPU check has measured, for docs/gpu.md, Performance and the README."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_predictions
from gpu_results import NOT_MEASURED, PREDICTED_GPU, RESULTS, Result, measured_results
from gpucheck import measures
from gpucheck.table import STAGES
from markdown_cells import duration, gain, percent, table, three

NONE = "No result file is there: the check has not run on a GPU yet."
GRAPHS = ("graph=False", "graph=True", "graph=loop")
SHORT = {"graph=False": "`False`", "graph=True": "`True`", "graph=loop": '`"loop"`'}
LATENT = "The latent U-Net has the size of Stable Diffusion 1.5's and random weights; it is guided."
# Updates of this size and more should take as long as a copy.
LARGE = 64


def blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Content of each marked place of docs/gpu.md."""
    measured = measured_results(folder)
    return {
        "gpu-goals": goals_as_markdown(measured, folder),
        "gpu-graphs": graphs_as_markdown(measured),
        "gpu-stages": stages_as_markdown(measured),
        **gpu_predictions.blocks(folder, measured),
    }


class Found(NamedTuple):
    """A measurement in words, and whether it reaches the goal."""

    text: str
    reached: bool


Goal = Callable[[Result], Found | None]


def _update_at_least(share: float, noisy_half: bool) -> Goal:
    """A share of the bandwidth of a copy, for all large updates or for bfloat16 with noise."""

    def found(result: Result) -> Found | None:
        texts, least = [], []
        for impl in measures.IMPLEMENTATIONS:
            shares = [
                result.seconds(measures.update(impl, dtype, eta, mib), "share_of_copy_bandwidth")
                for dtype in measures.DTYPES
                for eta in measures.UPDATE_ETAS
                for mib in measures.MEBIBYTES
                if mib >= LARGE and ((dtype, eta) == ("bfloat16", 1.0)) == noisy_half
            ]
            known = [value for value in shares if value is not None]
            if not known:
                return None
            least.append(min(known))
            texts.append(f"{impl} {_from_to(min(known), max(known))}")
        return Found(", ".join(texts), min(least) >= share)

    return found


def _from_to(low: float, high: float) -> str:
    return " to ".join(dict.fromkeys(percent(value) for value in (low, high)))


def _null_model(result: Result) -> Found | None:
    return _at_most(result, 3e-6, "seconds")


def _call(result: Result) -> Found | None:
    return _at_most(result, 60e-6, "host_seconds")


def _at_most(result: Result, most: float, quantity: str) -> Found | None:
    found = {
        eta: result.seconds(measures.loop("null model", eta, "graph=loop"), quantity)
        for eta in measures.LOOP_ETAS["null model"]
    }
    known = {eta: value for eta, value in found.items() if value is not None}
    if not known:
        return None
    text = ", ".join(f"{duration(value)} at η = {eta:g}" for eta, value in known.items())
    return Found(text, max(known.values()) <= most)


def _faster_than_diffusers(result: Result) -> Found | None:
    names = ("policy head", "digits U-Net", "fashion U-Net")
    return _at_least(3, {name: gain_over_diffusers(result, without_noise(name)) for name in names})


def _at_least(least: float, ratios: dict[str, float | None]) -> Found | None:
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if not known:
        return None
    text = ", ".join(f"{name} {gain(ratio)}×" for name, ratio in known.items())
    return Found(text, min(known.values()) >= least)


def gain_over_diffusers(result: Result, of: Callable[[str], str]) -> float | None:
    """The gain of the fastest kind of graph over diffusers; `of` names a contender's measure."""
    best = result.fastest(map(of, GRAPHS))
    return None if best is None else result.ratio(of("diffusers"), best)


def without_noise(model: str) -> Callable[[str], str]:
    """The measures of a model's loop at η = 0, by contender."""
    return partial(measures.loop, model, 0.0)


def _latent_against_diffusers(result: Result) -> Found | None:
    """Compare medians; a higher one counts as slower only if the spreads do not overlap."""
    theirs = measures.latent("diffusers")
    found, slower = [], False
    for mode in GRAPHS:
        own = measures.latent(mode)
        ratio = result.ratio(theirs, own)
        if ratio is None:
            continue
        apart = result.spread(own)["low"] > result.spread(theirs)["high"]
        within = " within the spread" if ratio < 1 and not apart else ""
        found.append(f"{SHORT[mode]} {gain(ratio)}×{within}")
        slower |= apart
    return Found(", ".join(found), not slower) if found else None


def _latent_against_its_network(result: Result) -> Found | None:
    best = result.fastest(map(measures.latent, GRAPHS))
    if best is None:
        return None
    ratio = result.ratio(best, measures.latent(measures.LATENT_ALONE))
    return None if ratio is None else Found(f"{(ratio - 1) * 100:+.1f} %", ratio <= 1.02)


def _against_ddpm(result: Result) -> Found | None:
    return _at_least(50, {name: ddpm_gain(result, name) for name in measures.DDPM_MODELS})


def ddpm_gain(result: Result, model: str) -> float | None:
    """The gain of 50 steps in one graph over the 1000 of diffusers' DDPM."""
    slow, fast = (measures.ddpm(model, name) for name in measures.DDPM_AGAINST)
    return result.ratio(slow, fast)


def _tests(result: Result) -> Found | None:
    counts = [(stage, result.tests(stage)) for stage in ("bits", "graphs", "entries")]
    known = [(stage, found) for stage, found in counts if found is not None]
    if not known:
        return None
    text = ", ".join(f"{stage}: {found['passed']} passed" for stage, found in known)
    failed = sum(found["failed"] for _, found in known)
    return Found(f"{text}; {failed} failed", not failed)


GOALS: dict[str, Goal] = {
    "The tests of kernels, captured loops and entry points pass": _tests,
    "Updates from 64 MiB on, except bfloat16 with noise: at least 90 % of a copy's bandwidth": (
        _update_at_least(0.90, noisy_half=False)
    ),
    "Updates from 64 MiB on in bfloat16 with noise: at least 75 % of a copy's bandwidth": (
        _update_at_least(0.75, noisy_half=True)
    ),
    "One graph of all steps around the null model: at most 3 µs a step": _null_model,
    "A call of that loop occupies the host for at most 60 µs": _call,
    "Small models with the fastest graph: at least 3 times as fast as the loop of diffusers": (
        _faster_than_diffusers
    ),
    "50 steps in one graph: at least 50 times as fast as 1000 of DDPM in diffusers": _against_ddpm,
    "A U-Net of Stable Diffusion 1.5's size: not slower than diffusers, beyond the spread": (
        _latent_against_diffusers
    ),
    "That U-Net with the fastest graph: at most 2 % over the network alone": (
        _latent_against_its_network
    ),
}


def goals_as_markdown(measured: dict[str, Result], folder: Path = RESULTS) -> str:
    """Each goal, with the measurement."""
    if not measured:
        return NONE
    header = ["goal", *(cell for gpu in measured for cell in (gpu, "reached"))]
    rows = [
        [goal, *(cell for result in measured.values() for cell in _cells(of(result)))]
        for goal, of in GOALS.items()
    ]
    pairs = gpu_predictions.compared(gpu_predictions.predictions(folder), measured, folder)
    error = gpu_predictions.median_error(pairs)
    found = None if error is None else Found(percent(error), error <= 0.20)
    cells = (_cells(found) if gpu == PREDICTED_GPU else ["–", "–"] for gpu in measured)
    rows.append(
        ["Predicted times: a median error of at most 20 %", *(c for pair in cells for c in pair)]
    )
    notes = "\n\n".join(f"{gpu}: {result.provenance}" for gpu, result in measured.items())
    return f"{table(header, rows)}\n\n{notes}"


def _cells(found: Found | None) -> list[str]:
    if found is None:
        return [NOT_MEASURED, "–"]
    return [found.text, "yes" if found.reached else "no"]


def graphs_as_markdown(measured: dict[str, Result]) -> str:
    """A step of each loop with each kind of graph, and the time until a call returns."""
    header = ["loop", *(f"graph={SHORT[mode]}" for mode in GRAPHS), "diffusers", "fastest"]
    header += ["faster than diffusers", *(f"{SHORT[mode]} returns after" for mode in GRAPHS[1:])]
    blocks = []
    for result in measured.values():
        rows = [
            [name, *_graph_cells(result, of)]
            for name, of in _loops()
            if result.fastest(map(of, GRAPHS))
        ]
        blocks += [f"{result.machine['gpu']}:", table(header, rows), *_of_the_two(result)]
    return "\n\n".join(blocks) or NONE


def _of_the_two(result: Result) -> Iterator[str]:
    """Sentences about models for which one graph for all steps is slower than one a step."""
    ratios = {
        name: result.ratio(of("graph=loop"), of("graph=True")) or 0.0 for name, of in _loops()
    }
    slower = {name: ratio - 1 for name, ratio in ratios.items() if ratio > 1}
    if slower:
        longer = _from_to(min(slower.values()), max(slower.values()))
        yield f"A graph of all steps takes {longer} longer than a graph of one step around: " + (
            f"{'; '.join(slower)}."
        )


def _loops() -> Iterator[tuple[str, Callable[[str], str]]]:
    """Names of loops, and their measures by contender."""
    for model, etas in measures.LOOP_ETAS.items():
        for eta in etas:

            def of(contender: str, model: str = model, eta: float = eta) -> str:
                return measures.loop(model, eta, contender)

            yield f"{model}, η = {eta:g}", of
    yield f"latent U-Net, {measures.LATENT_STEPS} steps", measures.latent


def _fastest_graph(result: Result, of: Callable[[str], str]) -> str:
    return min(GRAPHS, key=lambda mode: result.seconds(of(mode)) or float("inf"))


def _graph_cells(result: Result, of: Callable[[str], str]) -> list[str]:
    best = _fastest_graph(result, of)
    ratio = result.ratio(of("diffusers"), of(best))
    cells = [_time(result.seconds(of(contender))) for contender in (*GRAPHS, "diffusers")]
    cells += [SHORT[best], "–" if ratio is None else f"{gain(ratio)}×"]
    return cells + [_time(result.seconds(of(mode), "host_seconds")) for mode in GRAPHS[1:]]


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def stages_as_markdown(measured: dict[str, Result]) -> str:
    """The stages, with the end and the seconds of each on each GPU."""
    ended = [{end["name"]: end for end in result.stages} for result in measured.values()]
    header = ["stage", "limit, s", *(f"{gpu}, s" for gpu in measured), "what it does"]
    rows = []
    for stage in STAGES:
        ends = [_end(of.get(stage.name)) for of in ended]
        rows.append([f"`{stage.name}`", f"{stage.limit:g}", *ends, stage.about])
    totals = [
        f"On {gpu} the stages took {three(sum(end['seconds'] or 0 for end in result.stages))} s "
        f"in all, after {three(min(row['at'] for row in result.rows))} s of unpacking and imports."
        for gpu, result in measured.items()
    ]
    return "\n\n".join([table(header, rows), *totals])


def _end(end: dict[str, Any] | None) -> str:
    if end is None or end["result"] == "not begun":
        return "–"
    seconds = "" if end["seconds"] is None else f"{end['seconds']:.1f}"
    return seconds if end["result"] == "ok" else f"{seconds} {end['result']}".strip()


def loops_as_markdown(measured: dict[str, Result]) -> str:
    """The loops of each GPU against those of diffusers, for the page of performance."""
    header = ["loop around", "fastddim, a step", "graph", "diffusers", "faster"]
    blocks = []
    for result in measured.values():
        rows = []
        for name, of in _loops():
            best = _fastest_graph(result, of)
            ratio = result.ratio(of("diffusers"), of(best))
            if ratio is not None:
                times = [_time(result.seconds(of(contender))) for contender in (best, "diffusers")]
                rows.append([name, times[0], SHORT[best], times[1], f"{gain(ratio)}×"])
        note = f" {LATENT}" if result.fastest(map(measures.latent, GRAPHS)) else ""
        blocks += [table(header, rows), *_whole_runs(result), f"{result.provenance}{note}"]
    return "\n\n".join(blocks) or NONE


def _whole_runs(result: Result) -> Iterator[str]:
    """Seconds of DDPM's 1000 steps in diffusers, and of 50 in one graph."""
    for name in measures.DDPM_MODELS:
        ratio = ddpm_gain(result, name)
        slow, fast = (_time(result.seconds(measures.ddpm(name, c))) for c in measures.DDPM_AGAINST)
        if ratio is not None:
            yield (
                f"With the {name}, 50 steps in one graph take {fast}, and the 1000 of diffusers' "
                f"DDPM {slow}: {gain(ratio)} times as long."
            )


def headline_rows(gpu: str, result: Result) -> Iterator[list[str]]:
    """50 steps in one graph, compared with the 1000 of diffusers' DDPM or, if that has not run,
    with 50 of its DDIM.
    """
    for name in measures.DDPM_MODELS:
        label = f"{name.split()[0]}, η = 0, one graph on an {gpu.upper()}"
        ratio = ddpm_gain(result, name)
        if ratio is None:
            one, theirs = (measures.loop(name, 0.0, c) for c in ("graph=loop", "diffusers"))
            ratio = result.ratio(theirs, one)
            label += ", against diffusers' 50 steps"
        if ratio is not None:
            yield [label, "50", f"{gain(ratio)}×", "–", "–"]


def headline_sentence(gpu: str, result: Result) -> Iterator[str]:
    """The same comparison at an equal number of steps, for loops made of CUDA graphs."""
    ratios = {name: gain_over_diffusers(result, without_noise(name)) for name in measures.LOOP_ETAS}
    found = [f"{gain(ratio)} times around the {name}" for name, ratio in ratios.items() if ratio]
    if found:
        yield (
            f"On an {gpu.upper()}, and with the fastest kind of CUDA graph here, it is "
            f"{', '.join(found)}."
        )
