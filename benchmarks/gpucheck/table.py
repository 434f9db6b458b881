"""The stages of the check with their limits, in order of worth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One part of the check, in a process of its own.

    Attributes:
        name: also the name of its module, which defines `run(record, settings)`.
        limit: seconds after which it is killed.
        least: seconds; with less left it is not begun.
        about: one line for the documentation.
        fresh: whether it needs a new interpreter, since a fork would break what it uses.
    """

    name: str
    limit: float
    least: float
    about: str
    fresh: bool = False


STAGES = (
    Stage("environment", 15, 5, "Versions, driver, tools, the package under test"),
    Stage("smoke", 40, 10, "Eight updates and the loop, bit for bit against the CPU"),
    Stage("bits", 75, 20, "`tests/test_gpu.py` without the sanitizer"),
    Stage("graphs", 60, 15, "GPU tests of captured loops, without compiled models"),
    Stage("entries", 60, 15, "`tests/test_gpu_entries.py`: every entry point against the CPU"),
    Stage("loops", 80, 20, "50 steps of five models: diffusers, eager, both graphs"),
    Stage("bandwidth", 60, 15, "One update against the bandwidth of a copy, 1 to 1024 MiB"),
    Stage("latent_unet", 60, 25, "A U-Net of Stable Diffusion 1.5's size, random weights"),
    Stage("ddpm", 35, 12, "DDPM's 1000 steps against DDIM's 50"),
    Stage("sanitizer", 40, 20, "memcheck without torch's caching allocator"),
    Stage("counters", 25, 15, "Nsight Compute: DRAM, issue slots, warps, registers"),
    Stage("compiled", 45, 30, "The loop body under `torch.compile` with graphs", fresh=True),
    Stage("policies", 40, 15, "Ticks of robots' policies: eager, both graphs, weights read"),
    Stage("build", 20, 1, "An installation from source, alongside the other stages"),
)


def select(names: str) -> tuple[Stage, ...]:
    """The stages that a list with commas names, in the order of the table; all for an empty one.

    Raises:
        ValueError: a name is unknown.
    """
    chosen = set(filter(None, names.split(",")))
    unknown = sorted(chosen - {stage.name for stage in STAGES})
    if unknown:
        expected = ", ".join(stage.name for stage in STAGES)
        raise ValueError(f"stages: expected names among {expected}, got {', '.join(unknown)}")
    return tuple(stage for stage in STAGES if not chosen or stage.name in chosen)
