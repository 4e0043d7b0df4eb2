"""Layers of torch.nn that keep every row by itself, and the shape of what they give.

To follow cells through a convolution operator by operator takes milliseconds, and a network has
hundreds. What is not known here for certain is followed (`DryRun.call`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus),
)
"""Layers that treat every element by itself, whatever the shape."""

Shape = tuple[int, ...]
"""All sizes but the number of rows."""


def shape_of(layer: nn.Module, x: Tensor) -> Shape | None:
    """The trailing sizes of what a layer gives for rows like ``x``; None where it is not known.

    Where it is, each row comes from the row at its place alone, and the result is contiguous and
    otherwise like ``x``.
    """
    sizes = tuple(x.shape[1:])
    if not isinstance(x.shape[0], torch.SymInt) or not all(type(size) is int for size in sizes):
        return None
    if torch.is_autocast_enabled(x.device.type) or _has_any_global_hook():
        return None
    return _through(layer, x, sizes) if x.is_floating_point() and x.is_contiguous() else None


def _through(layer: nn.Module, x: Tensor, sizes: Shape) -> Shape | None:
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return None
    if type(layer) is nn.Sequential:
        found: Shape | None = sizes
        for inner in layer:
            found = None if found is None else _through(inner, x, found)
        return found
    rule = _RULES.get(type(layer))
    if rule is None or not all(_is_plain(tensor, x) for tensor in _tensors(layer)):
        return None
    found = rule(layer, sizes)
    return None if found is None or min(found, default=1) < 1 else found


def _tensors(layer: nn.Module) -> list[Tensor]:
    held = (*layer._parameters.values(), *layer._buffers.values())
    return [tensor for tensor in held if tensor is not None and tensor.is_floating_point()]


def _is_plain(tensor: Tensor, x: Tensor) -> bool:
    """Whether a weight is an ordinary one that goes with ``x``."""
    alike = tensor.dtype == x.dtype and tensor.device == x.device
    return alike and type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()


def _same(layer: Any, sizes: Shape) -> Shape | None:
    return sizes


def _dropout(layer: _DropoutNd, sizes: Shape) -> Shape | None:
    return None if layer.training else sizes


def _batch_norm(num_dims: tuple[int, ...]) -> Callable[[Any, Shape], Shape | None]:
    def rule(layer: _BatchNorm, sizes: Shape) -> Shape | None:
        fits = len(sizes) in num_dims and sizes[0] == layer.num_features
        return sizes if fits and not layer.training and layer.running_mean is not None else None

    return rule


def _layer_norm(layer: nn.LayerNorm, sizes: Shape) -> Shape | None:
    return sizes if sizes[-len(layer.normalized_shape) :] == layer.normalized_shape else None


def _linear(layer: nn.Linear, sizes: Shape) -> Shape | None:
    return (*sizes[:-1], layer.out_features) if sizes[-1:] == (layer.in_features,) else None


def _flatten(layer: nn.Flatten, sizes: Shape) -> Shape | None:
    return (math.prod(sizes),) if sizes and (layer.start_dim, layer.end_dim) == (1, -1) else None


def _convolution(layer: _ConvNd, sizes: Shape) -> Shape | None:
    fits = len(sizes) == len(layer.kernel_size) + 1 and sizes[0] == layer.in_channels
    if not fits or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    places = _places(sizes[1:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (layer.out_channels, *places)


def _max_pool(layer: nn.MaxPool2d, sizes: Shape) -> Shape | None:
    if len(sizes) != 3 or layer.ceil_mode or layer.return_indices:
        return None
    given = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding, layer.dilation))
    return (sizes[0], *_places(sizes[1:], *given))


def _average_pool(layer: nn.AvgPool2d, sizes: Shape) -> Shape | None:
    if len(sizes) != 3 or layer.ceil_mode:
        return None
    given = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding, 1))
    return (sizes[0], *_places(sizes[1:], *given))


def _adaptive_pool(layer: nn.AdaptiveAvgPool2d, sizes: Shape) -> Shape | None:
    if len(sizes) != 3:
        return None
    wanted = _pair(layer.output_size)
    places = [old if new is None else new for old, new in zip(sizes[1:], wanted, strict=True)]
    return (sizes[0], *places)


def _pair(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given, given)


def _places(sizes: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Shape:
    """How often a window fits, in each dim."""
    each = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in each)


_RULES: dict[type[nn.Module], Callable[[Any, Shape], Shape | None]] = {
    **dict.fromkeys(ELEMENTWISE, _same),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    nn.BatchNorm1d: _batch_norm((1, 2)),
    nn.BatchNorm2d: _batch_norm((3,)),
    nn.BatchNorm3d: _batch_norm((4,)),
    nn.LayerNorm: _layer_norm,
    nn.Linear: _linear,
    nn.Flatten: _flatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
}
