"""Greedy decoding with a LoopRouter: sequences leave the batch as they end.

Each sequence is a cell. Its tokens and its keys and values are state that travels with it, so the
attention only ever runs over sequences that are still being written.

Legend: N sequences, L positions, D features, V words of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import brt

EOS, PAD = 0, 1
State = tuple[Tensor, Tensor, Tensor, Tensor]  # tokens_NL, length_N, keys_NLD, values_NLD


class Decoder(nn.Module):
    """One layer of causal attention with a cache of keys and values."""

    def __init__(self, num_words: int = 12, dim: int = 16, max_length: int = 24) -> None:
        super().__init__()
        self.max_length = max_length
        self.embed = nn.Embedding(num_words, dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.head = nn.Linear(dim, num_words)
        with torch.no_grad():
            self.head.bias[PAD] = float("-inf")  # never written

    def start(self, prompt_N: Tensor) -> State:
        """The state of sequences of one token each."""
        num, dim = prompt_N.shape[0], self.head.in_features
        tokens_NL = prompt_N.new_full((num, self.max_length), PAD)
        tokens_NL[:, 0] = prompt_N
        cache = self.head.weight.new_zeros(num, self.max_length, dim)
        return tokens_NL, torch.ones_like(prompt_N), cache, cache.clone()

    def logits(self, token_N: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """(logits of the next token, keys, values) for the last token of each sequence."""
        _, length_N, keys_NLD, values_NLD = state
        x_ND = self.embed(token_N)
        here_NL = torch.arange(self.max_length, device=token_N.device) == length_N[:, None] - 1
        keys_NLD = torch.where(here_NL[:, :, None], self.key(x_ND)[:, None], keys_NLD)
        values_NLD = torch.where(here_NL[:, :, None], self.value(x_ND)[:, None], values_NLD)
        score_NL = (keys_NLD @ self.query(x_ND)[:, :, None]).squeeze(2)
        past_NL = torch.arange(self.max_length, device=token_N.device) < length_N[:, None]
        share_NL = score_NL.masked_fill(~past_NL, float("-inf")).softmax(1)
        read_ND = (share_NL[:, None] @ values_NLD).squeeze(1)
        return self.head(x_ND + read_ND), keys_NLD, values_NLD


class WriteOne(nn.Module):
    """The loop's netlet: appends the likeliest next token to every sequence."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, token_N: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        logits_NV, keys_NLD, values_NLD = self.decoder.logits(token_N, state)
        token_N = logits_NV.argmax(1)
        tokens_NL, length_N, _, _ = state
        # Compiled, the netlet also meets sequences that have ended: stay inside their buffers
        index_N1 = length_N.clamp(max=self.decoder.max_length - 1)[:, None]
        tokens_NL = tokens_NL.scatter(1, index_N1, token_N[:, None])
        # GreedyDecoding decides from the token itself
        return token_N, token_N, (tokens_NL, length_N + 1, keys_NLD, values_NLD)


class Greedy(nn.Module):
    """Writes on from one token a sequence: (tokens, padded; how many they are)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.loop = brt.LoopRouter(
            WriteOne(decoder),
            max_steps=decoder.max_length - 1,
            protocol=brt.protocols.GreedyDecoding(eos=EOS),
        )

    def forward(self, prompt_N: Tensor) -> tuple[Tensor, Tensor]:
        _, (tokens_NL, length_N, _, _) = self.loop(prompt_N, self.decoder.start(prompt_N))
        return tokens_NL, length_N


def main() -> None:
    torch.manual_seed(34)
    write = Greedy(Decoder()).eval()
    with torch.no_grad():
        tokens_NL, length_N = write(torch.arange(2, 12))
    for tokens, length in zip(tokens_NL.tolist(), length_N.tolist(), strict=True):
        print(f"{length:2d} tokens: {' '.join(map(str, tokens[:length]))}")


if __name__ == "__main__":
    main()
