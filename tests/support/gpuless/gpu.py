"""A simulated GPU: launchers that nvcc built run on a stand-in for the CUDA runtime, and the
launched kernels run on the interpreter of PTX.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from . import ptx

_HERE = Path(__file__).parent
_ILLEGAL_ADDRESS, _UNKNOWN = 700, 999  # cudaError_t
_serial = itertools.count()


class Launched(NamedTuple):
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int | None
    stats: ptx.Launch


class _Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))

    def sizes(self) -> tuple[int, int, int]:
        return self.x, self.y, self.z


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    _Dim3,
    _Dim3,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.c_void_p,
)


class FakeGpu:
    """Runs the kernels of one launcher library.

    Each has a runtime of its own, built into `folder`. Its name and its symbols' version are ours:
    a launcher linked with `link_flags` finds this one, also in a process that holds the real one.

    Attributes:
        memory: what kernels may touch.
        launches: those that ran to their end.
        error: why the last launch that failed did (codes 700 and 999).
        module: the kernels; another PTX of the same source may be put in its place.
        executes: False where only launches are looked at, which then do nothing.
    """

    def __init__(self, folder: Path) -> None:
        name = f"libcudart_stand_in_{next(_serial)}.so"
        self.library = folder / name
        flags = ["-xc", "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        link = [f"-Wl,-soname,{name}", f"-Wl,--version-script={_HERE / 'cudart.map'}"]
        compiler = os.environ.get("CXX", "c++")
        source = str(_HERE / "cudart.c")
        subprocess.run([compiler, *flags, source, *link, "-o", str(self.library)], check=True)
        self.link_flags = ["-Wl,--no-as-needed", str(self.library)]
        self.module: ptx.Module | None = None
        self.executes = True
        self.reset()
        self._runtime = ctypes.CDLL(str(self.library))
        self._callback = _Callback(self._launch)
        self._runtime.stand_in_set_callback(self._callback)

    def reset(self) -> None:
        self.memory = ptx.Memory()
        self.launches: list[Launched] = []
        self.error: ptx.PtxError | None = None

    def disconnect(self) -> None:
        """Makes every launch from here on fail as it does without a driver."""
        self._runtime.stand_in_set_callback(None)

    def load(self, launcher: Path, text: str) -> ctypes.CDLL:
        """Load a library of launchers, whose kernels are those of the PTX `text`."""
        self.module = ptx.parse(text)
        return ctypes.CDLL(str(launcher))

    def _launch(
        self, name: bytes, grid: Any, block: Any, arguments: Any, shared: int, stream: int | None
    ) -> int:
        # An exception cannot pass through C: it must become a code, whatever it is.
        try:
            launched = self._run(name.decode(), grid.sizes(), block.sizes(), arguments, shared)
        except ptx.PtxError as error:
            self.error = error
            return _ILLEGAL_ADDRESS
        except Exception as error:
            self.error = ptx.PtxError(f"the interpreter failed: {error!r}")
            self.error.__cause__ = error
            return _UNKNOWN
        self.launches.append(launched._replace(stream=stream))
        return 0

    def _run(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Any,
        shared: int,
    ) -> Launched:
        module = self.module
        if module is None or name not in module.kernels:
            raise ptx.PtxError(f"{name}: no such kernel in the PTX")
        sizes = [size for _, size in module.kernels[name].parameters]
        values = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
        stats = ptx.Launch(Counter(), Counter(), Counter())
        if self.executes:
            stats = ptx.run(module, name, grid, block, values, self.memory, shared)
        return Launched(name, grid, block, shared, None, stats)
