"""Calls of grouped_conv2d for tests, and what they compute in plain torch.

Legend: P paths, R rows of a path, C O channels in and out, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PathCase:
    """The sizes of one path."""

    rows: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    bias: bool = True
    residual: bool = False
    one_slope: bool = False

    def __str__(self) -> str:
        text = f"{self.rows}x{self.channels}x{self.size[0]}x{self.size[1]}to{self.out_channels}"
        text += f"k{self.kernel}s{self.stride}p{self.padding}g{self.groups}"
        return text + "b" * self.bias + "r" * self.residual

    def out_size(self) -> tuple[int, int]:
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.size)
        return height, width


def depthwise(rows: int, channels: int, size: tuple[int, int], **settings: int) -> PathCase:
    return PathCase(rows, channels, size, channels, groups=channels, **settings)


@dataclass
class Call:
    """The operator's arguments."""

    x_P: list[Tensor]
    weight_P: list[Tensor]
    extras: list[Tensor]
    convs: list[int]
    activation: str

    def args(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], str]:
        return self.x_P, self.weight_P, self.extras, self.convs, self.activation

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call of changed tensors."""
        lists = ([change(t) for t in part] for part in (self.x_P, self.weight_P, self.extras))
        return Call(*lists, self.convs, self.activation)

    def plain(self) -> list[Tensor]:
        """What it computes, by torch's convolutions."""
        made = []
        for p, (x, weight) in enumerate(zip(self.x_P, self.weight_P, strict=True)):
            bias, residual, slope, stride, padding, groups = self.convs[6 * p : 6 * p + 6]
            y = F.conv2d(
                x, weight, self.extras[bias] if bias >= 0 else None, stride, padding, 1, groups
            )
            y = y if residual < 0 else y + self.extras[residual]
            if self.activation == "relu":
                y = F.relu(y)
            elif self.activation == "prelu":
                y = F.prelu(y, self.extras[slope])
            elif self.activation == "sigmoid":
                y = y.sigmoid()
            elif self.activation == "silu":
                y = F.silu(y)
            made.append(y)
        return made


def call_of(cases: list[PathCase], activation: str = "none", seed: int = 0) -> Call:
    """Random tensors of these sizes, weights as nn.Conv2d makes them."""
    made = torch.Generator().manual_seed(seed)
    call = Call([], [], [], [], activation)

    def extra(there: bool, *shape: int) -> int:
        if not there:
            return -1
        call.extras.append(torch.randn(shape, generator=made))
        return len(call.extras) - 1

    for c in cases:
        call.x_P.append(torch.randn(c.rows, c.channels, *c.size, generator=made))
        inside = c.channels // c.groups
        weight = torch.randn(c.out_channels, inside, c.kernel, c.kernel, generator=made)
        call.weight_P.append(weight / (inside * c.kernel**2) ** 0.5)
        call.convs += [
            extra(c.bias, c.out_channels),
            extra(c.residual, c.rows, c.out_channels, *c.out_size()),
            extra(activation == "prelu", 1 if c.one_slope else c.out_channels),
            *(c.stride, c.padding, c.groups),
        ]
    return call
