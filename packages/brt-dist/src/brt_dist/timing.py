"""How long calls take on the ranks of a group, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from brt_dist.groups import Group, host_device, naming_failures

_WHAT = "measure_transports"


@torch.no_grad()
def side_by_side(calls: Sequence[Callable[[], Tensor]], group: Group, repeats: int) -> list[float]:
    """Seconds of each call: of the slowest rank, the median of repeats in turn; on all ranks alike.

    Every rank must call it.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for of_one, call in zip(seconds, calls, strict=True):
            taken = _slowest(_timed(call, group), group)
            if turn:  # the first warms up
                of_one.append(taken)
    return [statistics.median(of_one) for of_one in seconds]


def _timed(call: Callable[[], Tensor], group: Group) -> float:
    with naming_failures(_WHAT, group):
        dist.barrier(group)
    start = time.perf_counter()
    out = call()
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return time.perf_counter() - start


def _slowest(seconds: float, group: Group) -> float:
    most = torch.tensor([seconds], dtype=torch.float64, device=host_device(group))
    with naming_failures(_WHAT, group):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return float(most)
