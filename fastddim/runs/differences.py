"""The differences between two manifests, in the words of the arguments of `generate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

Manifest: TypeAlias = dict[str, Any]

_TIMESTEPS, _LEVELS = "plan.timesteps", "plan.alphas_cumprod"

# Digests and long tables, whose values tell a reader nothing.
_OPAQUE = {
    "model.weights": "weights of the model",
    "model.kwargs": "model_kwargs",
    "model.uncond_kwargs": "uncond_kwargs",
    "model.uncond_weights": "weights of uncond_model",
    _LEVELS: "noise levels of the schedule",
    "plan.direction": "weights of tuned steps",
    "plan.history": "weights of tuned steps",
    "decode.weights": "weights of decode",
}
_CONDITIONS = "conditions."

_NAMES = {
    "model.class": "class of the model",
    "model.id": "model_id",
    "model.uncond_class": "class of uncond_model",
    "decode.name": "decode",
    "versions.fastddim": "version of fastddim",
    "versions.torch": "version of torch",
}

# Entries named by their last part, which is an argument of `generate` or says enough.
_GROUPS = ("plan", "computation")

_NOTHING = "nothing"
_WIDEST = 60


class Difference(NamedTuple):
    """An entry that differs between two manifests.

    Attributes:
        field: its name in them, with dots.
        there, here: its values; None where one has no such entry.
        line: both values in words, such as `eta: 0.0 in the folder, 1.0 here`.
    """

    field: str
    there: Any
    here: Any
    line: str


def differences(found: Manifest, wanted: Manifest, places: tuple[str, str]) -> list[Difference]:
    """Every entry that differs.

    Args:
        places: the place of each manifest, in words.
    """
    there, here = dict(_entries(found)), dict(_entries(wanted))
    result: dict[str, Difference] = {}
    for field in dict.fromkeys([*here, *there]):
        pair = there.get(field, _NOTHING), here.get(field, _NOTHING)
        if pair[0] == pair[1] or (field == _LEVELS and _same_schedule(there, here)):
            continue
        line = _line(field, pair, places)
        # Several entries may say the same to a reader.
        result.setdefault(line, Difference(field, there.get(field), here.get(field), line))
    return list(result.values())


def _entries(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _same_schedule(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """True where only the timesteps differ: common timesteps have the same noise levels."""
    one, other = (
        dict(zip(_list(entries, _TIMESTEPS), _list(entries, _LEVELS), strict=False))
        for entries in (there, here)
    )
    return one.keys() != other.keys() and all(one[t] == other[t] for t in one.keys() & other.keys())


def _list(entries: Mapping[str, Any], field: str) -> list[Any]:
    value = entries.get(field)
    return value if isinstance(value, list) else []


def _line(field: str, pair: tuple[Any, Any], places: tuple[str, str]) -> str:
    if field == _TIMESTEPS and all(isinstance(value, list) for value in pair):
        numbers = len(pair[0]), len(pair[1])
        if numbers[0] != numbers[1]:
            return _values("steps", numbers, places)
    name = _name(field)
    if field not in _OPAQUE and not field.startswith(_CONDITIONS):
        return _values(name, pair, places)
    if all(value not in (_NOTHING, None) for value in pair):
        return f"{name}: others {places[0]} than {places[1]}"
    shown = ["none" if value in (_NOTHING, None) else "some" for value in pair]
    return f"{name}: {shown[0]} {places[0]}, {shown[1]} {places[1]}"


def _values(name: str, pair: tuple[Any, Any], places: tuple[str, str]) -> str:
    shown = [value if value is _NOTHING else _shortened(json.dumps(value)) for value in pair]
    return f"{name}: {shown[0]} {places[0]}, {shown[1]} {places[1]}"


def _name(field: str) -> str:
    if field.startswith(_CONDITIONS):
        path = field.removeprefix(_CONDITIONS).split(".")
        return "conditions" + "".join(f"[{name!r}]" for name in path)
    group, _, name = field.partition(".")
    return _OPAQUE.get(field) or _NAMES.get(field) or (name if group in _GROUPS else field)


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
