"""Which transport is fastest for a layer, by measurement on all its ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from brt_dist.experts import ParallelExpertRouter
from brt_dist.groups import Group, host_device, naming_failures
from brt_dist.transport import Transport


@torch.no_grad()
def measure_transports(
    router: ParallelExpertRouter,
    transports: Sequence[Transport],
    *args: Any,
    repeats: int = 5,
    **kwargs: Any,
) -> list[float]:
    """Seconds that a layer takes by each transport: of the slowest rank, the median of repeats.

    Every rank must call it. ``args`` and ``kwargs`` are those of a call of the router: measure with
    cells like those to come, since what is fastest goes by their number. The same on every rank.
    """
    group = router.spread.group
    routers = [ParallelExpertRouter(router.spread, transport) for transport in transports]
    seconds: list[list[float]] = [[] for _ in routers]
    for turn in range(repeats + 1):
        for of_one, one in zip(seconds, routers, strict=True):
            taken = _slowest(_timed(one, args, kwargs, group), group)
            if turn:  # the first warms up
                of_one.append(taken)
    return [statistics.median(of_one) for of_one in seconds]


def _timed(
    router: ParallelExpertRouter, args: Sequence[Any], kwargs: Mapping[str, Any], group: Group
) -> float:
    with naming_failures("measure_transports", group):
        dist.barrier(group)
    start = time.perf_counter()
    out = router(*args, **kwargs)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return time.perf_counter() - start


def _slowest(seconds: float, group: Group) -> float:
    most = torch.tensor([seconds], dtype=torch.float64, device=host_device(group))
    with naming_failures("measure_transports", group):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return float(most)
