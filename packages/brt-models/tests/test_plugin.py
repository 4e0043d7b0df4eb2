"""What brt finds in brt-models."""

from __future__ import annotations

import pytest
import torch

from brt import plugins
from brt.bench import Workload
from brt_models import _plugin, photos
from brt_models.workloads import patch_sr as workloads

MODELS = ("patch-sr", "livesr")


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_hook_brt_models(name: str) -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", name)
    one, same, other = spec.sample(), spec.sample(seed=0), spec.sample(seed=1)
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    model = spec.pretrained() if spec.pretrained else spec.factory(num_paths=2, num_blocks=1)
    assert not model.training
    (photo_BCHW,) = one
    height, width = photo_BCHW.shape[2:]
    assert model(photo_BCHW).shape == (1, 3, 4 * height, 4 * width)


def test_hook_brt_workloads() -> None:
    with plugins.using(_plugin):
        assert {"patch-sr", "livesr"} <= set(plugins.collect("workloads"))


@pytest.fixture
def demo_photo(monkeypatch: pytest.MonkeyPatch) -> Workload:
    load = photos.load
    monkeypatch.setattr(photos, "load", lambda photo: load(photo)[:, 100:160, 100:200])
    return workloads.demo_photo(torch.device("cpu"), torch.float32)


@pytest.fixture
def livesr() -> Workload:
    return workloads.livesr_frame(torch.device("cpu"), torch.float32, num_paths=4, num_blocks=2)


@pytest.mark.parametrize("name", ["demo_photo", "livesr"])
@torch.inference_mode()
def test_variants_agree(name: str, request: pytest.FixtureRequest) -> None:
    workload: Workload = request.getfixturevalue(name)
    assert workload.reference is not None
    for arguments in workload.sets:
        wanted = workload.reference(*arguments)
        for variant in workload.variants:
            if "torch.compile" in variant.name or not variant.is_checked:
                continue  # compiling takes minutes; `brt bench` does it
            found = variant.make()(*arguments)
            error = (found - wanted).abs().max() / wanted.abs().max()
            assert error <= workload.tolerance, f"{name}, {variant.name}: {error}"
            assert variant.flops


def test_livesr_sends_patches_where_they_went(livesr: Workload) -> None:
    assert "patches per path 19/25/18/36" in livesr.shapes
