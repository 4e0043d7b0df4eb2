from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from brt_kernels._load import load
from brt_kernels.ops import register_all_fakes

sys.path.insert(
    0, str(Path(__file__).parent)
)  # for kernel_cases and chains: importlib mode leaves it out

# Installed by itself, the package is tested by what needs no reference of brt.
ALONE = find_spec("brt") is None
NEEDS_BRT = re.compile(r"^(from|import) (brt|kernel_cases)\b", re.MULTILINE)
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if ALONE and NEEDS_BRT.search(path.read_text())
]

ISAS = ("avx2", "avx512", "avx512_bf16")


def pytest_report_header() -> str:
    """Say what is left out."""
    left_out = f"brt is not installed, left out: {', '.join(sorted(collect_ignore))}"
    return left_out if ALONE else "brt is installed: compared with its reference"


@pytest.fixture(scope="session", autouse=True)
def _libraries() -> None:
    load()
    register_all_fakes()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Every instruction set of this CPU in turn."""
    try:
        torch.ops.brt_kernels.use_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    torch.ops.brt_kernels.use_isa("best")
