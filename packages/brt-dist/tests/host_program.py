"""A program of one rank, as users start them: it exchanges until that fails, and catches nothing.

python host_program.py RANK NUM_RANKS FOLDER TIMEOUT_S
"""

from __future__ import annotations

import sys
from datetime import timedelta

import host_cases as cases
import torch
import torch.distributed as dist
from hosts import PORT, Hosts


def main(rank: int, num_ranks: int, folder: str, timeout_s: float) -> None:
    """Exchange without end; the test sees by the files in the folder that all have begun."""
    torch.set_num_threads(1)
    store = dist.TCPStore(Hosts.switch_address, PORT, timeout=timedelta(seconds=60))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    cases.exchange(rank, 0)
    cases.meet(folder, str(rank), num_ranks)
    step = 0
    while True:
        cases.exchange(rank, step := step + 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
