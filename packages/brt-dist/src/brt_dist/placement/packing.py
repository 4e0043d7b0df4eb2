"""Balanced packing with replicas of the hottest experts, as EPLB does it.

Written from the description that DeepSeek published with EPLB (2025): replicate the experts with
the most load a replica, then give each, heaviest first, to the lightest rank that has room; with
groups, first pack groups to hosts and do both within each host.

Legend: E experts, P pieces (an expert, or a replica of one), W ranks, G groups of experts.
"""

from __future__ import annotations

import numpy as np

from brt_dist.placement.errors import PlacementError
from brt_dist.placement.traffic import Floats, Ints


def pack(load_P: Floats, num_ranks: int, low: int, high: int) -> Ints:
    """The rank of each piece: heaviest first, to the lightest rank that has room."""
    rank_P = np.zeros(len(load_P), np.int64)
    load_W, size_W = np.zeros(num_ranks), np.zeros(num_ranks, np.int64)
    for placed, piece in enumerate(np.argsort(-load_P, kind="stable")):
        short_W = size_W < low
        # The last pieces go where ranks would stay short of them
        needed = int((low - size_W[short_W]).sum()) >= len(load_P) - placed
        open_W = short_W if needed else size_W < high
        rank = int(np.where(open_W, load_W, np.inf).argmin())
        rank_P[piece] = rank
        load_W[rank] += load_P[piece]
        size_W[rank] += 1
    return rank_P


def replicate(load_E: Floats, replicas: int, most: int) -> Ints:
    """The expert of each piece: each once, then the one with the most load a piece, again.

    `most` pieces of an expert at most.
    """
    pieces_E = np.ones(len(load_E), np.int64)
    for _ in range(replicas):
        each_E = np.where(pieces_E < most, load_E / pieces_E, -1.0)
        pieces_E[int(each_E.argmax())] += 1
    return np.repeat(np.arange(len(load_E)), pieces_E)


def shared_load(load_E: Floats, expert_P: Ints) -> Floats:
    """Load of each piece, if the pieces of an expert share it equally."""
    pieces_E = np.bincount(expert_P, minlength=len(load_E))
    each_P: Floats = load_E[expert_P] / pieces_E[expert_P]
    return each_P


def eplb(
    load_E: Floats, num_ranks: int, replicas: int = 0, *, groups: int = 1, hosts: int = 1
) -> tuple[Ints, Ints]:
    """The published algorithm: (expert of each piece, its rank), the same number on each rank."""
    num_pieces = len(load_E) + replicas
    for number, by, what in (
        (num_pieces, num_ranks, "experts with replicas by ranks"),
        (num_ranks, hosts, "ranks by hosts"),
        (groups, hosts, "groups by hosts"),
        (len(load_E), groups, "experts by groups"),
    ):
        if number % by:
            raise PlacementError(f"eplb: must divide {what}, got {number} by {by}")
    group_E = np.arange(len(load_E)) // (len(load_E) // groups)
    load_G = np.bincount(group_E, load_E, groups).astype(np.float64)
    host_G = pack(load_G, hosts, groups // hosts, groups // hosts)
    ranks, experts = [], []
    for host in range(hosts):
        mine = np.flatnonzero(host_G[group_E] == host)
        expert_P = replicate(load_E[mine], replicas // hosts, num_pieces)
        size = len(expert_P) // (num_ranks // hosts)
        piece_load_P = shared_load(load_E[mine], expert_P)
        ranks.append(pack(piece_load_P, num_ranks // hosts, size, size) + host * num_ranks // hosts)
        experts.append(mine[expert_P])
    return np.concatenate(experts), np.concatenate(ranks)
