"""Unpacks the kit that `prepare.py` made: `python kit.py KIT WORK`. The standard library suffices.

WORK/site then holds the package under test and diffusers, WORK/triton Triton's compiled kernels.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import zipfile
from pathlib import Path

SITE, WHEELS, KERNELS = "site", "wheels", "triton.zip"


def unpack(kit: Path, work: Path) -> None:
    """Unpack the parts of a kit that exist; print which ones are missing."""
    site = work / SITE
    if (kit / SITE).is_dir():
        shutil.copytree(kit / SITE, site, dirs_exist_ok=True)
    else:
        site.mkdir(exist_ok=True)
        print(f"no package in {kit}: the installed one is tested")
    wheels = sorted((kit / WHEELS).glob("*.whl"))
    for wheel in wheels:
        extract(wheel, site)
    if not wheels:
        print(f"no wheel in {kit}: diffusers is what is installed, if any")
    kernels = work / "triton"
    kernels.mkdir(exist_ok=True)
    if (kit / KERNELS).is_file():
        extract(kit / KERNELS, kernels)
        relocate(kernels)
    else:
        print(f"no {KERNELS} in {kit}: Triton compiles as it goes")


def extract(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)


def relocate(cache: Path) -> None:
    """Make a Triton cache from another machine valid here: its groups name absolute paths."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.with_name(Path(path).name)) for name, path in paths.items()}
        group.write_text(json.dumps({"child_paths": here}))


def read_ahead() -> None:
    """Read torch's libraries in one pass, since the first import reads them page by page."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return
    libraries = sorted((Path(found.origin).parent / "lib").glob("*.so*"))
    for library in sorted(libraries, key=lambda file: "cuda" not in file.name):
        library.read_bytes()


if __name__ == "__main__":
    if sys.argv[1:] == ["read-ahead"]:
        read_ahead()
    else:
        unpack(Path(sys.argv[1]), Path(sys.argv[2]))
