"""What ranks do in test_exchange: each function runs on every rank.

Legend: W ranks, G experts on a rank, R rows, D features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import brt_dist
from brt_dist import agree, layout, reference
from brt_dist.exchange import exchange_counts, start
from brt_dist.groups import resolve

Group = dist.ProcessGroup | None
finish = layout.Landing.finish
GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}


def subset(members: tuple[int, ...]) -> Group:
    """The group of these ranks, made once."""
    if members not in GROUPS:
        GROUPS[members] = dist.new_group(list(members))
    return GROUPS[members]


def counts_of(rank: int, num_ranks: int, num_experts: int, case: str, seed: int) -> Tensor:
    """Random counts for a rank; `case` says what is empty."""
    made = torch.Generator().manual_seed(1000 * seed + rank)
    counts_WG = torch.randint(0, 6, (num_ranks, num_experts), generator=made)
    if case == "empty" or (case == "silent-rank" and rank == num_ranks - 1):
        counts_WG.zero_()
    elif case == "idle-rank":
        counts_WG[0] = 0
    elif case == "idle-expert":
        counts_WG[:, -1] = 0
    elif case == "one-path":
        counts_WG.zero_()
        counts_WG[-1, 0] = 7
    return counts_WG


def rows_of(rank: int, counts_WG: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Rows that tell where they are from."""
    num_rows = int(counts_WG.sum())
    number = torch.arange(num_rows * 6).reshape(num_rows, 6) + 100 * rank
    return number[:, : shape[0] if shape else 1].reshape(num_rows, *shape).to(dtype)


def equals_reference(
    rank: int, case: str, num_experts: int, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    num_ranks = dist.get_world_size()
    counts_WG = counts_of(rank, num_ranks, num_experts, case, seed)
    rows = rows_of(rank, counts_WG, dtype, shape)
    came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG)
    wanted, received_WG = reference.sparse_all_to_all(rows, counts_WG)
    assert came.dtype == dtype
    assert torch.equal(came, wanted)
    assert torch.equal(exchange.received_WG, received_WG)
    assert torch.equal(exchange.load_G, received_WG.sum(0))
    assert torch.equal(reference.reverse_all_to_all(came, counts_WG), rows)
    assert torch.equal(brt_dist.reverse_all_to_all(came, exchange), rows)


def keeping_own(rank: int, function: Callable[..., None], *args: Any) -> None:
    """Another case, in which ranks keep their own rows where few rows would travel with others'."""
    with (
        mock.patch("brt_dist.layout.LONG", 0),
        mock.patch("brt_dist.segments.LONG", 0),
        mock.patch("brt_dist.flight.LEAST_OWN_BYTES", 0),
    ):
        function(rank, *args)


def keeps_own(
    rank: int, num_own: int, num_others: int, num_experts: int = 2, least_bytes: int = 0
) -> bool:
    """Whether a rank with so many rows for itself, and for each other, keeps its own."""
    counts_WG = torch.full((dist.get_world_size(), num_experts), num_others)
    counts_WG[rank] = num_own
    rows = rows_of(rank, counts_WG, torch.float32, (2,))
    with (
        mock.patch("brt_dist.flight.LEAST_OWN_BYTES", least_bytes),
        mock.patch.object(layout.Landing, "finish", autospec=True, side_effect=finish) as finished,
    ):
        came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG)
    assert torch.equal(came, reference.sparse_all_to_all(rows, counts_WG)[0])
    assert torch.equal(brt_dist.reverse_all_to_all(came, exchange), rows)
    return bool(finished.call_count)


def two_at_a_time(rank: int) -> None:
    """Two exchanges under way at once, the later one waited for first."""
    first, second = (counts_of(rank, dist.get_world_size(), 3, "", seed) for seed in (1, 2))
    rows, others = (rows_of(rank, counts, torch.int64, (2,)) for counts in (first, second))
    handles = [
        brt_dist.sparse_all_to_all(sent, counts, async_op=True)
        for sent, counts in ((rows, first), (others, second))
    ]
    for handle, sent in zip(handles[::-1], (others, rows), strict=True):
        came, made = handle.wait()
        assert torch.equal(brt_dist.reverse_all_to_all(came, made), sent)


def many_experts(rank: int) -> None:
    """More columns of counts than the first message has room for."""
    counts_WG = counts_of(rank, dist.get_world_size(), 200, "", 3)
    rows = rows_of(rank, counts_WG, torch.int64, (2,))
    came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG)
    assert torch.equal(came, reference.sparse_all_to_all(rows, counts_WG)[0])
    assert torch.equal(brt_dist.reverse_all_to_all(came, exchange), rows)


def flows_share_counts(rank: int, async_op: bool) -> None:
    counts_WG = counts_of(rank, dist.get_world_size(), 3, "", 5)
    kinds: list[tuple[torch.dtype, tuple[int, ...]]] = [
        (torch.float32, (3,)), (torch.int64, ()), (torch.bool, (2, 1)), (torch.float64, (0,)),
        (torch.bfloat16, (4,)),
    ]  # fmt: skip
    flows = tuple(
        torch.zeros(int(counts_WG.sum()), 0, dtype=dtype)
        if shape == (0,)
        else rows_of(rank, counts_WG, dtype, (shape[0],) if shape else ()).reshape(-1, *shape)
        for dtype, shape in kinds
    )
    if async_op:
        handle = brt_dist.sparse_all_to_all(flows, counts_WG, async_op=True)
        came, exchange = handle.wait()
        assert handle.wait()[0] is came
        back = brt_dist.reverse_all_to_all(came, exchange, async_op=True).wait()
    else:
        came, exchange = brt_dist.sparse_all_to_all(flows, counts_WG)
        back = brt_dist.reverse_all_to_all(came, exchange)
    for flow, moved, returned in zip(flows, came, back, strict=True):
        assert torch.equal(moved, reference.sparse_all_to_all(flow, counts_WG)[0])
        assert torch.equal(returned, flow)


def gradients(rank: int, case: str, async_op: bool, needing: tuple[int, ...]) -> None:
    """The gradient of what comes back, through experts that scale by their number."""
    num_ranks, num_experts = dist.get_world_size(), 2
    counts_WG = counts_of(rank, num_ranks, num_experts, case, 7)
    rows = rows_of(rank, counts_WG, torch.float64, (3,))
    rows.requires_grad_(rank in needing)
    expert_R = torch.arange(num_ranks * num_experts).repeat_interleave(counts_WG.reshape(-1))
    if async_op:
        came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG, async_op=True).wait()
    else:
        came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG)
    scale = torch.arange(num_experts) + num_experts * rank + 1.0
    scale_R = scale.repeat_interleave(exchange.load_G)[:, None]
    back = brt_dist.reverse_all_to_all(came.square() * scale_R, exchange)
    wanted = rows.detach().square() * (expert_R[:, None] + 1)
    torch.testing.assert_close(back, wanted)
    for _ in range(2):
        rows.grad = None
        back.sum().backward(retain_graph=True)
        if rank in needing:
            torch.testing.assert_close(rows.grad, 2 * rows.detach() * (expert_R[:, None] + 1))
        else:
            assert rows.grad is None


def gradients_of_flows(rank: int) -> None:
    """One of two flows needs no gradient, and the other's result is not used on one rank."""
    counts_WG = counts_of(rank, dist.get_world_size(), 2, "", 11)
    rows = rows_of(rank, counts_WG, torch.float32, (2,)).requires_grad_()
    ids = torch.arange(rows.shape[0])
    (came, came_ids), exchange = brt_dist.sparse_all_to_all((rows, ids), counts_WG)
    assert came.requires_grad
    assert not came_ids.requires_grad
    came.relu_()  # what comes is nobody's view
    back, back_ids = brt_dist.reverse_all_to_all((came, came_ids), exchange)
    assert torch.equal(back_ids, ids)
    (back.sum() * (0 if rank == 0 else 1)).backward()
    wanted = torch.zeros_like(rows) if rank == 0 else (rows > 0).to(rows.dtype)
    assert torch.equal(rows.grad, wanted)


def in_a_subset(rank: int, members: tuple[int, ...]) -> None:
    group = subset(members)
    if rank not in members:
        return
    counts_WG = counts_of(rank, len(members), 2, "", 13)
    rows = rows_of(rank, counts_WG, torch.float32, (2,))
    came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG, group)
    assert torch.equal(came, reference.sparse_all_to_all(rows, counts_WG, group)[0])
    assert torch.equal(brt_dist.reverse_all_to_all(came, exchange), rows)


def wronged(rows: Tensor, counts_WG: Tensor, wrong: str) -> tuple[Any, Tensor]:
    """The arguments of a good call, spoiled."""
    if wrong == "sum":
        counts_WG[0, 0] = 5
    elif wrong == "negative":
        counts_WG[0, 0], counts_WG[0, 1] = -1, 3
    elif wrong == "version":
        brt_dist.agree.VERSION += 1
        brt_dist.agree._header.cache_clear()
    more = {"experts": 2, "many-experts": 300}.get(wrong, 0)
    counts_WG = torch.cat([counts_WG, counts_WG.new_zeros(counts_WG.shape[0], more)], 1)
    changed = {
        "rows": "rows",
        "dtype": rows.double(),
        "shape": rows[:, :2],
    }
    changed_counts = {
        "float-counts": counts_WG.float(),
        "ranks": torch.cat([counts_WG, counts_WG]),
    }
    return changed.get(wrong, rows), changed_counts.get(wrong, counts_WG)


def call(rank: int, wrong_rank: int, wrong: str) -> str:
    """The error of an exchange that one rank calls wrongly."""
    counts_WG = torch.ones(dist.get_world_size(), 2, dtype=torch.int64)
    rows = torch.ones(int(counts_WG.sum()), 3)
    if rank == wrong_rank:
        rows, counts_WG = wronged(rows, counts_WG, wrong)
    try:
        with torch.set_grad_enabled(not (wrong == "grad-mode" and rank == wrong_rank)):
            brt_dist.sparse_all_to_all(rows, counts_WG)
    except brt_dist.ExchangeError as error:
        return str(error)
    finally:
        if wrong == "version" and rank == wrong_rank:
            brt_dist.agree.VERSION -= 1
            brt_dist.agree._header.cache_clear()
    return "no error"


def counts_travel_once(rank: int) -> int:
    """How many messages of counts three flows need."""
    counts_WG = counts_of(rank, dist.get_world_size(), 3, "", 5)
    flows = tuple(torch.ones(int(counts_WG.sum()), size) for size in (1, 2, 3))
    with mock.patch.object(agree, "_swap", wraps=agree._swap) as swap:
        brt_dist.sparse_all_to_all(flows, counts_WG)
    return int(swap.call_count)


def rows_travel_in_the_background(rank: int) -> tuple[float, float]:
    """When a rank went on, and when it had its rows; rank 1 sends its own late."""
    counts_WG = torch.ones(dist.get_world_size(), 2, dtype=torch.int64)
    rows = torch.full((int(counts_WG.sum()), 1000), float(rank))
    if rank == 1:
        (exchange,), _ = exchange_counts((rows,), [counts_WG], resolve(None))
        time.sleep(0.5)
        sent = time.time()
        start(rows, exchange, ())()
        return sent, sent
    handle = brt_dist.sparse_all_to_all(rows, counts_WG, async_op=True)
    went_on = time.time()
    came, _ = handle.wait()
    assert torch.equal(came[:, 0].unique(), torch.arange(dist.get_world_size()).float())
    return went_on, time.time()
