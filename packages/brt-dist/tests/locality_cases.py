"""What ranks do in test_locality: rows stay where experts are, and their order comes back.

Legend: W ranks, G experts on a rank, R rows, D features.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import brt_dist


def sent_by(rank: int, skew: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rows, counts) of a rank; most are for experts of the rank `skew` further on."""
    num_ranks = dist.get_world_size()
    made = torch.Generator().manual_seed(100 * seed + rank)
    counts_WG = torch.randint(0, 3, (num_ranks, 2), generator=made)
    counts_WG[(rank + skew) % num_ranks] += 7
    if seed == 2:
        counts_WG *= rank % 2
    return torch.randn(int(counts_WG.sum()), 3, generator=made).double(), counts_WG


def stays(rank: int, skew: int, seed: int) -> tuple[int, int]:
    """(rows that travel back, rows that would without an assignment); results and gradients."""
    rows, counts_WG = sent_by(rank, skew, seed)
    rows.requires_grad_()
    ids = torch.arange(rows.shape[0])
    (came, came_ids), exchange = brt_dist.sparse_all_to_all((rows, ids), counts_WG)
    assignment = brt_dist.assign_sources(exchange)
    assert sorted(assignment.source_W) == list(range(dist.get_world_size()))
    here, here_ids = brt_dist.return_to_assigned((came.square(), came_ids), exchange, assignment)
    of_source, _ = sent_by(assignment.source, skew, seed)
    assert torch.equal(here.detach(), of_source.square())
    assert torch.equal(here_ids, torch.arange(of_source.shape[0]))
    residual = assignment.exchange(rows * 2)
    assert torch.equal(residual.detach(), of_source * 2)
    out, out_ids = assignment.restore((here + residual, here_ids))
    assert torch.equal(out.detach(), rows.detach().square() + rows.detach() * 2)
    assert torch.equal(out_ids, ids)
    scale = torch.arange(rows.numel()).view_as(rows) + 1.0 + rank
    (out * scale).sum().backward()
    torch.testing.assert_close(rows.grad, scale * (2 * rows.detach() + 2))
    with torch.no_grad():
        assert torch.equal(assignment.restore(assignment.exchange(ids)), ids)
    return assignment.moved


def wrong(rank: int, kind: str) -> str:
    rows, counts_WG = sent_by(rank, 1, 0)
    came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG)
    assignment = brt_dist.assign_sources(exchange)
    try:
        if kind == "rows":
            brt_dist.return_to_assigned(came[1:], exchange, assignment)
        elif rank == 1:
            assignment.exchange((came, came[1:]) if kind == "flows" else came.float())
        else:
            assignment.exchange((came, came) if kind == "flows" else came)
    except brt_dist.ExchangeError as error:
        return str(error)
    return "no error"
