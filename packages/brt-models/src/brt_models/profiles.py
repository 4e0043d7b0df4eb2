"""Real routing: where the shipped weights send real cells, as profiles.

Digits and text are those of the part "validation", photos those of "train" and "profile". Made when
asked for, in seconds, from weights and data that are installed.
"""

from __future__ import annotations

from collections.abc import Callable

import brt
from brt.errors import BrtError
from brt_models import digits as digit_images
from brt_models import english, msdnet, patch_sr, photos, switch_text
from brt_models.msdnet import MSDNet
from brt_models.patch_sr import PatchSR
from brt_models.switch_text import SwitchText

WINDOW = 256  # bytes of a text


def of(name: str) -> brt.Profile:
    """The profile of a trained model: ``"patch-sr"``, ``"digits"``, ``"text"``."""
    if name not in PROFILES:
        raise BrtError(f"profiles.of: there are {', '.join(PROFILES)}; got {name!r}")
    return PROFILES[name]()


def photo_patches(model: PatchSR | None = None) -> brt.Profile:
    """Which of four networks the patches of eleven photos take."""
    seen = photos.split("train") + photos.split("profile")
    return brt.profile(model or patch_sr.pretrained(), [photos.load(photo)[None] for photo in seen])


def digit_exits(model: MSDNet | None = None) -> brt.Profile:
    """At which exit handwritten digits of the part "validation" leave."""
    images_NCHW = digit_images.load("validation").images
    return brt.profile(model or msdnet.pretrained_digits(), list(images_NCHW.split(50)))


def text_experts(model: SwitchText | None = None) -> brt.Profile:
    """Which of eight experts the bytes of the part "validation" take, in two layers."""
    ids_S = english.ids("validation")
    whole = len(ids_S) - len(ids_S) % WINDOW
    pieces_BS = ids_S[:whole].view(-1, WINDOW)[:64]
    return brt.profile(model or switch_text.pretrained(), list(pieces_BS.split(8)))


PROFILES: dict[str, Callable[[], brt.Profile]] = {
    "patch-sr": photo_patches,
    "digits": digit_exits,
    "text": text_experts,
}
