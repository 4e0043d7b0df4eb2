"""Handwritten digits that scikit-learn ships, in three parts: 8x8 pixels, 17 shades of grey.

Nothing is downloaded, and scikit-learn is not imported; it comes with the extra ``photos``.

Shape letters: N images, C colours (three equal ones), H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from brt.errors import BrtError
from brt_models.photos import Photo, path_of

Part = Literal["train", "validation", "test"]

# Places in an order that `_order` shuffles: in the file's, neighbours are often of one hand, and
# images at its end are harder than those at its start.
PARTS: dict[Part, range] = {
    "train": range(0, 997),
    "validation": range(997, 1297),
    "test": range(1297, 1797),
}
_STRIDE = 1013  # prime
_FILE = Photo("digits", "scikit-learn", "sklearn", "datasets/data/digits.csv.gz", "train")
_SHADES, _MEAN, _SPREAD = 16.0, 0.305, 0.376  # of the training images


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of one part.

    Attributes:
        images: [N, 3, 8, 8], normalised.
        labels: [N], 0 to 9.
    """

    images: Tensor
    labels: Tensor


def load(part: Part) -> Digits:
    """Images and labels of one part."""
    if part not in get_args(Part):
        raise BrtError(f"digits.load: there are {', '.join(get_args(Part))}; got {part!r}")
    table = np.loadtxt(path_of(_FILE), delimiter=",", dtype=np.float32)
    rows = torch.from_numpy(table[_order(len(table))[PARTS[part].start : PARTS[part].stop]])
    grey_N1HW = (rows[:, :-1].view(-1, 1, 8, 8) / _SHADES - _MEAN) / _SPREAD
    return Digits(grey_N1HW.expand(-1, 3, -1, -1).contiguous(), rows[:, -1].long())


def shades(images_NCHW: Tensor) -> Tensor:
    """The images as they are to be looked at: [N, H, W], 0 to 1."""
    return (images_NCHW[:, 0] * _SPREAD + _MEAN).clamp(0, 1)


def _order(num_images: int) -> list[int]:
    """A shuffle that no release of any library changes."""
    return [place * _STRIDE % num_images for place in range(num_images)]
