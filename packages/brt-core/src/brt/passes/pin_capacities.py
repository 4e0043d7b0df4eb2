"""pin-capacities: each path has a static number of rows, taken from the profile; none is dropped.

Legend: N cells, P paths, R packed rows, S trailing dims of a cell, C rows that a path is pinned to,
T pinned rows (sum of C).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from brt.cellflow import cellflow
from brt.errors import PassError
from brt.guard import Guard, Guarded, compiled
from brt.passes.base import Context, Lowering, Pass
from brt.passes.fusion import (
    FusedBranches,
    NotFusableError,
    Reader,
    branches_of,
    pack,
    require_plain,
)
from brt.passes.match import Scatter, draws_random, scatters, writes
from brt.pinning import Pinning
from brt.route import Route
from brt.routers import ScatterRouter

_MOST_CHOICES = 8


@dataclass(frozen=True)
class PinCapacities(Pass):
    """Give each path as many rows as the profile saw it take, whatever its load.

    Every branch then runs on tensors of one shape, so that it can be compiled for it, or captured.
    A path with fewer rows runs on copies of some, whose results nobody reads; rows beyond its
    capacity go through the generic branch, and are counted. Nothing is dropped.

    Args:
        percentile: of a path's rows over the profile's forwards: 100 is the most that was seen.
    """

    percentile: float = 100.0

    name: ClassVar[str] = "pin-capacities"
    after: ClassVar[tuple[str, ...]] = ("fuse-conv-chains", "fuse-horizontal")
    lowering: ClassVar[tuple[Lowering, ...]] = ("spill",)
    needs_profile: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise PassError(
                f"pin-capacities: percentile must be from 0 to 100, got {self.percentile}"
            )

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A region without random numbers, with a sample to know its shapes by."""
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")
        if not any(not (call.args and call.kwargs) for call in ctx.sample[:1]):
            raise PassError(
                "a sample must tell whether branches keep rows apart: brt.optimize(..., sample=x)"
            )

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Pin the paths of each scatter that has a profile."""
        changed = False
        for scatter in scatters(graph.graph, ctx.scope):
            try:
                _pin(graph, ctx, scatter, self.percentile)
            except NotFusableError as error:
                ctx.leave(scatter.name, str(error))
                continue
            changed = True
        return changed


class _Branches(Reader):
    """Keeps the branches as graphs of their own: rows in, result out."""

    def __init__(self, region: fx.Graph) -> None:
        self._region = region
        self.graphs: list[fx.Graph] = []

    def read(
        self, graph: fx.GraphModule, entry: fx.Node, nodes: list[fx.Node], result: fx.Node
    ) -> None:
        """One branch."""
        if entry.graph is not self._region:
            raise NotFusableError("it is run by brt.each")
        made = fx.Graph()
        copied = {entry: made.placeholder("rows")}
        for node in nodes:
            copied[node] = made.node_copy(node, copied.__getitem__)
        made.output(copied[result])
        self.graphs.append(made)

    def module(self) -> FusedBranches:
        """There is none: branches stay branches."""
        raise AssertionError("branches are pinned, not fused")


def _pin(graph: fx.GraphModule, ctx: Context, scatter: Scatter, percentile: float) -> None:
    require_plain(scatter, _MOST_CHOICES)
    seen = ctx.seen(scatter)
    if seen is None or not seen.num_forwards:
        raise NotFusableError("the profile has not seen it")
    reader = _Branches(graph.graph)
    gather, inside = branches_of(graph, ctx, scatter, reader)
    _require_apart(graph, ctx, inside)
    capacity_P = [math.ceil(rows) for rows in seen.rows.percentile_P(percentile).tolist()]
    if not any(capacity_P):
        raise NotFusableError("the profile saw no rows on any path")
    guard = ctx.guard(scatter.name, f"no path has more rows than {capacity_P}")
    pinned = PinnedScatter(ctx.scope, scatter.target, pack(scatter), capacity_P)
    merged = PinnedGather(guard, ctx.scope, reader.graphs, capacity_P)
    _rewrite(graph, ctx, scatter, gather, pinned, merged)
    ctx.note(
        f"{scatter.name}: paths have {capacity_P} rows, percentile {percentile:g} of "
        f"{seen.num_forwards} forwards; more of them spill"
    )


def _require_apart(graph: fx.GraphModule, ctx: Context, inside: set[fx.Node]) -> None:
    call = ctx.sample[0]
    batch = dict(call.kwargs) if call.kwargs else call.args
    try:
        flows = cellflow(graph, batch)
    except Exception as error:  # what earlier passes put into the graph may not run without data
        raise NotFusableError(
            f"whether its branches keep rows apart cannot be told: {type(error).__name__}"
        ) from error
    for node in graph.graph.nodes:
        if node not in inside:
            continue
        if flows[node].kind != "keeps":
            raise NotFusableError(f"{node.name} does not keep rows apart: {flows[node].reason}")
        if writes(node, ctx.scope):
            raise NotFusableError(f"{node.name} writes in place")


def _rewrite(
    graph: fx.GraphModule,
    ctx: Context,
    scatter: Scatter,
    gather: fx.Node,
    pinned: PinnedScatter,
    merged: PinnedGather,
) -> None:
    """Put the pinned scatter in place of the scatter, and the merge before the gather."""
    assert scatter.route is not None
    scatter_name = ctx.insert(graph, pinned, "pinned_scatter")
    merged_name = ctx.insert(graph, merged, "pinned_gather")
    with graph.graph.inserting_before(scatter.node):
        node = graph.graph.call_module(scatter_name, scatter.node.args, scatter.node.kwargs)
        packed = graph.graph.call_function(operator.getitem, (node, 2))
    scatter.node.replace_all_uses_with(node)
    graph.graph.erase_node(scatter.node)
    results = gather.args[0] if gather.args else gather.kwargs["rows"]
    with graph.graph.inserting_before(gather):
        merged_node = graph.graph.call_module(merged_name, (results, scatter.route, packed))
    if gather.args:
        gather.args = (merged_node, *gather.args[1:])
    else:
        gather.kwargs = {**gather.kwargs, "rows": merged_node}


class PinnedScatter(nn.Module):
    """A scatter whose path p has ``capacity_P[p]`` rows: ``(paths, route, packed rows)``."""

    def __init__(
        self,
        scope: nn.Module,
        router_target: str,
        packed: ScatterRouter,
        capacity_P: Sequence[int],
    ) -> None:
        super().__init__()
        self._scope = (scope,)
        self.router_target = router_target
        self.packed = packed
        self.pinning = Pinning(capacity_P)

    @property
    def router(self) -> ScatterRouter:
        """The router that decides."""
        return attrgetter(self.router_target)(self._scope[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the scatter is given; the paths' rows, the route, and all rows packed."""
        rows_RS, route = self.packed(*args, **kwargs)
        return self.pinning.take(rows_RS, route.offsets_P1), route, rows_RS


class PinnedGather(Guarded):
    """Results of pinned paths, and of the rows that were too many, in the order of packed rows."""

    def __init__(
        self, guard: Guard, scope: nn.Module, branches: list[fx.Graph], capacity_P: Sequence[int]
    ) -> None:
        super().__init__(guard, scope)
        self.calls = frozenset(
            str(n.target) for one in branches for n in one.nodes if n.op == "call_module"
        )
        self.pinning = Pinning(capacity_P)
        self._run_P = tuple(compiled(one) for one in branches)

    def forward(self, results_P: Sequence[Tensor], route: Route, rows_RS: Tensor) -> Tensor:
        """``results_P[p]`` are of path p's pinned rows; returns results of ``rows_RS``."""
        if torch.compiler.is_compiling():
            return self._unpinned(route, rows_RS)
        offsets_P1 = route.offsets_P1
        out_RS = self.pinning.put(results_P, offsets_P1, rows_RS.shape[0])
        begin = offsets_P1.tolist()  # the one look at the loads: what spills needs the host
        spans = [
            (p, begin[p] + capacity, begin[p + 1])
            for p, capacity in enumerate(self.pinning.capacity_P)
            if begin[p + 1] - begin[p] > capacity
        ]
        self.guard.count(not spans)
        if not spans:
            return out_RS
        parts = [self._run_P[p](self.scope, rows_RS[first:last]) for p, first, last in spans]
        index_R = torch.cat([torch.arange(first, last) for _, first, last in spans])
        return out_RS.index_copy(0, index_R.to(out_RS.device), torch.cat(parts))

    def _unpinned(self, route: Route, rows_RS: Tensor) -> Tensor:
        """The same without places: a graph has no way to look at loads and choose."""
        sizes = route.with_sizes().sizes
        assert sizes is not None
        total = sum(sizes)
        rows_P = rows_RS.narrow(0, 0, total).split(sizes)
        parts = [run(self.scope, rows) for run, rows in zip(self._run_P, rows_P, strict=True)]
        unused = parts[0].new_zeros(rows_RS.shape[0] - total, *parts[0].shape[1:])
        return torch.cat([*parts, unused])

    def extra_repr(self) -> str:
        """The assumption."""
        return f"{super().extra_repr()}; rows of paths: {list(self.pinning.capacity_P)}"
