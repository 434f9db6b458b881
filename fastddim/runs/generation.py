"""The work behind `fastddim.generate`: find what is missing in a folder, and draw it.

The samples are cut into batches at fixed multiples of the batch size, and the bytes of a batch do
not depend on the process that draws it. So a run may be killed and continued on more or fewer
processes, and ends with the bytes that one process would have written. The manifest lists
everything that these bytes depend on, and a run is compared with it before it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddim.adapter import check_model
from fastddim.api import sample
from fastddim.files import check_writable
from fastddim.loop.reports import check_progress
from fastddim.loop.setup import prepare_sampling, resolve_device, resolve_schedule
from fastddim.options import (
    Callback,
    SampleOptions,
    SamplerOptions,
    Steps,
    Update,
)
from fastddim.runs.archives import Labels
from fastddim.runs.arguments import (
    check_model_arguments,
    check_network,
    check_weights,
    checked_archive,
    checked_batch_size,
    checked_conditions,
    checked_sample_shape,
    checked_update,
    unstopped,
)
from fastddim.runs.complete import merge, recorded_digest
from fastddim.runs.decoding import Decoder
from fastddim.runs.description import backend_name, describe
from fastddim.runs.differences import Manifest, differences
from fastddim.runs.folder import RunFolder
from fastddim.runs.manifest import listed
from fastddim.runs.memory import LARGEST, default_budget, fitting_batch
from fastddim.runs.options import GenerateOptions
from fastddim.runs.ranks import Ranks, joined
from fastddim.runs.shards import (
    Batch,
    Sharding,
    check_finite_samples,
    check_format,
    write_batch,
)
from fastddim.signatures import shared
from fastddim.validation import check_int


@dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
        folder: the folder of its files.
        start: number of the first sample.
        stop: number of the last sample, plus 1.
        batch_size: samples in each batch except the last, chosen if it was "auto".
        digest: one SHA-256 for all samples, as `fastddim.runs.digest` computes it.
        drawn: number of samples that this call drew on all ranks together; the others were there.
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
        for name in ("model", "uncond_model"):
            check_network(name, getattr(options, name), options.model_id)
        start = check_int("start", options.start, 0, 2**32 - 1)
        stop = check_int("stop", options.stop, start + 1, 2**32)
        self._seed = check_int("seed", options.seed, 0, 2**64 - 1)
        check_progress(options, options.graph)
        shape = checked_sample_shape(model, options.shape)
        self._batch_size = checked_batch_size(options)
        self._update = checked_update(options)
        self._conditions = checked_conditions(options, start, stop)
        self._decoder = None if options.decode is None else Decoder(options.decode)
        self._options = options
        self._device = resolve_device(model, options.device)
        # The rows of the model's arguments are those of a batch, whose size may be open.
        one = {"shape": (1, *shape), "batch_size": 1, "model_kwargs": None, "uncond_kwargs": None}
        self._setup = prepare_sampling(shared(SamplerOptions, options, **one))
        check_weights(options, self._decoder)
        stored = self._stored_shape()
        self._sharding = Sharding(
            start,
            stop,
            batch_size=1,
            format=check_format(options.format, stored),
            sample_shape=stored,
            labelled=self._conditions is not None and self._conditions.label_name is not None,
        )
        self._check_model_arguments()
        self._merged = None if options.merged is None else checked_archive(options.merged, stored)
        if self._setup.late_start is not None:
            self._setup.late_start.warn()
        self._schedule = resolve_schedule(model, options.schedule)
        self._folder = Path(options.out)

    def _check_model_arguments(self) -> None:
        """Refuse arguments of the model whose rows do not fit the batches, the last one included.

        With an open batch size they must fit one of any size, as single rows do.
        """
        options = self._options
        sharding = replace(self._sharding, batch_size=self._batch_size or 1)
        for batch in (next(sharding.batches()), sharding.last):
            model_kwargs, _ = self._inputs(batch)
            check_model_arguments(options, model_kwargs, batch.size, guided=self._update.guided)

    def _stored_shape(self) -> tuple[int, ...]:
        """The shape of one sample as it is written."""
        setup, decoder = self._setup, self._decoder
        shape = setup.shape[1:]
        return shape if decoder is None else decoder.shape_of_one(shape, setup.dtype, setup.device)

    def run(self) -> Run:
        """Draw the samples that are missing."""
        with joined(self._device) as ranks, RunFolder(self._folder) as folder:
            manifest = ranks.together(self._describe)[ranks.rank]
            found = ranks.on_first(lambda: self._open(folder))
            manifest["batch_size"] = self._choose_batch_size(ranks, found)
            sharding = replace(self._sharding, batch_size=manifest["batch_size"])
            if self._conditions is not None:
                digests = partial(self._conditions.digests, sharding)
                manifest["conditions"] = ranks.together(digests)[ranks.rank]
            self._agree(ranks, manifest)
            ranks.on_first(lambda: folder.begin(found, self._before(found, manifest), manifest))
            ranks.together(lambda: folder.join(ranks.rank, manifest))
            missing = self._missing(ranks, folder, sharding)
            self._draw_all(ranks, sharding, ranks.share(missing))
            # No rank may leave, or read the whole run, before all of them are done.
            ranks.gather(None)
            digest = ranks.on_first(lambda: self._finish(folder, sharding))
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
            self._options,
            self._setup,
            self._update,
            self._sharding,
            seed=self._seed,
            conditions=self._conditions,
            decoder=self._decoder,
        )

    def _before(self, found: Manifest | None, manifest: Manifest) -> Manifest:
        """`manifest` as it was when `found` was written, if the run has only grown since."""
        if found is None:
            return manifest
        stop = Sharding.of(found).stop
        if not manifest["start"] < stop < manifest["stop"]:
            return manifest
        before = {**manifest, "stop": stop}
        if self._conditions is not None:
            sharding = replace(self._sharding, stop=stop, batch_size=manifest["batch_size"])
            before["conditions"] = self._conditions.digests(sharding)
        return before

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
        plan, start = self._setup.plan, self._sharding.start
        batch = Batch(start, start + count)
        first = self._update.at_each(plan.steps)[0]
        samples, labels = self._sample(batch, plan.timesteps[:1], first, order=plan.order)
        samples = samples if self._decoder is None else self._decoder(samples)
        self._sharding.encode(batch, samples.cpu().nan_to_num(), labels)

    @staticmethod
    def _agree(ranks: Ranks, manifest: Manifest) -> None:
        first, *others = ranks.gather(manifest)
        for rank, other in enumerate(others, 1):
            found = differences(first, other, ("on rank 0", f"on rank {rank}"))
            if found:
                lines = [it.line for it in found]
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
            callback=unstopped(options.callback),
        )
        with self._bar(ranks, batches) as bar, ThreadPoolExecutor(1, "fastddim-writer") as writer:
            for batch in batches:
                samples, labels = draw(batch)
                images = self._decoded(batch, samples).cpu()
                if pending is not None:
                    bar.update(pending.result())
                pending = writer.submit(self._write, sharding, batch, images, labels)
            if pending is not None:
                bar.update(pending.result())

    def _decoded(self, batch: Batch, samples: Tensor) -> Tensor:
        if self._decoder is None:
            return samples
        # Some decoders make numbers of NaN.
        check_finite_samples("model", samples, batch)
        return self._decoder(samples)

    def _write(
        self, sharding: Sharding, batch: Batch, images: Tensor, labels: Labels | None
    ) -> int:
        check_finite_samples("model" if self._decoder is None else "decode", images, batch)
        write_batch(self._folder, sharding, batch, images, labels)
        return batch.size

    def _inputs(self, batch: Batch) -> tuple[Mapping[str, Any] | None, Labels | None]:
        """The `model_kwargs` of a batch, and its labels if it has any."""
        if self._conditions is None:
            return self._options.model_kwargs, None
        rows, labels = self._conditions.of(batch, self._device)
        return {**(self._options.model_kwargs or {}), **rows}, labels

    def _sample(
        self,
        batch: Batch,
        steps: Steps,
        update: Update,
        order: int,
        callback: Callback | None = None,
    ) -> tuple[Tensor, Labels | None]:
        """The samples of a batch and their labels, if any."""
        model_kwargs, labels = self._inputs(batch)
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
            shape=(batch.size, *setup.shape[1:]),
            batch_size=batch.size,
            model_kwargs=model_kwargs,
            device=setup.device,
            dtype=setup.dtype,
            impl=backend_name(setup),
            progress=False,
            callback=callback,
        )
        return sample(**vars(options)), labels

    def _bar(self, ranks: Ranks, batches: Sequence[Batch]) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=sum(batch.size for batch in batches),
            desc="generating" if ranks.world == 1 else f"rank 0 of {ranks.world}",
            unit="sample",
            disable=not self._options.progress or ranks.rank > 0,
        )

    def _finish(self, folder: RunFolder, sharding: Sharding) -> str:
        folder.remove_leftovers(sharding)
        if self._merged is not None:
            merge(self._folder, self._merged)
        return recorded_digest(self._folder, sharding)
