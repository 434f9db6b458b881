"""The work behind `fastddim.generate`: find what is missing in a folder, and draw it.

The samples are cut into batches at fixed multiples of the batch size, and the bytes of a batch do
not depend on the process that draws it. So a run may be killed and continued on more or fewer
processes, and ends with the bytes that one process would have written. The manifest lists
everything that these bytes depend on, and a run is compared with it before it goes on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastddim.adapter import Model, check_model
from fastddim.api import sample
from fastddim.files import check_writable
from fastddim.loop.reports import check_progress
from fastddim.loop.setup import prepare_sampling, resolve_schedule, resolve_shape
from fastddim.options import (
    Callback,
    GenerateOptions,
    SampleOptions,
    SamplerOptions,
    Steps,
    Update,
    shared,
)
from fastddim.runs.complete import merge, recorded_digest
from fastddim.runs.description import any_on_meta, backend_name, describe
from fastddim.runs.folder import RunFolder
from fastddim.runs.manifest import Manifest, differences, listed
from fastddim.runs.memory import LARGEST, default_budget, fitting_batch
from fastddim.runs.ranks import Ranks, joined
from fastddim.runs.shards import Batch, Sharding, check_format, write_batch
from fastddim.stopping import STOP
from fastddim.validation import check_int


@dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
        folder: where its files are.
        start: number of the first sample in them.
        stop: number after that of the last one.
        batch_size: samples in each batch but the last, chosen if it was "auto".
        digest: one SHA-256 for all of them, as `fastddim.runs.digest` computes it.
        drawn: how many samples this call drew on all ranks together; the others were there before.
    """

    folder: Path
    start: int
    stop: int
    batch_size: int
    digest: str
    drawn: int


class Generation:
    """A call of `generate` in two parts: the constructor checks all arguments, `run` draws."""

    def __init__(self, options: GenerateOptions) -> None:
        model = options.model
        check_model(model)
        _check_eval(model)
        _check_identity(model, options.model_id)
        start = check_int("start", options.start, 0, 2**32 - 1)
        stop = check_int("stop", options.stop, start + 1, 2**32)
        self._seed = check_int("seed", options.seed, 0, 2**64 - 1)
        check_progress(options, options.graph)
        shape = _checked_sample_shape(model, options.shape)
        self._batch_size = _checked_batch_size(options)
        self._sharding = Sharding(start, stop, 1, check_format(options.format, shape), shape)
        self._merged = None if options.merged is None else _checked_archive(options.merged, shape)
        self._update = _checked_update(options)
        # The rows of the model's arguments are those of a batch, whose size is open.
        one = {"shape": (1, *shape), "batch_size": 1, "model_kwargs": None, "uncond_kwargs": None}
        self._setup = prepare_sampling(shared(SamplerOptions, options, **one))
        _check_weights(model, options.model_id)
        if self._setup.late_start is not None:
            self._setup.late_start.warn()
        self._schedule = resolve_schedule(model, options.schedule)
        self._folder = Path(options.out)
        self._options = options

    def run(self) -> Run:
        """Draw the samples that are missing."""
        with joined(self._setup.device) as ranks, RunFolder(self._folder) as folder:
            manifest = ranks.together(self._describe)[ranks.rank]
            found = ranks.on_first(lambda: self._open(folder))
            manifest["batch_size"] = self._choose_batch_size(ranks, found)
            self._agree(ranks, manifest)
            ranks.on_first(lambda: folder.begin(found, manifest))
            ranks.together(lambda: folder.join(ranks.rank, manifest))
            sharding = replace(self._sharding, batch_size=manifest["batch_size"])
            missing = self._missing(ranks, folder, sharding)
            self._draw_all(ranks, sharding, ranks.share(missing))
            # No rank may leave, or read the whole run, before all of them are done.
            ranks.gather(None)
            digest = ranks.on_first(lambda: self._finish(sharding))
        return Run(
            self._folder,
            sharding.start,
            sharding.stop,
            sharding.batch_size,
            digest,
            sum(batch.size for batch in missing),
        )

    def _describe(self) -> Manifest:
        return describe(
            self._setup,
            self._update,
            self._sharding,
            seed=self._seed,
            model_id=self._options.model_id,
            given=self._options,
        )

    def _open(self, folder: RunFolder) -> Manifest | None:
        """The manifest of the run to go on with; None for a new run."""
        found = folder.open()
        if self._merged is not None:
            check_writable(self._merged)
        if found is None:
            folder.check_empty()
        return found

    def _choose_batch_size(self, ranks: Ranks, found: Manifest | None) -> int:
        if self._batch_size is not None:
            return self._batch_size
        if found is not None:
            return Sharding.of(found).batch_size
        # With larger batches some rank would have nothing to do.
        share = -(-(self._sharding.stop - self._sharding.start) // ranks.world)
        return min(ranks.together(lambda: self._fitting(min(LARGEST, share))))

    def _fitting(self, largest: int) -> int:
        device = self._setup.device
        memory = self._options.memory
        budget = default_budget(device) if memory is None else memory
        return fitting_batch(self._try_out, budget, device, largest)

    def _try_out(self, count: int) -> None:
        """Take the first step of a batch, and encode the result as after the last step."""
        plan = self._setup.plan
        first = self._update.at_each(plan.steps)[0]
        samples = self._sample(Batch(0, count), plan.timesteps[:1], first, order=plan.order)
        self._sharding.encode(samples.cpu().nan_to_num())

    @staticmethod
    def _agree(ranks: Ranks, manifest: Manifest) -> None:
        first, *others = ranks.gather(manifest)
        for rank, other in enumerate(others, 1):
            lines = differences(first, other, ("on rank 0", f"on rank {rank}"))
            if lines:
                raise ValueError(
                    f"ranks: expected the same run on all of them, got\n  {listed(lines)}"
                )

    @staticmethod
    def _missing(ranks: Ranks, folder: RunFolder, sharding: Sharding) -> list[Batch]:
        """All batches that have to be drawn, the same list on every rank."""
        checked = ranks.share(list(sharding.batches()))
        missing = [batch for batch in checked if not folder.holds(sharding, batch)]
        return sorted(batch for part in ranks.gather(missing) for batch in part)

    def _draw_all(self, ranks: Ranks, sharding: Sharding, batches: Sequence[Batch]) -> None:
        """Draw each batch while the previous one is being written."""
        pending: Future[int] | None = None
        plan, options = self._setup.plan, self._options
        draw = partial(
            self._sample,
            steps=plan.tuned or plan.timesteps,
            update=self._update,
            order=options.order,
            callback=_unstopped(options.callback),
        )
        with self._bar(ranks, batches) as bar, ThreadPoolExecutor(1, "fastddim-writer") as writer:
            for batch in batches:
                samples = draw(batch).cpu()
                if pending is not None:
                    bar.update(pending.result())
                pending = writer.submit(self._write, sharding, batch, samples)
            if pending is not None:
                bar.update(pending.result())

    def _write(self, sharding: Sharding, batch: Batch, samples: Tensor) -> int:
        write_batch(self._folder, sharding, batch, samples)
        return batch.size

    def _sample(
        self,
        batch: Batch,
        steps: Steps,
        update: Update,
        order: int,
        callback: Callback | None = None,
    ) -> Tensor:
        setup = self._setup
        options = shared(
            SampleOptions,
            self._options,
            **vars(update),
            steps=steps,
            order=order,
            schedule=self._schedule,
            seed=self._seed,
            sample_offset=batch.first,
            shape=(batch.size, *self._sharding.sample_shape),
            batch_size=batch.size,
            device=setup.device,
            dtype=setup.dtype,
            impl=backend_name(setup),
            progress=False,
            callback=callback,
        )
        return sample(**vars(options))

    def _bar(self, ranks: Ranks, batches: Sequence[Batch]) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=sum(batch.size for batch in batches),
            desc="generating" if ranks.world == 1 else f"rank 0 of {ranks.world}",
            unit="sample",
            disable=not self._options.progress or ranks.rank > 0,
        )

    def _finish(self, sharding: Sharding) -> str:
        if self._merged is not None:
            merge(self._folder, self._merged)
        return recorded_digest(self._folder, sharding)


def _unstopped(callback: Callback | None) -> Callback | None:
    """The callback, which may not end a run: files hold the samples of all steps."""
    if callback is None:
        return None

    def call(step_index: int, timestep: int, x_t: Tensor, x_0: Tensor) -> None:
        if callback(step_index, timestep, x_t, x_0) is STOP:
            raise ValueError(
                "callback: expected a result other than fastddim.STOP, since files hold samples "
                f"after the last step, got {STOP!r} at step {step_index}"
            )

    return call


def _check_eval(model: Model) -> None:
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model: expected eval mode (model.eval()), got training mode")


def _check_identity(model: Model, model_id: Any) -> None:
    if model_id is not None and not isinstance(model_id, str):
        raise TypeError(f"model_id: expected a string, got {model_id!r}")
    if model_id is None and not isinstance(model, nn.Module):
        raise ValueError(
            "model_id: expected a string that tells this model from others, since it is no "
            "nn.Module whose weights do, got None"
        )


def _check_weights(model: Model, model_id: str | None) -> None:
    if model_id is None and isinstance(model, nn.Module) and any_on_meta(model):
        raise ValueError(
            "model_id: expected a string that tells this model from others, since its weights are "
            "on meta, where hooks offload them, and cannot be read; got None"
        )


def _checked_sample_shape(model: Model, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one sample: `shape` without B, or the one that the model tells."""
    resolved = resolve_shape(model, shape, 1)
    return tuple(check_int(f"shape[{i}]", n, 1, 2**32) for i, n in enumerate(resolved))[1:]


def _checked_batch_size(options: GenerateOptions) -> int | None:
    """The given batch size, or None where it is to be chosen."""
    batch_size, memory, shape = options.batch_size, options.memory, options.shape
    if isinstance(batch_size, str):
        if batch_size != "auto":
            raise ValueError(f"batch_size: expected an integer or 'auto', got {batch_size!r}")
        if shape is None:
            if memory is not None:
                check_int("memory", memory, 1, 2**62)
            return None
        batch_size = shape[0]
    if memory is not None:
        raise ValueError(
            f"memory: expected None unless batch_size='auto' and shape=None, got {memory!r}"
        )
    if shape is not None and batch_size != shape[0]:
        raise ValueError(f"batch_size: expected {shape[0]}, as in shape, got {batch_size}")
    return check_int("batch_size", batch_size, 1, 2**32)


def _checked_archive(path: str | os.PathLike[str], sample_shape: Sequence[int]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".npz":
        raise ValueError(f"merged: expected a name that ends in .npz, got {str(path)!r}")
    if len(sample_shape) != 3:
        raise ValueError(
            f"merged: expected None for samples that are no images, got {str(path)!r} "
            f"for shape {tuple(sample_shape)}"
        )
    return target


def _checked_update(update: Update) -> Update:
    """The arguments of each step as numbers; a manifest cannot hold tensors."""
    checked = update.checked(None, per_step=True)
    for name, value in vars(checked).items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, Tensor) for v in values):
            raise ValueError(f"{name}: expected a number or one a step, got a tensor")
    return checked
