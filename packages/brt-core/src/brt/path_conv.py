"""The convolutions of `brt.ops.grouped_conv2d` as data: one for each path.

Legend: P paths, R rows of a path, C O channels in and out, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

CONV_ACTIVATIONS = ("none", "relu", "prelu", "sigmoid", "silu")
_NUMBERS = 6


class PathConv(NamedTuple):
    """The convolution of one path, as the six integers that the operator takes.

    ``act(conv2d(x, weight, bias, stride, padding, groups) + residual)``

    ``bias``, ``residual`` and ``slope`` are positions in the operator's list of extra tensors;
    -1 = none. A list of optional tensors would lose gradients: autograd of custom operators follows
    lists of tensors only.
    """

    bias: int = -1
    residual: int = -1
    slope: int = -1
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def out_shape(self, x_RCHW: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """``(R, O, H', W')`` of what it makes."""
        num_rows, _, height, width = x_RCHW.shape
        num_out, _, _, kernel = weight.shape
        less, stride = kernel - 2 * self.padding, self.stride
        return num_rows, num_out, (height - less) // stride + 1, (width - less) // stride + 1


def unflatten_convs(convs: Sequence[int]) -> list[PathConv]:
    """The convolutions of the flat list that the operator takes."""
    return [PathConv(*convs[i : i + _NUMBERS]) for i in range(0, len(convs), _NUMBERS)]


def extra_of(extras: Sequence[Tensor], position: int) -> Tensor | None:
    """The extra tensor at a position, None where it is -1."""
    return None if position < 0 else extras[position]


def conv_works(
    x_P: Sequence[Tensor], weight_P: Sequence[Tensor], convs: Sequence[int]
) -> Iterator[tuple[float, float]]:
    """For estimates, of each path: operations, borders included, and channels of a group.

    The channels are the geometric mean of those in and out: what the speed of a convolution
    depends on most.
    """
    settings = zip(convs[3::_NUMBERS], convs[5::_NUMBERS], strict=True)
    for x, weight, (stride, groups) in zip(x_P, weight_P, settings, strict=True):
        num_rows, _, height, width = x.shape
        num_out, num_in, _, _ = weight.shape
        flops = 2 * weight.numel() * num_rows * height * width / stride**2
        yield flops, math.sqrt(num_in * num_out / groups)


def activate_image(image: Tensor, activation: str, slope: Tensor | None = None) -> Tensor:
    """An activation by its name in `CONV_ACTIVATIONS`."""
    if activation == "relu":
        return F.relu(image)
    if activation == "prelu":
        assert slope is not None
        return F.prelu(image, slope)
    if activation == "sigmoid":
        return image.sigmoid()
    return F.silu(image) if activation == "silu" else image
