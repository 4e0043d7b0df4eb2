"""Models of brt-models on the ranks of brt-dist."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "brt-dist" / "tests"))

import distributed_cases as cases
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    world = Ranks(2)
    yield world
    world.close()


@pytest.mark.dist
def test_demo_moves_fewer_rows(ranks: Ranks) -> None:
    moved = ranks.run(cases.demo)
    assert moved[0] == moved[1]
    blocks, nearer = moved[0]
    assert 0 < nearer < blocks


@pytest.mark.dist
def test_adapted_mixtral(ranks: Ranks) -> None:
    ranks.run(cases.adapted_mixtral_equals_one_process)
