"""The layers of a RANet.

Shape letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brt_models.msdnet.layers import Bottleneck, ConvNorm, Dense, stem
from brt_models.ranet.config import RANetConfig


class FirstLayer(nn.Module):
    """An image -> what each sub-network starts from, the lowest resolution first."""

    def __init__(self, config: RANetConfig) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in reversed(config.factors)]
        scales = config.scales[::-1]
        self.layers = nn.ModuleList([stem(config.stem, widths[0])])
        for i in range(1, len(scales)):
            stride = 1 if scales[i] == scales[i - 1] else 2
            self.layers.append(ConvNorm(widths[i - 1], widths[i], stride=stride))

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> features of each resolution."""
        made = []
        for layer in self.layers:
            x_NCHW = layer(x_NCHW)
            made.append(x_NCHW)
        return made[::-1]


class DenseUp(nn.Module):
    """What there was, what the sub-network before found, and what a convolution adds."""

    def __init__(
        self,
        channels: int,
        low_channels: int,
        growth: int,
        bottlenecks: tuple[int, int],
        compress: float,
        down: bool,
    ) -> None:
        super().__init__()
        taken = int(growth * compress)
        self.conv_up = Bottleneck(low_channels, taken, bottlenecks[1])
        stride = 2 if down else 1
        self.conv_normal = Bottleneck(channels, growth - taken, bottlenecks[0], stride)
        self.down = down

    def forward(self, low: Tensor, x_NCHW: Tensor) -> Tensor:
        """Features of the sub-network before, and [N, C, H, W] -> [N, C + growth, H', W']."""
        made = self.conv_normal(x_NCHW)
        if self.down:
            x_NCHW = resized_as(x_NCHW, made)
        return torch.cat([x_NCHW, resized_as(self.conv_up(low), made), made], 1)


class Block(nn.Module):
    """Layers of a sub-network's own; keeps what each gave for the next sub-network."""

    def __init__(self, config: RANetConfig, sub: int, block: int, channels: int) -> None:
        super().__init__()
        growth = config.growth * config.factors[sub]
        self.layers = nn.ModuleList()
        self.channels: list[int] = [channels]
        for _ in range(config.layers_of(block)):
            self.layers.append(Dense(self.channels[-1], growth, config.bottlenecks[sub]))
            self.channels.append(self.channels[-1] + growth)
        self.out_channels = self.channels[-1]
        self.trans: nn.Module | None = None
        if config.is_transition(sub, block):
            self.out_channels = int(config.reduction * self.out_channels)
            self.trans = ConvNorm(self.channels[-1], self.out_channels, 1)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[N, C, H, W] -> (its result, what went into and came out of each layer)."""
        made = [x_NCHW]
        for layer in self.layers:
            made.append(layer(made[-1]))
        return made[-1] if self.trans is None else self.trans(made[-1]), made


class FusionBlock(nn.Module):
    """Layers that take in what those of a block of the sub-network before gave."""

    def __init__(
        self,
        config: RANetConfig,
        sub: int,
        block: int,
        channels: int,
        low_channels: Sequence[int],
    ) -> None:
        super().__init__()
        growth = config.growth * config.factors[sub]
        narrow = config.bottlenecks[sub], config.bottlenecks[sub - 1]
        num_layers = config.layers_of(block)
        self.layers = nn.ModuleList()
        self.channels: list[int] = [channels]
        for i in range(num_layers):
            down = i == num_layers - 1 and config.is_down(sub, block)
            here = self.channels[-1]
            layer = DenseUp(here, low_channels[i], growth, narrow, config.compress, down)
            self.layers.append(layer)
            self.channels.append(here + growth)
        taken = int(self.channels[-1] * config.compress)
        self.conv_last = ConvNorm(low_channels[num_layers], taken, 1)
        all_channels = self.out_channels = self.channels[-1] + taken
        self.trans: nn.Module | None = None
        if config.is_transition(sub, block):
            self.out_channels = int(config.reduction * all_channels)
            self.trans = ConvNorm(all_channels, self.out_channels, 1)

    def forward(self, x_NCHW: Tensor, low: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[N, C, H, W] and the features of a block before -> as `Block`."""
        made = [x_NCHW]
        for i, layer in enumerate(self.layers):
            made.append(layer(low[i], made[-1]))
        last = resized_as(self.conv_last(low[len(self.layers)]), made[-1])
        x_NCHW = torch.cat([made[-1], last], 1)
        return x_NCHW if self.trans is None else self.trans(x_NCHW), made


def resized_as(x_NCHW: Tensor, like: Tensor) -> Tensor:
    """[N, C, H, W] at the height and width of another tensor."""
    return nn.functional.interpolate(
        x_NCHW, size=like.shape[2:], mode="bilinear", align_corners=True
    )
