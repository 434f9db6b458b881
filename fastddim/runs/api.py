"""`generate`, which draws many samples into a folder."""

from __future__ import annotations

from fastddim.runs.generation import Generation, Run
from fastddim.runs.options import GenerateOptions
from fastddim.signatures import takes


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> Run:
    """Draw the samples `start` to `stop` of a seed into the folder `out`.

    Under `torchrun`, or inside a process group that exists already, each rank draws its share; all
    ranks must see the same folder. A run may be killed at any moment. The same call then continues
    it, with any number of ranks, and ends with the bytes that one uninterrupted process would have
    written with the same batch size, device, threads and versions, which the folder's manifest
    holds. On the CPU `torchrun` gives each process one thread unless `OMP_NUM_THREADS` says
    otherwise, so a run that was begun with more asks for as many (`torch.set_num_threads`). Damaged
    files are found and drawn again.

    Arguments not described here are those of `sample`; coefficients are numbers or sequences of
    numbers.

    Args:
        model: as for `sample`, in eval mode.
        out: the folder: new, empty, or that of an earlier call with the same arguments.
        start, stop: the samples [start, stop) in [0, 2³²). Sample i of a seed starts from the same
            noise everywhere in fastddim, so two machines without a common disk can draw two ranges
            into two folders, which `fastddim.runs.merge` joins. A run can be continued to a larger
            `stop`: its last batch, if it was not full, is drawn again as part of a full one, and
            the files end as those of one run. Begin such a run with a `batch_size`, since "auto"
            gives a few samples small batches, which it keeps.
        seed: int in [0, 2⁶⁴).
        batch_size: samples drawn and written at a time, or "auto": B of `shape`, else as many as
            fit into `memory`, measured on the model. With "auto" and no `shape`, a run that is
            continued keeps its batch size.
        memory: bytes that "auto" may use besides the model's weights; by default half of the host's
            free memory, or four fifths of the GPU's, divided among the ranks of the machine.
        format: "npz" (uint8 `arr_0` `[N, H, W, C]`), "safetensors" (float32 `samples` `[N, …]`) or
            "png-folder" (one numbered PNG file per sample). Samples other than grey or RGB
            images need "safetensors", or `decode`. Labels are written with the samples: int64
            `arr_1` or `labels` `[N]`, or lines `000000.png,7` in a `.csv` file of each batch.
        merged: name of an `.npz` of all samples to write as well, as `fastddim.runs.merge` does.
        conditions: arguments of the model with one row for each of the samples [start, stop):
            tensors, arrays or lists by name, in nested mappings if the model takes such; or a
            function `(start, stop)` that returns the rows of these samples, and the same ones each
            time: it is called for the manifest before anything is drawn, by every rank, and again
            for each batch. Integers `[N]` become int64; those named `y` or `class_labels`, or the
            only ones, are the labels. With `guidance_scale`, `uncond_kwargs` holds the value for
            no condition: a number, or one row.
        decode: the decoder of samples into images in [−1, 1] before they are written: a function of
            `[b, …]` in the state's dtype, or an autoencoder of diffusers, which gets the latents in
            the scale of its `config`. It is called once with zeros beforehand. Its weights, also
            those that a function holds or names, are in the manifest.
        shape: (B, …) with B the batch size; by default samples of the shape that the model tells.
            If the model tells none and "auto" is to choose B, set `model.sample_shape = (C, H, W)`.
        model_id: a name that tells the model from others in the manifest, in addition to its
            weights. Required if the model is not an `nn.Module`, and where hooks offload weights.
        progress: show a tqdm bar of rank 0's share on stderr.
        callback: as for `sample`, in each batch.
        check_finite: as for `sample`. NaN and infinity in the results are refused in any case.
        model_kwargs: the same for every sample, so tensors have one row or none.

    Returns:
        The complete run, on every rank.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or the model's
            output is not finite; the message names it.
        fastddim.runs.ManifestMismatchError: `out` holds another run, or more samples; the message
            lists every difference.
        OSError: a file cannot be read or written, or another run is using the folder. The files
            written so far stay, and the next call continues from them.
    """
    return Generation(options).run()
