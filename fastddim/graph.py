"""CUDA graphs for the loop: capture, the inputs that a graph reads, and loops kept between calls.

A graph repeats kernels on addresses. So all that may change between two replays is copied into
tensors that stay (`Inputs`, and the loop's own buffers), and all that decides which kernels run is
part of a key (`ModelState`, `ambient`, `signature`); what is in neither is as it was at capture.
"""

from __future__ import annotations

import atexit
import threading
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastddim import transfer
from fastddim.adapter import Model
from fastddim.validation import check_choice

GRAPH_MODES = ("auto", True, False, "loop")

# The first call compiles and chooses kernels; the second finds them chosen.
WARM_UPS = 2

KEPT = 4
"""How many loops are kept between calls, and how many graphs a loop keeps."""

Value = TypeVar("Value")


class CaptureError(Exception):
    """Why something cannot be captured; the message is the reason alone."""


class Graph(Protocol):
    def replay(self) -> None: ...


def available(device: torch.device) -> bool:
    return device.type == "cuda"


def check_graph(graph: Any, device: torch.device, check_finite: bool) -> None:
    check_choice("graph", graph, GRAPH_MODES)
    check_outer_capture(graph, device, check_finite)
    if graph in ("auto", False):
        return
    if not available(device):
        raise ValueError(f"graph: {graph!r} needs CUDA graph capture, not available on {device}")
    if check_finite:
        raise ValueError(
            "graph: expected 'auto' or False with check_finite=True, which waits for the device at "
            f"every step, got {graph!r}"
        )


def check_outer_capture(graph: bool | str, device: torch.device, check_finite: bool) -> None:
    """Refuse what cannot go into a graph that the caller is capturing."""
    if (graph in ("auto", False) and not check_finite) or not transfer.captured(device):
        return
    if graph not in ("auto", False):
        raise ValueError(
            "graph: expected 'auto' or False while a CUDA graph is being captured, which cannot "
            f"hold the capture of another, got {graph!r}"
        )
    if check_finite:
        raise ValueError(
            "check_finite: expected False while a CUDA graph is being captured, since it waits for "
            "the device at every step, got True"
        )


_capturing = threading.RLock()
_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def capture(
    body: Callable[[], None],
    *,
    warm_up: Callable[[], None],
    device: torch.device,
    generators: Sequence[torch.Generator] = (),
) -> Graph:
    """The kernels that `body` launches, as a graph with memory of its own.

    Args:
        body: called once, while its kernels are recorded and do not run.
        warm_up: called before, and run; an error in it is the caller's.
        device: where.
        generators: those on the device that `body` draws from; a replay moves them on as `body`
            itself would.

    The states of these generators and of torch's own are left as they were.

    Raises:
        CaptureError: `body` does what a graph cannot hold.
    """
    # Casts that autocast made before the capture would be read from memory that it frees.
    with _capturing, _random_states_kept(device, generators), _uncached_autocast():
        return record(body, warm_up, device, generators)


def capture_if_possible(mode: bool | str, capture: Callable[[], Value]) -> Value | None:
    """What `capture` gives; None, with a warning, where it fails and `mode` is "auto".

    Raises:
        ValueError: it fails and the caller asked for a graph.
    """
    try:
        return capture()
    except CaptureError as error:
        if mode != "auto":
            raise ValueError(
                f"graph: expected 'auto' or False where capture fails ({error}), got {mode!r}"
            ) from error
        warnings.warn(f"fastddim: graph='auto' runs without a CUDA graph: {error}", stacklevel=2)
        return None


def record(
    body: Callable[[], None],
    warm_up: Callable[[], None],
    device: torch.device,
    generators: Sequence[torch.Generator],
) -> Graph:
    """`capture` on CUDA, without what it keeps in order around it."""
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream()
        side = _side_streams[device]
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    warm_up()
                # What the warm-up leaves cached is wanted by the graph's own pool.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                with _workspaces_of_its_own():
                    return _captured(body, device, generators)
        finally:
            current.wait_stream(side)


def _captured(
    body: Callable[[], None], device: torch.device, generators: Sequence[torch.Generator]
) -> torch.cuda.CUDAGraph:
    pool = torch.cuda.graph_pool_handle()
    graph = _begun(pool, generators)
    try:
        try:
            body()
        except BaseException:
            # Its error would only say that the body failed.
            with suppress(RuntimeError):
                _end(graph, device, pool, generators)
            raise
        _end(graph, device, pool, generators)
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}") from error
    return graph


def _begun(pool: Any, generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Later releases of torch register generators by themselves.
    if hasattr(graph, "register_generator_state"):
        for generator in generators:
            graph.register_generator_state(generator)
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    return graph


def _end(
    graph: torch.cuda.CUDAGraph,
    device: torch.device,
    pool: Any,
    generators: Sequence[torch.Generator],
) -> None:
    """`capture_end`, and what it leaves undone where it fails (aten/src/ATen/cuda/CUDAGraph.cpp):
    the allocator goes on with the pool, and before torch 2.13 the generators stay in the state of
    a capture until a later one ends well.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        trivial = _begun(torch.cuda.graph_pool_handle(), generators)
        torch.zeros(1, device=device)
        trivial.capture_end()
        raise


@contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """cuBLAS keeps a workspace for each stream; graphs captured on one would share it, and could
    not be replayed on two streams at a time.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _random_states_kept(
    device: torch.device, generators: Sequence[torch.Generator]
) -> Iterator[None]:
    states = [generator.get_state() for generator in generators]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def draws_inside(generators: Sequence[torch.Generator], device: torch.device) -> bool:
    """Whether a graph on `device` can hold the draws of these generators."""
    return device.type == "cuda" and all(g.device == device for g in generators)


class Inputs:
    """Copies of the tensors in `model_kwargs` that stay where they are.

    Raises:
        CaptureError: there are values that a graph would read on the host.
    """

    def __init__(self, model_kwargs: Mapping[str, Any], device: torch.device) -> None:
        leaves, structure = tree_flatten(dict(model_kwargs))
        self._leaves = [_static(leaf, device) for leaf in leaves]
        self.model_kwargs: dict[str, Any] = tree_unflatten(self._leaves, structure)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def load(self, model_kwargs: Mapping[str, Any]) -> None:
        """Take over the values of tensors with the same `signature`."""
        if not self._leaves:
            return
        for own, given in zip(self._leaves, tree_leaves(dict(model_kwargs)), strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)


def _static(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, np.ndarray):
        raise CaptureError("model_kwargs hold a NumPy array, whose values a graph would not follow")
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.device != device:
        raise CaptureError(
            f"model_kwargs hold a tensor on {leaf.device}, whose values a graph on {device} would "
            "not follow"
        )
    return leaf.detach().clone()


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def signature(model_kwargs: Mapping[str, Any]) -> Hashable:
    """All of `model_kwargs` but the values of tensors: what a graph of the model depends on."""
    if not model_kwargs:
        return None
    leaves, structure = tree_flatten(dict(model_kwargs))
    return repr(structure), tuple(_leaf_signature(leaf) for leaf in leaves)


def _leaf_signature(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return type(leaf), tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    # repr tells 0.0 from -0.0.
    return (type(leaf), repr(leaf)) if isinstance(leaf, _PLAIN) else id(leaf)


class ModelState:
    """What a graph depends on in the modules that models show: themselves, what a method is bound
    to, what a partial, a closure or an instance holds.

    It is read before every replay. Walking a tree of modules would take as long as the replay of a
    small model, so the modules are listed once, and again only after one came, went or changed
    places.
    """

    def __init__(self, *models: Any) -> None:
        self._models = models
        self._modules: list[nn.Module] = []
        self._links: list[int] = []

    def read(self) -> tuple[Hashable, Hashable]:
        """(where the parameters and buffers are, which modules train)."""
        roots = [module for model in self._models for module in _modules(model)]
        if self._links != _links(roots, self._modules):
            self._modules = list(dict.fromkeys(chain.from_iterable(m.modules() for m in roots)))
            self._links = _links(roots, self._modules)
        modules = self._modules
        mappings = chain(map(_parameters, modules), map(_buffers, modules))
        tensors = [tensor for tensor in _values(mappings) if tensor is not None]
        return (_addresses(tensors), tuple(map(_dtype, tensors))), tuple(map(_training, modules))


_parameters, _buffers = attrgetter("_parameters"), attrgetter("_buffers")
_children, _training, _dtype = map(attrgetter, ("_modules", "training", "dtype"))


def _links(roots: Iterable[nn.Module], modules: Iterable[nn.Module]) -> list[int]:
    """The identities from which a list of modules follows, as long as the list keeps them alive."""
    return list(map(id, chain(roots, _values(map(_children, modules)))))


def _values(mappings: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(_values_of, filter(None, mappings)))


_values_of = methodcaller("values")


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    with suppress(NotImplementedError, RuntimeError, ValueError):
        addresses = tuple(map(Tensor.data_ptr, tensors))
        if all(addresses):
            return addresses
    return tuple(map(_address, tensors))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError, ValueError):
        # A lazy parameter, or a subclass without memory of its own.
        return id(tensor)


def _modules(model: Any) -> Iterator[nn.Module]:
    if isinstance(model, nn.Module):
        yield model
        return
    if isinstance(model, types.MethodType):
        held: Iterable[Any] = [model.__self__]
    elif isinstance(model, partial):
        held = [model.func, *model.args, *model.keywords.values()]
    elif isinstance(model, types.FunctionType):
        held = [cell.cell_contents for cell in model.__closure__ or () if _is_filled(cell)]
    else:
        held = [v for v in getattr(model, "__dict__", {}).values() if isinstance(v, nn.Module)]
    for value in held:
        if value is not model:
            yield from _modules(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def ambient(device: torch.device) -> Hashable:
    """torch's settings that decide which kernels an operation runs."""
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
    )


class Turns:
    """Uses of the same buffers, one after the other whatever streams they are on.

    While the caller captures a graph there are no turns: a graph can wait for nothing outside it,
    nor can anything outside wait for a part of it. The caller orders its replays.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            # To wait for an event that was never recorded is not to wait.
            self._done = torch.cuda.Event()
            if not transfer.captured(device):
                self._done.record(self._stream)

    @contextmanager
    def turn(self, buffers: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        if self._device.type != "cuda" or transfer.captured(self._device):
            yield
            return
        if _handle_of_stream(self._device) != self._stream.cuda_stream:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._done)
            # Else memory freed after this turn could be given away before it is over.
            for buffer in buffers():
                buffer.record_stream(stream)
            self._stream = stream
        try:
            yield
        finally:
            self._done.record(self._stream)


def _handle_of_stream(device: torch.device) -> int:
    """The current stream as CUDA knows it, in a tenth of the time that torch's object takes."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


class Recent(OrderedDict[Hashable, Value]):
    """The last `KEPT` values put in or used."""

    def put(self, key: Hashable, value: Value) -> None:
        self.pop(key, None)
        self[key] = value
        while len(self) > KEPT:
            self.popitem(last=False)


class Shelf(Generic[Value]):
    """Prepared loops between calls, each there for one caller at a time and as long as its model
    lives.
    """

    def __init__(self) -> None:
        self._entries: Recent[tuple[weakref.ref[Any], Value]] = Recent()
        # Reentrant: what an entry lets go of may run code that comes back here.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, model: Model, key: Hashable) -> Value | None:
        """What was put back last under this model and key, now the caller's alone."""
        with self._lock:
            entry = self._entries.pop((_identity(model), key), None)
        return None if entry is None else entry[1]

    def put_back(self, model: Model, key: Hashable, value: Value) -> None:
        """Keep `value`, which must not hold the model; dropped where the model cannot be watched.

        The model of a bound method is the object that it is bound to.
        """
        owner = model.__self__ if isinstance(model, types.MethodType) else model
        full_key = (_identity(model), key)
        entries = self._entries
        with self._lock, suppress(TypeError):
            entries.put(
                full_key, (weakref.ref(owner, lambda _: entries.pop(full_key, None)), value)
            )

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


def _identity(model: Model) -> Hashable:
    if isinstance(model, types.MethodType):
        return id(model.__self__), model.__func__
    return id(model)


SHELF: Shelf[Any] = Shelf()


def clear() -> None:
    """Let go of all graphs that `sample` and `invert` keep for their next calls, and of their
    memory.
    """
    SHELF.clear()


# While CUDA is still there.
atexit.register(clear)
