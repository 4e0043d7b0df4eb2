"""Ranks on hosts of their own: whatever one does, the others end, and say which one and why."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import host_cases as cases
import pytest
from hosts import Hosts, lacking
from ranks import Ranks

from brt_dist import agree

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
def start(hosts: Hosts) -> Iterator[Callable[..., Ranks]]:
    """Ranks on the hosts; afterwards nothing of them is left there."""
    started: list[Ranks] = []

    def new(num_ranks: int = NUM_RANKS) -> Ranks:
        close()
        started.append(Ranks(num_ranks, hosts=hosts))
        return started[-1]

    def close() -> None:
        while started:
            assert hosts.listening()  # The store does: what is looked for can be seen
            assert started.pop().close()
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
def test_one_is_killed(seed: int, start: Callable[..., Ranks], tmp_path: Path) -> None:
    chance = random.Random(seed)
    victim, wait_s = chance.randrange(NUM_RANKS), chance.uniform(0, 0.1)
    fault = (victim, signal.SIGKILL, wait_s)
    outcomes = start().outcomes(cases.until_it_fails, str(tmp_path), TIMEOUT_S, *fault)
    assert outcomes[victim] == (False, "ended")
    check_named(outcomes, victim)


def after_begin(folder: str, wait_s: float, act: Callable[..., None], *args: object) -> None:
    """Do something so long after all ranks have begun, beside what this thread does."""

    def wait_and_act() -> None:
        cases.await_files(folder, NUM_RANKS)
        time.sleep(wait_s)
        act(*args)

    threading.Thread(target=wait_and_act, daemon=True).start()


def test_one_hangs(start: Callable[..., Ranks], tmp_path: Path) -> None:
    ranks, folder = start(), str(tmp_path)
    # Processes: the store's, then those of the ranks. It goes on when the others have given up
    hung = ranks.processes[2].pid
    after_begin(folder, 2 * TIMEOUT_S + GRACE_S, os.kill, hung, signal.SIGCONT)
    fault = (1, signal.SIGSTOP, 0.05)
    outcomes = ranks.outcomes(cases.until_it_fails, folder, TIMEOUT_S, *fault)
    check_named(outcomes, 1)
    is_good, told = outcomes[1]
    assert is_good, told
    assert "it failed on rank 1 (of 3 in the group): " in told[1]


@pytest.mark.parametrize("host", [0, 1])
def test_one_is_cut_off(
    host: int, hosts: Hosts, start: Callable[..., Ranks], tmp_path: Path
) -> None:
    ranks, folder = start(), str(tmp_path)
    after_begin(folder, 0.05, hosts.cut, host)
    outcomes = ranks.outcomes(cases.until_it_fails, folder, TIMEOUT_S, -1, 0, 0)
    check_named(outcomes, host)
    is_good, told = outcomes[host]
    assert is_good, told
    assert "the store that ranks meet in does not answer" in told[1]


def check_ended(
    started: list[subprocess.Popen[str]], gone: int, says: str, but_says: str | None
) -> None:
    """All programs have ended in time and say so; the one that is gone something else, or none."""
    # Also an interpreter takes its time to end
    end = time.monotonic() + 2 * (TIMEOUT_S + GRACE_S)
    for rank, process in enumerate(started):
        wanted = (
            but_says if rank == gone else f"it failed on rank {rank} (of 3 in the group): {says}"
        )
        if wanted is not None:
            told = process.communicate(timeout=max(end - time.monotonic(), 0.1))[1]
            assert process.returncode == 1, told
            assert "brt_dist.errors.ExchangeError: sparse_all_to_all: " in told
            assert wanted in told


@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_programs_that_catch_nothing_end(
    fault: str, hosts: Hosts, start: Callable[..., Ranks], tmp_path: Path
) -> None:
    start(0)  # The store alone
    folder, program = str(tmp_path), str(Path(__file__).with_name("host_program.py"))
    words = (str(NUM_RANKS), folder, str(TIMEOUT_S))
    started = [
        hosts.start(rank, sys.executable, program, str(rank), *words) for rank in range(NUM_RANKS)
    ]
    try:
        cases.await_files(folder, NUM_RANKS)
        says_gone = None
        if fault == "killed":
            started[1].kill()
        else:
            hosts.cut(1)
            says_gone = "the store that ranks meet in does not answer"
        check_ended(started, 1, "rank 1 ended, cannot be reached, or took longer", says_gone)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_one_is_slow(start: Callable[..., Ranks]) -> None:
    start().run(cases.late, TIMEOUT_S, 1, TIMEOUT_S / 3)


def test_one_has_another_version(start: Callable[..., Ranks]) -> None:
    messages = start().run(cases.other_version, 1)
    ours, theirs = agree.VERSION, agree.VERSION + 1
    says = rf"rank 1 has version {theirs} of .*, this rank version {ours}: "
    for rank in (0, 2):
        assert re.search(says, messages[rank])
    assert f"this rank version {theirs}: install one brt-dist" in messages[1]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("experts", r"rank 1 sends a model with mixture: 5 experts .* but rank 0 a .* 4 experts"),
        ("profile", r"rank 1 sends a model with mixture: 4 experts on 3 ranks \(placement \w+\), "),
        ("ranks", r"PlacementError: .*this plan is for 4 ranks, and there are 3; plan again"),
        ("model", r"PlacementError: .*this plan, of loads, is for 1 routers of 5 paths"),
    ],
)
def test_one_starts_with_something_else(what: str, says: str, start: Callable[..., Ranks]) -> None:
    for message in start().run(cases.planned, 1, what):
        assert re.search(says, message), message


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_others_go_on_from_the_last_checkpoint(
    when: str, start: Callable[..., Ranks], tmp_path: Path
) -> None:
    whole = start().run(cases.train, str(tmp_path / "whole"), [0, 1, 2, 3], -1, "")
    folder = str(tmp_path / "broken")
    outcomes = start().outcomes(cases.train, folder, [0, 1, 2], 1, when)
    for rank in (0, 2):
        assert not outcomes[rank][0]
        assert "rank 1 ended, cannot be reached" in outcomes[rank][1]
    went_on = start().run(cases.train, folder, [2, 3], -1, "")
    assert went_on == [losses[2:] for losses in whole]
