"""`fastddim env`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import click

from fastddim._version import __version__
from fastddim.bundled import available
from fastddim.cli.program import Command

PACKAGES = ("torch", "numpy", "safetensors", "pillow", "click", "tqdm", "triton", "diffusers")


@click.command(
    "env",
    cls=Command,
    epilog="""\b
Examples:
  fastddim env
  fastddim env --json | jq '.backends[] | select(.available)'""",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show what works on this machine.

    The report lists versions, devices, and each backend, with the reason if it is not available.
    """
    report = collect()
    click.echo(json.dumps(report, indent=2) if as_json else _as_text(report))


def collect() -> dict[str, Any]:
    """Collect the report: versions, packages, devices, backends and models."""
    import torch

    from fastddim.backends import BACKENDS

    devices = _devices()
    return {
        "fastddim": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "backends": [_backend(name, device["device"]) for name in BACKENDS for device in devices],
        "models": list(available()),
    }


def _version(package: str) -> str | None:
    if package == "torch":
        import torch

        return torch.__version__  # This names the build; the package's metadata may not.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    from fastddim.processor import has_bfloat16

    cpu = {
        "device": "cpu",
        "name": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16(),
        "threads": torch.get_num_threads(),
    }
    return [cpu, *(_cuda_device(i) for i in range(torch.cuda.device_count()))]


def _cuda_device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _backend(name: str, device: str) -> dict[str, Any]:
    import torch

    from fastddim.backends import BACKENDS

    reason = BACKENDS[name].unavailable(torch.device(device))
    return {"backend": name, "device": device, "available": reason is None, "reason": reason}


def _as_text(report: dict[str, Any]) -> str:
    packages = {name: version or "not installed" for name, version in report["packages"].items()}
    lines = [
        f"fastddim     {report['fastddim']}",
        f"python       {report['python']}",
        f"platform     {report['platform']}",
        *(f"{name:12} {version}" for name, version in packages.items()),
        f"torch's CUDA {report['cuda'] or 'none'}",
        f"models       {', '.join(report['models'])}",
        "",
        "devices",
        *(f"  {_device_line(device)}" for device in report["devices"]),
        "",
        "backends, fastest first",
        *(
            f"  {b['backend']:10} {b['device']:7} "
            + ("available" if b["available"] else f"not available: {b['reason']}")
            for b in report["backends"]
        ),
    ]
    return "\n".join(lines)


def _device_line(device: dict[str, Any]) -> str:
    if "threads" in device:
        rest = f"{device['threads']} threads"
    else:
        rest = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    return f"{device['device']:7} {device['name']}, {device['capability']}, {rest}"
