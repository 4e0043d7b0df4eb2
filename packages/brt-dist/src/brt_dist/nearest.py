"""Experts near to the cells that take them.

Legend: W ranks, P experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment


def nearest(counts_WP: NDArray[np.int64], rooms: int | None = None) -> list[int]:
    """The rank of each expert with which the fewest rows change rank: the best there is.

    Args:
        counts_WP: rows that the cells of each rank have for each expert.
        rooms: experts that a rank has room for; None = as many as an even split needs.

    Each rank gets at least one expert, where there are enough: it is a linear assignment of
    experts to rooms, of which the first of each rank must be taken.
    """
    num_ranks, num_experts = counts_WP.shape
    rooms = -(-num_experts // num_ranks) if rooms is None else rooms
    worth_PQ = counts_WP.repeat(rooms, 0).T.astype(np.float64)
    # More than all rows are worth
    worth_PQ[:, ::rooms] += float(counts_WP.sum()) + 1
    experts, taken = linear_sum_assignment(worth_PQ, maximize=True)
    rank_P = [0] * num_experts
    for expert, room in zip(experts.tolist(), taken.tolist(), strict=True):
        rank_P[expert] = room // rooms
    return rank_P
