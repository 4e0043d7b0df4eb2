"""Rows that stay where experts made them: ranks take over one another's cells instead.

After the experts, each rank stands for the rank of whose cells it has the most rows, so that fewer
rows travel. What else belongs to the cells (residuals, routes) follows by `Assignment.exchange`,
and `Assignment.restore` brings results back to the ranks that the cells are of, in their order.

Brainstorm (OSDI 2023), section 5; the assignment is the best one there is, not a greedy one.

Legend: W ranks of the group, G experts on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from brt_dist.agree import agree, telling
from brt_dist.errors import ExchangeError
from brt_dist.exchange import Exchange, Rows, flows_of
from brt_dist.flight import Course, Journey
from brt_dist.groups import Group, host_device, naming_failures
from brt_dist.layout import Layout

_WHAT = "locality-aware return"


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which rank's cells each rank stands for.

    Attributes:
        group: the ranks.
        source_W: for each rank, the rank whose cells it has now.
        rows_WW: int64 on the host, for each rank the rows that it holds of each rank's cells.
    """

    group: Group
    source_W: tuple[int, ...]
    rows_WW: Tensor

    @property
    def source(self) -> int:
        """The rank whose cells this rank has now."""
        return self.source_W[dist.get_rank(self.group)]

    @property
    def holder(self) -> int:
        """The rank that has this rank's cells now."""
        return self.source_W.index(dist.get_rank(self.group))

    @property
    def moved(self) -> tuple[int, int]:
        """Rows of all ranks that travel back: as they are assigned, and if all went home."""
        num_rows = int(self.rows_WW.sum())
        at_home = sum(int(self.rows_WW[w, s]) for w, s in enumerate(self.source_W))
        return num_rows - at_home, num_rows - int(self.rows_WW.diagonal().sum())

    def exchange(self, rows: Rows) -> Rows:
        """This rank's rows go to who stands for it; the rows of its source come. Differentiable.

        Every rank must call it. Rows ``[R, *S]``, or flows of them; R may be any on each rank.
        """
        return self._send(rows, self.holder, self.source)

    def restore(self, rows: Rows) -> Rows:
        """The inverse of `exchange`: rows go back to the rank that they are of. Differentiable."""
        return self._send(rows, self.source, self.holder)

    def _send(self, rows: Rows, to: int, come_from: int) -> Rows:
        flows, num_ranks = flows_of(rows), dist.get_world_size(self.group)
        with telling(_WHAT, self.group):
            for flow in flows:
                if flow.ndim < 1 or flow.shape[0] != flows[0].shape[0]:
                    raise ExchangeError(
                        f"{_WHAT}: flows must have the same rows [R, ...], got "
                        f"{[list(flow.shape) for flow in flows]}"
                    )
        counts_W1 = torch.zeros(num_ranks, 1, dtype=torch.int64)
        counts_W1[to] = flows[0].shape[0]
        kinds = ", ".join(f"{flow.dtype} {list(flow.shape[1:])}" for flow in flows)
        wishes = sum(1 << i for i, flow in enumerate(flows) if flow.requires_grad)
        wishes = wishes if torch.is_grad_enabled() else 0
        agreed = agree(_WHAT, f"rows of {kinds}", counts_W1, self.group, grad_flows=wishes)
        received = agreed.received_WC[:, 0].tolist()
        assert sum(received) == received[come_from]
        course = Course.by_rank(_WHAT, self.group, counts_W1[:, 0].tolist(), received)
        grads = tuple(i for i in range(len(flows)) if agreed.grad_flows >> i & 1)
        landed = Journey.start(flows, course, grads).land()
        return landed[0] if isinstance(rows, Tensor) else landed


def assign_sources(exchange: Exchange) -> Assignment:
    """The assignment with which the fewest rows travel back; every rank must call it."""
    group = exchange.group
    own_W = exchange.received_WG.sum(1).to(host_device(group))
    found = [torch.empty_like(own_W) for _ in range(dist.get_world_size(group))]
    with naming_failures(_WHAT, group):
        dist.all_gather(found, own_W, group=group)
    rows_WW = torch.stack(found).cpu()
    _, sources = linear_sum_assignment(rows_WW.numpy(), maximize=True)
    return Assignment(group, tuple(sources.tolist()), rows_WW)


def return_to_assigned(rows: Rows, exchange: Exchange, assignment: Assignment) -> Rows:
    """Rows of this rank's experts -> those of its source's cells, in the order they were sent.

    ``rows`` lie as `brt_dist.sparse_all_to_all` gave them. What comes is what
    `brt_dist.reverse_all_to_all` would have given the source. Differentiable, in grad mode for all
    floating flows, also where nothing on this rank needs it.
    """
    flows = flows_of(rows)
    rows_WW, source_W, rank = assignment.rows_WW, assignment.source_W, dist.get_rank(exchange.group)
    num_rows = int(exchange.received_WG.sum())
    for flow in flows:
        if flow.ndim < 1 or flow.shape[0] != num_rows:
            raise ExchangeError(
                f"return_to_assigned: the exchange gave {num_rows} rows, {list(flow.shape)} came"
            )
    receive = Layout(rows_WW[:, source_W[rank]].numpy()[:, None])
    course = Course(_WHAT, exchange.group, exchange.course.receive.for_others(source_W), receive)
    floating = tuple(i for i, flow in enumerate(flows) if flow.is_floating_point())
    landed = Journey.start(flows, course, floating if torch.is_grad_enabled() else ()).land()
    return landed[0] if isinstance(rows, Tensor) else landed
