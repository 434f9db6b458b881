"""`generate`, which draws many samples into a folder."""

from __future__ import annotations

from fastddim.options import GenerateOptions
from fastddim.runs.generation import Generation, Run
from fastddim.signatures import takes


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> Run:
    """Draw the samples `start` to `stop` of a seed into the folder `out`.

    Under `torchrun`, or inside a process group that exists already, each rank draws its share; all
    ranks must see the same folder. A run may be killed at any moment. The same call then continues
    it, with any number of ranks, and ends with the bytes that one uninterrupted process would have
    written with the same batch size, device, threads and versions, which the folder's manifest
    holds. Damaged files are found and drawn again.

    Arguments not described here are those of `sample`; coefficients are numbers or sequences of
    numbers.

    Args:
        model: as for `sample`, in eval mode.
        out: the folder: new, empty, or that of an earlier call with the same arguments.
        start, stop: the samples [start, stop) in [0, 2³²). Sample i of a seed starts from the same
            noise everywhere in fastddim, so two machines without a common disk can draw two ranges
            into two folders, which `fastddim.runs.merge` joins.
        seed: int in [0, 2⁶⁴).
        batch_size: samples drawn and written at a time, or "auto": B of `shape`, else as many as
            fit into `memory`, measured on the model. With "auto" and no `shape`, a run that is
            continued keeps its batch size.
        memory: bytes that "auto" may use besides the model's weights; by default half of the host's
            free memory, or four fifths of the GPU's, divided among the ranks of the machine.
        format: "npz" (uint8 `arr_0` `[N, H, W, C]`), "safetensors" (float32 `samples` `[N, …]`) or
            "png-folder" (one numbered PNG file per sample).
        merged: name of an `.npz` of all samples to write as well, as `fastddim.runs.merge` does.
        shape: (B, …) with B the batch size; by default samples of the shape that the model tells.
            To have B chosen for another model, let it tell: `model.sample_shape = (C, H, W)`.
        model_id: a name that tells the model from others in the manifest, in addition to its
            weights. Required if the model is not an `nn.Module`.
        progress: show a tqdm bar of rank 0's share on stderr.
        callback: as for `sample`, in each batch.
        check_finite: as for `sample`. NaN and infinity in the results are refused in any case.
        model_kwargs: the same for every batch.

    Returns:
        The complete run, on every rank.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or the model's
            output is not finite; the message names it.
        fastddim.runs.ManifestMismatchError: `out` holds another run; the message lists every
            difference.
        OSError: a file cannot be read or written, or another run is using the folder. The files
            written so far stay, and the next call continues from them.
    """
    return Generation(options).run()
