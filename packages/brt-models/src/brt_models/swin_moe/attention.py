"""Attention in windows, shifted in every other block.

Legend: B images, L tokens of one, W windows of one, M tokens of a window, C features, A heads,
K features of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_TEMPERATURE = 0.01
_LARGEST_BIAS = 16.0


class WindowAttention(nn.Module):
    """Attention among the tokens of each window, with a bias that a small network makes."""

    relative_coords_table: Tensor
    relative_position_index: Tensor
    scale: float | None = None
    """What scores are multiplied by; None: one over the root of K."""

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False)
        )
        self.register_buffer("relative_coords_table", coordinates(window))
        self.register_buffer("relative_position_index", offsets(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self) -> Tensor:
        """What is added to the score of two tokens by their places, [A, M, M]."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return table[self.relative_position_index].permute(2, 0, 1)

    def heads(self, x_BWMC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, W, A, M, K] each."""
        qkv = self.qkv(x_BWMC).unflatten(3, (3, self.num_heads, -1))
        q_BWAMK, k_BWAMK, v_BWAMK = (qkv[:, :, :, i].transpose(2, 3) for i in range(3))
        return q_BWAMK, k_BWAMK, v_BWAMK

    def forward(self, x_BWMC: Tensor, mask_WMM: Tensor | None) -> Tensor:
        """[B, W, M, C] -> the same shape."""
        bias = self.bias()
        if mask_WMM is not None:
            bias = bias + mask_WMM[:, None]
        q_BWAMK, k_BWAMK, v_BWAMK = self.heads(x_BWMC)
        out = F.scaled_dot_product_attention(
            q_BWAMK, k_BWAMK, v_BWAMK, attn_mask=bias.to(q_BWAMK.dtype), scale=self.scale
        )
        return self.proj(out.transpose(2, 3).flatten(3))


class CosineAttention(WindowAttention):
    """That of Swin V2: scores are cosines over a learned temperature, biases are 0 to 16.

    Source: Liu et al. 2022, arXiv:2111.09883, section 3.2.
    """

    scale = 1.0

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__(dim, window, num_heads)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def bias(self) -> Tensor:
        """What is added to the score of two tokens by their places, [A, M, M]."""
        return _LARGEST_BIAS * super().bias().sigmoid()

    def heads(self, x_BWMC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the length that the temperature says, keys of length 1, values."""
        q_BWAMK, k_BWAMK, v_BWAMK = super().heads(x_BWMC)
        # What belongs to a head: [A, 1, K]
        q_AMK, v_AMK = (b.view(self.num_heads, 1, -1) for b in (self.q_bias, self.v_bias))
        largest = -math.log(LEAST_TEMPERATURE)
        q_BWAMK = F.normalize(q_BWAMK + q_AMK, dim=-1) * self.logit_scale.clamp(max=largest).exp()
        return q_BWAMK, F.normalize(k_BWAMK, dim=-1), v_BWAMK + v_AMK


def coordinates(window: int) -> Tensor:
    """The offset of every pair of places, on a logarithmic scale, [1, 2w - 1, 2w - 1, 2]."""
    steps = torch.arange(1 - window, window, dtype=torch.float32)
    table = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)[None]
    table = 8 * table / max(window - 1, 1)
    return table.sign() * torch.log2(table.abs() + 1) / math.log2(8)


def offsets(window: int) -> Tensor:
    """The row of the flat table of coordinates that each pair of tokens has, [M, M]."""
    place = torch.arange(window)
    y_M, x_M = place.repeat_interleave(window), place.repeat(window)
    dy, dx = y_M[:, None] - y_M, x_M[:, None] - x_M
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """-100 for tokens of a window that the shift brought together from opposite borders."""
    region = torch.zeros(side)
    region[-window:] = 1
    region[-shift:] = 2
    both = to_windows((3 * region[:, None] + region).view(1, -1, 1), side, window)[0, :, :, 0]
    return torch.where(both[:, :, None] == both[:, None, :], 0.0, -100.0)


def to_windows(x_BLC: Tensor, side: int, window: int, shift: int = 0) -> Tensor:
    """[B, L, C] -> [B, W, M, C], moved up and left by ``shift`` before."""
    x = x_BLC.unflatten(1, (side, side))
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    count = side // window
    x = x.unflatten(1, (count, window)).unflatten(3, (count, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x_BWMC: Tensor, side: int, window: int, shift: int = 0) -> Tensor:
    """The way back."""
    count = side // window
    x = x_BWMC.unflatten(1, (count, count)).unflatten(3, (window, window))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return x.flatten(1, 2)
