"""NCCL with a rank on each GPU (here one), and several ranks on one GPU by symmetric memory."""

from __future__ import annotations

from collections.abc import Callable

import cuda_cases as cases
import pytest
import torch
from ranks import Ranks

from brt_dist.symmetric import layout

pytestmark = pytest.mark.dist


@pytest.mark.cuda
def test_exchange_by_nccl(ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(1).run(cases.exchange)


@pytest.mark.cuda
@pytest.mark.parametrize(("degree", "capacity"), [(1, None), (3, None), (1, 9)])
def test_layer_by_nccl(degree: int, capacity: int | None, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(1).run(cases.layer, degree, capacity)


@pytest.mark.cuda
def test_padded_exchange_in_a_cuda_graph(ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(1).run(cases.captured)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_symmetric_memory(
    num_ranks: int, dtype: torch.dtype, ranks_of: Callable[[int], Ranks]
) -> None:
    ranks_of(num_ranks).run(cases.symmetric, dtype, 1)


def test_layout_is_by_expert_and_then_by_sender() -> None:
    count_VWG = torch.tensor([[[1, 2], [0, 3]], [[4, 0], [5, 1]]])
    begin_S, load_G = layout(count_VWG, rank=1)
    # On rank 0: expert 0 has 1 + 4 rows, expert 1 has 2 + 0; on rank 1: 0 + 5 and 3 + 1
    assert begin_S.tolist() == [1, 7, 0, 8]
    assert load_G.tolist() == [5, 4]
    begin_S, load_G = layout(count_VWG, rank=0)
    assert begin_S.tolist() == [0, 5, 0, 5]
    assert load_G.tolist() == [5, 2]
