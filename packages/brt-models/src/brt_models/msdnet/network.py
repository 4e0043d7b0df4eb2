"""The network: blocks, and a classifier behind each.

Shape letters: N images (cells), C classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brt_models.exits import ExitNetwork
from brt_models.msdnet.config import MSDNetConfig
from brt_models.msdnet.layers import Classifier, FirstLayer, Layer, Transition, init_weights


class MSDNet(ExitNetwork):
    """Images [N, 3, H, W] -> the logits [N, C] of the exit that each image took.

    In training mode the result is the logits of every exit.

    Args:
        config: the shape.
        thresholds: one for each exit but the last, or one for all; `thresholds_for` finds them.
    """

    def __init__(
        self, config: MSDNetConfig | None = None, thresholds: float | Sequence[float] = 0.9
    ) -> None:
        super().__init__()
        self.config = config = config or MSDNetConfig()
        self.blocks, self.classifier = nn.ModuleList(), nn.ModuleList()
        channels, layer = config.channels, 0
        for num_layers in config.steps:
            parts: list[nn.Module] = [] if layer else [FirstLayer(config)]
            for _ in range(num_layers):
                layer += 1
                parts.append(Layer(config, channels, layer))
                channels += config.growth
                if config.is_transition(layer):
                    fewer = int(config.reduction * channels)
                    parts.append(Transition(config, channels, fewer, layer))
                    channels = fewer
            self.blocks.append(nn.Sequential(*parts))
            coarsest = channels * config.factors[-1]
            head = Classifier(coarsest, config.head_channels, config.num_classes)
            self.classifier.append(head)
        init_weights(self.modules())
        self.add_exits(config.num_blocks, thresholds)

    def stage(self, exit_idx: int, state: Any) -> tuple[list[Tensor], Tensor]:
        """A block and its classifier: features of each scale -> (the same, logits [N, C])."""
        scales = self.blocks[exit_idx](state)
        return scales, self.classifier[exit_idx](scales[-1])


def small(num_classes: int = 10) -> MSDNet:
    """A small network for images of 32x32 pixels, with random weights, in eval mode."""
    return MSDNet(MSDNetConfig(num_classes=num_classes)).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """Made-up images [8, 3, 32, 32]."""
    return (torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),)
