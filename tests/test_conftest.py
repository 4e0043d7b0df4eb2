"""The root conftest: devices, and that a CUDA run never goes green on nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ON_A_DEVICE = """
import os
import pytest
import torch

@pytest.mark.slow
def test_time(request):
    assert request.node.get_closest_marker("timeout").args == (1800,)

def test_on(device):
    assert torch.zeros(1, device=device).device.type == device.type

def test_without_plugins():
    assert os.environ["BRT_PLUGINS"] == ""

def test_threads():
    assert torch.get_num_threads() == 1
"""


def outcome(folder: Path, *args: str, **env: str) -> str:
    """Pytest's last line for a test file that uses the fixture."""
    shutil.copy(ROOT / "conftest.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "test_it.py").write_text(ON_A_DEVICE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BRT_")}
    command = [sys.executable, "-m", "pytest", "-q", "test_it.py", *args]
    ran = subprocess.run(
        command,
        cwd=folder,
        env=kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{ran.returncode}: {ran.stdout.splitlines()[-1]}"


@pytest.mark.parametrize(
    ("args", "env", "wanted"),
    [
        ((), {}, "0: 4 passed, 1 skipped"),
        (("-m", "not cuda"), {}, "0: 4 passed, 1 deselected"),
        (("-m", "cuda and not slow"), {}, "1: 4 deselected, 1 error"),
        ((), {"BRT_REQUIRE_CUDA": "1"}, "1: 4 passed, 1 error"),
    ],
    ids=str,
)
def test_without_a_gpu(
    tmp_path: Path, args: tuple[str, ...], env: dict[str, str], wanted: str
) -> None:
    assert outcome(tmp_path, *args, **env).startswith(wanted)


def test_seeds_are_the_same_for_every_test() -> None:
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
