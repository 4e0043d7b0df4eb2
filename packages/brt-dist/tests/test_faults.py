"""A rank that ends, or comes too late, is an error on the others within the group's timeout."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import brt_dist
from brt_dist.exchange import exchange_counts

pytestmark = pytest.mark.dist
TIMEOUT_S = 2.0


def stopping(rank: int, when: str) -> float:
    """Seconds until the error; rank 1 ends, or sleeps, before or after counts are exchanged."""
    counts_WG = torch.ones(dist.get_world_size(), 2, dtype=torch.int64)
    rows = torch.ones(int(counts_WG.sum()), 3, requires_grad=True)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    dist.barrier()
    if rank == 1 and when == "before":
        os._exit(1)
    if rank == 1 and when == "late":
        time.sleep(TIMEOUT_S + 3)  # the others wait a second more for its word
    if rank == 1 and when == "between":
        exchange_counts((rows,), [counts_WG], group)
        os._exit(1)
    start = time.perf_counter()
    why = "a rank" if rank == 1 else "rank 1"
    says = rf"it failed on rank {rank} \(of 3 in the group\): {why} ended, cannot be reached, or"
    with pytest.raises(brt_dist.ExchangeError, match=says):
        there_and_back(rows, counts_WG, group, ends=rank == 1 and when == "backward")
    return time.perf_counter() - start


def there_and_back(
    rows: torch.Tensor, counts_WG: torch.Tensor, group: dist.ProcessGroup, ends: bool
) -> None:
    came, _ = brt_dist.sparse_all_to_all(rows, counts_WG, group)
    if ends:
        os._exit(1)
    came.sum().backward()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    world = Ranks(3)
    yield world
    world.close()


@pytest.mark.parametrize("when", ["before", "between", "backward", "late"])
def test_a_rank_stops(when: str, ranks: Ranks) -> None:
    outcomes = ranks.outcomes(stopping, when)
    for rank in (0, 2):
        is_good, seconds = outcomes[rank]
        assert is_good, seconds
        assert seconds < TIMEOUT_S + 10
    assert outcomes[1][0] == (when == "late")
