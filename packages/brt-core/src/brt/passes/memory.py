"""Whose memory a node's result is: its own, or that of what it was given."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from brt.passes.match import module_of, router_of, writes
from brt.routers import GatherRouter, ScatterRouter

# What always returns new memory, and keeps none of what it was given
_FRESH_MODULES = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.LayerNorm,
    nn.GroupNorm, nn.RMSNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softmax,
    nn.LogSoftmax, nn.Embedding,
)  # fmt: skip
_FRESH_NAMES = (
    "add", "sub", "mul", "truediv", "div", "matmul", "mm", "bmm", "addmm", "neg", "pow", "exp",
    "log", "sqrt", "rsqrt", "abs", "relu", "gelu", "silu", "sigmoid", "tanh", "softmax",
    "log_softmax", "linear", "conv1d", "conv2d", "conv3d", "layer_norm", "group_norm",
    "batch_norm", "leaky_relu", "elu", "clone", "sum", "mean", "amax", "amin", "argmax", "cat",
    "stack", "where", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "logical_not", "einsum",
    "masked_fill", "index_select",
)  # fmt: skip
_ALIAS_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_ALIAS_NAMES = (
    "getitem", "getattr", "view", "view_as", "reshape", "flatten", "unflatten", "permute",
    "transpose", "t", "movedim", "unsqueeze", "squeeze", "contiguous", "expand", "expand_as",
    "chunk", "split", "tensor_split", "unbind", "narrow", "size", "dim", "numel", "to", "float",
    "half", "double", "bfloat16", "type", "type_as", "detach", "requires_grad_",
    "is_floating_point",
)  # fmt: skip


def fresh(node: fx.Node, scope: nn.Module) -> bool:
    """Whether the result is certain to lie in memory of its own."""
    module = module_of(node, scope)
    if module is not None:
        if isinstance(router_of(node, scope), (ScatterRouter, GatherRouter)):
            return True
        return isinstance(module, _FRESH_MODULES) and not getattr(module, "inplace", False)
    return _name(node) in _FRESH_NAMES and not writes(node, scope)


def alias(node: fx.Node, scope: nn.Module) -> bool:
    """Whether the result may be, but nothing writes to, the memory of the first argument."""
    module = module_of(node, scope)
    if module is not None:
        return isinstance(module, _ALIAS_MODULES) and not getattr(module, "inplace", False)
    return _name(node) in _ALIAS_NAMES


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    # Only torch's own: a user's function may have any name
    known = getattr(node.target, "__module__", None) in ("_operator", "builtins", F.__name__)
    known = known or getattr(torch, getattr(node.target, "__name__", ""), None) is node.target
    return getattr(node.target, "__name__", "") if known or node.target in _BUILTIN else ""


_BUILTIN = (operator.getitem, getattr, F.linear, F.gelu)


def owner(node: fx.Node, scope: nn.Module) -> fx.Node:
    """The node whose memory a result lies in, as far as that can be told."""
    while alias(node, scope) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def may_share(start: fx.Node, scope: nn.Module) -> str | None:
    """Why the memory of ``start`` may not be anybody else's; None where it may be lent.

    Lent memory must not be written to, nor leave the graph. Follows results that lie in it.
    """
    lent, todo = {start}, [start]
    while todo:
        for user in todo.pop().users:
            if user in lent or fresh(user, scope):
                continue
            if user.op == "output":
                return "its rows leave the graph"
            if writes(user, scope):
                return f"{user.name} writes in place"
            if not alias(user, scope):
                return f"{user.name} may keep its rows, or write to them"
            lent.add(user)
            todo.append(user)
    return None


def written_after(node: fx.Node, given: list[fx.Node], scope: nn.Module) -> str | None:
    """The name of a node behind ``node`` that writes to memory of ``given``, in words."""
    owners, behind = {owner(one, scope) for one in given}, False
    for other in node.graph.nodes:
        behind = behind or other is node
        if not behind or not other.args or not writes(other, scope):
            continue
        target = other.args[0]
        if isinstance(target, fx.Node) and owner(target, scope) in owners:
            return f"{other.name} writes to the rows that were scattered"
    return None
