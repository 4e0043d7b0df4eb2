"""Picture files to tensors and back.

Shape letters: C colours (red, green, blue), H height, W width. Values are 0 to 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from brt.errors import BrtError
from brt.files import atomic_write


def read(path: Path) -> Tensor:
    """Any picture file as [3, H, W].

    Greyscale becomes three equal channels, transparency lies on white, 16 bits are scaled, and the
    orientation that a camera notes is applied.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip at 255
                grey_HW = np.asarray(image, dtype=np.float32) / 65535
                return torch.from_numpy(grey_HW).clamp(0, 1).expand(3, -1, -1).contiguous()
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            pixels_HWC = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise BrtError(f"photo {path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise BrtError(f"photo {path}: not a picture that Pillow can read ({error})") from error
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() / 255


def write(x_CHW: Tensor, path: Path) -> None:
    """Save [3, H, W] as a picture file, values rounded to 8 bits."""
    pixels_HWC = (x_CHW.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    with atomic_write(path) as beside:
        Image.fromarray(pixels_HWC.cpu().contiguous().numpy()).save(beside)
