"""fold-permanent-paths: where every cell takes the same paths, rows need not be moved.

Legend: N cells, P paths, S trailing cell dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from brt.cells import Cells
from brt.errors import PassError
from brt.guard import Guard, Guarded
from brt.passes.base import Context, Lowering, Pass
from brt.passes.match import Scatter, argument, draws_random, module_of, router_of, scatters
from brt.passes.memory import fresh, may_share, owner, written_after
from brt.route import Route
from brt.routers import GatherRouter, ScatterRouter


@dataclass(frozen=True)
class FoldPermanentPaths(Pass):
    """Hand the rows themselves to paths that every cell took in the profile.

    Takes scatters each of whose paths got every cell or none, in every forward. The router decides
    as before; where that holds again its input is passed on, and the gather takes the results as
    they are. Other decisions are carried out as before, and counted.
    """

    name: ClassVar[str] = "fold-permanent-paths"
    after: ClassVar[tuple[str, ...]] = ("drop-dead-paths",)
    lowering: ClassVar[tuple[Lowering, ...]] = ("spill",)
    needs_profile: ClassVar[bool] = True

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A region without random numbers."""
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Put a permanent scatter and gather in the place of each that the profile shows fixed."""
        changed = False
        for scatter in scatters(graph.graph, ctx.scope):
            always_P = _always(scatter, ctx)
            if always_P is not None:
                _fold(graph, ctx, scatter, always_P)
                changed = True
        return changed


def _always(scatter: Scatter, ctx: Context) -> tuple[bool, ...] | None:
    """Which paths take every cell, where the others take none; None where that is not so."""
    profile = ctx.seen(scatter)
    if profile is None or scatter.guarded:
        return None
    always_P = tuple(bool(value) for value in profile.always_P)
    if not any(always_P) or not bool((profile.always_P | profile.never_P).all()):
        return None
    if scatter.router.result == "packed":
        ctx.leave(scatter.name, "its rows stay packed, which has no paths to fold")
        return None
    if type(scatter.router).forward is not ScatterRouter.forward:
        ctx.leave(scatter.name, f"{type(scatter.router).__name__} has a forward of its own")
        return None
    return always_P


def _fold(
    graph: fx.GraphModule, ctx: Context, scatter: Scatter, always_P: tuple[bool, ...]
) -> None:
    node, profile = scatter.node, ctx.seen(scatter)
    assert profile is not None
    paths = [p for p, always in enumerate(always_P) if always]
    words = f"path{'s' * (len(paths) > 1)} {', '.join(map(str, paths))}"
    guard = ctx.guard(scatter.name, f"every cell takes {words}, and no other")
    x = argument(node, 0, "x")
    flows = [
        one for one in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(one, fx.Node)
    ]
    written = written_after(node, flows, ctx.scope)
    copied = {}
    for p in paths:
        start = scatter.path_P[p]
        why = written if written or start is None else may_share(start, ctx.scope)
        if why is not None:
            copied[p] = why
    module = PermanentScatter(guard, ctx.scope, scatter.target, always_P, tuple(copied))
    node.target = ctx.insert(graph, module, "brt_permanent_scatter")
    ctx.note(
        f"{scatter.name}: all of {profile.cells} cells took {words} in {profile.num_forwards} "
        f"forwards; {len(paths) - len(copied)} of {len(paths)} get its input itself"
    )
    for p, why in copied.items():
        ctx.leave(f"path {p} of {scatter.name}", f"it gets a copy: {why}")
    for user in list(scatter.route.users if scatter.route is not None else ()):
        router = router_of(user, ctx.scope)
        if isinstance(router, GatherRouter) and module_of(user, ctx.scope) is router:
            _fold_gather(graph, ctx, scatter, user, always_P)


def _fold_gather(
    graph: fx.GraphModule,
    ctx: Context,
    scatter: Scatter,
    node: fx.Node,
    always_P: tuple[bool, ...],
) -> None:
    rows, where = argument(node, 0, "rows"), argument(node, 1, "where")
    router = router_of(node, ctx.scope)
    assert router is not None
    if type(router).forward is not GatherRouter.forward:
        ctx.leave(node.name, f"{type(router).__name__} has a forward of its own")
        return
    if where is not scatter.route or not isinstance(rows, (list, tuple)):
        ctx.leave(node.name, f"it does not gather the paths of {scatter.name} alone, in order")
        return
    kept = [rows[p] for p, always in enumerate(always_P) if always]
    lend = len(kept) == 1 and all(_only_here(one, node, ctx.scope) for one in _nodes(kept[0]))
    guard = Guard(f"{ctx.pass_name}:{ctx.path(str(node.target))}", "as its scatter's")
    module = PermanentGather(guard, ctx.scope, str(node.target), always_P, lend)
    node.target = ctx.insert(graph, module, "brt_permanent_gather")


def _nodes(rows: Any) -> list[Any]:
    return list(rows) if isinstance(rows, (list, tuple)) else [rows]


def _only_here(rows: Any, gather: fx.Node, scope: nn.Module) -> bool:
    """Whether the gather is the only one to read rows that lie in memory of their own."""
    if not isinstance(rows, fx.Node):
        return False
    while True:
        if len(rows.users) != 1:
            return False
        if fresh(rows, scope):
            return not isinstance(router_of(rows, scope), ScatterRouter)
        before = rows.all_input_nodes[0] if rows.all_input_nodes else rows
        if owner(rows, scope) is rows:
            return False
        rows = before


class PermanentScatter(Guarded):
    """A scatter whose paths are expected to get every cell or none; then it moves no rows."""

    def __init__(
        self,
        guard: Guard,
        scope: nn.Module,
        router_target: str,
        always_P: tuple[bool, ...],
        copied: tuple[int, ...] = (),
    ) -> None:
        super().__init__(guard, scope)
        self.router_target = router_target
        self.always_P = always_P
        self.copied = copied

    @property
    def router(self) -> ScatterRouter:
        """The scatter that decides."""
        return attrgetter(self.router_target)(self.scope)

    def forward(
        self, x: Tensor | tuple[Tensor, ...], scores: Tensor, cells: Cells | None = None
    ) -> tuple[Any, Route]:
        """What the scatter returns."""
        router = self.router
        if torch.compiler.is_compiling():
            return router(x, scores, cells)
        flows = (x,) if isinstance(x, Tensor) else tuple(x)
        route = router._decide(flows, scores, cells).with_sizes()
        held = as_expected(route, self.always_P)
        self.guard.count(held)
        if not held:
            return router._carry_out(x, scores, route)
        parts = [self._parts(router, i, flow, route) for i, flow in enumerate(flows)]
        router._observe(route, scores)
        if isinstance(x, Tensor):
            return parts[0], route
        return tuple(zip(*parts, strict=True)), route

    def _parts(
        self, router: ScatterRouter, index: int, flow: Tensor, route: Route
    ) -> tuple[Tensor, ...]:
        """One flow's rows for each path."""
        parts, start = [], 0
        for p, always in enumerate(self.always_P):
            part = flow[:, p] if router._is_per_path(index) else flow
            if not always:
                parts.append(part.narrow(0, 0, 0).contiguous())
                continue
            if route.weighted and route.weight_R is not None:
                part = _times(part, route.weight_R.narrow(0, start, route.num_cells))
                part = part.to(flow.dtype)
            elif p in self.copied or not part.is_contiguous():
                part = part.clone(memory_format=torch.contiguous_format)
            parts.append(part)
            start += route.num_cells
        return tuple(parts)

    def extra_repr(self) -> str:
        """The assumption, and the router that is asked."""
        return f"{super().extra_repr()}; decides by {self.router_target}"


class PermanentGather(Guarded):
    """The gather of a `PermanentScatter`: rows that are all there, in order, stay as they are."""

    def __init__(
        self,
        guard: Guard,
        scope: nn.Module,
        router_target: str,
        always_P: tuple[bool, ...],
        lend: bool,
    ) -> None:
        super().__init__(guard, scope)
        self.router_target = router_target
        self.always_P = always_P
        self.lend = lend
        """Whether the result may be the rows themselves: nobody else reads them."""

    @property
    def router(self) -> GatherRouter:
        """The gather."""
        return attrgetter(self.router_target)(self.scope)

    def forward(self, rows: Any, where: Any, residual: Any = None) -> Any:
        """What the gather returns."""
        router = self.router
        if torch.compiler.is_compiling():
            return router(rows, where, residual)
        held = as_expected(where, self.always_P)
        out = self._merged(router, rows, where, residual) if held and where.num_cells else None
        self.guard.count(out is not None or (held and not where.num_cells))
        return router(rows, where, residual) if out is None else out

    def _merged(self, router: GatherRouter, rows: Any, where: Any, residual: Any) -> Any:
        """The result without indexing; None where the router is to do it, or to complain."""
        weight_R = where.weight_R if router.weighted else None
        wants_residual = router.add_residual or router.overflow == "residual"
        twice = weight_R is not None and where.weighted
        if twice or (residual is not None) != wants_residual:
            return None
        several = isinstance(rows[0], tuple)
        flows = list(zip(*rows, strict=True)) if several else [tuple(rows)]
        residuals = residual if isinstance(residual, tuple) else (residual,) * len(flows)
        if len(residuals) != len(flows):
            return None
        outs = []
        for parts_P, extra in zip(flows, residuals, strict=True):
            if not self._alike(parts_P, where.num_cells):
                return None
            out = self._sum(parts_P, weight_R, where.num_cells)
            if extra is not None:
                if extra.shape != out.shape:
                    return None
                out = out + extra.to(out.dtype) if router.add_residual else out
            outs.append(out)
        result = tuple(outs) if several else outs[0]
        if router.result == "all":
            return result
        return result, Cells(where.cells.root, where.cells.index_R(outs[0].device))

    def _alike(self, parts_P: tuple[Tensor, ...], num_cells: int) -> bool:
        """Whether paths have the rows that they should, alike in all else."""
        first = parts_P[0]
        return all(
            isinstance(part, Tensor)
            and part.shape[0] == (num_cells if always else 0)
            and part.shape[1:] == first.shape[1:]
            and part.dtype == first.dtype
            and part.device == first.device
            for part, always in zip(parts_P, self.always_P, strict=True)
        )

    def _sum(self, parts_P: tuple[Tensor, ...], weight_R: Tensor | None, num_cells: int) -> Tensor:
        kept = [part for part, always in zip(parts_P, self.always_P, strict=True) if always]
        dtype = kept[0].dtype
        empty = [part for part in parts_P if part.shape[0] == 0 and part.requires_grad]
        if empty and torch.is_grad_enabled():
            # So that gradients of branches without rows are zeros, not None
            kept[0] = kept[0] + torch.cat(empty).sum().to(dtype)
        if weight_R is None and len(kept) == 1:
            return (
                kept[0].contiguous()
                if self.lend
                else kept[0].clone(memory_format=torch.contiguous_format)
            )
        total: Tensor | None = None
        for i, part in enumerate(kept):
            if weight_R is not None:
                part = _times(part, weight_R.narrow(0, i * num_cells, num_cells))
            part = part.to(_wide(dtype))
            total = part if total is None else total + part
        assert total is not None
        return total.to(dtype)

    def extra_repr(self) -> str:
        """The assumption, and the router that stands behind."""
        return f"{super().extra_repr()}; otherwise {self.router_target}"


def as_expected(route: Route, always_P: tuple[bool, ...]) -> bool:
    """Whether these paths got every cell, and the others none."""
    num_cells = route.num_cells
    return route.sizes == tuple(num_cells if always else 0 for always in always_P)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _times(rows_NS: Tensor, weight_N: Tensor) -> Tensor:
    """Rows times their weights, in the dtype in which operators multiply."""
    wide = _wide(rows_NS.dtype)
    return rows_NS.to(wide) * weight_N.to(wide).view(-1, *([1] * (rows_NS.ndim - 1)))
