"""What every test of every package starts from."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

# A test sees built-ins only, unless it asks for more (brt.plugins.using) or this is set outside.
os.environ.setdefault("BRT_PLUGINS", "")
# What was measured on this machine is the user's: tests neither read it nor add to it.
os.environ["BRT_TUNING"] = "off"
if "OMP_NUM_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def thorough() -> bool:
    """Whether to try the large number of random cases (`nox -s thorough`)."""
    return os.environ.get("BRT_THOROUGH", "") not in ("", "0")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if _requires_cuda(item.config):
        pytest.fail("a CUDA test was asked for, and torch sees no GPU here", pytrace=False)
    pytest.skip("no NVIDIA GPU")


def _requires_cuda(config: pytest.Config) -> bool:
    """Whether this run is about CUDA, so that skipping would make it green on nothing."""
    if os.environ.get("BRT_REQUIRE_CUDA", "") not in ("", "0"):
        return True
    words = str(config.option.markexpr).replace("not cuda", "").split()
    return "cuda" in {word.strip("()") for word in words}
