"""Mixture-of-Depths: a layer takes only some tokens of a sequence, the others pass it by.

In training a routed layer takes the share of a sequence's tokens that its gate scores highest
(expert choice). That looks at later tokens, which a decoder that writes cannot; so a small
predictor learns, beside, which tokens those are, and decides in evaluation, token by token.

Raposo et al. 2024, Mixture-of-Depths: Dynamically allocating compute in transformer-based language
models, arXiv:2404.02258; the predictor is section 3.5.

Legend: B sequences, S tokens of one, R routed tokens, G groups of M tokens, D features, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt.errors import BrtError
from brt.protocols import ExpertChoice, Threshold
from brt_models.decoder_layer import DecoderLayer, drawn_ids, positions


@dataclass(frozen=True)
class MixtureOfDepthsConfig:
    """Shape of the decoder.

    Attributes:
        capacity: share of a sequence's tokens that a routed layer takes in training.
        every: layer i is routed where ``i % every == every - 1``; 1 routes all.
        predictor_hidden: features of the predictor's hidden layer.
    """

    num_words: int = 256
    dim: int = 64
    hidden: int = 128
    num_layers: int = 4
    num_heads: int = 4
    capacity: float = 0.125
    every: int = 2
    predictor_hidden: int = 32

    def __post_init__(self) -> None:
        sizes = (self.num_words, self.dim, self.hidden, self.num_layers, self.num_heads,
                 self.every, self.predictor_hidden)  # fmt: skip
        if min(sizes) < 1:
            raise BrtError(f"MixtureOfDepthsConfig: all sizes must be >= 1, got {self}")
        if self.dim % (2 * self.num_heads):
            raise BrtError(
                f"MixtureOfDepthsConfig: dim={self.dim} must be a multiple of twice "
                f"num_heads={self.num_heads}"
            )
        if not 0 < self.capacity <= 1:
            raise BrtError(
                f"MixtureOfDepthsConfig: capacity must be in (0, 1], got {self.capacity}"
            )

    def is_routed(self, layer: int) -> bool:
        """Whether a layer takes only some tokens."""
        return layer % self.every == self.every - 1


class RoutedLayer(nn.Module):
    """A layer, its gate, and what foretells the gate's choice."""

    def __init__(self, config: MixtureOfDepthsConfig) -> None:
        super().__init__()
        self.layer = DecoderLayer(config.dim, config.num_heads, config.hidden)
        self.gate = nn.Linear(config.dim, 1, bias=False)
        self.predictor = nn.Sequential(
            nn.Linear(config.dim, config.predictor_hidden),
            nn.ReLU(),
            nn.Linear(config.predictor_hidden, 1),
        )
        self.choice = ExpertChoice(config.capacity)
        self.choose = brt.ScatterRouter(self.choice, num_paths=1)
        self.foretell = brt.ScatterRouter(Threshold(0.0), num_paths=1)
        # The gate's score scales what the layer adds, whoever decided
        self.gather = brt.GatherRouter(weighted=False, add_residual=True)

    def forward(self, x_BSD: Tensor, position_1S: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``; tokens that are not taken stay what they are."""
        batch, length, dim = x_BSD.shape
        x_ND, grid = brt.annotate(x_BSD, dims=(0, 1))
        score_N1 = self.gate(x_ND)
        if self.training:
            paths, route = self.choose(x_ND, score_N1.view(batch, length, 1), grid.cells)
            # As many of every sequence
            shape = (batch, self.choice.rows_per_path(length, 1))
        else:
            paths, route = self.foretell(x_ND, self.predictor(x_ND), grid.cells)
            # Any number of each sequence: all in one group, where they see their own sequence
            shape = (1, paths[0].shape[0])
        token_R = route[0].index_R(x_BSD.device)
        position_R, sequence_R = position_1S[0, token_R % length], token_R // length
        update_GMD = self.layer.update(
            paths[0].view(*shape, dim), position_R.view(shape), sequence_R.view(shape)
        )
        update_RD = update_GMD.view(paths[0].shape) * score_N1[token_R]
        return grid.restore(self.gather([update_RD], route, residual=x_ND))

    def predictor_loss(self, x_BSD: Tensor) -> Tensor:
        """How far the predictor is from the gate's choice; it moves the predictor only."""
        scores_BS = self.gate(x_BSD).detach()[..., 0]
        num_taken = self.choice.rows_per_path(x_BSD.shape[1], 1)
        best_BC = scores_BS.topk(num_taken, dim=1).indices
        taken_BS = torch.zeros_like(scores_BS).scatter(1, best_BC, 1.0)
        return F.binary_cross_entropy_with_logits(self.predictor(x_BSD.detach())[..., 0], taken_BS)


class MixtureOfDepths(nn.Module):
    """A decoder: tokens ``[B, S]`` -> logits ``[B, S, V]``.

    In training mode routed layers choose by expert choice, in evaluation by their predictors, so
    that no logit depends on later tokens.
    """

    def __init__(self, config: MixtureOfDepthsConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MixtureOfDepthsConfig()
        self.embed = nn.Embedding(config.num_words, config.dim)
        self.layers = nn.ModuleList(
            RoutedLayer(config)
            if config.is_routed(i)
            else DecoderLayer(config.dim, config.num_heads, config.hidden)
            for i in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.num_words, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """``[B, S]`` -> logits ``[B, S, V]``."""
        x_BSD, position_1S = self.embed(ids_BS), positions(ids_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, position_1S)
        return self.head(self.norm(x_BSD))

    def loss(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy of each next word, mean loss of the predictors), to be added."""
        x_BSD, position_1S = self.embed(ids_BS), positions(ids_BS)
        predicted = []
        for layer in self.layers:
            if isinstance(layer, RoutedLayer):
                predicted.append(layer.predictor_loss(x_BSD))
            x_BSD = layer(x_BSD, position_1S)
        logits_BSV = self.head(self.norm(x_BSD[:, :-1]))
        words = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())
        return words, torch.stack(predicted).mean() if predicted else words.new_zeros(())


def small(capacity: float = 0.125, num_layers: int = 4) -> MixtureOfDepths:
    """A small decoder with random weights, in eval mode."""
    config = MixtureOfDepthsConfig(capacity=capacity, num_layers=num_layers)
    return MixtureOfDepths(config).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """Made-up tokens: two sequences of 32."""
    return (drawn_ids(MixtureOfDepthsConfig.num_words, (2, 32), seed),)
