"""Folders of the Hugging Face kind: ``config.json`` and weights, whole or in shards.

Nothing is downloaded, and no pickle can run code: ``.bin`` files are read by torch with
``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from brt.errors import BrtError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of whole weights, the one to take first; shards are listed in ``NAME.index.json``."""
CONFIG = "config.json"

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says."""
    return _read_json(folder / CONFIG)


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a folder whose names begin so, from the shards that hold any of them.

    Raises where such a shard, or anything that the index promises in it, is missing.
    """
    for name in WEIGHTS:
        if (folder / name).exists():
            return read_file(folder / name, prefix)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_shards(index, prefix)
    raise BrtError(
        f"{folder} holds no weights: neither {' nor '.join(WEIGHTS)}, nor one's .index.json"
    )


def read_file(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that torch wrote, whose names begin so."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise BrtError(f"cannot read {path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise BrtError(
            f"{path} holds more than tensors, and what it holds could run code; it was not "
            f"loaded: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise BrtError(f"{path} is no state dict: names and tensors, nothing else")
    return {name: tensor for name, tensor in loaded.items() if name.startswith(prefix)}


def assign(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> None:
    """Make ``tensors`` the parameters and buffers of a model, which may be on the meta device.

    Raises with everything that does not fit: what is missing, what is too much, other shapes and
    dtypes.
    """
    check_fit(what, model.state_dict(), tensors)
    model.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, assign=True)


def check_fit(what: str, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless ``tensors`` are the ones wanted, by name and shape, of floats."""
    complaints = [f"missing: {name} {list(wanted[name].shape)}" for name in sorted(wanted)
                  if name not in tensors]  # fmt: skip
    complaints += [f"not of this model: {name}" for name in sorted(tensors) if name not in wanted]
    for name in sorted(wanted.keys() & tensors.keys()):
        found = tensors[name]
        if found.shape != wanted[name].shape:
            complaints.append(
                f"{name} is {list(found.shape)}, not {list(wanted[name].shape)} as the config says"
            )
        if found.dtype not in _DTYPES:
            complaints.append(f"{name} is {found.dtype}, which cannot be read as floats")
    refuse(what, complaints)


def refuse(what: str, complaints: Iterable[str]) -> None:
    """Raise with all complaints, where there are any."""
    lines = list(complaints)
    if lines:
        raise BrtError(f"{what} does not fit, {len(lines)} complaints:\n  " + "\n  ".join(lines))


def _read_shards(index: Path, prefix: str) -> dict[str, Tensor]:
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise BrtError(f"{index} has no weight_map that says which shard holds which weight")
    shard_of = {name: shard for name, shard in shard_of.items() if name.startswith(prefix)}
    named = shard_of.values()
    strange = [name for name in named if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise BrtError(f"{index} names shards that are not files beside it: {strange[:3]}")
    shards = sorted(set(named))
    missing = [name for name in shards if not (index.parent / name).exists()]
    if missing:
        raise BrtError(f"{index.parent} lacks {len(missing)} of {len(shards)} shards: "
                       f"{', '.join(missing)}")  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors |= read_file(index.parent / name, prefix)
    refuse(
        str(index), [f"{name} is in no shard" for name in sorted(shard_of) if name not in tensors]
    )
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BrtError(f"cannot read {path}: {error}") from error
    if not isinstance(read, dict):
        raise BrtError(f"{path} must hold a JSON object, got a {type(read).__name__}")
    return read
