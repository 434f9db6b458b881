"""The reason that the compiled extension cannot be used, and the command that repairs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

# The endings that setup.py adds to the version of an installation without the extension.
_CAUSES = {
    "no.kernel.by.request": ("with FASTDDIM_BUILD_EXT=0", "unset it"),
    "no.kernel.without.compiler": ("without a C++ compiler", "install one such as g++"),
    "no.kernel.without.torch": ("where torch was not installed yet", ""),
}


def why_missing(error: ImportError) -> str:
    """One line with cause and cure, of the error that the import of the extension raised."""
    if importlib.util.find_spec("fastddim._C") is not None:
        reason = str(error).partition("\n")[0]
        cause = f"does not load with torch {torch.__version__} ({reason})"
        first = ""
    else:
        built, first = _CAUSES.get(_local_version(), ("without it", ""))
        cause = f"is missing: this installation was built {built}"
    cure = f"{first}, then run" if first else "run"
    return f"the compiled extension {cause}; {cure}: {_command()}"


def _local_version() -> str:
    try:
        return importlib.metadata.version("fastddim").partition("+")[2]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _command() -> str:
    return f"pip install --no-deps --force-reinstall --no-cache-dir {_origin()}"


def _origin() -> str:
    """The source that pip installed from, as far as it is known."""
    try:
        text = importlib.metadata.distribution("fastddim").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if text is None:
        return "fastddim"
    origin = json.loads(text)
    named = origin["url"]
    if "vcs_info" in origin:
        named = f"{origin['vcs_info']['vcs']}+{named}@{origin['vcs_info']['commit_id']}"
    elif named.startswith("file:"):
        named = url2pathname(urlsplit(named).path)
    editable = origin.get("dir_info", {}).get("editable", False)
    return f"{'-e ' if editable else ''}{shlex.quote(named)}"
