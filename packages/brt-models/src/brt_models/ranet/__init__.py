"""RANet: easy images are recognised at a low resolution, and leave; hard ones go on to a higher.

Sub-networks for rising resolutions, each of which takes in the features of the one before, with
classifiers behind the blocks that are its own.

Yang et al., CVPR 2020. Layers are named as in the authors' code, so that its checkpoints load.
"""

from brt_models.msdnet.thresholds import exits_of, thresholds_for, thresholds_for_shares
from brt_models.ranet.checkpoint import load_checkpoint, save_checkpoint
from brt_models.ranet.config import RANetConfig
from brt_models.ranet.network import RANet, sample, small

__all__ = [
    "RANet",
    "RANetConfig",
    "exits_of",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
    "small",
    "thresholds_for",
    "thresholds_for_shares",
]
