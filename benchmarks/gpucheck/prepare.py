"""Prepares the kit of the GPU check, on a machine with network: `python -m gpucheck.prepare`.

The Python that runs it must be like that of the GPU machine: the same versions of Python, torch and
Triton, and nvcc. The kit holds the package built here, the wheel of diffusers, Triton's compiled
kernels, and `kit.json` with the sources and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from harness import machine, version_of

from gpucheck import building
from gpucheck.commands import output
from gpucheck.kit import KERNELS, SITE, WHEELS
from gpucheck.provenance import digest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MOST_BYTES = 60 * 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpucheck.prepare", description=__doc__)
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpucheck", help="folder to make")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine")
    parser.add_argument("--torch", default="2.11.0", help="version of the GPU machine")
    parser.add_argument("--triton", default="3.6.0", help="version of the GPU machine")
    parser.add_argument("--nvcc", default="13.0", help="release to build with")
    parser.add_argument("--diffusers", default="0.42.1", help="version to take along")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, as in sm_90")
    return parser.parse_args()


def cuda_home() -> Path | None:
    """The toolkit of the environment: CUDA_HOME, or the packages from PyPI."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    for folder in map(Path, sys.path):
        for toolkit in sorted((folder / "nvidia").glob("cu[0-9]*")):
            if (toolkit / "bin" / "nvcc").is_file():
                return toolkit
    found = shutil.which("nvcc")
    return Path(found).resolve().parents[1] if found else None


def nvcc_release(home: Path | None) -> str | None:
    said = output(str(home / "bin" / "nvcc"), "--version") if home else ""
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else None


def mismatches(options: argparse.Namespace, home: Path | None) -> Iterator[str]:
    """Give one message for each version that differs from the GPU machine's."""
    python = ".".join(platform.python_version_tuple()[:2])
    plain_torch = torch.__version__.partition("+")[0]
    for name, expected, got in (
        ("python", options.python, python),
        ("torch", options.torch, plain_torch),
        ("triton", options.triton, version_of("triton")),
        ("nvcc", options.nvcc, nvcc_release(home)),
    ):
        if got != expected:
            yield f"{name}: expected {expected}, got {got}"
    if torch.version.cuda is None:
        yield f"torch: expected a CUDA build, got {torch.__version__}"


def build_package(kit: Path, home: Path) -> None:
    """Install the package, with its CUDA kernels, into the kit."""
    with tempfile.TemporaryDirectory() as folder:
        building.copy_sources(ROOT, Path(folder))
        pip(
            *("install", "--no-build-isolation", "--no-deps", "--no-index"),
            *("--target", str(kit / SITE), "."),
            cwd=folder,
            CUDA_HOME=str(home),
            FASTDDIM_BUILD_CUDA="1",
        )


def pip(*words: str, cwd: str | Path = ROOT, **variables: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words[:1], "-q", *words[1:]],
        cwd=cwd,
        env={**os.environ, **variables},
        check=True,
    )


def compile_kernels(kit: Path, capability: int) -> None:
    """Compile the kernels that the check launches in Triton, and pack Triton's cache."""
    with tempfile.TemporaryDirectory() as folder:
        stub, cache = Path(folder) / "stub", Path(folder) / "cache"
        stub.mkdir()
        # Launchers link to the driver's library; on the GPU machine they find the real one.
        library = stub / "libcuda.so.1"
        line = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(HERE / "stub.c")]
        subprocess.run([*line, "-o", str(library)], check=True)
        variables = {
            "TRITON_LIBCUDA_PATH": str(stub),
            "LD_LIBRARY_PATH": str(stub),
            "TRITON_CACHE_DIR": str(cache),
            "TRITON_STORE_BINARY_ONLY": "1",
            "PYTHONPATH": os.pathsep.join((str(kit / SITE), str(HERE.parent))),
            "PYTHONSAFEPATH": "1",
        }
        words = [sys.executable, "-m", "gpucheck.prewarm", str(ROOT), str(capability)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        subprocess.run(words, cwd=folder, env={**environment, **variables}, check=True)
        archive = kit / KERNELS
        shutil.make_archive(str(archive.with_suffix("")), "zip", cache)


def described(kit: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The record of the sources and versions in the kit."""
    facts = machine()
    (package,) = (d for d in distributions(path=[str(kit / SITE)]) if d.name == "fastddim")
    return {
        "commit": facts["commit"],
        "modified": facts["modified"],
        "sources": digest(ROOT),
        "fastddim": package.version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": options.triton,
        "nvcc": options.nvcc,
        "capability": options.capability,
    }


def main() -> None:
    options = arguments()
    home = cuda_home()
    wrong = list(mismatches(options, home))
    if wrong or home is None:
        raise SystemExit("\n".join([f"{sys.executable} is not like the GPU machine:", *wrong]))
    # The new kit is made next to the old one and replaces it at the end, so a kit is always whole.
    kit = options.kit.with_name(f"{options.kit.name}.part")
    shutil.rmtree(kit, ignore_errors=True)
    kit.mkdir(parents=True)
    build_package(kit, home)
    wheel = ("--no-deps", "--only-binary=:all:", "-d", str(kit / WHEELS))
    pip("download", *wheel, f"diffusers=={options.diffusers}")
    compile_kernels(kit, options.capability)
    (kit / "kit.json").write_text(json.dumps(described(kit, options), indent=1) + "\n")
    size = sum(file.stat().st_size for file in kit.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"kit: expected at most {MOST_BYTES >> 20} MiB, got {size >> 20} in {kit}")
    shutil.rmtree(options.kit, ignore_errors=True)
    kit.rename(options.kit)
    print(f"{options.kit}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
