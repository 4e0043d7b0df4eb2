"""batch-exits: behind an exit only the cells that stay are moved and computed.

Legend: N cells, P paths, F flows.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from brt.cells import Cells
from brt.errors import PassError
from brt.grouped import each
from brt.guard import Skip, Spill
from brt.passes.base import Context, Pass
from brt.passes.branch import Branch, Union
from brt.passes.match import (
    Chain,
    Scatter,
    argument,
    chains,
    draws_random,
    flows_read,
    item_of,
    module_of,
    router_of,
    scatters,
)
from brt.passes.memory import layout_is_free, may_share, written_after
from brt.passes.one_cell import is_one_cell, no_rows, one_cell_route, row_sum
from brt.passes.verify import training
from brt.route import Route
from brt.routers import GatherRouter, ScatterRouter

Reads = tuple[tuple[int, ...], ...]
"""For each path, the flows of which anything is read there."""


@dataclass(frozen=True)
class BatchExits(Pass):
    """Move only what is read behind an exit, nothing where all cells stay, and skip empty stages.

    An exit is a scatter whose paths are not gathered together again: their cells go on, and part
    again, by themselves. Of each path the flows that something reads are moved, by one index for
    the cells that take it; where all take it, its rows are the input itself. What lies behind a
    path, or behind a union of paths, does not run while it has no rows.
    """

    name: ClassVar[str] = "batch-exits"
    after: ClassVar[tuple[str, ...]] = (
        "fuse-conv-chains", "fuse-horizontal", "fuse-vertical", "defer-operations",
    )  # fmt: skip

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """An inference region without random numbers."""
        name = training(ctx.scope)
        if name is not None:
            raise PassError(
                f"{name} is in training mode, where every stage runs, also without rows, so that "
                "its gradients are zeros and not None; call model.eval() first"
            )
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Put an `ExitScatter` in the place of each exit, and what is behind it into skips."""
        exits = [found for found in scatters(graph.graph, ctx.scope) if _is_exit(found, ctx)]
        # Whose memory may be lent is read from the whole graph, before parts of it move
        made = [(found, _exit_scatter(found, ctx)) for found in exits]
        for found, module in made:
            found.node.target = ctx.insert(graph, module, "brt_exit")
        if exits:
            _merge(graph, ctx)
        num_skips = _skip(graph, ctx, exits) if exits else 0
        return bool(exits) or num_skips > 0


def _is_exit(scatter: Scatter, ctx: Context) -> bool:
    router = scatter.router
    if scatter.guarded or scatter.route is None or router.result == "packed":
        return False
    if any(user.target is not operator.getitem for user in scatter.route.users):
        return False  # a gather, or something else, takes all paths together
    if type(router).forward is not ScatterRouter.forward:
        ctx.leave(scatter.name, f"{type(router).__name__} has a forward of its own")
        return False
    if router.weighted or router.per_path:
        ctx.leave(scatter.name, "it changes rows on the way: they are weighted, or per path")
        return False
    return True


def _exit_scatter(scatter: Scatter, ctx: Context) -> ExitScatter:
    x = argument(scatter.node, 0, "x")
    flows = list(x) if isinstance(x, (tuple, list)) else [x]
    reads = flows_read(scatter)
    written = written_after(scatter.node, [f for f in flows if isinstance(f, fx.Node)], ctx.scope)
    lent = []
    for p, start in enumerate(scatter.path_P):
        if start is not None and written is None and may_share(start, ctx.scope) is None:
            lent.append(p)
    num_moved = sum(map(len, reads))
    ctx.note(
        f"{scatter.name}: {num_moved} of {len(flows) * len(reads)} flows of its paths are read and "
        f"moved; where all cells take path {', '.join(map(str, lent)) or 'x'}, "
        f"{'none is' if lent else 'all are copied'}"
    )
    return ExitScatter(ctx.scope, scatter.target, reads, tuple(lent), _free(scatter, reads, ctx))


def _free(scatter: Scatter, reads: Reads, ctx: Context) -> Reads:
    """For each path, the flows that may lie in memory as they lay before."""
    several = isinstance(argument(scatter.node, 0, "x"), (tuple, list))
    free: list[tuple[int, ...]] = []
    for start, flows in zip(scatter.path_P, reads, strict=True):
        items = {i: item_of(start, i) if several and start else start for i in flows}
        free.append(
            tuple(i for i, item in items.items() if item and layout_is_free(item, ctx.scope))
        )
    return tuple(free)


def _merge(graph: fx.GraphModule, ctx: Context) -> None:
    """Put an `ExitGather` in the place of each gather of paths of several exits."""
    made: list[tuple[fx.Node, ExitGather]] = []
    for node in graph.graph.nodes:
        router = module_of(node, ctx.scope)
        rows, where = argument(node, 0, "rows"), argument(node, 1, "where")
        if type(router) is not GatherRouter or router.add_residual or router.overflow != "drop":
            continue
        if not all(isinstance(given, (list, tuple)) for given in (rows, where)):
            continue
        parts = [part for part in rows if isinstance(part, fx.Node)]
        out = node if router.result == "all" else item_of(node, 0)
        if out is None or len(parts) < len(rows):
            continue
        is_lent = may_share(out, ctx.scope) is None
        is_lent = is_lent and written_after(node, parts, ctx.scope) is None
        is_free = layout_is_free(out, ctx.scope)
        made.append((node, ExitGather(ctx.scope, str(node.target), is_lent, is_free)))
    for node, module in made:
        node.target = ctx.insert(graph, module, "brt_exit_gather")


def _skip(graph: fx.GraphModule, ctx: Context, exits: list[Scatter]) -> int:
    """Let what lies behind exits and unions be skipped where it has no rows; returns how many."""
    chain_of: dict[fx.Node, Chain] = chains(graph.graph, ctx.scope)
    places: list[tuple[Scatter | Union, int, fx.Node]] = [
        (found, p, start)
        for found in exits
        for p, start in enumerate(found.path_P)
        if start is not None
    ]
    for node in graph.graph.nodes:
        router = router_of(node, ctx.scope)
        rows = item_of(node, 0)
        if isinstance(router, GatherRouter) and router.result == "union" and rows is not None:
            places.append((Union(node), 0, rows))
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    num_skips = 0
    # The last one first: what lies behind an earlier one takes it along
    for where, path, start in sorted(places, key=lambda place: order[place[2]], reverse=True):
        branch = Branch(ctx.scope, where, path, start, chain_of, {})
        if not any(_works(node, ctx.scope) for node in branch.inside):
            continue
        what = f"path {path} of {where.name}" if isinstance(where, Scatter) else where.node.name
        why_not = branch.unmovable()
        if why_not is not None:
            ctx.leave(what, why_not)
            continue
        node = branch.move(graph, ctx, Skip(ctx.scope, branch.graph()), "brt_skip")
        for new in (node, *(user for user in node.users if user.target is operator.getitem)):
            chain_of[new] = chain_of[start]
        num_skips += 1
    if num_skips:
        ctx.note(f"{num_skips} branches do not run while they have no rows")
    return num_skips


def _works(node: fx.Node, scope: nn.Module) -> bool:
    """Whether not running a node saves anything."""
    if node.target in (operator.getitem, each) or node.op == "get_attr":
        return False
    return not isinstance(module_of(node, scope), (Skip, Spill))


class ExitScatter(nn.Module):
    """A scatter that moves what is read of its paths, and nothing where all cells take one.

    ``forward(x, scores, cells)`` returns what the scatter returns, with None in the place of flows
    that nothing reads. While gradients are recorded, and under a compiler, the scatter runs.
    """

    def __init__(
        self,
        scope: nn.Module,
        router_target: str,
        reads: Reads,
        lent: tuple[int, ...],
        free: Reads,
    ) -> None:
        super().__init__()
        self._scope = (scope,)
        self.router_target = router_target
        self.reads = reads
        self.lent = lent
        self.free = free

    @property
    def router(self) -> ScatterRouter:
        """The scatter that decides."""
        return attrgetter(self.router_target)(self._scope[0])

    def forward(
        self, x: Tensor | tuple[Tensor, ...], scores: Tensor, cells: Cells | None = None
    ) -> tuple[Any, Route]:
        """Rows and scores -> (paths, route)."""
        router = self.router
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return router(x, scores, cells)
        flows = (x,) if isinstance(x, Tensor) else tuple(x)
        route = one_cell_route(router, flows, scores, cells)
        if route is None:
            route = router._decide(flows, scores, cells).with_sizes()
        assert route.sizes is not None
        paths, first = [], 0
        for p, size in enumerate(route.sizes):
            cell_R = route.cell_R.narrow(0, first, size)
            path: list[Tensor | None] = [None] * len(flows)
            for i in self.reads[p]:
                path[i] = self._rows(flows[i], p, i in self.free[p], cell_R)
            paths.append(path[0] if isinstance(x, Tensor) else tuple(path))
            first += size
        router._observe(route, scores)
        return tuple(paths), route

    def _rows(self, flow: Tensor, path: int, is_free: bool, cell_R: Tensor) -> Tensor:
        """The rows of a flow that take a path; as they lie now where that is free."""
        num_rows = cell_R.shape[0]
        if num_rows == 0:
            return flow.new_empty((0, *flow.shape[1:]))
        lies_well = flow.is_contiguous()
        if num_rows < flow.shape[0]:
            if lies_well or not is_free or flow.ndim != 4:
                return flow.index_select(0, cell_R)
            # Channels last stay so
            return flow.permute(0, 2, 3, 1).index_select(0, cell_R).permute(0, 3, 1, 2)
        # No cell takes a path twice, and a path has its cells in order: these are all
        if path in self.lent and (lies_well or is_free):
            return flow
        return flow.clone() if is_free else flow.clone(memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        """The router that decides, and what is read."""
        return f"decides by {self.router_target}; moves flows {self.reads}"


class ExitGather(nn.Module):
    """A gather of paths of several exits; of a single cell it sums what there is of it.

    ``forward(rows, where)`` returns what the gather returns. Several cells, and all cells while
    gradients are recorded or under a compiler, are gathered as before.
    """

    def __init__(self, scope: nn.Module, router_target: str, is_lent: bool, is_free: bool) -> None:
        super().__init__()
        self._scope = (scope,)
        self.router_target = router_target
        self.is_lent = is_lent
        self.is_free = is_free

    @property
    def router(self) -> GatherRouter:
        """The gather."""
        return attrgetter(self.router_target)(self._scope[0])

    def forward(self, rows: Sequence[Any], where: Sequence[Cells], residual: Any = None) -> Any:
        """Rows and where they belong -> cells, or (cells' rows, `Cells`) with result "union"."""
        router = self.router
        is_plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        if not is_plain or residual is not None or not is_one_cell(rows, where, router):
            return router(rows, where, *(() if residual is None else (residual,)))
        there = [(r, c) for r, c in zip(rows, where, strict=True) if r.shape[0]]
        if not there:
            return no_rows(rows[0], where[0], router)
        out = row_sum(there, router.weighted, may_lend=self.is_lent)
        if not self.is_free:
            out = out.contiguous()
        if router.result == "all":
            return out
        return out, Cells(where[0].root, there[0][1].index_R(out.device))

    def extra_repr(self) -> str:
        """The gather behind it."""
        return f"several cells: {self.router_target}"
