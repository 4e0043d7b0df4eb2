"""Reading a traced branch as levels of linear layers.

Legend: P paths, O I output and input features.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from brt.grouped import activation_of
from brt.passes.fusion import NotFusableError
from brt.passes.match import argument, given

_MUL = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Level:
    """One layer of a branch: ``act(x @ weight.T + bias)``, times another layer where gated.

    Attributes:
        linear: the layer, or that of the gate.
        other: what the gate is multiplied with; None where there is no gate.
        activation: as `brt.ops.grouped_linear` names it; of the gate.
    """

    linear: nn.Linear
    other: nn.Linear | None = None
    activation: str = "none"

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Its one or two layers."""
        return (self.linear,) if self.other is None else (self.linear, self.other)

    def form(self) -> tuple[Any, ...]:
        """What must be equal in all branches."""
        shapes = tuple(
            (tuple(layer.weight.shape), layer.bias is not None, layer.weight.dtype)
            for layer in self.linears
        )
        return shapes, self.activation

    def kind(self) -> tuple[Any, ...]:
        """What must be equal in branches whose widths may differ."""
        layers = tuple((layer.bias is not None, layer.weight.dtype) for layer in self.linears)
        return layers, self.activation

    def __str__(self) -> str:
        sizes = f"{self.linear.in_features}->{self.linear.out_features}"
        gated = " gated" if self.other is not None else ""
        return sizes + gated + (f" {self.activation}" if self.activation != "none" else "")


@dataclass(frozen=True, eq=False)
class _Value:
    """What a node computes: the levels so far; the last may still become a gate."""

    levels: tuple[Level, ...]


class LevelMatcher:
    """Turns the nodes between a branch's input and its output into levels."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._values: dict[fx.Node, _Value] = {}

    def match(self, entry: fx.Node, nodes: list[fx.Node], result: fx.Node) -> tuple[Level, ...]:
        """The levels of a branch that takes ``entry`` and gives ``result``, by way of ``nodes``."""
        self._values[entry] = _Value(())
        for node in nodes:
            if node.op != "get_attr":
                self._values[node] = self._value(node)
        levels = self._values[result].levels
        if not levels:
            raise NotFusableError("it has no linear layer")
        return levels

    def _value(self, node: fx.Node) -> _Value:
        if node.op == "call_module":
            module = self._graph.get_submodule(str(node.target))
            return self._through(self._read(node), module, node)
        if node.op in ("call_function", "call_method") and node.target in _MUL:
            return self._gated(node)
        activation = _FUNCTIONS.get(node.target)
        if activation is None:
            raise NotFusableError(f"{_named(node)} is no linear layer and no activation of one")
        if activation == "gelu" and given(node, "approximate") == "tanh":
            activation = "gelu_tanh"
        return self._activated(self._read(node), activation, node)

    def _read(self, node: fx.Node) -> _Value:
        source = argument(node, 0, "input")
        if not isinstance(source, fx.Node) or source not in self._values:
            raise NotFusableError(f"{_named(node)} does not read the branch")
        return self._values[source]

    def _through(self, value: _Value, module: nn.Module, node: fx.Node) -> _Value:
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotFusableError(f"{_named(node)} has forward hooks")
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for part in module:
                value = self._through(value, part, node)
            return value
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            return _Value((*value.levels, Level(module)))
        if isinstance(module, nn.Dropout) and not module.training:
            return value
        activation = activation_of(module)
        if activation is None:
            raise NotFusableError(f"{_named(node)} is a {type(module).__name__}")
        return value if activation == "none" else self._activated(value, activation, node)

    def _activated(self, value: _Value, activation: str, node: fx.Node) -> _Value:
        *before, last = value.levels or (None,)
        if last is None or last.activation != "none" or last.other is not None:
            raise NotFusableError(f"{_named(node)} does not follow a linear layer")
        return _Value((*before, replace(last, activation=activation)))

    def _gated(self, node: fx.Node) -> _Value:
        sources = [self._values.get(arg) for arg in node.args if isinstance(arg, fx.Node)]
        if len(sources) != 2 or len(node.args) != 2 or None in sources:
            raise NotFusableError(f"{_named(node)} does not multiply two layers")
        for gate, other in (sources, sources[::-1]):
            assert gate is not None
            assert other is not None
            if not gate.levels or not other.levels:
                continue
            first, second = gate.levels[-1], other.levels[-1]
            alike = len(gate.levels) == len(other.levels) and all(
                a.linears == b.linears
                for a, b in zip(gate.levels[:-1], other.levels[:-1], strict=True)
            )
            plain = second.activation == "none" and first.other is None and second.other is None
            if alike and plain and first.activation != "none":
                return _Value((*gate.levels[:-1], replace(first, other=second.linear)))
        raise NotFusableError(f"{_named(node)} does not multiply an activated layer with another")


def _named(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
