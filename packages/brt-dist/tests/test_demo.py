"""The demo runs on ranks that torchrun starts, and says that they equal one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from brt_dist import demo


@pytest.mark.dist
def test_demo_under_torchrun() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, "-m", "brt_dist.demo"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(blocks|nearer) +(\d+) ", done.stdout, re.MULTILINE))
    assert int(rows["nearer"]) < int(rows["blocks"]), done.stdout


def test_demo_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --standalone"):
        demo.main()


def test_nearer_puts_experts_where_their_rows_are() -> None:
    counts_WP = np.array([[9, 0, 9, 0, 3], [0, 9, 0, 9, 2]])
    placement = demo.nearer(counts_WP)
    assert placement == [0, 1, 0, 1, 0]
    assert demo.moving_rows(counts_WP, tuple(placement)) == 2
