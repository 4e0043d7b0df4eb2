"""Making photos smaller and larger: the degradation that training undoes, and the base it adds to.

Shape letters: B photos, C colours, H height, W width. Values are 0 to 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from brt.errors import BrtError


def to_8_bits(x: Tensor) -> Tensor:
    """The values that a picture file would keep."""
    return (x.clamp(0, 1) * 255).round() / 255


def crop_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Drop the last rows and columns so that height and width are multiples."""
    height, width = (size - size % multiple for size in x.shape[-2:])
    return x[..., :height, :width]


def shrink(x_BCHW: Tensor, scale: int) -> Tensor:
    """The degradation of the super-resolution literature: antialiased bicubic, then 8 bits."""
    height, width = x_BCHW.shape[-2:]
    if height % scale or width % scale:
        raise BrtError(
            f"shrink: {height}x{width} is no multiple of {scale}; use crop_to_multiple first"
        )
    return to_8_bits(resize(x_BCHW, height // scale, width // scale))


def enlarge(x_BCHW: Tensor, scale: int) -> Tensor:
    """torch's bicubic (a = -0.75): the base of the network and what it is compared with.

    It is 0.1 to 0.2 dB better on these photos than the a = -0.5 of Pillow and MATLAB.
    """
    return F.interpolate(x_BCHW, scale_factor=scale, mode="bicubic", align_corners=False)


def resize(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic to a smaller size."""
    return F.interpolate(
        x_BCHW, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
