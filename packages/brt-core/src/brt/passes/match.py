"""Finding things in a graph: scatters with their paths, and which nodes work on whose rows.

Legend: P paths.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload
from torch.nn.modules.dropout import _DropoutNd

from brt.routers import GatherRouter, Router, ScatterRouter

Chain = tuple[tuple[fx.Node, int], ...]
"""Pairs, outermost first: on whose rows a node works; () = on all cells.

(scatter, path), or (gather, 0) for the rows of a union.
"""

_RANDOM = (
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
    "bernoulli_", "multinomial", "normal", "normal_", "poisson", "uniform_", "exponential_",
    "random_", "geometric_", "cauchy_", "log_normal_", "gumbel_softmax", "rrelu",
)  # fmt: skip
_DROPOUTS = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
)  # fmt: skip
_WRITES = (
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul,
    operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
)  # fmt: skip


_WRITING_METHODS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


@dataclass(frozen=True, eq=False)
class Scatter:
    """A scatter in a graph.

    Attributes:
        node: that calls it.
        router: the module that decides (also where a pass put another module before it).
        target: its name in the region.
        call: which of the calls of this router in the region it is, from 0.
        calls: how many calls of this router the region has.
        rows: the node of its paths, and `route` that of its route; None where unused.
        path_P: the node of each path's rows (a tuple of flows where there are several); None
            where unused.
        guarded: whether a pass has put a module in its place already.
    """

    node: fx.Node
    router: ScatterRouter
    target: str
    call: int
    calls: int
    rows: fx.Node | None
    route: fx.Node | None
    path_P: tuple[fx.Node | None, ...]
    guarded: bool

    @property
    def name(self) -> str:
        """Its target, and which call where it is called more than once."""
        return self.target if self.calls == 1 else f"{self.target}#{self.call}"


def module_of(node: fx.Node, scope: nn.Module) -> nn.Module | None:
    """The module that a node calls; None for other nodes."""
    if node.op != "call_module":
        return None
    found = scope
    # Passes ask this of every node, again and again: `get_submodule` takes ten times as long
    for name in str(node.target).split("."):
        found = found._modules.get(name) or getattr(found, name)
    return found


def router_of(node: fx.Node, scope: nn.Module) -> Router | None:
    """The router that a node calls, also through a guarded module that stands for one."""
    module = module_of(node, scope)
    standing_for = getattr(module, "router", None)
    found = standing_for if isinstance(standing_for, Router) else module
    return found if isinstance(found, Router) else None


def scatters(graph: fx.Graph, scope: nn.Module) -> list[Scatter]:
    """Every scatter of a graph that gives paths, in order; packed ones have no paths to tell."""
    called: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        router = router_of(node, scope)
        if isinstance(router, ScatterRouter):
            called.setdefault(id(router), []).append(node)
    found = []
    for node in graph.nodes:
        router = router_of(node, scope)
        if not isinstance(router, ScatterRouter):
            continue
        module = module_of(node, scope)
        guarded = module is not router
        target = str(getattr(module, "router_target", node.target))
        rows, route = item_of(node, 0), item_of(node, 1)
        paths: tuple[fx.Node | None, ...] = (None,) * router.num_paths
        if rows is not None and router.result == "paths":
            paths = tuple(item_of(rows, p) for p in range(router.num_paths))
        calls = called[id(router)]
        at = calls.index(node)
        found.append(Scatter(node, router, target, at, len(calls), rows, route, paths, guarded))
    return found


def argument(node: fx.Node, index: int, name: str) -> Any:
    """An argument of a call, given by place or by name; None where it is not given."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def item_of(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes one item of another's result."""
    for user in node.users:
        if user.target is operator.getitem and user.args == (node, index):
            return user
    return None


def flows_read(scatter: Scatter) -> tuple[tuple[int, ...], ...]:
    """For each path, the flows (0 where there is only one) of which anything is read there."""
    x = argument(scatter.node, 0, "x")
    several = isinstance(x, (tuple, list))
    num_flows = len(x) if several else 1
    return tuple(
        tuple(i for i in range(num_flows) if _is_read(start, i, num_flows, several))
        for start in scatter.path_P
    )


def _is_read(start: fx.Node | None, flow: int, num_flows: int, several: bool) -> bool:
    if start is None or not start.users:
        return False
    if not several or not takes_items(start):
        return True
    return item_of(start, flow) is not None or item_of(start, flow - num_flows) is not None


def takes_items(node: fx.Node) -> bool:
    """Whether all that read a node take one item of it each."""
    return all(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users
    )


def chains(graph: fx.Graph, scope: nn.Module) -> dict[fx.Node, Chain]:
    """On whose rows each node works: the path of the innermost scatter, in that of the next..."""
    chain_of: dict[fx.Node, Chain] = {}
    path_of = {
        node: (found, p)
        for found in scatters(graph, scope)
        for p, node in enumerate(found.path_P)
        if node is not None
    }
    for node in graph.nodes:
        taken = [chain_of[n] for n in node.all_input_nodes]
        if node in path_of:
            found, path = path_of[node]
            chain_of[node] = (*chain_of[found.node], (found.node, path))
        elif isinstance(router := router_of(node, scope), GatherRouter):
            where = argument(node, 1, "where")
            if router.result == "union":
                # Its rows are a set of their own, which may be empty as those of a path
                chain_of[node] = (*common(taken), (node, 0))
            else:
                chain_of[node] = () if isinstance(where, (list, tuple)) else common(taken)
        else:
            longest = max(taken, key=len, default=())
            nested = all(longest[: len(chain)] == chain for chain in taken)
            chain_of[node] = longest if nested else common(taken)
    return chain_of


def common(every: list[Chain]) -> Chain:
    """The longest chain that all begin with."""
    if not every:
        return ()
    shortest = min(every, key=len)
    for length in range(len(shortest), 0, -1):
        if all(chain[:length] == shortest[:length] for chain in every):
            return shortest[:length]
    return ()


def writes(node: fx.Node, scope: nn.Module) -> bool:
    """Whether a node may change a tensor that it was given, or keep something."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in _WRITING_METHODS
    if node.op == "call_module":
        module = module_of(node, scope)
        assert module is not None
        return any(_module_writes(m) for m in module.modules())
    if node.op != "call_function":
        return False
    if node.target in _WRITES or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or given(node, "inplace") is True


def _module_writes(module: nn.Module) -> bool:
    if getattr(module, "inplace", False):
        return True
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
        return module.training
    known = type(module).__module__.startswith(("torch.nn.", "brt."))
    return not known and next(module.children(), None) is None


def given(node: fx.Node, name: str) -> Any:
    """The value of an argument of a Python function, also where it is the default."""
    if not inspect.isfunction(node.target):
        return None
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return bound.arguments.get(name)


def draws_random(graph: fx.Graph, scope: nn.Module) -> str | None:
    """Where a graph draws random numbers, in words; None where it does not."""
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
        if node.op in ("call_function", "call_method"):
            if name in _RANDOM:
                return f"{name} (node {node.name})"
            if name in _DROPOUTS and given(node, "training") and given(node, "p") != 0:
                return f"{name} (node {node.name})"
        module = module_of(node, scope)
        for inner in () if module is None else module.modules():
            why = _module_draws(inner)
            if why is not None:
                return f"{node.target}: {why}"
    return None


def _module_draws(module: nn.Module) -> str | None:
    protocol = getattr(module, "protocol", None)
    if getattr(protocol, "stochastic", False):
        return f"protocol {getattr(protocol, 'name', protocol)} is stochastic"
    if not module.training:
        return None
    if isinstance(module, _DropoutNd):
        return type(module).__name__ if module.p else None
    if isinstance(module, nn.RReLU) or bool(getattr(module, "dropout", 0.0)):
        return type(module).__name__
    return None
