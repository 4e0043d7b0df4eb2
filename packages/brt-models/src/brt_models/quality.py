"""How good an upscaling is: PSNR against the photo that was shrunk, beside bicubic's.

Shape letters: B photos (one), C colours, H height, W width, P paths.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from brt.errors import BrtError
from brt_models import photos
from brt_models.photos import Photo
from brt_models.resampling import crop_to_multiple, enlarge, shrink, to_8_bits

if TYPE_CHECKING:
    from brt import Route, ScatterRouter
    from brt.routers import Router


def luma(x_BCHW: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]: Y of BT.601 with its 16..235 range, as the literature does."""
    weights_C = x_BCHW.new_tensor([65.481, 128.553, 24.966]) / 255
    return (x_BCHW * weights_C.view(3, 1, 1)).sum(-3, keepdim=True) + 16 / 255


def psnr(a: Tensor, b: Tensor, *, border: int = 0) -> float:
    """Decibels between two pictures of one shape, ``border`` pixels cut off on each side."""
    if a.shape != b.shape:
        raise BrtError(f"psnr: shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    height, width = a.shape[-2:]
    if min(height, width) <= 2 * border:
        raise BrtError(f"psnr: a border of {border} leaves nothing of {height}x{width}")
    inside = (..., slice(border, height - border), slice(border, width - border))
    error = (a[inside].double() - b[inside].double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


@dataclass(frozen=True)
class Quality:
    """Decibels over one photo, ``scale`` pixels of its border left out, values in 8 bits."""

    photo: str
    rgb: float
    rgb_bicubic: float
    luma: float
    luma_bicubic: float

    @property
    def rgb_gain(self) -> float:
        """Decibels better than bicubic."""
        return self.rgb - self.rgb_bicubic

    @property
    def luma_gain(self) -> float:
        """Decibels better than bicubic, on luma alone."""
        return self.luma - self.luma_bicubic


def compare(high_BCHW: Tensor, out_BCHW: Tensor, scale: int, name: str) -> Quality:
    """The quality of ``out_BCHW``, made from ``high_BCHW`` shrunk by ``scale``."""
    bicubic_BCHW = to_8_bits(enlarge(shrink(high_BCHW, scale), scale))
    out_BCHW = to_8_bits(out_BCHW)
    return Quality(
        photo=name,
        rgb=psnr(out_BCHW, high_BCHW, border=scale),
        rgb_bicubic=psnr(bicubic_BCHW, high_BCHW, border=scale),
        luma=psnr(luma(out_BCHW), luma(high_BCHW), border=scale),
        luma_bicubic=psnr(luma(bicubic_BCHW), luma(high_BCHW), border=scale),
    )


def measure(
    upscale: Callable[[Tensor], Tensor],
    which: Iterable[Photo],
    scale: int,
    device: torch.device | None = None,
) -> tuple[Quality, ...]:
    """Shrink each photo, upscale it again (on ``device``), compare."""
    found = []
    for photo in which:
        high_BCHW = crop_to_multiple(photos.load(photo)[None], scale)
        with torch.inference_mode():
            out_BCHW = upscale(shrink(high_BCHW, scale).to(device)).cpu()
        found.append(compare(high_BCHW, out_BCHW, scale, photo.name))
    return tuple(found)


def mean_gain(found: Iterable[Quality]) -> float:
    """Mean decibels better than bicubic (RGB)."""
    return statistics.fmean(quality.rgb_gain for quality in found)


@contextmanager
def loads(scatter: ScatterRouter) -> Iterator[list[int]]:
    """Cells per path that a router sends while the context is open, added up over calls."""
    load_P = [0] * scatter.num_paths

    def add(router: Router, route: Route, scores: Tensor) -> None:
        for path, load in enumerate(route.load_P.tolist()):
            load_P[path] += load

    handle = scatter.register_observer(add)
    try:
        yield load_P
    finally:
        handle.remove()
