"""What networks on overlapping patches of photos share: cutting, routing, putting back together.

Shape letters: B photos, N patches (cells), P paths, F features, H height, W width, s the scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt import Cells, GatherRouter, PatchGrid, ScatterRouter, annotate_patches, each
from brt.errors import BrtError
from brt.protocols import TopK


class PixelShuffle(nn.PixelShuffle):
    """torch's, but for the backward, which raises there where there are no rows (torch 2.13)."""

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F*s*s, H, W] -> [N, F, s*H, s*W]."""
        scale = self.upscale_factor
        apart = x_NFHW.unflatten(1, (-1, scale, scale))  # [N, F, s, s, H, W]
        return apart.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class PatchNetwork(nn.Module, ABC):
    """Photos [B, 3, H, W], values 0 to 1 -> [B, 3, s*H, s*W]; each patch takes one branch.

    Values may leave 0 to 1 a little. A photo smaller than a patch is padded for the branches. A
    subclass has ``paths``, its branches in the order of the scores, and ``scores``; it may change
    what ``cut`` gives the branches, if ``join`` undoes that.

    Args:
        num_paths: number of branches.
        size: height and width of a patch.
        stride: from one patch to the next.
        scale: how many times larger the result is.
    """

    def __init__(self, num_paths: int, size: int, stride: int, scale: int) -> None:
        super().__init__()
        self.size, self.stride, self.scale = size, stride, scale
        self.scatter = ScatterRouter(TopK(1), num_paths=num_paths)
        # Scores rank the paths; they do not weight the results.
        self.gather = GatherRouter(weighted=False)

    @property
    @abstractmethod
    def paths(self) -> Sequence[nn.Module]:
        """The branches, [N, 3, H, W] -> [N, 3, s*H, s*W] each."""

    @abstractmethod
    def scores(self, cells_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P]; the path of the highest score is taken."""

    def cut(self, x_BCHW: Tensor) -> tuple[Tensor, PatchGrid]:
        """What branches take, [N, 3, H, W], and how to put it back."""
        return annotate_patches(at_least(x_BCHW, self.size), self.size, self.stride)

    def routed(self, cells_NCHW: Tensor, cells: Cells | None = None) -> Tensor:
        """[N, 3, H, W] -> [N, 3, s*H, s*W], each patch by its path."""
        paths, route = self.scatter(cells_NCHW, self.scores(cells_NCHW), cells)
        return self.gather(each(self.paths, paths), route)

    def join(self, rows_NCHW: Tensor, grid: PatchGrid, x_BCHW: Tensor) -> Tensor:
        """What branches gave, [N, 3, s*H, s*W] -> [B, 3, s*H, s*W]; overlaps are averaged."""
        out_BCHW = grid.restore(rows_NCHW, scale=self.scale)
        height, width = self.scale * x_BCHW.shape[2], self.scale * x_BCHW.shape[3]
        return out_BCHW[:, :, :height, :width]

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> [B, 3, s*H, s*W]."""
        cells_NCHW, grid = self.cut(x_BCHW)
        return self.join(self.routed(cells_NCHW, grid.cells), grid, x_BCHW)


@torch.fx.wrap  # its checks read shapes, which a symbolic trace does not have
def at_least(x_BCHW: Tensor, size: int) -> Tensor:
    """Photos continued to the right and below to ``size`` where smaller; checks what they are."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or 0 in x_BCHW.shape[2:]:
        raise BrtError(
            f"photos must be [B, 3, H, W] (red, green, blue), got {list(x_BCHW.shape)}; "
            "brt_models.picture_files.read makes three channels of any picture"
        )
    if not x_BCHW.is_floating_point():
        raise BrtError(f"photos must be floats from 0 to 1, got {x_BCHW.dtype}")
    below, right = (max(0, size - extent) for extent in x_BCHW.shape[2:])
    if not below and not right:
        return x_BCHW
    return F.pad(x_BCHW, (0, right, 0, below), mode="replicate")


def check_patches(owner: str, size: int, stride: int) -> None:
    """Raise unless patches of this size and stride cover a photo."""
    if not 1 <= stride <= size:
        raise BrtError(f"{owner}: stride must be from 1 to size; got size={size}, stride={stride}")


def photo(seed: int = 0) -> tuple[Tensor]:
    """A made-up photo [1, 3, 96, 128]: smooth on the left, more and more detailed to the right."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for extent in (4, 16, 48, 96):
        noise_BCHW = torch.rand(1, 3, extent, extent, generator=generator)
        grown_BCHW = F.interpolate(noise_BCHW, size=(96, 128), mode="bicubic")
        parts.append(grown_BCHW[..., 32 * len(parts) : 32 * len(parts) + 32])
    return (torch.cat(parts, 3).clamp(0, 1),)
