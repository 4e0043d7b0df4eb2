"""The encoder-decoder around the sparse layers, and greedy decoding.

Legend: B sequences, S tokens of the input, T tokens of the output, D features, V words, H heads,
K features of a head, P paths (experts).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from brt.errors import BrtError
from brt_models.switch.attention import UNSEEN, Attention, PositionBias
from brt_models.switch.config import SwitchConfig
from brt_models.switch.sparse import DenseMLP, SparseMLP


@dataclass(frozen=True, eq=False)
class Past:
    """What a decoder layer keeps of tokens it has seen; all ``[B, H, tokens, K]``.

    Attributes:
        keys, values: of the output so far.
        memory_keys, memory_values: of the encoder's output.
    """

    keys: Tensor
    values: Tensor
    memory_keys: Tensor
    memory_values: Tensor

    def longer(self, keys: Tensor, values: Tensor) -> Past:
        """With the keys and values of further tokens."""
        return replace(
            self, keys=torch.cat([self.keys, keys], 2), values=torch.cat([self.values, values], 2)
        )


class Block(nn.Module):
    """Self-attention, in the decoder attention to the encoder, and a feed-forward layer."""

    def __init__(self, config: SwitchConfig, decoder: bool, sparse: bool) -> None:
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

        self.attention_norm, self.attention = norm(), Attention(config)
        if decoder:
            self.cross_norm, self.cross = norm(), Attention(config)
        self.mlp_norm = norm()
        self.mlp: nn.Module = SparseMLP(config) if sparse else DenseMLP(config)
        self.sparse = sparse
        self.dropout = nn.Dropout(config.dropout_rate)

    def start(self, memory_BSD: Tensor) -> Past:
        """What a layer of the decoder knows before the first token."""
        keys, values = self.cross.keys_values(memory_BSD)
        return Past(keys[:, :, :0], values[:, :, :0], keys, values)

    def forward(
        self,
        x_BTD: Tensor,
        bias: Tensor,
        past: Past | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Past | None, Tensor | None]:
        """``[B, T, D]`` -> (``[B, T, D]``, past of the next token, scores of a sparse layer)."""
        normed_BTD = self.attention_norm(x_BTD)
        keys, values = self.attention.keys_values(normed_BTD)
        if past is not None:
            past = past.longer(keys, values)
            keys, values = past.keys, past.values
        x_BTD = x_BTD + self.dropout(self.attention(normed_BTD, keys, values, bias))
        if past is not None:
            read_BTD = self.cross(
                self.cross_norm(x_BTD), past.memory_keys, past.memory_values, memory_mask
            )
            x_BTD = x_BTD + self.dropout(read_BTD)
        scores_BTP = None
        out_BTD = self.mlp(self.mlp_norm(x_BTD))
        if self.sparse:
            out_BTD, scores_BTP = out_BTD
        return x_BTD + self.dropout(out_BTD), past, scores_BTP


class Stack(nn.Module):
    """The layers of the encoder, or of the decoder."""

    def __init__(self, config: SwitchConfig, decoder: bool) -> None:
        super().__init__()
        self.position = PositionBias(config, decoder)
        self.blocks = nn.ModuleList(
            Block(config, decoder, sparse) for sparse in config.sparse_layers(decoder)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def encode(self, x_BSD: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """``[B, S, D]`` -> (``[B, S, D]``, scores ``[B, S, P]`` of the sparse layers)."""
        index_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        bias = self.position(index_S, index_S).to(x_BSD.dtype)
        if mask is not None:
            bias = bias.masked_fill(~mask, UNSEEN)
        x_BSD, scores = self.dropout(x_BSD), []
        for block in self.blocks:
            x_BSD, _, scores_BSP = block(x_BSD, bias)
            scores.append(scores_BSP)
        return self.dropout(self.norm(x_BSD)), [s for s in scores if s is not None]

    def start(self, memory_BSD: Tensor) -> list[Past]:
        """What the layers of a decoder know before the first token."""
        return [block.start(memory_BSD) for block in self.blocks]  # type: ignore[operator]

    def decode(
        self, x_BTD: Tensor, pasts: list[Past], memory_mask: Tensor | None
    ) -> tuple[Tensor, list[Past], list[Tensor]]:
        """``[B, T, D]`` -> (``[B, T, D]``, pasts of the next tokens, scores of the gates)."""
        num_past = pasts[0].keys.shape[2]
        key_T = torch.arange(num_past + x_BTD.shape[1], device=x_BTD.device)
        query_T = key_T[num_past:]
        bias = self.position(query_T, key_T).to(x_BTD.dtype)
        bias = bias.masked_fill(key_T[None, :] > query_T[:, None], UNSEEN)
        x_BTD, longer, scores = self.dropout(x_BTD), [], []
        for block, past in zip(self.blocks, pasts, strict=True):
            x_BTD, past, scores_BTP = block(x_BTD, bias, past, memory_mask)
            longer.append(past)
            scores.append(scores_BTP)
        return self.dropout(self.norm(x_BTD)), longer, [s for s in scores if s is not None]


class SwitchTransformer(nn.Module):
    """Tokens in, scores of the words of the output out.

    ``forward(ids_BS, decoder_ids_BT, mask_BS=None)`` gives logits ``[B, T, V]``; a mask is 1 (or
    true) for tokens and 0 for padding, which still takes part in routing, as in the original.
    """

    def __init__(self, config: SwitchConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SwitchConfig()
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight)

    def forward(
        self, ids_BS: Tensor, decoder_ids_BT: Tensor, mask_BS: Tensor | None = None
    ) -> Tensor:
        """-> logits ``[B, T, V]``."""
        return self.with_scores(ids_BS, decoder_ids_BT, mask_BS)[0]

    def with_scores(
        self, ids_BS: Tensor, decoder_ids_BT: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(logits, scores ``[B, tokens, P]`` of every gate, the encoder's first)."""
        memory_BSD, memory_mask, scores = self.encode(ids_BS, mask_BS)
        logits_BTV, _, decoded = self.decode(
            decoder_ids_BT, self.decoder.start(memory_BSD), memory_mask
        )
        return logits_BTV, scores + decoded

    def encode(
        self, ids_BS: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """(memory ``[B, S, D]``, where there is no padding, scores of the gates)."""
        x_BSD = self.embed(ids_BS)
        mask = None if mask_BS is None else mask_BS.bool()[:, None, None]
        memory_BSD, scores = self.encoder.encode(x_BSD, mask)
        return memory_BSD, mask, scores

    def decode(
        self, ids_BT: Tensor, pasts: list[Past], memory_mask: Tensor | None
    ) -> tuple[Tensor, list[Past], list[Tensor]]:
        """(logits ``[B, T, V]`` of tokens after those of ``pasts``, their pasts, scores)."""
        x_BTD, pasts, scores = self.decoder.decode(self.embed(ids_BT), pasts, memory_mask)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x_BTD), pasts, scores
        # The embedding is of size 1, not of size D ** -0.5 as other last layers
        x_BTD = x_BTD * self.config.d_model**-0.5
        return nn.functional.linear(x_BTD, self.embed.weight), pasts, scores

    @torch.no_grad()
    def generate(
        self, ids_BS: Tensor, mask_BS: Tensor | None = None, max_new_tokens: int = 20
    ) -> Tensor:
        """The likeliest next word, again and again: int64 ``[B, 1 + words]``.

        Each sequence begins with the start token, and is padded after its end token. The words
        are fewer than ``max_new_tokens`` where all sequences end before. A step routes one token
        of each sequence, so that capacity never binds in the decoder.
        """
        if max_new_tokens < 1:
            raise BrtError(f"generate: max_new_tokens must be >= 1, got {max_new_tokens}")
        config = self.config
        memory_BSD, memory_mask, _ = self.encode(ids_BS, mask_BS)
        pasts = self.decoder.start(memory_BSD)
        token_B1 = ids_BS.new_full((ids_BS.shape[0], 1), config.decoder_start_token_id)
        ended_B1 = torch.zeros_like(token_B1, dtype=torch.bool)
        tokens = [token_B1]
        for _ in range(max_new_tokens):
            logits_B1V, pasts, _ = self.decode(token_B1, pasts, memory_mask)
            token_B1 = torch.where(ended_B1, config.pad_token_id, logits_B1V.argmax(-1))
            tokens.append(token_B1)
            ended_B1 = ended_B1 | (token_B1 == config.eos_token_id)
            if bool(ended_B1.all()):
                break
        return torch.cat(tokens, 1)


def narrow(
    num_experts: int = 8, d_model: int = 32, d_ff: int = 64, vocab_size: int = 256
) -> SwitchTransformer:
    """The layers and experts of a base model, but so narrow that it fits anywhere; in eval mode."""
    config = SwitchConfig(
        num_experts=num_experts, d_model=d_model, d_ff=d_ff, vocab_size=vocab_size,
        num_heads=4, d_kv=d_model // 4,
    )  # fmt: skip
    return SwitchTransformer(config).eval()


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up tokens: two inputs of 48 and two outputs of 16, rare words rarer."""
    generator = torch.Generator().manual_seed(seed)
    share = 1 / torch.arange(1.0, 257.0)
    drawn = torch.multinomial(share, 128, replacement=True, generator=generator)
    return drawn[:96].view(2, 48), drawn[96:].view(2, 16)
