"""Random training patches from few photos: zooms, shifts, flips, turns and colours.

Shape letters: N patches, C colours, H W low-resolution height and width, s the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brt_models import resampling

ZOOMS = (1.0, 0.85, 0.7, 0.55)


@dataclass(frozen=True)
class Pair:
    """One photo at one zoom and shift, in both resolutions."""

    low_CHW: Tensor
    residual_CHW: Tensor  # what bicubic upscaling lacks, at the high resolution


class Crops:
    """Draws patches at random; ``refresh`` moves the grid on which the photos are shrunk.

    Whole photos are shrunk, not patches, so that a patch has the pixels it has in use.
    """

    def __init__(
        self,
        high: Sequence[Tensor],
        scale: int,
        size: int,
        generator: torch.Generator,
        device: torch.device | None = None,
    ) -> None:
        self.scale = scale
        self.size = size
        self.generator = generator
        self.device = device
        self.zoomed = [self._zoom(x_CHW, zoom) for x_CHW in high for zoom in ZOOMS]
        self.refresh()

    def refresh(self) -> None:
        """Shrink every photo again, from another top left corner."""
        self.pairs = [self._pair(x_CHW) for x_CHW in self.zoomed]
        self.area_I = torch.tensor([float(p.low_CHW[0].numel()) for p in self.pairs])

    def draw(self, num_patches: int) -> tuple[Tensor, Tensor]:
        """[N, 3, size, size] patches and the [N, 3, s*size, s*size] residuals to predict."""
        photo_N = torch.multinomial(
            self.area_I, num_patches, replacement=True, generator=self.generator
        )
        drawn = [self._crop(self.pairs[photo]) for photo in photo_N.tolist()]
        low, residual = zip(*drawn, strict=True)
        return torch.stack(low).to(self.device), torch.stack(residual).to(self.device)

    def _int(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    @staticmethod
    def _zoom(x_CHW: Tensor, zoom: float) -> Tensor:
        if zoom == 1:
            return x_CHW
        height, width = (round(size * zoom) for size in x_CHW.shape[-2:])
        return resampling.to_8_bits(resampling.resize(x_CHW[None], height, width)[0])

    def _pair(self, x_CHW: Tensor) -> Pair:
        top, left = self._int(self.scale), self._int(self.scale)
        high_BCHW = resampling.crop_to_multiple(x_CHW[None, :, top:, left:], self.scale)
        low_BCHW = resampling.shrink(high_BCHW, self.scale)
        return Pair(low_BCHW[0], (high_BCHW - resampling.enlarge(low_BCHW, self.scale))[0])

    def _crop(self, pair: Pair) -> tuple[Tensor, Tensor]:
        size, scale = self.size, self.scale
        top, left = (self._int(extent - size + 1) for extent in pair.low_CHW.shape[-2:])
        low = pair.low_CHW[:, top : top + size, left : left + size]
        residual = pair.residual_CHW[
            :, scale * top : scale * (top + size), scale * left : scale * (left + size)
        ]
        colours = torch.randperm(3, generator=self.generator)
        turns, flip = self._int(4), self._int(2)

        def turn(x_CHW: Tensor) -> Tensor:
            x_CHW = torch.rot90(x_CHW[colours], turns, (1, 2))
            return x_CHW.flip(2) if flip else x_CHW

        return turn(low), turn(residual)
