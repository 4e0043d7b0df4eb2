"""What fuse-vertical makes possible around layers: ReLU ahead of a scatter, sums in results."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx, nn
from torch.nn import functional as F

from brt.passes.base import Context
from brt.passes.folded_layers import FoldedLayers
from brt.passes.folding import is_hooked
from brt.passes.match import Scatter, argument, item_of, module_of, scatters, takes_items, writes
from brt.routers import ScatterRouter

_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_TO_FIRST = (operator.iadd, "add_")


def is_relu(node: fx.Node, scope: nn.Module) -> bool:
    """Whether a node is ReLU of its one input."""
    module = module_of(node, scope)
    return node.target in _RELU or (type(module) is nn.ReLU and not is_hooked(module))


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads another's result, where it is one and reads nothing else."""
    users = list(node.users)
    if len(users) != 1 or users[0].all_input_nodes != [node]:
        return None
    return users[0] if users[0].args[:1] == (node,) else None


def relu_first(graph: fx.GraphModule, ctx: Context) -> int:
    """Move ReLU ahead of scatters where every path begins with it; returns how many.

    It commutes with moving rows, and is done once for all paths, in the result of the layer before.
    """
    moved = 0
    for found in scatters(graph.graph, ctx.scope):
        plain = type(found.router).forward is ScatterRouter.forward and not found.guarded
        # A weight may be negative
        if not plain or found.router.weighted or found.router.result != "paths":
            continue
        if found.rows is None or not takes_items(found.rows):
            continue
        x = argument(found.node, 0, "x")
        several = isinstance(x, (tuple, list))
        for i, flow in enumerate(x if several else [x]):
            relus = _relus(found, i if several else None, ctx.scope)
            if relus and isinstance(flow, fx.Node):
                _hoist(graph.graph, found, i if several else None, flow, relus)
                moved += 1
    return moved


def _relus(found: Scatter, flow: int | None, scope: nn.Module) -> list[fx.Node]:
    """The nodes that read a flow's rows, where all of them are ReLU; else none."""
    relus: list[fx.Node] = []
    for start in found.path_P:
        rows = start
        if flow is not None and start is not None and start.users:
            if not takes_items(start) or any(int(user.args[1]) < 0 for user in start.users):  # type: ignore[arg-type]
                return []
            rows = item_of(start, flow)
        for user in () if rows is None else rows.users:
            if not is_relu(user, scope) or user.all_input_nodes != [rows]:
                return []
            in_place = writes(user, scope)
            if (in_place and len(rows.users) > 1) or any(writes(n, scope) for n in user.users):  # type: ignore[union-attr]
                return []
            relus.append(user)
    return relus


def _hoist(
    graph: fx.Graph, found: Scatter, flow: int | None, x: fx.Node, relus: list[fx.Node]
) -> None:
    with graph.inserting_before(found.node):
        made = graph.call_function(F.relu, (x,))
    given = argument(found.node, 0, "x")
    new = made if flow is None else type(given)([*given[:flow], made, *given[flow + 1 :]])
    if found.node.args:
        found.node.args = (new, *found.node.args[1:])
    else:
        found.node.kwargs = {**found.node.kwargs, "x": new}
    for relu in relus:
        relu.replace_all_uses_with(relu.all_input_nodes[0])
        graph.erase_node(relu)


def add_to_results(graph: fx.GraphModule, ctx: Context) -> int:
    """Let folded layers add what is added to their result, and apply ReLU; returns how many."""
    num_added = 0
    for node in list(graph.graph.nodes):
        module = module_of(node, ctx.scope)
        last = module.last if isinstance(module, FoldedLayers) else None
        if last is None or last.relu or last.adds or node.kwargs or len(node.args) != 1:
            continue
        end = node
        while (user := only_user(end)) is not None and _does_nothing(user, ctx.scope):
            end = user
        sums = next(iter(end.users)) if len(end.users) == 1 else None
        other = None if sums is None else _other(sums, end)
        if sums is None or other is None or _writes_between(node, sums, ctx.scope):
            continue
        after = only_user(sums)
        relu = after if after is not None and is_relu(after, ctx.scope) else None
        assert isinstance(module, FoldedLayers)
        new = module.with_last(replace(last, adds=True, relu=relu is not None))
        target = ctx.insert(graph, new, "folded_layers")
        with graph.graph.inserting_before(sums):
            made = graph.graph.call_module(target, (node.args[0], other))
        (sums if relu is None else relu).replace_all_uses_with(made)
        num_added += 1
        gone = [node]
        while gone[-1] is not (sums if relu is None else relu):
            gone.append(next(iter(gone[-1].users)))
        for one in reversed(gone):
            graph.graph.erase_node(one)
    return num_added


def _does_nothing(node: fx.Node, scope: nn.Module) -> bool:
    module = module_of(node, scope)
    return type(module) is nn.Identity and not is_hooked(module)


def _other(sums: fx.Node, one: fx.Node) -> fx.Node | None:
    """What a sum adds to a node; None where it is no plain sum of two tensors."""
    if sums.target not in _ADD or sums.kwargs or len(sums.args) != 2:
        return None
    first, second = sums.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    if sums.target in _TO_FIRST and first is not one:
        return None
    return second if first is one else first


def _writes_between(node: fx.Node, last: fx.Node, scope: nn.Module) -> bool:
    one = node.next
    while one is not last:
        if writes(one, scope):
            return True
        one = one.next
    return False
