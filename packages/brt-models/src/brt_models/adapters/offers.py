"""The adapters that brt-models offers through the hook ``brt_adapters``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

import brt
from brt_models.adapters import families, stacked


def _family_of(module: nn.Module) -> families.Family | None:
    return next((family for family in families.FAMILIES if family.matches(module)), None)


def _matches_stacked(module: nn.Module) -> bool:
    return not isinstance(module, stacked.StackedExperts) and stacked.matches(module)


def _adapt_family(module: nn.Module) -> nn.Module:
    family = _family_of(module)
    assert family is not None
    return family.adapt(module)


def _open(name: str) -> nn.Module | None:
    """A model of transformers without weights: of a class by its default config, or a folder's."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    folder = Path(name)
    if (folder / "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = getattr(config, "architectures", None) or []
        cls = getattr(transformers, names[0], None) if names else None
    else:
        cls = getattr(transformers, name, None)
        config = getattr(cls, "config_class", None)
        config = config() if config is not None else None
    if cls is None or config is None:
        return None
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


ADAPTERS = (
    brt.AdapterSpec(
        name="stacked-experts",
        summary="mixtures of transformers and alike, whose experts are stacked in one parameter",
        matches=_matches_stacked,
        adapt=stacked.adapt,
        leaves=stacked.leaves,
        opens=_open,
    ),
    brt.AdapterSpec(
        name="transformers-families",
        summary="mixtures of transformers that are kept otherwise: "
        + ", ".join(family.cls for family in families.FAMILIES),
        matches=lambda module: _family_of(module) is not None,
        adapt=_adapt_family,
        leaves=families.leaves,
    ),
)
