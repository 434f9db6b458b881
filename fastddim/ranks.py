"""Several processes at one task, by `torch.distributed`; or one process alone."""

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
    """This process among all that were started together.

    Attributes:
        rank: number of this process.
        world: how many there are.
        group: what they talk through; None for one process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def gather(self, value: Item) -> list[Item]:
        """The value of every rank, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], Result]) -> list[Result]:
        """The results of `action` on every rank; where it fails on one, it fails on all.

        Raises:
            RuntimeError: it failed on another rank. Its own error is raised as it is.
        """
        result: Any = None
        own: Exception | None = None
        try:
            result = action()
        except Exception as error:
            own = error
        answers = self.gather((result, None if own is None else str(own) or type(own).__name__))
        if own is not None:
            raise own
        for rank, (_, problem) in enumerate(answers):
            if problem is not None:
                raise RuntimeError(f"rank {rank}: {problem}")
        return [answer for answer, _ in answers]

    def on_first(self, action: Callable[[], Result]) -> Result:
        """The result of `action`, which rank 0 alone does."""
        results: list[Any] = self.together(lambda: action() if self.rank == 0 else None)
        first: Result = results[0]
        return first

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What of `items` falls to this rank."""
        return items[self.rank :: self.world]


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks of a group that is there, or of one that `torchrun` announces, or this process.

    A group that is made here (gloo for tensors on the CPU, NCCL for those on a GPU) is left again.
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
    """Join the group that the environment describes.

    After a restart the store of `torchrun` still holds the addresses of the processes before, so
    each attempt has keys of its own.
    """
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=c10d.PrefixStore(f"fastddim/{attempt}/{world}", store),
        rank=rank,
        world_size=world,
    )
