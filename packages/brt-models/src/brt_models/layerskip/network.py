"""The network: layers, one head for all of them, and the loop in which tokens leave.

Legend: B sequences, S tokens of one, R sequences of a call (cells), D features, V words, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import brt
from brt.errors import BrtError
from brt.protocols import BinaryThreshold
from brt_models.decoder_layer import drawn_ids
from brt_models.layerskip.config import LayerSkipConfig
from brt_models.layerskip.layers import Cache, Layer


class Decoder(nn.Module):
    """What Hugging Face calls ``model``: everything but the head."""

    def __init__(self, config: LayerSkipConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class OneLayer(nn.Module):
    """The body of the loop: the next layer for the tokens that are left.

    It borrows the layers of the model, and a cache while one is `reading`: as a state of the loop,
    the cache would be copied wherever a token leaves.
    """

    def __init__(self, owner: LayerSkip) -> None:
        super().__init__()
        self.borrowed = (owner.model, owner.lm_head, owner.config)  # a tuple registers nothing
        self.cache: Cache | None = None

    @contextmanager
    def reading(self, cache: Cache) -> Iterator[None]:
        """Within, layers see what the cache holds."""
        self.cache = cache
        try:
            yield
        finally:
            self.cache = None

    def forward(self, x_RD: Tensor, state: dict[str, Tensor]) -> Any:
        """(after a layer, how sure its next word is ``[R, 1]``, the state)."""
        model, lm_head, config = self.borrowed
        depth_R = state["depth"]
        assert self.cache is not None, "the loop runs while a cache is being read"
        if not len(depth_R):
            return x_RD, x_RD.new_zeros(0, 1), state
        depth = int(depth_R[0])  # all that are left have run the same layers
        x_RSD = model.layers[depth](
            x_RD[:, None], state["position"][:, None], self.cache, state["row"]
        )
        x_RD, depth_R = x_RSD[:, 0], depth_R + 1
        if depth + 1 < config.min_layers:
            return x_RD, x_RD.new_zeros(len(x_RD), 1), state | {"depth": depth_R}
        logits_RV = lm_head(model.norm(x_RD))
        sure_R1 = logits_RV.float().softmax(1).amax(1, keepdim=True)
        return x_RD, sure_R1, state | {"depth": depth_R, "logits": logits_RV}


class LayerSkip(nn.Module):
    """Tokens ``[B, S]``, S >= 1 -> logits ``[B, V]`` of each next word, by the layer that is sure.

    The last token of a sequence is a cell: it leaves after the first layer, from ``min_layers`` on,
    whose likeliest word has at least ``threshold`` probability. Tokens before it run all layers,
    as those of a prompt do. All sequences have the same length.
    """

    def __init__(self, config: LayerSkipConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LayerSkipConfig()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        protocol = BinaryThreshold(config.threshold, selected_path=1, confidence="score")
        self.loop = brt.LoopRouter(OneLayer(self), config.num_hidden_layers, protocol=protocol)

    @property
    def threshold(self) -> float:
        """The probability at which a token leaves."""
        protocol: Any = self.loop.protocol
        return float(protocol.threshold)

    def set_threshold(self, threshold: float) -> None:
        """Leave where the likeliest next word has this probability; over 1, nowhere."""
        self.loop.protocol = BinaryThreshold(threshold, selected_path=1, confidence="score")

    def forward(self, ids_BS: Tensor) -> Tensor:
        """``[B, S]`` -> logits ``[B, V]`` of the layer at which each last token left."""
        return self.with_depth(ids_BS)[0]

    def with_depth(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(logits ``[B, V]``, the layers that each last token ran, int64 ``[B]``)."""
        return self.next_word(ids_BS, self.read_prompt(ids_BS))

    def full(self, ids_BS: Tensor) -> Tensor:
        """``[B, S]`` -> logits ``[B, S, V]`` of the whole model after each token."""
        x_BSD, position_BS = self.model.embed_tokens(ids_BS), _positions(ids_BS)
        for layer in self.model.layers:
            x_BSD = layer(x_BSD, position_BS)
        return self.head(x_BSD)

    def head(self, x_BSD: Tensor) -> Tensor:
        """Any layer's features -> logits ``[..., V]`` of the next words."""
        return self.lm_head(self.model.norm(x_BSD))

    def read_prompt(self, ids_BS: Tensor, num_new: int = 0, num_spare: int = 0) -> Cache:
        """A cache in which all but the last of these tokens are, with room for more.

        ``num_spare`` more are of no text: what a draft may write past the end.
        """
        if ids_BS.ndim != 2 or not ids_BS.shape[1] or ids_BS.is_floating_point():
            raise BrtError(
                f"LayerSkip: tokens must be integers [B, S] with S >= 1, got {ids_BS.dtype} "
                f"{list(ids_BS.shape)}"
            )
        num_tokens = ids_BS.shape[1] + num_new
        if num_tokens > self.config.max_position_embeddings:
            raise BrtError(
                f"LayerSkip: {num_tokens} tokens, but max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        num_places = num_tokens + num_spare
        cache = Cache.empty(self.config, len(ids_BS), num_places, self.lm_head.weight)
        before_BS = ids_BS[:, :-1]
        if before_BS.shape[1]:
            self.run(self.model.embed_tokens(before_BS), 0, None, _positions(before_BS), cache)
        return cache

    def run(
        self, x_BSD: Tensor, first: int, last: int | None, position_BS: Tensor, cache: Cache
    ) -> Tensor:
        """Features after layers ``first`` to below ``last``, which keep their keys and values."""
        row_B = torch.arange(len(x_BSD), device=x_BSD.device)
        for layer in self.model.layers[first:last]:
            x_BSD = layer(x_BSD, position_BS, cache, row_B)
        return x_BSD

    def next_word(self, ids_BS: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """(logits ``[B, V]`` after the last tokens, the layers that they ran ``[B]``).

        Layers that a token does not run keep keys and values of what it left with, for the tokens
        that come: Schuster et al. 2022, Confident Adaptive Language Modeling, arXiv:2207.07061.
        """
        netlet: Any = self.loop.netlet
        x_BD = self.model.embed_tokens(ids_BS[:, -1])
        row_B = torch.arange(len(x_BD), device=x_BD.device)
        state = {
            "row": row_B,
            "position": torch.full_like(row_B, ids_BS.shape[1] - 1),
            "depth": torch.zeros_like(row_B),
            "logits": x_BD.new_zeros(len(x_BD), self.config.vocab_size),
        }
        with netlet.reading(cache):
            x_BD, state = self.loop(x_BD, state)
        depth_B = state["depth"]
        for i, layer in enumerate(self.model.layers):
            (left_R,) = torch.nonzero(depth_B <= i, as_tuple=True)
            if len(left_R):
                assert isinstance(layer, Layer)
                layer.keep(x_BD[left_R], state["position"][left_R], cache, left_R)
        return state["logits"], depth_B

    @torch.no_grad()
    def generate(self, ids_BS: Tensor, max_new_tokens: int = 20) -> tuple[Tensor, Tensor]:
        """(``[B, S + new]``, the layers that each new word took ``[B, new]``).

        Each word is the likeliest of the layer that its token left at.
        """
        cache = self.read_prompt(ids_BS, max_new_tokens)
        depths = [ids_BS.new_zeros(len(ids_BS), 0)]
        for _ in range(max_new_tokens):
            logits_BV, depth_B = self.next_word(ids_BS, cache)
            ids_BS = torch.cat([ids_BS, logits_BV.argmax(1, keepdim=True)], 1)
            depths.append(depth_B[:, None])
        return ids_BS, torch.cat(depths, 1)

    @torch.no_grad()
    def greedy(self, ids_BS: Tensor, max_new_tokens: int = 20) -> Tensor:
        """``[B, S + new]``: each word is the likeliest of the whole model, one after another."""
        cache = self.read_prompt(ids_BS, max_new_tokens)
        for _ in range(max_new_tokens):
            position_B1 = torch.full_like(ids_BS[:, :1], ids_BS.shape[1] - 1)
            x_B1D = self.model.embed_tokens(ids_BS[:, -1:])
            x_B1D = self.run(x_B1D, 0, None, position_B1, cache)
            ids_BS = torch.cat([ids_BS, self.head(x_B1D).argmax(-1)], 1)
        return ids_BS


def _positions(ids_BS: Tensor) -> Tensor:
    return torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)


def small(threshold: float = 0.01, num_layers: int = 6) -> LayerSkip:
    """A small network with random weights, which are sure of little; in eval mode."""
    return LayerSkip(LayerSkipConfig(threshold=threshold, num_hidden_layers=num_layers)).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """Made-up tokens: 16 sequences of 12."""
    return (drawn_ids(LayerSkipConfig.vocab_size, (16, 12), seed),)
