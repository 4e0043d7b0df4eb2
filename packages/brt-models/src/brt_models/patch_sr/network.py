"""The patch network: gate, branches, and the routers between them.

Shape letters: B photos, N patches (cells), P paths, C colours, H height, W width, F features,
s the scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brt import Cells, GatherRouter, ScatterRouter, annotate_patches, each
from brt.errors import BrtError
from brt.protocols import TopK
from brt_models.patch_sr.config import PatchSRConfig
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


class PixelShuffle(nn.PixelShuffle):
    """torch's, but for the backward, which raises there where there are no rows (torch 2.13)."""

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F*s*s, H, W] -> [N, F, s*H, s*W]."""
        scale = self.upscale_factor
        apart = x_NFHW.unflatten(1, (-1, scale, scale))  # [N, F, s, s, H, W]
        return apart.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


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


class PatchSR(nn.Module):
    """Photos [B, 3, H, W], values 0 to 1 -> [B, 3, s*H, s*W].

    Values may leave 0 to 1 a little. A photo smaller than a patch is padded for the branches.
    """

    def __init__(self, config: PatchSRConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PatchSRConfig()
        self.gate: nn.Module = Gate(config)
        self.scatter = ScatterRouter(TopK(1), num_paths=config.num_paths)
        self.branches = nn.ModuleList(Branch(config, path) for path in range(config.num_paths))
        # The gate's scores rank the paths; they do not weight the results.
        self.gather = GatherRouter(weighted=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, s*H, s*W]."""
        config = self.config
        padded_BCHW = at_least(x_BCHW, config.size)
        cells_NCHW, grid = annotate_patches(padded_BCHW, config.size, config.stride)
        residual_NCHW = self.residual(centred(cells_NCHW), grid.cells)
        out_BCHW = enlarge(padded_BCHW, config.scale) + grid.restore(
            residual_NCHW, scale=config.scale
        )
        height, width = config.scale * x_BCHW.shape[2], config.scale * x_BCHW.shape[3]
        return out_BCHW[:, :, :height, :width]

    def residual(self, cells_NCHW: Tensor, cells: Cells | None = None) -> Tensor:
        """Centred patches [N, 3, H, W] -> what bicubic lacks [N, 3, s*H, s*W], each by its path."""
        paths, route = self.scatter(cells_NCHW, self.gate(cells_NCHW), cells)
        return self.gather(each(self.branches, paths), route)


def centred(cells_NCHW: Tensor) -> Tensor:
    """Patches without their mean colour: branches and gate see detail, not brightness."""
    return cells_NCHW - cells_NCHW.mean((2, 3), keepdim=True)


@torch.fx.wrap  # its checks read shapes, which a symbolic trace does not have
def at_least(x_BCHW: Tensor, size: int) -> Tensor:
    """Photos continued to the right and below to ``size`` where smaller; checks what they are."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or 0 in x_BCHW.shape[2:]:
        raise BrtError(
            f"PatchSR: photos must be [B, 3, H, W] (red, green, blue), got {list(x_BCHW.shape)}; "
            "brt_models.picture_files.read makes three channels of any picture"
        )
    if not x_BCHW.is_floating_point():
        raise BrtError(f"PatchSR: photos must be floats from 0 to 1, got {x_BCHW.dtype}")
    below, right = (max(0, size - extent) for extent in x_BCHW.shape[2:])
    if not below and not right:
        return x_BCHW
    return F.pad(x_BCHW, (0, right, 0, below), mode="replicate")


def livesr(channels: int = 8, num_paths: int = 10, num_blocks: int = 80) -> PatchSR:
    """The network of `PatchSRConfig.livesr`, with random weights, in eval mode."""
    return PatchSR(PatchSRConfig.livesr(channels, num_paths, num_blocks)).eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """A made-up photo [1, 3, 96, 128]: smooth on the left, more and more detailed to the right."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for extent in (4, 16, 48, 96):
        noise_BCHW = torch.rand(1, 3, extent, extent, generator=generator)
        grown_BCHW = F.interpolate(noise_BCHW, size=(96, 128), mode="bicubic")
        parts.append(grown_BCHW[..., 32 * len(parts) : 32 * len(parts) + 32])
    return (torch.cat(parts, 3).clamp(0, 1),)
