"""W processes that talk by gloo and run the functions that tests give them."""

from __future__ import annotations

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

# One process imports torch; the ranks are forks of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "brt_dist"])


class Ranks:
    """A world of ``num_ranks`` processes. ``run(function, ...)`` calls it on each of them."""

    def __init__(self, num_ranks: int, timeout_s: float = 20) -> None:
        self.num_ranks = num_ranks
        self.is_broken = False
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(num_ranks):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (rank, num_ranks, self._folder.name, timeout_s, theirs)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

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
            pipe.send((function, args))
        return [self._outcome(pipe) for pipe in self._pipes]

    def _outcome(self, pipe: Connection) -> tuple[bool, Any]:
        assert pipe.poll(self._timeout_s + 60), "a rank hangs"
        try:
            return pipe.recv()
        except EOFError:
            return False, "ended"

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(rank: int, num_ranks: int, folder: str, timeout_s: float, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["BRT_PLUGINS"] = ""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), num_ranks)
    timeout = timedelta(seconds=timeout_s)
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
