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
from brt.ops.grouped_linear import activate
from brt.route import Route

_ACTIVATION_OF: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Identity: "none",
}
_LINEAR = "linear"
# A weight of more bytes takes longer to copy than one more call of a product takes to start
_COSTLY_BYTES = 1 << 17


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
        return handle_torch_function(each, flows, modules, paths)
    if len(modules) != len(paths):
        raise RouteError(f"each: {len(modules)} modules for {len(paths)} paths")
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return [_call(m, p) for m, p in zip(modules, paths, strict=True)]
    outs = [_call(m, p) if _num_rows(p) else None for m, p in zip(modules, paths, strict=True)]
    for i, out in enumerate(outs):
        if out is None:
            like = next((o for o in outs if isinstance(o, Tensor)), None)
            if like is None:
                outs[i] = _call(modules[i], paths[i])
            else:
                outs[i] = like.new_empty((0, *like.shape[1:]))
    return outs


def grouped(modules: Iterable[nn.Module], rows_RI: Tensor, route: Route) -> Tensor:
    """Run module p on the rows of path p, all in one operator a layer; ``[R, O]``.

    ``rows_RI`` are packed rows (``ScatterRouter(result="packed")``). The modules must be alike:
    ``nn.Linear``, or ``nn.Sequential`` of ``nn.Linear``, ReLU, GELU, SiLU and Identity, without
    forward hooks. One operator of the graph of this call stands for all paths, and nothing waits
    for the loads where the kernel does not (`brt.ops.explain`). Gradients reach every module's own
    parameters.

    Weights that lie side by side in one tensor are used as they are; others are copied together,
    except for large ones on the CPU: without gradients these run one after the other.
    """
    modules = list(modules)
    if has_torch_function((rows_RI,)):
        return handle_torch_function(grouped, (rows_RI,), modules, rows_RI, route)
    if len(modules) != route.num_paths:
        raise RouteError(f"grouped: {len(modules)} modules for a route of {route.num_paths} paths")
    if not isinstance(rows_RI, Tensor):
        raise RouteError(
            "grouped: rows must be one packed tensor: ScatterRouter(..., result='packed')"
        )
    ops.same_size("grouped: rows and rows of the route", rows_RI.shape[0], route.cell_R.shape[0])
    branches = [_layers(module) for module in modules]
    kinds = [_kind(layer) for layer in branches[0]]
    for p, branch in enumerate(branches):
        if [_kind(layer) for layer in branch] != kinds:
            raise RouteError(f"grouped: module {p} has other layers than module 0; use brt.each")
    position = 0
    while position < len(kinds):
        if kinds[position] != _LINEAR:
            rows_RI = activate(rows_RI, kinds[position])
            position += 1
            continue
        following = kinds[position + 1] if position + 1 < len(kinds) else _LINEAR
        activation = "none" if following == _LINEAR else following
        linears: list[nn.Linear] = [branch[position] for branch in branches]  # type: ignore[misc]
        rows_RI = _grouped_linears(linears, rows_RI, route, activation)
        position += 1 if following == _LINEAR else 2
    return rows_RI


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a branch in order: what nested ``nn.Sequential`` hold, or the module itself."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [layer for part in module for layer in _layers(part)]
    return [module]


def _kind(layer: nn.Module) -> str:
    """`_LINEAR`, or the name of an activation; an error for what one operator cannot run."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and not hooked:
        return _LINEAR
    activation = activation_of(layer)
    if activation is None or hooked:
        raise RouteError(
            f"grouped: it takes nn.Linear, ReLU, GELU, SiLU and Identity, got "
            f"{type(layer).__name__}{' with forward hooks' if hooked else ''}; use brt.each"
        )
    return activation


def activation_of(module: nn.Module) -> str | None:
    """The name that `brt.ops.grouped_linear` has for an activation module, or None."""
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATION_OF.get(type(module))


def _grouped_linears(
    linears: Sequence[nn.Linear], rows_RI: Tensor, route: Route, activation: str
) -> Tensor:
    if _is_costly_to_stack(linears, rows_RI):
        return _one_by_one(linears, rows_RI, route, activation)
    weight_POI, bias_PO = stack_linears(linears)
    return ops.grouped_linear(rows_RI, route.offsets_P1, weight_POI, bias_PO, activation)


def _is_costly_to_stack(linears: Sequence[nn.Linear], rows_RI: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(rows_RI) is not Tensor:
        return False
    if torch.is_autocast_enabled(rows_RI.device.type):
        return False
    weights = [linear.weight for linear in linears]
    num_bytes = weights[0].numel() * weights[0].element_size()
    if rows_RI.device.type != "cpu" or num_bytes < _COSTLY_BYTES:
        return False
    return len({weight.shape for weight in weights}) == 1 and _stacked_view(weights) is None


def _one_by_one(
    linears: Sequence[nn.Linear], rows_RI: Tensor, route: Route, activation: str
) -> Tensor:
    out_RO = rows_RI.new_zeros(rows_RI.shape[0], linears[0].out_features)
    begin = int(route.offsets_P1[0])
    for linear, size in zip(linears, ops.path_sizes(route.offsets_P1), strict=True):
        if size:
            out_RO[begin : begin + size] = activate(
                linear(rows_RI[begin : begin + size]), activation
            )
        begin += size
    return out_RO


def stack_linears(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights ``[P, O, I]`` and biases ``[P, O]`` (None where there is none) of linear layers."""
    if len({tuple(linear.weight.shape) for linear in linears}) != 1:
        shapes = sorted({tuple(linear.weight.shape) for linear in linears})
        raise RouteError(f"grouped: linear layers of different shapes {shapes}; use brt.each")
    with_bias = [linear.bias is not None for linear in linears]
    if any(with_bias) and not all(with_bias):
        raise RouteError("grouped: some linear layers have a bias and some have none")
    weight = _stack([linear.weight for linear in linears])
    return weight, _stack([linear.bias for linear in linears]) if all(with_bias) else None


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    stacked = None
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        stacked = _stacked_view(tensors)
    return torch.stack(list(tensors)) if stacked is None else stacked


def _stacked_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, without a copy, where they are the parts of one tensor in order."""
    first = tensors[0]
    if any(
        type(t.data) is not Tensor or not t.is_contiguous() or t.dtype != first.dtype
        for t in tensors
    ):
        return None
    storage, begin = first.untyped_storage().data_ptr(), first.storage_offset()
    for i, tensor in enumerate(tensors):
        if (
            tensor.untyped_storage().data_ptr() != storage
            or tensor.storage_offset() != begin + i * first.numel()
        ):
            return None
    return first.detach().as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _call(module: nn.Module, path: Any) -> Any:
    return module(*path) if isinstance(path, tuple) else module(path)


def _num_rows(path: Any) -> int:
    return int((path[0] if isinstance(path, tuple) else path).shape[0])
