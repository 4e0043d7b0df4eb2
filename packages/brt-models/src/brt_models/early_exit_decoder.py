"""A decoder whose sequences leave at the first layer that is sure of their next word.

Every layer's output goes through one and the same head, as the model is trained to bear: layers
are dropped in training, deeper ones more, and the loss counts the words of every exit.

Elhoushi et al. 2024, LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding,
arXiv:2404.16710, sections 4.1 and 4.2; leaving by confidence: Schuster et al. 2022, Confident
Adaptive Language Modeling, arXiv:2207.07061.

Legend: B sequences (cells), S tokens of one, D features, V words, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt.errors import BrtError
from brt.protocols import BinaryThreshold
from brt_models.decoder_layer import DecoderLayer, drawn_ids, positions
from brt_models.images import is_over
from brt_models.layerskip.training import dropout_of, exit_weight


@dataclass(frozen=True)
class EarlyExitConfig:
    """Shape of the decoder.

    Attributes:
        every: an exit after so many layers; the last layer is one always.
        threshold: a sequence leaves where the likeliest next word has at least this probability.
        layer_dropout: how often the last layer is dropped in training; earlier ones less.
        exit_scale: what the words of an exit before the last count in the loss.
    """

    num_words: int = 256
    dim: int = 64
    hidden: int = 128
    num_layers: int = 6
    num_heads: int = 4
    every: int = 2
    threshold: float = 0.9
    layer_dropout: float = 0.1
    exit_scale: float = 0.2

    def __post_init__(self) -> None:
        sizes = (self.num_words, self.dim, self.hidden, self.num_layers, self.num_heads,
                 self.every)  # fmt: skip
        if min(sizes) < 1:
            raise BrtError(f"EarlyExitConfig: all sizes must be >= 1, got {self}")
        if self.dim % (2 * self.num_heads):
            raise BrtError(
                f"EarlyExitConfig: dim={self.dim} must be a multiple of twice "
                f"num_heads={self.num_heads}"
            )
        if not 0 <= self.layer_dropout < 1 or self.exit_scale < 0:
            raise BrtError(
                "EarlyExitConfig: layer_dropout must be in [0, 1) and exit_scale >= 0, got "
                f"{self.layer_dropout} and {self.exit_scale}"
            )

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers run before each exit."""
        before = range(self.every, self.num_layers, self.every)
        return (*before, self.num_layers)

    def dropout_of(self, layer: int) -> float:
        """How often a layer is dropped in training: section 4.1.1."""
        return dropout_of(layer, self.num_layers, self.layer_dropout)

    def weight_of(self, exit: int) -> float:
        """What an exit counts in the loss, before all are divided by their sum: section 4.1.2."""
        return exit_weight(self.exits[exit] - 1, self.num_layers, self.exit_scale)


class Stage(nn.Module):
    """The layers between two exits; in training each drops some sequences."""

    def __init__(self, config: EarlyExitConfig, layers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config.dim, config.num_heads, config.hidden) for _ in layers
        )
        self.dropouts = [config.dropout_of(layer) for layer in layers]

    def forward(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``."""
        position_1S = positions(x_BSD)
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            update_BSD = layer.update(x_BSD, position_1S)  # type: ignore[operator]
            if self.training and dropout:
                kept_B11 = torch.rand_like(x_BSD[:, :1, :1]) >= dropout
                update_BSD = update_BSD * kept_B11
            x_BSD = x_BSD + update_BSD
        return x_BSD


class NextWord(nn.Module):
    """The head that all exits share: scores of the word after the last token."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim)
        self.linear = nn.Linear(config.dim, config.num_words, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, V]``."""
        return self.linear(self.norm(x_BSD[:, -1]))


class EarlyExitDecoder(nn.Module):
    """Tokens ``[B, S]``, S >= 1 -> logits ``[B, V]`` of each next word.

    A sequence is a cell: one that is sure takes no part in the layers after its exit.
    """

    def __init__(self, config: EarlyExitConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EarlyExitConfig()
        self.embed = nn.Embedding(config.num_words, config.dim)
        starts = (0, *config.exits[:-1])
        self.stages = nn.ModuleList(
            Stage(config, range(a, b)) for a, b in zip(starts, config.exits, strict=True)
        )
        self.head = NextWord(config)
        self.scatters = nn.ModuleList(
            brt.ScatterRouter(BinaryThreshold(config.threshold), 2) for _ in config.exits[:-1]
        )
        self.gather = brt.GatherRouter(weighted=False)
        self.set_threshold(config.threshold)

    @property
    def threshold(self) -> float:
        """The probability at which a sequence leaves."""
        return self._threshold

    def set_threshold(self, threshold: float) -> None:
        """Leave every exit but the last where the likeliest next word has this probability."""
        self._threshold = threshold
        for scatter in self.scatters:
            assert isinstance(scatter, brt.ScatterRouter)
            scatter.protocol = BinaryThreshold(threshold)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """``[B, S]`` -> logits ``[B, V]`` of the exit that each sequence took."""
        return self.with_exits(ids_BS)[0]

    def with_exits(self, ids_BS: Tensor) -> tuple[Tensor, tuple[brt.Cells, ...]]:
        """(logits ``[B, V]``, the sequences that left at each exit)."""
        x_BSD, grid = brt.annotate(self.embed(ids_BS), dims=0)
        cells = grid.cells
        left: list[Tensor] = []
        where: list[brt.Cells] = []
        for scatter, stage in zip(self.scatters, self.stages, strict=False):
            x_BSD = stage(x_BSD)
            logits_BV = self.head(x_BSD)
            (out, stay), route = scatter((x_BSD, logits_BV), logits_BV, cells)
            left.append(out[1])
            where.append(route[0])
            x_BSD, cells = stay[0], route[1]
            if is_over(x_BSD):
                return self.gather(left, where), tuple(where)
        left.append(self.head(self.stages[-1](x_BSD)))
        where.append(cells)
        return self.gather(left, where), tuple(where)

    def depth(self, ids_BS: Tensor) -> Tensor:
        """Layers that each sequence ran, int64 ``[B]``."""
        _, left = self.with_exits(ids_BS)
        depth_B = torch.zeros(ids_BS.shape[0], dtype=torch.int64, device=ids_BS.device)
        for layers, cells in zip(self.config.exits, left, strict=False):
            depth_B[cells.index_R(ids_BS.device)] = layers
        return depth_B

    def loss(self, ids_BS: Tensor) -> Tensor:
        """Cross-entropy of each next word, of all exits by their weights."""
        config = self.config
        weights = [config.weight_of(i) for i in range(len(config.exits))]
        x_BSD, losses = self.embed(ids_BS), []
        for stage in self.stages:
            x_BSD = stage(x_BSD)
            logits_BSV = self.head.linear(self.head.norm(x_BSD[:, :-1]))
            losses.append(F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten()))
        weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
        return torch.stack(weighted).sum() / sum(weights)

    @torch.no_grad()
    def generate(self, ids_BS: Tensor, max_new_tokens: int = 20) -> Tensor:
        """The sequences with the likeliest next word, again and again: ``[B, S + new]``.

        Words are predicted from all tokens anew: keys that a layer never made, because a word
        left before it, are needed nowhere.
        """
        for _ in range(max_new_tokens):
            ids_BS = torch.cat([ids_BS, self(ids_BS).argmax(1, keepdim=True)], 1)
        return ids_BS


def small(threshold: float = 0.016, num_layers: int = 6) -> EarlyExitDecoder:
    """A small decoder with random weights, which are sure of little; in eval mode."""
    config = EarlyExitConfig(threshold=threshold, num_layers=num_layers)
    return EarlyExitDecoder(config).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """Made-up tokens: 16 sequences of 12."""
    return (drawn_ids(EarlyExitConfig.num_words, (16, 12), seed),)
