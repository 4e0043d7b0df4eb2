"""fold-permanent-paths: where every cell takes the same paths, rows need not be moved.

Legend: P paths.
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
from brt.passes.unmoved import copies, may_lend, unmoved_cells, unmoved_paths
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
    after: ClassVar[tuple[str, ...]] = ("drop-dead-paths", "fold-constants")
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
    copied = copies(scatter, paths, ctx.scope)
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
    lend = len(kept) == 1 and may_lend(kept[0], ctx.scope)
    guard = Guard(f"{ctx.pass_name}:{ctx.path(str(node.target))}", "as its scatter's")
    module = PermanentGather(guard, ctx.scope, str(node.target), always_P, lend)
    node.target = ctx.insert(graph, module, "brt_permanent_gather")


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
        paths = unmoved_paths(router, x, route, self.always_P, self.copied)
        router._observe(route, scores)
        return paths, route

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
        out = None
        if held and where.num_cells:
            out = unmoved_cells(router, rows, where, residual, self.always_P, self.lend)
        self.guard.count(out is not None or (held and not where.num_cells))
        return router(rows, where, residual) if out is None else out

    def extra_repr(self) -> str:
        """The assumption, and the router that stands behind."""
        return f"{super().extra_repr()}; otherwise {self.router_target}"


def as_expected(route: Route, always_P: tuple[bool, ...]) -> bool:
    """Whether these paths got every cell, and the others none."""
    num_cells = route.num_cells
    return route.sizes == tuple(num_cells if always else 0 for always in always_P)
