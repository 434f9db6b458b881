"""Two commits compared by ratios: our time to the floor's or a peer's, each within one process.

    python benchmarks/compare.py COMMIT [--bench bench_step] [--rounds 5] [-k EXPRESSION]

Both commits, COMMIT and the working tree as git knows it, are checked out under `build/compare` and
built there in the same way. Then they take turns: each round runs the benchmark of both, each with
its own package. The numbers to compare are the times of our contenders as multiples of a reference
in the same process, so a slow moment of the machine is in both times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from harness import ROOT
from markdown_cells import table, three

OURS = ("fastddim", "stream")
"""The first words in the names of the package's contenders."""

REFERENCES = ("floor", "original", "diffusers", "DDPM", "one after the other")
"""The contenders that ours are compared with: the first of these that a case has."""

# The columns that identify a row of a result file; its other columns are measured.
IDENTITY = ("case", "eta", "shape", "steps", "load")

# The author of the commit that holds the working tree; no branch has that commit.
_AUTHOR = ("-c", "user.name=compare", "-c", "user.email=compare@localhost")

NO_CASE = 5
"""The exit status of pytest if an expression selects nothing."""


class Contender(NamedTuple):
    """A contender of the package in one case of a benchmark."""

    case: str
    name: str
    reference: str


class Change(NamedTuple):
    """The multiples of the reference in both commits, and their ratio in each round."""

    base: float
    head: float
    ratios: list[float]

    @property
    def verdict(self) -> str:
        """The direction of the change, if all rounds agree."""
        if min(self.ratios) > 1:
            return "slower"
        return "faster" if max(self.ratios) < 1 else ""


class Tree(NamedTuple):
    """A commit that was checked out, and the folder that its package is installed into."""

    name: str
    source: Path
    site: Path


def multiples(rows: Sequence[Mapping[str, Any]]) -> dict[Contender, float]:
    """The time of each contender of the package, as a multiple of its reference."""
    found = {}
    for row in rows:
        timings = row["timings"]
        reference = next((name for name in REFERENCES if name in timings), None)
        if reference is None:
            raise SystemExit(f"{_label(row)}: expected one of {', '.join(REFERENCES)}")
        for name in timings:
            if name.startswith(OURS):
                multiple = _cost(timings[name]) / _cost(timings[reference])
                found[Contender(_label(row), name, reference)] = multiple
    return found


def changes(
    base: Sequence[Mapping[Contender, float]], head: Sequence[Mapping[Contender, float]]
) -> dict[Contender, Change]:
    """The change of every contender that both commits have."""
    return {
        contender: Change(
            statistics.median(one[contender] for one in base),
            statistics.median(one[contender] for one in head),
            [
                after[contender] / before[contender]
                for before, after in zip(base, head, strict=True)
            ],
        )
        for contender in base[0]
        if contender in head[0]
    }


def report(found: Mapping[Contender, Change], base: set[Contender], head: set[Contender]) -> str:
    """A table of the changes, and the contenders that only one of the commits has.

    Args:
        base, head: all contenders of each commit.
    """
    header = ["case", "", "against", "base", "head", "head / base", "rounds", ""]
    rows = []
    for contender, change in found.items():
        spread = f"{three(min(change.ratios))} to {three(max(change.ratios))}"
        cells = [three(change.base), three(change.head), three(statistics.median(change.ratios))]
        rows.append([*contender[:2], contender.reference, *cells, spread, change.verdict])
    lines = [table(header, rows)] if rows else ["No case is in both commits."]
    for name, only in (("base", base - head), ("head", head - base)):
        if only:
            lines += ["", f"Only {name} has:"]
            lines += [f"- {contender.case}: {contender.name}" for contender in sorted(only)]
    return "\n".join(lines)


def compare(base: str, bench: str, rounds: int, expression: str | None, root: Path) -> str:
    """Build and time two commits of a repository, and report.

    Args:
        base: the commit to compare the working tree with.
        bench: a module of `benchmarks`, without its suffix.
        rounds: number of runs of each commit.
        expression: selects cases, as `-k` of pytest; a commit without such cases runs all its own.
        root: the repository.
    """
    # Tracked files with their uncommitted changes; git prints nothing if all is committed.
    head = _git(root, *_AUTHOR, "stash", "create") or "HEAD"
    folder = root / "build" / "compare"
    shutil.rmtree(folder, ignore_errors=True)
    _git(root, "worktree", "prune")
    with ExitStack() as stack:
        trees = [
            stack.enter_context(_built(root, folder, name, commit))
            for name, commit in (("base", base), ("head", head))
        ]
        results: dict[str, list[dict[Contender, float]]] = {"base": [], "head": []}
        for i in range(rounds):
            for tree in trees if i % 2 == 0 else trees[::-1]:
                print(f"round {i + 1} of {rounds}: {tree.name}", file=sys.stderr)
                rows = _rows(tree, bench, expression, folder / f"{tree.name}-{i}")
                results[tree.name].append(multiples(rows))
    before, after = results["base"], results["head"]
    return report(changes(before, after), set(before[0]), set(after[0]))


@contextmanager
def _built(root: Path, folder: Path, name: str, commit: str) -> Iterator[Tree]:
    """A commit, checked out and installed into a folder of its own while it is in use."""
    tree = Tree(name, folder / name, folder / f"{name}-site")
    _git(root, "worktree", "add", "--detach", str(tree.source), commit)
    try:
        print(f"building {name}: {_git(tree.source, 'log', '-1', '--oneline')}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        where = ["--no-build-isolation", "--no-deps", "--target", str(tree.site), "."]
        _run([*pip, *where], tree.source)
        yield tree
    finally:
        _git(root, "worktree", "remove", "--force", str(tree.source))
        shutil.rmtree(tree.site, ignore_errors=True)


def _rows(tree: Tree, bench: str, expression: str | None, results: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark, run by a commit with its own package."""
    module = f"benchmarks/{bench}.py"
    if not (tree.source / module).is_file():
        raise SystemExit(f"bench: expected a module that both commits have, {tree.name} lacks it")
    # Calling `-m pytest` would import the sources, which are not built.
    command = [str(Path(sys.executable).with_name("pytest")), module, "--results", str(results)]
    command += ["-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tree.site)}
    selected = [] if expression is None else ["-k", expression]
    status = _run([*command, *selected], tree.source, environment, allowed=(0, NO_CASE))
    if status == NO_CASE and selected:
        print(f"-k {expression!r} selects nothing in {tree.name}: all of it runs", file=sys.stderr)
        status = _run(command, tree.source, environment)
    files = list(results.glob("*.json"))
    if len(files) != 1:
        raise SystemExit(f"{module}: expected one result file of {tree.name}, got {len(files)}")
    rows: list[dict[str, Any]] = json.loads(files[0].read_text())["rows"]
    return rows


def _label(row: Mapping[str, Any]) -> str:
    """The text that identifies a row; the same in all commits."""
    case, *others = (name for name in IDENTITY if name in row)
    extents = {name: "x".join(map(str, row[name])) for name in others if name == "shape"}
    return ", ".join([str(row[case]), *(f"{n} {extents.get(n, row[n])}" for n in others)])


def _cost(timing: Mapping[str, float]) -> float:
    """The time of a contender, as a multiple of the baseline or in seconds."""
    return timing["ratio"] if "ratio" in timing else timing["latency_median"]


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout.strip()


def _run(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    allowed: Sequence[int] = (0,),
) -> int:
    """Run a command whose output is shown only if it fails."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode not in allowed:
        raise SystemExit(f"{result.stdout}\n{' '.join(command)}: status {result.returncode}")
    return result.returncode


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", help="the commit that the working tree is compared with")
    parser.add_argument("--bench", default="bench_step", help="a module of benchmarks/")
    parser.add_argument("--rounds", type=int, default=5, help="how often each commit runs")
    parser.add_argument("-k", dest="expression", help="the cases, as pytest selects them")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    print(compare(options.base, options.bench, options.rounds, options.expression, ROOT))


if __name__ == "__main__":
    main()
