"""drop-dead-paths: what moves, what is left alone, and right results on any input.

Legend: N cells, P paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dynamic_models import DIM, Mixture, to_paths
from torch import Tensor, nn

import brt
from brt import protocols
from brt.guard import Count
from brt.optimize import optimize
from brt.optimized import Optimized
from brt.passes import DropDeadPaths
from brt.passes.verify import largest_error
from brt.profile import profile
from brt.testing import check_pass

NAME = "drop-dead-paths"


def dropped(model: nn.Module, *inside: Tensor, sample: bool = True) -> Optimized:
    """The model after this pass, profiled on these inputs."""
    found = profile(model, inside)
    return optimize(model, found, passes=[NAME], sample=inside[0] if sample else None)


def assert_same(fast: nn.Module, model: nn.Module, x: Tensor) -> None:
    largest_error(fast(x), model(x), DropDeadPaths().tolerance)


def linear(width: int = DIM) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, width), nn.GELU())


class Nested(nn.Module):
    """Path 1 of the outer scatter holds a whole mixture, its rows gathered by route or by list."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.listed = listed
        self.outer = brt.ScatterRouter(protocols.TopK(1), 2)
        self.inner = brt.ScatterRouter(protocols.TopK(1), 2)
        self.branches = nn.ModuleList(linear() for _ in range(3))
        self.gather_inner = brt.GatherRouter()
        self.gather = brt.GatherRouter(weighted=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        cells, grid = brt.annotate(x, 0)
        paths, route = self.outer(cells, cells[:, :2], grid.cells)
        first = self.branches[0](paths[0])
        inner, inner_route = self.inner(paths[1], paths[1][:, 2:4], route[1])
        outs = [self.branches[1 + p](rows) for p, rows in enumerate(inner)]
        if self.listed:
            return self.gather([first, *outs], [route[0], inner_route[0], inner_route[1]])
        return self.gather([first, self.gather_inner(outs, inner_route)], route)


class Flows(Mixture):
    """Two flows travel together; the second scales the first."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter((x, x[:, :1]), self.scores(x))
        outs = [
            (branch(rows) * scale, scale)
            for branch, (rows, scale) in zip(self.branches, paths, strict=True)
        ]
        return self.gather(outs, route)


class Listed(Mixture):
    """Gathers a list of `route[p]`."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, [route[p] for p in range(self.num_paths)])


class MoreInputs(Mixture):
    """Branches take a parameter, a result of all cells, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Any:
        total, width = torch.tanh(x.sum(0)), x.shape[1]
        paths, route = self.scatter(x, self.scores(x))
        outs = [
            (branch(path) * self.scale + total).reshape(-1, width)
            for branch, path in zip(self.branches, paths, strict=True)
        ]
        return self.gather(outs, route)


class ReadTwice(Mixture):
    """The middle and the end of every branch are read outside too."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        middle = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        outs = [torch.relu(rows) for rows in middle]
        return self.gather(outs, route), torch.cat(middle), outs[2]


class SharedBranch(Mixture):
    """All paths go through one module."""

    def __init__(self) -> None:
        super().__init__(branches=[linear()] * 3)


class Conv(Mixture):
    """Branches are convolutions, on cells that are images."""

    def __init__(self) -> None:
        super().__init__(branches=[nn.Conv2d(1, 2, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Any:
        image = x.view(-1, 1, 2, 3)
        paths, route = self.scatter(image, self.scores(x))
        return self.gather([b(p) for b, p in zip(self.branches, paths, strict=True)], route)


@dataclass(frozen=True)
class Case:
    name: str
    model: type[nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inside: tuple[Any, ...] = (0, 1, 1, 0)
    dead: tuple[str, ...] = ("scatter[2]",)

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("plain", Mixture),
    Case("one-path-of-three", Mixture, inside=(1,), dead=("scatter[0]", "scatter[2]")),
    Case("top-2", Mixture, (4, 2), inside=((0, 1), (1, 3)), dead=("scatter[2]",)),
    Case("unweighted", Mixture, kwargs={"gather": {"weighted": False}}),
    Case(
        "weighted-in",
        Mixture,
        kwargs={"scatter": {"weighted": True}, "gather": {"weighted": False}},
    ),
    Case("residual", Mixture, kwargs={"gather": {"add_residual": True}}),
    Case("union", Mixture, kwargs={"gather": {"result": "union"}}),
    Case(
        "threshold-with-cells-on-no-path",
        Mixture,
        kwargs={"protocol": protocols.Threshold(1.0), "gather": {"overflow": "residual"}},
    ),
    Case(
        "capacity",
        Mixture,
        kwargs={"protocol": protocols.CapacityTopK(1, capacity_factor=1.0)},
        inside=(0, 1, 1, 0, 0, 0),
    ),
    Case("flows", Flows),
    Case("listed", Listed),
    Case("more-inputs", MoreInputs),
    Case("read-twice", ReadTwice),
    Case("shared", SharedBranch),
    Case("convolutions", Conv),
    Case("nested", Nested, (False,), dead=("inner[0]", "inner[1]"), inside=((1, 2), (1, 3))),
)
NESTED = (
    Case("nested-by-route", Nested, (False,), inside=(0, 0), dead=("outer[1]",)),
    Case("nested-by-list", Nested, (True,), inside=(0, 0), dead=("outer[1]",)),
    Case("inner-dead", Nested, (True,), inside=((1, 2), 0, (1, 2)), dead=("inner[1]",)),
)


def outside() -> Iterator[list[Any]]:
    """Paths of cells unlike any profile above."""
    yield []
    for p in range(4):
        yield [p]
        yield [p] * 5
    yield [0, 1, 2, 3, 2, 1, 0]
    yield [(1, 2), (1, 3), (0, 3), 2, (3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*(c for c in CASES if c.name != "nested"), *NESTED], ids=str)
def test_right_on_any_input(case: Case, dtype: torch.dtype) -> None:
    model = case.model(*case.args, **case.kwargs).to(dtype)
    inside = to_paths(case.inside, dtype)
    fast = dropped(model, inside)
    wanted = {f"{NAME}:{where}" for where in case.dead}
    assert {name for name in fast.stats if name.startswith(NAME)} == wanted
    (record,) = fast.report.records
    assert record.changed
    assert len(record.notes) == len(case.dead)
    with torch.no_grad():
        for _ in range(2):
            assert_same(fast, model, inside)
        assert all(fast.stats[name] == Count(hits=2) for name in wanted)
        for paths in outside():
            assert_same(fast, model, to_paths(paths, dtype))
            assert_same(fast, model, inside)
    assert all(fast.stats[name].fallbacks > 0 for name in wanted), fast.stats


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_branch_of_a_dead_path_is_not_run(case: Case) -> None:
    model = case.model(*case.args, **case.kwargs)
    inside = to_paths(case.inside)
    fast = dropped(model, inside)
    ran: list[nn.Module] = []
    for branch in fast.branches:
        branch[0].register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        fast(inside)
        fast(inside)
        dead = {int(where[-2]) for where in case.dead}
        assert not [p for p in dead if fast.branches[p][0] in ran]
        fast(to_paths([min(dead)]))
        assert fast.branches[min(dead)][0] in ran


def test_the_whole_inner_mixture_moves() -> None:
    fast = dropped(Nested(listed=True), to_paths([0, 0]))
    (spill,) = [m for m in fast.inserted.values() if type(m).__name__ == "Spill"]
    assert any(name.startswith("inner") for name in spill.nodes)
    assert sum(name.startswith("branches") for name in spill.nodes) == 4


def test_without_a_sample() -> None:
    model, inside = Mixture(), to_paths([0, 1])
    fast = dropped(model, inside, sample=False)
    assert not fast.report.verified
    with torch.no_grad():
        for x in (inside, to_paths([2, 0]), to_paths([])):
            assert_same(fast, model, x)
    assert fast.stats[f"{NAME}:scatter[2]"] == Count(hits=2, fallbacks=1)


def test_a_sample_outside_the_profile() -> None:
    model = Mixture()
    fast = optimize(model, profile(model, [to_paths([0])]), passes=[NAME], sample=to_paths([1, 2]))
    with torch.no_grad():
        assert_same(fast, model, to_paths([2, 1, 0]))
        assert_same(fast, model, to_paths([0]))


@pytest.mark.parametrize("paths", [[0, 1], [2, 0, 1], [2], []], ids=str)
def test_gradients_are_zeros_and_not_none(paths: list[int]) -> None:
    model, x = Mixture(), to_paths(paths)
    fast = dropped(model, to_paths([0, 1]))
    came: list[list[Tensor | None]] = []
    for module in (model, fast):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        module(leaf).sin().sum().backward()
        came.append([leaf.grad, *(p.grad for p in model.parameters())])
    for wanted, found in zip(*came, strict=True):
        assert wanted is not None
        assert found is not None
        torch.testing.assert_close(found, wanted)


class Meeting(Mixture):
    """Rows of all paths meet before any work is done on them."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        return self.gather(self.branches[0](torch.cat(paths)), route)


class Each(Mixture):
    """Branches that run only where they have rows."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        return self.gather(brt.each(self.branches, paths), route)


class RouteRead(nn.Module):
    """The route inside a branch is read outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = brt.ScatterRouter(protocols.TopK(1), 2)
        self.inner = brt.ScatterRouter(protocols.TopK(1), 2)
        self.branches = nn.ModuleList(linear() for _ in range(3))
        self.gather = brt.GatherRouter()
        self.eval()

    def forward(self, x: Tensor) -> Any:
        paths, route = self.outer(x, x[:, :2])
        inner, inner_route = self.inner(paths[1], paths[1][:, 2:4])
        outs = [self.branches[p](rows) for p, rows in enumerate(inner)]
        both = self.gather(outs, inner_route)
        return self.gather([self.branches[2](paths[0]), both], route), inner_route.offsets_P1


class Reducing(Mixture):
    """A branch ends in a sum over its rows, read outside the gather."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, route), outs[2].sum(0) + 1


class Interleaved(Mixture):
    """In-place work of one branch between the nodes of another."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        middle = [self.branches[p](paths[p]) for p in range(3)]
        middle[0].mul_(2)
        return self.gather([torch.tanh(rows) for rows in middle], route)


class Writing(Mixture):
    """Between the nodes of a branch something is written that all branches read."""

    def forward(self, x: Tensor) -> Any:
        total = x.sum(0)
        paths, route = self.scatter(x, self.scores(x))
        outs = [self.branches[p](paths[p]) + total.add_(1.0) for p in range(3)]
        return self.gather(outs, route)


class Summing(Mixture):
    """A branch writes its rows to a sum over all branches."""

    def forward(self, x: Tensor) -> Any:
        total = x.new_zeros(1, DIM)
        paths, route = self.scatter(x, self.scores(x))
        outs = []
        for p in range(3):
            rows = self.branches[p](paths[p])
            outs.append(rows)
            total.index_add_(0, (rows[:, 0] * 0).long(), rows)
        return self.gather(outs, route), total


class Untaken(Mixture):
    """Path 2 is read by nobody, and path 1 does no work."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        return self.gather([self.branches[0](paths[0]), paths[1]], [route[0], route[1]])


@pytest.mark.parametrize(
    ("model", "inside", "left", "why"),
    [
        (Meeting, (0,), "path 1 of scatter", "no work of its own"),
        (Each, (0,), "path 1 of scatter", "brt.each runs its branch only where"),
        (RouteRead, (0,), "path 1 of outer", "route"),
        (Interleaved, (0, 1), "path 2 of scatter", "in place"),
        (Writing, (0, 1), "path 2 of scatter", "in place"),
        (Untaken, (0,), "path 2 of scatter", "nothing reads"),
        (Untaken, (0,), "path 1 of scatter", "no work of its own"),
    ],
)
def test_what_is_left_alone(model: type[nn.Module], inside: Any, left: str, why: str) -> None:
    made, x = model(), to_paths(inside)
    found = profile(made, [x])
    # Without a sample: some of these models are right only on inputs like the profile's
    (record,) = optimize(made, found, passes=[NAME]).report.records
    assert [one for one in record.left if one.what == left and why in one.why], record.left


@pytest.mark.parametrize(
    "model", [Each, Interleaved, Writing, Summing, Reducing, RouteRead, Untaken]
)
@pytest.mark.parametrize("sampled", [True, False])
def test_what_is_left_alone_is_right(model: type[nn.Module], sampled: bool) -> None:
    made = model()
    fast = dropped(made, to_paths([0, 1]), sample=sampled)
    with torch.no_grad():
        for paths in outside():
            if all(isinstance(p, tuple) or p < 3 for p in paths):
                assert_same(fast, made, to_paths(paths))


def test_a_reduction_stays_outside_the_branch() -> None:
    for sampled in (True, False):
        fast = dropped(Reducing(), to_paths([0, 1]), sample=sampled)
        (spill,) = [m for m in fast.inserted.values() if type(m).__name__ == "Spill"]
        assert not [name for name in spill.nodes if "sum" in name]


def test_writes_to_what_is_not_its_own_stay_outside_the_branch() -> None:
    for sampled in (True, False):
        fast = dropped(Summing(), to_paths([0, 1]), sample=sampled)
        (spill,) = [m for m in fast.inserted.values() if type(m).__name__ == "Spill"]
        assert not [name for name in spill.nodes if "index_add" in name]


def test_it_refuses_training_mode_and_random_numbers() -> None:
    x = to_paths([0, 1])
    model = Mixture()
    found = profile(model, [x])
    with pytest.warns(brt.PluginWarning, match=r"training mode.*model\.eval\(\)"):
        fast = optimize(model.train(), found, passes=[NAME], sample=x)
    assert fast.report.records[0].refused
    noisy = Mixture(protocol=protocols.Random())
    with pytest.warns(brt.PluginWarning, match="random is stochastic"):
        fast = optimize(noisy, profile(noisy, [x]), passes=[NAME], sample=x)
    assert not fast.stats
    with pytest.raises(brt.PassError, match=r"drop-dead-paths needs a profile: brt\.optimize"):
        optimize(Mixture(), passes=[NAME])


def test_packed_rows_have_no_branches() -> None:
    class Packed(Mixture):
        def forward(self, x: Tensor) -> Any:
            rows, route = self.scatter(x, self.scores(x))
            return self.gather(brt.grouped(list(self.branches), rows, route), route)

    model = Packed(scatter={"result": "packed"})
    fast = dropped(model, to_paths([0]))
    assert not fast.report.records[0].changed
    assert_same(fast, model, to_paths([1, 2]))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[9], *NESTED], ids=str)
def test_it_keeps_the_rules_of_passes(case: Case) -> None:
    model = case.model(*case.args, **case.kwargs)
    others = [to_paths(paths) for paths in outside()]
    check_pass(DropDeadPaths(), model, [to_paths(case.inside)], others=others)


def test_what_an_earlier_pass_inserted_moves_along() -> None:
    """A module that only the moved branch calls stays in the graph."""
    branches = [nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)) for _ in range(3)]
    model, x = Mixture(branches=branches), to_paths([0, 1, 0])
    fast = optimize(model, profile(model, [x]), passes=["fuse-vertical", NAME], sample=x)
    assert [record.changed for record in fast.report.records] == [True, True]
    for paths in ([0, 1], [2, 2], [0, 2, 1], []):
        assert_same(fast, model, to_paths(paths))
