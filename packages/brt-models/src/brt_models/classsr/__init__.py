"""ClassSR: each patch of a photo is enlarged by the network that its difficulty calls for.

A small classifier sorts patches into easy, middling and hard ones; three networks of one kind
(FSRCNN, CARN, SRResNet or RCAN) and of rising width enlarge them, and overlaps are averaged. Layers
are named as in the authors' code, so that its checkpoints load.

Source: Kong et al., CVPR 2021 (arXiv:2103.04039).
"""

from brt_models.classsr.config import ClassSRConfig
from brt_models.classsr.files import load, load_branches, save
from brt_models.classsr.network import ClassSR, sample, small
from brt_models.classsr.training import Losses, average_loss, class_loss, loss

__all__ = [
    "ClassSR",
    "ClassSRConfig",
    "Losses",
    "average_loss",
    "class_loss",
    "load",
    "load_branches",
    "loss",
    "sample",
    "save",
    "small",
]
