"""Weights of LiveSR: a state dict of NAS a branch, torchvision's ResNet-18, k-means centres."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brt.errors import BrtError
from brt.files import atomic_write
from brt_models import checkpoints
from brt_models.livesr.config import LiveSRConfig
from brt_models.livesr.network import LiveSR

Path = str | PathLike[str]

CENTRES = "cluster_centers_"
"""The array of an ``.npz``, called as the attribute of scikit-learn's k-means."""
KMEANS, RESNET = "kmeans.npz", "resnet18.pth"
"""Files of a folder, beside a ``branch0.pth`` and so on for each centre."""


def load(folder: Path) -> LiveSR:
    """The network of a folder of such files, in eval mode; its shape is read from theirs.

    Raises `BrtError` where files are missing, and names them, or do not fit.
    """
    where = FilePath(folder)
    centres = _read_centres(where / KMEANS)
    branches = [where / f"branch{path}.pth" for path in range(len(centres))]
    missing = [file.name for file in (*branches, where / RESNET) if not file.is_file()]
    if missing:
        raise BrtError(f"livesr.load: {where} lacks {', '.join(missing)}")
    first = checkpoints.read(branches[0])
    head = first.get("head.0.weight")
    if head is None:
        raise BrtError(
            f"livesr.load: {branches[0]} is no network of NAS: it has no head.0.weight, but "
            f"{', '.join(sorted(first)[:3])}, ..."
        )
    num_blocks = sum(bool(re.fullmatch(r"body\.\d+\.0\.body\.0\.weight", n)) for n in first)
    doublings = sum(bool(re.fullmatch(r"upscale\.0\.\d+\.weight", n)) for n in first)
    model = LiveSR(LiveSRConfig(len(centres), len(head), num_blocks, 2**doublings)).eval()
    load_kmeans(model, where / KMEANS)
    load_resnet(model, where / RESNET)
    load_branches(model, branches)
    return model


def save(model: LiveSR, folder: Path) -> None:
    """Write a folder as `load` reads it."""
    where = FilePath(folder)
    save_kmeans(model, where / KMEANS)
    checkpoints.write(where / RESNET, model.classifier.resnet.state_dict())
    for path, subnet in enumerate(model.subnets):
        checkpoints.write(where / f"branch{path}.pth", subnet.state_dict())


def load_branches(model: LiveSR, paths: Sequence[Path]) -> None:
    """Load one file for each branch, as NAS trains them: one network, or one for each scale.

    Raises `BrtError` with everything that does not fit in any of them, and changes nothing then.
    """
    if len(paths) != len(model.subnets):
        raise BrtError(
            f"livesr.load_branches: {len(model.subnets)} branches, but {len(paths)} files"
        )
    found = [_of_scale(checkpoints.read(path), model.config.scale) for path in paths]
    given = {f"{i}.{name}": t for i, state in enumerate(found) for name, t in state.items()}
    checkpoints.check_fit("livesr.load_branches", model.subnets.state_dict(), given)
    model.subnets.load_state_dict(given)


def load_resnet(model: LiveSR, path: Path) -> None:
    """Load torchvision's ``resnet18`` weights; its last layer, which is not used, is left out."""
    state = checkpoints.read(path)
    own = model.classifier.resnet.state_dict()
    given = {name: t for name, t in state.items() if name not in ("fc.weight", "fc.bias")}
    for name, tensor in own.items():  # older files do not count batches; nothing reads the count
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, tensor)
    checkpoints.check_fit(f"livesr.load_resnet: {path}", own, given)
    model.classifier.resnet.load_state_dict(given)


def load_kmeans(model: LiveSR, path: Path) -> None:
    """Load centres [P, 512] from an ``.npz``; pickles, such as scikit-learn's own, are refused."""
    centres = _read_centres(path)
    own = model.classifier.centres_PF
    if centres.shape != tuple(own.shape) or not np.issubdtype(centres.dtype, np.floating):
        raise BrtError(
            f"livesr.load_kmeans: {path}: centres must be floats {list(own.shape)}, got "
            f"{centres.dtype} {list(centres.shape)}"
        )
    if not np.isfinite(centres).all():
        raise BrtError(f"livesr.load_kmeans: {path}: some centres are not finite")
    with torch.no_grad():
        own.copy_(torch.from_numpy(centres))


def save_kmeans(model: LiveSR, path: Path) -> None:
    """Write centres as `load_kmeans` reads them."""
    with atomic_write(path) as beside, beside.open("wb") as file:
        arrays: dict[str, Any] = {CENTRES: model.classifier.centres_PF.cpu().numpy()}
        np.savez(file, **arrays)


def _of_scale(state: dict[str, Tensor], scale: int) -> dict[str, Tensor]:
    """Of a file with a network for each scale, the one that ends at ours."""
    if not state or not all(name.startswith("networks.") for name in state):
        return state
    # Each doubling is a convolution and a shuffle
    last = f".upscale.0.{2 * (scale.bit_length() - 2)}.weight"
    beyond = f".upscale.0.{2 * (scale.bit_length() - 1)}.weight"
    for name in state:
        prefix = name.removesuffix(last)
        if prefix == name or f"{prefix}{beyond}" in state:
            continue
        if len(state[name]) == 4 * state[name].shape[1]:  # thrice as large: nine times
            top = f"{prefix}."
            return {n.removeprefix(top): t for n, t in state.items() if n.startswith(top)}
    return state


def _read_centres(path: Path) -> np.ndarray[Any, Any]:
    try:
        # Not numpy's own opening: it leaves a file open that is no zip archive
        with open(path, "rb") as stream:
            found = np.load(stream, allow_pickle=False)
            names = list(found) if isinstance(found, np.lib.npyio.NpzFile) else None
            centres = np.asarray(found[CENTRES]) if names and CENTRES in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BrtError(
            f"livesr: cannot read {path}: {error}; a pickle is never opened: where it "
            f"was made, write numpy.savez('kmeans.npz', {CENTRES}=kmeans.{CENTRES})"
        ) from error
    if centres is None:
        holds = "one array" if names is None else ", ".join(names) or "nothing"
        raise BrtError(f"livesr: {path} holds no array {CENTRES!r}; it holds {holds}")
    return centres
