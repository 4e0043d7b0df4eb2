"""Parts of a graph that depend on no input: evaluated once, and again when their sources change."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from brt.guard import compiled
from brt.passes.derived import DerivedTensors, Slots
from brt.passes.match import module_of, router_of, writes
from brt.passes.memory import alias, fresh, known_name, may_share, owner

_MORE = ("arange", "eye", "full", "linspace", "ones", "one_hot", "repeat", "tile", "zeros")
_SIZES = ("size", "dim", "numel")
_SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_COUNTING = (
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod,
)  # fmt: skip
_MOST_KEPT = 64


@dataclass(frozen=True, eq=False)
class Constant:
    """What a node is made of, where that is parameters, buffers and sizes of inputs alone.

    Attributes:
        graph: from the sizes to the node's value.
        sizes: the nodes of these sizes.
        slots: where the parameters and buffers are kept.
        works: whether anything is computed, and not only viewed.
    """

    graph: fx.Graph
    sizes: tuple[fx.Node, ...]
    slots: Slots
    works: bool


def constant(node: fx.Node, scope: nn.Module) -> Constant | None:
    """None where a node depends on values of inputs, or on what cannot be told."""
    inside, sizes, todo = {node}, set(), [node]
    while todo:
        one = todo.pop()
        if _is_size(one):
            inside.discard(one)
            sizes.add(one)
            continue
        if not _is_pure(one, scope):
            return None
        new = [n for n in one.all_input_nodes if n not in inside]
        inside.update(new)
        todo += new
    made_of = [n for n in node.graph.nodes if n in inside]
    for one in made_of:
        # Nothing may write to it: neither here, where the order would count, nor elsewhere
        if not _is_count(one, sizes) and may_share(one, scope) is not None:
            return None
    slots = _slots(made_of, scope)
    if not made_of or _written(node.graph, scope) & {_memory(t) for t in slots.read()}:
        return None
    in_order = tuple(n for n in node.graph.nodes if n in sizes)
    works = any(n.op != "get_attr" and not alias(n, scope) for n in made_of)
    return Constant(_alone(node, made_of, in_order), in_order, slots, works)


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZES
    return (node.target is builtins.getattr and node.args[1] in _SIZE_ATTRIBUTES) or (
        node.target is builtins.len
    )


def _is_count(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """Whether a node is a number that was counted from sizes."""
    if node in sizes:
        return True
    inputs = node.all_input_nodes
    return node.target in _COUNTING and bool(inputs) and all(_is_count(n, sizes) for n in inputs)


def _is_pure(node: fx.Node, scope: nn.Module) -> bool:
    if node.op == "get_attr":
        return isinstance(operator.attrgetter(str(node.target))(scope), Tensor)
    module = module_of(node, scope)
    if module is not None:
        if router_of(node, scope) is not None or not fresh(node, scope) or writes(node, scope):
            return False
        return not any(_depends_on_mode(inner) for inner in module.modules())
    if node.op not in ("call_function", "call_method") or writes(node, scope):
        return False
    known = fresh(node, scope) or alias(node, scope) or node.target in _COUNTING
    return known or known_name(node) in _MORE


def _depends_on_mode(module: nn.Module) -> bool:
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return hooked or isinstance(module, _DropoutNd) or bool(module._buffers)


def _alone(node: fx.Node, made_of: list[fx.Node], sizes: tuple[fx.Node, ...]) -> fx.Graph:
    graph = fx.Graph()
    copied = {size: graph.placeholder(size.name) for size in sizes}
    for one in made_of:
        copied[one] = graph.node_copy(one, copied.__getitem__)
    graph.output(copied[node])
    return graph


def _written(graph: fx.Graph, scope: nn.Module) -> set[int]:
    """The memory of parameters and buffers that a graph writes to."""
    found: set[int] = set()
    for node in graph.nodes:
        if not writes(node, scope):
            continue
        module = module_of(node, scope)
        if module is not None:
            found.update(map(_memory, (*module.parameters(), *module.buffers())))
        elif node.args and isinstance(node.args[0], fx.Node):
            target = owner(node.args[0], scope)
            if target.op == "get_attr":
                found.add(_memory(operator.attrgetter(str(target.target))(scope)))
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _slots(made_of: list[fx.Node], scope: nn.Module) -> Slots:
    owned: list[tuple[nn.Module, str]] = []
    for node in made_of:
        module = module_of(node, scope)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            owned.append((scope.get_submodule(path), name))
        for inner in () if module is None else module.modules():
            owned += [(inner, name) for name, p in inner._parameters.items() if p is not None]
    return Slots.of(owned)


class Keeper(nn.Module):
    """What is made of a `Constant`, until a source is written to or replaced.

    While gradients of a source are needed, and under a compiler, it is made in each call.
    """

    def __init__(self, scope: nn.Module, found: Constant) -> None:
        super().__init__()
        self._scope = (scope,)
        self._run = compiled(found.graph)
        self._slots = found.slots
        self._derived = DerivedTensors()
        self._keys: set[Any] = set()

    def value(self, *sizes: Any) -> Tensor:
        """The value, made anew."""
        found: Tensor = self._run(self._scope[0], *sizes)
        return found

    def keep(self, key: Any, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ``make()`` gave for a key, these sources, and the dtypes that operators give now."""
        sources = self._slots.read()
        device = sources[0].device.type if sources else "cpu"
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        # What is made in inference mode may not be used where gradients are recorded
        key = (key, cast, torch.get_default_dtype(), torch.is_inference_mode_enabled())
        if key not in self._keys and len(self._keys) >= _MOST_KEPT:
            self._derived, self._keys = DerivedTensors(), set()
        self._keys.add(key)
        return self._derived.get(key, sources, make)


class KeptTensor(Keeper):
    """The value of a `Constant` that needs no sizes: ``forward()``; nobody may write to it."""

    def forward(self) -> Tensor:
        """The value."""
        if torch.compiler.is_compiling():
            return self.value()
        return self.keep((), lambda: (self.value(),))[0]
