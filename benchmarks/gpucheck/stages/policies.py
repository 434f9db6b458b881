"""Ticks of robots' policies: ten steps for one chunk of actions, with and without graphs.

No loop is faster than reading the weights once a step. The stage tells this time for each network,
by the bandwidth of a copy.
"""

from __future__ import annotations

from functools import partial

import torch
from policy_loops import Case, Contender, Policy, copy_bandwidth, prepared, timed
from policy_networks import bytes_of
from policy_tables import FLOOR

from gpucheck import measures
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.timing import difference, full_precision, spread

SECONDS, TICKS, LEAST = 2.0, 200, 5
DRY_POLICIES, DRY_TICKS = ("MLP",), 1
AGREEMENT = 1e-4
"""A share of the largest action; a kernel of another shape adds in another order."""


@torch.no_grad()
def run(record: Record, settings: Settings) -> None:
    bandwidth = None if settings.dry else copy_bandwidth(settings.device)
    record.row(copy_bytes_per_second=bandwidth)
    for network in DRY_POLICIES if settings.dry else measures.POLICIES:
        measure = partial(one_policy, record, settings, network, bandwidth)
        record.attempt(measure, network=network)


def one_policy(record: Record, settings: Settings, network: str, bandwidth: float | None) -> None:
    """Time a policy's ticks in every kind of graph that makes the right actions."""
    policy = Policy(Case(network), settings.device)
    contenders = {}
    for mode in settings.modes:
        made = record.attempt(partial(prepared, policy, mode), network=network, graph=mode)
        if made is not None:
            contenders[f"graph={mode}"] = made
    ticks = {FLOOR: policy.floor()}
    ticks |= {name: one.tick for name, one in agreeing(record, policy, contenders).items()}
    most = DRY_TICKS if settings.dry else TICKS
    with torch.inference_mode():
        # The first ticks choose kernels, and capture.
        timed(ticks, settings.device, seconds=0, most=min(most, LEAST), least=LEAST)
        times = timed(ticks, settings.device, seconds=SECONDS, most=most, least=LEAST)
    read = None if bandwidth is None else policy.case.steps * bytes_of(policy.network) / bandwidth
    for contender, found in times.items():
        record.show(
            measure=measures.policy(network, contender),
            seconds=spread(found.done),
            host_seconds=spread(found.returned),
            weights_read_seconds=read,
            steps=policy.case.steps,
        )


def agreeing(
    record: Record, policy: Policy, contenders: dict[str, Contender]
) -> dict[str, Contender]:
    """The contenders that run; one whose actions differ from those of the loop that is written out
    is a problem.
    """
    alive = {}
    with full_precision():
        expected = policy.written_out(0)
        for name, contender in contenders.items():
            about = {"network": policy.case.network, "contender": name}
            actions = record.attempt(partial(contender.actions, 0), **about)
            if actions is None:
                continue
            alive[name] = contender
            differs = difference(actions, expected)
            # With `<=`, NaN counts as a difference.
            say = record.row if differs <= AGREEMENT else record.problem
            say(**about, difference=differs)
    return alive
