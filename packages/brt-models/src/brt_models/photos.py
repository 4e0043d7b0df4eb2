"""Photographs that Python packages ship, in three splits; and picture files of any kind.

Nothing is downloaded. The packages that hold the photos are the extra ``photos`` of brt-models;
a photo is read from its package's folder without importing the package.

Shape letters: C colours (red, green, blue), H height, W width. Values are 0 to 1.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from brt.errors import BrtError

Split = Literal["train", "profile", "held-out"]


@dataclass(frozen=True)
class Photo:
    """One photo inside an installed package."""

    name: str
    distribution: str  # what pip calls the package
    package: str  # what Python imports it as
    file: str  # inside the package's folder
    split: Split


_SKIMAGE = ("scikit-image", "skimage")
_SKLEARN = ("scikit-learn", "sklearn")
_MATPLOTLIB = ("matplotlib", "matplotlib")

# Weights come from "train", profiles and every choice made by looking at results from "profile".
# "held-out" is for the final figures only.
PHOTOS: tuple[Photo, ...] = (
    Photo("astronaut", *_SKIMAGE, "data/astronaut.png", "train"),
    Photo("brick", *_SKIMAGE, "data/brick.png", "train"),
    Photo("coffee", *_SKIMAGE, "data/coffee.png", "train"),
    Photo("coins", *_SKIMAGE, "data/coins.png", "train"),
    Photo("flower", *_SKLEARN, "datasets/images/flower.jpg", "train"),
    Photo("grass", *_SKIMAGE, "data/grass.png", "train"),
    Photo("gravel", *_SKIMAGE, "data/gravel.png", "train"),
    Photo("hubble", *_SKIMAGE, "data/hubble_deep_field.jpg", "train"),
    Photo("motorcycle", *_SKIMAGE, "data/motorcycle_left.png", "train"),
    Photo("grace-hopper", *_MATPLOTLIB, "mpl-data/sample_data/grace_hopper.jpg", "profile"),
    Photo("rocket", *_SKIMAGE, "data/rocket.jpg", "profile"),
    Photo("camera", *_SKIMAGE, "data/camera.png", "held-out"),
    Photo("chelsea", *_SKIMAGE, "data/chelsea.png", "held-out"),
    Photo("china", *_SKLEARN, "datasets/images/china.jpg", "held-out"),
)


def split(which: Split) -> tuple[Photo, ...]:
    """The photos of one split, in a fixed order."""
    if which not in get_args(Split):
        raise BrtError(f"photos.split: there are {', '.join(get_args(Split))}; got {which!r}")
    return tuple(photo for photo in PHOTOS if photo.split == which)


def find(name: str) -> Photo:
    """The photo called ``name``."""
    for photo in PHOTOS:
        if photo.name == name:
            return photo
    names = ", ".join(photo.name for photo in PHOTOS)
    raise BrtError(f"photos.find: no photo {name!r}; there are {names}")


def path_of(photo: Photo) -> Path:
    """The file of a photo; its package need not be importable, only installed."""
    found = importlib.util.find_spec(photo.package)
    folders = [] if found is None else list(found.submodule_search_locations or [])
    for folder in folders:
        if (file := Path(folder) / photo.file).is_file():
            return file
    have = "is not installed" if not folders else f"has no file {photo.file}"
    raise BrtError(
        f"photo {photo.name!r}: {photo.distribution} {have}; "
        "the photos come with pip install 'brt-models[photos]'"
    )


def load(photo: Photo) -> Tensor:
    """One photo of the table as [3, H, W]."""
    return read(path_of(photo))


def read(path: Path) -> Tensor:
    """Any picture file as [3, H, W].

    Greyscale becomes three equal channels, transparency lies on white, 16 bits are scaled, and the
    orientation that a camera notes is applied.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip at 255
                grey_HW = np.asarray(image, dtype=np.float32) / 65535
                return torch.from_numpy(grey_HW).clamp(0, 1).expand(3, -1, -1).contiguous()
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            pixels_HWC = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise BrtError(f"photo {path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise BrtError(f"photo {path}: not a picture that Pillow can read ({error})") from error
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() / 255


def write(x_CHW: Tensor, path: Path) -> None:
    """Save [3, H, W] as a picture file, values rounded to 8 bits."""
    pixels_HWC = (x_CHW.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels_HWC.cpu().contiguous().numpy()).save(path)
