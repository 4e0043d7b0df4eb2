"""The patch network against a loop over patches, its bad input, and its shipped weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brt import annotate_patches
from brt.errors import BrtError
from brt_models import patch_sr, photos, quality
from brt_models.patch_sr import Gate, PatchSR, PatchSRConfig
from brt_models.patch_sr.config import Upsampler
from brt_models.patches import PixelShuffle
from brt_models.resampling import crop_to_multiple, enlarge, shrink

SMALL = PatchSRConfig(channels=(4, 6, 8), blocks=(0, 1, 2), size=12, stride=8, gate_channels=(8,))
SHAPES = {
    "regular": (1, 3, 28, 20),
    "last patch moved inwards": (1, 3, 31, 23),
    "one patch": (1, 3, 12, 12),
    "two photos": (2, 3, 20, 29),
    "smaller than a patch": (1, 3, 5, 20),
    "one pixel": (1, 3, 1, 1),
}


def small(config: PatchSRConfig = SMALL, seed: int = 0) -> PatchSR:
    """A model whose gate uses every path."""
    torch.manual_seed(seed)
    model = PatchSR(config).eval()
    model.gate = nn.Sequential(nn.Flatten(), nn.Linear(3 * config.size**2, config.num_paths))
    return model


def by_loop(model: PatchSR, x_BCHW: Tensor) -> Tensor:
    """The same, patch by patch and pixel sums in plain Python."""
    config = model.config
    size, scale = config.size, config.scale
    height, width = x_BCHW.shape[2:]
    below, right = max(0, size - height), max(0, size - width)
    x_BCHW = torch.nn.functional.pad(x_BCHW, (0, right, 0, below), mode="replicate")

    def starts(extent: int) -> list[int]:
        regular = list(range(0, extent - size + 1, config.stride))
        return regular if regular[-1] + size == extent else [*regular, extent - size]

    out_BCHW = enlarge(x_BCHW, scale)
    for photo, out_CHW in zip(x_BCHW, out_BCHW, strict=True):
        total_CHW, count_CHW = torch.zeros_like(out_CHW), torch.zeros_like(out_CHW)
        for top in starts(photo.shape[1]):
            for left in starts(photo.shape[2]):
                cell = photo[None, :, top : top + size, left : left + size]
                cell = cell - cell.mean((2, 3), keepdim=True)
                branch = model.branches[int(model.gate(cell).argmax())]
                y, x = scale * top, scale * left
                total_CHW[:, y : y + scale * size, x : x + scale * size] += branch(cell)[0]
                count_CHW[:, y : y + scale * size, x : x + scale * size] += 1
        out_CHW += total_CHW / count_CHW
    return out_BCHW[:, :, : scale * height, : scale * width]


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("upsampler", ["direct", "progressive"])
@torch.inference_mode()
def test_equals_a_loop_over_patches(case: str, upsampler: Upsampler) -> None:
    model = small(replace(SMALL, upsampler=upsampler))
    x_BCHW = torch.rand(SHAPES[case])
    out_BCHW = model(x_BCHW)
    batch, _, height, width = SHAPES[case]
    assert out_BCHW.shape == (batch, 3, 4 * height, 4 * width)
    torch.testing.assert_close(out_BCHW, by_loop(model, x_BCHW))


@torch.inference_mode()
def test_the_small_gate_uses_every_path() -> None:
    model = small()
    with quality.loads(model.scatter) as load_P:
        model(torch.rand(1, 3, 60, 60) * torch.linspace(0, 1, 60))
    assert sum(load_P) == 49
    assert min(load_P) > 0
    before = list(load_P)
    model(torch.rand(1, 3, 60, 60))
    assert load_P == before  # nothing is counted once the context is left


def test_all_on_one_path_gives_gradients_to_every_branch() -> None:
    model = small().train()
    with torch.no_grad():
        model.gate[1].weight.zero_()
        model.gate[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    model(torch.rand(1, 3, 20, 20)).sum().backward()
    for path, branch in enumerate(model.branches):
        total = sum(float(p.grad.abs().sum()) for p in branch.parameters() if p.grad is not None)
        assert all(p.grad is not None for p in branch.parameters())
        assert (total > 0) == (path == 1)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.slow
@torch.inference_mode()
def test_compiles_into_one_graph() -> None:
    model = small()
    x_BCHW = torch.rand(1, 3, 31, 23)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x_BCHW), model(x_BCHW))


def test_pixel_shuffle_is_torchs() -> None:
    x_NFHW = torch.rand(2, 18, 4, 5)
    ours, torchs = PixelShuffle(3), torch.nn.PixelShuffle(3)
    assert torch.equal(ours(x_NFHW), torchs(x_NFHW))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(1, 1, 40, 40), r"\[B, 3, H, W\].*got \[1, 1, 40, 40\]; .*picture_files.read"),
        (torch.rand(1, 4, 40, 40), r"got \[1, 4, 40, 40\]"),
        (torch.rand(3, 40, 40), r"got \[3, 40, 40\]"),
        (torch.rand(1, 3, 0, 40), r"got \[1, 3, 0, 40\]"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), "floats from 0 to 1, got torch.uint8"),
    ],
    ids=["grey", "alpha", "no batch", "no pixels", "bytes"],
)
def test_what_is_no_photo(x: Tensor, message: str) -> None:
    with pytest.raises(BrtError, match=message):
        small()(x)


@torch.inference_mode()
def test_no_photos_at_all() -> None:
    assert small()(torch.rand(0, 3, 40, 40)).shape == (0, 3, 160, 160)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": ()}, "one number a path; got 0 and 3"),
        ({"blocks": (1, 2)}, "one number a path; got 3 and 2"),
        ({"channels": (0, 1, 2)}, "channels >= 1"),
        ({"stride": 13}, "stride from 1 to size; got scale=4, size=12, stride=13"),
        ({"upsampler": "nearest"}, "no upsampler 'nearest': direct, progressive"),
        ({"upsampler": "progressive", "scale": 3}, "a power of two, got 3"),
        ({"gate_channels": ()}, "no gate"),
        ({"price": 0.0}, "price must be over 0"),
        ({"channels": (8, 6, 4)}, "from cheap to expensive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_make_no_network(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(SMALL, **fields)


@pytest.mark.parametrize("upsampler", ["direct", "progressive"])
def test_multiply_adds_are_those_of_the_convolutions(upsampler: Upsampler) -> None:
    model = PatchSR(replace(SMALL, upsampler=upsampler))
    for path, branch in enumerate(model.branches):
        counted = []

        def count(conv: nn.Module, args: object, out: Tensor, counted: list[int] = counted) -> None:
            counted.append(conv.weight.numel() * out.shape[2] * out.shape[3])

        for module in branch.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        branch(torch.rand(1, 3, SMALL.size, SMALL.size))
        assert sum(counted) == model.config.macs_P[path]


@torch.inference_mode()
def test_a_higher_price_spends_less() -> None:
    x_BCHW = torch.rand(1, 3, 60, 60)
    spent = []
    for price in (1e-9, 1e-2, 1e9):
        torch.manual_seed(0)
        model = PatchSR(replace(SMALL, price=price)).eval()
        with quality.loads(model.scatter) as load_P:
            model(x_BCHW)
        spent.append(sum(n * cost for n, cost in zip(load_P, model.config.macs_P, strict=True)))
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == 49 * max(model.config.macs_P)
    assert spent[-1] == 49 * min(model.config.macs_P)


@torch.inference_mode()
def test_more_contrast_is_never_predicted_to_be_easier(shipped: PatchSR) -> None:
    plain = [patch_sr.centred(torch.full((1, 3, 32, 32), grey)) for grey in (0.0, 0.5, 1.0)]
    assert shipped.gate(torch.cat(plain)).argmax(1).tolist() == [0, 0, 0]
    cells_NCHW = patch_sr.centred(torch.rand(20, 3, 32, 32))
    paths = [shipped.gate(cells_NCHW * contrast).argmax(1) for contrast in (0.01, 0.3, 1.0, 3.0)]
    for fainter_N, stronger_N in pairwise(paths):
        assert (fainter_N <= stronger_N).all()


def test_save_and_load(tmp_path: Path) -> None:
    model = PatchSR(SMALL).eval()
    patch_sr.save(model, tmp_path / "m.safetensors", {"seed": 0})
    again = patch_sr.load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert not again.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]
    x_BCHW = torch.rand(1, 3, 20, 20)
    with torch.inference_mode():
        assert torch.equal(again(x_BCHW), model(x_BCHW))


def test_files_that_hold_no_model(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(BrtError, match="cannot read"):
        patch_sr.load(file)
    file.write_bytes(b"rubbish")
    with pytest.raises(BrtError, match="cannot read"):
        patch_sr.load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(BrtError, match="names no config"):
        patch_sr.load(file)
    save_file({"x": torch.zeros(1)}, file, {"config": json.dumps({"widths": [1]})})
    with pytest.raises(BrtError, match="its config does not fit"):
        patch_sr.load(file)
    patch_sr.save(PatchSR(SMALL), file, {})
    weights = load_file(file)
    weights.pop("gate.linear.bias")
    config = json.dumps({"channels": [4, 6, 8], "blocks": [0, 1, 2], "gate_channels": [8]})
    save_file(weights, file, {"config": config})
    with pytest.raises(BrtError, match=r"(?s)does not fit.*gate\.linear\.bias"):
        patch_sr.load(file)


@pytest.fixture(scope="module")
def shipped() -> PatchSR:
    return patch_sr.pretrained()


# Decibels over bicubic (RGB and luma) below which the shipped weights must not fall.
GAINS = {"camera": 1.3, "chelsea": 0.3, "china": 0.25}


@pytest.mark.parametrize("photo", photos.split("held-out"), ids=lambda photo: photo.name)
def test_shipped_weights_beat_bicubic(shipped: PatchSR, photo: photos.Photo) -> None:
    (found,) = quality.measure(shipped, [photo], shipped.config.scale)
    assert min(found.rgb_gain, found.luma_gain) > GAINS[photo.name], found


@torch.inference_mode()
def test_every_shipped_path_is_taken(shipped: PatchSR) -> None:
    """On the photos that the weights were not made from, at their full size."""
    config = shipped.config
    load_P = torch.zeros(config.num_paths)
    for photo in photos.split("held-out"):
        cells_NCHW, _ = annotate_patches(photos.load(photo)[None], config.size, config.stride)
        path_N = shipped.gate(patch_sr.centred(cells_NCHW)).argmax(1)
        load_P += torch.bincount(path_N, minlength=config.num_paths)
    assert (load_P / load_P.sum()).min() > 0.05, load_P


@torch.inference_mode()
def test_the_shipped_gate_spends_where_it_helps(shipped: PatchSR) -> None:
    """Sent to the cheapest path by force, the most expensive path's patches get worse."""
    high_BCHW = crop_to_multiple(photos.load(photos.find("china"))[None], 4)
    low_BCHW = shrink(high_BCHW, 4)
    routed = quality.compare(high_BCHW, shipped(low_BCHW), 4, "china")
    cheapest = copy.deepcopy(shipped)
    assert isinstance(cheapest.gate, Gate)
    cheapest.gate.price = 1e9
    plain = quality.compare(high_BCHW, cheapest(low_BCHW), 4, "china")
    assert routed.rgb > plain.rgb + 0.1
