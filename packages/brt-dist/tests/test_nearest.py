"""Experts near to the cells that take them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from brt_dist import nearest


def stay(counts_WP: np.ndarray, rank_P: list[int]) -> int:
    return sum(int(counts_WP[rank, expert]) for expert, rank in enumerate(rank_P))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_ranks", "num_experts", "rooms"), [(2, 5, None), (3, 5, 3)])
def test_no_placement_keeps_more_rows(
    num_ranks: int, num_experts: int, rooms: int | None, seed: int
) -> None:
    counts_WP = np.random.default_rng(seed).integers(0, 100, (num_ranks, num_experts))
    counts_WP[0] += 200  # all would go there
    found = nearest(counts_WP, rooms)
    room = rooms or -(-num_experts // num_ranks)
    best = max(
        stay(counts_WP, list(rank_P))
        for rank_P in itertools.product(range(num_ranks), repeat=num_experts)
        if np.bincount(rank_P, minlength=num_ranks).min() >= 1 and np.bincount(rank_P).max() <= room
    )
    assert stay(counts_WP, found) == best
    assert np.bincount(found, minlength=num_ranks).min() >= 1


def test_figure_13() -> None:
    # Each rank's rows are for the experts of the next in equal blocks
    counts_WP = np.ones((4, 8), np.int64)
    for rank in range(4):
        counts_WP[rank, 2 * ((rank + 1) % 4) :][:2] = 1024
    assert nearest(counts_WP) == [3, 3, 0, 0, 1, 1, 2, 2]
