"""Records of checks as one result file: `python -m gpucheck.results OUT … --into FOLDER`.

Stages of a later record replace those of an earlier one, so a check may be run in parts. An
existing result file of the same machine and code gains the stages.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpucheck import record
from gpucheck.provenance import DRY, UNKNOWN
from gpucheck.record import RUNNER
from gpucheck.table import STAGES

FOLDER = Path(__file__).resolve().parents[1] / "results"

# The entries in which all rows of one result file agree.
SAME = ("gpu", "driver", "torch", "triton", "python", "commit", "modified")
# Words that do not distinguish GPUs by their names.
COMMON = re.compile(r"nvidia|geforce|tesla|\d+gb|hbm\w*|")


def gather(folders: Iterable[Path]) -> dict[str, Any]:
    """The result of one or several records, in the order they were made.

    Raises:
        ValueError: a record is empty, or they are of different machines or code.
    """
    calls: list[dict[str, Any]] = []
    for folder in folders:
        found = _calls(folder)
        if not found:
            raise ValueError(f"OUT: expected a folder with {record.NAME} of a check, got {folder}")
        calls += found
    return functools.reduce(merge, calls)


def merge(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Both results in one; a stage that both have run is that of the later one.

    Raises:
        ValueError: they are of different machines or code.
    """
    for key in SAME:
        here, there = earlier["machine"].get(key), later["machine"].get(key)
        if here != there:
            raise ValueError(f"results: expected the same {key} in all, got {here!r} and {there!r}")
    ends = {end["name"]: end for end in earlier["stages"]}
    for end in later["stages"]:
        if end["result"] != "not begun" or end["name"] not in ends:
            ends[end["name"]] = end
    replaced = {end["name"] for end in later["stages"] if end["result"] != "not begun"}
    kept = [row for row in earlier["rows"] if row["stage"] not in replaced]
    order = {stage.name: i for i, stage in enumerate(STAGES)}

    def place(name: str) -> int:
        return order.get(name, len(order))

    return {
        "machine": {**earlier["machine"], **later["machine"]},
        "stages": sorted(ends.values(), key=lambda end: place(end["name"])),
        "rows": sorted([*kept, *later["rows"]], key=lambda row: place(row["stage"])),
    }


def _calls(folder: Path) -> list[dict[str, Any]]:
    """The result of each call of the check that wrote into a folder."""
    calls: list[dict[str, Any]] = []
    for line in record.lines(folder):
        if line["stage"] == RUNNER and "machine" in line:
            calls.append({"machine": line["machine"], "stages": [], "rows": []})
        elif calls:
            _add(calls[-1], line)
    return calls


def _add(call: dict[str, Any], line: dict[str, Any]) -> None:
    """Put a line of the record into its place in the result."""
    if line["stage"] != RUNNER:
        call["machine"] |= line.pop("machine", {})
        line.pop("show", None)
        call["rows"].append(line)
    elif "begins" in line:
        # The stage stays so if the whole check is killed.
        call["stages"].append({"name": line["begins"], "result": "cut off", "seconds": None})
    elif "ends" in line:
        end = {"name": line["ends"], "result": line["result"], "seconds": line["seconds"]}
        call["stages"] = [other for other in call["stages"] if other["name"] != end["name"]]
        call["stages"].append(end)


def name(gpu: str) -> str:
    """A GPU's name for a file: "h100" for "NVIDIA H100 80GB HBM3"."""
    words = re.split(r"[^a-z0-9]+", gpu.lower())
    return "-".join(word for word in words if not COMMON.fullmatch(word)) or UNKNOWN


def path(result: dict[str, Any], folder: Path) -> Path:
    return folder / f"gpu-{name(result['machine'].get('gpu', UNKNOWN))}.json"


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write a result into its file in a folder."""
    file = path(result, folder)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return file


def added(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result, with the stages of an existing file of the same run."""
    file = path(result, folder)
    if not file.exists():
        return result
    earlier = json.loads(file.read_text(encoding="utf-8"))
    try:
        return merge(earlier, result)
    except ValueError as error:
        print(f"{file} is replaced: {error}")
        return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpucheck.results", description=__doc__)
    parser.add_argument("out", type=Path, nargs="+", help="folders that checks wrote into")
    parser.add_argument("--into", type=Path, default=FOLDER, help="folder of the result file")
    options = parser.parse_args()
    try:
        result = gather(options.out)
        if result["machine"]["gpu"] == DRY:
            raise ValueError("OUT: expected what a GPU gave, got a dry run")
    except ValueError as error:
        parser.error(str(error))
    print(write(added(result, options.into), options.into))


if __name__ == "__main__":
    main()
