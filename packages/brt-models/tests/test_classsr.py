"""ClassSR against a loop over patches written from the paper, its losses, its checkpoints."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin, classsr, quality
from brt_models.classsr import ClassSR, ClassSRConfig
from brt_models.workloads.classsr import enlarge

PUBLISHED = {
    "fsrcnn": ClassSRConfig.fsrcnn(),
    "carn": ClassSRConfig.carn(),
    "srresnet": ClassSRConfig.srresnet(),
    "rcan": ClassSRConfig.rcan(),
}
TINY = {
    "fsrcnn": replace(PUBLISHED["fsrcnn"], channels=(4, 6, 8), depth=2, size=8, stride=6),
    "carn": replace(PUBLISHED["carn"], channels=(4, 8, 12), size=8, stride=6),
    "srresnet": replace(PUBLISHED["srresnet"], channels=(4, 6, 8), depth=2, size=8, stride=6),
    "rcan": replace(PUBLISHED["rcan"], channels=(16, 18, 32), depth=2, groups=2, size=8, stride=6),
}


def tiny(kind: str) -> ClassSR:
    """A network that sends patches of one photo to every branch; weights that matter."""
    torch.manual_seed(0)
    model = ClassSR(TINY[kind]).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1 and "mean" not in name:
            nn.init.kaiming_normal_(p, nonlinearity="linear")
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
        elif "running_mean" in name:
            nn.init.uniform_(buffer, -0.1, 0.1)
    with torch.no_grad():  # even shares of the photo below
        cells_NCHW, _ = model.cut(photo())
        logits_NP = model.scores(cells_NCHW)
        spread_NP = (logits_NP - logits_NP.mean(0)) / logits_NP.std(0)
        assert spread_NP.isfinite().all()
        last = model.classifier.lastOut
        last.bias.copy_((last.bias - logits_NP.mean(0)) / logits_NP.std(0))
        last.weight.div_(logits_NP.std(0)[:, None])
    return model


def photo(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 22, 29, generator=torch.Generator().manual_seed(seed))


class Plain:
    """Layers by name, out of a state dict, with functions of torch only."""

    def __init__(self, state: dict[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def get(self, name: str) -> Tensor:
        return self.state[f"{self.prefix}.{name}"]

    def conv(self, name: str, x: Tensor, groups: int = 1, stride: int = 1) -> Tensor:
        weight = self.get(f"{name}.weight")
        padding = weight.shape[2] // 2 if stride == 1 else 0
        bias = self.state.get(f"{self.prefix}.{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)

    def join(self, name: str, *parts: Tensor) -> Tensor:
        x = self.conv(f"{name}.0", torch.cat(parts, 1))
        norm = [self.get(f"{name}.1.{part}") for part in ("running_mean", "running_var")]
        return F.batch_norm(
            x, *norm, self.get(f"{name}.1.weight"), self.get(f"{name}.1.bias")
        ).relu()


def fsrcnn(net: Plain, config: ClassSRConfig, x: Tensor) -> Tensor:
    x = F.prelu(net.conv("head_conv.0", x), net.get("head_conv.1.weight"))
    x = F.prelu(net.conv("body_conv.0.0", x), net.get("body_conv.0.1.weight"))
    for layer in range(config.depth):
        x = net.conv(f"body_conv.{1 + layer}", x)
    x = F.prelu(x, net.get(f"body_conv.{1 + config.depth}.weight"))
    wide = f"body_conv.{2 + config.depth}"
    x = F.prelu(net.conv(f"{wide}.0", x), net.get(f"{wide}.1.weight"))
    weight, bias = net.get("tail_conv.weight"), net.get("tail_conv.bias")
    # Nine by nine kernels, four pixels apart, less three at the left and two at the right
    whole = F.conv_transpose2d(x, weight, bias, stride=4)
    return whole[..., 3 : 3 + 4 * x.shape[2], 3 : 3 + 4 * x.shape[3]]


def srresnet(net: Plain, config: ClassSRConfig, x: Tensor) -> Tensor:
    f = F.leaky_relu(net.conv("conv_first", x), 0.1)
    for i in range(config.depth):
        inner = net.conv(f"recon_trunk.{i}.conv1", f).relu()
        f = f + net.conv(f"recon_trunk.{i}.conv2", inner)
    for step in ("upconv1", "upconv2"):
        f = F.leaky_relu(F.pixel_shuffle(net.conv(step, f), 2), 0.1)
    f = net.conv("conv_last", F.leaky_relu(net.conv("HRconv", f), 0.1))
    return f + F.interpolate(x, scale_factor=4, mode="bilinear")


def carn(net: Plain, config: ClassSRConfig, x: Tensor) -> Tensor:
    def residual(name: str, f: Tensor) -> Tensor:
        g = net.conv(f"{name}.body.0", f, groups=4).relu()
        g = net.conv(f"{name}.body.2", g, groups=4).relu()
        return (net.conv(f"{name}.body.4", g) + f).relu()

    def block(name: str, f: Tensor) -> Tensor:
        first = residual(f"{name}.b1", f)
        one = net.join(f"{name}.c1", f, first)
        second = residual(f"{name}.b1", one)
        two = net.join(f"{name}.c2", f, first, second)
        third = residual(f"{name}.b1", two)
        return net.join(f"{name}.c3", f, first, second, third)

    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1)
    f = net.conv("entry", x - mean)
    first = block("b1", f)
    one = net.join("c1", f, first)
    second = block("b2", one)
    two = net.join("c2", f, first, second)
    third = block("b3", two)
    g = net.join("c3", f, first, second, third)
    for layer in (0, 3):
        g = F.pixel_shuffle(net.conv(f"upsample.up.body.{layer}", g, groups=4).relu(), 2)
    return net.conv("exit", g) + mean


def rcan(net: Plain, config: ClassSRConfig, x: Tensor) -> Tensor:
    def attending(name: str, f: Tensor) -> Tensor:
        g = net.conv(f"{name}.2", net.conv(f"{name}.0", f).relu())
        share = net.conv(f"{name}.3.conv_du.0", g.mean((2, 3), keepdim=True)).relu()
        return g * net.conv(f"{name}.3.conv_du.2", share).sigmoid() + f

    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1)
    top = net.conv("head.0", x - mean)
    f = top
    for group in range(config.groups):
        g = f
        for i in range(config.depth):
            g = attending(f"body.{group}.body.{i}.body", g)
        f = net.conv(f"body.{group}.body.{config.depth}", g) + f
    f = net.conv(f"body.{config.groups}", f) + top
    f = F.pixel_shuffle(net.conv("tail.0.0", f), 2)
    return net.conv("tail.1", F.pixel_shuffle(net.conv("tail.0.2", f), 2)) + mean


BRANCHES = {"fsrcnn": fsrcnn, "carn": carn, "srresnet": srresnet, "rcan": rcan}


def logits_of(model: ClassSR, cell: Tensor) -> Tensor:
    """The classifier, written again, of patches of 0 to 1."""
    plain = Plain(model.state_dict(), "classifier")
    x = plain.conv("CondNet.0", cell, stride=4)
    for layer in (2, 4, 6, 8):
        x = plain.conv(f"CondNet.{layer}", F.leaky_relu(x, 0.1))
    return x.mean((2, 3)) @ plain.get("lastOut.weight").T + plain.get("lastOut.bias")


def enlarged(kind: str, model: ClassSR, path: int, cells: Tensor) -> Tensor:
    """One branch, written again, of patches of 0 to 1."""
    white = model.config.white
    net = Plain(model.state_dict(), f"net{path + 1}")
    return BRANCHES[kind](net, model.config, cells * white) / white


def by_loop(kind: str, model: ClassSR, x_BCHW: Tensor) -> Tensor:
    """Patch by patch, as the authors' code; the last of each row and column moved inwards."""
    size, stride = model.config.size, model.config.stride
    out = torch.zeros(1, 3, 4 * x_BCHW.shape[2], 4 * x_BCHW.shape[3])
    count = torch.zeros_like(out)

    def starts(extent: int) -> list[int]:
        return sorted({*range(0, extent - size + 1, stride), extent - size})

    for top in starts(x_BCHW.shape[2]):
        for left in starts(x_BCHW.shape[3]):
            cell = x_BCHW[:, :, top : top + size, left : left + size]
            path = int(logits_of(model, cell).argmax())
            place = (
                ..., slice(4 * top, 4 * (top + size)), slice(4 * left, 4 * (left + size))
            )  # fmt: skip
            out[place] += enlarged(kind, model, path, cell)
            count[place] += 1
    return out / count


@pytest.mark.parametrize("kind", TINY)
@torch.inference_mode()
def test_equals_a_loop_over_patches(kind: str) -> None:
    model = tiny(kind)
    with quality.loads(model.scatter) as load_P:
        out = model(photo())
    assert min(load_P) > 0
    torch.testing.assert_close(out, by_loop(kind, model, photo()))


@pytest.mark.parametrize("kind", TINY)
def test_training_blends_all_branches(kind: str) -> None:
    model = tiny(kind)
    cells = torch.rand(3, 3, 8, 8)
    model.freeze_branches()
    model.train()
    out, probs = model(cells)  # a photo of one patch is a patch
    with torch.no_grad():
        torch.testing.assert_close(probs, logits_of(model, cells).softmax(1))
        wanted = sum(
            probs[:, p, None, None, None] * enlarged(kind, model, p, cells) for p in range(3)
        )
    torch.testing.assert_close(out, wanted)
    classsr.loss(model, cells, torch.rand(3, 3, 32, 32)).total.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"classifier.{name}" for name in model.classifier.state_dict()}


@pytest.mark.parametrize("kind", TINY)
def test_every_weight_has_a_gradient(kind: str) -> None:
    model = tiny(kind).train()
    classsr.loss(model, torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)).total.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert all("_mean." in name for name in without)
    # In eval mode too, where some branches may get no patch
    model.zero_grad()
    model.eval()(torch.rand(1, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for net in model.paths for p in net.parameters()
               if p.requires_grad)  # fmt: skip


def test_losses_are_those_of_the_authors() -> None:
    sure = torch.eye(3)
    assert float(classsr.class_loss(sure)) == 0
    assert float(classsr.class_loss(torch.full((5, 3), 1 / 3))) == pytest.approx(2)
    assert float(classsr.average_loss(sure)) == 0
    assert float(classsr.average_loss(torch.tensor([[0.0, 1.0, 0.0]] * 4))) == pytest.approx(1)
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    # 2 - (0.2 + 0.3 + 0.1) and 2 - (0 + 0.7 + 0.7), their mean
    assert float(classsr.class_loss(probs)) == pytest.approx(1.0)
    # Sums 0.6, 0.4, 1.0, of which each should be 2 / 3; over 4 * 2 / 3
    share = (abs(0.6 - 2 / 3) + abs(0.4 - 2 / 3) + abs(1 - 2 / 3)) / (8 / 3)
    assert float(classsr.average_loss(probs)) == pytest.approx(share)
    model, x, wanted = tiny("fsrcnn").train(), torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    found = classsr.loss(model, x, wanted)
    total = 1000 * found.pixel + 0.5 * found.classes + 3 * found.average
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.pixel, (model(x)[0] - wanted).abs().mean())
    with pytest.raises(BrtError, match="must be in training mode"):
        classsr.loss(tiny("fsrcnn"), x, wanted)
    with pytest.raises(BrtError, match=r"must be \[2, 3, 32, 32\], got \[2, 3, 8, 8\]"):
        classsr.loss(model, x, x)


# Of all names, shapes and dtypes of the authors' classes, listed with commit 6c253b0
LISTS = {
    "fsrcnn": "55020d343f252d70",
    "carn": "1201e77dd0b8368e",
    "srresnet": "4d4b2a8bc94e4090",
}
NUM_KEYS = {"fsrcnn": 72, "carn": 318, "srresnet": 234, "rcan": 4914}
NUM_ELEMENTS = {"fsrcnn": 112_940, "carn": 649_160, "srresnet": 3_062_060}


@pytest.mark.parametrize(
    "kind", ["fsrcnn", "carn", "srresnet", pytest.param("rcan", marks=pytest.mark.slow)]
)
def test_names_are_those_of_the_authors(kind: str) -> None:
    with torch.device("meta"):
        state = ClassSR(PUBLISHED[kind]).state_dict()
    assert len(state) == NUM_KEYS[kind]
    if kind in NUM_ELEMENTS:
        assert sum(t.numel() for t in state.values()) == NUM_ELEMENTS[kind]
    else:
        assert round(sum(t.numel() for t in state.values()) / 1e6, 1) == 30.1
    some = {
        "fsrcnn": ("net3.body_conv.6.0.weight", [56, 12, 1, 1]),
        "carn": ("net2.b3.c2.1.running_var", [52]),
        "srresnet": ("net1.recon_trunk.15.conv2.weight", [36, 36, 3, 3]),
        "rcan": ("net2.body.9.body.19.body.3.conv_du.0.weight", [3, 50, 1, 1]),
    }
    name, shape = some[kind]
    assert list(state[name].shape) == shape
    if kind in LISTS:
        listed = "\n".join(sorted(f"{name} {list(t.shape)} {t.dtype}" for name, t in state.items()))
        assert hashlib.sha256(listed.encode()).hexdigest()[:16] == LISTS[kind]


@pytest.mark.parametrize("kind", TINY)
def test_checkpoints_go_round(kind: str, tmp_path: Path) -> None:
    model, path = tiny(kind), tmp_path / "net.pth"
    classsr.save(model, path)
    again = classsr.load(path, TINY[kind])
    with torch.inference_mode():
        assert torch.equal(again(photo()), model(photo()))
    assert not again.training
    trained = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == trained
    # What DataParallel saves
    torch.save({f"module.{name}": t for name, t in model.state_dict().items()}, path)
    assert torch.equal(
        classsr.load(path, TINY[kind]).classifier.lastOut.bias, model.classifier.lastOut.bias
    )


@pytest.mark.parametrize("kind", ["fsrcnn", "carn"])
def test_published_networks_are_recognised(kind: str, tmp_path: Path) -> None:
    classsr.save(ClassSR(PUBLISHED[kind]), tmp_path / "net.pth")
    assert classsr.load(tmp_path / "net.pth").config == PUBLISHED[kind]


def test_branches_of_their_own(tmp_path: Path) -> None:
    model, other, paths = tiny("carn"), ClassSR(TINY["carn"]), []
    for i, net in enumerate(model.paths):
        paths.append(tmp_path / f"branch{i}.pth")
        torch.save(net.state_dict(), paths[-1])
    classsr.load_branches(other, paths)
    assert all(
        torch.equal(a, b)
        for net, copied in zip(model.paths, other.paths, strict=True)
        for a, b in zip(net.state_dict().values(), copied.state_dict().values(), strict=True)
    )
    with pytest.raises(BrtError, match="3 branches, but 2 files"):
        classsr.load_branches(other, paths[:2])
    with pytest.raises(BrtError, match=r"(?s)1\.entry\.bias.*3\.entry\.bias"):
        classsr.load_branches(other, paths[::-1])


class Touch:
    """A pickle that would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    state = tiny("fsrcnn").state_dict()
    state["extra"] = state.pop("net2.tail_conv.bias")
    state["classifier.lastOut.bias"] = torch.zeros(4)
    torch.save(state, path)
    with pytest.raises(BrtError) as caught:
        classsr.load(path, TINY["fsrcnn"])
    for part in ("net2.tail_conv.bias", "extra", "classifier.lastOut.bias"):
        assert part in str(caught.value)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(BrtError, match="is no checkpoint of ClassSR"):
        classsr.load(path)
    torch.save(tiny("srresnet").state_dict(), path)
    with pytest.raises(BrtError, match=r"net1\.head_conv"):
        classsr.load(path, TINY["fsrcnn"])
    torch.save({"model": Touch(tmp_path / "made")}, path)
    with pytest.raises(BrtError, match="could run code"):
        classsr.load(path)
    assert not (tmp_path / "made").exists()
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BrtError, match="cannot read"):
        classsr.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "edsr"}, "no kind 'edsr': fsrcnn, carn, srresnet, rcan"),
        ({"channels": (8,)}, "two branches or more"),
        ({"channels": (9, 8)}, "cheapest first; got"),
        ({"kind": "carn", "channels": (6, 8), "depth": 3}, "groups, which do not share"),
        ({"kind": "carn", "channels": (4, 8)}, "carn has a depth of 3, got 2"),
        ({"kind": "rcan"}, "rcan needs 16 channels"),
        ({"groups": 2}, "fsrcnn has no groups"),
        ({"depth": 0}, "depth and groups must be at least 1"),
        ({"stride": 9}, "stride must be from 1 to size"),
        ({"size": 3, "stride": 3}, "size is 3"),
    ],
    ids=str,
)
def test_configs_that_make_no_network(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(TINY["fsrcnn"], **fields)


@pytest.mark.parametrize("kind", TINY)
def test_optimised_gives_the_same(kind: str) -> None:
    model = tiny(kind)
    fast = brt.optimize(model, brt.profile(model, [photo()]), sample=photo())
    with torch.inference_mode():
        for other in (photo(1), torch.rand(2, 3, 8, 9), torch.rand(1, 3, 5, 30)):
            torch.testing.assert_close(fast(other), model(other))


def test_plugin() -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", "classsr")
        assert "classsr" in plugins.collect("workloads")
    (x,) = spec.sample()
    with torch.inference_mode():
        assert spec.factory()(x).shape == (1, 3, 384, 512)


@torch.inference_mode()
def test_variants_agree() -> None:
    workload = enlarge(torch.device("cpu"), torch.float32, height=40, width=60)
    assert workload.reference is not None
    assert workload.options == {"kind": "fsrcnn", "height": 40, "width": 60}
    (arguments,) = workload.sets
    wanted = workload.reference(*arguments)
    for variant in workload.variants:
        if "torch.compile" in variant.name or not variant.is_checked:
            continue
        error = (variant.make()(*arguments) - wanted).abs().max() / wanted.abs().max()
        assert error <= workload.tolerance, f"{variant.name}: {error}"
    with pytest.raises(BrtError, match="no kind 'edsr'"):
        enlarge(torch.device("cpu"), torch.float32, kind="edsr")
