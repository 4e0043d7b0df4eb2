"""fold-permanent-paths: rows that need not move, and right results on any input.

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
from torch.nn import functional as F

import brt
from brt import protocols
from brt.guard import Count
from brt.optimize import optimize
from brt.optimized import Optimized
from brt.passes import DropDeadPaths, FoldPermanentPaths
from brt.passes.verify import largest_error
from brt.profile import profile
from brt.testing import check_pass

NAME = "fold-permanent-paths"


def folded(model: nn.Module, *inside: Tensor, passes: Any = (NAME,)) -> Optimized:
    return optimize(model, profile(model, inside), passes=passes, sample=inside[0])


def assert_same(fast: nn.Module, model: nn.Module, x: Tensor) -> None:
    largest_error(fast(x), model(x), FoldPermanentPaths().tolerance)


class Watching(nn.Module):
    """Notes which rows reach each branch (`nn.Identity` is one node of a graph)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.rows: dict[int, Tensor] = {}
        for p, branch in enumerate(model.branches):
            first = branch[0] if isinstance(branch, nn.Sequential) else branch
            first.register_forward_pre_hook(lambda _, args, p=p: self.rows.update({p: args[0]}))


class Flows(Mixture):
    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter((x, x[:, :1].contiguous()), self.scores(x))
        outs = [
            (branch(rows) * scale, scale)
            for branch, (rows, scale) in zip(self.branches, paths, strict=True)
        ]
        return self.gather(outs, route, (x, x[:, :1]) if self.gather.add_residual else None)


class PerPath(Mixture):
    """A flow that has a row for each cell and path."""

    def forward(self, x: Tensor) -> Any:
        each = torch.stack([x * (p + 1) for p in range(self.num_paths)], 1)
        paths, route = self.scatter(each, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, route)


class Strided(Mixture):
    """The rows that are scattered are not contiguous, and branches need that they are."""

    def forward(self, x: Tensor) -> Any:
        rows = x.t().contiguous().t()
        paths, route = self.scatter(rows, self.scores(x))
        outs = [
            branch(path.view(-1, DIM)) for branch, path in zip(self.branches, paths, strict=True)
        ]
        return self.gather(outs, route).view(-1)


class Listed(Mixture):
    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, [route[p] for p in range(self.num_paths)])


class Nested(nn.Module):
    """Both levels are permanent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outer = brt.ScatterRouter(protocols.TopK(1), 2)
        self.inner = Mixture(num_paths=3)
        self.gather = brt.GatherRouter(weighted=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.outer(x, x[:, :2])
        return self.gather([self.inner(paths[0]), paths[1] * 2], route)


@dataclass(frozen=True)
class Case:
    name: str
    model: type[nn.Module] = Mixture
    kwargs: dict[str, Any] = field(default_factory=dict)
    inside: tuple[Any, ...] = (1, 1, 1)
    guards: tuple[str, ...] = ("scatter", "gather")

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("one-path"),
    Case("two-paths", kwargs={"num_paths": 4, "k": 2}, inside=((0, 2), (2, 0))),
    Case("all-paths", kwargs={"k": 3}, inside=((0, 1, 2), (1, 0, 2))),
    Case("one-cell", inside=(2,)),
    Case("unweighted", kwargs={"gather": {"weighted": False}}),
    Case("weighted-in", kwargs={"scatter": {"weighted": True}, "gather": {"weighted": False}}),
    Case("added-residual", kwargs={"gather": {"add_residual": True}}),
    Case("residual", kwargs={"gather": {"overflow": "residual"}}),
    Case("union", kwargs={"gather": {"result": "union"}}),
    Case(
        "threshold",
        kwargs={"protocol": protocols.Threshold(1.0), "gather": {"overflow": "residual"}},
        inside=((0, 1), (1, 0)),
    ),
    Case("capacity", kwargs={"protocol": protocols.CapacityTopK(1, capacity_factor=3.0)}),
    Case("flows", Flows),
    Case("flows-with-residual", Flows, {"gather": {"add_residual": True}}),
    Case("per-path", PerPath, {"scatter": {"per_path": True}}),
    Case("per-path-two", PerPath, {"scatter": {"per_path": True}, "k": 2}, ((0, 1), (0, 1))),
    Case("strided", Strided),
    Case("listed", Listed, guards=("scatter",)),
    Case("identity", kwargs={"branches": [nn.Identity() for _ in range(3)]}),
    Case(
        "identity-unweighted",
        kwargs={
            "branches": [nn.Identity() for _ in range(3)],
            "gather": {"weighted": False},
        },
    ),
    Case(
        "in-place",
        kwargs={
            "branches": [nn.ReLU(inplace=True) for _ in range(3)],
            "gather": {"weighted": False},
        },
        inside=(1, 1, 1),
    ),
    Case("nested", Nested, inside=(0, 0), guards=("outer", "gather", "inner.scatter")),
)


def outside() -> Iterator[list[Any]]:
    yield []
    for p in range(3):
        yield [p]
        yield [p] * 4
    yield [0, 1, 2, 1]
    yield [(0, 1, 2), (2, 1), 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_on_any_input(case: Case, dtype: torch.dtype) -> None:
    model = case.model(**case.kwargs).to(dtype)
    inside = to_paths(case.inside, dtype)
    fast = folded(model, inside)
    wanted = {f"{NAME}:{where}" for where in case.guards}
    assert wanted <= set(fast.stats)
    with torch.no_grad():
        for _ in range(2):
            assert_same(fast, model, inside)
        assert all(fast.stats[name] == Count(hits=2) for name in wanted), fast.stats
        for paths in outside():
            x = to_paths(paths, dtype)
            assert_same(fast, model, x)
            assert torch.equal(x, to_paths(paths, dtype)), "the input was written to"
            assert_same(fast, model, inside)
    broken = case.name != "all-paths"  # where all paths are taken by rule
    assert all((fast.stats[name].fallbacks > 0) == broken for name in wanted), fast.stats


@torch.no_grad()
def test_the_rows_themselves_are_passed_on() -> None:
    model, x = Mixture(k=2), to_paths([(0, 1), (1, 0)])
    fast = folded(model, x)
    seen = Watching(fast).rows
    fast(x)
    assert seen[0] is x
    assert seen[1] is x
    assert seen[2].shape == (0, DIM)
    fast(to_paths([(0, 2), (1, 0)]))
    assert seen[0].data_ptr() != x.data_ptr()


@torch.no_grad()
def test_results_alias_nothing() -> None:
    for case in CASES:
        model, x = case.model(**case.kwargs), to_paths(case.inside)
        fast = folded(model, x)
        first = fast(x)
        rows = first if isinstance(first, Tensor) else first[0]
        kept, given = rows.clone(), x.clone()
        rows.mul_(0)
        assert torch.equal(x, given), f"{case}: the result is the input"
        again = fast(x)
        assert torch.equal(again if isinstance(again, Tensor) else again[0], kept), case.name


@torch.no_grad()
def test_a_fresh_result_is_not_copied() -> None:
    branches = [nn.Linear(DIM, DIM) for _ in range(3)]
    model = Mixture(branches=branches, gather={"weighted": False})
    x = to_paths([1, 1])
    fast = folded(model, x)
    made: list[Tensor] = []
    fast.branches[1].register_forward_hook(lambda _, args, out: made.append(out))
    assert fast(x) is made[0]


class KeepsRows(Mixture):
    """A path's rows leave the model."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, route), paths[1].view(-1)


class WritesAfter(Mixture):
    """The rows are written to after they were scattered, and before the branches run."""

    def forward(self, x: Tensor) -> Any:
        rows = x * 1
        paths, route = self.scatter(rows, self.scores(x))
        rows.mul_(3)
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, route) + rows


class WritesRows(Mixture):
    """Branches write to their rows, by method and by function."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = []
        for branch, path in zip(self.branches, paths, strict=True):
            view = path.view(-1)
            view.add_(1)
            outs.append(F.relu(branch(path), inplace=True))
        return self.gather(outs, route)


class TwoReaders(Mixture):
    """What a branch gives is read beside the gather, and the gather's result is written to."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        y = self.gather(outs, route)
        y.add_(1)
        return y, torch.cat(outs)


@pytest.mark.parametrize("model", [KeepsRows, WritesAfter, WritesRows, TwoReaders])
def test_memory_that_others_write_to_is_copied(model: type[Mixture]) -> None:
    made, x = model(gather={"weighted": False}), to_paths([1, 1])
    fast = folded(made, x)
    with torch.no_grad():
        for paths in ([1, 1], [0, 1], [1], [2, 2]):
            given = to_paths(paths)
            kept = given.clone()
            assert_same(fast, made, given)
            assert torch.equal(given, kept)
        if model is not TwoReaders:
            seen = Watching(fast).rows
            fast(x)
            assert seen[1].data_ptr() != x.data_ptr()
            (record,) = fast.report.records
            assert "gets a copy" in record.left[0].why


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "in-place"], ids=str)
def test_gradients_are_the_original_s(case: Case, training: bool) -> None:
    model = case.model(**case.kwargs).double().train(training)
    inside = to_paths(case.inside, torch.float64)
    fast = optimize(model, profile(model, [inside]), passes=[NAME], sample=inside)
    for paths in (case.inside, [0, 1, 2, 1], [1], []):
        came = []
        for module in (model, fast):
            model.zero_grad()
            leaf = to_paths(paths, torch.float64).requires_grad_()
            out = module(leaf)
            rows = out if isinstance(out, Tensor) else out[0]
            rows.sin().sum().backward()
            came.append([leaf.grad, *(p.grad for p in model.parameters())])
        for wanted, found in zip(*came, strict=True):
            assert (wanted is None) == (found is None)
            if wanted is not None:
                torch.testing.assert_close(found, wanted)
    assert fast.stats[f"{NAME}:{case.guards[0]}"].hits > 0


def test_after_dead_paths_were_dropped() -> None:
    model, x = Mixture(), to_paths([1, 1])
    fast = folded(model, x, passes=[FoldPermanentPaths(), DropDeadPaths()])
    assert [record.name for record in fast.report.records] == ["drop-dead-paths", NAME]
    with torch.no_grad():
        for paths in ([1, 1], [0, 1], [2], []):
            assert_same(fast, model, to_paths(paths))
    assert fast.stats["drop-dead-paths:scatter[0]"] == Count(hits=3, fallbacks=1)
    assert fast.stats[f"{NAME}:scatter"].hits >= 1


@pytest.mark.parametrize("inside", [[0, 1], [0, 1, 2], [(0, 1), 1]], ids=str)
def test_paths_that_are_not_permanent_stay(inside: list[Any]) -> None:
    model, x = Mixture(protocol=protocols.Threshold(1.0)), to_paths(inside)
    fast = folded(model, x)
    assert not fast.report.records[0].changed
    assert_same(fast, model, x)


def test_all_paths_dead_stays() -> None:
    model, x = Mixture(protocol=protocols.Threshold(100.0)), to_paths([0, 1])
    assert not folded(model, x).report.records[0].changed


def test_what_is_left_alone() -> None:
    class Packed(Mixture):
        def forward(self, x: Tensor) -> Any:
            rows, route = self.scatter(x, self.scores(x))
            return self.gather(brt.grouped(list(self.branches), rows, route), route)

    class OwnScatter(brt.ScatterRouter):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    x = to_paths([1, 1])
    model = Packed(scatter={"result": "packed"})
    (record,) = folded(model, x).report.records
    assert "packed" in record.left[0].why
    own = Mixture()
    own.scatter = OwnScatter(protocols.TopK(1), 3)
    (record,) = folded(own, x).report.records
    assert "forward of its own" in record.left[0].why
    (record,) = folded(Listed(), x).report.records
    assert record.changed


def test_it_refuses_random_numbers() -> None:
    model, x = Mixture(protocol=protocols.NoisyTopK(3)), to_paths([0, 1])
    random = Mixture(branches=[nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5))] * 3).train()
    for one in (model, random):
        if not one.training:
            one.scores = lambda x: torch.cat([x[:, :3], x[:, :3]], 1)  # type: ignore[method-assign]
        found = profile(one, [to_paths([1, 1])] if one.training else [x])
        with pytest.warns(brt.PluginWarning, match="draws random numbers"):
            fast = optimize(one, found, passes=[NAME], sample=x)
        assert fast.report.records[0].refused


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_keeps_the_rules_of_passes(case: Case) -> None:
    others = [to_paths(paths) for paths in outside()]
    check_pass(
        FoldPermanentPaths(), case.model(**case.kwargs), [to_paths(case.inside)], others=others
    )
