"""LiveSR against a loop over patches written from the papers, its files, its benchmark."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin, livesr, quality
from brt_models.livesr import PUBLISHED, LiveSR, LiveSRConfig
from brt_models.workloads import livesr as workload_module

TINY = LiveSRConfig(num_paths=3, channels=4, num_blocks=2, size=12, stride=8)


def tiny(config: LiveSRConfig = TINY) -> LiveSR:
    """A network whose centres are features of patches, so that every branch is taken."""
    torch.manual_seed(0)
    model = LiveSR(config).eval()
    for name, buffer in model.classifier.resnet.named_buffers():
        if "running_var" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
        elif "running_mean" in name:
            nn.init.uniform_(buffer, -0.1, 0.1)
    with torch.inference_mode():
        cells_NCHW, _ = model.cut(frame())
        x_NF = model.classifier.resnet(cells_NCHW)
        model.classifier.centres_PF.copy_(x_NF[: config.num_paths] + 1e-3)
    return model


def frame(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 20, 29, generator=torch.Generator().manual_seed(seed))


def features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """ResNet-18, written again with functions of torch."""

    def layer(conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        parts = [state[f"{norm}.{part}"] for part in ("running_mean", "running_var")]
        return F.batch_norm(x, *parts, state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = F.max_pool2d(layer("conv1", "bn1", x, 2).relu(), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = layer(f"{name}.conv1", f"{name}.bn1", x, stride).relu()
            inner = layer(f"{name}.conv2", f"{name}.bn2", inner)
            if f"{name}.downsample.0.weight" in state:
                x = layer(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
            x = (inner + x).relu()
    return x.mean((2, 3))


def enlarged(state: dict[str, Tensor], num_blocks: int, x: Tensor) -> Tensor:
    """NAS-MDSR at scale 4, written again."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    top = res = conv("head.0", x)
    for i in range(num_blocks):
        res = res + conv(f"body.{i}.0.body.2", conv(f"body.{i}.0.body.0", res).relu())
    res = conv("body_end.0", res) + top
    for step in ("upscale.0.0", "upscale.0.2"):
        res = F.pixel_shuffle(conv(step, res), 2)
    return conv("tail.0", res)


def by_loop(model: LiveSR, x_BCHW: Tensor) -> Tensor:
    """Patch by patch; the last of each row and column moved inwards."""
    size, config = model.size, model.config
    resnet = model.classifier.resnet.state_dict()
    out = torch.zeros(1, 3, 4 * x_BCHW.shape[2], 4 * x_BCHW.shape[3])
    count = torch.zeros_like(out)

    def starts(extent: int) -> list[int]:
        return sorted({*range(0, extent - size + 1, config.stride), extent - size})

    for top in starts(x_BCHW.shape[2]):
        for left in starts(x_BCHW.shape[3]):
            cell = x_BCHW[:, :, top : top + size, left : left + size]
            distance_P = (features(resnet, cell) - model.classifier.centres_PF).norm(dim=1)
            path = int((1 / distance_P).argmax())
            y, x = slice(4 * top, 4 * (top + size)), slice(4 * left, 4 * (left + size))
            state = model.subnets[path].state_dict()
            out[..., y, x] += enlarged(state, config.num_blocks, cell)
            count[..., y, x] += 1
    return out / count


@torch.inference_mode()
def test_equals_a_loop_over_patches() -> None:
    model = tiny()
    with quality.loads(model.scatter) as load_P:
        out = model(frame())
    assert min(load_P) > 0
    torch.testing.assert_close(out, by_loop(model, frame()))


@torch.inference_mode()
def test_features_are_those_of_transformers() -> None:
    """Its ResNet with basic layers is ResNet-18; names differ, their order does not."""
    ours = tiny().classifier.resnet
    config = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    theirs = ResNetModel(config).eval()
    renamed = {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("bn", "norm").replace("downsample.0", "shortcut.convolution")
        name = name.replace("downsample.1", "shortcut.normalization")
        part = name.split(".")
        if part[0].startswith("layer"):
            start = f"encoder.stages.{int(part[0][5:]) - 1}.layers.{part[1]}"
            rest = part[2:]
        else:
            start, rest = "embedder.embedder", part
        if rest[0] != "shortcut":
            kind = "convolution" if rest[0].startswith("conv") else "normalization"
            index = int(rest[0][-1]) - 1
            inner = [] if start.startswith("embedder") else ["layer", str(index)]
            rest = [*inner, kind, *rest[1:]]
        renamed[".".join([start, *rest])] = tensor
    theirs.load_state_dict(renamed, strict=True)
    x = torch.rand(2, 3, 40, 32)
    torch.testing.assert_close(theirs(x).pooler_output.flatten(1), ours(x))


def test_training_moves_branches_only() -> None:
    model = tiny().train()
    assert not any(m.training for m in model.classifier.modules())
    model(frame()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.subnets.parameters())
    assert all(p.grad is None for p in model.classifier.parameters())
    one = tiny().train()  # two branches get no patch
    one(torch.rand(1, 3, 12, 12)).sum().backward()
    assert all(p.grad is not None for p in one.subnets.parameters())


@torch.inference_mode()
def test_optimised_gives_the_same() -> None:
    model = tiny()
    fast = brt.optimize(model, brt.profile(model, [frame()]), sample=frame())
    for other in (frame(1), torch.rand(2, 3, 12, 13), torch.rand(1, 3, 5, 30)):
        torch.testing.assert_close(fast(other), model(other))


def test_published_shapes() -> None:
    assert {LiveSRConfig.published(*shape).num_blocks for shape in PUBLISHED} == {80}
    assert [c for p, c in PUBLISHED if p == 10] == [8, 12, 16, 20]
    with pytest.raises(BrtError, match=r"8 branches of 20 features were not measured; there are"):
        LiveSRConfig.published(8, 20)
    with torch.device("meta"):
        state = LiveSR(replace(LiveSRConfig.published(channels=20), num_blocks=3)).state_dict()
    shapes = {
        "subnets.9.head.0.weight": [20, 3, 3, 3],
        "subnets.9.body.2.0.body.2.bias": [20],
        "subnets.9.body_end.0.weight": [20, 20, 3, 3],
        "subnets.9.upscale.0.2.weight": [80, 20, 3, 3],
        "subnets.9.tail.0.weight": [3, 20, 3, 3],
        "classifier.resnet.layer4.0.downsample.1.running_var": [512],
        "classifier.centres_PF": [10, 512],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes
    # Of a branch: head, two convolutions a block, end, two doublings, tail; weight and bias
    assert sum(name.startswith("subnets.0.") for name in state) == 2 * (1 + 2 * 3 + 1 + 2 + 1)


def test_files_of_branches(tmp_path: Path) -> None:
    model, other = tiny(), LiveSR(TINY)
    paths = [tmp_path / f"video{i}.pth" for i in range(3)]
    for subnet, path in zip(model.subnets, paths, strict=True):
        torch.save(subnet.state_dict(), path)
    # What NAS saves: a network for each scale, the fourfold one first
    several = {f"networks.0.{n}": t for n, t in model.subnets[0].state_dict().items()}
    for i, shape in enumerate([(36, 4, 3, 3), (16, 4, 3, 3)], 1):
        several[f"networks.{i}.upscale.0.0.weight"] = torch.zeros(shape)
    torch.save(several, paths[0])
    livesr.load_branches(other, paths)
    for name, tensor in other.subnets.state_dict().items():
        assert torch.equal(tensor, model.subnets.state_dict()[name])
    with pytest.raises(BrtError, match="3 branches, but 1 files"):
        livesr.load_branches(other, paths[:1])
    wide = LiveSR(replace(TINY, channels=5))
    with pytest.raises(BrtError, match=r"(?s)0\.head\.0\.bias is \[4\].*2\.upscale\.0\.2\.weight"):
        livesr.load_branches(wide, paths)
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    with pytest.raises(BrtError, match="cannot read"):
        livesr.load_branches(other, paths)


def test_files_of_the_resnet(tmp_path: Path) -> None:
    model, other, path = tiny(), LiveSR(TINY).eval(), tmp_path / "resnet18.pth"
    state = {
        name: t
        for name, t in model.classifier.resnet.state_dict().items()
        if "num_batches" not in name
    }
    torch.save(state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    livesr.load_resnet(other, path)
    x = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(other.classifier.resnet(x), model.classifier.resnet(x))
    state["layer9.conv"] = state.pop("layer1.0.conv1.weight")
    torch.save(state, path)
    with pytest.raises(BrtError, match=r"(?s)layer1\.0\.conv1\.weight.*layer9\.conv"):
        livesr.load_resnet(other, path)


def test_centres_go_round(tmp_path: Path) -> None:
    model, other, path = tiny(), LiveSR(TINY), tmp_path / "kmeans.npz"
    livesr.save_kmeans(model, path)
    livesr.load_kmeans(other, path)
    assert torch.equal(other.classifier.centres_PF, model.classifier.centres_PF)
    np.savez(path, cluster_centers_=np.ones((3, 512)))  # float64, as scikit-learn keeps them
    livesr.load_kmeans(other, path)
    assert (other.classifier.centres_PF == 1).all()


def test_folders_go_round(tmp_path: Path) -> None:
    model = tiny(replace(TINY, size=32, stride=28))
    livesr.save(model, tmp_path)
    again = livesr.load(tmp_path)
    assert again.config == model.config
    assert not again.training
    x = torch.rand(1, 3, 40, 50)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
    (tmp_path / "branch1.pth").unlink()
    (tmp_path / "resnet18.pth").unlink()
    with pytest.raises(BrtError, match=r"lacks branch1\.pth, resnet18\.pth"):
        livesr.load(tmp_path)
    livesr.save(model, tmp_path)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "branch0.pth")
    with pytest.raises(BrtError, match=r"no network of NAS: it has no .*, but conv\.weight"):
        livesr.load(tmp_path)
    with pytest.raises(BrtError, match="cannot read"):
        livesr.load(tmp_path / "none")


class Refused:
    """A pickle that says so when it is opened."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("a pickle was opened",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"kmeans": Refused()}), r"a pickle is never opened.*numpy\.savez"),
        (b"", "cannot read"),
        ({"centres": np.ones((3, 512))}, "holds no array 'cluster_centers_'; it holds centres"),
        ({}, "it holds nothing"),
        ({"cluster_centers_": np.ones((4, 512))}, r"floats \[3, 512\], got float64 \[4, 512\]"),
        ({"cluster_centers_": np.ones((3, 512), int)}, "got int64"),
        ({"cluster_centers_": np.full((3, 512), np.nan)}, "not finite"),
        ({"cluster_centers_": np.array([Refused()])}, "cannot read"),
        (np.ones((3, 512)), "it holds one array"),
    ],
    ids=["pickle", "empty", "name", "nothing", "shape", "integers", "nan", "objects", "npy"],
)
def test_files_that_hold_no_centres(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kmeans.npz"
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        elif isinstance(content, dict):
            np.savez(file, **content)
        else:
            np.save(file, np.asarray(content))
    with pytest.raises(BrtError, match=message):
        livesr.load_kmeans(tiny(), path)
    assert "opened" not in capsys.readouterr().out


def test_truncated_centres(tmp_path: Path) -> None:
    path = tmp_path / "kmeans.npz"
    livesr.save_kmeans(tiny(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BrtError, match="cannot read"):
        livesr.load_kmeans(tiny(), path)
    with pytest.raises(BrtError, match="cannot read"):
        livesr.load_kmeans(tiny(), tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_paths": 0}, "num_paths must be at least 1: 0"),
        ({"channels": 0}, "channels must be at least 1: 0"),
        ({"scale": 3}, "a power of two, got 3"),
        ({"stride": 13}, "stride must be from 1 to size"),
    ],
    ids=str,
)
def test_configs_that_make_no_network(fields: dict[str, int], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(TINY, **fields)


def test_the_benchmark_sends_patches_where_they_went() -> None:
    workload = workload_module.frame(
        torch.device("cpu"), torch.float32, num_paths=4, num_blocks=1, channels=4
    )
    assert "patches per path 19/25/18/36" in workload.shapes
    with pytest.raises(BrtError, match="loads are known for 10, 8, 6, 4 paths, not for 5"):
        workload_module.frame(torch.device("cpu"), torch.float32, num_paths=5)


@torch.inference_mode()
def test_variants_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workload_module.LOADS, 3, (2, 1, 3))
    workload = workload_module.frame(
        torch.device("cpu"), torch.float32, num_paths=3, num_blocks=2, channels=4
    )
    assert workload.options == {"channels": 4, "num_paths": 3, "num_blocks": 2}
    assert workload.reference is not None
    (arguments,) = workload.sets
    wanted = workload.reference(*arguments)
    for variant in workload.variants:
        if "torch.compile" in variant.name or not variant.is_checked:
            continue
        error = (variant.make()(*arguments) - wanted).abs().max() / wanted.abs().max()
        assert error <= workload.tolerance, f"{variant.name}: {error}"
        assert variant.flops


def test_plugin() -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", "livesr")
    assert isinstance(spec.factory(num_paths=2, num_blocks=1), LiveSR)
    assert "torchvision-resnet18" in spec.checkpoints
