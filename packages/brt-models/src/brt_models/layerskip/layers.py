"""A Llama's layers, whose keys and values may be kept.

Legend: B sequences, S tokens of one, R sequences of a call, T places of a cache, D features,
A heads, G key-value heads, K features of a head, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt_models.layerskip.config import LayerSkipConfig


@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, written in place.

    Attributes:
        key_LBGTK, value_LBGTK: of each place; what lies behind a token is not seen.
    """

    key_LBGTK: Tensor
    value_LBGTK: Tensor

    @classmethod
    def empty(cls, config: LayerSkipConfig, num_sequences: int, num_places: int,
              like: Tensor) -> Cache:  # fmt: skip
        """Room for so many tokens of each sequence."""
        shape = (config.num_hidden_layers, num_sequences, config.num_key_value_heads, num_places,
                 config.head_dim)  # fmt: skip
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def write(self, layer: int, row_R: Tensor, position_RS: Tensor, key_RGSK: Tensor,
              value_RGSK: Tensor) -> None:  # fmt: skip
        """Keep keys and values of tokens of some sequences."""
        where = (row_R[:, None], slice(None), position_RS)
        self.key_LBGTK[layer][where] = key_RGSK.transpose(1, 2)
        self.value_LBGTK[layer][where] = value_RGSK.transpose(1, 2)

    def read(self, layer: int, row_R: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, G, T, K]`` of some sequences; a view where they are all."""
        key_BGTK, value_BGTK = self.key_LBGTK[layer], self.value_LBGTK[layer]
        if len(row_R) == len(key_BGTK):
            return key_BGTK, value_BGTK
        return key_BGTK[row_R], value_BGTK[row_R]


class Attention(nn.Module):
    """Heads in groups that share keys and values."""

    def __init__(self, config: LayerSkipConfig) -> None:
        super().__init__()
        self.config = config
        dim, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(dim, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(dim, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(dim, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, dim, bias=False)

    def keys_values(self, x_RSD: Tensor, position_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Both ``[R, G, S, K]``."""
        key = turned(self._heads(self.k_proj(x_RSD)), position_RS, self.config)
        return key, self._heads(self.v_proj(x_RSD))

    def forward(
        self, x_RSD: Tensor, position_RS: Tensor, key_RGTK: Tensor, value_RGTK: Tensor
    ) -> Tensor:
        """What tokens read from places up to their own."""
        query_RASK = turned(self._heads(self.q_proj(x_RSD)), position_RS, self.config)
        place_T = torch.arange(key_RGTK.shape[2], device=x_RSD.device)
        seen_R1ST = (place_T <= position_RS[:, :, None])[:, None]
        read_RASK = F.scaled_dot_product_attention(
            query_RASK, key_RGTK, value_RGTK, attn_mask=seen_R1ST, enable_gqa=True
        )
        return self.o_proj(read_RASK.transpose(1, 2).flatten(2))

    def _heads(self, x_RSD: Tensor) -> Tensor:
        return x_RSD.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """A gated MLP."""

    def __init__(self, config: LayerSkipConfig) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_RSD: Tensor) -> Tensor:
        """The same shape."""
        return self.down_proj(F.silu(self.gate_proj(x_RSD)) * self.up_proj(x_RSD))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: LayerSkipConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_RSD: Tensor, position_RS: Tensor, cache: Cache | None = None,
        row_R: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Tokens of some sequences -> the same shape.

        They see each other, or, with a cache, all that it has of the sequences ``row_R``; it then
        keeps theirs.
        """
        normed_RSD = self.input_layernorm(x_RSD)
        keys, values = self.self_attn.keys_values(normed_RSD, position_RS)
        if cache is not None:
            assert row_R is not None
            cache.write(self.index, row_R, position_RS, keys, values)
            keys, values = cache.read(self.index, row_R)
        x_RSD = x_RSD + self.self_attn(normed_RSD, position_RS, keys, values)
        return x_RSD + self.mlp(self.post_attention_layernorm(x_RSD))

    def keep(self, x_RD: Tensor, position_R: Tensor, cache: Cache, row_R: Tensor) -> None:
        """Keep keys and values of a token that this layer does not run for."""
        normed_RSD = self.input_layernorm(x_RD)[:, None]
        position_RS = position_R[:, None]
        cache.write(
            self.index, row_R, position_RS, *self.self_attn.keys_values(normed_RSD, position_RS)
        )


def turned(x_RASK: Tensor, position_RS: Tensor, config: LayerSkipConfig) -> Tensor:
    """Queries or keys turned by their positions: Su et al. 2021, RoFormer, arXiv:2104.09864."""
    half = config.head_dim // 2
    pair_K = torch.arange(half, device=x_RASK.device, dtype=torch.float32)
    speed_K = config.rope_theta ** (-pair_K / half)
    if config.rope_llama3 is not None:
        speed_K = _stretched(speed_K, *config.rope_llama3)
    angle_RSK = position_RS[:, :, None] * speed_K
    cos, sin = (f[:, None].to(x_RASK.dtype) for f in (angle_RSK.cos(), angle_RSK.sin()))
    first, second = x_RASK.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _stretched(speed_K: Tensor, factor: float, low: float, high: float, before: int) -> Tensor:
    """Slow turns slower by a factor, fast ones as they are, and those between in between.

    Source: Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv:2407.21783, section 3.4.1.
    """
    wave_K = 2 * math.pi / speed_K
    share_K = ((before / wave_K - low) / (high - low)).clamp(0, 1)
    return share_K * speed_K + (1 - share_K) * speed_K / factor
