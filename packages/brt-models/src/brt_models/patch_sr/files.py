"""Weights of a patch network as safetensors, with the config that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brt_models import weight_files
from brt_models.patch_sr.config import PatchSRConfig
from brt_models.patch_sr.network import PatchSR

WEIGHTS = "patch_sr.safetensors"


def save(model: PatchSR, path: Path, record: Mapping[str, Any]) -> None:
    """Write weights with the config that they fit and how they were made."""
    weight_files.save(model, path, asdict(model.config), record)


def load(path: Path) -> PatchSR:
    """The model of a file that `save` wrote, in eval mode."""
    return weight_files.load(path, "patch_sr.load", lambda fields: PatchSR(PatchSRConfig(**fields)))


def pretrained() -> PatchSR:
    """The model with the weights that ship with this package, in eval mode."""
    return load(weight_files.shipped(WEIGHTS))
