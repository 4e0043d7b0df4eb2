"""The network: sub-networks of rising resolution, and classifiers.

Shape letters: N images (cells), C classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brt_models.exits import ExitNetwork
from brt_models.msdnet.layers import Classifier, init_weights
from brt_models.ranet.config import RANetConfig
from brt_models.ranet.layers import Block, FirstLayer, FusionBlock


class RANet(ExitNetwork):
    """Images [N, 3, H, W] -> the logits [N, C] of the exit that each image took.

    In training mode the result is the logits of every exit.

    Args:
        config: the shape.
        thresholds: one for each exit but the last, or one for all; `thresholds_for` finds them.
    """

    def __init__(
        self, config: RANetConfig | None = None, thresholds: float | Sequence[float] = 0.9
    ) -> None:
        super().__init__()
        self.config = config = config or RANetConfig()
        self.FirstLayer = FirstLayer(config)
        self.scale_flows, self.classifier = nn.ModuleList(), nn.ModuleList()
        low: list[list[int]] = []
        for sub, factor in enumerate(config.factors):
            blocks: list[Block | FusionBlock] = []
            channels = config.channels * factor
            for i in range(config.blocks_of(sub)):
                if i < config.blocks_of(sub - 1):
                    blocks.append(FusionBlock(config, sub, i, channels, low[i]))
                    channels = blocks[-1].out_channels
                    continue
                blocks.append(Block(config, sub, i, channels))
                channels = blocks[-1].out_channels
                head = Classifier(channels, config.head_channels, config.num_classes)
                self.classifier.append(head)
            self.scale_flows.append(nn.ModuleList(blocks))
            low = [block.channels for block in blocks]
        init_weights(self.modules())
        # Of each exit: its sub-network, and its block there
        self.places = [
            (sub, block)
            for sub in range(len(config.scales))
            for block in range(config.blocks_of(sub - 1), config.blocks_of(sub))
        ]
        self.add_exits(config.num_exits, thresholds)

    def stage(self, exit_idx: int, state: Any) -> tuple[Any, Tensor]:
        """Blocks up to the next with a classifier: state -> (state, logits [N, C]).

        The state is: what the next block takes, where it belongs to the same sub-network; what
        every block of this sub-network so far has for the next sub-network; what the later
        sub-networks start from.
        """
        sub, last = self.places[exit_idx]
        flow: Any = self.scale_flows[sub]
        if exit_idx == 0:
            state = [], [], self.FirstLayer(state)
        x, made, starts = state
        if last > self.config.blocks_of(sub - 1):
            x_NCHW, out = flow[last](x[0])
            made = [*made, out]
        else:
            # A new sub-network: its blocks take in those of the one before
            x_NCHW, low, made, starts = starts[0], made, [], starts[1:]
            for i, block in enumerate(flow[: last + 1]):
                x_NCHW, out = block(x_NCHW, low[i]) if i < last else block(x_NCHW)
                made.append(out)
        logits_NC = self.classifier[exit_idx](x_NCHW)
        goes_on = last + 1 < len(flow)
        return ([x_NCHW] if goes_on else [], made if starts else [], starts), logits_NC


def small(num_classes: int = 10) -> RANet:
    """A small network for images of 32x32 pixels, with random weights, in eval mode."""
    return RANet(RANetConfig(num_classes=num_classes)).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """Made-up images [8, 3, 32, 32]."""
    return (torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),)
