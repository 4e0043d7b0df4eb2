"""The layers of an MSDNet, on a list with the features of each scale, finest first.

Shape letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from brt_models.msdnet.config import MSDNetConfig, Stem


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H / stride, W / stride]."""
        return self.net(x_NCHW)


class Bottleneck(nn.Module):
    """A 1x1 convolution that narrows, and a 3x3 one."""

    def __init__(self, channels: int, out_channels: int, bottleneck: int, stride: int = 1) -> None:
        super().__init__()
        inner = min(channels, bottleneck * out_channels)
        self.net = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H / stride, W / stride]."""
        return self.net(x_NCHW)


class Dense(nn.Module):
    """What there was at a scale, and what a convolution of it adds."""

    def __init__(self, channels: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.conv_normal = Bottleneck(channels, growth, bottleneck)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + growth, H, W]."""
        return torch.cat([x_NCHW, self.conv_normal(x_NCHW)], 1)


class DenseDown(nn.Module):
    """The same, where half of what is added comes from the next finer scale."""

    def __init__(
        self,
        finer_channels: int,
        channels: int,
        growth: int,
        finer_bottleneck: int,
        bottleneck: int,
    ) -> None:
        super().__init__()
        self.conv_down = Bottleneck(finer_channels, growth // 2, finer_bottleneck, stride=2)
        self.conv_normal = Bottleneck(channels, growth // 2, bottleneck)

    def forward(self, finer: Tensor, x_NCHW: Tensor) -> Tensor:
        """[N, C', 2H, 2W] and [N, C, H, W] -> [N, C + growth, H, W]."""
        return torch.cat([x_NCHW, self.conv_down(finer), self.conv_normal(x_NCHW)], 1)


class FirstLayer(nn.Module):
    """An image -> its features at every scale, each made from the finer one."""

    def __init__(self, config: MSDNetConfig) -> None:
        super().__init__()
        channels_S = [config.channels * factor for factor in config.factors]
        self.layers = nn.ModuleList([stem(config.stem, channels_S[0])])
        for finer, coarser in pairwise(channels_S):
            self.layers.append(ConvNorm(finer, coarser, stride=2))

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> features of each scale."""
        scales = []
        for layer in self.layers:
            x_NCHW = layer(x_NCHW)
            scales.append(x_NCHW)
        return scales


class Layer(nn.Module):
    """One layer: each scale from itself and the finer one; the finest may be given up."""

    def __init__(self, config: MSDNetConfig, channels: int, layer: int) -> None:
        super().__init__()
        taken, given = config.scales_of(layer)
        self.num_dropped = taken - given
        self.layers = nn.ModuleList()
        first = config.num_scales - given
        for scale in range(first, config.num_scales):
            here, added = channels * config.factors[scale], config.growth * config.factors[scale]
            if scale == first and not self.num_dropped:
                self.layers.append(Dense(here, added, config.bottlenecks[scale]))
                continue
            finer = channels * config.factors[scale - 1]
            narrow = config.bottlenecks[scale - 1], config.bottlenecks[scale]
            self.layers.append(DenseDown(finer, here, added, *narrow))

    def forward(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Features of the scales taken -> of those given."""
        kept = scales[self.num_dropped :]
        finer: list[Tensor | None] = [None, *scales][self.num_dropped : -1]
        return [
            layer(x) if above is None else layer(above, x)
            for layer, above, x in zip(self.layers, finer, kept, strict=True)
        ]


class Transition(nn.Module):
    """Fewer channels at each scale."""

    def __init__(self, config: MSDNetConfig, channels: int, out_channels: int, layer: int) -> None:
        super().__init__()
        factors = config.factors[config.num_scales - config.scales_of(layer)[1] :]
        self.m = nn.ModuleList(ConvNorm(channels * f, out_channels * f, 1) for f in factors)

    def forward(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Features of each scale, narrowed."""
        return [conv(x) for conv, x in zip(self.m, scales, strict=True)]


class Classifier(nn.Module):
    """Features of the coarsest scale -> logits."""

    def __init__(self, channels: int, head_channels: int | None, num_classes: int) -> None:
        super().__init__()
        inner = head_channels or channels
        self.m = nn.Sequential(
            ConvNorm(channels, inner, stride=2),
            ConvNorm(inner, inner, stride=2),
            # 2x2 pixels are left of images of the size that a published network is for
            nn.AdaptiveAvgPool2d(1),
        )
        self.linear = nn.Linear(inner, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, num_classes]."""
        return self.linear(self.m(x_NCHW).flatten(1))


def init_weights(modules: Iterable[nn.Module]) -> None:
    """As the authors did: convolutions by fan-out, batch norms at one."""
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def stem(kind: Stem, channels: int) -> nn.Module:
    """The first convolution: [N, 3, H, W] -> [N, channels, ...], a quarter of it for "imagenet"."""
    if kind == "small":
        return ConvNorm(3, channels)
    return nn.Sequential(
        nn.Conv2d(3, channels, 7, 2, padding=3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    )
