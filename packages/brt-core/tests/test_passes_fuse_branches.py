"""fuse-branches: equal to the branches on any input, and as they were where oneDNN cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt.passes.branch_layers import GrowingLayer, can_grow, shuffled
from brt.passes.fuse_branches import FuseBranches, LayeredBranches
from brt.testing import check_pass


class Enlarge(nn.Module):
    """A 5x5 head with PReLU, a grouped residual block with batch norm, and a deconvolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.PReLU())
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.tail = nn.ConvTranspose2d(channels, 3, 9, 4, padding=3, output_padding=1)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        head = self.head(x)
        body = self.narrow(F.leaky_relu(self.norm(self.wide(head)), 0.2))
        return self.tail(F.relu(body + head))


class Shuffles(nn.Module):
    """Additions of both orders, a shuffle between convolutions, and what is no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.grow, self.shuffle = nn.Conv2d(8, 128, 1), nn.PixelShuffle(4)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        mean = first.mean((2, 3), keepdim=True)
        body = torch.add(first, self.second(first)) + self.second(mean.expand_as(first))
        grown = self.shuffle(F.relu(self.grow(body)))
        return self.last(grown).sigmoid() + F.interpolate(x, scale_factor=4)


class Patches(nn.Module):
    def __init__(self, branches: list[nn.Module], *, use_each: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(3, len(branches))
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), len(branches))
        self.branches = nn.ModuleList(branches)
        self.gather = brt.GatherRouter()
        self.use_each = use_each

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x.mean((2, 3))))
        if self.use_each:
            return self.gather(brt.each(self.branches, paths), route)
        return self.gather([b(p) for b, p in zip(self.branches, paths, strict=True)], route)


def patches(*, use_each: bool = True) -> Patches:
    torch.manual_seed(0)
    return Patches([Enlarge(4), Shuffles(), Enlarge(6)], use_each=use_each).eval()


def images(num_cells: int, seed: int = 0) -> Tensor:
    return torch.randn(num_cells, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def optimised(model: nn.Module, sample: Tensor | None = None) -> Any:
    return brt.optimize(model, passes=[FuseBranches()], sample=sample)


def layered(fast: Any) -> LayeredBranches:
    (found,) = (m for m in fast.inserted.values() if isinstance(m, LayeredBranches))
    return found


def reasons(fast: Any) -> str:
    records = [record for region in fast.report.regions for record in region.records]
    return "; ".join(f"{left.what}: {left.why}" for record in records for left in record.left)


@pytest.mark.parametrize("use_each", [False, True], ids=["opened", "each"])
def test_equal_on_any_input(use_each: bool) -> None:
    model = patches(use_each=use_each)
    fast = optimised(model)
    assert [len(program.layers) for program in layered(fast)._programs] == [4, 5, 4]
    for num_cells in (0, 1, 7):
        for shape in ((8, 8), (5, 12)):
            x = torch.randn(num_cells, 3, *shape)
            with torch.inference_mode():
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_it_keeps_the_rules_of_passes() -> None:
    check_pass(FuseBranches(), patches(), [images(6), images(1)])


@pytest.mark.parametrize("name", ["gradients", "autocast", "float64", "compiled"])
def test_branches_run_as_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's shuffle has no backward without rows, its batch norm no compiled form for loads
    model = Patches([Enlarge(4), Enlarge(6)]).eval()
    if name == "compiled":
        model.branches[0].norm = model.branches[1].norm = nn.Identity().eval()
    fast = optimised(model)
    x = images(7)
    if name == "float64":
        model, fast, x = model.double(), fast.double(), x.double()

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr("brt.passes.branch_program.BranchProgram.__call__", refuse)
    if name == "gradients":
        found, wanted = (
            torch.autograd.grad(module(x).square().sum(), list(model.branches.parameters()))
            for module in (fast, model)
        )
        torch.testing.assert_close(found, wanted)
        return
    run = torch.compile(fast, fullgraph=True, backend="eager") if name == "compiled" else fast
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        torch.testing.assert_close(run(x), model(x))


def test_weights_are_those_of_the_model() -> None:
    model = patches()
    fast = optimised(model)
    assert set(fast.state_dict()) == set(model.state_dict())
    x = images(9)
    with torch.inference_mode():
        before = fast(x)
    with torch.no_grad():
        for branch in (model.branches[0], model.branches[2]):
            branch.head[1].weight.fill_(-0.5)  # the slope, which oneDNN gets as a number
            branch.norm.running_mean.add_(1)
            branch.tail.weight.mul_(2)
        model.branches[1].last.weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(fast(x), before)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith("branches"):
                parameter.zero_()
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(other(x), fast(x))


GROWN: dict[str, Callable[[], nn.ConvTranspose2d]] = {
    "9 by 4": lambda: nn.ConvTranspose2d(5, 3, 9, 4, padding=3, output_padding=1),
    "4 by 2": lambda: nn.ConvTranspose2d(5, 2, 4, 2, padding=1, bias=False),
    "2 by 2": lambda: nn.ConvTranspose2d(5, 1, 2, 2),
    "3 by 3": lambda: nn.ConvTranspose2d(5, 1, 3, 3),
    "5 by 3": lambda: nn.ConvTranspose2d(5, 1, 5, 3, padding=1),
    "3 by 1": lambda: nn.ConvTranspose2d(5, 1, 3, 1, padding=1),
}


@pytest.mark.parametrize("name", GROWN)
def test_transposed_convolutions_are_plain_ones(name: str) -> None:
    layer, x = GROWN[name](), torch.randn(2, 5, 6, 7)
    assert can_grow(layer)
    with torch.inference_mode():
        torch.testing.assert_close(GrowingLayer(layer)(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"padding": 0}, {"groups": 1, "dilation": 2}, {"output_padding": 1}], ids=str
)
def test_transposed_convolutions_that_grow_otherwise_stay(options: dict[str, int]) -> None:
    assert not can_grow(nn.ConvTranspose2d(4, 4, 4, 2, **{"padding": 1, **options}))
    assert not can_grow(nn.ConvTranspose2d(4, 64, 4, 2, padding=1))


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_shuffles_are_torchs(channels: int, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, channels * 4, 3, 5).contiguous(memory_format=memory_format)
    assert torch.equal(shuffled(x, 2), F.pixel_shuffle(x, 2))


class Overwrites(nn.Module):
    """The convolution's input changes before its result is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        first.mul_(2)
        return F.relu(second + first)


def test_what_is_written_between_is_read_as_it_was() -> None:
    model = Patches([Overwrites(), Overwrites()]).eval()
    fast, x = optimised(model), images(5)
    assert [len(program.layers) for program in layered(fast)._programs] == [2, 2]
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_it_leaves_alone_it_says_with_the_reason() -> None:
    lines = Patches([nn.Flatten(), nn.Flatten()]).eval()
    assert "no branch has a convolution in float32 on a CPU" in reasons(optimised(lines))
    doubles = patches().double()
    assert "no branch has a convolution in float32" in reasons(optimised(doubles))
    with pytest.warns(brt.PluginWarning, match="in training mode"):
        optimised(patches().train())
