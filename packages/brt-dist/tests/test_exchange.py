"""The sparse all-to-all against its reference, on 1 to 4 ranks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import exchange_cases as cases
import pytest
import torch
from ranks import Ranks

import brt_dist

pytestmark = pytest.mark.dist

DTYPES = (
    *(torch.bool, torch.uint8, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float64, torch.complex64),
)
EMPTINESS = ("", "empty", "silent-rank", "idle-rank", "idle-expert", "one-path")


@pytest.mark.parametrize("case", EMPTINESS)
@pytest.mark.parametrize("num_experts", [1, 3])
def test_equals_the_reference(case: str, num_experts: int, ranks: Ranks) -> None:
    for seed in range(3):
        ranks.run(cases.equals_reference, case, num_experts, torch.float32, (5,), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(3).run(cases.equals_reference, "", 2, dtype, (4,), 1)
    ranks_of(3).run(cases.equals_reference, "", 2, dtype, (), 1)


@pytest.mark.parametrize("case", EMPTINESS)
def test_own_rows_stay(case: str, ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.bool):
        ranks.run(cases.keeping_own, cases.equals_reference, case, 3, dtype, (5,), 1)
    for async_op in (False, True):
        ranks.run(cases.keeping_own, cases.gradients, case, async_op, tuple(range(ranks.num_ranks)))


def test_own_rows_of_flows_stay(ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(3).run(cases.keeping_own, cases.flows_share_counts, True)
    ranks_of(3).run(cases.keeping_own, cases.gradients_of_flows)
    ranks_of(4).run(cases.keeping_own, cases.two_at_a_time)
    ranks_of(4).run(cases.keeping_own, cases.in_a_subset, (1, 3))


def test_who_keeps_own_rows(ranks_of: Callable[[int], Ranks]) -> None:
    assert ranks_of(3).run(cases.keeps_own, 50, 10) == [True, True, True]
    assert ranks_of(3).run(cases.keeps_own, 20, 20) == [True, False, True]
    assert ranks_of(3).run(cases.keeps_own, 0, 30) == [False, False, False]
    assert ranks_of(3).run(cases.keeps_own, 4, 1) == [False, False, False]
    assert ranks_of(3).run(cases.keeps_own, 50, 10, 1) == [True, True, True]
    # 100 rows of 8 bytes
    assert ranks_of(3).run(cases.keeps_own, 50, 10, 2, 800) == [True, True, True]
    assert ranks_of(3).run(cases.keeps_own, 50, 10, 2, 801) == [False, False, False]


def test_many_experts(ranks: Ranks) -> None:
    ranks.run(cases.many_experts)


@pytest.mark.parametrize("async_op", [False, True])
def test_flows_share_counts(async_op: bool, ranks: Ranks) -> None:
    ranks.run(cases.flows_share_counts, async_op)


def test_counts_travel_once(ranks: Ranks) -> None:
    assert ranks.run(cases.counts_travel_once) == [1] * ranks.num_ranks


def test_rows_travel_in_the_background(ranks_of: Callable[[int], Ranks]) -> None:
    (went_on, had_rows), (sent, _), _ = ranks_of(3).run(cases.rows_travel_in_the_background)
    assert went_on < sent < had_rows


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("case", EMPTINESS)
def test_gradients(case: str, async_op: bool, ranks: Ranks) -> None:
    ranks.run(cases.gradients, case, async_op, tuple(range(ranks.num_ranks)))


def test_gradients_that_one_rank_needs(ranks: Ranks) -> None:
    ranks.run(cases.gradients, "", False, (0,))


def test_gradients_of_flows(ranks: Ranks) -> None:
    ranks.run(cases.gradients_of_flows)


def test_subsets_of_ranks(ranks_of: Callable[[int], Ranks]) -> None:
    for members in itertools.combinations(range(4), 2):
        ranks_of(4).run(cases.in_a_subset, members)
    ranks_of(4).run(cases.in_a_subset, (0, 2, 3))


WRONG = {
    "sum": r"on rank {rank}: counts sum to \d+, but there are \d+ rows",
    "negative": r"on rank {rank}: counts must not be negative, got -1",
    "float-counts": r"on rank {rank}: counts must be an int64 tensor \[W, G\], got torch.float32",
    "ranks": r"on rank {rank}: counts must be \[\d, G\]: .* got \[\d, 2\]",
    "rows": r"on rank {rank}: rows must be a tensor or a tuple of tensors, got <class 'str'>",
    "dtype": r"rank \d sends rows of float\d\d \[3\], but rank 0 rows of float\d\d \[3\]",
    "shape": r"rank \d sends rows of float32 \[\d\], but rank 0 rows of float32 \[\d\]",
    "experts": r"rank \d counts rows for \d experts on a rank, but rank 0 for \d",
    "many-experts": r"rank \d counts rows for \d+ experts on a rank, but rank 0 for \d+",
    "grad-mode": r"rank \d runs with\w* gradients.*, but rank 0 with\w* gradients",
    "version": r"rank \d has version \d of the exchange, this rank version \d",
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("wrong_rank", [0, 2])
def test_what_is_wrong_on_one_rank_is_an_error_on_all(
    wrong: str, wrong_rank: int, ranks_of: Callable[[int], Ranks]
) -> None:
    ranks = ranks_of(3)
    errors = ranks.run(cases.call, wrong_rank, wrong)
    if wrong != "version":
        assert len(set(errors)) == 1, errors
    for error in errors:
        assert re.search(WRONG[wrong].format(rank=wrong_rank), error), error
    assert ranks.run(cases.call, 0, "nothing") == ["no error"] * 3


def test_needs_a_started_group() -> None:
    with pytest.raises(brt_dist.ExchangeError, match="start the program with torchrun"):
        brt_dist.sparse_all_to_all(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64))
