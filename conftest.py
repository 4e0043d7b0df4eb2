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


# Of slow tests, and of many random cases: on a busy machine they take several times as long
SLOW_TIMEOUT_S = 1800


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def thorough() -> bool:
    """Whether to try the large number of random cases (`nox -s thorough`)."""
    return _is_set("BRT_THOROUGH")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_set("BRT_THOROUGH") or item.get_closest_marker("slow") is not None:
            # Last: a test's own timeout comes before it
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S), append=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if _requires_cuda(item.config):
        pytest.fail("a CUDA test was asked for, and torch sees no GPU here", pytrace=False)
    pytest.skip("no NVIDIA GPU")


def _requires_cuda(config: pytest.Config) -> bool:
    """Whether this run is about CUDA, so that skipping would make it green on nothing."""
    if _is_set("BRT_REQUIRE_CUDA"):
        return True
    words = str(config.option.markexpr).replace("not cuda", "").split()
    return "cuda" in {word.strip("()") for word in words}


def _is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")
