"""T5's attention: no scale, and a learned bias for how far apart two tokens are.

Legend: B sequences, S queries, T keys, H heads, K features of a head, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt_models.switch.config import SwitchConfig

UNSEEN = -3e4
"""Added to scores of what may not be seen: nothing is left of it, and float16 can hold it."""


class Attention(nn.Module):
    """Queries of one sequence look at keys of the same or another; both are made apart.

    So keys of past tokens, and of the encoder, are made once.
    """

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads, self.d_kv = config.num_heads, config.d_kv
        self.dropout = config.dropout_rate
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        nn.init.normal_(self.k.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.v.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def keys_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> keys and values ``[B, H, T, K]``."""
        return self._heads(self.k(x_BTD)), self._heads(self.v(x_BTD))

    def forward(
        self, x_BSD: Tensor, keys_BHTK: Tensor, values_BHTK: Tensor, bias_BHST: Tensor | None
    ) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``; a bias is added to the scores, or a mask is true."""
        read_BHSK = F.scaled_dot_product_attention(
            self._heads(self.q(x_BSD)),
            keys_BHTK,
            values_BHTK,
            attn_mask=bias_BHST,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        return self.o(read_BHSK.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(2, (self.num_heads, self.d_kv)).transpose(1, 2)


class PositionBias(nn.Module):
    """A number for each head and bucket of distances; all layers of a stack add the same."""

    def __init__(self, config: SwitchConfig, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.embed = nn.Embedding(self.num_buckets, config.num_heads)
        nn.init.normal_(self.embed.weight, std=config.d_model**-0.5)

    def forward(self, query_S: Tensor, key_T: Tensor) -> Tensor:
        """Positions of queries and of keys -> ``[1, H, S, T]``."""
        bucket_ST = position_bucket(
            key_T[None, :] - query_S[:, None], not self.decoder, self.num_buckets, self.max_distance
        )
        return self.embed(bucket_ST).permute(2, 0, 1)[None]


def position_bucket(
    distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """The bucket of each distance (key minus query), int64: Raffel et al. 2019, section 2.1.

    Half of the buckets hold one distance each, the others ever more, up to ``max_distance``; the
    last one all beyond. Both directions have half of the buckets each, where both are looked at.
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    share = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    # Distances that have a bucket of their own may be 0, whose logarithm is not taken
    coarse = exact + (share.clamp(min=0) * (num_buckets - exact)).long()
    return first + torch.where(distance < exact, distance, coarse.clamp(max=num_buckets - 1))
