"""The inside of a model: the callables that it passes its arguments on to, the modules that it
holds, and the hooks of accelerate and diffusers on these modules.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Attributes of parallel and averaging wrappers, results of torch.compile and decorated functions.
_INNER = ("module", "_orig_mod", "__wrapped__")


def layers(model: Any) -> Iterator[Any]:
    """The model and, one inside of the other, all that it passes its arguments on to."""
    passed: list[int] = []
    while callable(model) and id(model) not in passed:
        yield model
        passed.append(id(model))
        model = _inner(model)


def _inner(model: Any) -> Any:
    # A method has the attributes of its function.
    if isinstance(model, types.MethodType):
        return model.__self__
    inner = next(filter(callable, (getattr(model, name, None) for name in _INNER)), None)
    return model.func if inner is None and isinstance(model, partial) else inner


def reachable(model: Any, *, named: bool = True) -> list[Any]:
    """The model, and the objects that it reaches besides its arguments.

    These are the object that a method is bound to, the contents of a partial, the closure of a
    function and the globals that it names, and the modules that other objects hold. Modules are not
    searched.

    Args:
        named: whether the globals count, which may be more than a function calls.
    """
    found: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        value = waiting.pop()
        if id(value) not in found:
            found[id(value)] = value
            waiting += _held(value)
            if named and isinstance(value, types.FunctionType):
                waiting += _named_globals(value)
    return list(found.values())


def _held(value: Any) -> Sequence[Any]:
    if isinstance(value, nn.Module | type | types.ModuleType):
        return ()
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return [held for held in getattr(value, "__dict__", {}).values() if isinstance(held, nn.Module)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _named_globals(function: types.FunctionType) -> Iterator[Any]:
    """The objects that a function may read by a name, without the functions of other files."""
    names = function.__globals__
    for name in function.__code__.co_names:
        if name in names and getattr(names[name], "__globals__", names) is names:
            yield names[name]


def held_modules(model: Any) -> Iterator[nn.Module]:
    """The modules that a model is or holds, without those that it finds by global names."""
    held = reachable(model, named=False)
    return (value for value in held if isinstance(value, nn.Module))


def modules(root: nn.Module) -> list[nn.Module]:
    """`root` and all modules in it, each once; unlike `root.modules()`, without making names."""
    found, seen = [root], {root}
    for part in found:
        for child in part._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def tensors(parts: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The parameters of modules as one list, and then their buffers; empty lists are left out."""
    for kind in ("_parameters", "_buffers"):
        held = [value for part in parts for value in getattr(part, kind).values()]
        found = [value for value in held if value is not None]
        if found:
            yield found


def weights(root: nn.Module, *, last: bool = False) -> Iterator[Tensor]:
    """The matrices among the parameters, in the order in which the modules were set.

    Args:
        last: whether to reverse the order.
    """
    own = [p for p in root._parameters.values() if p is not None and not is_lazy(p) and p.ndim > 1]
    children = [child for child in root._modules.values() if child is not None]
    if last:
        own, children = own[::-1], children[::-1]
    inner = chain.from_iterable(weights(child, last=last) for child in children)
    yield from chain(inner, own) if last else chain(own, inner)


def hooks(parts: Sequence[nn.Module]) -> Iterator[Any]:
    """The hooks of accelerate and of diffusers on modules."""
    for part in parts:
        own = vars(part)
        if "_hf_hook" in own:
            yield from _flattened(own["_hf_hook"])
        if "_diffusers_hook" in own:
            yield from own["_diffusers_hook"].hooks.values()


def _flattened(hook: Any) -> Iterator[Any]:
    """A hook of accelerate, or the hooks that it calls in turn."""
    parts = getattr(hook, "hooks", None)
    if parts is None:
        return iter((hook,))
    return chain.from_iterable(map(_flattened, parts))
