"""speculate-routes: the likely way as a straight line, and the right result on every other.

Legend: N cells, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from exit_models import check_everywhere, check_gradients, conv_exits, images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import brt
from brt import checks, protocols
from brt.guard import Count
from brt.passes import SpeculateRoutes, speculate_routes
from brt.passes.speculate_routes import SpeculativeSegment
from brt.protocols import BinaryThreshold, Threshold, TopK
from brt.testing import check_pass

ALWAYS = SpeculateRoutes(measure=False)
DIM = 6


class Layer(nn.Module):
    """A scatter to three branches and a gather; the scores come from outside."""

    def __init__(self, protocol: protocols.Protocol | None = None, **gather: Any) -> None:
        super().__init__()
        self.scatter = brt.ScatterRouter(protocol or TopK(1), 3)
        self.branches = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.gather = brt.GatherRouter(**gather)

    def forward(self, x_ND: Tensor, scores_NP: Tensor) -> Any:
        paths, route = self.scatter(x_ND, scores_NP)
        rows = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        more = self.gather.add_residual or self.gather.overflow == "residual"
        return self.gather(rows, route, x_ND if more else None)


class Layers(nn.Module):
    """Two layers in succession; the input says which paths its cells take."""

    def __init__(self, protocol: protocols.Protocol | None = None, **gather: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Layer(protocol, **gather), Layer(protocol, **gather)

    def forward(self, x_ND: Tensor) -> Any:
        rows_ND = self.first(x_ND, x_ND[:, :3])
        return self.second(rows_ND.tanh(), x_ND[:, 3:])


def cells(*ways: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A cell for each (path of the first layer, path of the second)."""
    x_ND = torch.randn(len(ways), DIM, generator=torch.Generator().manual_seed(1)) * 0.1
    for n, (first, second) in enumerate(ways):
        x_ND[n, first] += 1
        x_ND[n, 3 + second] += 1
    return x_ND.to(dtype)


def speculated(
    model: nn.Module, inside: Sequence[Any], one: SpeculateRoutes = ALWAYS, sample: Any = None
) -> Any:
    profiled = brt.profile(model, inside, progress=False)
    return brt.optimize(
        model, profiled, passes=[one], sample=inside[0] if sample is None else sample
    )


def segments(fast: Any) -> list[SpeculativeSegment]:
    return [m for m in fast.inserted.values() if isinstance(m, SpeculativeSegment)]


def reasons(fast: Any) -> str:
    (region,) = fast.report.regions
    return "; ".join(f"{left.what}: {left.why}" for left in region.records[0].left)


def check_same(fast: nn.Module, model: nn.Module, x: Tensor) -> None:
    bound = 1e-5 if x.dtype == torch.float32 else 0.05
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize("path", [0, 1])
def test_exits_everywhere(dtype: torch.dtype, is_early: bool, path: int) -> None:
    model = conv_exits(dtype)
    mixed = [scatter.protocol for scatter in model.exits]
    for scatter, limit in zip(model.exits, (2.0, 0.0 if path == 0 else 2.0), strict=True):
        scatter.protocol = BinaryThreshold(limit)
    fast = speculated(model, [images(1, seed, dtype) for seed in range(3)])
    (segment,) = segments(fast)
    assert f"path {path} of exits.1" in segment.guard.assumes
    segment.is_early = is_early
    check_everywhere(fast, model, dtype)
    assert segment.guard.read().hits > 0 == segment.guard.read().fallbacks
    for module in (fast, model):
        for scatter, protocol in zip(module.exits, mixed, strict=True):
            scatter.protocol = protocol
    check_everywhere(fast, model, dtype)
    assert segment.guard.read().fallbacks > 0


def test_keeps_the_rules_of_passes() -> None:
    check_pass(ALWAYS, Layers(), [(cells(*[(1, 2)] * n),) for n in (3, 1)])


@pytest.mark.parametrize("is_early", [True, False])
def test_every_pattern_of_misses(is_early: bool) -> None:
    model = Layers().eval()
    fast = speculated(model, [cells((1, 2)), cells((1, 2), (1, 2))])
    (segment,) = segments(fast)
    segment.is_early = is_early
    ways = list(itertools.product(range(3), repeat=2))
    batches: list[tuple[tuple[int, int], ...]] = [(), *((way,) for way in ways)]
    batches += itertools.product(ways, repeat=2)
    for batch in batches:
        check_same(fast, model, cells(*batch))
    hits = sum(all(way == (1, 2) for way in batch) for batch in batches)
    assert segment.guard.read() == Count(hits, len(batches) - hits) == Count(3, 88)


@pytest.mark.parametrize("gather", [
    {}, {"weighted": False}, {"add_residual": True}, {"overflow": "residual"},
    {"overflow": "error"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("protocol", [
    TopK(1), Threshold(0.5), protocols.CapacityTopK(1, capacity_factor=3.0),
    protocols.CapacityTopK(1, capacity_factor=1.0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_residuals_and_capacity(gather: Any, protocol: Any, dtype: torch.dtype) -> None:
    if gather.get("overflow") == "error" and "capacity_factor=1" in str(protocol):
        gather = {}  # the original raises
    model = Layers(protocol, **gather).eval().to(dtype)
    likely = cells(*[(1, 2)] * 6, dtype=dtype)
    profiled = brt.profile(model, [likely[:1]], progress=False)
    fast = brt.optimize(model, profiled, passes=[ALWAYS], sample=likely[:1])
    assert len(segments(fast)) == 1
    inputs = [likely, likely[:1], cells((0, 2), (1, 2), (2, 1), dtype=dtype)]
    for x in (*inputs, torch.stack([likely, likely], 2)[..., 0]):  # the last one lies otherwise
        check_same(fast, model, x)
    assert fast.stats["speculate-routes:first.scatter to second.scatter"].hits >= 1


def test_the_host_is_read_once_for_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(checks, "_MODE", "off")
    model = Layers().eval()
    fast = speculated(model, [cells((1, 2))])
    segments(fast)[0].is_early = False
    with torch.no_grad(), Reads() as reads:
        fast(cells((1, 2), (1, 2)))
    assert reads.count == 1


def test_only_the_likely_branches_run() -> None:
    model = Layers().eval()
    fast, ran = speculated(model, [cells((1, 2))]), []
    for layer in ("first", "second"):
        for p, branch in enumerate(getattr(fast, layer).branches):
            branch.register_forward_hook(lambda m, args, out, at=(layer, p): ran.append(at))
    with torch.no_grad():
        fast(cells((1, 2)))
        assert ran == [("first", 1), ("second", 2)]
        ran.clear()
        fast(cells((0, 2)))  # seen before a branch runs
    assert ran == [(layer, p) for layer in ("first", "second") for p in range(3)]


def test_segments_are_as_long_as_their_joint_probability_allows() -> None:
    model = Layers().eval()
    inside = [cells((1, 2))] * 8 + [cells((0, 2)), cells((1, 0))]
    both = speculated(model, inside, SpeculateRoutes(0.8, measure=False))
    assert [segment.guard.name for segment in segments(both)] == [
        "speculate-routes:first.scatter to second.scatter"
    ]
    each = speculated(model, inside, SpeculateRoutes(0.9, measure=False))
    assert [segment.guard.name for segment in segments(each)] == [
        "speculate-routes:first.scatter", "speculate-routes:second.scatter",
    ]  # fmt: skip
    none = speculated(model, inside, SpeculateRoutes(0.95, measure=False))
    assert not segments(none)
    assert "first.scatter: all cells took path 1 in 90.0% of the forwards" in reasons(none)
    for fast in (both, each, none):
        for x in inside[-3:]:
            check_same(fast, model, x)
    # A forward counts where all of its cells go the way, not some
    mixed = speculated(model, [cells((1, 2)), cells((1, 2), (0, 2))])
    assert [segment.guard.name for segment in segments(mixed)] == [
        "speculate-routes:second.scatter"
    ]


def test_keeps_what_gains_on_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inside = Layers().eval(), [cells((1, 2))] * 9 + [cells((0, 2))]
    times = [1.0, 0.9]

    def race(runs: Any, *args: Any, **options: Any) -> list[float]:
        assert [len(run()) for run in runs] == [1, 1]
        return times

    monkeypatch.setattr(speculate_routes, "race", race)
    fast = speculated(model, inside, SpeculateRoutes())
    assert not segments(fast)  # 0.9 + 0.1 * 1.0 gains less than 5 %
    assert "measured 1000.000 ms as it was, 900.000 ms on a hit" in reasons(fast)
    times[1] = 0.8
    assert len(segments(speculated(model, inside, SpeculateRoutes()))) == 1
    away = speculated(model, inside, SpeculateRoutes(), sample=cells((0, 0)))
    assert "no call of the sample goes the likely way" in reasons(away)


def test_gains_where_routers_are_many() -> None:
    model = conv_exits()
    for scatter in model.exits:
        scatter.protocol = BinaryThreshold(2.0)
    fast = speculated(model, [images(1)], SpeculateRoutes())
    assert len(segments(fast)) == 1, reasons(fast)


def test_results_share_no_memory_with_inputs() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter, self.gather = brt.ScatterRouter(TopK(1), 2), brt.GatherRouter()
            self.same = nn.Identity()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            (a, b), route = self.scatter(x, x[:, :2])
            out = self.gather([self.same(a), b * 2], route)
            return out.add_(1) + x, a

    model = Same().eval()
    model.scatter.protocol = protocols.MissHit()  # no weights: rows come back as they are
    x = cells((0, 0))
    fast = speculated(model, [x])
    assert len(segments(fast)) == 1
    check_same(fast, model, x)
    with torch.no_grad():
        fast(x)[1].add_(1)
    assert torch.equal(x, cells((0, 0)))
    assert fast.stats["speculate-routes:scatter"] == Count(2, 0)


def test_while_gradients_are_recorded_the_original_runs() -> None:
    model = conv_exits()
    for scatter in model.exits:
        scatter.protocol = BinaryThreshold(2.0)
    fast = speculated(model, [images(1)])
    check_gradients(fast, model)
    assert segments(fast)[0].guard.read() == Count()


def test_observers_see_every_route() -> None:
    model = Layers().eval()
    fast, seen = speculated(model, [cells((1, 2))]), []
    handle = fast.second.scatter.register_observer(lambda r, route, s: seen.append(route.num_cells))
    check_same(fast, model, cells((1, 2)))
    handle.remove()
    check_same(fast, model, cells((1, 2)))
    assert seen == [1]
    assert segments(fast)[0].guard.read() == Count(1, 0)


def test_errors_are_those_of_the_original() -> None:
    model = Layers().eval()
    fast = speculated(model, [cells((1, 2))])
    x = cells((1, 2))
    x[0, 4] = torch.nan
    with torch.no_grad(), pytest.raises(brt.BrtError) as wanted:
        model(x)
    with torch.no_grad(), pytest.raises(type(wanted.value)) as found:
        fast(x)
    assert str(found.value) == str(wanted.value)
    layer = Layer().eval()
    fast = speculated(layer, [(cells((1, 2)), cells((1, 2))[:, :3])])
    assert len(segments(fast)) == 1
    with torch.no_grad(), pytest.raises(brt.errors.RouteError, match="cells that the scores"):
        fast(cells((1, 2), (1, 2)), cells((1, 2))[:, :3])


@pytest.mark.slow
def test_compiled() -> None:
    model = Layers().eval()
    fast = speculated(model, [cells((1, 2))])
    compiled = torch.compile(fast, backend="aot_eager")
    for x in (cells((1, 2), (1, 2)), cells((0, 2), (1, 2))):
        check_same(compiled, model, x)
    assert segments(fast)[0].guard.read() == Count()


class Left(nn.Module):
    """One scatter, and what the pass leaves alone about it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.scatter = brt.ScatterRouter(TopK(1), 2, weighted=kind == "weighted")
        self.gather = brt.GatherRouter(weighted=kind != "weighted")

    def forward(self, x: Tensor) -> Any:
        (a, b), route = self.scatter(x, x[:, :2])
        if self.kind == "in place":
            a.add_(1)
        out = self.gather([a, b * 2], route)
        if self.kind == "a route":
            return out, route
        return out + route.load_P.sum() if self.kind == "a load" else out


@pytest.mark.parametrize(("kind", "why"), [
    ("weighted", "it changes rows on the way"), ("in place", "add_, before its cells are together"),
    ("a route", "output reads all its paths, or its route"), ("a load", "reads all its paths, or"),
])  # fmt: skip
def test_leaves_alone(kind: str, why: str) -> None:
    model = Left(kind).eval()
    profiled = brt.profile(model, [cells((0, 0))], progress=False)
    fast = brt.optimize(model, profiled, passes=[ALWAYS])
    assert not segments(fast)
    assert why in reasons(fast)


def test_refusals() -> None:
    model, x = Layers(), cells((1, 2))
    profiled = brt.profile(model.eval(), [x], progress=False)
    with pytest.warns(brt.PluginWarning, match="training mode"):
        brt.optimize(model.train(), profiled, passes=[ALWAYS], sample=x)
    model.eval().first.scatter.protocol = protocols.Random(1)
    profiled = brt.profile(model, [x], progress=False)
    with pytest.warns(brt.PluginWarning, match="random numbers"):
        brt.optimize(model, profiled, passes=[ALWAYS], sample=x)
    with pytest.raises(brt.PassError, match="needs a profile"):
        brt.optimize(model, passes=[ALWAYS], sample=x)
    with pytest.raises(brt.PassError, match="least_probability must be above 0"):
        SpeculateRoutes(least_probability=0.0)
