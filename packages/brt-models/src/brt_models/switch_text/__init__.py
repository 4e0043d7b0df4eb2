"""A small language model of bytes whose feed-forward layers are Switch layers, with its weights.

It reads and writes any text, and was trained on English by `brt_models.train.switch_text`.

Fedus et al. 2021, Switch Transformers, arXiv:2101.03961.
"""

from brt_models.switch_text.files import load, pretrained, save
from brt_models.switch_text.network import SwitchText, narrow, sample, small_config
from brt_models.switch_text.quality import bits_per_byte

__all__ = [
    "SwitchText",
    "bits_per_byte",
    "load",
    "narrow",
    "pretrained",
    "sample",
    "save",
    "small_config",
]
