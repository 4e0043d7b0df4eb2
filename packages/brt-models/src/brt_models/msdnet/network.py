"""The network: blocks, classifiers, and the scatters through which images leave.

Shape letters: N images (cells), C classes, H height, W width, K exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from brt import Cells, GatherRouter, ScatterRouter, annotate
from brt.errors import BrtError
from brt.protocols import BinaryThreshold
from brt_models.images import check_images, is_over
from brt_models.macs import macs_of
from brt_models.msdnet.config import MSDNetConfig
from brt_models.msdnet.layers import Classifier, FirstLayer, Layer, Transition, init_weights

torch.fx.wrap("check_images")  # it reads shapes, which a symbolic trace does not have


class MSDNet(nn.Module):
    """Images [N, 3, H, W] -> the logits [N, C] of the exit that each image took.

    After every block but the last, an image leaves where its largest softmax probability is at
    least that exit's threshold; in eager inference, blocks that no image reaches do not run. In
    training mode every image goes through every block, and the logits of all exits are returned:
    their losses are summed.

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
        # Without parameters: they add nothing to the checkpoint
        self.exits = nn.ModuleList(
            ScatterRouter(BinaryThreshold(0.9), 2) for _ in range(config.num_blocks - 1)
        )
        self.gather = GatherRouter(weighted=False)
        self.set_thresholds(thresholds)

    def set_thresholds(self, thresholds: float | Sequence[float]) -> None:
        """Leave each exit but the last where the softmax is at least so sure."""
        num_exits = len(self.exits)
        if isinstance(thresholds, (int, float)):
            thresholds = (float(thresholds),) * num_exits
        if len(thresholds) != num_exits:
            raise BrtError(
                f"MSDNet: {len(thresholds)} thresholds for {num_exits} exits before the last"
            )
        for scatter, threshold in zip(self.exits, thresholds, strict=True):
            assert isinstance(scatter, ScatterRouter)
            scatter.protocol = BinaryThreshold(float(threshold))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of each exit but the last."""
        return tuple(scatter.protocol.threshold for scatter in self.exits)  # type: ignore

    def forward(self, x_NCHW: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[N, 3, H, W] -> [N, C]; in training mode the [N, C] of each exit."""
        if self.training:
            return self.all_exits(x_NCHW)
        return self.with_exits(x_NCHW)[0]

    def all_exits(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, H, W] -> the logits [N, C] that each exit would give every image."""
        check_images("MSDNet", x_NCHW)
        logits: list[Tensor] = []
        scales: Any = x_NCHW
        for block, head in zip(self.blocks, self.classifier, strict=True):
            scales = block(scales)
            logits.append(head(scales[-1]))
        return tuple(logits)

    def with_exits(self, x_NCHW: Tensor) -> tuple[Tensor, tuple[Cells, ...]]:
        """(logits [N, C], the images that left at each exit)."""
        check_images("MSDNet", x_NCHW)
        x_NCHW, grid = annotate(x_NCHW, 0)
        scales: Any = x_NCHW
        cells, left, where = grid.cells, [], []
        for scatter, block, head in zip(self.exits, self.blocks, self.classifier, strict=False):
            scales = block(scales)
            logits_NC = head(scales[-1])
            (out, stay), route = scatter((*scales, logits_NC), logits_NC, cells)
            left.append(out[len(scales)])
            where.append(route[0])
            scales, cells = [stay[s] for s in range(len(scales))], route[1]
            if is_over(scales[-1]):
                return self.gather(left, where), tuple(where)
        left.append(self.classifier[-1](self.blocks[-1](scales)[-1]))
        where.append(cells)
        return self.gather(left, where), tuple(where)

    def macs_K(self, x_NCHW: Tensor) -> tuple[int, ...]:
        """Multiply-adds of an image of that size that leaves at each exit, all before included."""
        stages = [*zip(self.blocks, self.classifier, strict=True)]
        return tuple(accumulate(macs_of(self, self.all_exits, x_NCHW[:1], stages)))


def small(num_classes: int = 10) -> MSDNet:
    """A small network for images of 32x32 pixels, with random weights, in eval mode."""
    return MSDNet(MSDNetConfig(num_classes=num_classes)).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """Made-up images [8, 3, 32, 32]."""
    return (torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),)
