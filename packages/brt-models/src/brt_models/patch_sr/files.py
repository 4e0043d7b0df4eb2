"""Weights of a patch network as safetensors, with the config that they fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from brt.errors import BrtError
from brt.files import atomic_write
from brt_models.patch_sr.config import PatchSRConfig
from brt_models.patch_sr.network import PatchSR

WEIGHTS = "weights/patch_sr.safetensors"  # in this package


def save(model: PatchSR, path: Path, recipe: dict[str, Any]) -> None:
    """Write weights with the config that they fit and how they were made, at once or not at all."""
    metadata = {"config": json.dumps(asdict(model.config)), "recipe": json.dumps(recipe)}
    with atomic_write(path) as beside:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, beside, metadata)


def load(path: Path) -> PatchSR:
    """The model of a file that `save` wrote, in eval mode."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BrtError(f"patch_sr.load: cannot read {path}: {error}") from error
    if "config" not in metadata:
        raise BrtError(f"patch_sr.load: {path} names no config; patch_sr.save writes such files")
    try:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in json.loads(metadata["config"]).items()
        }
        model = PatchSR(PatchSRConfig(**fields))
    except (AttributeError, TypeError, ValueError) as error:
        raise BrtError(f"patch_sr.load: {path}: its config does not fit: {error}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BrtError(
            f"patch_sr.load: the weights of {path} do not fit its config: {error}"
        ) from error
    return model.eval()


def pretrained() -> PatchSR:
    """The model with the weights that ship with this package, in eval mode."""
    with resources.as_file(resources.files("brt_models") / WEIGHTS) as path:
        return load(path)
