"""fold-constants: what depends on no input is made once, and what is decided is not routed.

Legend: P paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from brt import protocols
from brt.errors import PassError
from brt.guard import Skip
from brt.passes.base import Context, Pass
from brt.passes.branch import Branch
from brt.passes.constants import KeptTensor, constant
from brt.passes.fixed import bounds_of, fixed_paths
from brt.passes.fixed_routers import ConstantScatter, FixedGather, FixedScatter
from brt.passes.match import Scatter as Found
from brt.passes.match import (
    argument,
    chains,
    draws_random,
    module_of,
    router_of,
    scatters,
    writes,
)
from brt.passes.unmoved import copies, may_lend
from brt.routers import GatherRouter, ScatterRouter

# What decides by its scores alone
_PLAIN = (
    protocols.TopK, protocols.Threshold, protocols.ResidualThreshold, protocols.BinaryThreshold,
    protocols.Switch, protocols.CapacityTopK, protocols.ExpertChoice,
)  # fmt: skip


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Carry out decisions that are proved to be fixed without routing, and keep constants.

    Takes scatters whose scores are made of parameters and sizes alone, and those whose protocol
    leaves no choice: all paths for each cell, or a threshold on one side of all scores. Whatever
    else is made of parameters alone is made once, until one of these changes.
    """

    name: ClassVar[str] = "fold-constants"
    after: ClassVar[tuple[str, ...]] = (
        "fuse-conv-chains", "fuse-horizontal", "fuse-vertical", "defer-operations",
        "drop-dead-paths",
    )  # fmt: skip

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A region without random numbers."""
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Fold scatters with their gathers, then what remains of constants."""
        changed = False
        for scatter in scatters(graph.graph, ctx.scope):
            changed |= _fold(graph, ctx, scatter)
        if changed:
            _drop_unread(graph, ctx)
        return _keep_constants(graph, ctx) or changed


def _fold(graph: fx.GraphModule, ctx: Context, scatter: Found) -> bool:
    """Fold one scatter with its gathers, where its decision is fixed; returns whether it is."""
    scores, router = argument(scatter.node, 1, "scores"), scatter.router
    if scatter.guarded or not isinstance(scores, fx.Node):
        return False
    made_of = constant(scores, ctx.scope) if type(router.protocol) in _PLAIN else None
    bounds = bounds_of(scores, ctx.scope)
    always_P = fixed_paths(router.protocol, router.num_paths, bounds)
    if made_of is None and always_P is None:
        return False
    why_not = _unfoldable(scatter)
    if why_not is None and always_P is None:
        why_not = _hands_on(scatter, ctx.scope)
    if why_not is not None:
        ctx.leave(scatter.name, why_not)
        return False
    copied = tuple(copies(scatter, range(router.num_paths), ctx.scope))
    if always_P is not None:
        fixed = FixedScatter(ctx.scope, scatter.target, bounds, copied)
        scatter.node.target = ctx.insert(graph, fixed, "brt_fixed_scatter")
        words = ", ".join(str(p) for p, always in enumerate(always_P) if always) or "none"
        ctx.note(f"{scatter.name}: {router.protocol} always gives every cell these paths: {words}")
    else:
        assert made_of is not None
        kept = ConstantScatter(ctx.scope, scatter.target, made_of, copied)
        scatter.node.target = ctx.insert(graph, kept, "brt_constant_scatter")
        scatter.node.args = (argument(scatter.node, 0, "x"), *made_of.sizes)
        scatter.node.kwargs = {}
        ctx.note(f"{scatter.name}: its scores depend on no input; their route is kept")
    _fold_gathers(graph, ctx, scatter)
    if always_P is not None:
        _skip(graph, ctx, scatter, always_P)
    return True


def _unfoldable(scatter: Found) -> str | None:
    """Why a fixed decision is carried out as before."""
    router = scatter.router
    if router.result == "packed":
        return "its rows stay packed, which has no paths to fold"
    if type(router).forward is not ScatterRouter.forward:
        return f"{type(router).__name__} has a forward of its own"
    if router.inherit_weights:
        return "it inherits weights"
    return None


def _hands_on(scatter: Found, scope: nn.Module) -> str | None:
    """Why a route may not be kept: others could write to it, or the cells are not all."""
    if argument(scatter.node, 2, "cells") is not None:
        return "it is told which cells its rows are, and these change"
    for user in scatter.route.users if scatter.route is not None else ():
        router = router_of(user, scope)
        if not isinstance(router, GatherRouter) or router.result != "all":
            return f"{user.name} reads its route, which is kept between calls"
    return None


def _fold_gathers(graph: fx.GraphModule, ctx: Context, scatter: Found) -> None:
    for node in list(scatter.route.users if scatter.route is not None else ()):
        router = module_of(node, ctx.scope)
        rows = argument(node, 0, "rows")
        if not isinstance(router, GatherRouter) or not isinstance(rows, (list, tuple)):
            continue
        if argument(node, 1, "where") is not scatter.route:
            continue
        if type(router).forward is not GatherRouter.forward:
            ctx.leave(node.name, f"{type(router).__name__} has a forward of its own")
            continue
        lent = tuple(may_lend(one, ctx.scope) for one in rows)
        module = FixedGather(ctx.scope, str(node.target), lent)
        node.target = ctx.insert(graph, module, "brt_fixed_gather")


def _skip(graph: fx.GraphModule, ctx: Context, scatter: Found, always_P: tuple[bool, ...]) -> None:
    """Let branches that no cell can take be skipped."""
    for p, start in enumerate(scatter.path_P):
        if always_P[p] or start is None:
            continue
        branch = Branch(ctx.scope, scatter, p, start, chains(graph.graph, ctx.scope), {})
        if not any(node.op == "call_module" for node in branch.inside):
            continue
        why_not = branch.unmovable()
        if why_not is not None:
            ctx.leave(f"path {p} of {scatter.name}", why_not)
            continue
        node = branch.move(graph, ctx, Skip(ctx.scope, branch.graph()), "brt_skip")
        ctx.note(f"path {p} of {scatter.name}: {node.target} does not run: no cell can take it")


def _keep_constants(graph: fx.GraphModule, ctx: Context) -> bool:
    """Put a `KeptTensor` in the place of each tensor that is computed from parameters alone."""
    depends: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    num_kept = 0
    # The last ones first: what they are made of goes with them
    for node in reversed(list(graph.graph.nodes)):
        if node in depends or not node.users or node.op in ("get_attr", "output"):
            continue
        made_of = constant(node, ctx.scope)
        if made_of is None or made_of.sizes or not made_of.works:
            continue
        module = KeptTensor(ctx.scope, made_of)
        with torch.no_grad():
            if not isinstance(module.value(), Tensor):
                continue
        target = ctx.insert(graph, module, "brt_constant")
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.call_module(target))
        graph.graph.erase_node(node)
        _drop_unread(graph, ctx)
        num_kept += 1
    if num_kept:
        ctx.note(f"tensors that depend on no input, and are kept: {num_kept}")
    return num_kept > 0


def _drop_unread(graph: fx.GraphModule, ctx: Context) -> None:
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or writes(node, ctx.scope))
