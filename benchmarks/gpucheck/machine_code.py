"""Machine code of NVIDIA GPUs: the tools that list it, and counts of its instructions (SASS)."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path


def nvcc() -> Path | None:
    return tool("nvcc")


def tool(name: str) -> Path | None:
    """The path of a tool: nvcc and ptxas come with nvidia-cuda-nvcc, nvdisasm and cuobjdump with
    Triton.
    """
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            found = Path(place) / folder / name
            if found.exists():
                return found
    found_on_path = shutil.which(name)
    return Path(found_on_path) if found_on_path else None


def output_of(command: list[object], folder: Path) -> str:
    return subprocess.run(
        list(map(str, command)), cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def short(name: str) -> str:
    """`update<float, __half, plain, false>` from a mangled name, with our names for the types."""
    demangled = subprocess.run(
        ["c++filt", name], check=True, capture_output=True, text=True
    ).stdout.strip()
    demangled = demangled.replace("fastddim_default::", "").removeprefix("void ")
    for value, kind in enumerate(("plain", "guided", "any")):
        demangled = demangled.replace(f"(Kind){value}", kind)
    return demangled.partition("(")[0]


def sections(listing: str) -> dict[str, str]:
    """The listing of each function, by its mangled name."""
    found = {}
    for section in re.split(r"\.section\s+\.text\.", listing)[1:]:
        name = re.match(r"\w+", section)
        assert name is not None
        found[name[0]] = section
    return found


def sass_of(listing: str) -> dict[str, Counter[str]]:
    """The instructions of each function, by opcode with its modifiers."""
    instruction = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    return {
        name: Counter(re.findall(instruction, section, re.MULTILINE))
        for name, section in sections(listing).items()
    }


def count(sass: Counter[str], opcode: str) -> int:
    return sum(n for name, n in sass.items() if name.split(".")[0] == opcode)
