"""Swin-MoE: a windowed vision transformer, some of whose MLPs are mixtures of experts.

The network of Tutel's evaluation (there SwinV2-MoE, arXiv:2206.03382) and of the Swin-MoE
checkpoints: Liu et al. 2021, arXiv:2103.14030, with the continuous position bias of Swin V2,
arXiv:2111.09883. Layers are named as in the authors' code, so that its checkpoints load.
"""

from brt_models.swin_moe.config import SwinMoEConfig
from brt_models.swin_moe.files import load_ranks, merge_ranks
from brt_models.swin_moe.mixture import Mixture
from brt_models.swin_moe.network import SwinMoE, sample, small

__all__ = [
    "Mixture",
    "SwinMoE",
    "SwinMoEConfig",
    "load_ranks",
    "merge_ranks",
    "sample",
    "small",
]
