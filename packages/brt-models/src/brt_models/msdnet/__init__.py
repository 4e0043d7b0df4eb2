"""MSDNet: multi-scale dense blocks with a classifier after each; sure images leave early.

Every block works on all scales of an image, so that features at the coarse scale, which a
classifier needs, are there from the start. An image whose softmax is sure enough leaves, and only
the others go on to the next block.

Huang et al., ICLR 2018. Layers are named as in the authors' PyTorch code, so that its checkpoints
load.
"""

from brt_models.msdnet.checkpoint import load_checkpoint, save_checkpoint
from brt_models.msdnet.config import MSDNetConfig
from brt_models.msdnet.files import digits_config, load, pretrained_digits, save
from brt_models.msdnet.network import MSDNet, sample, small
from brt_models.msdnet.thresholds import NEVER, exits_of, thresholds_for, thresholds_for_shares

__all__ = [
    "NEVER",
    "MSDNet",
    "MSDNetConfig",
    "digits_config",
    "exits_of",
    "load",
    "load_checkpoint",
    "pretrained_digits",
    "sample",
    "save",
    "save_checkpoint",
    "small",
    "thresholds_for",
    "thresholds_for_shares",
]
