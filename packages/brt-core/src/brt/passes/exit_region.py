"""What is known of a region with exits before it is captured: paths, gathers and their rows."""

from __future__ import annotations

import copy
import operator
from typing import Any, Self

from torch import Tensor, fx, nn

from brt.errors import PassError
from brt.passes.match import Chain, argument, chains, module_of, router_of, scatters, writes
from brt.passes.memory import fresh, owner
from brt.routers import EarlyExit, GatherRouter, LoopRouter, ScatterRouter
from brt.routers.scatter import _widened


class CannotCaptureError(Exception):
    """What runs cannot be one graph, for reasons that only running it shows."""


class ExitRegion:
    """What is known of the graph of a region with exits.

    Raises `PassError` for a region that is not of this form: scatters of two paths of which a cell
    takes one, and gathers of all cells.
    """

    def __init__(self, graph: fx.Graph, scope: nn.Module) -> None:
        self._scope = (scope,)
        self._graph = graph
        self._chain_of = chains(graph, scope)
        _check(graph, scope, self._chain_of)
        self._needed = _needed(graph, scope)
        self._gather_of: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if isinstance(router_of(node, scope), GatherRouter):
                for row in argument(node, 0, "rows"):
                    self._gather_of.setdefault(row, []).append(node)
        self.num_levels = max(map(len, self._chain_of.values()), default=0)
        """How deep bodies of conditional nodes are nested: each is captured on a stream."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        # Not read anew: while a model is copied, it is not whole yet
        twin._scope = (copy.deepcopy(self._scope[0], memo),)
        return twin


def value_of(node: fx.Node, scope: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a node gives for these arguments."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(scope)
    if node.op == "call_module":
        return scope.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def choice_of(node: fx.Node, router: ScatterRouter, scores: Tensor) -> Tensor:
    """The path of each cell, int64 ``[N]``."""
    decision = router.protocol(_widened(scores), router.num_paths)
    choice_NK = decision.choice_NK
    if choice_NK is None or choice_NK.shape[1] != 1 or decision.weight is not None:
        raise CannotCaptureError(f"{node.name} takes several paths, or weights them")
    return choice_NK.view(-1)


def _check(graph: fx.Graph, scope: nn.Module, chain_of: dict[fx.Node, Chain]) -> None:
    """Raise `PassError` where a region is not of the form that is captured."""
    found = scatters(graph, scope)
    for one in found:
        router = one.router
        plain = type(router).forward is ScatterRouter.forward and not one.guarded
        plain = plain and not (router.weighted or router.inherit_weights or router.per_path)
        if not plain or router.result != "paths" or router.num_paths != 2:
            raise PassError(f"{one.name} is no exit: a plain scatter of two paths")
    for node in graph.nodes:
        _check_node(node, scope)
        if isinstance(router_of(node, scope), GatherRouter):
            rows = argument(node, 0, "rows")
            came = {chain_of[row] for row in rows}
            if len(came) < len(rows) or _parts(came, ()) != came:
                raise PassError(f"{node.name} may get no row of a cell, or several")
        if writes(node, scope) and not _writes_own(node, scope, chain_of):
            raise PassError(f"{node.name} writes in place, perhaps to rows of another path")
    if not found:
        raise PassError("it has no exits")


def _parts(came: set[Chain], chain: Chain) -> set[Chain] | None:
    """Those of the sets that a set of cells is parted into; None where some cells are in none."""
    if chain in came:
        return {chain}
    for node in {c[len(chain)][0] for c in came if c[: len(chain)] == chain}:
        halves = [_parts(came, (*chain, (node, p))) for p in range(2)]
        if None not in halves:
            return set[Chain]().union(*filter(None, halves))
    return None


def _check_node(node: fx.Node, scope: nn.Module) -> None:
    router, module = router_of(node, scope), module_of(node, scope)
    if isinstance(router, GatherRouter):
        rows = argument(node, 0, "rows")
        plain = router.result == "all" and not router.add_residual
        if not plain or not isinstance(rows, (list, tuple)):
            raise PassError(f"{node.name} does not gather all cells from a list of rows")
        if module is not router or router.overflow != "drop":
            raise PassError(f"{node.name} treats cells without a row in a way of its own")
    elif isinstance(router, (EarlyExit, LoopRouter)):
        raise PassError(f"{node.name} is one node with its exits inside")
    elif not isinstance(router, ScatterRouter) and hasattr(module, "_scope"):
        raise PassError(f"another pass put {node.target} there")


def _writes_own(node: fx.Node, scope: nn.Module, chain_of: dict[fx.Node, Chain]) -> bool:
    """Whether a node writes to what a node of the same branch has made."""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node):
        return False
    made = owner(target, scope)
    own = fresh(made, scope) and router_of(made, scope) is None
    return own and chain_of[made] == chain_of[node]


def _needed(graph: fx.Graph, scope: nn.Module) -> set[fx.Node]:
    """What the result is made of; which cells rows are is not asked, for there is one."""
    needed: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.op == "output"]
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        router = router_of(node, scope)
        if isinstance(router, GatherRouter):
            todo += list(argument(node, 0, "rows"))
        elif isinstance(router, ScatterRouter):
            x = argument(node, 0, "x")
            todo += [*(x if isinstance(x, (list, tuple)) else [x]), argument(node, 1, "scores")]
        else:
            todo += node.all_input_nodes
    return needed
