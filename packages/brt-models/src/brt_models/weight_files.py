"""Weights that training scripts made, as safetensors, with the config that they fit."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from brt.errors import BrtError
from brt.files import atomic_write
from brt_models.checkpoints import assign

M = TypeVar("M", bound=nn.Module)


def save(
    model: nn.Module, path: Path, config: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Write weights with the config that they fit and how they were made, at once or not at all.

    The record is what a training script knows: its recipe, what it ran on, the quality found.
    """
    about = {"config": json.dumps(config), "record": json.dumps(record)}
    with atomic_write(path) as beside:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, beside, about)


def load(path: Path, who: str, make: Callable[[dict[str, Any]], M]) -> M:
    """The model of a file that `save` wrote, in eval mode; ``make`` makes it of its config.

    Raises `BrtError` in the name of ``who`` where the file cannot be read, or does not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BrtError(f"{who}: cannot read {path}: {error}") from error
    if "config" not in about:
        raise BrtError(f"{who}: {path} names no config; the training scripts write such files")
    try:
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in json.loads(about["config"]).items()
        }
        model = make(fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise BrtError(f"{who}: {path}: its config does not fit: {error}") from error
    assign(model, weights, f"{who}: {path}")
    return model.eval()


def shipped(file: str) -> Path:
    """The path of weights that ship with this package."""
    return Path(str(resources.files("brt_models"))) / "weights" / file


def record_of(path: Path) -> dict[str, Any]:
    """How the weights of a file were made."""
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["record"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BrtError(f"{path}: no record of how its weights were made: {error}") from error
    return found


def versions(*distributions: str) -> dict[str, str]:
    """Of Python, and of installed distributions: what a record says that weights were made with."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in distributions
    }
