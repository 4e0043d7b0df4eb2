"""Writing what other code reads, at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brt.files import atomic_write
from brt_models.checkpoints.reading import CONFIG, WEIGHTS


def write(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    wrap: str | None = None,
    prefix: str = "",
    **beside: Any,
) -> None:
    """Write what ``torch.load`` reads: names and tensors, under the key ``wrap`` if one is given.

    ``prefix`` goes before every name; ``beside`` are further keys of the file.
    """
    state = {prefix + name: tensor.detach().cpu() for name, tensor in tensors.items()}
    # Into an open file: by path, torch would keep the temporary name in it, and refuse some names
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(beside | ({wrap: state} if wrap else state), file)


def write_folder(
    folder: str | PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write a folder of the Hugging Face kind: safetensors and ``config.json``."""
    folder = Path(folder)
    with atomic_write(folder / WEIGHTS[0]) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"format": "pt"})
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2))
