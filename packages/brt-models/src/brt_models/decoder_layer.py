"""One layer of a decoder that works on any set of tokens, wherever they stand.

Legend: G groups of M tokens, D model and H hidden features, A heads of K features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10_000.0


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each behind a norm, with rotary positions (Llama's layer)."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(
        self, x_GMD: Tensor, position_GM: Tensor, sequence_GM: Tensor | None = None
    ) -> Tensor:
        """``[G, M, D]`` and positions ``[G, M]`` or ``[1, M]`` -> ``[G, M, D]``; see `update`."""
        return x_GMD + self.update(x_GMD, position_GM, sequence_GM)

    def update(
        self, x_GMD: Tensor, position_GM: Tensor, sequence_GM: Tensor | None = None
    ) -> Tensor:
        """What the layer adds to its tokens.

        A token sees those of its group that do not come after it; where ``sequence_GM`` is given,
        only those of its sequence.
        """
        q, k, v = self.qkv(self.attention_norm(x_GMD)).chunk(3, -1)
        q_GAMK, k_GAMK = (rotated(self._heads(x), position_GM) for x in (q, k))
        seen_GMM = position_GM[:, :, None] >= position_GM[:, None, :]
        if sequence_GM is not None:
            seen_GMM = seen_GMM & (sequence_GM[:, :, None] == sequence_GM[:, None, :])
        read_GAMK = F.scaled_dot_product_attention(
            q_GAMK, k_GAMK, self._heads(v), attn_mask=seen_GMM[:, None]
        )
        read_GMD = self.out(read_GAMK.transpose(1, 2).flatten(2))
        gate_GMH, up_GMH = self.up(self.mlp_norm(x_GMD + read_GMD)).chunk(2, -1)
        return read_GMD + self.down(F.silu(gate_GMH) * up_GMH)

    def _heads(self, x_GMD: Tensor) -> Tensor:
        return x_GMD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def rotated(x_GAMK: Tensor, position_GM: Tensor) -> Tensor:
    """Queries or keys turned by their positions: Su et al. 2021, RoFormer, arXiv:2104.09864."""
    half = x_GAMK.shape[-1] // 2
    pair_K = torch.arange(half, device=x_GAMK.device, dtype=torch.float32)
    angle_GMK = position_GM[:, :, None] * ROTARY_BASE ** (-pair_K / half)
    cos, sin = (f[:, None].to(x_GAMK.dtype) for f in (angle_GMK.cos(), angle_GMK.sin()))
    first, second = x_GAMK.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def positions(x_BS: Tensor) -> Tensor:
    """0, 1, 2, ... for all sequences, int64 ``[1, S]``."""
    return torch.arange(x_BS.shape[1], device=x_BS.device)[None]


def drawn_ids(num_words: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Made-up tokens, rare ones rarer, int64 of a shape."""
    generator = torch.Generator().manual_seed(seed)
    share = 1 / torch.arange(1.0, num_words + 1)
    drawn = torch.multinomial(share, shape[0] * shape[1], replacement=True, generator=generator)
    return drawn.view(shape)
