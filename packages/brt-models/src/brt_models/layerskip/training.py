"""Training that makes every layer fit for the one head: layer dropout and the loss of all exits.

Legend: B sequences, S tokens of one, D features, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from brt.errors import BrtError
from brt_models.layerskip.network import LayerSkip

Exits = Literal["all", "rotational", "gradual"]


@dataclass(frozen=True)
class Curriculum:
    """Which exits and how much dropout a step of training has.

    Attributes:
        exits: "all" of them always; "rotational": every ``every``-th, others at the next step;
            "gradual": one more from the last on, all by half of the ``num_steps``.
        rising_dropout: dropout grows from none to all over the steps, as from scratch; otherwise
            it is the same always, as for a trained model.
        num_steps: of the whole training.

    Source: LayerSkip (ACL 2024), sections 4.1.1 and 4.1.2.
    """

    exits: Exits = "all"
    every: int = 4
    rising_dropout: bool = False
    num_steps: int = 1

    def __post_init__(self) -> None:
        if self.exits not in ("all", "rotational", "gradual"):
            raise BrtError(f"Curriculum: no exits {self.exits!r}: all, rotational, gradual")
        if self.every < 1 or self.num_steps < 1:
            raise BrtError(
                f"Curriculum: every and num_steps must be at least 1, got {self.every} and "
                f"{self.num_steps}"
            )

    def has_exit(self, layer: int, num_layers: int, step: int) -> bool:
        """Whether the loss counts the words of this layer, C(t, l); of the last it always does."""
        if layer == num_layers - 1 or self.exits == "all":
            return True
        if self.exits == "rotational":
            return layer % self.every == step % self.every
        return step >= (num_layers - 1 - layer) * self.num_steps / (2 * num_layers)

    def dropout_scale(self, step: int) -> float:
        """How much of the dropout there is, S(t)."""
        if not self.rising_dropout or self.num_steps == 1:
            return 1.0
        return math.exp(step * math.log(2) / (self.num_steps - 1)) - 1


def dropout_of(layer: int, num_layers: int, most: float) -> float:
    """How often a layer is dropped, D(l) times that of the last: section 4.1.1."""
    if num_layers == 1:
        return 0.0
    return most * (math.exp(layer * math.log(2) / (num_layers - 1)) - 1)


def exit_weight(layer: int, num_layers: int, scale: float) -> float:
    """What a layer's words count in the loss before all are divided by their sum, e(l): 4.1.2."""
    if layer < num_layers - 1:
        return scale * layer * (layer + 1) / 2
    return layer + scale * (layer - 1) * layer / 2 if layer else 1.0


def loss(
    model: LayerSkip, ids_BS: Tensor, step: int = 0, curriculum: Curriculum | None = None
) -> Tensor:
    """Cross-entropy of each next word, of the exits of this step by their weights.

    In training mode each sequence drops layers, each by its own chance.
    """
    config, curriculum = model.config, curriculum or Curriculum()
    num_layers = config.num_hidden_layers
    x_BSD = model.model.embed_tokens(ids_BS)
    position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
    total, weights = x_BSD.new_zeros(()), 0.0
    for i, layer in enumerate(model.model.layers):
        after_BSD = layer(x_BSD, position_BS)
        dropout = dropout_of(i, num_layers, config.layer_dropout) * curriculum.dropout_scale(step)
        if model.training and dropout:
            dropped_B11 = torch.rand_like(x_BSD[:, :1, :1]) < dropout
            after_BSD = torch.where(dropped_B11, x_BSD, after_BSD)
        x_BSD = after_BSD
        weight = exit_weight(i, num_layers, config.exit_scale)
        if weight and curriculum.has_exit(i, num_layers, step):
            logits_BSV = model.head(x_BSD[:, :-1])
            words = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())
            total, weights = total + weight * words, weights + weight
    return total / weights
