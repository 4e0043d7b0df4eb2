"""A branch as a program of oneDNN's layers, made from the nodes of its trace."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from brt.guard import compiled
from brt.passes.branch_layers import (
    Activation,
    ConvLayer,
    GrowingLayer,
    can_grow,
    shuffled,
)
from brt.passes.conv_matching import unflatten_shuffle
from brt.passes.folding import can_fold, is_hooked
from brt.passes.match import argument, module_of, writes
from brt.passes.memory import layout_is_free
from brt.passes.packed_conv import ConvCall, can_pack

_LAYER = "brt_layer_"
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_LEAKY = (F.leaky_relu, F.leaky_relu_)
_ADD = (operator.add, torch.add, "add")
_ADD_IN_PLACE = (operator.iadd, "add_")

Layer = ConvLayer | GrowingLayer


class Names:
    """The names of a module, and of the layers that were made for it."""

    def __init__(self, scope: nn.Module, layers: dict[str, Layer]) -> None:
        self.__dict__.update(layers)
        self._scope = scope

    def __getattr__(self, name: str) -> Any:
        if name == "_scope" or name.startswith("__"):  # a copy that is not yet filled
            raise AttributeError(name)
        return getattr(self._scope, name)


class BranchProgram:
    """One branch: ``program(rows)`` by oneDNN, ``program.plain(rows)`` as it was.

    Both refer to the model's own modules and parameters.
    """

    def __init__(self, scope: nn.Module, entry: fx.Node, nodes: list[fx.Node], result: fx.Node):
        self._scope = scope
        self._plain = compiled(_alone(entry, nodes, result))
        graph = _alone(entry, nodes, result)
        self.layers = tuple(_rewrite(graph, scope))
        layers = {f"{_LAYER}{i}": layer for i, layer in enumerate(self.layers)}
        self._names = Names(scope, layers)
        self._run: Callable[..., Tensor] = compiled(graph)

    def __call__(self, rows_RS: Tensor) -> Tensor:
        """What the branch gives, in any layout, of one row or more in float32 on a CPU."""
        return self._run(self._names, rows_RS)

    def plain(self, rows_RS: Tensor) -> Tensor:
        """What the branch gives, by its own layers."""
        out: Tensor = self._plain(self._scope, rows_RS)
        return out

    def is_plain(self) -> bool:
        """Whether its layers are in evaluation, on a CPU in float32, and need no gradients now."""
        grad = torch.is_grad_enabled()
        return all(layer.is_plain(grad) for layer in self.layers)


def _alone(entry: fx.Node, nodes: list[fx.Node], result: fx.Node) -> fx.Graph:
    alone = fx.Graph()
    copied = {entry: alone.placeholder("rows")}
    for node in nodes:
        copied[node] = alone.node_copy(node, copied.__getitem__)
    # In any layout: it is copied to its place among the rows of all paths
    alone.output(alone.call_method("contiguous", (copied[result],)))
    return alone


def _rewrite(graph: fx.Graph, scope: nn.Module) -> list[Layer]:
    """Put calls of ``brt_layer_0``, ... in the place of layers; returns these."""
    found: list[Layer] = []
    free = {node for node in graph.nodes if layout_is_free(node, scope)}
    _use_fast_shuffles(graph, scope, free)
    for node in list(graph.nodes):
        taken = _take(node, scope, free)
        if taken is None:
            continue
        layer, gone, others = taken
        with graph.inserting_before(gone[-1] if others else node):
            args = (argument(node, 0, "input"), *others)
            made = graph.call_module(f"{_LAYER}{len(found)}", args)
        gone[-1].replace_all_uses_with(made)
        for one in reversed(gone):
            graph.erase_node(one)
        found.append(layer)
    last = next(n for n in reversed(graph.nodes) if n.target == "contiguous")
    last.replace_all_uses_with(last.args[0])
    graph.erase_node(last)
    return found


def _take(
    node: fx.Node, scope: nn.Module, free: set[fx.Node]
) -> tuple[Layer, list[fx.Node], tuple[fx.Node, ...]] | None:
    """(what does the work of a convolution and of nodes behind it, these, what is added)."""
    if str(node.target).startswith(_LAYER):
        return None
    layer: Any = module_of(node, scope)
    if node.target in (torch.conv2d, F.conv2d):
        layer = ConvCall.of(node, scope)
    if layer is None or (isinstance(layer, nn.Module) and is_hooked(layer)):
        return None
    if can_grow(layer) and len(node.args) == 1 and not node.kwargs:
        act, gone = _activation(node, scope, ())
        return GrowingLayer(layer, act), [node, *gone], ()
    if not can_pack(layer):
        return None
    gone, norm = [node], None
    follower = _only_reader(node)
    found = None if follower is None else _module_of(follower, scope)
    if follower is not None and found is not None and can_fold(layer, found):
        gone, norm = [node, follower], found
    added, other = _addition(gone[-1])
    if added is not None and _is_written(node, added, scope):
        added = other = None
    act, more = _activation(added or gone[-1], scope, ("relu",) if added is not None else ())
    gone += [*([] if added is None else [added]), *more]
    made = ConvLayer(layer, norm, act, keeps_layout=gone[-1] in free)
    return made, gone, () if other is None else (other,)


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The node that alone reads another's result, as its first argument."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].args[:1] == (node,) else None


def _module_of(node: fx.Node, scope: nn.Module) -> nn.Module | None:
    module = None if str(node.target).startswith(_LAYER) else module_of(node, scope)
    return None if module is None or is_hooked(module) else module


def _addition(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition that alone reads a result, and what it adds to it."""
    users = list(node.users)
    if len(users) != 1 or users[0].kwargs or len(users[0].args) != 2:
        return None, None
    (user,), (first, second) = users, users[0].args
    if user.target not in _ADD and not (user.target in _ADD_IN_PLACE and first is node):
        return None, None
    other = second if first is node else first
    return (user, other) if isinstance(other, fx.Node) and other is not node else (None, None)


def _is_written(first: fx.Node, last: fx.Node, scope: nn.Module) -> bool:
    """Whether a node between two may change what the first took."""
    node = first.next
    while node is not last:
        if not str(node.target).startswith(_LAYER) and writes(node, scope):
            return True
        node = node.next
    return False


def _activation(
    node: fx.Node, scope: nn.Module, only: tuple[str, ...]
) -> tuple[Activation, list[fx.Node]]:
    """The activation that alone reads a result, and its node; others than ``only`` stay."""
    reader = _only_reader(node)
    act = None if reader is None or len(reader.all_input_nodes) > 1 else _named(reader, scope)
    if reader is None or act is None or (only and act.name not in only):
        return Activation(), []
    return act, [reader]


def _named(node: fx.Node, scope: nn.Module) -> Activation | None:
    module = _module_of(node, scope)
    if node.target in _RELU or type(module) is nn.ReLU:
        return Activation("relu")
    if type(module) is nn.PReLU and module.num_parameters == 1:
        return Activation("leaky_relu", owner=module)
    if type(module) is nn.LeakyReLU:
        return Activation("leaky_relu", module.negative_slope)
    if node.target in _LEAKY:
        slope = argument(node, 1, "negative_slope")
        if slope is None or isinstance(slope, (int, float)):
            return Activation("leaky_relu", 0.01 if slope is None else float(slope))
    return None


def _use_fast_shuffles(graph: fx.Graph, scope: nn.Module, free: set[fx.Node]) -> None:
    """Put `shuffled` in the place of pixel shuffles, also of those that are written as views."""
    for node in list(graph.nodes):
        last, growth, between = node, _shuffle_of(node, scope), set[fx.Node]()
        written = unflatten_shuffle(node) if growth is None else None
        if written is not None:
            last, growth, between = written
        if growth is None or last not in free:
            continue
        with graph.inserting_before(last):
            made = graph.call_function(shuffled, (argument(node, 0, "input"), growth))
        last.replace_all_uses_with(made)
        for one in [n for n in reversed(graph.nodes) if n is node or n in between]:
            graph.erase_node(one)


def _shuffle_of(node: fx.Node, scope: nn.Module) -> int | None:
    module = module_of(node, scope)
    if type(module) is nn.PixelShuffle and not is_hooked(module):
        return module.upscale_factor
    factor = argument(node, 1, "upscale_factor") if node.target is F.pixel_shuffle else None
    return factor if isinstance(factor, int) else None
