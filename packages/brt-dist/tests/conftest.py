"""Ranks for tests: started once, for as many tests as need them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """The ranks of a world of some size; one world of each size for the whole session."""
    worlds: dict[int, Ranks] = {}

    def get(num_ranks: int) -> Ranks:
        if num_ranks in worlds and worlds[num_ranks].is_broken:
            worlds.pop(num_ranks).close()
        if num_ranks not in worlds:
            worlds[num_ranks] = Ranks(num_ranks)
        return worlds[num_ranks]

    yield get
    for world in worlds.values():
        world.close()


@pytest.fixture(params=[1, 2, 3, 4], ids=lambda num_ranks: f"W{num_ranks}")
def ranks(request: pytest.FixtureRequest, ranks_of: Callable[[int], Ranks]) -> Ranks:
    return ranks_of(request.param)
