"""Names of the times that the GPU check measures and that were predicted for it.

A measure is the key of a time in both result files. This module imports only the standard library,
so the check can say what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator

MEBIBYTE = 2**20

IMPLEMENTATIONS = ("cuda", "triton")
DTYPES = ("float32", "bfloat16")
UPDATE_ETAS = (0.0, 1.0)
MEBIBYTES = (256, 1024, 64, 16, 1)
"""Sizes of one state tensor, the most informative first."""

LOOP_ETAS: dict[str, tuple[float, ...]] = {
    "null model": (0.0, 1.0),
    "policy head": (0.0,),
    "digits U-Net": (0.0, 1.0),
    "fashion U-Net": (0.0,),
    "diffusers U-Net": (0.0,),
}
"""η of the loops by model, under the names in `loops.MODELS`."""
LOOP_STEPS = 50
LOOP_CONTENDERS = ("graph=False", "graph=True", "graph=loop", "diffusers")

LATENT_STEPS = 20
LATENT_ALONE = "network alone"
"""The network alone in a graph, once a step: a bound that no loop around it can beat."""
LATENT_CONTENDERS = (*LOOP_CONTENDERS, LATENT_ALONE)

DDPM_MODELS = ("digits U-Net", "fashion U-Net")
DDPM_CONTENDERS = ("diffusers DDIM, 50", "diffusers DDPM, 1000", "fastddim, 50", "fastddim, 1000")
"""Each loop with its steps; fastddim takes 50 at η = 0 and 1000 at η = 1."""
DDPM_AGAINST = ("diffusers DDPM, 1000", "fastddim, 50")

COMPILED_MODELS = ("policy head", "digits U-Net")

POLICIES = ("MLP", "small U-Net", "transformer", "default U-Net")
"""Networks of robots' policies, under the names in `policy_networks.NETWORKS`."""


def update(impl: str, dtype: str, eta: float, mib: int) -> str:
    """One update of a state of `mib` MiB, in seconds."""
    return f"update, {impl}, {dtype}, eta {eta:g}, {mib} MiB"


def loop(model: str, eta: float, contender: str) -> str:
    """A loop of `LOOP_STEPS` steps, in seconds a step."""
    return f"loop, {model}, eta {eta:g}, {contender}"


def latent(contender: str) -> str:
    """A guided loop with a U-Net of Stable Diffusion 1.5's size, in seconds a step."""
    return f"latent U-Net, {contender}"


def ddpm(model: str, contender: str) -> str:
    """A whole run, in seconds."""
    return f"ddpm, {model}, {contender}"


def compiled(model: str) -> str:
    """Model and update under torch.compile with CUDA graphs, in seconds a step."""
    return f"compiled, {model}, torch.compile"


def policy(network: str, contender: str) -> str:
    """A tick of ten steps, in seconds."""
    return f"policy, {network}, {contender}"


def every() -> Iterator[str]:
    """All measures that were predicted, in the order of the tables."""
    for impl in IMPLEMENTATIONS:
        for dtype in DTYPES:
            for eta in UPDATE_ETAS:
                for mib in sorted(MEBIBYTES):
                    yield update(impl, dtype, eta, mib)
    for model, etas in LOOP_ETAS.items():
        for eta in etas:
            for contender in LOOP_CONTENDERS:
                yield loop(model, eta, contender)
    for contender in LATENT_CONTENDERS:
        yield latent(contender)
    for model in DDPM_MODELS:
        for contender in DDPM_CONTENDERS:
            yield ddpm(model, contender)
    for model in COMPILED_MODELS:
        yield compiled(model)
