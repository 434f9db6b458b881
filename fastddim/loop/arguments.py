"""The arguments of a model besides the state and the timestep, as rows: one for each sample.

Under guidance a model is evaluated on 2B samples, the first half without the condition. So a tensor
among its arguments is read in one of three ways: as it was given, as one row for all samples, or as
values without the condition above those with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.utils._pytree import (
    SequenceKey,
    keystr,
    tree_flatten_with_path,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

from fastddim.loop.rows import Rows, Trees, checked_number, described, leaf_key, trees_key
from fastddim.tracing import PLAIN
from fastddim.validation import check_device, check_same_dtype

Form: TypeAlias = Literal["single", "doubled", "stacked", "apart"]
"""The way the halves of guidance are read: there are none, the user has doubled the tensors, they
are stacked here, or each half is for a model of its own."""


class ModelArguments:
    """The checked arguments of models, besides the state and the timestep.

    Leaves have names such as `['y']` or `['added']['text']`.

    Attributes:
        trees: the arguments of each model that a step evaluates, the unconditional one first;
            tensors in them are `Rows`.
    """

    trees: Trees

    def __init__(
        self,
        names: dict[str, Any],
        given: Mapping[str, Any],
        uncond: Mapping[str, Any] | None,
        rowless: frozenset[str],
        *,
        form: Form,
        batch: int,
        trees: Trees | None = None,
    ) -> None:
        """
        Args:
            names: `model_kwargs` with names as its leaves.
            given: the leaves of `model_kwargs`.
            uncond: those of `uncond_kwargs`, if there are any.
            rowless: names of tensors that are passed as they are.
            form: how the halves of guidance are read.
            batch: B.
            trees: the result of the other arguments, where it is known already.

        Raises:
            TypeError, ValueError: a value has the wrong rows, shape, dtype or device; the message
                names it.
        """
        self._names = names
        self._given = given
        self._uncond = uncond
        self._rowless = rowless
        self._form = form
        self._batch = batch
        if trees is not None:
            self.trees = trees
            return
        count = 2 if form == "apart" else 1
        if not given and not uncond:
            self.trees = (names,) * count
            return
        for name in uncond or ():
            _check_known(f"uncond_kwargs{name}", name, given)
        halves = {name: self._leaves(name, value) for name, value in given.items()}
        self.trees = tuple(_filled(names, halves, half) for half in range(count))

    @classmethod
    def of(
        cls, model_kwargs: Any, uncond_kwargs: Any, *, batch: int, guided: bool, apart: bool
    ) -> ModelArguments:
        """
        Args:
            model_kwargs, uncond_kwargs: the user's.
            batch: B.
            guided: whether there is guidance.
            apart: whether another model is evaluated for the unconditional half.

        Raises:
            TypeError, ValueError: they are no mappings, or cannot be the arguments of a model; the
                message names the argument.
        """
        kwargs = _mapping("model_kwargs", model_kwargs)
        uncond = None
        if uncond_kwargs is not None:
            uncond = _flat(_mapping("uncond_kwargs", uncond_kwargs))
            if not guided:
                raise ValueError(
                    "uncond_kwargs: expected None without guidance_scale, got values of "
                    f"{_listed(uncond)}"
                )
        stacked: Form = "doubled" if uncond is None else "stacked"
        form: Form = "apart" if apart else stacked if guided else "single"
        if not kwargs:
            return cls({}, {}, uncond, frozenset(), form=form, batch=batch)
        flat, structure = tree_flatten_with_path(kwargs)
        given = {keystr(path): value for path, value in flat}
        names = tree_unflatten(list(given), structure)
        return cls(names, given, uncond, _rowless(flat), form=form, batch=batch)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The user's `model_kwargs`, as they were given."""
        kwargs: dict[str, Any] = tree_map(self._given.__getitem__, self._names)
        return kwargs

    @property
    def uncond_kwargs(self) -> Mapping[str, Any] | None:
        """The leaves of the user's `uncond_kwargs`, by name; None where there are none."""
        return self._uncond

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of `model_kwargs`, by name."""
        return {name: leaf for name, leaf in self._given.items() if isinstance(leaf, Tensor)}

    @property
    def tensors_without_rows(self) -> dict[str, Tensor]:
        """The tensors that are passed as they are, by name."""
        return {name: self._given[name] for name in self._given if name in self._rowless}

    @property
    def key(self) -> Hashable:
        """Everything that a graph of the models depends on: all except the values of tensors."""
        return trees_key(self.trees)

    def joined(self, batch: Any) -> Trees:
        """The trees with tensors, in operations that programs can hold.

        Args:
            batch: B, which may be unknown in a program.
        """
        joined: Trees = tree_map_only(Rows, lambda rows: rows.joined(batch), self.trees)
        return joined

    def replaced(
        self, model_kwargs: Any, uncond_kwargs: Any, *, batch: int | None = None
    ) -> ModelArguments:
        """These arguments with other values.

        Args:
            model_kwargs, uncond_kwargs: the user's, with the values to replace.
            batch: B, where it differs.

        Raises:
            TypeError, ValueError: a name is unknown, or its new value has other rows, another
                shape, dtype or device; the message names it.
        """
        if uncond_kwargs is None and batch is None:
            swapped = self._swapped(model_kwargs)
            if swapped is not None:
                return swapped
        given, uncond = self._given, self._uncond
        if model_kwargs is not None:
            new = _flat(_mapping("model_kwargs", model_kwargs))
            for name, value in new.items():
                _check_known(f"model_kwargs{name}", name, given)
                self._check_alike(f"model_kwargs{name}", value, name)
            given = {**given, **new}
        if uncond_kwargs is not None:
            new = _flat(_mapping("uncond_kwargs", uncond_kwargs))
            if uncond is None:
                raise ValueError(
                    "uncond_kwargs: expected None, as when the Sampler was made, got values "
                    f"of {_listed(new)}"
                )
            uncond = {**uncond, **new}
        return ModelArguments(
            self._names,
            given,
            uncond,
            self._rowless,
            form=self._form,
            batch=self._batch if batch is None else batch,
        )

    def _swapped(self, model_kwargs: Any) -> ModelArguments | None:
        """The result of `replaced` in a fraction of its time, for tensors exactly like the earlier
        ones, as a control loop has them; None where there is more to check.
        """
        if self._form != "single" or type(model_kwargs) is not dict:
            return None
        (tree,) = self.trees
        given, rows = dict(self._given), dict(tree)
        for key, value in model_kwargs.items():
            before = tree.get(key)
            if type(before) is not Rows or not before.whole or type(value) is not Tensor:
                return None
            like = before.like
            if (
                value.is_nested
                or value.dtype is not like.dtype
                or value.shape != like.shape
                or value.device != like.device
            ):
                return None
            given[f"[{key!r}]"] = value
            rows[key] = Rows.as_given(value, before.each)
        return ModelArguments(
            self._names,
            given,
            None,
            self._rowless,
            form="single",
            batch=self._batch,
            trees=(rows,),
        )

    def _check_alike(self, shown: str, value: Any, name: str) -> None:
        """Refuse a value that cannot take the place of another in the same graph."""
        before = self._given[name]
        if not isinstance(before, Tensor):
            if leaf_key(value) != leaf_key(before):
                raise ValueError(
                    f"{shown}: expected {before!r} as when the Sampler was made, since only "
                    f"tensors change from call to call, got {described(value)}"
                )
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"{shown}: expected a tensor, got {described(value)}")
        rows = 0 if name in self._rowless else 1
        if value.ndim != before.ndim or value.shape[rows:] != before.shape[rows:]:
            expected = f"{tuple(before.shape)}" if rows == 0 else _shape(["B"], before)
            raise ValueError(
                f"{shown}: expected shape {expected} as when the Sampler was made, got "
                f"{tuple(value.shape)}"
            )
        check_same_dtype(shown, value, before.dtype)
        check_device(shown, value, "the one before", before.device)

    def _leaves(self, name: str, value: Any) -> tuple[Any, ...]:
        """The leaf of each tree for one argument."""
        rows = isinstance(value, Tensor) and name not in self._rowless
        if rows:
            self._check_rows(name, value)
        other = value
        if self._uncond is not None and name in self._uncond:
            other = self._checked_other(f"uncond_kwargs{name}", self._uncond[name], name)
        if not rows:
            given = (other, value) if self._form == "apart" else (value,)
            return tuple(Rows.as_given(v) if isinstance(v, Tensor) else v for v in given)
        batch = self._batch
        if self._form == "apart":
            return Rows.of((other,), value, batch), Rows.of((value,), value, batch)
        if self._form == "stacked":
            return (Rows.of((other, value), value, batch),)
        return (Rows.of((value,), value, 2 * batch if self._form == "doubled" else batch),)

    def _check_rows(self, name: str, value: Tensor) -> None:
        batch = self._batch
        if self._form != "doubled":
            _check_count(f"model_kwargs{name}", value, batch)
        elif value.shape[0] != 2 * batch:
            first = name[1:].partition("]")[0]
            raise ValueError(
                f"model_kwargs{name}: expected {_either(batch)} under guidance where uncond_kwargs="
                f"{{{first}: ...}} gives the unconditional value, or a tensor [{2 * batch}, ...] "
                f"that has it in its first half, got shape {tuple(value.shape)}"
            )

    def _checked_other(self, shown: str, other: Any, name: str) -> Any:
        """The checked value without the condition."""
        value = self._given[name]
        if not isinstance(value, Tensor) or name in self._rowless:
            if self._form != "apart":
                raise ValueError(
                    f"{shown}: expected no value, since model_kwargs{name} is no tensor with a row "
                    f"for each sample and so the same for both halves, got {described(other)}"
                )
            return other
        if not isinstance(other, Tensor):
            return checked_number(shown, other, value.dtype)
        check_same_dtype(shown, other, value.dtype)
        if other.ndim:
            _check_count(shown, other, self._batch)
            if other.ndim != value.ndim or other.shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"{shown}: expected shape {_shape([self._batch], value)} like "
                    f"model_kwargs{name}, got {tuple(other.shape)}"
                )
        return check_device(shown, other, f"model_kwargs{name}", value.device)


def _rowless(flat: Iterable[tuple[Any, Any]]) -> frozenset[str]:
    """Names of tensors that do not have a row for each sample: those without dimensions, nested
    ones, and those of a list or tuple that differ in their number of rows.
    """
    rowless, ragged = set(), set()
    counts: dict[str, int] = {}
    for path, value in flat:
        if not isinstance(value, Tensor):
            continue
        if value.ndim == 0 or value.is_nested:
            rowless.add(keystr(path))
        elif isinstance(path[-1], SequenceKey):
            parent = keystr(path[:-1])
            if counts.setdefault(parent, value.shape[0]) != value.shape[0]:
                ragged.add(parent)
    for path, value in flat:
        if isinstance(value, Tensor) and len(path) > 1 and keystr(path[:-1]) in ragged:
            rowless.add(keystr(path))
    return frozenset(rowless)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping of names to values, got {value!r}")
    return dict(value or {})


def _flat(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The leaves by their names, as `keystr` makes them."""
    if all(type(value) in PLAIN for value in kwargs.values()):
        return {f"[{key!r}]": value for key, value in kwargs.items()}
    return {keystr(path): value for path, value in tree_flatten_with_path(kwargs)[0]}


def _filled(names: dict[str, Any], halves: Mapping[str, Any], half: int) -> dict[str, Any]:
    """The tree of names with the leaves of one model in their places."""
    if all(type(name) is str for name in names.values()):
        return {key: halves[name][half] for key, name in names.items()}
    tree: dict[str, Any] = tree_map(lambda name: halves[name][half], names)
    return tree


def _check_known(shown: str, name: str, given: Mapping[str, Any]) -> None:
    if name not in given:
        raise ValueError(f"{shown}: expected a name in model_kwargs, {_listed(given)}, got {name}")


def _check_count(shown: str, value: Tensor, batch: int) -> None:
    if value.shape[0] != batch and value.shape[0] != 1:
        raise ValueError(f"{shown}: expected {_either(batch)}, got shape {tuple(value.shape)}")


def _either(batch: Any) -> str:
    return f"a tensor [{batch}, ...]" + ("" if batch == 1 else " or [1, ...]")


def _shape(first: list[Any], value: Tensor) -> str:
    return f"[{', '.join(map(str, [*first, *value.shape[1:]]))}]"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
