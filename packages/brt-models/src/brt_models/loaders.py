"""What `brt load` calls for each model: a path and options that can be written as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from brt.errors import BrtError
from brt_models import checkpoints, classsr, dynamic_routing, ranet, sparse_decoder
from brt_models.msdnet.checkpoint import load_checkpoint

_FAMILIES = {"deepseek-v2", "deepseek-v3", "gpt-oss", "mixtral", "qwen3-moe"}


def load_msdnet(path: Path) -> nn.Module:
    """A checkpoint of the authors' code; which published network is told by its shapes."""
    return load_checkpoint(path)


def load_ranet(path: Path) -> nn.Module:
    """A checkpoint of the authors' code; which of their networks is told by its shapes."""
    return ranet.load_checkpoint(path)


def load_classsr(path: Path) -> nn.Module:
    """A checkpoint of the authors' code; which kind of branches is told by its names."""
    return classsr.load(path)


def load_dynamic_routing(path: Path, network: str | None = None) -> nn.Module:
    """A checkpoint of the authors' code, of network A, B, C or Raw."""
    return dynamic_routing.load_checkpoint(path, network)


def sparse_block_loader(family: str) -> Callable[..., nn.Module]:
    """The loader of one family: the block of one layer out of a folder."""

    def load_sparse_block(folder: Path, layer: int = 0) -> nn.Module:
        kind = str(checkpoints.read_config(folder).get("model_type")).replace("_", "-")
        if kind != family and kind in _FAMILIES:
            raise BrtError(f"{folder} holds a {kind} model, not a {family} one")
        return sparse_decoder.load(folder, layer)

    return load_sparse_block
