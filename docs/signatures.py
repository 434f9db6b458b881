"""An extension of Griffe that shows the arguments of functions which take options.

Griffe reads sources, and sees `sample(options)` there; a caller sees the signature that
`fastddim.signatures` gives the function.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from typing import Any

import griffe

DECORATORS = ("fastddim.signatures.takes", "fastddim.signatures.method_takes")


class Signatures(griffe.Extension):
    """Replaces the parameters of decorated functions."""

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Called by Griffe with each function of the package."""
        if not any(decorator.callable_path in DECORATORS for decorator in func.decorators):
            return
        # The options' types are names of this module.
        scope = loader.modules_collection["fastddim.options"]
        found = inspect.signature(pkgutil.resolve_name(func.path)).parameters.values()
        func.parameters = griffe.Parameters(*(_as_shown(given, scope) for given in found))


def _as_shown(given: inspect.Parameter, scope: griffe.Module) -> griffe.Parameter:
    annotation = None
    if given.annotation is not given.empty:
        expression = ast.parse(given.annotation, mode="eval").body
        annotation = griffe.safe_get_annotation(expression, scope)
    return griffe.Parameter(
        given.name,
        annotation=annotation,
        kind=griffe.ParameterKind(given.kind.description),
        default=None if given.default is given.empty else repr(given.default),
    )
