"""What ranks do in test_faults_hosts: exchange without end, train, start with something else."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import checkpoint_cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model_cases import DIM, Branches
from torch import Tensor, nn

import brt
import brt_dist
from brt_dist import agree
from brt_dist.placement.traffic import of_loads

NUM_FEATURES = 64


def rows_of(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Rows that say where they are from, and counts that leave some ranks without any."""
    num_ranks = dist.get_world_size()
    order = torch.arange(num_ranks * 2).view(num_ranks, 2)
    counts_WG = (order * (rank + 1) + step) % 5 * 100
    rows = torch.full((int(counts_WG.sum()), NUM_FEATURES), float(rank))
    return rows.requires_grad_(), counts_WG


def exchange(rank: int, step: int, group: dist.ProcessGroup | None = None) -> None:
    rows, counts_WG = rows_of(rank, step)
    came, known = brt_dist.sparse_all_to_all(rows, counts_WG, group)
    wanted = torch.arange(float(dist.get_world_size())).repeat(2)
    assert torch.equal(came[:, 0], wanted.repeat_interleave(known.received_WG.T.flatten()))
    (brt_dist.reverse_all_to_all(came, known) * 3).sum().backward()
    assert bool((rows.grad == 3).all())


def until_it_fails(
    rank: int, folder: str, timeout_s: float, victim: int, signal_: int, wait_s: float
) -> tuple[float, str]:
    """Seconds that the exchange took that failed, and its error; the victim gets the signal."""
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    exchange(rank, 0, group)
    meet(folder, str(rank), dist.get_world_size())
    if rank == victim:
        threading.Timer(wait_s, os.kill, (os.getpid(), signal_)).start()
    step = 0
    while True:
        start = time.monotonic()
        try:
            exchange(rank, step := step + 1, group)
        except brt_dist.ExchangeError as error:
            return time.monotonic() - start, str(error)


def meet(folder: str, name: str, num_names: int) -> None:
    """Go on when all are here. By files: a fault must not come before all are past this."""
    Path(folder, name).touch()
    await_files(folder, num_names)


def await_files(folder: str, number: int) -> None:
    end = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < number:
        assert time.monotonic() < end, f"not all of {number} ranks have begun"
        time.sleep(0.005)


def late(rank: int, timeout_s: float, slow: int, wait_s: float) -> None:
    """Exchanges that one rank comes late to."""
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    for step in range(2):
        if rank == slow:
            time.sleep(wait_s)
        exchange(rank, step, group)


def other_version(rank: int, other: int) -> str:
    if rank == other:
        agree.VERSION += 1
    try:
        exchange(rank, 0)
    except brt_dist.ExchangeError as error:
        return str(error)
    finally:
        if rank == other:
            agree.VERSION -= 1
    return ""


PLANS = {"model": (5, 0), "ranks": (4, 1), "profile": (4, 0)}


def planned(rank: int, other: int, what: str) -> str:
    """The error where one rank, or all, come with the wrong thing; no weight has moved."""
    torch.manual_seed(0)
    is_other = rank == other
    model = nn.ModuleDict({"mixture": Branches(5 if what == "experts" and is_other else 4, 1)})
    placement = None
    if what in PLANS:
        num_experts, more_ranks = PLANS[what]
        loads = [float(2**expert) for expert in range(num_experts)]
        traffic = of_loads([loads[::-1] if what == "profile" and is_other else loads])
        num_ranks = dist.get_world_size() + more_ranks
        placement = brt_dist.plan(traffic, num_ranks, "balance")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        brt_dist.parallelize(model, placement=placement)
    except brt.BrtError as error:
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        return f"{type(error).__name__}: {error}"
    return ""


def train(rank: int, folder: str, steps: list[int], victim: int, when: str) -> list[float]:
    """The losses of steps, from the checkpoint before the first of them; one after each.

    In the last step the victim is killed: before its exchange, or before that of its gradients.
    """
    model = checkpoint_cases.made("both", 0)
    spread = checkpoint_cases.spread_out(model, 0)
    optimizer = checkpoint_cases.optimizer_of(model, 0.1)
    if steps[0]:
        last = {"train": brt_dist.Checkpoint(model, optimizer, spread)}
        dcp.load(last, checkpoint_id=f"{folder}/{steps[0] - 1}")
    losses = []
    for step in steps:
        x = torch.randn(12, DIM, generator=torch.Generator().manual_seed(step)).double()
        x = x.tensor_split(dist.get_world_size())[rank]
        dies = rank == victim and step == steps[-1]
        if dies and when == "forward":
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss = model(x).square().sum()
        if dies and when == "backward":
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        brt_dist.sum_gradients(model, but=spread.experts)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        state = {"train": brt_dist.Checkpoint(model, optimizer, spread)}
        dcp.save(state, checkpoint_id=f"{folder}/{step}")
    return losses
