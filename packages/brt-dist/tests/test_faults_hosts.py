"""Ranks on hosts of their own: whatever one does, the others end, and say which one and why."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import host_cases as cases
import pytest
from hosts import Hosts, lacking
from ranks import Ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]
NUM_RANKS = 3
TIMEOUT_S = 3.0
# The roll call comes after the timeout, and the machine is busy
GRACE_S = 3.0
# `nox -s faults` says how many
KILLS = range(int(os.environ.get("BRT_FAULTS", "2")))


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if lacking():
        if "BRT_FAULTS" in os.environ:
            pytest.fail(f"these tests were asked for: {lacking()}", pytrace=False)
        pytest.skip(lacking())
    made = Hosts(NUM_RANKS)
    yield made
    made.close()


@pytest.fixture
def start(hosts: Hosts) -> Iterator[Callable[[], Ranks]]:
    """Ranks on the hosts; afterwards nothing of them is left there."""
    started: list[Ranks] = []

    def new() -> Ranks:
        close()
        started.append(Ranks(NUM_RANKS, hosts=hosts))
        return started[-1]

    def close() -> None:
        while started:
            started.pop().close()
        assert not hosts.processes()
        assert not hosts.listening()

    yield new
    close()


def check_named(outcomes: list[tuple[bool, object]], gone: int) -> None:
    """All ranks but the one have ended in time, and name it."""
    for rank, (is_good, told) in enumerate(outcomes):
        if rank == gone:
            continue
        assert is_good, told
        seconds, message = told
        assert seconds < TIMEOUT_S + GRACE_S
        why = f"rank {gone} ended, cannot be reached, or took longer"
        assert f"it failed on rank {rank} (of {NUM_RANKS} in the group): {why}" in message


@pytest.mark.parametrize("seed", KILLS)
def test_one_is_killed(seed: int, start: Callable[[], Ranks]) -> None:
    chance = random.Random(seed)
    victim, wait_s = chance.randrange(NUM_RANKS), chance.uniform(0, 0.1)
    outcomes = start().outcomes(cases.until_it_fails, TIMEOUT_S, victim, wait_s)
    assert outcomes[victim] == (False, "ended")
    check_named(outcomes, victim)


@pytest.mark.parametrize("host", [0, 1])
def test_one_is_cut_off(host: int, hosts: Hosts, start: Callable[[], Ranks]) -> None:
    ranks = start()
    cut = threading.Timer(0.5, hosts.cut, (host,))
    cut.start()
    outcomes = ranks.outcomes(cases.until_it_fails, TIMEOUT_S, -1, 0)
    cut.join()
    check_named(outcomes, host)
    is_good, told = outcomes[host]
    assert is_good, told
    assert "the store that ranks meet in does not answer" in told[1]


def test_one_is_slow(start: Callable[[], Ranks]) -> None:
    start().run(cases.late, TIMEOUT_S, 1, TIMEOUT_S / 3)


def test_one_has_another_version(start: Callable[[], Ranks]) -> None:
    messages = start().run(cases.other_version, 1)
    for rank in (0, 2):
        assert re.search(r"rank 1 has version 2 of .*, this rank version 1: ", messages[rank])
    assert "this rank version 2: install one brt-dist" in messages[1]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("experts", r"rank 1 sends a model with mixture: 5 experts .* but rank 0 a .* 4 experts"),
        ("profile", r"rank 1 sends a model with mixture: 4 experts on 3 ranks \(placement \w+\), "),
        ("ranks", r"PlacementError: .*this plan is for 4 ranks, and there are 3; plan again"),
        ("model", r"PlacementError: .*this plan, of loads, is for 1 routers of 5 paths"),
    ],
)
def test_one_starts_with_something_else(what: str, says: str, start: Callable[[], Ranks]) -> None:
    for message in start().run(cases.planned, 1, what):
        assert re.search(says, message), message


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_others_go_on_from_the_last_checkpoint(
    when: str, start: Callable[[], Ranks], tmp_path: Path
) -> None:
    whole = start().run(cases.train, str(tmp_path / "whole"), [0, 1, 2, 3], -1, "")
    folder = str(tmp_path / "broken")
    outcomes = start().outcomes(cases.train, folder, [0, 1, 2], 1, when)
    for rank in (0, 2):
        assert not outcomes[rank][0]
        assert "rank 1 ended, cannot be reached" in outcomes[rank][1]
    went_on = start().run(cases.train, folder, [2, 3], -1, "")
    assert went_on == [losses[2:] for losses in whole]
