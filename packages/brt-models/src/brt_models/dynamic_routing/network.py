"""The network: stem, lattice of cells, decoder.

Shape letters: N images (cells of brt), C channels, H height, W width, L classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brt import GatherRouter, annotate
from brt_models.dynamic_routing.cell import Cell, Rows, Ways, resized
from brt_models.dynamic_routing.config import DynamicRoutingConfig
from brt_models.dynamic_routing.layers import ConvNorm, Stem
from brt_models.images import check_images

torch.fx.wrap("check_images")  # it reads shapes, which a symbolic trace does not have


class Backbone(nn.Module):
    """Images -> features at every scale, each image by the way that its gates open."""

    def __init__(self, config: DynamicRoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.channels)
        self.init_layer = Cell(config, 0, finer=False, coarser=config.num_scales > 1)
        self.all_cell_list = nn.ModuleList()
        for layer in range(config.num_layers):
            last = layer == config.num_layers - 1
            self.all_cell_list.append(
                nn.ModuleList(
                    Cell(
                        config,
                        scale,
                        finer=scale > 0 and not last,
                        coarser=scale < config.num_scales - 1 and not last,
                    )
                    for scale in range(config.num_cells(layer))
                )
            )
        # What reaches a cell, for the images that it reaches; and all images at the end
        self.merge = GatherRouter(result="union")
        self.gather = GatherRouter()

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> features of each scale, [N, C * 2**s, H / (4 * 2**s), ...].

        A cell that no image reaches is skipped; features that no image has are zero.
        """
        stem, grid = annotate(self.stem(x_NCHW), 0)
        before: list[Ways] = [self.init_layer(stem, grid.cells)]
        for layer in self.all_cell_list:
            arrived = [_arriving(before, scale) for scale in range(len(layer))]  # type: ignore[arg-type]
            before = [
                cell(*self.merge([r for r, _ in rows], [c for _, c in rows])) if rows else Ways()
                for cell, rows in zip(layer, arrived, strict=True)  # type: ignore[call-overload]
            ]
        features = []
        for scale, ways in enumerate(before):
            rows, cells = [r for r, _ in ways.keep], [c for _, c in ways.keep]
            features.append(self.gather(rows, cells) if rows else nothing_at(stem, scale))
        return features

    def dense(self, x_NCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """(features of each scale, the expected part of all multiply-adds), all ways computed."""
        stem = self.stem(x_NCHW)
        made, expected, total = self.init_layer.dense(stem)
        before = [made]
        for layer in self.all_cell_list:
            outs = []
            cells: Sequence[Cell] = list(layer)  # type: ignore[call-overload]
            for scale, cell in enumerate(cells):
                sources = [(scale - 1, 2), (scale, 0), (scale + 1, 1)]
                found = [before[s][way] for s, way in sources if 0 <= s < len(before)]
                first, *others = (x for x in found if x is not None)
                made, macs, all_macs = cell.dense(sum(others, first))
                outs.append(made)
                expected, total = expected + macs, total + all_macs
            before = outs
        return [keep for keep, _, _ in before if keep is not None], expected / total


def _arriving(before: Sequence[Ways], scale: int) -> list[Rows]:
    """What the layer before sends to a scale: from the finer one, from itself, from the coarser."""
    rows = list(before[scale - 1].down) if scale else []
    if scale < len(before):
        rows += before[scale].keep
    if scale + 1 < len(before):
        rows += before[scale + 1].up
    return rows


def nothing_at(stem: Tensor, scale: int) -> Tensor:
    """Zeros of the shape that features of a scale have."""
    batch, channels, height, width = (stem.shape[i] for i in range(4))  # also while tracing
    return stem.new_zeros(batch, channels << scale, height >> scale, width >> scale)


class Head(nn.Module):
    """Features of every scale -> logits of every pixel, from the coarsest scale up."""

    def __init__(self, config: DynamicRoutingConfig) -> None:
        super().__init__()
        self.layer_decoder_list = nn.ModuleList()
        for scale in range(config.num_scales):
            channels = config.channels * 2**scale
            self.layer_decoder_list.append(ConvNorm(channels, channels // 2 if scale else channels))
        self.predictor = nn.Conv2d(config.channels, config.num_classes, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features of each scale, finest first -> [N, L, H, W]."""
        pred = self.layer_decoder_list[-1](features[-1])
        for scale in range(len(features) - 2, -1, -1):
            pred = self.layer_decoder_list[scale](resized(pred, 2.0) + features[scale])
        return resized(self.predictor(pred), 4.0)


class DynamicRouting(nn.Module):
    """Images [N, 3, H, W] -> logits [N, L, H, W] of the classes of each pixel.

    Every image goes by its own gates. In training mode all ways are computed for all images, as
    the authors do, and the result is (logits, the expected part of all multiply-adds), for
    `budget_loss`. The modes differ where no image reaches a cell: training computes it on zeros.
    """

    def __init__(self, config: DynamicRoutingConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DynamicRoutingConfig()
        self.backbone = Backbone(config)
        self.sem_seg_head = Head(config)

    def forward(self, x_NCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> [N, L, H, W]; with the expected part of multiply-adds in training."""
        check_images("DynamicRouting", x_NCHW, self.config.divisor)
        if self.training:
            features, share = self.backbone.dense(x_NCHW)
            return self.sem_seg_head(features), share
        return self.sem_seg_head(self.backbone(x_NCHW))


def budget_loss(share: Tensor, config: DynamicRoutingConfig) -> Tensor:
    """What to add to the loss so that images keep to the budget."""
    return config.budget_weight * (share - config.budget_share) ** 2


def small(num_classes: int = 5) -> DynamicRouting:
    """A small network with random weights and gates of every kind, in eval mode."""
    torch.manual_seed(0)
    model = DynamicRouting(DynamicRoutingConfig(num_classes=num_classes)).eval()
    scatter_gates(model, seed=2)
    return model


def scatter_gates(model: DynamicRouting, seed: int) -> None:
    """Give gates random biases: they start open, and trained ones do not stay so."""
    generator = torch.Generator().manual_seed(seed)
    for name, bias in model.named_parameters():
        if name.endswith("gate_conv_beta.2.bias"):
            nn.init.normal_(bias, 0.6, generator=generator)


def sample(seed: int = 0) -> tuple[Tensor]:
    """A made-up image [1, 3, 128, 256]."""
    return (torch.randn(1, 3, 128, 256, generator=torch.Generator().manual_seed(seed)),)
