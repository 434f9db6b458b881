"""What tests share: the paper's formulas written out in NumPy float64, models, and probes.

Nothing here uses the package's own arithmetic, so that agreement means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastddim import backends

CPU_IMPLS = [
    name
    for name, backend in backends.BACKENDS.items()
    if backend.unavailable(torch.device("cpu")) is None
]

# Unit roundoff of a rounding to nearest.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def column(value: Any, like: np.ndarray) -> np.ndarray:
    """A number, or `[B]` shaped to broadcast over `[B, …]`, in float64."""
    array = np.asarray(value, dtype=np.float64)
    return array.reshape(array.shape + (1,) * (like.ndim - 1)) if array.ndim else array


def ddim_step(
    x: np.ndarray,
    m: np.ndarray,
    a: Any,
    p: Any,
    *,
    eta: Any = 0.0,
    variance: str = "small",
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = False,
    z: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(x_prev, x_0): equations 9, 12 and 16 and appendix D.3 of arXiv 2010.02502 as printed."""
    a, p, eta = (column(v, x) for v in (a, p, eta))
    if prediction == "epsilon":
        eps = m
        x_0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    elif prediction == "sample":
        x_0 = m
        eps = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    else:
        # v = √ā·ε − √(1−ā)·x_0 (arXiv 2202.00512), solved together with x = √ā·x_0 + √(1−ā)·ε.
        x_0 = np.sqrt(a) * x - np.sqrt(1 - a) * m
        eps = np.sqrt(a) * m + np.sqrt(1 - a) * x
    if clip is not None:
        x_0 = np.minimum(np.maximum(x_0, -clip), clip)
    if rederive_eps:
        eps = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    sigma = eta * np.sqrt((1 - p) / (1 - a)) * np.sqrt(np.maximum(1 - a / p, 0.0))
    noise = sigma if variance == "small" else eta * np.sqrt(1 - a / p) * (p < 1)
    direction = np.sqrt(np.maximum(1 - p - sigma**2, 0.0))
    return np.sqrt(p) * x_0 + direction * eps + noise * z, x_0


def guided(output: np.ndarray, scale: Any) -> np.ndarray:
    """u + g·(c − u) of a doubled output, unconditional half first (arXiv 2207.12598)."""
    u, c = np.split(output, 2)
    return u + column(scale, u) * (c - u)


def ddim_sample(
    model: Callable[[np.ndarray, int], np.ndarray],
    x: np.ndarray,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    noise: np.ndarray | None = None,
    **update: Any,
) -> np.ndarray:
    """Eq. 12 along `timesteps`, ᾱ = 1 after the last; `noise` is `[S, B, …]`."""
    for s, t in enumerate(timesteps):
        p = alphas_cumprod[timesteps[s + 1]] if s + 1 < len(timesteps) else 1.0
        z = 0.0 if noise is None else noise[s]
        x, _ = ddim_step(x, model(x, t), alphas_cumprod[t], p, z=z, **update)
    return x


def linear_alphas(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """ᾱ of DDPM's linear β, one factor at a time."""
    alphas, product = [], 1.0
    for i in range(T):
        product *= 1.0 - (start + (end - start) * i / max(T - 1, 1))
        alphas.append(product)
    return np.array(alphas)


def philox_words(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as in Salmon et al. (SC 2011), in unbounded Python integers."""
    c = list(counter)
    k = list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high % 2**32, (low >> 32) ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0], c[1], c[2], c[3]


def uniform_of(word: int) -> np.float32:
    """u = r·2⁻³² + 2⁻³³ with every operation rounded to float32."""
    return np.float32(np.float32(word) * np.float32(2.0**-32)) + np.float32(2.0**-33)


def normals_of(words: Sequence[int]) -> list[float]:
    """Box–Muller in float64 on the float32 uniforms of four words."""
    u = [float(uniform_of(w)) for w in words]
    z = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius = math.sqrt(-2 * math.log(first))
        z += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    return z


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def elementwise_model(x: Tensor, t: Tensor) -> Tensor:
    """Correctly rounded operations only, so that its bits do not depend on an element's place.

    (A vectorised tanh or exp may differ in the last bit from the one that handles the remainder.)
    """
    time = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * (1 / 1024)
    return x * 0.75 / (1 + x * x) + (time - 0.5) * 0.25


def elementwise_numpy(x: np.ndarray, t: int) -> np.ndarray:
    return x * 0.75 / (1 + x * x) + (t / 1024 - 0.5) * 0.25


class SmallNet(nn.Module):
    """A smooth network with fixed weights, [B, C, H, W] → [B, outputs, H, W], that uses t."""

    def __init__(self, channels: int = 3, outputs: int | None = None, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        outputs = channels if outputs is None else outputs
        weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = torch.sin(t.to(x.dtype) / 100)[:, None, None, None] * self.bias[:, None, None]
        return torch.tanh(nn.functional.conv2d(x, self.weight, padding=1) + time)


class GaussianModel:
    """The exact ε for data N(mean, scale²·I): E[ε | x_t] under the schedule."""

    def __init__(self, alphas_cumprod: Tensor, mean: float = 0.5, scale: float = 0.3) -> None:
        self.alphas_cumprod, self.mean, self.scale = alphas_cumprod, mean, scale

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.scale**2 + 1 - a)


class NoSync(TorchDispatchMode):
    """Fails where work would wait for the device, or leave it.

    Reading a value on the host, data-dependent shapes, a tensor made from host numbers, and a copy
    to another device.
    """

    _FORBIDDEN = frozenset(
        {
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.item,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.masked_select,
            torch.ops.aten._unique2,
            torch.ops.aten.unique_dim,
            torch.ops.aten.repeat_interleave,
            torch.ops.aten.lift_fresh,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls += 1
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        if func.overloadpacket in self._FORBIDDEN:
            raise AssertionError(f"host synchronisation in the loop: {func}")
        if func.overloadpacket is torch.ops.aten.index and any(
            v.dtype in (torch.bool, torch.uint8) for v in tensors[1:]
        ):
            raise AssertionError(f"host synchronisation in the loop: {func} by a mask")
        if len({v.device for v in tensors}) > 1:
            raise AssertionError(f"copy between devices in the loop: {func}")
        device = kwargs.get("device")
        if device is not None and any(v.device.type != torch.device(device).type for v in tensors):
            raise AssertionError(f"copy between devices in the loop: {func} to {device}")
        return func(*args, **kwargs)


class LiveStorage(TorchDispatchMode):
    """Counts the most bytes alive at once among the storages made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


class RecordedGraph(NoSync):
    """A captured graph as it would be on CUDA, on any device: the operators of `body` and the very
    tensors that they touched, repeated by `replay` into the same memory without any Python of
    `body`.

    Replays of random operators draw from their generators again, as CUDA's do. What `body`
    computes while it is recorded is NaN afterwards, since a capture computes nothing.
    """

    def __init__(self, body: Callable[[], None]) -> None:
        super().__init__()
        self._recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        with self:
            body()
        for *_, made in self._recorded:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = {v.untyped_storage()._cdata for v in _tensors((args, kwargs))}
        made = [v for v in _tensors(result) if v.untyped_storage()._cdata not in given]
        self._recorded.append((func, args, kwargs or {}, made))
        return result

    @property
    def operators(self) -> list[str]:
        return [func._schema.name for func, *_ in self._recorded]

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self._recorded:
                given = {v.untyped_storage()._cdata for v in _tensors((args, kwargs))}
                result = _tensors(func(*args, **kwargs))
                again = [v for v in result if v.untyped_storage()._cdata not in given]
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [v for v in tree_flatten(tree)[0] if isinstance(v, Tensor)]


class OtherProcessor(TorchDispatchMode):
    """A CPU on which torch's vector library rounds the last bit of a root, power, exponential,
    logarithm, sine or cosine differently.

    Intel's and AMD's are such, of which a test machine is only one. Some differ in long vectors and
    not in short ones.
    """

    FUNCTIONS = frozenset({"sqrt", "rsqrt", "pow", "exp", "log", "sin", "cos"})

    def __init__(self, shortest: int = 2) -> None:
        """
        Args:
            shortest: the number of elements from which it differs.
        """
        super().__init__()
        self.shortest = shortest
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        # Squares are products, which every processor rounds correctly.
        exact = name not in self.FUNCTIONS or (name == "pow" and args[1] not in (0.5, -0.5))
        if exact or result.numel() < self.shortest:
            return result
        self.calls += 1
        bits = result.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[result.element_size()])
        kept = (result == 0) | (result == 1) | ~result.isfinite()
        return result.copy_(torch.where(kept, bits, bits ^ 1).view(result.dtype))
