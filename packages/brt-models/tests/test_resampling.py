"""Shrinking, enlarging and PSNR."""

from __future__ import annotations

import math

import pytest
import torch

from brt.errors import BrtError
from brt_models import quality
from brt_models.resampling import crop_to_multiple, enlarge, shrink, to_8_bits


def test_shrink_gives_what_a_file_would_keep() -> None:
    x_BCHW = torch.rand(2, 3, 24, 16)
    small_BCHW = shrink(x_BCHW, 4)
    assert small_BCHW.shape == (2, 3, 6, 4)
    assert torch.equal(small_BCHW, to_8_bits(small_BCHW))


def test_shrink_is_antialiased() -> None:
    stripes_BCHW = torch.zeros(1, 3, 64, 64)
    stripes_BCHW[..., ::2] = 1  # finer than the small photo can show: it must turn grey
    torch.testing.assert_close(
        shrink(stripes_BCHW, 4)[..., 4:-4], torch.full((1, 3, 16, 8), 0.5), atol=0.02, rtol=0
    )


def test_shrink_wants_a_multiple() -> None:
    with pytest.raises(BrtError, match="10x8 is no multiple of 4; use crop_to_multiple"):
        shrink(torch.rand(1, 3, 10, 8), 4)
    assert crop_to_multiple(torch.rand(1, 3, 10, 9), 4).shape == (1, 3, 8, 8)


def test_plain_colours_stay() -> None:
    plain_BCHW = torch.full((1, 3, 16, 16), 0.2)
    torch.testing.assert_close(shrink(plain_BCHW, 4), plain_BCHW[..., :4, :4])
    torch.testing.assert_close(enlarge(plain_BCHW, 2), torch.full((1, 3, 32, 32), 0.2))


def test_psnr() -> None:
    a = torch.zeros(1, 3, 10, 10)
    b = a + 0.1
    assert quality.psnr(a, b) == pytest.approx(20)
    assert quality.psnr(a, a) == math.inf
    b[..., 0, 0] = 1  # in the border only
    assert quality.psnr(a, b, border=1) == pytest.approx(20)
    with pytest.raises(BrtError, match="shapes differ"):
        quality.psnr(a, b[..., :5])
    with pytest.raises(BrtError, match="a border of 5 leaves nothing of 10x10"):
        quality.psnr(a, b, border=5)


def test_luma_of_black_and_white() -> None:
    x_BCHW = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(quality.luma(x_BCHW).flatten(), torch.tensor([16 / 255, 235 / 255]))
