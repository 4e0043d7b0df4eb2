"""The patch network: gate, branches, and the routers between them.

Shape letters: B photos, N patches (cells), P paths, C colours, H height, W width, F features,
s the scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brt import PatchGrid
from brt_models.patch_sr.config import PatchSRConfig
from brt_models.patches import PatchNetwork, PixelShuffle, photo
from brt_models.resampling import enlarge

NO_DETAIL = 1e-4  # of a feature's mean: what the logarithm sees of a plain patch


class Block(nn.Module):
    """Two convolutions whose result is added to the input."""

    def __init__(self, channels: int, residual_scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.residual_scale = residual_scale

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return torch.add(x_NFHW, self.conv2(F.relu(self.conv1(x_NFHW))), alpha=self.residual_scale)


class Branch(nn.Module):
    """One sub-network: centred patches -> what bicubic upscaling of them lacks."""

    def __init__(self, config: PatchSRConfig, path: int) -> None:
        super().__init__()
        channels, scale = config.channels[path], config.scale
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            *(Block(channels, config.residual_scale) for _ in range(config.blocks[path]))
        )
        if config.upsampler == "direct":
            self.upscale = nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, 3 * scale**2, 3, padding=1), PixelShuffle(scale)
            )
        else:
            steps: list[nn.Module] = [nn.Conv2d(channels, channels, 3, padding=1)]
            for _ in range(scale.bit_length() - 1):
                steps += [nn.Conv2d(channels, 4 * channels, 3, padding=1), PixelShuffle(2)]
            self.upscale = nn.Sequential(*steps, nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, s*H, s*W]."""
        return self.upscale(self.body(self.head(x_NCHW)))


class Gate(nn.Module):
    """How well each path suits each patch: [N, 3, H, W] -> scores [N, P].

    It predicts the squared error that each path would make; a score is what error and multiply-adds
    cost together, negated, in units of the most expensive path.

    Convolutions without bias and a logarithm make predictions follow a power of the contrast, and
    no path is predicted to be worse than the one before it. So patches unlike those of training
    still go to larger networks the more there is to lose.
    """

    cost_P: Tensor

    def __init__(self, config: PatchSRConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for wider in config.gate_channels:
            conv = nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.ReLU()]
            channels = wider
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, config.num_paths)
        self.price = config.price
        cost_P = torch.tensor(config.macs_P, dtype=torch.get_default_dtype())
        self.register_buffer("cost_P", cost_P / max(config.macs_P), persistent=False)

    def detail(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> how much of each feature there is, as logarithms [N, F]."""
        return (self.features(x_NCHW).mean((2, 3)) + NO_DETAIL).log()

    def log_steps(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> logarithms [N, P] of the first path's mean squared error, and of what
        each further path leaves of the error of the one before.
        """
        out_NP = self.linear(self.detail(x_NCHW))
        return torch.cat([out_NP[:, :1], -F.softplus(out_NP[:, 1:])], 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P]."""
        return -(self.log_steps(x_NCHW).cumsum(1).exp() / self.price + self.cost_P)


class PatchSR(PatchNetwork):
    """Photos [B, 3, H, W], values 0 to 1 -> [B, 3, s*H, s*W].

    Branches give what bicubic upscaling lacks. Values may leave 0 to 1 a little. A photo smaller
    than a patch is padded for the branches.
    """

    def __init__(self, config: PatchSRConfig | None = None) -> None:
        config = config or PatchSRConfig()
        super().__init__(config.num_paths, config.size, config.stride, config.scale)
        self.config = config
        self.gate: nn.Module = Gate(config)
        self.branches = nn.ModuleList(Branch(config, path) for path in range(config.num_paths))

    @property
    def paths(self) -> Sequence[nn.Module]:
        """The branches, cheapest first."""
        return list(self.branches)

    def scores(self, cells_NCHW: Tensor) -> Tensor:
        """Centred patches [N, 3, H, W] -> [N, P]."""
        return self.gate(cells_NCHW)

    def cut(self, x_BCHW: Tensor) -> tuple[Tensor, PatchGrid]:
        """Centred patches [N, 3, H, W], and how to put them back."""
        cells_NCHW, grid = super().cut(x_BCHW)
        return centred(cells_NCHW), grid

    def residual(self, cells_NCHW: Tensor) -> Tensor:
        """Centred patches [N, 3, H, W] -> what bicubic lacks [N, 3, s*H, s*W], each by its path."""
        return self.routed(cells_NCHW)

    def join(self, rows_NCHW: Tensor, grid: PatchGrid, x_BCHW: Tensor) -> Tensor:
        """What branches gave, added to the photos enlarged by bicubic."""
        return enlarge(x_BCHW, self.scale) + super().join(rows_NCHW, grid, x_BCHW)


def centred(cells_NCHW: Tensor) -> Tensor:
    """Patches without their mean colour: branches and gate see detail, not brightness."""
    return cells_NCHW - cells_NCHW.mean((2, 3), keepdim=True)


def sample(seed: int = 0) -> tuple[Tensor]:
    """A made-up photo [1, 3, 96, 128]."""
    return photo(seed)
