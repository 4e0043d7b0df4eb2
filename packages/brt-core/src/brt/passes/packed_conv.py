"""Convolutions on a CPU whose weights are kept in the layout in which oneDNN computes.

Legend: O output channels, C H W channels, height and width, I input channels of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

# Multiply-adds up to which a 1x1 convolution is a matrix product: these take about the 20 us
# that oneDNN spends on a call before it computes. Larger ones are slower: weights are not packed
_SMALL = 2**20


@dataclass(frozen=True, eq=False)
class ConvCall:
    """A call of ``conv2d`` on a module's own weights, as a layer: ``layer(x)``."""

    owner: nn.Module
    weight_name: str
    bias_name: str | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode = "zeros"

    @classmethod
    def of(cls, node: fx.Node, scope: nn.Module) -> ConvCall | None:
        """None where the weights are not one module's parameters, or a setting is not plain."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        weight, bias = (_owned(given.get(name), scope) for name in ("weight", "bias"))
        if weight is None or (given.get("bias") is not None and bias is None):
            return None
        if bias is not None and bias[0] is not weight[0]:
            return None
        stride, padding = _pair(given.get("stride", 1)), _pair(given.get("padding", 0))
        dilation, groups = _pair(given.get("dilation", 1)), given.get("groups", 1)
        if stride is None or padding is None or dilation is None or not isinstance(groups, int):
            return None
        bias_name = None if bias is None else bias[1]
        return cls(*weight, bias_name, stride, padding, dilation, groups)

    @property
    def weight(self) -> Tensor:
        """``[O, I, H, W]``."""
        found: Tensor = getattr(self.owner, self.weight_name)
        return found

    @property
    def bias(self) -> Tensor | None:
        """``[O]``."""
        return None if self.bias_name is None else getattr(self.owner, self.bias_name)

    def __call__(self, x: Tensor) -> Tensor:
        """Rows ``[N, C, H, W]`` -> ``[N, O, H', W']``."""
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _owned(value: Any, scope: nn.Module) -> tuple[nn.Module, str] | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    path, _, name = str(value.target).rpartition(".")
    owner = scope.get_submodule(path)
    return (owner, name) if name in owner._parameters else None


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return (value[0], value[1]) if all(isinstance(v, int) for v in value) else None
    return None


def can_pack(layer: Any) -> bool:
    """Whether oneDNN takes a layer with weights in a layout of its own."""
    if not (type(layer) is nn.Conv2d or isinstance(layer, ConvCall)):
        return False
    weight = layer.weight
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.ndim != 4:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def takes_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether rows, and the weight as it is now, are such as oneDNN takes."""
    return (
        type(x) is Tensor
        and x.ndim == 4
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
    )


def is_product(layer: Any) -> bool:
    """Whether a convolution is a matrix product of its pixels: 1x1, at every pixel."""
    return (
        tuple(layer.weight.shape[2:]) == (1, 1)
        and tuple(layer.stride) == (1, 1)
        and tuple(layer.padding) == (0, 0)
        and layer.groups == 1
    )


def as_product(x: Tensor, weight: Tensor) -> Tensor | None:
    """Rows ``[N, C, H, W]`` as ``[N * H * W, C]``, where a product is faster than a convolution."""
    if x.numel() * weight.shape[0] > _SMALL:
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def pack(
    layer: Any, weight: Tensor, bias: Tensor | None, shape: Sequence[int]
) -> tuple[Tensor, ...]:
    """(weight in oneDNN's layout for inputs like this shape, bias where there is one)."""
    settings = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *settings, list(shape))
    return (packed,) if bias is None else (packed, bias)


def packed_conv(
    layer: Any, x: Tensor, packed: Tensor, bias: Tensor | None = None, *, relu: bool
) -> Tensor:
    """The layer with weights from `pack`, and ReLU in its result."""
    out: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
        x, packed, bias, layer.padding, layer.stride, layer.dilation, layer.groups,
        "relu" if relu else "none", [], "",
    )  # fmt: skip
    return out
