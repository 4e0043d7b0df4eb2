"""Experts on some ranks of a mesh compose with data parallelism and FSDP2 on the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import data_parallel_cases as cases
import pytest
from ranks import Ranks

pytestmark = pytest.mark.dist

CASES = [
    ("branches", "by hand"), ("both", "ddp"), ("branches", "ddp"), ("both", "fsdp"),
    ("branches", "fsdp of experts"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "way"), CASES)
def test_equals_one_process(name: str, way: str, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(4).run(cases.equals_one_process, name, way)


def test_parallelize_comes_before_fully_shard(ranks_of: Callable[[int], Ranks]) -> None:
    for error in ranks_of(4).run(cases.sharded_too_early):
        assert "is sharded: parallelize first, then fully_shard" in error


def test_checkpoint_of_what_is_sharded_twice(
    ranks_of: Callable[[int], Ranks], tmp_path: Path
) -> None:
    ranks_of(4).run(cases.saved_sharded_twice, str(tmp_path))
