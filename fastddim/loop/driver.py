"""Questions about a capture that torch does not answer, put to CUDA's driver."""

from __future__ import annotations

import ctypes
import functools

# Every driver for CUDA 12.3 or later has both functions. The third version of the query is called,
# since the earlier ones refuse a graph with programmatic dependencies.
_LIBRARY = "libcuda.so.1"
_ACTIVE = 1


def captured_nodes(stream: int) -> int | None:
    """The number of nodes that are now in the graph under capture on a stream.

    Args:
        stream: the stream as CUDA knows it.

    Returns:
        None where it is unknown: without such a driver, or where nothing is being captured.
    """
    library = _library()
    if library is None:
        return None
    status, count, found = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
    graph, unused = ctypes.c_void_p(), [ctypes.c_void_p() for _ in range(2)]
    error = library.cuStreamGetCaptureInfo_v3(
        ctypes.c_void_p(stream),
        ctypes.byref(status),
        ctypes.byref(ctypes.c_uint64()),
        ctypes.byref(graph),
        *map(ctypes.byref, unused),
        ctypes.byref(found),
    )
    if error or status.value != _ACTIVE:
        return None
    error = library.cuGraphGetNodes(graph, None, ctypes.byref(count))
    return None if error else count.value


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
        return library if library.cuStreamGetCaptureInfo_v3 else None
    except (OSError, AttributeError):
        return None
