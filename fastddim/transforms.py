"""Checks of which PyTorch transforms follow the current computation.

`torch.func` (grad, vjp, jvp, vmap, …) and forward-mode differentiation follow operators, but not
a kernel that writes into a given tensor. `requires_grad` does not reveal these transforms: a dual
tensor does not have it, and a batch may hide it. PyTorch has no public names for these checks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# Tells whether a transform of `torch.func` is active in this thread.
functorch_active = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Tell whether a transform of `torch.func` or forward-mode differentiation is active, the
    latter in any thread.
    """
    return functorch_active() or forward_ad._current_level >= 0


def followed(*tensors: Tensor | None) -> bool:
    """Tell whether a transform follows, or may follow, a computation with these tensors; a graph
    that is being traced does not reveal it.
    """
    if functorch_active() or is_compiling():
        return True
    return any(t is not None and _has_tangent(t) for t in tensors)


def tracked(x: Tensor, model_output: Tensor, noise: Tensor | None) -> bool:
    """Tell whether a transform or autograd follows a computation with these tensors."""
    # This is `transformed()` without the time of its call.
    maybe_followed = functorch_active() or forward_ad._current_level >= 0
    if maybe_followed and followed(x, model_output, noise):
        return True
    return is_grad_enabled() and (
        x.requires_grad or model_output.requires_grad or (noise is not None and noise.requires_grad)
    )


def bare(tensor: Tensor) -> bool:
    """Tell whether a tensor is only its values, without a transform or derivatives."""
    if transformed() and (
        is_compiling() or torch.func.debug_unwrap(tensor) is not tensor or _has_tangent(tensor)
    ):
        return False
    return not (is_grad_enabled() and tensor.requires_grad)


def check_unfollowed(name: str, *tensors: Tensor | None) -> None:
    """Refuse to write into an argument if a transform follows the tensors."""
    if transformed() and followed(*tensors):
        raise RuntimeError(
            f"{name}: expected None under torch.func or forward-mode differentiation, "
            "which cannot follow what is written into a given tensor, got a tensor"
        )


def check_sampler_unfollowed() -> None:
    """Refuse to run a sampler, which overwrites its state, while a transform follows all
    computations.
    """
    if functorch_active():
        raise RuntimeError(
            "model: expected to be sampled outside torch.func (grad, jvp, vmap, ...), since a "
            "sampler has no derivatives and overwrites its state; take the steps with "
            "fastddim.step in a loop of your own, which these transforms follow"
        )


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Refuse a dual tensor of forward-mode differentiation, whose tangent would be lost."""
    if _has_tangent(tensor):
        raise RuntimeError(
            f"{name}: expected a tensor without a tangent of forward-mode differentiation, since a "
            "sampler has no derivatives; take the steps with fastddim.step in a loop of your own"
        )


def below_autograd(operator: Any, keys: Any, *inputs: Any) -> Any:
    """Call an operator's kernel from the kernel that it has for autograd.

    Args:
        operator: an overload.
        keys: the dispatch keys that the autograd kernel was called with.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None
