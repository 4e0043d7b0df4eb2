"""Checkpoints of dynamic routing as the authors' code writes them: ``{"model": {"backbone...``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

from torch import Tensor

from brt.errors import BrtError
from brt_models import checkpoints
from brt_models.dynamic_routing.config import DynamicRoutingConfig
from brt_models.dynamic_routing.network import DynamicRouting


def load_checkpoint(
    path: str | PathLike[str],
    network: str | None = None,
    config: DynamicRoutingConfig | None = None,
) -> DynamicRouting:
    """The network of a checkpoint, in eval mode.

    ``network`` is "A", "B", "C" or "Raw", of any number of classes; it must be given where neither
    a config is, nor the file has one from `save_checkpoint`: all four have the same names and
    shapes, but Raw's gates look at all of their input. Nothing in the file is executed. Raises
    `BrtError` with everything that does not fit.
    """

    def candidates(tensors: Mapping[str, Tensor]) -> dict[str, DynamicRoutingConfig]:
        if network is None:
            raise BrtError(
                f"dynamic_routing.load_checkpoint: {path} does not tell which network it is: say "
                "network='A', 'B', 'C' or 'Raw'"
            )
        published = DynamicRoutingConfig.cityscapes(network)
        bias = "sem_seg_head.predictor.bias"
        classes = checkpoints.num_classes(tensors, bias, published.num_classes)
        return {network: replace(published, num_classes=classes)}

    return checkpoints.load_published(
        "dynamic_routing.load_checkpoint",
        *(path, DynamicRouting, DynamicRoutingConfig, candidates, config),
    )


def save_checkpoint(model: DynamicRouting, path: str | PathLike[str]) -> None:
    """Write what the authors' code reads, and beside it the config."""
    checkpoints.save_published(model, path, wrap="model")
