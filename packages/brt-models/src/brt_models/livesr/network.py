"""The network: k-means classes of patches, a branch for each, and the routers between them.

Shape letters: N patches (cells), P paths, F features, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from brt_models.livesr.config import LiveSRConfig
from brt_models.livesr.features import Classifier
from brt_models.patches import PatchNetwork, PixelShuffle, photo


class ResBlock(nn.Module):
    """Two convolutions whose result is added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), nn.ReLU(), _conv(channels, channels))

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return self.body(x_NFHW) + x_NFHW


class Branch(nn.Module):
    """NAS-MDSR, layers named as in the authors' ``SingleNetwork``."""

    def __init__(self, config: LiveSRConfig) -> None:
        super().__init__()
        channels = config.channels
        self.head = nn.Sequential(_conv(3, channels))
        self.body = nn.ModuleList(
            nn.Sequential(ResBlock(channels)) for _ in range(config.num_blocks)
        )
        self.body_end = nn.Sequential(_conv(channels, channels))
        grow: list[nn.Module] = []
        for _ in range(config.scale.bit_length() - 1):
            grow += [_conv(channels, 4 * channels), PixelShuffle(2)]
        self.upscale = nn.Sequential(nn.Sequential(*grow))
        self.tail = nn.Sequential(_conv(channels, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, s*H, s*W]."""
        top = x_NFHW = self.head(x_NCHW)
        for block in self.body:
            x_NFHW = block(x_NFHW)
        return self.tail(self.upscale(self.body_end(x_NFHW) + top))


class LiveSR(PatchNetwork):
    """Frames [B, 3, H, W] -> [B, 3, s*H, s*W], each patch by the branch of its k-means class.

    Values are in the range for which the classifier and the branches were made. In training mode
    only branches are trained, each on the patches that it gets.
    """

    def __init__(self, config: LiveSRConfig | None = None) -> None:
        config = config or LiveSRConfig()
        super().__init__(config.num_paths, config.size, config.stride, config.scale)
        self.config = config
        self.classifier = Classifier(config.num_paths)
        self.subnets = nn.ModuleList(Branch(config) for _ in range(config.num_paths))

    @property
    def paths(self) -> Sequence[nn.Module]:
        """The branches, in the order of the centres."""
        return list(self.subnets)

    def scores(self, cells_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P]."""
        return self.classifier(cells_NCHW)


def _conv(taken: int, given: int) -> nn.Conv2d:
    return nn.Conv2d(taken, given, 3, padding=1)


def livesr(channels: int = 8, num_paths: int = 10, num_blocks: int = 80) -> LiveSR:
    """The network with random weights and centres, in eval mode."""
    return LiveSR(LiveSRConfig(num_paths, channels, num_blocks)).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """A made-up frame [1, 3, 96, 128]."""
    return photo(seed)
