"""Fills Triton's cache on a machine without a GPU: `python -m gpucheck.prewarm ROOT CAPABILITY`.

Compiles the kernels that the check and the GPU tests launch, through Triton's own
`JITFunction.run`. So the keys of the cache are those of the GPU machine, if Triton has the same
version there and no TRITON_ variable is set except those of the cache. `prepare.py` sets the
environment.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpucheck.cases import CASES, correctly_rounded, results
from gpucheck.device import on_device
from gpucheck.measures import DTYPES, MEBIBYTE, MEBIBYTES
from gpucheck.stages.smoke import LOOP, STEPS
from gpucheck.update import BATCH

# The value of an H100; Triton compares the needs of a kernel with it.
SHARED_BYTES = 232448
WARP = 32

ON_TRITON: dict[str, Any] = {"device": "cpu", "impl": "triton", "graph": False}

Launch = Callable[[], Any]


def stand_in(capability: int) -> Any:
    """A driver for Triton that compiles and builds launchers, and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    class Utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_BYTES}

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            """Module, function, registers, spills, most threads."""
            return 1, 1, WARP, 0, 1024

    def launcher(source: Any, metadata: Any) -> Callable[..., None]:
        driver.CudaLauncher(source, metadata)
        return lambda *_: None

    # This builds the module that the real driver loads first.
    driver.CudaUtils()
    return types.SimpleNamespace(
        utils=Utils,
        launcher_cls=launcher,
        get_current_target=lambda: GPUTarget("cuda", capability, WARP),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        map_python_to_cpp_type=driver.ty_to_cpp,
    )


def tests_of(root: Path) -> None:
    """Make `tests` of the checkout importable, and nothing else of the checkout."""
    package = types.ModuleType("tests")
    package.__path__ = [str(root / "tests")]
    sys.modules["tests"] = package


def check_launches(backend: Any) -> Iterator[Launch]:
    """Launches of the stages "smoke" and "bandwidth"."""
    import fastddim
    from fastddim import philox
    from fastddim.plan import Row

    update_out = on_device(backend.update_out, torch.device("cpu"))
    for case in CASES.values():
        yield partial(results, update_out, case)
    yield partial(fastddim.sample, correctly_rounded, STEPS, **LOOP, **ON_TRITON)
    table, row = torch.zeros(1, len(Row._fields)), torch.zeros(1, dtype=torch.int64)
    for dtype in (getattr(torch, name) for name in DTYPES):
        for mebibytes in MEBIBYTES:
            size = torch.empty(0, dtype=dtype).element_size()
            shape = (BATCH, mebibytes * MEBIBYTE // size // BATCH)
            for keys in (None, philox.make_keys(7, BATCH)):
                # The tensors are never touched, so they take no memory.
                x, model_output, out = (torch.empty(shape, dtype=dtype) for _ in range(3))
                yield partial(
                    backend.update_out,
                    x,
                    model_output,
                    table,
                    row,
                    noise=None,
                    keys=keys,
                    out=out,
                    x_0=None,
                    model_input=None,
                )


def test_launches(backend: Any) -> Iterator[Launch]:
    """Launches of tests/test_gpu.py."""
    import fastddim
    from fastddim import philox

    cases = importlib.import_module("tests.support.gpuless.cases")
    updates = importlib.import_module("tests.support.updates")
    models = importlib.import_module("tests.support.models")
    cpu = torch.device("cpu")
    update_out, normal_out, advance = (
        on_device(function, cpu)
        for function in (backend.update_out, backend.normal_out, backend.advance)
    )
    for shape, eta in (((3, 3, 16, 16), 0.0), ((3, 3, 16, 16), 1.0), ((2, 3, 8, 8), 1.0)):
        yield partial(
            fastddim.sample, models.elementwise_model, STEPS, shape=shape, eta=eta, **ON_TRITON
        )
    for dtype in updates.DTYPES:
        for layout in updates.LAYOUTS[:-1]:
            generator = torch.Generator().manual_seed(1)
            case = updates.make_case(
                generator, (3, 5, 7, 3), dtype=dtype, layout=layout, noise="keyed"
            )
            out = updates.poisoned_like(case.x)[0]
            yield partial(normal_out, case.keys, philox.LATENTS, out)
    for count in (1, 31, 256, 3000):
        sizes = (count + 3, 9, count)
        tensors = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        yield partial(advance, *tensors)
    generator = torch.Generator().manual_seed(2)
    large = updates.make_case(generator, (8, 3, 256, 257), noise="keyed")
    stream = updates.make_case(generator, (64, 3, 64, 64))
    for case in (large, stream, *map(cases.update_case, cases.UPDATES)):
        yield partial(updates.run, update_out, case)
        yield partial(cases.run_bare, update_out, case)
        yield partial(updates.run, update_out, case, in_place=True)
    for case in map(cases.update_case, cases.LONG):
        yield partial(cases.run_bare, update_out, case)
    yield from launches_of_fits(backend)


def launches_of_fits(backend: Any) -> Iterator[Launch]:
    """Launches of tests/test_gpu.py that make rows from data, and gradients."""
    fits = importlib.import_module("tests.support.gpuless.fits")
    updates = importlib.import_module("tests.support.updates")
    cpu = torch.device("cpu")
    rescale_rows = on_device(backend.rescale_rows, cpu)
    backward_out = on_device(torch.ops.fastddim.triton_backward_out, cpu)
    for name in fits.FIT_CASES:
        yield partial(fits.fitted, rescale_rows, *fits.fit_case(name))
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(5)
        case = updates.make_case(generator, (3, 3, 512, 511), dtype=dtype, guided=True)
        yield partial(fits.fitted, rescale_rows, case, fits.FITS["both"])
    for name in fits.BACKWARD_CASES:
        yield partial(fits.gradients, backward_out, *fits.backward_case(name))


def main() -> None:
    from triton import knobs
    from triton.runtime.driver import driver

    from fastddim.backends import triton as backend

    root, capability = Path(sys.argv[1]), int(sys.argv[2])
    counts = {"kernels": 0, "compiled": 0}

    def listen(*, cache_hit: bool, **_: Any) -> None:
        counts["kernels"] += 1
        counts["compiled"] += not cache_hit

    knobs.compilation.listener = listen
    driver.set_active(stand_in(capability))
    backend.unavailable = lambda device: None
    tests_of(root)
    start = time.monotonic()
    with torch.no_grad():
        for launches in (check_launches, test_launches):
            for launch in launches(backend):
                launch()
            seconds = time.monotonic() - start
            print(f"{launches.__name__}: {counts}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
