"""Super-resolution by patches of different difficulty, after LiveSR and ClassSR.

A photo is cut into overlapping patches, a small convolutional gate sends each patch to one of a
few residual networks of different width and depth, and the results are folded back at the higher
resolution. Each branch predicts what bicubic upscaling lacks, so that even the cheapest one
starts from a bicubic photo.

The networks themselves are in `brt_models.livesr` (Brainstorm, OSDI 2023, section 5.2) and
`brt_models.classsr` (Kong et al., CVPR 2021).
"""

from brt_models.patch_sr.config import PatchSRConfig
from brt_models.patch_sr.files import load, pretrained, save
from brt_models.patch_sr.network import Branch, Gate, PatchSR, centred, sample

__all__ = [
    "Branch",
    "Gate",
    "PatchSR",
    "PatchSRConfig",
    "centred",
    "load",
    "pretrained",
    "sample",
    "save",
]
