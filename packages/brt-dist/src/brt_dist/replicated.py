"""Every rank has the cells of all: for more choices per cell than ranks.

A cell then goes to a rank once, however many of its experts it chose: cells are gathered, and what
each rank's experts make of them is added up before it returns.

Legend: W ranks of the group, N cells, M cells of the rank that has most, S trailing dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from brt_dist.agree import agree
from brt_dist.groups import Group, naming_failures

_WHAT = "replicated cells"
# torch 2.13 calls it otherwise, and warns of the old name
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_cells(
    flows: Sequence[Tensor], fills: Sequence[float], group: Group, note: str
) -> list[Tensor]:
    """Flows ``[N, *S]`` of every rank as ``[W * M, *S]``, filled up; differentiable."""
    num_cells, num_ranks = flows[0].shape[0], dist.get_world_size(group)
    kinds = ", ".join(f"{flow.dtype} {list(flow.shape[1:])}" for flow in flows)
    wishes = sum(1 << i for i, flow in enumerate(flows) if flow.requires_grad)
    counts_W1 = torch.full((num_ranks, 1), num_cells)
    wishes = wishes if torch.is_grad_enabled() else 0
    agreed = agree(_WHAT, f"cells of {kinds}{note}", counts_W1, group, grad_flows=wishes)
    most = int(agreed.received_WC.max())
    gathered = []
    for i, (flow, fill) in enumerate(zip(flows, fills, strict=True)):
        if agreed.grad_flows >> i & 1 and not flow.requires_grad:
            flow = flow.detach().requires_grad_()  # the backward needs every rank
        filling = flow.new_full((most - num_cells, *flow.shape[1:]), fill)
        gathered.append(_AllGather.apply(torch.cat([flow, filling]), group))
    return gathered


def add_up(rows_WMS: Tensor, num_cells: int, group: Group) -> Tensor:
    """Rows for the cells of every rank -> ``[N, *S]``, the sum over ranks for this one's cells."""
    if torch.is_grad_enabled() and not rows_WMS.requires_grad:
        rows_WMS = rows_WMS.detach().requires_grad_()
    summed: Tensor = _SumScatter.apply(rows_WMS, group)
    return summed[:num_cells]


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, rows_MS: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(rows_MS, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_scatter(grad, ctx.group), None


class _SumScatter(Function):
    @staticmethod
    def forward(ctx: Any, rows_WMS: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum_scatter(rows_WMS, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


def _all_gather(rows_MS: Tensor, group: Group) -> Tensor:
    num_ranks = dist.get_world_size(group)
    gathered = rows_MS.new_empty((num_ranks * rows_MS.shape[0], *rows_MS.shape[1:]))
    if math.prod(gathered.shape):
        with naming_failures(_WHAT, group):
            _gather_single(gathered, rows_MS.contiguous(), group=group)
    return gathered


def _sum_scatter(rows_WMS: Tensor, group: Group) -> Tensor:
    num_ranks = dist.get_world_size(group)
    rows_WMS = rows_WMS.contiguous()
    # Not reduce_scatter, whose order of summation is the backend's
    received = torch.empty_like(rows_WMS)
    if math.prod(received.shape):
        with naming_failures(_WHAT, group):
            dist.all_to_all_single(received, rows_WMS, group=group)
    num_rows = rows_WMS.shape[0] // num_ranks
    return received.view(num_ranks, num_rows, *rows_WMS.shape[1:]).sum(0)
