"""Conv chains for tests: branches as lists of steps, and what they compute in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class ChainBuilder:
    """Collects parameters and steps of several branches."""

    seed: int = 0
    params: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        self.made = torch.Generator().manual_seed(self.seed)

    def param(self, *shape: int, bound: float = 1.0) -> int:
        self.params.append((torch.rand(shape, generator=self.made) * 2 - 1) * bound)
        return len(self.params) - 1

    def conv(
        self,
        src: int,
        dst: int,
        channels: tuple[int, int],
        *,
        kernel: int = 3,
        add: int = -1,
        bias: bool = True,
        act: int = 0,
        post: int = 0,
        shuffle: int = 1,
        scale: float = 1.0,
        slopes: int = 1,
    ) -> None:
        """A step with random weights as nn.Conv2d makes them."""
        num_in, num_out = channels
        bound = (num_in * kernel**2) ** -0.5
        weight = self.param(num_out, num_in, kernel, kernel, bound=bound)
        bias_at = self.param(num_out, bound=bound) if bias else -1
        slope_at = self.param(slopes) if act == 2 else -1
        self.steps += [src, dst, add, weight, bias_at, slope_at, act, post, shuffle]
        self.scales.append(scale)

    def end_branch(self) -> None:
        self.offsets.append(len(self.scales))

    def residual_branch(self, width: int, blocks: int, *, scale: float = 1.0) -> None:
        """Head, residual blocks and a progressive upsampler times 4, as LiveSR has them."""
        self.conv(0, 1, (3, width))
        self.blocks(width, blocks, scale=scale)
        self.conv(1, 3, (width, width))
        self.conv(3, 4, (width, 4 * width), shuffle=2)
        self.conv(4, 5, (width, 4 * width), shuffle=2)
        self.conv(5, 6, (width, 3))
        self.end_branch()

    def blocks(self, width: int, blocks: int, *, scale: float = 1.0) -> None:
        for _ in range(blocks):
            self.conv(1, 2, (width, width), act=1)
            self.conv(2, 1, (width, width), add=1, scale=scale)

    def args(self) -> tuple[list[Tensor], list[int], list[int], list[float]]:
        return self.params, self.steps, self.offsets, self.scales


def plain_chain(
    x: Tensor,
    offsets: list[int],
    params: list[Tensor],
    steps: list[int],
    step_offsets: list[int],
    scales: list[float],
) -> Tensor:
    """What conv_chain computes, by torch's convolutions."""
    parts = []
    for p, (begin, end) in enumerate(pairwise(offsets)):
        registers = {0: x[begin:end]}
        for i in range(step_offsets[p], step_offsets[p + 1]):
            src, dst, add, weight, bias, slope, act, post, shuffle = steps[9 * i : 9 * (i + 1)]
            w = params[weight]
            y = F.conv2d(
                registers[src], w, None if bias < 0 else params[bias], padding=w.shape[2] // 2
            )
            if act:
                y = F.relu(y) if act == 1 else F.prelu(y, params[slope])
            y = y * scales[i]
            if add >= 0:
                y = y + registers[add]
            if post:
                y = F.relu(y)
            registers[dst] = F.pixel_shuffle(y, shuffle)
        parts.append(registers[dst])
    parts.append(parts[0].new_zeros(x.shape[0] - offsets[-1], *parts[0].shape[1:]))
    return torch.cat(parts)
