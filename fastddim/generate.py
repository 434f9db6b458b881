"""Many samples of one seed, drawn into a folder by any number of processes, one after another too.

The samples are cut into batches at fixed multiples of the batch size, and batch k is the same bytes
whoever draws it. So a run may be killed and taken up again, on more or fewer processes, and ends
with what one process would have written. `manifest.json` says what the bytes depend on, and is what
a run is compared with before it goes on; see `fastddim.shards` for the files.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddim import adapter
from fastddim.adapter import Model, check_model
from fastddim.api import sample
from fastddim.files import check_writable, remove_parts, sync_folder
from fastddim.loop.loop import check_watching
from fastddim.loop.setup import Setup, prepare_sampling, resolve_schedule
from fastddim.manifest import (
    FILE,
    VERSION,
    Manifest,
    differences,
    digest_of,
    fingerprint,
    listed,
    read_manifest,
    refuse_differences,
    write_manifest,
)
from fastddim.memory import LARGEST, default_budget, fitting_batch
from fastddim.options import Callback, DenoisedFn, SamplerOptions, Watching
from fastddim.plan import PerStep, Update
from fastddim.ranks import Ranks, joined
from fastddim.schedule import Schedule
from fastddim.shards import (
    Batch,
    Layout,
    check_format,
    merge,
    read_batch,
    recorded_digest,
    write_batch,
)
from fastddim.validation import check_int

LOCK = ".fastddim-lock"

# A killed process still holds its lock until the kernel has cleared it away.
_LOCK_PATIENCE = 10.0


@dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
        folder: where its files are.
        start, stop: the samples of the seed that they hold.
        batch_size: of the run, also where it was "auto".
        digest: one SHA-256 for all of them, as `fastddim.shards.digest` computes it.
        drawn: how many samples this call drew, on all ranks together; the others were there.
    """

    folder: Path
    start: int
    stop: int
    batch_size: int
    digest: str
    drawn: int


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
            into two folders, and `fastddim.shards.merge` joins them.
        seed: int in [0, 2⁶⁴).
        batch_size: samples drawn and written at a time, or "auto": as many as fit into `memory`,
            measured on the model. Auto keeps the batch size of a run that it goes on with.
        memory: bytes for everything beside the model's weights, for "auto"; by default half of the
            host's free memory, or four fifths of the GPU's, shared between the local ranks.
        format: "npz" (uint8 `arr_0` `[N, H, W, C]`), "safetensors" (float32 `samples` `[N, …]`) or
            "png-folder" (one numbered PNG file per sample).
        merged: also an `.npz` of all samples, as `fastddim.shards.merge` writes it.
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
        fastddim.manifest.ManifestMismatchError: `out` holds another run; the message lists every
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
            eta=eta,
            variance=variance,
            prediction=prediction,
            clip=clip,
            rederive_eps=rederive_eps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            guidance_rescale=guidance_rescale,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
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


class Generation:
    """`generate` in two parts: all arguments are checked here, and `run` does the work."""

    def __init__(
        self,
        model: Model,
        steps: int | Sequence[int] | Tensor,
        out: str | os.PathLike[str],
        *,
        stop: int,
        start: int,
        seed: int,
        batch_size: int | str,
        memory: int | None,
        format: str,
        merged: str | os.PathLike[str] | None,
        sample_shape: Sequence[int] | None,
        model_id: str | None,
        update: Update,
        progress: bool,
        callback: Callback | None,
        graph: str | bool,
        **arguments: Any,
    ) -> None:
        check_model(model)
        _check_eval(model)
        _check_identity(model, model_id)
        check_int("start", start, 0, 2**32 - 1)
        check_int("stop", stop, start + 1, 2**32)
        self._seed = check_int("seed", seed, 0, 2**64 - 1)
        check_watching(Watching(progress=progress, callback=callback), graph)
        self._batch_size = _checked_batch_size(batch_size, memory)
        self._memory = memory
        shape = _checked_sample_shape(model, sample_shape)
        self._layout = Layout(start, stop, 1, check_format(format, shape), shape)
        self._merged = None if merged is None else _checked_archive(merged, shape)
        self._update = _checked_update(update)
        self._setup: Setup = prepare_sampling(
            SamplerOptions(
                model, steps, **vars(update), shape=(1, *shape), graph=graph, **arguments
            )
        )
        self._model, self._model_id = model, model_id
        self._schedule = resolve_schedule(model, arguments["schedule"])
        self._folder = Path(out)
        self._progress, self._callback = progress, callback

    def run(self) -> Run:
        """Draw what is missing."""
        with joined(self._setup.device) as ranks, _Lock(self._folder) as lock:
            manifest = ranks.together(self._describe)[ranks.rank]
            found = ranks.on_first(lambda: self._enter(lock))
            manifest["batch_size"] = self._choose_batch_size(ranks, found)
            self._agree(ranks, manifest)
            ranks.on_first(lambda: self._begin(found, manifest))
            ranks.together(lambda: self._follow(ranks, lock, manifest))
            layout = replace(self._layout, batch_size=manifest["batch_size"])
            missing = self._missing(ranks, layout)
            self._draw_all(ranks, layout, ranks.share(missing))
            # Nobody may leave, nor look at the whole, before all are done.
            ranks.gather(None)
            digest = ranks.on_first(lambda: self._finish(layout))
        return Run(
            self._folder,
            layout.start,
            layout.stop,
            layout.batch_size,
            digest,
            sum(batch.size for batch in missing),
        )

    def _describe(self) -> Manifest:
        """The manifest but for the batch size, as it is read again from its file."""
        import fastddim

        setup, plan = self._setup, self._setup.plan
        on_cpu, on_gpu = setup.device.type == "cpu", setup.device.type == "cuda"
        weights = fingerprint(self._model) if isinstance(self._model, nn.Module) else None
        denoised: Any = setup.denoised_fn
        manifest = {
            "version": VERSION,
            "model": {
                "class": type(self._model).__qualname__,
                "weights": weights,
                "id": self._model_id,
                "kwargs": digest_of(setup.model_kwargs) if setup.model_kwargs else None,
            },
            "plan": {
                "timesteps": plan.timesteps.tolist(),
                "alphas_cumprod": plan.alphas_cumprod.tolist(),
                **asdict(self._update),
                "order": plan.order,
                "denoised_fn": getattr(denoised, "__qualname__", type(denoised).__qualname__),
            },
            "seed": self._seed,
            "start": self._layout.start,
            "stop": self._layout.stop,
            "batch_size": None,
            "sample_shape": list(self._layout.sample_shape),
            "format": self._layout.format,
            "dtype": _name(setup.dtype),
            "model_dtype": _name(setup.model_dtype),
            "computation": {
                "device": setup.device.type,
                "gpu": torch.cuda.get_device_name(setup.device) if on_gpu else None,
                "impl": _backend_name(setup),
                "threads": torch.get_num_threads() if on_cpu else None,
                "cpu_capability": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
                "matmul_precision": torch.get_float32_matmul_precision(),
                "cudnn_tf32": torch.backends.cudnn.allow_tf32 if on_gpu else None,
            },
            "versions": {"fastddim": fastddim.__version__, "torch": torch.__version__},
        }
        normalized: Manifest = json.loads(json.dumps(manifest))
        return normalized

    def _enter(self, lock: _Lock) -> Manifest | None:
        """Take the folder, which is made if need be, and read what it says."""
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder.resolve().parent)
        lock.take_alone()
        remove_parts(self._folder)
        # This refuses a link, which `check_writable` would follow.
        found = read_manifest(self._folder)
        check_writable(self._folder / FILE)
        if self._merged is not None:
            check_writable(self._merged)
        if found is None:
            others = [name for name in sorted(os.listdir(self._folder)) if name != LOCK]
            if others:
                raise ValueError(
                    f"out: expected a new or empty folder, or one with {FILE}, "
                    f"got {len(others)} files in {self._folder}, among them {others[0]}"
                )
        return found

    def _choose_batch_size(self, ranks: Ranks, found: Manifest | None) -> int:
        if self._batch_size is not None:
            return self._batch_size
        if found is not None:
            return Layout.of(found).batch_size
        # No more than gives every rank something to do.
        share = -(-(self._layout.stop - self._layout.start) // ranks.world)
        return min(ranks.together(lambda: self._fitting(min(LARGEST, share))))

    def _fitting(self, largest: int) -> int:
        device = self._setup.device
        budget = default_budget(device) if self._memory is None else self._memory
        return fitting_batch(self._try_out, budget, device, largest)

    def _try_out(self, count: int) -> None:
        """The first step of a batch, and what follows the last one."""
        steps = self._setup.plan.timesteps
        samples = self._sample(Batch(0, count), steps[:1], self._update.at_each(len(steps))[0])
        self._layout.encode(samples.cpu().nan_to_num())

    @staticmethod
    def _agree(ranks: Ranks, manifest: Manifest) -> None:
        first, *others = ranks.gather(manifest)
        for rank, other in enumerate(others, 1):
            lines = differences(first, other, ("on rank 0", f"on rank {rank}"))
            if lines:
                raise ValueError(
                    f"ranks: expected the same run on all of them, got\n  {listed(lines)}"
                )

    def _begin(self, found: Manifest | None, manifest: Manifest) -> None:
        if found is None:
            write_manifest(self._folder, manifest)
        else:
            refuse_differences(found, manifest, self._folder)

    def _follow(self, ranks: Ranks, lock: _Lock, manifest: Manifest) -> None:
        lock.share()
        if ranks.rank > 0 and read_manifest(self._folder) != manifest:
            raise OSError(
                f"{self._folder}: expected a folder that all ranks share, got another one"
            )

    def _missing(self, ranks: Ranks, layout: Layout) -> list[Batch]:
        """Every batch that has to be drawn, the same list on each rank."""
        own = [b for b in ranks.share(list(layout.batches())) if not self._is_there(layout, b)]
        return sorted(batch for part in ranks.gather(own) for batch in part)

    def _is_there(self, layout: Layout, batch: Batch) -> bool:
        try:
            return read_batch(self._folder, layout, batch) is not None
        except ValueError as error:
            warnings.warn(f"fastddim: corrupt, so drawn again: {error}", stacklevel=2)
            return False

    def _draw_all(self, ranks: Ranks, layout: Layout, batches: Sequence[Batch]) -> None:
        """Draw while the batch before is being written."""
        pending: Future[int] | None = None
        steps = self._setup.plan.timesteps
        with self._bar(ranks, batches) as bar, ThreadPoolExecutor(1, "fastddim-writer") as writer:
            for batch in batches:
                samples = self._sample(batch, steps, self._update, self._callback).cpu()
                if pending is not None:
                    bar.update(pending.result())
                pending = writer.submit(self._write, layout, batch, samples)
            if pending is not None:
                bar.update(pending.result())

    def _write(self, layout: Layout, batch: Batch, samples: Tensor) -> int:
        write_batch(self._folder, layout, batch, samples)
        return batch.size

    def _sample(
        self, batch: Batch, steps: Tensor, update: Update, callback: Callback | None = None
    ) -> Tensor:
        setup = self._setup
        samples = sample(
            self._model,
            steps,
            schedule=self._schedule,
            **vars(update),
            order=setup.plan.order,
            denoised_fn=setup.denoised_fn,
            seed=self._seed,
            sample_offset=batch.first,
            shape=(batch.size, *self._layout.sample_shape),
            device=setup.device,
            dtype=setup.dtype,
            impl=_backend_name(setup),
            graph=setup.graph,
            callback=callback,
            check_finite=setup.check_finite,
            model_kwargs=setup.model_kwargs,
        )
        assert isinstance(samples, Tensor)
        return samples

    def _bar(self, ranks: Ranks, batches: Sequence[Batch]) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=sum(batch.size for batch in batches),
            desc="generating" if ranks.world == 1 else f"rank 0 of {ranks.world}",
            unit="sample",
            disable=not self._progress or ranks.rank > 0,
        )

    def _finish(self, layout: Layout) -> str:
        if self._merged is not None:
            merge(self._folder, self._merged)
        return recorded_digest(self._folder, layout)


class _Lock:
    """Keeps two runs out of one folder; the ranks of one run share it. Gone with its process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def take_alone(self) -> None:
        """
        Raises:
            BlockingIOError: another run has it, and does not end within some seconds.
        """
        self._take(fcntl.LOCK_EX)

    def share(self) -> None:
        """The same for a lock that other ranks may have too."""
        self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        error.errno, "another run is using this folder", str(self._path.parent)
                    ) from error
                time.sleep(0.05)
            except OSError as error:
                warnings.warn(
                    f"fastddim: {self._path}: this file system has no locks ({error.strerror}); "
                    "see to it that no other run uses the folder",
                    stacklevel=2,
                )
                return


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


def _checked_sample_shape(model: Model, sample_shape: Any) -> tuple[int, ...]:
    shape = adapter.own_sample_shape(model) if sample_shape is None else sample_shape
    if shape is None:
        raise ValueError(
            "sample_shape: expected the shape of one sample, since the model does not tell it; "
            "got None"
        )
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        raise TypeError(f"sample_shape: expected a sequence of integers, got {shape!r}")
    return tuple(check_int(f"sample_shape[{i}]", n, 1, 2**32) for i, n in enumerate(shape))


def _checked_batch_size(batch_size: Any, memory: Any) -> int | None:
    """None for "auto"."""
    if isinstance(batch_size, str):
        if batch_size != "auto":
            raise ValueError(f"batch_size: expected an integer or 'auto', got {batch_size!r}")
        if memory is not None:
            check_int("memory", memory, 1, 2**62)
        return None
    if memory is not None:
        raise ValueError(f"memory: expected None unless batch_size='auto', got {memory!r}")
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
    """With plain numbers, which a manifest can hold."""
    checked = update.checked(None, per_step=True)
    for name, value in vars(checked).items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, Tensor) for v in values):
            raise ValueError(f"{name}: expected a number or one a step, got a tensor")
    return checked


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backend_name(setup: Setup) -> str:
    return setup.backend.__name__.rpartition(".")[2]
