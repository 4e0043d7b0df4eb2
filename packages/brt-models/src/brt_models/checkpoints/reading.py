"""Reading the files of others.

Nothing is downloaded and no pickle can run code: what torch wrote is read with
``weights_only=True``, to which only numpy's arrays and scalars are added.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from brt.errors import BrtError
from brt_models.checkpoints.fitting import refuse

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of whole weights, the one to take first; shards are listed in ``NAME.index.json``."""
CONFIG = "config.json"

# Under which name training scripts keep the state dict beside the optimiser's and the epoch
_WRAPS = ("state_dict", "model_state_dict", "model", "params_ema", "params", "net")
# What DataParallel and torch.compile put before every name
_PREFIXES = ("module.", "_orig_mod.")

_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")
# How numpy's arrays and scalars come back; older releases called their module by another name
_NUMPY: list[Any] = [
    *(
        (made.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for name, made in (("_reconstruct", np.zeros(0)), ("scalar", np.float64(0)))
        for core in ("core", "_core")
    ),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in _KINDS),
]


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """What the ``config.json`` of a folder says."""
    return read_json(Path(folder) / CONFIG)


def read(path: str | PathLike[str], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file or a folder whose names begin with ``prefix``.

    Of a folder in shards, only those that hold any of them are read. Raises `BrtError` where
    something cannot be read, is cut off, is missing, or is a pickle that could run code.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path, prefix)
    for name in WEIGHTS:
        if (path / name).exists():
            return _read_file(path / name, prefix)
        index = path / f"{name}.index.json"
        if index.exists():
            return _read_shards(index, prefix)
    raise BrtError(
        f"{path} holds no weights: neither {' nor '.join(WEIGHTS)}, nor one's .index.json"
    )


def read_beside(path: str | PathLike[str]) -> dict[str, Any]:
    """What a file that torch wrote holds beside the weights, by name: an epoch, a config.

    Nothing where the file is the state dict itself, or of another kind.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return {}
    found = read_torch(path)
    wrap = _wrap(found)
    return {} if wrap is None else {str(k): v for k, v in found.items() if k != wrap}


def read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is nothing but tensors, arrays and plain values."""
    is_zip = False
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():
            # A file of another protocol is read, or refused, all the same
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise BrtError(_why(path, str(error))) from error
    except OSError as error:
        raise BrtError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a damaged file raises anything
        is_cut = is_zip and not zipfile.is_zipfile(path)
        raise BrtError(f"cannot read {path}: {_damage(error, is_cut)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BrtError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise BrtError(f"{path} must hold a JSON object, got a {type(found).__name__}")
    return found


def _read_file(path: Path, prefix: str) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise BrtError(f"cannot read {path}: {error}") from error
    state = _state_dict(path, read_torch(path))
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    """The tensors in what a file holds, without what wraps them."""
    wrap = _wrap(found)
    state = found if wrap is None else found[wrap]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, (Tensor, np.ndarray)) for value in state.values()
    ):
        holds = ", ".join(map(str, list(found)[:8])) if isinstance(found, Mapping) else type(found)
        raise BrtError(
            f"{path} is no state dict (names and tensors, nothing else), nor has one under "
            f"{', '.join(_WRAPS)}; it holds: {holds}"
        )
    named = {str(name): torch.as_tensor(value) for name, value in state.items()}
    for prefix in _PREFIXES:
        if named and all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named


def _wrap(found: Any) -> str | None:
    """The key under which a file keeps its state dict; None where it is one."""
    if not isinstance(found, Mapping):
        return None
    return next((name for name in _WRAPS if isinstance(found.get(name), Mapping)), None)


def _read_shards(index: Path, prefix: str) -> dict[str, Tensor]:
    shard_of = read_json(index).get("weight_map")
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
        tensors |= _read_file(index.parent / name, prefix)
    refuse(
        str(index), [f"{name} is in no shard" for name in sorted(shard_of) if name not in tensors]
    )
    return tensors


def _why(path: Path, message: str) -> str:
    """Of torch's message only the reason: the rest says how to run the code all the same."""
    wants = re.search(r"GLOBAL\s+([\w.]+)", message)
    if wants:
        return (
            f"{path} holds more than tensors, and what it holds could run code; it was not "
            f"loaded: it asks for {wants[1]}"
        )
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    return (
        f"cannot read {path}: it is damaged, or no checkpoint: {reason[1] if reason else message}"
    )


def _damage(error: Exception, is_cut: bool) -> str:
    if is_cut or isinstance(error, (EOFError, IndexError, struct.error)) or "EOF" in str(error):
        return "it is cut off"
    return f"it is damaged, or no checkpoint: {str(error).partition(chr(10))[0]}"
