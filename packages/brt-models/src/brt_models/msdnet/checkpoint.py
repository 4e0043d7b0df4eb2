"""Checkpoints of MSDNet as the authors' code writes them: ``{"state_dict": {"module.blocks...``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

from torch import Tensor

from brt_models import checkpoints
from brt_models.msdnet.config import MSDNetConfig
from brt_models.msdnet.network import MSDNet

_PUBLISHED = {
    "small": MSDNetConfig(),
    "imagenet-4": MSDNetConfig.imagenet(4),
    "imagenet-6": MSDNetConfig.imagenet(6),
    "imagenet-7": MSDNetConfig.imagenet(7),
    "cifar": MSDNetConfig.cifar(),
}


def load_checkpoint(path: str | PathLike[str], config: MSDNetConfig | None = None) -> MSDNet:
    """The network of a checkpoint, in eval mode, with thresholds of 0.9.

    Without a config it is the one in the file, where `save_checkpoint` wrote it, or that of a
    published network, of any number of classes. Nothing in the file is executed. Raises `BrtError`
    with everything that does not fit.
    """
    return checkpoints.load_published(
        "msdnet.load_checkpoint", path, MSDNet, MSDNetConfig, _candidates, config
    )


def save_checkpoint(model: MSDNet, path: str | PathLike[str]) -> None:
    """Write what the authors' code reads, and beside it the config."""
    checkpoints.save_published(model, path, wrap="state_dict", prefix="module.")


def _candidates(tensors: Mapping[str, Tensor]) -> dict[str, MSDNetConfig]:
    bias = "classifier.0.linear.bias"
    return {
        name: replace(
            config, num_classes=checkpoints.num_classes(tensors, bias, config.num_classes)
        )
        for name, config in _PUBLISHED.items()
    }
