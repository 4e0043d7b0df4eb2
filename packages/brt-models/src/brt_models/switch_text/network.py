"""The network: the layers of a Switch Transformer's encoder, each token seeing those before it.

Legend: B sequences, S bytes (tokens) of one, D features, V byte values, P paths (experts).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from brt.errors import BrtError
from brt_models import english
from brt_models.switch.attention import UNSEEN, PositionBias
from brt_models.switch.config import SwitchConfig
from brt_models.switch.network import Block

NUM_BYTES = 256


class SwitchText(nn.Module):
    """Bytes [B, S] -> scores [B, S, V] of the byte behind each.

    No expert has a capacity, so that a byte's scores depend on the bytes before it only. With
    ``num_experts=1`` it is the dense model that spends as much on a byte, but for the gate.
    """

    def __init__(self, config: SwitchConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or small_config()
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.position = PositionBias(config, decoder=True)
        self.blocks = nn.ModuleList(
            Block(config, decoder=False, sparse=sparse) for sparse in config.sparse_layers(True)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        nn.init.normal_(self.embed.weight, std=config.d_model**-0.5)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """[B, S] -> [B, S, V]."""
        return self.with_scores(ids_BS)[0]

    def with_scores(self, ids_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits [B, S, V], scores [B, S, P] of the gate of each sparse layer)."""
        x_BSD = self.dropout(self.embed(ids_BS))
        index_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        bias = self.position(index_S, index_S).to(x_BSD.dtype)
        bias = bias.masked_fill(index_S[None, :] > index_S[:, None], UNSEEN)
        scores = []
        for block in self.blocks:
            x_BSD, _, scores_BSP = block(x_BSD, bias)
            scores.append(scores_BSP)
        x_BSD = self.dropout(self.norm(x_BSD))
        logits_BSV = nn.functional.linear(x_BSD, self.embed.weight)
        return logits_BSV, [s for s in scores if s is not None]

    @torch.no_grad()
    def generate(
        self,
        ids_BS: Tensor,
        num_bytes: int,
        *,
        temperature: float = 0.7,
        window: int = 256,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """[B, S] -> [B, S + num_bytes], each byte drawn; temperature 0 takes the likeliest.

        Only the last ``window`` bytes are looked at, which is what the model was trained on.
        """
        if ids_BS.shape[1] < 1 or num_bytes < 0 or temperature < 0:
            raise BrtError(
                "generate: the prompt needs a byte, num_bytes and temperature must be >= 0; got "
                f"{ids_BS.shape[1]}, {num_bytes} and {temperature}"
            )
        for _ in range(num_bytes):
            logits_BV = self(ids_BS[:, -window:])[:, -1]
            if temperature:
                share_BV = (logits_BV / temperature).softmax(-1)
                next_B1 = torch.multinomial(share_BV, 1, generator=generator)
            else:
                next_B1 = logits_BV.argmax(-1, keepdim=True)
            ids_BS = torch.cat([ids_BS, next_B1], 1)
        return ids_BS


def small_config(num_experts: int = 8) -> SwitchConfig:
    """The shape of the shipped model: four layers, the second and the fourth of them sparse."""
    return SwitchConfig(
        vocab_size=NUM_BYTES, d_model=128, d_kv=32, d_ff=256, num_heads=4, num_layers=4,
        num_decoder_layers=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
        num_experts=num_experts, expert_capacity=None, router_aux_loss_coef=0.01, dropout_rate=0.0,
        relative_attention_num_buckets=64, relative_attention_max_distance=256,
    )  # fmt: skip


def narrow(num_experts: int = 4) -> SwitchText:
    """A narrower model with random weights, in eval mode."""
    config = replace(small_config(num_experts), d_model=32, d_kv=8, d_ff=64)
    return SwitchText(config).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """Four pieces of 64 bytes of English."""
    ids_S = english.ids("validation")
    generator = torch.Generator().manual_seed(seed)
    start_B = torch.randint(len(ids_S) - 64, (4,), generator=generator)
    return (torch.stack([ids_S[start : start + 64] for start in start_B.tolist()]),)
