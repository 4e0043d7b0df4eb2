"""Convolutions with the names that the authors gave them.

Shape letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn


class ConvNorm(nn.Conv2d):
    """Convolution without bias, batch norm, and a ReLU where asked for."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1, relu: bool = True
    ) -> None:
        super().__init__(channels, out_channels, kernel, stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU() if relu else nn.Identity()
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H', W']."""
        out = nn.functional.conv2d(x_NCHW, self.weight, None, self.stride)
        return self.activation(self.norm(out))


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution of each channel by itself."""
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return conv


class Stem(nn.Module):
    """Images -> features at a quarter of the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem_1 = ConvNorm(3, channels, 3, stride=2)
        self.stem_2 = nn.Sequential(depthwise(channels), ConvNorm(channels, channels))
        self.stem_3 = nn.Sequential(depthwise(channels, stride=2), ConvNorm(channels, channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, H / 4, W / 4]."""
        return self.stem_3(self.stem_2(self.stem_1(x_NCHW)))


class SepConv(nn.Module):
    """Two separable 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            depthwise(channels),
            ConvNorm(channels, channels),
            depthwise(channels),
            ConvNorm(channels, channels, relu=False),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return self.op(x_NCHW)


class Mixed(nn.Module):
    """The sum of what a cell's operations give: separable convolutions, and the input itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList([SepConv(channels), nn.Identity()])

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        sep_conv, identity = self._ops
        return sep_conv(x_NCHW) + identity(x_NCHW)


class Gate(nn.Sequential):
    """Features -> one value from 0 to 1 for each way out; most of those that are off are 0."""

    def __init__(self, channels: int, num_ways: int, bias: float) -> None:
        last = nn.Conv2d(channels // 2, num_ways, 1)
        nn.init.kaiming_normal_(last.weight, mode="fan_in", nonlinearity="relu")
        assert last.bias is not None
        nn.init.constant_(last.bias, bias)
        super().__init__(ConvNorm(channels, channels // 2), nn.AdaptiveAvgPool2d(1), last)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, num_ways]."""
        return super().forward(x_NCHW).flatten(1).tanh().relu()
