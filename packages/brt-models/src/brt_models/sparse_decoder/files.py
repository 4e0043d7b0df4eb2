"""One layer's sparse block out of a Hugging Face folder, without the rest of the model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from brt.errors import BrtError
from brt_models import checkpoints
from brt_models.sparse_decoder.block import SparseBlock
from brt_models.sparse_decoder.config import SparseBlockConfig

# Where a layer keeps its block: Mixtral's own place, and everybody else's
_PLACES = ("block_sparse_moe", "mlp")
_PART_OF = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names
_PARTS = ("gate_proj", "up_proj", "down_proj")


def load(
    folder: str | os.PathLike[str], layer: int, *, dtype: torch.dtype = torch.float32
) -> SparseBlock:
    """The block of one layer, in eval mode; of sharded weights only its shards are read.

    The folder holds a model of a family that `SparseBlockConfig.from_hugging_face` knows, with
    weights in floating point: those that are shipped quantised (gpt-oss's MXFP4, DeepSeek-V3's
    float8) are refused. Raises `BrtError` with everything that does not fit.
    """
    folder = Path(folder)
    what = f"sparse_decoder.load: layer {layer} of {folder}"
    config = SparseBlockConfig.from_hugging_face(checkpoints.read_config(folder))
    tensors: dict[str, Tensor] = {}
    for place in _PLACES:
        prefix = f"model.layers.{layer}.{place}."
        found = checkpoints.read(folder, prefix)
        tensors |= {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if not any(name.startswith("experts.") for name in tensors):
        raise BrtError(f"{what} has no experts: it is dense, or there is no such layer")
    block = SparseBlock(config).to(dtype)
    block.load_transformers(_stacked(tensors, config, what))
    return block.eval()


def _stacked(
    tensors: Mapping[str, Tensor], config: SparseBlockConfig, what: str
) -> dict[str, Tensor]:
    """Weights of each expert apart -> stacked ones, as transformers holds them in memory."""
    rest: dict[str, Tensor] = {}
    apart: dict[tuple[int, str], Tensor] = {}
    for name, tensor in tensors.items():
        of_expert = re.fullmatch(r"experts\.(\d+)\.(\w+)\.weight", name)
        if of_expert is None:
            rest[name] = tensor
        else:
            expert, part = of_expert.groups()
            apart[int(expert), _PART_OF.get(part, part)] = tensor
    if not apart:
        return rest
    wanted = {
        f"experts.{expert}.{part}.weight": torch.empty(
            (config.dim, config.hidden) if part == "down_proj" else (config.hidden, config.dim),
            device="meta",
        )
        for expert in range(config.num_experts)
        for part in _PARTS
    }
    named = {f"experts.{expert}.{part}.weight": t for (expert, part), t in apart.items()}
    checkpoints.check_fit(what, wanted, named)
    every = range(config.num_experts)
    gate_PHD, up_PHD, down_PDH = (torch.stack([apart[e, part] for e in every]) for part in _PARTS)
    rest["experts.gate_up_proj"] = torch.cat([gate_PHD, up_PHD], 1)
    rest["experts.down_proj"] = down_PDH
    return rest
