from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from brt_kernels._load import load
from brt_kernels.ops import register_all_fakes

sys.path.insert(
    0, str(Path(__file__).parent)
)  # for kernel_cases and chains: importlib mode leaves it out

ISAS = ("avx2", "avx512", "avx512_bf16")


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
