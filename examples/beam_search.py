"""Beam search with a LoopRouter: a cell is a sequence with all its beams.

The beams of one sequence compete with each other, so they are dims of the cell; sequences know
nothing of each other, and leave the batch when their best beam has ended.

Legend: N sequences, B beams, L positions, V words of the vocabulary.
"""

from __future__ import annotations

import torch
from greedy_decoding import EOS, Decoder
from torch import Tensor, nn

import brt

State = tuple[Tensor, ...]


class WidenAndKeep(nn.Module):
    """The loop's netlet: tries every next token of every beam and keeps the B likeliest."""

    def __init__(self, decoder: Decoder, num_beams: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_beams = num_beams

    def forward(self, score_NB: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        num, beams, length = score_NB.shape[0], self.num_beams, self.decoder.max_length
        token_NB, tokens_NBL, length_NB, *caches = state
        flat = [t.flatten(0, 1) for t in (tokens_NBL, length_NB, *caches)]
        logits, keys, values = self.decoder.logits(token_NB.flatten(), tuple(flat))
        gain_NBV = logits.float().log_softmax(1).view(num, beams, -1)
        num_words = gain_NBV.shape[2]

        # A beam that has ended is kept as it is: one way to go on, at no cost
        ended_NB = token_NB == EOS
        stay_V = torch.full((num_words,), float("-inf"), device=score_NB.device)
        stay_V[EOS] = 0.0
        gain_NBV = torch.where(ended_NB[:, :, None], stay_V, gain_NBV)
        best = (score_NB[:, :, None] + gain_NBV).flatten(1).topk(beams, dim=1)
        score_NB, parent_NB = best.values, best.indices // num_words
        token_NB = best.indices % num_words

        def of_parent(t: Tensor) -> Tensor:
            index = parent_NB.view(num, beams, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])
            return t.gather(1, index)

        ended_NB, length_NB, tokens_NBL = map(of_parent, (ended_NB, length_NB, tokens_NBL))
        keys_NBLD, values_NBLD = (of_parent(t.view(num, beams, length, -1)) for t in (keys, values))
        index_NB1 = length_NB.clamp(max=length - 1)[:, :, None]
        written_NBL = tokens_NBL.scatter(2, index_NB1, token_NB[:, :, None])
        tokens_NBL = torch.where(ended_NB[:, :, None], tokens_NBL, written_NBL)
        length_NB = torch.where(ended_NB, length_NB, length_NB + 1)

        # Beams are in order of score, and scores only fall: an ended first beam cannot be beaten
        finished_N = (token_NB[:, 0] == EOS).long()
        return score_NB, finished_N, (token_NB, tokens_NBL, length_NB, keys_NBLD, values_NBLD)


class BeamSearch(nn.Module):
    """Writes on from one token a sequence: (tokens of its best beam, their number, log p)."""

    def __init__(self, decoder: Decoder, num_beams: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_beams = num_beams
        self.loop = brt.LoopRouter(
            WidenAndKeep(decoder, num_beams),
            max_steps=decoder.max_length - 1,
            protocol=brt.protocols.Label(),
        )

    def forward(self, prompt_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens_NL, length_N, keys_NLD, values_NLD = self.decoder.start(prompt_N)
        state = tuple(
            t[:, None].expand(-1, self.num_beams, *t.shape[1:])
            for t in (prompt_N, tokens_NL, length_N, keys_NLD, values_NLD)
        )
        # All beams start alike: only the first one counts in the first step
        score_NB = keys_NLD.new_full((prompt_N.shape[0], self.num_beams), float("-inf"))
        score_NB[:, 0] = 0.0
        score_NB, (_, tokens_NBL, length_NB, _, _) = self.loop(score_NB, state)
        return tokens_NBL[:, 0], length_NB[:, 0], score_NB[:, 0]


def main() -> None:
    torch.manual_seed(34)
    decoder = Decoder().eval()
    for num_beams in (1, 4):
        with torch.no_grad():
            tokens_NL, length_N, score_N = BeamSearch(decoder, num_beams)(torch.arange(2, 12))
        print(f"{num_beams} beams, mean log probability {score_N.mean():.2f}")
        for tokens, length in zip(tokens_NL.tolist(), length_N.tolist(), strict=True):
            print(f"  {' '.join(map(str, tokens[:length]))}")


if __name__ == "__main__":
    main()
