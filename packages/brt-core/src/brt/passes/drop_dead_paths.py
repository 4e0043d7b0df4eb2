"""drop-dead-paths: a branch that the profile never saw used costs nothing while it is not."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from brt.errors import PassError
from brt.guard import Guarded, Spill
from brt.passes.base import Context, Lowering, Pass
from brt.passes.match import (
    Scatter,
    argument,
    chains,
    draws_random,
    module_of,
    router_of,
    scatters,
    writes,
)
from brt.passes.verify import cloned, training, without_traces
from brt.routers import GatherRouter, ScatterRouter

_REDUCTIONS = (
    "sum", "mean", "prod", "max", "min", "amax", "amin", "var", "std", "norm", "any", "all",
    "logsumexp", "argmax", "argmin", "median",
)  # fmt: skip


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
        moved = 0
        nothing = _without_rows(graph, ctx)
        # Branches of outer scatters take those inside along: look again after each
        seen: set[tuple[str, int, int]] = set()
        while True:
            dead = [
                (scatter, path)
                for scatter in scatters(graph.graph, ctx.scope)
                for path in _dead(scatter, ctx)
                if (scatter.target, scatter.call, path) not in seen
            ]
            if not dead:
                return moved > 0
            scatter, path = dead[0]
            seen.add((scatter.target, scatter.call, path))
            moved += _drop(graph, ctx, scatter, path, nothing)


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
    nothing: dict[fx.Node, bool],
) -> bool:
    what = f"path {path} of {scatter.name}"
    start = scatter.path_P[path]
    if start is None:
        ctx.leave(what, "nothing reads its rows")
        return False
    known = nothing if nothing.get(start) else {}
    branch = _Branch(graph.graph, ctx.scope, scatter, path, start, known)
    if not any(_works(node, ctx.scope) for node in branch.inside):
        if not any(isinstance(module_of(n, ctx.scope), Guarded) for n in branch.inside):
            ctx.leave(what, "it does no work of its own")
        return False
    why_not = branch.unmovable()
    if why_not is not None:
        ctx.leave(what, why_not)
        return False
    where = f"{scatter.name}[{path}]"
    guard = ctx.guard(where, "no cell takes this path")
    node = branch.move(graph, ctx, Spill(guard, ctx.scope, branch.graph()))
    profile = ctx.seen(scatter)
    assert profile is not None
    ctx.note(
        f"{what}: no cell of {profile.cells} took it in {profile.num_forwards} forwards; its "
        f"{len(branch.inside)} nodes moved into {node.target}"
    )
    return True


def _works(node: fx.Node, scope: nn.Module) -> bool:
    """Whether skipping a node saves anything."""
    if node.target is operator.getitem or node.op == "get_attr":
        return False
    return not isinstance(module_of(node, scope), Guarded)


class _Branch:
    """The nodes that work on the rows of one path, and on no others.

    A node is ``inside`` if what it takes comes from the path's rows or from before the scatter, and
    without rows its result is empty, as far as the sample (``nothing``) or its name tells; what is
    wrong about that costs time only. What reads the branch and is not inside is ``behind`` it.
    """

    def __init__(
        self,
        graph: fx.Graph,
        scope: nn.Module,
        scatter: Scatter,
        path: int,
        start: fx.Node,
        nothing: dict[fx.Node, bool],
    ) -> None:
        self.scope = scope
        self.starts = {start}
        if isinstance(argument(scatter.node, 0, "x"), (tuple, list)):
            self.starts |= {n for n in start.users if n.target is operator.getitem}
        self.inside: dict[fx.Node, None] = {}
        self.behind: dict[fx.Node, None] = {}
        self._place = {node: i for i, node in enumerate(graph.nodes)}
        self._nothing = nothing
        chain_of = chains(graph, scope)
        for node in graph.nodes:
            taken = node.all_input_nodes
            if node in self.starts or not any(self._of_branch(n) for n in taken):
                continue
            own = (scatter.node, path) in chain_of[node] and not any(
                n in self.behind for n in taken
            )
            if own and self._stays_empty(node):
                self.inside[node] = None
            else:
                self.behind[node] = None

    def _of_branch(self, node: fx.Node) -> bool:
        return node in self.starts or node in self.inside or node in self.behind

    def _stays_empty(self, node: fx.Node) -> bool:
        """Whether a node gives nothing where the path has no rows."""
        router = router_of(node, self.scope)
        if isinstance(router, ScatterRouter) or _is_route(node, self.scope):
            return True
        if isinstance(router, GatherRouter):
            where = argument(node, 1, "where")
            if not isinstance(where, fx.Node) or where not in self.inside:
                return False
        elif node.target is not operator.getitem and any(
            _is_route(n, self.scope) for n in node.all_input_nodes
        ):
            return False
        if writes(node, self.scope) and not self._writes_own(node):
            return False
        if node.op in ("call_function", "call_method"):
            name = str(getattr(node.target, "__name__", node.target))
            return self._nothing.get(node, name not in _REDUCTIONS)
        return self._nothing.get(node, True)

    def inputs(self) -> list[fx.Node]:
        """What the branch takes from outside; rows of the path first."""
        taken = [n for node in self.inside for n in node.all_input_nodes if n not in self.inside]
        rows = [n for n in taken if n in self.starts]
        return list(dict.fromkeys([*rows, *taken]))

    def outputs(self) -> list[fx.Node]:
        """What of the branch is read outside."""
        return [n for n in self.inside if any(user not in self.inside for user in n.users)]

    def unmovable(self) -> str | None:
        """Why the branch must stay where it is; None where it can move."""
        outputs = self.outputs()
        for node in outputs:
            if isinstance(router_of(node, self.scope), ScatterRouter) or _is_route(
                node, self.scope
            ):
                return f"the route of {node.name} is read outside the branch"
        last = max(self._place[n] for n in self.inside)
        first = min(self._place[n] for n in self.inside)
        for node in self._place:
            if not first < self._place[node] < last or not writes(node, self.scope):
                continue
            if node not in self.inside:
                return f"{node.name} writes in place between its nodes"
            if any(self._place[n] < last for n in self.behind):
                return f"{node.name} writes in place, and others read the branch before its end"
        return None

    def _writes_own(self, node: fx.Node) -> bool:
        target = node.args[0] if node.args else None
        return isinstance(target, fx.Node) and (target in self.inside or target in self.starts)

    def graph(self) -> fx.Graph:
        """The branch alone."""
        alone = fx.Graph()
        copied = {node: alone.placeholder(node.name) for node in self.inputs()}
        for node in self.inside:
            copied[node] = alone.node_copy(node, copied.__getitem__)
        outputs = [copied[node] for node in self.outputs()]
        alone.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        return alone

    def move(self, graph: fx.GraphModule, ctx: Context, spill: Spill) -> fx.Node:
        """Put one call of the spill in the place of the branch."""
        inputs, outputs = self.inputs(), self.outputs()
        last = max(self.inside, key=self._place.__getitem__)
        target = ctx.insert(graph, spill, "brt_spill")
        with graph.graph.inserting_after(last):
            made = graph.graph.call_module(target, tuple(inputs))
        after, results = made, [made]
        if len(outputs) > 1:
            results = []
            for i in range(len(outputs)):
                with graph.graph.inserting_after(after):
                    after = graph.graph.call_function(operator.getitem, (made, i))
                results.append(after)
        for node in self.behind:
            if self._place[node] < self._place[last]:
                after.append(node)
                after = node
        for old, new in zip(outputs, results, strict=True):
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.inside)
        for node in reversed(self.inside):
            graph.graph.erase_node(node)
        return made


def _is_route(node: fx.Node, scope: nn.Module) -> bool:
    """Whether a node is the route of a scatter."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return False
    return isinstance(router_of(node.args[0], scope), ScatterRouter)  # type: ignore[arg-type]
