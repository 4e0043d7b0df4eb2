"""Random, Uniform and MissHit.

N cells, P paths, K choices of a cell.
"""

from __future__ import annotations

import math

import pytest
import torch

from brt.errors import ProtocolError
from brt.protocols import MissHit, Random, Uniform

SIZES = [(0, 3), (1, 1), (1, 4), (8, 4), (10, 4), (3, 7)]


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_uniform_is_the_loop(n: int, p: int) -> None:
    choice_NK = Uniform()(torch.rand(n, p), p).choice_NK
    assert choice_NK.tolist() == [[i // math.ceil(n / p)] for i in range(n)]


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_miss_hit_takes_one_path(n: int, p: int) -> None:
    assert MissHit(True)(torch.rand(n, p), p).choice_NK.tolist() == [[0]] * n
    assert MissHit(False)(torch.rand(n, p), p).choice_NK.tolist() == [[p - 1]] * n


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_random_takes_k_different_paths(n: int, p: int) -> None:
    k = min(2, p)
    choice_NK = Random(k)(torch.rand(n, p), p).choice_NK
    assert choice_NK.shape == (n, k)
    for row in choice_NK.tolist():
        assert len(set(row)) == k
        assert all(0 <= path < p for path in row)


def test_random_takes_all_paths_alike() -> None:
    choice_NK = Random(2, torch.Generator().manual_seed(0))(torch.empty(20000, 1), 4).choice_NK
    share_P = choice_NK.flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(share_P, torch.full((4,), 0.5), atol=0.02, rtol=0)


def test_rows_of_any_kind_stand_for_cells() -> None:
    for protocol in (Random(), Uniform(), MissHit()):
        assert protocol(torch.empty(6, 3, 8, 8, dtype=torch.int32), 4).num_cells == 6
        with pytest.raises(ProtocolError, match="one row for each cell, got 0-D"):
            protocol(torch.tensor(1.0), 4)


def test_random_refuses_more_paths_than_there_are() -> None:
    with pytest.raises(ProtocolError, match="k=3 paths, but there are 2"):
        Random(3)(torch.rand(4, 2), 2)
