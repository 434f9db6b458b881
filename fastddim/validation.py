"""Checks of public arguments. Each error names the argument, the expectation and the value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fastddim.transforms import bare

STATE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_choice(
    name: str, value: Any, choices: Sequence[Any], synonyms: Mapping[Any, Any] | None = None
) -> Any:
    """One of the choices, which a synonym is replaced by."""
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    if synonyms is not None and isinstance(value, str) and value in synonyms:
        return synonyms[value]
    raise ValueError(
        f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}"
        f"{_suggestion(value, choices, synonyms or {})}"
    )


def _suggestion(value: Any, choices: Sequence[Any], synonyms: Mapping[Any, Any]) -> str:
    """The choice that a mistyped word is close to."""
    if not isinstance(value, str) or torch.compiler.is_compiling():
        return ""
    import difflib

    words = [choice for choice in (*choices, *synonyms) if isinstance(choice, str)]
    close = difflib.get_close_matches(value.lower().replace("-", "_"), words, n=1, cutoff=0.75)
    return f"; did you mean {synonyms.get(close[0], close[0])!r}?" if close else ""


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high]; Python and NumPy integers are accepted, booleans are not."""
    # A test against an abstract class takes longer than all of this.
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {_described(value)}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}], got {number}")
    return number


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_described(value)}")
    return value


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """A finite real number in [low, high], or in (low, high] if `open_low`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {_described(value)}")
    try:
        number = float(value)
    except OverflowError:  # from an integer
        number = math.inf
    # NaN fails these comparisons, and `torch.compile` has them for a number that may change.
    inside = low <= number <= high and -math.inf < number < math.inf
    if not inside or (open_low and number == low):
        raise ValueError(f"{name}: expected {_interval(low, high, open_low)}, got {number}")
    return number


def readable(values: Tensor) -> bool:
    """Tell whether values can be read without waiting for a device, breaking a traced graph or
    losing a derivative. A subclass, such as that of fake tensors, may have no values.
    """
    plain = type(values) is Tensor and values.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and bare(values)


def check_coefficient(
    name: str, value: Any, batch: int | None, low: float = -math.inf, high: float = math.inf
) -> float | Tensor:
    """A number, or a float64 tensor `[batch]`, inside [low, high].

    The result has no derivatives; a 0-dim tensor that has some stays a tensor. The values of a
    tensor on an accelerator are not read, since that would wait for the device.
    """
    if not isinstance(value, Tensor):
        return check_number(name, value, low, high)
    if value.ndim == 0 and batch is not None and not readable(value):
        value = value.expand(batch)
    elif value.ndim == 0 and value.device.type == "cpu":
        return _check_scalar(name, value, low, high)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected a real tensor, got dtype {value.dtype}")
    if value.ndim != 1 or (batch is not None and value.shape[0] != batch):
        expected = "[B]" if batch is None else f"[{batch}]"
        raise ValueError(
            f"{name}: expected a number or a tensor {expected}, got shape {tuple(value.shape)}"
        )
    values: Tensor = value.detach().to(torch.float64)
    if readable(values):
        for i, v in enumerate(values.tolist()):
            check_number(f"{name}[{i}]", v, low, high)
    return values


def _check_scalar(name: str, value: Tensor, low: float, high: float) -> float | Tensor:
    """A number, or a 0-dim tensor if the value has derivatives."""
    scalar = value.detach()
    if bare(scalar):
        number = check_number(name, scalar.item(), low, high)
        if bare(value):
            return number
    return scalar.double()


def with_derivatives(checked: float | Tensor, given: Any) -> float | Tensor:
    """A checked coefficient, with the derivatives of the given one."""
    if not isinstance(checked, Tensor) or bare(given):
        return checked
    derived: Tensor = given.expand_as(checked).double()
    return derived


def check_state(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_described(value)}")
    if value.dtype not in STATE_DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor, got dtype {value.dtype}")
    if value.ndim < 1:
        raise ValueError(f"{name}: expected a batch [B, ...], got a tensor without dimensions")
    return value


def check_dtype(name: str, value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {_described(value)}")
    if value not in STATE_DTYPES:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(str, STATE_DTYPES))}, got {value}"
        )
    return value


def check_like(name: str, value: Any, like_name: str, like: Tensor) -> Tensor:
    """A floating-point tensor with the shape and device of `like`."""
    check_state(name, value)
    if value.shape != like.shape:
        raise ValueError(
            f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, "
            f"got {tuple(value.shape)}"
        )
    return check_device(name, value, like_name, like.device)


def check_mask(name: str, value: Any, state: Tensor) -> Tensor:
    """A floating-point or boolean tensor on the state's device that broadcasts to its shape."""
    if not isinstance(value, Tensor) or not (
        value.is_floating_point() or value.dtype == torch.bool
    ):
        raise TypeError(
            f"{name}: expected a floating-point or bool tensor, got {_described(value)}"
        )
    try:
        value.expand(state.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(state.shape)}, "
            f"got {tuple(value.shape)}"
        ) from error
    return check_device(name, value, "the state", state.device)


def check_device(name: str, value: Tensor, like_name: str, device: torch.device) -> Tensor:
    if value.device != device:
        raise ValueError(
            f"{name}: expected the device of {like_name}, {device}, got {value.device}"
        )
    return value


def check_working_device(name: str, value: Any) -> torch.device:
    """The requested device, after a trial."""
    if not isinstance(value, torch.device | str | int):
        raise TypeError(f"{name}: expected a torch.device or its name, got {value!r}")
    try:
        return torch.empty(0, device=value).device
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected a device that works here, got {value!r}: {first_sentence(error)}"
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error of torch, without the many lines of advice."""
    return str(error).partition("\n")[0].partition(". ")[0]


def check_same_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {value.dtype}")


def check_initial(
    name: str, x: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check that a starting state is exactly of the expected kind, since nothing is converted."""
    check_state(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    check_same_dtype(name, x, dtype)
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_overlap(name: str, written: Tensor, read_name: str, read: Tensor) -> None:
    """Refuse to write memory that overlaps memory to read, unless both are exactly the same."""
    if written is read or torch.compiler.is_compiling():
        return
    same = written.data_ptr() == read.data_ptr() and written.stride() == read.stride()
    if same and written.dtype == read.dtype:
        return
    (first, end), (other_first, other_end) = _extent(written), _extent(read)
    if first < other_end and other_first < end:
        raise ValueError(
            f"{name}: expected {read_name} itself or memory apart from it, "
            "got a tensor that overlaps it in part"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and past the last; equal for an empty tensor."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def check_noise(name: str, value: Any, x: Tensor) -> Tensor:
    return check_like(name, value, "the state", x)


def check_model_output(name: str, value: Any, x: Tensor, *, guided: bool) -> Tensor:
    """A model output checked for the state `x`: 2B samples if `guided`, and C or 2C channels
    (learned variance).
    """
    check_state(name, value)
    batch = (2 if guided else 1) * x.shape[0]
    shape, plain = tuple(value.shape), (batch, *x.shape[1:])
    if shape != plain and (x.ndim == 1 or shape != (batch, 2 * x.shape[1], *x.shape[2:])):
        wide = f" or {(batch, 2 * x.shape[1], *x.shape[2:])}" if x.ndim > 1 else ""
        guidance = " under guidance" if guided else ""
        raise ValueError(f"{name}: expected shape {plain}{wide}{guidance}, got {shape}")
    return check_device(name, value, "the state", x.device)


def check_same_output(unconditional: Tensor, conditional: Tensor) -> None:
    """Refuse outputs of two models that cannot be halves of one."""
    if unconditional.shape != conditional.shape or unconditional.dtype != conditional.dtype:
        raise ValueError(
            "uncond_model output: expected shape and dtype of the model output, "
            f"{tuple(conditional.shape)} and {conditional.dtype}, "
            f"got {tuple(unconditional.shape)} and {unconditional.dtype}"
        )


def check_finite_output(output: Tensor, where: Callable[[], str]) -> None:
    """Refuse NaN and infinity in a model's output; this waits for the device.

    Args:
        output: output of the model.
        where: gives the words for the step, in the error.
    """
    if not bool(output.isfinite().all()):
        raise ValueError(f"model output: expected finite values, got NaN or infinity {where()}")


def check_timestep(name: str, value: Any, batch: int, T: int) -> Tensor:
    """int64 CPU tensor `[1]` or `[batch]` of timesteps in [0, T)."""
    if not isinstance(value, Tensor):
        return torch.tensor([check_int(name, value, 0, T - 1)], device="cpu")
    if value.dtype.is_floating_point or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got dtype {value.dtype}")
    index = value.to("cpu", torch.int64).reshape(-1) if value.ndim < 2 else value
    if index.ndim != 1 or index.shape[0] not in (1, batch):
        raise ValueError(
            f"{name}: expected an integer or a tensor [{batch}], got shape {tuple(value.shape)}"
        )
    for v in index.tolist() if bare(index) else ():
        check_int(name, v, 0, T - 1)
    return index


def check_seed(name: str, value: Any, batch: int) -> int | Tensor:
    """The 64 bits of the seed, signed: an integer, or int64 `[batch]` if each sample has its own;
    or int64 `[]` under `torch.vmap` over seeds.
    """
    if isinstance(value, int):
        return signed_bits(check_int(name, value, 0, 2**64 - 1))
    if _mapped_integer(value):
        return value
    if isinstance(value, Tensor) and value.ndim == 1:
        if value.dtype != torch.int64:
            raise TypeError(f"{name}: expected an int64 tensor, got dtype {value.dtype}")
        seeds = value
    elif isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        seeds = torch.tensor(
            [signed_bits(check_int(f"{name}[{i}]", v, 0, 2**64 - 1)) for i, v in enumerate(value)],
            dtype=torch.int64,
            device="cpu",
        )
    elif isinstance(value, Tensor) and value.ndim > 1:
        raise ValueError(f"{name}: expected an int64 tensor [B], got shape {tuple(value.shape)}")
    else:
        return signed_bits(check_int(name, _unwrapped(value), 0, 2**64 - 1))
    if seeds.shape[0] != batch:
        raise ValueError(f"{name}: expected one seed per sample, {batch}, got {seeds.shape[0]}")
    return seeds


def check_step_index(name: str, value: Any, batch: int) -> int | Tensor:
    """An integer, or int64 `[batch]`, in [0, 2³²)."""
    if isinstance(value, Tensor) and value.ndim == 1:
        if value.dtype != torch.int64:
            raise TypeError(f"{name}: expected an int64 tensor, got dtype {value.dtype}")
        if value.shape[0] != batch:
            raise ValueError(f"{name}: expected [{batch}], got shape {tuple(value.shape)}")
        if readable(value):
            for i, v in enumerate(value.tolist()):
                check_int(f"{name}[{i}]", v, 0, 2**32 - 1)
        return value
    if _mapped_integer(value):
        return value.expand(batch)
    return check_int(name, _unwrapped(value), 0, 2**32 - 1)


def check_sample_range(sample_offset: Any, batch: int, *, per_sample_seed: bool) -> None:
    offset = check_int("sample_offset", sample_offset, 0, 2**32 - 1)
    if per_sample_seed and offset:
        raise ValueError(f"sample_offset: expected 0 if each sample has its own seed, got {offset}")
    if offset + batch > 2**32:
        raise ValueError(
            f"sample_offset: expected sample indices below 2**32, got {offset} + {batch} samples"
        )


def _mapped_integer(value: Any) -> TypeGuard[Tensor]:
    """Tell whether an int64 differs between the calls of `torch.vmap` and so cannot be read."""
    one = isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.int64
    return one and not bare(value)


def _unwrapped(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def signed_bits(value: int) -> int:
    """64 unsigned bits as torch's int64 holds them."""
    return value - 2**64 if value >= 2**63 else value


def _interval(low: float, high: float, open_low: bool) -> str:
    if math.isinf(low) and math.isinf(high):
        return "a finite number"
    if math.isinf(high):
        return f"a finite number {'>' if open_low else '>='} {low:g}"
    return f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"


def _described(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
