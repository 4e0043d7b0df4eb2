"""Photos: the split holds, and any picture file becomes three channels from 0 to 1."""

from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from brt.errors import BrtError
from brt_models import photos, picture_files

SPLITS = ("train", "profile", "held-out")


def test_no_photo_is_in_two_splits() -> None:
    files = {name: {photos.path_of(photo) for photo in photos.split(name)} for name in SPLITS}
    digests = {
        name: {hashlib.sha256(file.read_bytes()).hexdigest() for file in found}
        for name, found in files.items()
    }
    for one, other in combinations(SPLITS, 2):
        assert not files[one] & files[other]
        assert not digests[one] & digests[other]
    assert sum(map(len, files.values())) == len(photos.PHOTOS)
    assert all(files.values())


@pytest.mark.parametrize("photo", photos.PHOTOS, ids=lambda photo: photo.name)
def test_every_photo_loads(photo: photos.Photo) -> None:
    x_CHW = photos.load(photo)
    assert x_CHW.shape[0] == 3
    assert min(x_CHW.shape[1:]) >= 300
    assert 0 <= x_CHW.min() < x_CHW.max() <= 1


def test_unknown_split_and_name_say_what_there_is() -> None:
    with pytest.raises(BrtError, match="train, profile, held-out; got 'test'"):
        photos.split("test")  # type: ignore[arg-type]
    with pytest.raises(BrtError, match=r"no photo 'chino'; there are astronaut, .*china"):
        photos.find("chino")


def test_a_missing_package_is_named() -> None:
    photo = photos.Photo("x", "no-such-thing", "no_such_thing", "x.png", "train")
    with pytest.raises(BrtError, match=r"no-such-thing is not installed.*brt-models\[photos\]"):
        photos.path_of(photo)
    photo = photos.Photo("x", "scikit-image", "skimage", "data/x.png", "train")
    with pytest.raises(BrtError, match=r"scikit-image has no file data/x\.png"):
        photos.path_of(photo)


def test_greyscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 51], [102, 255]], dtype=np.uint8)).save(tmp_path / "g.png")
    x_CHW = picture_files.read(tmp_path / "g.png")
    assert torch.equal(x_CHW[0], torch.tensor([[0, 0.2], [0.4, 1]]))
    assert torch.equal(x_CHW, x_CHW[:1].expand(3, -1, -1))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768], [65535, 1]], dtype=np.uint16)).save(tmp_path / "g.png")
    x_CHW = picture_files.read(tmp_path / "g.png")
    assert x_CHW.shape == (3, 2, 2)
    torch.testing.assert_close(x_CHW[1, 0], torch.tensor([0, 32768 / 65535]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        image = image.quantize(2)
    elif mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "a.png")
    x_CHW = picture_files.read(tmp_path / "a.png")
    assert x_CHW[:, 0].tolist() == [[0, 1]] * 3


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "e.jpg", exif=exif)
    assert picture_files.read(tmp_path / "e.jpg").shape == (3, 8, 4)


def test_what_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BrtError, match="no such file"):
        picture_files.read(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(BrtError, match="not a picture that Pillow can read"):
        picture_files.read(tmp_path / "text.png")
    picture_files.write(torch.rand(3, 64, 64), tmp_path / "cut.png")
    cut = (tmp_path / "cut.png").read_bytes()[:-2000]
    (tmp_path / "cut.png").write_bytes(cut)
    with pytest.raises(BrtError, match="not a picture that Pillow can read"):
        picture_files.read(tmp_path / "cut.png")
    with pytest.raises(BrtError, match="not a picture that Pillow can read"):
        picture_files.read(tmp_path)


def test_write_and_read_keep_eight_bits(tmp_path: Path) -> None:
    x_CHW = torch.randint(256, (3, 5, 7)) / 255
    picture_files.write(x_CHW, tmp_path / "x.png")
    assert torch.equal(picture_files.read(tmp_path / "x.png"), x_CHW)
    picture_files.write(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1), tmp_path / "x.png")
    assert picture_files.read(tmp_path / "x.png").flatten().tolist() == [
        0,
        pytest.approx(128 / 255),
        1,
    ]
