"""The notebook `examples/tour.ipynb`, executed in a kernel of its own.

Run as a program, it writes the notebook anew, with its outputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"

VARIES = "varies"
"""The tag of a cell whose text depends on the time or the machine."""

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path = NOTEBOOK) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def executed(
    notebook: NotebookNode, folder: Path, environment: Mapping[str, str] | None = None
) -> NotebookNode:
    """Execute a copy of a notebook from top to bottom, with one thread, in an empty folder.

    Args:
        folder: for what Jupyter and IPython keep in the user's home otherwise, and to run in.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises.
    """
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    own = {
        name: str(folder / name)
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # A notice of tqdm about ipywidgets, which nothing here needs.
    quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}
    work = folder / "work"
    work.mkdir()
    client = NotebookClient(
        copy,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        # It warns that messages to this machine's own address are not encrypted.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(work)}},
    )
    with mock.patch.dict(os.environ, own | threads | quiet | (environment or {})):
        client.execute()
    return clean(copy)


def clean(notebook: NotebookNode) -> NotebookNode:
    """A copy of a notebook without what changes at each run, or is there twice."""
    copy = nbformat.from_dict(notebook)
    copy.metadata = nbformat.from_dict(_METADATA)
    for cell in copy.cells:
        cell.metadata = nbformat.from_dict(
            {name: value for name, value in cell.metadata.items() if name == "tags"}
        )
        for output in cell.get("outputs", ()):
            # Pillow adds each picture as a JPEG.
            output.get("data", {}).pop("image/jpeg", None)
    return copy


def main() -> None:
    with TemporaryDirectory() as folder:
        nbformat.write(executed(read(), Path(folder)), NOTEBOOK)


if __name__ == "__main__":
    main()
