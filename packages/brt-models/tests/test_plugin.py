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


@pytest.mark.parametrize("name", ["msdnet-digits", "switch-text"])
@torch.inference_mode()
def test_models_with_weights_of_their_own(name: str) -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", name)
    one, same, other = spec.sample(), spec.sample(seed=0), spec.sample(seed=1)
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    untrained, trained = spec.factory(), spec.pretrained()
    assert not untrained.training
    assert not trained.training
    assert untrained(*one).shape == trained(*one).shape
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (untrained, trained)]
    assert shapes[0] == shapes[1]


def test_hook_brt_demos() -> None:
    with plugins.using(_plugin):
        takes = {name: spec.source for name, (spec, _) in plugins.collect("demos").items()}
    assert takes == {"digits": "", "patch-sr": "a photo", "text": "words to go on from"}


def test_hook_brt_workloads() -> None:
    with plugins.using(_plugin):
        assert {"patch-sr", "livesr"} <= set(plugins.collect("workloads"))


@pytest.fixture
def demo_photo(monkeypatch: pytest.MonkeyPatch) -> Workload:
    load = photos.load
    monkeypatch.setattr(photos, "load", lambda photo: load(photo)[:, 100:160, 100:200])
    return workloads.demo_photo(torch.device("cpu"), torch.float32)


@torch.inference_mode()
def test_variants_agree(demo_photo: Workload) -> None:
    assert demo_photo.reference is not None
    for arguments in demo_photo.sets:
        wanted = demo_photo.reference(*arguments)
        for variant in demo_photo.variants:
            if "torch.compile" in variant.name or not variant.is_checked:
                continue  # compiling takes minutes; `brt bench` does it
            found = variant.make()(*arguments)
            error = (found - wanted).abs().max() / wanted.abs().max()
            assert error <= demo_photo.tolerance, f"{variant.name}: {error}"
            assert variant.flops
