"""Checkpoints of RANet as the authors' code writes them: ``{"state_dict": {"module.classi...``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

from torch import Tensor

from brt_models import checkpoints
from brt_models.ranet.config import RANetConfig
from brt_models.ranet.network import RANet

_PUBLISHED = {
    "small": RANetConfig(),
    "cifar": RANetConfig.cifar(),
    "imagenet": RANetConfig.imagenet(),
}


def load_checkpoint(path: str | PathLike[str], config: RANetConfig | None = None) -> RANet:
    """The network of a checkpoint, in eval mode, with thresholds of 0.9.

    Without a config it is the one in the file, where `save_checkpoint` wrote it, or that of one of
    the authors' networks, of any number of classes. Nothing in the file is executed. Raises
    `BrtError` with everything that does not fit.
    """
    return checkpoints.load_published(
        "ranet.load_checkpoint", path, RANet, RANetConfig, _candidates, config
    )


def save_checkpoint(model: RANet, path: str | PathLike[str]) -> None:
    """Write what the authors' code reads, and beside it the config."""
    checkpoints.save_published(model, path, wrap="state_dict", prefix="module.")


def _candidates(tensors: Mapping[str, Tensor]) -> dict[str, RANetConfig]:
    bias = "classifier.0.linear.bias"
    return {
        name: replace(
            config, num_classes=checkpoints.num_classes(tensors, bias, config.num_classes)
        )
        for name, config in _PUBLISHED.items()
    }
