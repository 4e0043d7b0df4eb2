"""pin-capacities: static shapes from the profile, and loads unlike it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from dynamic_models import DIM, Mixture, to_paths
from torch import Tensor, nn

import brt
from brt.optimized import Optimized
from brt.passes import PinCapacities
from brt.testing import check_pass

PROFILED = to_paths([0, 1, 1, 0, 1])  # two rows on path 0, three on path 1, none on path 2
LOADS: dict[str, Sequence[int]] = {
    "as profiled": [0, 1, 1, 0, 1],
    "fewer": [1],
    "none": [],
    "all on one": [0] * 9,
    "on the path without places": [2, 2],
    "every path above its capacity": [0] * 4 + [1] * 5 + [2] * 3,
    "as many, in another order": [1, 1, 1, 0, 0],
}


class Shapes(nn.Module):
    """A branch that remembers which shapes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.act = nn.GELU()

    def forward(self, rows: Tensor) -> Tensor:
        return self.act(self.linear(rows))


def model(k: int = 1) -> Mixture:
    return Mixture(k=k, branches=[Shapes() for _ in range(3)])


def pinned(net: nn.Module, percentile: float = 100.0, batches: Sequence[Tensor] = ()) -> Optimized:
    profile = brt.profile(net, list(batches) or [PROFILED])
    return brt.optimize(net, profile, passes=[PinCapacities(percentile)], sample=PROFILED)


def loads() -> Iterator[tuple[str, Tensor]]:
    for name, paths in LOADS.items():
        yield name, to_paths(paths)


@torch.no_grad()
def test_any_load_gives_the_same() -> None:
    net = model()
    fast = pinned(net)
    assert sorted(type(module).__name__ for module in fast.inserted.values()) == [
        "PinnedGather",
        "PinnedScatter",
    ]
    for name, x in (*loads(), *loads()):
        torch.testing.assert_close(fast(x), net(x), msg=lambda m, name=name: f"{name}: {m}")
    count = fast.stats["pin-capacities:scatter"]
    assert (count.hits, count.fallbacks) == (2 * 4, 2 * 3)


@torch.no_grad()
def test_branches_see_one_shape() -> None:
    net = model()
    fast = pinned(net)
    seen: list[int] = []
    original = torch.nn.functional.linear

    def linear(rows: Tensor, *args: Tensor) -> Tensor:
        seen.append(len(rows))
        return original(rows, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        for paths in ([0, 1, 1, 0, 1], [1], []):
            fast(to_paths(paths))
            assert seen == [2, 3, 0]  # no more, and no fewer
            seen.clear()
        fast(to_paths([2, 0, 0, 0]))
        assert seen == [2, 3, 0, 1, 1]  # what is too much for paths 0 and 2 spills
    assert "paths have [2, 3, 0] rows" in str(fast.report)


@torch.no_grad()
def test_percentiles_are_of_forwards() -> None:
    net = model()
    batches = [to_paths([0] * n + [1]) for n in (1, 2, 3, 10)]
    for percentile, rows in ((100, 10), (50, 3), (0, 1)):
        fast = pinned(net, percentile, batches)
        assert f"paths have [{rows}, 1, 0] rows, percentile {percentile} of 4" in str(fast.report)
        torch.testing.assert_close(fast(batches[3]), net(batches[3]))
    with pytest.raises(brt.PassError, match="percentile must be from 0 to 100, got 101"):
        PinCapacities(101)


@pytest.mark.parametrize("name", LOADS)
def test_gradients_are_the_original_s(name: str) -> None:
    net = model(k=2)
    fast = pinned(net)
    found = []
    for module in (net, fast):
        net.zero_grad(set_to_none=True)
        x = to_paths([(p, (p + 1) % 3) for p in LOADS[name]]).requires_grad_()
        module(x).sin().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_train_mode() -> None:
    net = model().train()
    fast = pinned(net)
    assert "PinnedScatter" in {type(module).__name__ for module in fast.inserted.values()}
    for _, x in loads():
        torch.testing.assert_close(fast(x), net(x))


def test_copies_moves_and_contract() -> None:
    net = model()
    fast = pinned(net)
    x = to_paths([0, 0, 0, 2])
    twin = copy.deepcopy(fast).double()
    torch.testing.assert_close(twin(x.double()), net(x).double(), rtol=1e-5, atol=1e-6)
    check_pass(PinCapacities(), net, [PROFILED, to_paths([0, 2])])


def test_what_is_left_alone() -> None:
    def why(net: nn.Module, sample: Tensor | None = PROFILED) -> str:
        profile = brt.profile(net, [PROFILED])
        with pytest.warns(brt.PluginWarning) if sample is None else _nothing():
            fast = brt.optimize(net, profile, passes=["pin-capacities"], sample=sample)
        assert not fast.inserted
        return str(fast.report)

    class Mean(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows - rows.mean(0)

    assert "does not keep rows apart" in why(Mixture(branches=[Mean() for _ in range(3)]))
    in_place = [nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(inplace=True)) for _ in range(3)]
    assert "writes in place" in why(Mixture(branches=in_place))
    assert "a sample must tell" in why(model(), None)

    class Each(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            paths, route = self.scatter(x, self.scores(x))
            return self.gather(brt.each(self.branches, paths), route)

    assert "it is run by brt.each" in why(Each())
    net = model()
    with pytest.raises(brt.PassError, match="needs a profile"):
        brt.optimize(net, passes=["pin-capacities"], sample=PROFILED)


class _nothing:  # noqa: N801 - as contextlib names them
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.cuda
@torch.no_grad()
def test_on_cuda() -> None:
    net = model().cuda()
    profile = brt.profile(net, [PROFILED.cuda()])
    fast = brt.optimize(net, profile, passes=["pin-capacities"], sample=PROFILED.cuda())
    for _, x in loads():
        torch.testing.assert_close(fast(x.cuda()), net(x.cuda()))
