"""fuse-conv-chains: equal to the branches on any input, and honest about what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import plugins
from brt.passes.fuse_conv_chains import ConvChains, FuseConvChains


class Fast:
    """A kernel that always wins the estimate: the reference by another name."""

    calls = 0

    @brt.hookimpl
    def brt_kernels(self) -> Iterator[brt.KernelSpec]:
        def forward(*args: Any) -> Tensor:
            Fast.calls += 1
            return brt.reference.conv_chain(*args)

        yield brt.KernelSpec(
            op="conv_chain",
            device="cpu",
            name="acme-fast",
            forward=forward,
            estimate=lambda *args: 0.0,
        )


@pytest.fixture(autouse=True)
def fast_kernel() -> Iterator[None]:
    with plugins.using(Fast()):
        yield


class Residual(nn.Module):
    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.act = nn.PReLU(channels)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.conv1(x))) * self.scale


class Branch(nn.Module):
    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding="same")
        self.body = nn.Sequential(*(Residual(channels, 0.5) for _ in range(blocks)))
        self.tail = nn.Conv2d(channels, 12, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        head = self.head(x)
        body = F.relu(torch.add(head, self.body(head)) if len(self.body) == 0 else self.body(head))
        return self.shuffle(self.tail(body))


class Patches(nn.Module):
    def __init__(self, branches: list[nn.Module], *, use_each: bool, protocol: Any = None) -> None:
        super().__init__()
        self.gate = nn.Linear(3, len(branches))
        self.scatter = brt.ScatterRouter(protocol or brt.protocols.TopK(1), len(branches))
        self.branches = nn.ModuleList(branches)
        self.gather = brt.GatherRouter()
        self.use_each = use_each

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x.mean((2, 3))).softmax(-1))
        if self.use_each:
            return self.gather(brt.each(self.branches, paths), route)
        return self.gather([b(p) for b, p in zip(self.branches, paths, strict=True)], route)


def branches() -> list[nn.Module]:
    return [Branch(4, 1), Branch(6, 3), Branch(5, 2)]


def optimised(model: nn.Module, sample: Tensor | None = None) -> Any:
    return brt.optimize(model, passes=[FuseConvChains()], sample=sample)


def reasons(fast: Any) -> str:
    return "; ".join(
        f"{left.what}: {left.why}"
        for region in fast.report.regions
        for record in region.records
        for left in record.left
    )


@pytest.mark.parametrize("use_each", [False, True], ids=["opened", "each"])
@pytest.mark.parametrize("num_cells", [0, 1, 7])
def test_equal_on_any_input(use_each: bool, num_cells: int) -> None:
    torch.manual_seed(0)
    model = Patches(branches(), use_each=use_each).eval()
    fast = optimised(model)
    assert any(isinstance(m, ConvChains) for m in fast.inserted.values()), reasons(fast)
    before = Fast.calls
    for seed in range(3):
        x = torch.randn(num_cells, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert Fast.calls == before + 3


def test_gradients_reach_the_parameters_of_the_model() -> None:
    torch.manual_seed(0)
    model = Patches(branches(), use_each=False).train()
    for branch in model.branches:
        branch.shuffle = nn.Identity()  # torch's own has no backward for a path without rows
    fast = optimised(model)
    assert any(isinstance(m, ConvChains) for m in fast.inserted.values()), reasons(fast)
    x = torch.randn(9, 3, 8, 8)
    found, expected = [], []
    for module, grads in ((fast, found), (model, expected)):
        model.zero_grad()
        module(x).square().sum().backward()
        grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_are_those_of_the_model() -> None:
    model = Patches(branches(), use_each=True).eval()
    fast = optimised(model)
    assert set(fast.state_dict()) == set(model.state_dict())
    x = torch.randn(5, 3, 8, 8)
    before = fast(x)
    with torch.no_grad():
        model.branches[0].head.weight.mul_(2)
        model.branches[1].head.weight.mul_(2)
        model.branches[2].head.weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fast(x), before)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.get_parameter("branches.0.head.weight").zero_()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_slower_chain_is_left_alone_with_its_times() -> None:
    model = Patches(branches(), use_each=True).eval()
    with plugins.using():  # only the reference, which is no faster than the branches
        fast = optimised(model, torch.randn(64, 3, 8, 8))
        if not any(isinstance(m, ConvChains) for m in fast.inserted.values()):
            assert "as branches" in reasons(fast)
        fast = optimised(model)
        assert "no kernel but the reference" in reasons(fast)


STRANGE = {
    "strided": (lambda: nn.Conv2d(3, 3, 3, stride=2, padding=1), "keeps the size"),
    "grouped": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), "keeps the size"),
    "activation": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid()), "is Sigmoid"),
    "nothing": (lambda: nn.Sequential(nn.Identity(), nn.ReLU()), "no convolution of its own"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_branches_are_left_alone_with_the_reason(name: str) -> None:
    make, reason = STRANGE[name]
    model = Patches([make(), make()], use_each=False).eval()
    fast = optimised(model)
    assert reason in reasons(fast)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(fast(x), model(x))


def test_many_paths_a_cell_are_left_alone() -> None:
    model = Patches(branches(), use_each=False, protocol=brt.protocols.Threshold(0.1)).eval()
    assert "along many paths" in reasons(optimised(model))


def test_rows_read_elsewhere_are_left_alone() -> None:
    class Leaky(Patches):
        def forward(self, x: Tensor) -> Tensor:
            paths, route = self.scatter(x, self.gate(x.mean((2, 3))).softmax(-1))
            out = [b(p) for b, p in zip(self.branches, paths, strict=True)]
            return self.gather(out, route) + out[0].sum()

    model = Leaky(branches(), use_each=False).eval()
    fast = optimised(model)
    assert "is also read by" in reasons(fast)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(fast(x), model(x))


def test_random_regions_are_refused() -> None:
    model = Patches(branches(), use_each=False, protocol=brt.protocols.Random(1)).eval()
    with pytest.warns(brt.PluginWarning, match="random"):
        optimised(model)
