"""The processes that work on one run, connected by `torch.distributed`, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

Item = TypeVar("Item")
Result = TypeVar("Result")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# How long a rank that is done waits for the slowest one.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process and the others that work on the same run.

    Attributes:
        rank: number of this process.
        world: the number of processes.
        group: the process group that they communicate in; None for one process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def gather(self, value: Item) -> list[Item]:
        """The values of all ranks, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], Result]) -> list[Result]:
        """Run `action` on every rank and return all results; if it fails on one, it fails on all.

        Raises:
            RuntimeError: `action` failed on another rank; errors of this rank stay as they are.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        message = None if failure is None else str(failure) or type(failure).__name__
        answers = self.gather((result, message))
        if failure is not None:
            raise failure
        for rank, (_, problem) in enumerate(answers):
            if problem is not None:
                raise RuntimeError(f"rank {rank}: {problem}")
        return [answer for answer, _ in answers]

    def on_first(self, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 and return its result on every rank."""
        results: list[Any] = self.together(lambda: action() if self.rank == 0 else None)
        first: Result = results[0]
        return first

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this rank works on."""
        return items[self.rank :: self.world]


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks of the process group in use, else those that `torchrun` started, if any.

    A group that is made here (gloo for tensors on the CPU, NCCL for those on a GPU) is destroyed at
    the end of the `with` block.
    """
    made = False
    if not dist.is_available():
        yield Ranks()
        return
    if not dist.is_initialized():
        if not all(name in os.environ for name in _LAUNCHED):
            yield Ranks()
            return
        _join(device)
        made = True
    try:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if made:
            dist.destroy_process_group()


def _join(device: torch.device) -> None:
    """Make the process group that the environment describes.

    After a restart the store of `torchrun` still holds the addresses of the previous processes, so
    each attempt uses keys of its own.
    """
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=c10d.PrefixStore(f"fastddim/{attempt}/{world}", store),
        rank=rank,
        world_size=world,
    )
