"""The exchange in two hops: within a host first, then between hosts.

A row goes first to the rank of its own host that has the place of its destination, and from there
to the destination. Between hosts there are then ranks_per_host times fewer and larger messages
(Tutel, MLSys 2023, section 3.4). What comes, and its order, is that of the flat exchange.

Legend: W ranks of the group, G experts on a rank, H hosts, L ranks on a host.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from brt_dist.agree import agree, telling
from brt_dist.errors import ExchangeError
from brt_dist.exchange import Exchange, Rows, check, flows_of, reverse_all_to_all, sparse_all_to_all
from brt_dist.groups import Group, resolve
from brt_dist.segments import Reorder


@dataclass(frozen=True, eq=False)
class Hosts:
    """The ranks of a group as hosts of equal size: rank r is on host ``r // L``.

    Attributes:
        group: all ranks.
        within: the ranks of this rank's host.
        between: the ranks that have this rank's place on their hosts.
    """

    group: Group
    within: Group
    between: Group

    @classmethod
    def of(cls, ranks_per_host: int, timeout: timedelta | None = None) -> Hosts:
        """All ranks; ``[0, L)`` are the first host, and so on. Every rank must call it.

        ``timeout`` is that of the groups within and between hosts; None = torch's.
        """
        group = resolve(None)
        num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if ranks_per_host < 1 or num_ranks % ranks_per_host:
            raise ExchangeError(
                f"Hosts: {num_ranks} ranks do not make hosts of {ranks_per_host} ranks"
            )
        rank_HL = torch.arange(num_ranks).view(-1, ranks_per_host)
        # Every rank makes every group: torch names groups by how many were made before
        hosts = [dist.new_group(ranks, timeout=timeout) for ranks in rank_HL.tolist()]
        places = [dist.new_group(ranks, timeout=timeout) for ranks in rank_HL.t().tolist()]
        return cls(group, hosts[rank // ranks_per_host], places[rank % ranks_per_host])

    def __deepcopy__(self, memo: dict[int, Any]) -> Hosts:
        # It never changes, and groups cannot be copied
        return self


@dataclass(frozen=True, eq=False)
class TwoHops:
    """What `hierarchical_all_to_all` gives and its inverse takes.

    Attributes:
        by_place: from the order [host][place] to [place][host].
        within: the exchange within the host.
        between: the exchange between hosts.
    """

    by_place: Reorder
    within: Exchange
    between: Exchange

    @property
    def load_G(self) -> Tensor:
        """Rows of each expert of this rank, int64 on the host."""
        return self.between.load_G


@torch.compiler.disable
def hierarchical_all_to_all(rows: Rows, counts_WG: Tensor, hosts: Hosts) -> tuple[Rows, TwoHops]:
    """`brt_dist.sparse_all_to_all` over ``hosts.group``, in two hops; the same rows in the end."""
    what, group = "hierarchical_all_to_all", hosts.group
    with telling(what, group):
        flows = flows_of(rows)
        (counts_WG,) = check(flows, [counts_WG], group)
    # All ranks hear of a wrong one; the hops alone would tell its host only
    agree(what, f"rows of {len(flows)} flows", counts_WG, group)
    num_hosts, num_places = dist.get_world_size(hosts.between), dist.get_world_size(hosts.within)
    sequence_W = torch.arange(num_hosts * num_places).view(num_hosts, num_places).t().reshape(-1)
    by_place = Reorder.of(counts_WG.sum(1), sequence_W, flows[0].device)
    counts_LC = counts_WG[sequence_W].view(num_places, -1)
    rows, within = sparse_all_to_all(_each(by_place.apply, rows), counts_LC, hosts.within)
    rows, between = sparse_all_to_all(rows, within.load_G.view(num_hosts, -1), hosts.between)
    return rows, TwoHops(by_place, within, between)


@torch.compiler.disable
def reverse_hierarchical_all_to_all(rows: Rows, hops: TwoHops) -> Rows:
    """Send rows back to where they came from, in the order they had there."""
    back = reverse_all_to_all(reverse_all_to_all(rows, hops.between), hops.within)
    return _each(hops.by_place.undo, back)


def _each(function: Any, rows: Rows) -> Rows:
    return function(rows) if isinstance(rows, Tensor) else tuple(map(function, rows))
