"""Whose memory a node's result is, and whether it matters how it lies there."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from brt.cells import annotate
from brt.passes.match import module_of, router_of, writes
from brt.routers import GatherRouter, ScatterRouter

# What always returns new memory, and keeps none of what it was given
_FRESH_MODULES = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.LayerNorm,
    nn.GroupNorm, nn.RMSNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softmax,
    nn.LogSoftmax, nn.Embedding, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d,
)  # fmt: skip
_FRESH_NAMES = (
    "add", "sub", "mul", "truediv", "div", "matmul", "mm", "bmm", "addmm", "neg", "pow", "exp",
    "log", "sqrt", "rsqrt", "abs", "relu", "gelu", "silu", "sigmoid", "tanh", "softmax",
    "log_softmax", "linear", "conv1d", "conv2d", "conv3d", "layer_norm", "group_norm",
    "batch_norm", "leaky_relu", "elu", "clone", "sum", "mean", "amax", "amin", "argmax", "cat",
    "stack", "where", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "logical_not", "einsum",
    "masked_fill", "index_select", "interpolate",
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
        return _gives_new_memory(module)
    return known_name(node) in _FRESH_NAMES and not writes(node, scope)


def _gives_new_memory(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:
        parts = iter(module)
        own = next((p for p in parts if not isinstance(p, _ALIAS_MODULES)), None)
        # What follows may work in place on what is new
        return own is not None and _gives_new_memory(own) and all(map(_known, parts))
    new = isinstance(module, _FRESH_MODULES) or getattr(module, "gives_new_memory", False)
    return new and not getattr(module, "inplace", False)


def _known(module: nn.Module) -> bool:
    return isinstance(module, (*_FRESH_MODULES, *_ALIAS_MODULES)) or _gives_new_memory(module)


def alias(node: fx.Node, scope: nn.Module) -> bool:
    """Whether the result may be, but nothing writes to, the memory of the first argument."""
    module = module_of(node, scope)
    if module is not None:
        return isinstance(module, _ALIAS_MODULES) and not getattr(module, "inplace", False)
    return known_name(node) in _ALIAS_NAMES


def known_name(node: fx.Node) -> str:
    """The name of a method, or of a function of torch or Python; "" for others."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    # Only torch's own: a user's function may have any name
    known = getattr(node.target, "__module__", None) in ("_operator", "builtins", F.__name__)
    known = known or getattr(torch, getattr(node.target, "__name__", ""), None) is node.target
    return getattr(node.target, "__name__", "") if known or node.target in _BUILTIN else ""


# What computes the same however images lie in memory, and may give them as they lay
_ANY_LAYOUT_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
    nn.PReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity,
    nn.PixelShuffle,
    nn.modules.dropout._DropoutNd, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d,
)  # fmt: skip
_ANY_LAYOUT_NAMES = (
    "cat", "add", "iadd", "sub", "mul", "imul", "truediv", "relu", "relu_", "leaky_relu", "sigmoid",
    "tanh", "unflatten", "permute", "pixel_shuffle", "interpolate", "conv2d", "max_pool2d",
    "avg_pool2d", "adaptive_avg_pool2d", "getitem",
)  # fmt: skip
# What gives something else, in a layout of its own
_LAYOUT_ENDS = (
    "contiguous", "flatten", "reshape", "mean", "sum", "amax", "amin", "softmax", "linear", "size",
)  # fmt: skip

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


def layout_is_free(node: fx.Node, scope: nn.Module) -> bool:
    """Whether all that reads images is indifferent to how they lie in memory (channels last)."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            goes_on = _takes_any_layout(user, scope)
            if goes_on is None:
                return False
            if goes_on:
                todo.append(user)
    return True


def _takes_any_layout(node: fx.Node, scope: nn.Module) -> bool | None:
    """None: no, or nobody knows; True: and its result may lie as what it takes."""
    module = module_of(node, scope)
    if module is not None:
        if isinstance(router_of(node, scope), (ScatterRouter, GatherRouter)):
            return False
        if getattr(module, "takes_any_layout", False) or isinstance(
            module, (nn.Flatten, nn.Linear)
        ):
            return False
        parts = list(module) if type(module) is nn.Sequential else [module]
        return True if all(isinstance(p, _ANY_LAYOUT_MODULES) for p in parts) else None
    if node.target is operator.getitem and getattr(node.args[0], "target", None) is annotate:
        return bool(node.args[1] == 0)  # the other item is its grid
    name = known_name(node) or (node.target if node.op == "call_method" else "")
    if name in _LAYOUT_ENDS or (name == "getattr" and node.args[1] in ("shape", "dtype", "device")):
        return False
    return True if name in _ANY_LAYOUT_NAMES or node.target is annotate else None
