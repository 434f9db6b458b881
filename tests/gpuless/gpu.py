"""A GPU that is none: the launchers that nvcc builds run on a stand-in for the CUDA runtime, and
what they launch runs on the interpreter of PTX.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from . import ptx

_SOURCE = Path(__file__).parent / "cudart.c"
_NAME = "libcudart.so.13"
_ILLEGAL_ADDRESS = 700


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
    """`memory` is what kernels may touch; `launches` and `error` tell what happened.

    The stand-in is built into `folder`; a launcher linked against it (`link_flags`) finds it there.
    A process has one runtime: the last FakeGpu made gets the launches.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / _NAME
        compiler = os.environ.get("CC", "cc")
        flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run(
            [compiler, *flags, f"-Wl,-soname,{_NAME}", str(_SOURCE), "-o", str(library)], check=True
        )
        self.link_flags = [f"-L{folder}", f"-l:{_NAME}", f"-Wl,-rpath,{folder}"]
        self.memory = ptx.Memory()
        self.launches: list[Launched] = []
        self.error: ptx.PtxError | None = None
        self.module: ptx.Module | None = None
        self._runtime = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._callback = _Callback(self._launch)
        self._runtime.fake_set_callback(self._callback)

    def load(self, launcher: Path, text: str) -> ctypes.CDLL:
        """Load a library of launchers, whose kernels are those of the PTX `text`."""
        self.module = ptx.parse(text)
        return ctypes.CDLL(str(launcher))

    def reset(self) -> None:
        self.memory, self.launches, self.error = ptx.Memory(), [], None

    def _launch(
        self, name: bytes, grid: Any, block: Any, arguments: Any, shared: int, stream: int | None
    ) -> int:
        assert self.module is not None
        kernel = self.module.kernels[name.decode()]
        values = [
            ctypes.string_at(arguments[i], size) for i, (_, size) in enumerate(kernel.parameters)
        ]
        shape = grid.sizes(), block.sizes()
        try:
            stats = ptx.run(self.module, kernel.name, *shape, values, self.memory, shared)
        except ptx.PtxError as error:
            self.error = error
            return _ILLEGAL_ADDRESS
        self.launches.append(Launched(kernel.name, *shape, shared, stream, stats))
        return 0
