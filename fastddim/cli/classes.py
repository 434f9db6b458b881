"""Class labels on the command line: `--classes`, `--guidance` and `--null-class`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastddim.cli.options import bundled

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

_BALANCED = "balanced"


@dataclass(frozen=True)
class Labelling:
    """The classes to draw, and the strength of guidance to them."""

    classes: str | None
    guidance: float | None
    null_class: int | None

    def asked(self) -> bool:
        """Tell whether labels are requested.

        Raises:
            click.UsageError: an option is given without another that it needs.
        """
        needs = {"null_class": ("classes", "guidance"), "guidance": ("classes",)}
        for option, others in needs.items():
            for other in others:
                if getattr(self, option) is not None and getattr(self, other) is None:
                    name = option.replace("_", "-")
                    raise click.UsageError(f"--{name}: expected --{other} with it, got none")
        return self.classes is not None

    def files(self) -> dict[str, str]:
        """The path of the labels by the name of its option, or nothing."""
        classes = self.classes
        if classes is None or classes == _BALANCED or _listed(classes) is not None:
            return {}
        return {"classes": classes}

    def of(self, model: Any, start: int, stop: int) -> ClassLabels | None:
        """The labels of the images [start, stop); None if no labels are requested.

        Raises:
            click.UsageError: the options do not fit the model.
            click.ClickException, OSError: a file holds no labels for these images.
        """
        if self.classes is None:
            return None
        known = _KnownClasses.of(model)
        null = None if self.guidance is None else self._null_class(known)
        values = _values(self.classes, known.drawable(null), start, stop)
        known.check("--classes", values)
        return ClassLabels(known.argument, values, self.guidance, null)

    def _null_class(self, known: _KnownClasses) -> int:
        null = known.null if self.null_class is None else self.null_class
        if null is None:
            raise click.UsageError(
                "--null-class: expected the label that stands for no class, since the model does "
                "not declare it, got none"
            )
        known.check("--null-class", [null])
        return null


@dataclass(frozen=True)
class ClassLabels:
    """A label for each image.

    Attributes:
        argument: the argument of the model that takes the labels.
        values: the labels in the order of the images.
        guidance: the guidance scale, or None.
        null: the label that stands for no class, under guidance.
    """

    argument: str
    values: list[int]
    guidance: float | None
    null: int | None

    def condition(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The labels as an argument of the model, an int64 tensor `[n]`."""
        import torch

        return {self.argument: torch.tensor(self.values, dtype=torch.int64, device=device)}

    def guided(self) -> dict[str, Any]:
        """The arguments of `fastddim.sample` for guidance; empty without guidance."""
        if self.guidance is None:
            return {}
        return {"guidance_scale": self.guidance, "uncond_kwargs": {self.argument: self.null}}


@dataclass(frozen=True)
class _KnownClasses:
    """The classes of a model, as far as it declares them.

    Attributes:
        argument: the argument of the model for labels.
        count: number of labels, with the null label; None if the model does not declare it.
        null: the label that stands for no class; None if the model does not declare it.
    """

    argument: str
    count: int | None
    null: int | None

    @classmethod
    def of(cls, model: Any) -> _KnownClasses:
        from fastddim.adapter import label_argument, number_of_classes

        argument = label_argument(model)
        if argument is None:
            raise click.UsageError(
                "--classes: expected a model that takes class labels, got an unconditional "
                f"{type(model).__name__}"
            )
        classes, embedded = number_of_classes(model)
        return cls(argument, embedded if classes is None else classes + 1, classes)

    def drawable(self, null: int | None) -> list[int] | None:
        """All labels that stand for a class; None if the model does not declare them."""
        if self.count is None:
            return None
        return [label for label in range(self.count) if label not in (self.null, null)]

    def check(self, option: str, labels: Iterable[int]) -> None:
        """Refuse labels that the model does not take."""
        last = None if self.count is None else self.count - 1
        for label in labels:
            if label < 0 or (last is not None and label > last):
                wanted = "at least 0" if last is None else f"in [0, {last}]"
                raise click.UsageError(f"{option}: expected labels {wanted}, got {label}")


def _values(classes: str, drawable: list[int] | None, start: int, stop: int) -> list[int]:
    """The labels of the images [start, stop)."""
    cycle = _listed(classes)
    if classes == _BALANCED:
        if not drawable:
            raise click.UsageError(
                "--classes: expected labels such as 0,1,2 or a file of them, since the model does "
                f"not declare the number of its classes, got {classes!r}"
            )
        cycle = drawable
    if cycle is None:
        return _of_file(Path(classes), start, stop)
    return [cycle[i % len(cycle)] for i in range(start, stop)]


def _listed(classes: str) -> list[int] | None:
    """Integers separated by commas; None for any other text, which is the name of a file."""
    try:
        return [int(part) for part in classes.split(",")]
    except ValueError:
        return None


def _of_file(path: Path, start: int, stop: int) -> list[int]:
    labels = _read(path)
    if len(labels) < stop:
        raise click.ClickException(
            f"{path}: expected a label for each image up to number {stop - 1}, got {len(labels)} "
            "labels"
        )
    return labels[start:stop]


def _read(path: Path) -> list[int]:
    """All labels in a text file with one label a line, an .npy file or an .npz file."""
    if path.suffix.lower() not in (".npy", ".npz"):
        try:
            return [int(line) for line in path.read_text(encoding="utf-8").split()]
        except ValueError as error:
            raise click.ClickException(
                f"{path}: expected one integer a line, got: {error}"
            ) from error
    array = _read_array(path)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise click.ClickException(
            f"{path}: expected integers [N], got {array.dtype} {list(array.shape)}"
        )
    labels: list[int] = array.tolist()
    return labels


def _read_array(path: Path) -> np.ndarray[Any, Any]:
    import zipfile

    import numpy as np

    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content
            # Either the labels of images that 'generate' wrote, or the only array.
            name = "arr_1" if "arr_1" in content.files else content.files[0]
            array: np.ndarray[Any, Any] = content[name]
            return array
    except (ValueError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise click.ClickException(f"{path}: expected an array of labels, got: {error}") from error


labelling_options = bundled(
    "labelling",
    Labelling,
    [
        click.option(
            "--classes",
            metavar="balanced|INT,INT,...|FILE",
            show_default="none",
            help="Labels for a class-conditional model: all classes in turn, those in the list in "
            "turn, or those of a file (one integer a line, .npy or .npz), where image i has label "
            "i. Each label depends only on the number of its image.",
        ),
        click.option(
            "--guidance",
            type=float,
            show_default="none",
            help="Scale of classifier-free guidance to --classes; 1 is no guidance.",
        ),
        click.option(
            "--null-class",
            type=int,
            show_default="the one after the model's classes, if it tells their number",
            help="Label that stands for no class in --guidance.",
        ),
    ],
)
