"""The memory that interpreted threads see: its bounds, and the record of accesses.

A region of host memory is registered with its exact bounds. Within one launch every access is
checked against them, against its natural alignment, and against the accesses of all other threads.
"""

from __future__ import annotations

import bisect
import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .exact import UNSIGNED, Array

_LARGEST_ACCESS = 32
_NOBODY, _MANY, _ATOMIC = -1, -2, -3


class PtxError(Exception):
    """PTX that the interpreter refuses, or a launch that breaks a rule."""


class Block:
    """Bytes at an address, seen as rows of equal words so that one index fetches one access.

    The address is a multiple of the largest access.
    """

    def __init__(self, octets: np.ndarray) -> None:
        self._octets = octets
        self._tables: dict[tuple[int, int], np.ndarray] = {}

    @classmethod
    def poisoned(cls, size: int) -> Block:
        """Memory in its first state: all ones, which is NaN to every float type."""
        return cls(np.full(_rounded_up(size), 0xFF, np.uint8))

    def fill(self, content: bytes) -> None:
        self._octets[: len(content)] = np.frombuffer(content, np.uint8)

    def table(self, width: int, count: int) -> np.ndarray:
        """`[n, count]` words of `width` bytes."""
        key = width, count
        if key not in self._tables:
            self._tables[key] = self._octets.view(UNSIGNED[width]).reshape(-1, count)
        return self._tables[key]

    def load(self, offset: Array, width: int, count: int) -> np.ndarray:
        return self.table(width, count).take(offset // (width * count), axis=0)

    def store(self, offset: Array, words: np.ndarray) -> None:
        count = words.shape[-1]
        self.table(words.dtype.itemsize, count)[offset // (words.dtype.itemsize * count)] = words


def _rounded_up(size: int, multiple: int = _LARGEST_ACCESS) -> int:
    return -(-size // multiple) * multiple


@dataclass(eq=False)
class Region:
    address: int
    size: int
    name: str
    writable: bool = True
    owner: Any = None  # keeps the memory alive

    def __post_init__(self) -> None:
        # Whole units around the region are mapped, never touched outside of it.
        self.origin = self.address - self.address % _LARGEST_ACCESS
        mapped = _rounded_up(self.address + self.size - self.origin)
        octets = np.ctypeslib.as_array((ctypes.c_uint8 * mapped).from_address(self.origin))
        self.block = Block(octets)

    @property
    def end(self) -> int:
        return self.address + self.size


class Memory:
    """The regions of host memory that kernels may touch."""

    def __init__(self) -> None:
        self._regions: list[Region] = []

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    def add(
        self, address: int, size: int, name: str, writable: bool = True, owner: Any = None
    ) -> None:
        if size < 0:
            raise ValueError(f"size: expected a value >= 0, got {size}")
        if size == 0:
            return
        region = Region(address, size, name, writable, owner)
        for other in self._regions:
            if address < other.end and other.address < region.end:
                raise ValueError(f"{name}: expected a region of its own, overlaps {other.name}")
        bisect.insort(self._regions, region, key=lambda r: r.address)

    def add_tensor(self, tensor: torch.Tensor, name: str, writable: bool = True) -> None:
        """Registers the bytes from the first to the last element of a view, and no others."""
        if tensor.numel() == 0:
            return
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in steps)
        size = elements * tensor.element_size()
        self.add(tensor.data_ptr(), size, name, writable, owner=tensor)


class Shadow:
    """A record of the thread that wrote and the thread that read each granule of a memory since the
    last synchronisation.

    A granule is as wide as the narrowest access so far, so the record is exact to the byte.
    """

    def __init__(self, origin: int, size: int) -> None:
        self._origin, self._granule = origin, _LARGEST_ACCESS
        count = _rounded_up(size) // self._granule
        self._writer = np.full(count, _NOBODY, np.int32)
        self._reader = np.full(count, _NOBODY, np.int32)

    def clear(self, start: int, stop: int) -> None:
        """Forgets the accesses to [start, stop), multiples of the largest access."""
        rows = slice(start // self._granule, stop // self._granule)
        self._writer[rows] = _NOBODY
        self._reader[rows] = _NOBODY

    def read(self, offset: np.ndarray, size: int, thread: np.ndarray, coherent: bool) -> None:
        for granule in self._granules(offset, size):
            writer = self._writer[granule]
            written = writer != _NOBODY
            if not coherent and written.any():
                raise PtxError("race: a non-coherent load of bytes that this launch wrote")
            _refuse(written & (writer != thread), thread, writer, "reads", "wrote")
            before = self._reader[granule]
            self._reader[granule] = thread
            shared = (before != _NOBODY) & (before != thread)
            shared |= self._reader[granule] != thread
            if shared.any():
                self._reader[granule[shared]] = _MANY

    def write(self, offset: np.ndarray, size: int, thread: np.ndarray) -> None:
        for granule in self._granules(offset, size):
            reader, writer = self._reader[granule], self._writer[granule]
            read = (reader != _NOBODY) & (reader != thread)
            _refuse(read, thread, reader, "overwrites", "read")
            written = (writer != _NOBODY) & (writer != thread)
            _refuse(written, thread, writer, "overwrites", "wrote")
            self._writer[granule] = thread
            now = self._writer[granule]
            _refuse(now != thread, thread, now, "overwrites", "wrote")

    def update(self, offset: np.ndarray, size: int, thread: np.ndarray) -> None:
        """Records atomic operations, which may meet one another and nothing else."""
        for granule in self._granules(offset, size):
            reader, writer = self._reader[granule], self._writer[granule]
            read = (reader != _NOBODY) & (reader != thread)
            _refuse(read, thread, reader, "changes", "read")
            written = (writer != _NOBODY) & (writer != _ATOMIC) & (writer != thread)
            _refuse(written, thread, writer, "changes", "wrote")
            self._writer[granule] = _ATOMIC

    def _granules(self, offset: np.ndarray, size: int) -> Iterator[np.ndarray]:
        if size < self._granule:
            self._refine(size)
        first = offset // self._granule
        return (first + i for i in range(size // self._granule))

    def _refine(self, size: int) -> None:
        factor = self._granule // size
        self._writer = np.repeat(self._writer, factor)
        self._reader = np.repeat(self._reader, factor)
        self._granule = size


def _refuse(
    conflict: np.ndarray, thread: np.ndarray, other: np.ndarray, deed: str, done: str
) -> None:
    if conflict.any():
        i = int(np.argmax(conflict))
        known = int(other[i])
        name = "others" if known in (_MANY, _ATOMIC) else f"thread {known}"
        raise PtxError(f"race: thread {int(thread[i])} {deed} what {name} {done}")


def require_aligned(address: Array, size: int) -> None:
    misaligned = np.bitwise_and(address, address.dtype.type(size - 1))
    if misaligned.any():
        first = np.atleast_1d(address)[np.argmax(np.atleast_1d(misaligned) != 0)]
        raise PtxError(f"misaligned access of {size} bytes at {int(first):#x}")


@dataclass
class GlobalMemory:
    """The global memory of one launch."""

    regions: list[Region]
    bytes_read: Counter[str] = field(default_factory=Counter)
    bytes_written: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.regions.sort(key=lambda r: r.address)
        self._starts = [r.address for r in self.regions]
        self._shadows: dict[Region, Shadow] = {}

    def load(
        self, address: Array, width: int, count: int, thread: np.ndarray, coherent: bool
    ) -> np.ndarray:
        """`[threads, count]` words; `[count]` words where all threads read one address."""
        size = width * count
        require_aligned(address, size)
        words = np.empty((*np.shape(address), count), UNSIGNED[width])
        for region, lanes in self._split(address, size, "load"):
            offset = (address[lanes] - np.uint64(region.origin)).astype(np.int64)
            words[lanes] = region.block.load(offset, width, count)
            threads = thread if np.ndim(address) == 0 else thread[lanes]
            self.bytes_read[region.name] += size * len(threads)
            if region.writable:
                offset = np.broadcast_to(offset, threads.shape)
                self._shadow(region).read(offset, size, threads, coherent)
        return words

    def store(self, address: Array, words: np.ndarray, thread: np.ndarray) -> None:
        size = words.dtype.itemsize * words.shape[-1]
        require_aligned(address, size)
        address = np.broadcast_to(address, thread.shape)
        for region, lanes in self._split(address, size, "store"):
            if not region.writable:
                raise PtxError(f"store into {region.name}, which is read-only")
            offset = (address[lanes] - np.uint64(region.origin)).astype(np.int64)
            self._shadow(region).write(offset, size, thread[lanes])
            region.block.store(offset, words[lanes])
            self.bytes_written[region.name] += size * len(offset)

    def _shadow(self, region: Region) -> Shadow:
        if region not in self._shadows:
            self._shadows[region] = Shadow(region.origin, region.end - region.origin)
        return self._shadows[region]

    def _split(self, address: Array, size: int, deed: str) -> Iterator[tuple[Region, Any]]:
        """Each region that is accessed, with the lanes that access it."""
        lowest = int(address.min())
        i = bisect.bisect_right(self._starts, lowest) - 1
        if i >= 0 and int(address.max()) + size <= self.regions[i].end:
            yield self.regions[i], ...
            return
        index = np.searchsorted(np.array(self._starts, np.uint64), address, side="right") - 1
        last = np.array([r.end - size for r in self.regions] or [0], np.uint64)
        outside = (index < 0) | (address > last[index])
        if outside.any():
            self._out_of_bounds(int(np.atleast_1d(address)[np.argmax(outside)]), size, deed)
        for i in np.unique(index):
            yield self.regions[i], index == i

    def _out_of_bounds(self, address: int, size: int, deed: str) -> None:
        message = f"{deed} of {size} bytes at {address:#x} out of bounds"
        if self.regions:
            near = min(
                self.regions, key=lambda r: abs(address - r.address - r.size // 2) - r.size // 2
            )
            message += f": offset {address - near.address} of {near.size} bytes of {near.name}"
        raise PtxError(message)


def _one_of_equal(offset: np.ndarray, words: np.ndarray) -> Any:
    """One thread for each place where all threads of a store put the same words, else all of them.

    Triton lets all threads that hold a number store it: whichever is the last, memory is the same.
    """
    _, first, place = np.unique(offset, return_index=True, return_inverse=True)
    return first if (words == words[first][place]).all() else ...


class RowMemory:
    """Memory with one row for each owner: shared memory of blocks, local memory of threads."""

    def __init__(self, name: str, rows: int, size: int, races: bool) -> None:
        self.name, self.size, self.stride = name, size, _rounded_up(size)
        self.block = Block.poisoned(rows * self.stride)
        self.shadow = Shadow(0, rows * self.stride) if races else None

    def load(
        self, address: Array, width: int, count: int, row: np.ndarray, thread: np.ndarray
    ) -> np.ndarray:
        offset = self._offset(address, width * count, row)
        if self.shadow:
            self.shadow.read(offset, width * count, thread, coherent=True)
        return self.block.load(offset, width, count)

    def store(self, address: Array, words: np.ndarray, row: np.ndarray, thread: np.ndarray) -> None:
        size = words.dtype.itemsize * words.shape[-1]
        offset = self._offset(address, size, row)
        if self.shadow:
            one = _one_of_equal(offset, words)
            self.shadow.write(offset[one], size, thread[one])
        self.block.store(offset, words)

    def add(self, address: Array, values: np.ndarray, row: np.ndarray, thread: np.ndarray) -> None:
        """Atomic additions."""
        size = values.dtype.itemsize
        offset = self._offset(address, size, row)
        if self.shadow:
            self.shadow.update(offset, size, thread)
        np.add.at(self.block.table(size, 1)[:, 0], offset // size, values)

    def synchronise(self, row: int) -> None:
        if self.shadow:
            self.shadow.clear(row * self.stride, (row + 1) * self.stride)

    def _offset(self, address: Array, size: int, row: np.ndarray) -> np.ndarray:
        require_aligned(address, size)
        if int(address.max()) + size > self.size:
            raise PtxError(
                f"access of {size} bytes at {int(address.max())} out of bounds of "
                f"{self.size} bytes of {self.name} memory"
            )
        return address.astype(np.int64) + row * self.stride
