"""Weights of a byte model as safetensors, with the config that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brt_models import weight_files
from brt_models.switch.config import SwitchConfig
from brt_models.switch_text.network import SwitchText

WEIGHTS = "switch_text.safetensors"


def save(model: SwitchText, path: Path, record: Mapping[str, Any]) -> None:
    """Write weights with the config that they fit and how they were made."""
    weight_files.save(model, path, asdict(model.config), record)


def load(path: Path) -> SwitchText:
    """The model of a file that `save` wrote, in eval mode."""
    return weight_files.load(
        path, "switch_text.load", lambda fields: SwitchText(SwitchConfig(**fields))
    )


def pretrained() -> SwitchText:
    """The model with the weights that ship with this package, in eval mode."""
    return load(weight_files.shipped(WEIGHTS))
