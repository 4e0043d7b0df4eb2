"""W processes that talk by gloo and run the functions that tests give them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hosts import PORT, Hosts, enter

# One process imports torch; the ranks are forks of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "brt_dist"])


class Ranks:
    """A world of ``num_ranks`` processes. ``run(function, ...)`` calls it on each of them.

    With ``hosts`` each rank is on one of its own.
    """

    def __init__(self, num_ranks: int, timeout_s: float = 20, hosts: Hosts | None = None) -> None:
        self.num_ranks = num_ranks
        self.is_broken = False
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        self._meeting: Connection | None = None
        if hosts is not None:
            self._meeting = self._start(_keep_store, hosts.switch)
            assert self._meeting.poll(60), "no store"
        for rank in range(num_ranks):
            place = self._folder.name if hosts is None else hosts.names[rank]
            apart = hosts is not None
            self._pipes.append(self._start(_serve, rank, num_ranks, place, apart, timeout_s))

    def _start(self, target: Callable[..., None], *args: Any) -> Connection:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=target, args=(*args, theirs), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        return ours

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, *args)`` returned on each rank; fails where one raised."""
        outcomes = self.outcomes(function, *args)
        bad = [f"rank {r}: {what}" for r, (is_good, what) in enumerate(outcomes) if not is_good]
        # Its ranks may wait for one another: the next test gets others
        self.is_broken = bool(bad)
        assert not bad, "\n".join(bad)
        return [outcome for _, outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """For each rank (True, result), or (False, traceback), also of a rank that has ended."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # It ended: its outcome says so
                pipe.send((function, args))
        return [self._outcome(pipe) for pipe in self._pipes]

    def _outcome(self, pipe: Connection) -> tuple[bool, Any]:
        assert pipe.poll(self._timeout_s + 60), "a rank hangs"
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return False, "ended"

    def close(self) -> bool:
        """End the ranks; False if one had to be killed."""
        for pipe in self._pipes:
            pipe.close()
        if self._meeting is not None:
            self._meeting.close()
        ended = True
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                ended = False
                process.kill()
                process.join()
        self._folder.cleanup()
        return ended


def _keep_store(name: str, pipe: Connection) -> None:
    """What torchrun's agent is to ranks: the store outlives each of them."""
    enter(name)
    store = dist.TCPStore(Hosts.switch_address, PORT, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.poll(None)
    os._exit(0)


def _serve(
    rank: int, num_ranks: int, place: str, apart: bool, timeout_s: float, pipe: Connection
) -> None:
    """``place``: a folder where ranks meet or, where they are ``apart``, the host of this one."""
    os.environ["BRT_PLUGINS"] = ""
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0" if apart else "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    store: dist.Store
    if apart:
        enter(place)
        store = dist.TCPStore(Hosts.switch_address, PORT, timeout=timeout)
    else:
        store = dist.FileStore(str(Path(place) / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    # A rank that is gone would keep the others waiting in destroy_process_group
    os._exit(0)
