"""fuse-vertical: batch norm folded, the same result, and nothing stale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt.passes.folded_layers import Folded, FoldedLayers
from brt.passes.folding import folded
from brt.passes.fuse_vertical import FuseVertical
from brt.passes.packed_conv import as_product
from brt.protocols import TopK


def randomised(module: nn.Module) -> nn.Module:
    """Batch norms as after training."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.2, 2.0)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module


class Opened(nn.Module):
    """Layers that the tracer sees one by one."""

    def __init__(self, *, use_module: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.use_module = use_module

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.relu(x) if self.use_module else F.relu(x)


class Read(nn.Module):
    """The convolution is read twice: nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


BRANCHES: dict[str, tuple[Any, int]] = {
    "sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)),
        ),
        2,
    ),
    "opened": (lambda: Opened(use_module=True), 1),
    "function": (lambda: Opened(use_module=False), 1),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.BatchNorm2d(4)), 1,
    ),
    "circular": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)
        ),
        1,
    ),
    "norm-first": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), 0),
    "no-statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        ),
        0,
    ),
    "read": (Read, 0),
}  # fmt: skip


class Routed(nn.Module):
    def __init__(self, branch: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.gate = nn.Linear(4, 2)
        self.scatter = brt.ScatterRouter(TopK(1), 2)
        self.branches = nn.ModuleList(branch() for _ in range(2))
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        paths, route = self.scatter(x, self.gate(x.mean((2, 3))).softmax(-1))
        return self.gather([b(p) for b, p in zip(self.branches, paths, strict=True)], route)


def optimised(model: nn.Module, sample: Tensor | None = None) -> Any:
    return brt.optimize(model, passes=[FuseVertical()], sample=sample)


def num_folded(fast: Any) -> int:
    layers = [m for m in fast.inserted.values() if isinstance(m, FoldedLayers)]
    return sum(int(layer.extra_repr().split()[0]) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BRANCHES)
def test_the_same_with_fewer_layers(name: str, dtype: torch.dtype) -> None:
    branch, expected = BRANCHES[name]
    model = randomised(Routed(branch)).eval().to(dtype)
    fast = optimised(model, torch.randn(5, 3, 6, 6, dtype=dtype))
    assert num_folded(fast) == 1 + 2 * expected
    for num_cells in (0, 1, 7):
        x = torch.randn(num_cells, 3, 6, 6, dtype=dtype)
        kept = x.clone()
        with torch.no_grad():
            came, wanted = fast(x), model(x)
        factor = 1 if dtype == torch.float32 else 3000
        torch.testing.assert_close(came, wanted, rtol=1e-4 * factor, atol=1e-5 * factor)
        assert torch.equal(x, kept)


class Ways(nn.Module):
    """A residual block, and ways out of it that begin with ReLU."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.nothing, self.gate = nn.Identity(), nn.Linear(3, 2)
        self.skip = nn.Conv2d(3, 4, 1)
        weighted = kind == "weighted"
        self.scatter = brt.ScatterRouter(TopK(1), 2, weighted=weighted)
        self.relu = nn.ReLU(inplace=kind == "in-place")
        self.out = nn.Conv2d(4, 4, 1)
        self.gather = brt.GatherRouter(weighted=not weighted)

    def forward(self, x: Tensor) -> Tensor:
        other = self.skip(x)
        h = self.nothing(self.norm(self.conv(x)))
        if self.kind == "to-other":
            before = other.sum((1, 2, 3), keepdim=True)
            other.add_(h)
            h = other + before
        else:
            h = torch.add(h, other) if self.kind == "function" else other + h
        scores = self.gate(x.mean((2, 3))).tanh()
        flows = (h, scores) if self.kind == "flows" else h
        (a, b), route = self.scatter(flows, scores)
        if self.kind == "flows":
            a, b = a[0] * a[1].sum(), b[0]
        a = a if self.kind in ("bare", "flows") else self.relu(a)
        return self.gather([a, self.out(b.relu())], route)


# (of a layer, of a scatter): whether it adds to its result, and comes behind a ReLU
WAYS = {
    "plain": (True, True), "function": (True, True), "in-place": (True, True),
    "weighted": (True, False), "bare": (True, False), "flows": (True, False),
    "to-other": (False, True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WAYS)
def test_sums_and_relu_in_the_result(kind: str, dtype: torch.dtype) -> None:
    model = randomised(Ways(kind)).eval().to(dtype)
    nn.init.constant_(model.gate.bias, -3)  # weights are negative
    fast = optimised(model, torch.randn(5, 3, 6, 6, dtype=dtype))
    notes = " ".join(fast.report.regions[0].records[0].notes)
    assert ("add to their result" in notes, "behind the ReLU" in notes) == WAYS[kind]
    for num_cells in (0, 1, 7):
        x = torch.randn(num_cells, 3, 6, 6, dtype=dtype)
        with torch.no_grad():
            came, wanted = fast(x), model(x)
        factor = 1 if dtype == torch.float32 else 3000
        torch.testing.assert_close(came, wanted, rtol=1e-4 * factor, atol=1e-5 * factor)
    if kind == "in-place":
        return  # autograd takes no write to the rows of one path
    grads = []
    for module in (fast, model):
        model.zero_grad()
        module(torch.ones(2, 3, 6, 6, dtype=dtype)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 * factor, atol=1e-4 * factor)


@pytest.mark.parametrize("is_viewed", [False, True])
def test_images_that_become_cells_keep_their_layout(is_viewed: bool) -> None:
    class Annotated(Routed):
        def forward(self, x: Tensor) -> Tensor:
            cells, grid = brt.annotate(self.stem(x), 0)
            if is_viewed:
                cells = cells.view(-1, 4, 6, 6)
            scores = self.gate(cells.mean((2, 3))).softmax(-1)
            paths, route = self.scatter(cells, scores, grid.cells)
            return grid.restore(self.gather(list(paths), route))

    model = randomised(Annotated(nn.Identity)).eval()
    fast, x = optimised(model), torch.randn(3, 3, 6, 6)
    (stem,) = [m for m in fast.inserted.values() if isinstance(m, FoldedLayers)]
    assert stem.keeps_layout != is_viewed
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_linear_layers() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU())
            self.scatter, self.gather = brt.ScatterRouter(TopK(1), 4), brt.GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            paths, route = self.scatter(x, x.softmax(-1))
            return self.gather(list(paths), route)

    model = randomised(Flat()).eval()
    fast = optimised(model)
    assert num_folded(fast) == 1
    x = torch.randn(6, 5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_folded_weights_follow_the_model() -> None:
    model = randomised(Routed(BRANCHES["opened"][0])).eval()
    fast, x = optimised(model), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        before = fast(x)
        model.stem[1].running_var.mul_(4)
        model.branches[0].norm.weight.add_(1)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fast(x), before)
        other = copy.deepcopy(fast)
        other.get_parameter("stem.0.bias").add_(1)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert set(fast.state_dict()) == set(model.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of flags that it sets itself
@pytest.mark.parametrize("size", [1, 4, 64], ids=lambda size: f"{size}x{size}")
@pytest.mark.parametrize("num_cells", [0, 1, 3])
def test_small_1x1_convolutions_are_products(num_cells: int, size: int) -> None:
    conv = nn.Conv2d(24, 20, 1)
    norm = randomised(nn.BatchNorm2d(20)).eval()
    layers = FoldedLayers([Folded(conv, norm, relu=True)])
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(num_cells, 24, size, size).contiguous(memory_format=layout)
        with torch.no_grad():
            wanted = norm(conv(x)).relu()
            torch.testing.assert_close(layers(x), wanted, rtol=1e-4, atol=1e-5)
            with torch.backends.mkldnn.flags(enabled=False):
                torch.testing.assert_close(layers(x), wanted, rtol=1e-4, atol=1e-5)
    is_small = as_product(torch.randn(2, 24, size, size), conv.weight) is not None
    assert is_small == (size == 1)  # images that lie otherwise are no rows
    x = torch.randn(1, 24, size, size).contiguous(memory_format=torch.channels_last)
    assert (as_product(x, conv.weight) is not None) == (size < 64)


def test_layers_get_a_bias_and_another_dtype() -> None:
    conv, x = nn.Conv2d(4, 5, 1, bias=False), torch.randn(1, 4, 1, 1)
    layers = FoldedLayers([Folded(conv, None, relu=False)])
    with torch.no_grad():
        torch.testing.assert_close(layers(x), conv(x))
        conv.bias = nn.Parameter(torch.randn(5))
        torch.testing.assert_close(layers(x), conv(x))
        conv.double()
        torch.testing.assert_close(layers(x.double()), conv(x.double()))


def test_gradients_are_those_of_the_layers() -> None:
    model = randomised(Routed(BRANCHES["sequential"][0])).eval()
    fast, x, found = optimised(model), torch.randn(5, 3, 6, 6), []
    for module in (fast, model):
        model.zero_grad()
        module(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_that_train_keep_their_own_statistics() -> None:
    model = randomised(Routed(BRANCHES["opened"][0])).eval()
    fast = optimised(model)
    model.stem[1].train()
    fast.stem[1].train()
    kept = model.stem[1].running_mean.clone()
    x = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        came = fast(x)
        model.stem[1].running_mean.copy_(kept)
        torch.testing.assert_close(came, model(x), rtol=1e-4, atol=1e-5)
    trained = Routed(BRANCHES["opened"][0]).train()
    assert num_folded(optimised(trained)) == 0


def test_folding_is_exact_in_double() -> None:
    layer, norm = nn.Conv2d(3, 5, 3).double(), randomised(nn.BatchNorm2d(5)).double().eval()
    weight, bias = folded(layer, norm)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x, weight, bias), norm(layer(x)))


def test_compiled() -> None:
    model = randomised(Routed(BRANCHES["sequential"][0])).eval()
    fast, x = optimised(model), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        model.stem[0].weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
