"""Optimised regions on a GPU wait for nothing: the host never reads what the device decides."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brt
from brt import plugins
from brt.passes.captured import CapturedRegion
from brt_models.msdnet import MSDNet, exits_of, small, thresholds_for_shares
from brt_models.patch_sr import PatchSR, sample
from brt_models.switch.config import SwitchConfig
from brt_models.switch.sparse import SparseMLP

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    found = list(entry_points(group="brt", name="kernels"))
    if not found:
        lacking = "brt-kernels is not installed: without its operators the host reads loads"
        if "BRT_REQUIRE_CUDA" in os.environ:
            pytest.fail(f"these tests were asked for: {lacking}", pytrace=False)
        pytest.skip(lacking)
    with (
        plugins.using(found[0].load()),
        torch.no_grad(),
        torch.backends.cudnn.flags(allow_tf32=False),
    ):
        yield


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check(
    model: nn.Module, inputs: list[Tensor], *passes: str, sample: Any = None, **close: float
) -> None:
    """Every call of the captured region is a replay, right, and without waiting."""
    fast = brt.optimize(model, passes=[*passes, "capture"], sample=sample, verify=False)
    (region,) = (m for m in fast.inserted.values() if isinstance(m, CapturedRegion))
    wanted: list[Any] = [model(x) for x in inputs]
    fast(inputs[0])
    replays = region.replays
    with no_waiting():
        found = [fast(x) for x in inputs]
    for came, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(came, right, **close)
    assert replays == 1, str(fast.report)
    assert region.replays == 1 + len(inputs)


def test_fused_switch_layer() -> None:
    config = SwitchConfig()
    model = SparseMLP(config).eval().cuda().to(BF16)
    inputs = [torch.randn(4, 32, config.d_model, device="cuda", dtype=BF16) for _ in range(3)]
    inputs.append(inputs[0][:1].expand(4, -1, -1).contiguous())
    check(model, inputs, "fuse-horizontal", rtol=3e-2, atol=3e-2)


def test_patch_network_with_conv_chains() -> None:
    model = PatchSR().eval().cuda()
    inputs = [sample(seed)[0].cuda() for seed in range(3)]
    inputs.append(torch.zeros_like(inputs[0]))
    check(model, inputs, "fuse-conv-chains", rtol=1e-3, atol=1e-3)


def test_exits_of_single_images() -> None:
    model, images = with_exits()
    came_to = {len(model.with_exits(x)[1]) for x in images}
    assert len(came_to) > 1
    check(model, images, rtol=1e-3, atol=1e-3)


def test_exits_of_batches() -> None:
    model, images = with_exits()
    batches = [torch.cat(images), torch.cat(images[::-1]), images[0].repeat(12, 1, 1, 1)]
    check(model, batches, sample=batches[0], rtol=1e-3, atol=1e-3)


def with_exits() -> tuple[MSDNet, list[Tensor]]:
    """A network, and 12 images that leave at all of its exits."""
    model = small().cuda()
    images = list(torch.randn(12, 1, 3, 32, 32, device="cuda"))
    model.set_thresholds(thresholds_for_shares([40.0, 30.0, 30.0], exits_of(model, images)))
    return model, images
