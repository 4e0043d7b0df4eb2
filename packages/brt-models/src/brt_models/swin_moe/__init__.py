"""Windowed vision transformers, some of whose MLPs are mixtures of experts.

Swin-MoE is the network of the published checkpoints: Liu et al. 2021, arXiv:2103.14030, with the
continuous position bias of Swin V2. SwinV2-MoE, of Tutel's evaluation (arXiv:2206.03382), has the
blocks of Swin V2, arXiv:2111.09883. Layers are named as in the authors' code, so that checkpoints
load.
"""

from brt_models.swin_moe.config import SwinMoEConfig
from brt_models.swin_moe.files import (
    load_ranks,
    merge_ranks,
    save_ranks,
    split_experts,
    split_ranks,
)
from brt_models.swin_moe.mixture import Mixture
from brt_models.swin_moe.network import SwinMoE, sample, small, small_v2

__all__ = [
    "Mixture",
    "SwinMoE",
    "SwinMoEConfig",
    "load_ranks",
    "merge_ranks",
    "sample",
    "save_ranks",
    "small",
    "small_v2",
    "split_experts",
    "split_ranks",
]
