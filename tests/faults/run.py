"""Faults in real runs of many samples, and a count of the losses.

`python tests/faults/run.py` does everything, writes results.json next to it and the table in
docs/reliability.md, and exits with 1 if anything was lost. `--kills N` sets how often runs are
killed, `--table` only writes the table.

A try is one fault done to a run. It is lost if the result is not right: a resumed run whose digest
is not that of an uninterrupted one, a shard that was there before a kill and is not after it, a
file that should not be there, a traceback, or an exit code other than the documented one.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import fastddim
from fastddim.cli import main
from fastddim.files import atomic_file
from fastddim.models import locate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
DOCUMENT = ROOT / "docs" / "reliability.md"

# Small enough to be killed hundreds of times, and with many shards.
DIGITS = ("digits", "--stop", "400", "--batch-size", "8", "--steps", "3", "--eta", "0.5")
ACCEPTANCE = ("digits", "--stop", "10000", "--batch-size", "100", "--steps", "20")

# Each process is given this long to end by itself.
PATIENCE = 600


class Process:
    """A forked process, which needs no imports of its own: hundreds of them are made quickly."""

    def __init__(self, body: Callable[[], Any], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(body, environment)

    def _become(self, body: Callable[[], Any], environment: dict[str, str]) -> None:
        code = 70
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.update(environment)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            body()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < until:
            time.sleep(0.002)
        return self.ended()

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended():
            os.kill(self.pid, number)


class Runs:
    """Several processes that run one command in one folder."""

    def __init__(self, folder: Path, arguments: Sequence[str] = DIGITS) -> None:
        self.folder, self.arguments = folder, arguments
        self.logs = Path(tempfile.mkdtemp(dir=folder.parent, prefix="logs-"))

    def start(self, world: int = 1, *extra: str) -> list[Process]:
        words = ["generate", *self.arguments, "--out", str(self.folder), *extra]
        shared = {}
        if world > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            shared = {**address, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        return [
            Process(
                lambda: main(words, prog_name="fastddim"),
                self.logs / f"{rank}.log",
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {},
            )
            for rank in range(world)
        ]

    def finish(self, world: int = 1) -> bool:
        """True if an undisturbed run ends well."""
        processes = self.start(world)
        waited = [process.wait(PATIENCE) for process in processes]
        for process in processes:
            process.kill()
        return all(waited) and all(process.code == 0 for process in processes)

    def digest(self) -> str:
        total = hashlib.sha256()
        for record in sorted(self.folder.glob("*.sha256")):
            total.update(record.read_bytes())
        return total.hexdigest()

    def whole(self) -> set[str]:
        """The shards whose contents agree with their digests."""
        names = set()
        for record in self.folder.glob("*.sha256"):
            lines = [line.split("  ") for line in record.read_text().splitlines()]
            if all(digest_of(self.folder / name) == value for value, name in lines):
                names.add(record.name)
        return names

    def parts(self) -> list[Path]:
        return list(self.folder.glob(".*.part"))

    def complaints(self) -> str:
        return "".join(log.read_text(errors="replace") for log in sorted(self.logs.glob("*.log")))

    def one_line(self) -> bool:
        """True if the first process ended with one line about an error."""
        text = (self.logs / "0.log").read_text()
        return re.fullmatch(r"(fastddim: [^\n]+\n)*fastddim: error: [^\n]+\n", text) is not None


class Faults:
    """A count of tries and losses."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.rows: list[dict[str, Any]] = []
        whole = Runs(folder / "whole")
        began = time.monotonic()
        assert whole.finish(), whole.complaints()
        self.seconds = time.monotonic() - began
        self.expected, self.shards = whole.digest(), sorted(whole.whole())
        self.whole = whole

    def count(self, fault: str, outcomes: Iterator[bool], **more: Any) -> None:
        """Counts one row of the results; an outcome is true if everything was right."""
        tries = losses = 0
        for right in outcomes:
            tries += 1
            losses += not right
        self.rows.append({"fault": fault, "tries": tries, "losses": losses, **more})
        print(f"{fault}: {tries} tries, {losses} losses", flush=True)

    def new(self, arguments: Sequence[str] = DIGITS) -> Runs:
        return Runs(Path(tempfile.mkdtemp(dir=self.folder)) / "run", arguments)

    def growing(self) -> Runs:
        """A run of fewer samples, whose last batch is not full."""
        runs = self.new()
        fewer = Runs(runs.folder, [*DIGITS, "--stop", "45"])
        assert fewer.finish(), fewer.complaints()
        return runs

    def copy(self) -> Runs:
        runs = self.new()
        shutil.copytree(self.whole.folder, runs.folder)
        return runs

    def mended(self, runs: Runs) -> bool:
        """True if another number of ranks completes the run with the digest of an uninterrupted
        one.
        """
        right = self.ends(runs, self.expected)
        if right:
            shutil.rmtree(runs.folder.parent)
        return right

    def kills(self, tries: int, runs_of: Callable[[], Runs], expected: str) -> Iterator[bool]:
        """Kills ranks by SIGKILL at random points, up to ten times in a run, and resumes with other
        numbers of ranks.
        """
        while tries > 0:
            runs = runs_of()
            kept = True
            left = min(tries, 10)
            while left > 0:
                processes = runs.start(self.random.randint(1, 3))
                before = runs.whole() if runs.folder.exists() else set()
                if self.killed(processes):
                    # The last shard of a run that grows gives way to a larger one.
                    kept = kept and before & set(self.shards) <= runs.whole()
                    left, tries = left - 1, tries - 1
                    # The last kill of a run also answers for how that ends.
                    if left > 0:
                        yield kept
                elif all(process.code == 0 for process in processes):
                    shutil.rmtree(runs.folder.parent)
                    runs = runs_of()
                else:
                    print(f"failed: {runs.folder}\n{runs.complaints()}", flush=True)
                    left, tries = left - 1, tries - 1
                    yield False
            yield kept and self.ends(runs, expected)

    def ends(self, runs: Runs, expected: str) -> bool:
        right = runs.finish(self.random.randint(1, 3))
        right = right and runs.digest() == expected and not runs.parts()
        if not right:
            print(f"lost: {runs.folder}\n{runs.complaints()}", flush=True)
        return right

    def killed(self, processes: Sequence[Process], within: float | None = None) -> bool:
        """Kill a rank at a random moment and the others soon after; False if they ended before."""
        time.sleep(self.random.uniform(0, within or 0.8 * self.seconds))
        running = [process for process in processes if not process.ended()]
        self.random.shuffle(running)
        for process in running:
            process.kill()
            time.sleep(self.random.uniform(0, 0.02))
        for process in processes:
            process.wait(PATIENCE)
        return any(process.code == -signal.SIGKILL for process in processes)

    def power_cuts(self, tries: int) -> Iterator[bool]:
        for _ in range(tries):
            runs, event = self.new(), self.random.randrange(4, 4 * len(self.shards))
            runs.folder.mkdir()
            body, seed = self.whole.arguments, self.random.random()
            process = Process(
                lambda: cut_power(runs.folder, body, event, seed),  # noqa: B023
                runs.logs / "0.log",
                {},
            )
            yield process.wait(PATIENCE) and process.code == 99 and self.mended(runs)

    def interrupts(self, tries: int) -> Iterator[bool]:
        while tries > 0:
            runs = self.new()
            (process,) = runs.start()
            time.sleep(self.random.uniform(0.1, 0.8 * self.seconds))
            process.kill(signal.SIGINT)
            process.wait(PATIENCE)
            if process.code == 0:
                continue
            tries -= 1
            text = runs.complaints()
            clean = process.code == 130 and text.endswith("fastddim: interrupted\n")
            yield clean and not runs.parts() and self.mended(runs)

    def patched(self, tries: int, patch: Callable[[int], None], message: str) -> Iterator[bool]:
        """Runs a command under `patch(n)`, which must fail with a line that holds `message` and go
        on afterwards.
        """
        for _ in range(tries):
            runs, n = self.new(), self.random.randrange(1, 2 * len(self.shards))

            def body(runs: Runs = runs, n: int = n) -> None:
                patch(n)
                main(["generate", *runs.arguments, "--out", str(runs.folder)], "fastddim")

            process = Process(body, runs.logs / "0.log", {})
            failed = process.wait(PATIENCE) and process.code == 1 and runs.one_line()
            clean = failed and message in runs.complaints() and not runs.parts()
            yield clean and self.mended(runs)

    def corrupt_shards(self, tries: int) -> Iterator[bool]:
        for _ in range(tries):
            runs = self.copy()
            files = sorted([*runs.folder.glob("*.npz"), *runs.folder.glob("*.sha256")])
            for path in self.random.sample(files, self.random.randint(1, 5)):
                damage(path, self.random)
            yield self.mended(runs)

    def refused(self, tries: int, *words: str, message: str) -> Iterator[bool]:
        """Runs a command that must fail with one line and leave no folder."""
        for _ in range(tries):
            runs = self.new()
            process = Process(lambda: main([*words], "fastddim"), runs.logs / "0.log", {})
            failed = process.wait(PATIENCE) and process.code == 1 and runs.one_line()
            yield failed and message in runs.complaints() and not runs.folder.exists()

    def bad_weights(self, tries: int) -> Iterator[bool]:
        for _ in range(tries):
            model = Path(tempfile.mkdtemp(dir=self.folder)) / "model.safetensors"
            content = locate("digits").read_bytes()
            shutil.copy(locate("digits").with_suffix(".json"), model.with_suffix(".json"))
            model.write_bytes(content[: self.random.randrange(len(content))])
            words = ("generate", str(model), "--stop", "8", "--out", str(model.parent / "run"))
            (right,) = self.refused(1, *words, message="expected")
            yield right and not (model.parent / "run").exists()

    def exceptions(self, tries: int, where: str) -> Iterator[bool]:
        for _ in range(tries):
            runs, n = self.new(), self.random.randrange(1, 100)
            process = Process(
                lambda: fail_in(where, n, runs.folder),  # noqa: B023
                runs.logs / "0.log",
                {},
            )
            done = process.wait(PATIENCE) and process.code == 99 and not runs.parts()
            yield done and len(runs.whole()) == len(self.shards)

    def fuzz(self, examples: int) -> Iterator[bool]:
        runs = self.new()
        process = Process(lambda: fuzz(examples, runs.folder.parent), runs.logs / "0.log", {})
        if not process.wait(10 * PATIENCE) or process.code != 0:
            print(runs.complaints(), flush=True)
            yield False
        else:
            yield from [True] * int(runs.complaints().split()[-1])


def cut_power(folder: Path, arguments: Sequence[str], event: int, seed: float) -> None:
    """Runs until the given sync or rename, and leaves the files as a power cut then may
    leave them.

    A file is what it was at its last sync, or if it had none a part of it; a name is certain once
    its folder is synced after it, and there or not before.
    """
    chance, rename = random.Random(seed), os.replace
    synced: dict[str, bytes] = {}
    names: dict[Path, tuple[bytes, bool]] = {}
    events = 0

    def happen() -> None:
        nonlocal events
        events += 1
        if events < event:
            return
        for path in folder.iterdir():
            path.unlink()
        for path, (content, certain) in names.items():
            if certain or chance.random() < 0.5:
                path.write_bytes(content)
        os._exit(99)

    def fsync(descriptor: int) -> None:
        happen()
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if Path(path).is_dir():
            for name, (content, _) in names.items():
                names[name] = content, True
        else:
            synced[path] = Path(path).read_bytes()

    def replace(old: Any, new: Any) -> None:
        happen()
        content = Path(old).read_bytes()
        unsynced = content[: chance.randrange(len(content))]
        names[Path(new)] = synced.get(os.path.realpath(old), unsynced), False
        rename(old, new)

    os.fsync, os.replace = fsync, replace
    main(["generate", *arguments, "--out", str(folder)], "fastddim")


def full_disk(n: int) -> None:
    """Lets the disk run full from the n-th sync on."""
    sync, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = fsync


def small_files(_: int) -> None:
    """Lets the kernel refuse files of the size of a shard."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))


def damage(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    kind = chance.choice(["truncate", "flip", "empty", "remove", "replace"])
    if kind == "remove":
        path.unlink()
        return
    if kind == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    if kind == "replace":
        content = bytearray(chance.randbytes(len(content)))
    end = {"truncate": chance.randrange(len(content)), "empty": 0}.get(kind, len(content))
    path.write_bytes(content[:end])


class Failing(torch.nn.Module):
    """A model, or its callback, that fails in its n-th call, or is NaN from then on."""

    def __init__(self, where: str, n: int) -> None:
        super().__init__()
        self.net = fastddim.models.load("digits")
        self.sample_shape, self.schedule = self.net.sample_shape, self.net.schedule
        self.where, self.n, self.calls = where, n, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.n and self.where == "model":
            raise KeyError("of the model")
        output: torch.Tensor = self.net(x, t)
        return output * torch.nan if self.calls > self.n and self.where == "nan" else output

    def callback(self, *_: Any) -> None:
        if self.calls > self.n and self.where == "callback":
            raise KeyError("of the callback")


def fail_in(where: str, n: int, folder: Path) -> None:
    """Exits with 99 if the error is the right one, and a run without the error ends well."""
    wanted = ValueError if where == "nan" else KeyError
    arguments: dict[str, Any] = {"stop": 400, "batch_size": 8}
    model = Failing(where, n).eval()
    checked = where != "nan" or n % 2 == 0
    try:
        fastddim.generate(
            model, 3, folder, callback=model.callback, check_finite=checked, **arguments
        )
    except wanted:
        model.where = "nowhere"
        run = fastddim.generate(model, 3, folder, **arguments)
        alone = fastddim.generate(model, 3, folder.with_name("alone"), **arguments)
        os._exit(99 if run.digest == alone.digest else 1)


def fuzz(examples: int, folder: Path) -> None:
    """Tries random command lines, and prints their number."""
    from click.testing import CliRunner
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    os.chdir(folder)
    words = ["0", "1", "2", "-1", "2.5", "nan", "1e999", "auto", "digits", "npz", "", "é", "\x00"]
    values = st.one_of(
        st.sampled_from([*words, "run", "a.npz", "a.png", "1,0"]), st.text(max_size=6)
    )
    tried = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzzed(data: Any) -> None:
        nonlocal tried
        name = data.draw(st.sampled_from(["generate", "generate", "sample", "merge", "digest"]))
        options = [o.opts[-1] for o in main.commands[name].params if o.opts[0][0] == "-"]
        names = ["--help", *options]
        small = {
            "generate": ["digits", "--out", "run", "--stop", "3", "--steps", "1"],
            "sample": ["digits", "--count", "2", "--steps", "1"],
        }.get(name, ["run"])
        pairs = data.draw(st.lists(st.tuples(st.sampled_from(names), values), max_size=4))
        line = [name, *small, *(word for pair in pairs for word in pair)]
        # A long run is no fault.
        if any(word.isdecimal() and int(word) > 1000 for word in line):
            return
        tried += 1
        result = CliRunner().invoke(main, line)
        assert result.exception is None or isinstance(result.exception, SystemExit), line
        assert result.exit_code in (0, 1, 2), line
        assert "Traceback" not in result.output, line

    fuzzed()
    print(tried)


def acceptance(faults: Faults) -> dict[str, Any]:
    """Draws 10,000 samples on 1, 2 and 3 ranks, the latter two killed five times: one digest."""
    rows = []
    for world, kills in ((1, 0), (2, 5), (3, 5)):
        runs = faults.new(ACCEPTANCE)
        done = 0
        while done < kills:
            done += faults.killed(runs.start(world), within=8.0)
        assert runs.finish(world), runs.complaints()
        rows.append({"ranks": world, "kills": done, "sha256": runs.digest()})
        print(rows[-1], flush=True)
    return {"command": " ".join(("fastddim generate", *ACCEPTANCE)), "rows": rows}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def machine() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastddim": fastddim.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--", "fastddim", "tests/faults/run.py")),
    }


def as_markdown(results: dict[str, Any]) -> str:
    lines = ["| fault | tries | losses |", "|---|---|---|"]
    lines += [f"| {r['fault']} | {r['tries']} | {r['losses']} |" for r in results["rows"]]
    accepted = results["acceptance"]
    lines += ["", f"`{accepted['command']}`, one thread a rank:", ""]
    lines += ["| ranks | killed | SHA-256 of the run |", "|---|---|---|"]
    lines += [f"| {r['ranks']} | {r['kills']} | `{r['sha256']}` |" for r in accepted["rows"]]
    told = results["machine"]
    source = f"fastddim {told['fastddim']} at {told['commit']}, torch {told['torch']}"
    return "\n".join([*lines, "", f"{source}, CPU {told['cpu_capability']}."])


def updated(document: str, table: str) -> str:
    begin, end = "<!-- faults:begin -->", "<!-- faults:end -->"
    before, _, rest = document.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def everything(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    faults = Faults(folder, seed)
    some = max(1, kills // 10)
    new, expected = faults.new, faults.expected
    faults.count("SIGKILL at a random moment", faults.kills(kills, new, expected))
    faults.count("SIGKILL while a run grows", faults.kills(some, faults.growing, expected))
    faults.count("power cut, simulated", faults.power_cuts(some))
    faults.count("Ctrl-C", faults.interrupts(some))
    space = os.strerror(errno.ENOSPC)
    faults.count("full disk, simulated", faults.patched(some, full_disk, space))
    large = os.strerror(errno.EFBIG)
    faults.count("file size limit", faults.patched(some, small_files, large))
    faults.count("damaged shards", faults.corrupt_shards(some))
    blocked = folder / "file"
    blocked.touch()
    words = ("generate", *DIGITS, "--out", str(blocked / "run"))
    faults.count("unwritable folder", faults.refused(some, *words, message="file"))
    faults.count("truncated weights", faults.bad_weights(some))
    faults.count("model that turns to NaN", faults.exceptions(some, "nan"))
    faults.count("exception in the model", faults.exceptions(some, "model"))
    faults.count("exception in a callback", faults.exceptions(some, "callback"))
    faults.count("random command line", faults.fuzz(5 * kills))
    return {"machine": machine(), "rows": faults.rows, "acceptance": acceptance(faults)}


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        results = json.loads(RESULTS.read_text())
    else:
        with tempfile.TemporaryDirectory(prefix="fastddim-faults-") as folder:
            results = everything(Path(folder), options.kills, options.seed)
        with atomic_file(RESULTS) as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())
    with atomic_file(DOCUMENT) as file:
        file.write(updated(DOCUMENT.read_text(), as_markdown(results)).encode())
    digests = {row["sha256"] for row in results["acceptance"]["rows"]}
    return int(len(digests) > 1 or any(row["losses"] for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(run())
