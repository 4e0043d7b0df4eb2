"""The models that ship with weights of their own making, and the demos of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import brt
from brt_models import digits, msdnet, switch_text
from brt_models.msdnet import MSDNet, digits_config
from brt_models.switch_text import SwitchText


def sample_digits(seed: int = 0) -> tuple[Tensor]:
    """Eight handwritten digits [8, 3, 8, 8] of the part "validation"."""
    images_NCHW = digits.load("validation").images
    picked_N = torch.randperm(len(images_NCHW), generator=torch.Generator().manual_seed(seed))[:8]
    return (images_NCHW[picked_N],)


def patch_sr_demo(source: str | None, out: Path, **options: Any) -> Mapping[str, Any]:
    """A photo upscaled."""
    from brt_models.demo.patch_sr import run  # draws: imports matplotlib

    return run(None if source is None else Path(source), out, **options)


def digits_demo(source: str | None, out: Path, **options: Any) -> Mapping[str, Any]:
    """Digits that leave at exits."""
    from brt_models.demo.digits import run

    return run(out, **options)


def text_demo(source: str | None, out: Path, **options: Any) -> Mapping[str, Any]:
    """Text whose bytes go to experts."""
    from brt_models.demo.text import run

    return run(source, out, **options)


TRAINED = (
    brt.ModelSpec(
        name="msdnet-digits",
        summary="MSDNet for handwritten digits, with weights; sure images leave early",
        factory=lambda: MSDNet(digits_config()).eval(),
        sample=sample_digits,
        title="MSDNet for digits",
        cells="an image",
        paper="Huang et al. (ICLR 2018)",
        checkpoints=("safetensors",),
        pretrained=msdnet.pretrained_digits,
        load=msdnet.load,
    ),
    brt.ModelSpec(
        name="switch-text",
        summary="language model of bytes with Switch layers, with weights",
        factory=lambda: SwitchText().eval(),
        sample=switch_text.sample,
        title="Switch for text",
        cells="a byte",
        paper="Fedus et al. (JMLR 2022)",
        checkpoints=("safetensors",),
        pretrained=switch_text.pretrained,
        load=switch_text.load,
    ),
)
DEMOS = (
    brt.DemoSpec(
        name="patch-sr",
        summary="a photo upscaled fourfold; easy patches take smaller networks",
        run=patch_sr_demo,
        source="a photo",
    ),
    brt.DemoSpec(
        name="digits",
        summary="handwritten digits leave a network as soon as it is sure of them",
        run=digits_demo,
    ),
    brt.DemoSpec(
        name="text",
        summary="a language model writes on; each byte in the colour of its expert",
        run=text_demo,
        source="words to go on from",
    ),
)
