"""Photographs that Python packages ship, in three splits.

Nothing is downloaded. The packages that hold the photos are the extra ``photos`` of brt-models;
a photo is read from its package's folder without importing the package.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

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
    """One photo of the table as [3, H, W], red, green and blue from 0 to 1."""
    from brt_models.picture_files import read  # with Pillow, which lists of photos do not need

    return read(path_of(photo))
