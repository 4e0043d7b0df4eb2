"""Starts ranks on this machine, for benchmarks; on a link of a given rate where asked."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from brt.bench.probe import kept_memory

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_CONTEXT = multiprocessing.get_context("forkserver")


@contextmanager
def link(mbit: int | None) -> Iterator[str | None]:
    """A network namespace whose loopback has this rate; None: that of this process, as it is."""
    if mbit is None:
        yield None
        return
    name = f"brt-link-{os.getpid()}"
    rate = "root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "limit", "256mb"
    _command("ip", "netns", "add", name)
    try:
        _command("ip", "-n", name, "link", "set", "lo", "up")
        _command("tc", "-n", name, "qdisc", "add", "dev", "lo", *rate)
        yield name
    finally:
        _command("ip", "netns", "delete", name)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()} (--mbit needs root, ip and tc)")


def _enter(network: str) -> None:
    with open(f"/var/run/netns/{network}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"setns {network}")


def on_ranks(num_ranks: int, function: Callable[[], Any], network: str | None = None) -> Any:
    """What a function gives on rank 0; every rank calls it."""
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "brt_dist", "brt.bench"])
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "store"), network
        with _started(num_ranks, place, function) as pipes:
            found = [_received(pipe) for pipe in pipes]
    for rank, (is_good, what) in enumerate(found):
        if not is_good:
            sys.exit(f"rank {rank}: {what}")
    return found[0][1]


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "it ended"


@contextmanager
def _started(
    num_ranks: int, place: tuple[str, str | None], function: Callable[[], Any]
) -> Iterator[Any]:
    pipes, processes = [], []
    for rank in range(num_ranks):
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_serve, args=(rank, num_ranks, *place, theirs, function), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    yield pipes
    for process in processes:
        process.join()


def _serve(
    rank: int,
    num_ranks: int,
    path: str,
    network: str | None,
    pipe: Connection,
    function: Callable[[], Any],
) -> None:
    if network is not None:
        _enter(network)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # The ranks are all here
    torch.set_num_threads(1)
    store = dist.FileStore(path, num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        with kept_memory():
            found = function()
        pipe.send((True, found if rank == 0 else None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()
