"""drop-dead-paths: a branch that the profile never saw used costs nothing while it is not."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from brt.errors import PassError
from brt.grouped import each
from brt.guard import Guarded, Spill
from brt.passes.base import Context, Lowering, Pass
from brt.passes.branch import Branch
from brt.passes.match import Chain, Scatter, chains, draws_random, module_of, scatters
from brt.passes.verify import cloned, training, without_traces


@dataclass(frozen=True)
class DropDeadPaths(Pass):
    """Skip branches that no cell took in the profile, until one does.

    The branch moves into a `brt.guard.Spill`. While its path has no rows, an empty tensor takes
    the place of its result; rows that come all the same go through it as before, and are counted.
    The check is of a size that the host has anyway.
    """

    name: ClassVar[str] = "drop-dead-paths"
    lowering: ClassVar[tuple[Lowering, ...]] = ("spill",)
    needs_profile: ClassVar[bool] = True

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """An inference region without random numbers."""
        name = training(ctx.scope)
        if name is not None:
            raise PassError(
                f"{name} is in training mode, where every branch runs, also without rows, so that "
                "its gradients are zeros and not None; call model.eval() first"
            )
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Move the branches of dead paths into spills."""
        chain_of, nothing = chains(graph.graph, ctx.scope), _without_rows(graph, ctx)
        moved: set[fx.Node] = set()
        # Outer scatters first: their branches take inner scatters along
        for scatter in scatters(graph.graph, ctx.scope):
            for path in _dead(scatter, ctx):
                if scatter.node not in moved:
                    moved.update(_drop(graph, ctx, scatter, path, chain_of, nothing))
        return bool(moved)


def _dead(scatter: Scatter, ctx: Context) -> list[int]:
    profile = ctx.seen(scatter)
    if profile is None or scatter.router.result == "packed":
        return []
    return [p for p in range(scatter.router.num_paths) if bool(profile.never_P[p])]


def _without_rows(graph: fx.GraphModule, ctx: Context) -> dict[fx.Node, bool]:
    """For each node that ran on the sample, whether its result had no elements."""
    run = _Recorder(graph)
    with without_traces(ctx.scope):
        for call in ctx.sample[:1]:
            bound = inspect.signature(graph.forward).bind(*call.args, **call.kwargs)
            bound.apply_defaults()
            run.run(*cloned(bound.args), *cloned(tuple(bound.kwargs.values())))
    return run.nothing


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.nothing: dict[fx.Node, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        leaves = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        self.nothing[n] = all(t.numel() == 0 for t in leaves)
        return value


def _drop(
    graph: fx.GraphModule,
    ctx: Context,
    scatter: Scatter,
    path: int,
    chain_of: dict[fx.Node, Chain],
    nothing: dict[fx.Node, bool],
) -> Iterable[fx.Node]:
    """Move one branch, where there is one that can move; returns the nodes that are gone."""
    what = f"path {path} of {scatter.name}"
    start = scatter.path_P[path]
    if start is None:
        ctx.leave(what, "nothing reads its rows")
        return ()
    known = nothing if nothing.get(start) else {}
    branch = Branch(ctx.scope, scatter, path, start, chain_of, known)
    if not any(_works(node, ctx.scope) for node in branch.inside):
        if not any(isinstance(module_of(n, ctx.scope), Guarded) for n in branch.inside):
            skipped = any(user.target is each for user in start.users)
            why = "brt.each runs its branch only where it has rows"
            ctx.leave(what, why if skipped else "it does no work of its own")
        return ()
    why_not = branch.unmovable()
    if why_not is not None:
        ctx.leave(what, why_not)
        return ()
    guard = ctx.guard(f"{scatter.name}[{path}]", "no cell takes this path")
    node = branch.move(graph, ctx, Spill(guard, ctx.scope, branch.graph()), "brt_spill")
    chain_of[node] = chain_of[start]
    profile = ctx.seen(scatter)
    assert profile is not None
    ctx.note(
        f"{what}: no cell of {profile.cells} took it in {profile.num_forwards} forwards; its "
        f"{len(branch.inside)} nodes moved into {node.target}"
    )
    return branch.inside


def _works(node: fx.Node, scope: nn.Module) -> bool:
    """Whether skipping a node saves anything."""
    if node.target is operator.getitem or node.op == "get_attr":
        return False
    return not isinstance(module_of(node, scope), Guarded)
