"""Branches run together: `grouped` over packed rows, and `each` over paths.

Legend: P paths, R rows, I O feature sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from brt import ops
from brt.errors import RouteError
from brt.route import Route

_ACTIVATION_OF: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Identity: "none",
}


def each(modules: Iterable[nn.Module], paths: Iterable[Any]) -> list[Any]:
    """``[module(path) ...]``, where a path without rows costs nothing in eager mode.

    The result of an empty path has the shape that its module would give, which another path's
    result or, where all are empty, the module itself tells. Modules must treat rows apart and keep
    the number of rows. Under ``torch.compile``, and while gradients are needed (so that those of a
    skipped branch are zeros, not None), every module runs.
    """
    modules, paths = list(modules), list(paths)
    flows = tuple(flow for path in paths for flow in (path if isinstance(path, tuple) else (path,)))
    if has_torch_function(flows):
        return handle_torch_function(each, flows, modules, paths)  # type: ignore[no-any-return]
    if len(modules) != len(paths):
        raise RouteError(f"each: {len(modules)} modules for {len(paths)} paths")
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return [_call(m, p) for m, p in zip(modules, paths, strict=True)]
    outs = [
        _call(m, p) if _num_rows(p) else None for m, p in zip(modules, paths, strict=True)
    ]
    for i, out in enumerate(outs):
        if out is None:
            like = next((o for o in outs if isinstance(o, Tensor)), None)
            if like is None:
                outs[i] = _call(modules[i], paths[i])
            else:
                outs[i] = like.new_empty((0, *like.shape[1:]))
    return outs


def grouped(modules: Sequence[nn.Module], rows_RI: Tensor, route: Route) -> Tensor:
    """Run module p on the rows of path p, all in one operator a layer; ``[R, O]``.

    ``rows_RI`` are packed rows (``ScatterRouter(result="packed")``). The modules must be alike:
    ``nn.Linear``, or ``nn.Sequential`` of ``nn.Linear``, ReLU, GELU, SiLU and Identity. The graph
    of this call does not grow with P, and nothing waits for the loads where the kernel does not
    (`brt.ops.explain`). Gradients reach every module's own parameters.
    """
    if has_torch_function((rows_RI,)):
        return handle_torch_function(  # type: ignore[no-any-return]
            grouped, (rows_RI,), list(modules), rows_RI, route
        )
    if len(modules) != route.num_paths:
        raise RouteError(f"grouped: {len(modules)} modules for a route of {route.num_paths} paths")
    if not isinstance(rows_RI, Tensor):
        raise RouteError(
            "grouped: rows must be one packed tensor: ScatterRouter(..., result='packed')"
        )
    layers = [list(m) if isinstance(m, nn.Sequential) else [m] for m in modules]
    if len({tuple(type(layer) for layer in branch) for branch in layers}) != 1:
        raise RouteError("grouped: the modules differ in their layers; use brt.each")
    position, depth = 0, len(layers[0])
    while position < depth:
        layer = layers[0][position]
        if isinstance(layer, nn.Linear):
            linears: list[nn.Linear] = [branch[position] for branch in layers]  # type: ignore[misc]
            following = layers[0][position + 1] if position + 1 < depth else None
            activation = "none" if following is None else activation_of(following)
            position += 1 if activation is None or following is None else 2
            weight_POI, bias_PO = stack_linears(linears)
            rows_RI = ops.grouped_linear(
                rows_RI, route.offsets_P1, weight_POI, bias_PO, activation or "none"
            )
        elif activation_of(layer) is not None:
            rows_RI = layer(rows_RI)
            position += 1
        else:
            raise RouteError(
                f"grouped: layer {position} is {type(layer).__name__}; it takes Linear, ReLU, GELU, "
                "SiLU and Identity; use brt.each for others"
            )
    return rows_RI


def activation_of(module: nn.Module) -> str | None:
    """The name that `brt.ops.grouped_linear` has for an activation module, or None."""
    name = _ACTIVATION_OF.get(type(module))
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return name


def stack_linears(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights ``[P, O, I]`` and biases ``[P, O]`` (None where no layer has one) of linear layers."""
    if len({tuple(linear.weight.shape) for linear in linears}) != 1:
        shapes = sorted({tuple(linear.weight.shape) for linear in linears})
        raise RouteError(f"grouped: linear layers of different shapes {shapes}; use brt.each")
    with_bias = [linear.bias is not None for linear in linears]
    if any(with_bias) and not all(with_bias):
        raise RouteError("grouped: some linear layers have a bias and some have none")
    weight = torch.stack([linear.weight for linear in linears])
    return weight, torch.stack([linear.bias for linear in linears]) if all(with_bias) else None


def _call(module: nn.Module, path: Any) -> Any:
    return module(*path) if isinstance(path, tuple) else module(path)


def _num_rows(path: Any) -> int:
    return int((path[0] if isinstance(path, tuple) else path).shape[0])
