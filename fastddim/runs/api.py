"""`generate` and the run that it returns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddim.adapter import Model
from fastddim.plan import PerStep, Update
from fastddim.runs.generation import Generation, Run
from fastddim.sampler import Callback, DenoisedFn
from fastddim.schedule import Schedule


def generate(
    model: Model,
    steps: int | Sequence[int] | Tensor,
    out: str | os.PathLike[str],
    *,
    stop: int,
    start: int = 0,
    seed: int = 0,
    batch_size: int | str = "auto",
    memory: int | None = None,
    format: str = "npz",
    merged: str | os.PathLike[str] | None = None,
    sample_shape: Sequence[int] | None = None,
    model_id: str | None = None,
    schedule: Schedule | None = None,
    spacing: str = "uniform",
    steps_offset: int = 0,
    eta: PerStep = 0.0,
    variance: str = "small",
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = False,
    guidance_scale: PerStep | None = None,
    temperature: PerStep = 1.0,
    guidance_rescale: float = 0.0,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float | None = None,
    denoised_fn: DenoisedFn | None = None,
    order: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
    graph: str | bool = "auto",
    progress: bool = False,
    callback: Callback | None = None,
    check_finite: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Run:
    """Draw samples `start` to `stop` of a seed into the folder `out`, or go on with that.

    Under `torchrun`, or in a process group that is there already, each rank draws its share, and
    all see the same folder. Killed at any moment and called again, with any number of ranks, it
    ends with the same bytes as one call of one process: for the same batch size, device, threads
    and versions, which the folder's manifest holds. Damaged files are found and drawn again.

    Arguments not named here are those of `sample`; coefficients are numbers or sequences of them.

    Args:
        model: as for `sample`, in eval mode.
        out: the folder; a new or empty one, or that of an earlier call with the same arguments.
        start, stop: the samples [start, stop) in [0, 2³²). Sample i of a seed starts from the same
            noise as everywhere in fastddim, so two machines without a common disk draw two ranges
            into two folders, and `fastddim.runs.merge` joins them.
        seed: int in [0, 2⁶⁴).
        batch_size: samples drawn and written at a time, or "auto": as many as fit into `memory`,
            measured on the model. Auto keeps the batch size of a run that it goes on with.
        memory: bytes for everything beside the model's weights, for "auto"; by default half of the
            host's free memory, or four fifths of the GPU's, shared between the local ranks.
        format: "npz" (uint8 `arr_0` `[N, H, W, C]`), "safetensors" (float32 `samples` `[N, …]`) or
            "png-folder" (one numbered PNG file per sample).
        merged: also an `.npz` of all samples, as `fastddim.runs.merge` writes it.
        sample_shape: shape of one sample; by default what the model tells.
        model_id: what tells the model from others in the manifest, beside its weights. Needed where
            the model is no `nn.Module`.
        progress: show a tqdm bar of rank 0's share on stderr.
        callback: as for `sample`, in each batch.
        check_finite: as for `sample`. Without it NaN and infinity are still refused in the results.
        model_kwargs: the same for every batch.

    Returns:
        The complete run, on every rank.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or the model's
            output is not finite; the message names it.
        fastddim.runs.ManifestMismatchError: `out` holds another run; the message lists every
            difference.
        OSError: a file cannot be read or written, or another run is using the folder. What was
            written before stays, and the next call goes on from there.
    """
    return Generation(
        model,
        steps,
        out,
        stop=stop,
        start=start,
        seed=seed,
        batch_size=batch_size,
        memory=memory,
        format=format,
        merged=merged,
        sample_shape=sample_shape,
        model_id=model_id,
        update=Update(
            eta,
            variance,
            prediction,
            clip,
            rederive_eps,
            guidance_scale,
            temperature,
            guidance_rescale,
            dynamic_thresholding_ratio,
            sample_max_value,
        ),
        order=order,
        denoised_fn=denoised_fn,
        schedule=schedule,
        spacing=spacing,
        steps_offset=steps_offset,
        device=device,
        dtype=dtype,
        impl=impl,
        graph=graph,
        progress=progress,
        callback=callback,
        check_finite=check_finite,
        model_kwargs=model_kwargs,
    ).run()
