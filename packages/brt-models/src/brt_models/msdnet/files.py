"""Weights of an MSDNet as safetensors, with its config; the network for handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brt_models import weight_files
from brt_models.msdnet.config import MSDNetConfig
from brt_models.msdnet.network import MSDNet

DIGITS = "msdnet_digits.safetensors"
BUDGETS = (0.1, 0.2, 0.4)
"""Of the multiply-adds of the whole network: what the shipped weights are measured at."""


def save(model: MSDNet, path: Path, record: Mapping[str, Any]) -> None:
    """Write weights with config and thresholds, and how they were made."""
    config = {"shape": asdict(model.config), "thresholds": model.thresholds}
    weight_files.save(model, path, config, record)


def load(path: Path) -> MSDNet:
    """The model of a file that `save` wrote, in eval mode."""

    def make(fields: dict[str, Any]) -> MSDNet:
        shape: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields["shape"].items()
        }
        return MSDNet(MSDNetConfig(**shape), fields["thresholds"])

    return weight_files.load(path, "msdnet.load", make)


def digits_config() -> MSDNetConfig:
    """The shape of the shipped network for `brt_models.digits`: four exits, three scales."""
    return MSDNetConfig(steps=(1, 2, 4, 4), channels=4, growth=4, prune="min", head_channels=16)


def pretrained_digits() -> MSDNet:
    """The network for handwritten digits with the weights that ship, in eval mode.

    Its thresholds keep to the second of `BUDGETS`.
    """
    return load(weight_files.shipped(DIGITS))
