"""LiveSR: patches of a video frame, sorted by k-means of ResNet features, each to its own network.

Source: LiveSR in Brainstorm, OSDI 2023, section 5.2; branches of NAS, Yeo et al., OSDI 2018.
"""

from brt_models.livesr.config import PUBLISHED, LiveSRConfig
from brt_models.livesr.files import (
    load,
    load_branches,
    load_kmeans,
    load_resnet,
    save,
    save_kmeans,
)
from brt_models.livesr.network import LiveSR, livesr, sample

__all__ = [
    "PUBLISHED",
    "LiveSR",
    "LiveSRConfig",
    "livesr",
    "load",
    "load_branches",
    "load_kmeans",
    "load_resnet",
    "sample",
    "save",
    "save_kmeans",
]
