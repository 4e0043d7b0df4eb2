"""Profiles as files: safetensors, with everything that is no tensor as JSON in the header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from brt.errors import ProfileError
from brt.files import atomic_write
from brt.profile.data import Profile, RouterProfile

SCHEMA = 1
"""Raised whenever files of before can no longer be read as they are."""

_FORMAT = "brt-profile"


def save_profile(profile: Profile, path: Path) -> None:
    """See `Profile.save`."""
    header, tensors = taken_apart(profile)
    metadata = {
        "format": _FORMAT,
        "schema": str(SCHEMA),
        "digest": digest_of_parts(header, tensors),
        "profile": header,
    }
    with atomic_write(path) as beside:
        save_file(tensors, beside, metadata)


def load_profile(path: Path) -> Profile:
    """See `Profile.load`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"load: {path} cannot be read: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ProfileError(f"load: {path} is no profile; brt.profile(...).save(path) writes them")
    if metadata.get("schema") != str(SCHEMA):
        raise ProfileError(
            f"load: {path} has schema {metadata.get('schema')}, this brt reads {SCHEMA}; profile "
            "the model again, or load it with the brt that saved it"
        )
    header = metadata.get("profile", "")
    if metadata.get("digest") != digest_of_parts(header, tensors):
        raise ProfileError(f"load: {path} is damaged: its digest is not that of its content")
    return put_together(json.loads(header), tensors)


def digest_of(profile: Profile) -> str:
    """See `Profile.digest`."""
    return digest_of_parts(*taken_apart(profile))


def taken_apart(profile: Profile) -> tuple[str, dict[str, Tensor]]:
    """A profile as a JSON header and named tensors."""
    tensors: dict[str, Tensor] = {}
    for i, router in enumerate(profile.routers.values()):
        for name, value in router.tensors().items():
            tensors[f"routers.{i}.{name}"] = value.contiguous()
    for i, counts in enumerate(profile.joint.values()):
        tensors[f"joint.{i}"] = counts.contiguous()
    header: dict[str, Any] = {
        "model": profile.model,
        "routers_of_model": dict(profile.routers_of_model),
        "num_forwards": profile.num_forwards,
        "window": profile.window,
        "routers": [[r.module, r.call, r.num_paths] for r in profile.routers.values()],
        "joint": [list(pair) for pair in profile.joint],
    }
    return json.dumps(header), tensors


def put_together(header: dict[str, Any], tensors: dict[str, Tensor]) -> Profile:
    """The profile of a header, read from JSON, and its tensors."""
    routers = {}
    for i, (module, call, num_paths) in enumerate(header["routers"]):
        start = f"routers.{i}."
        fields = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        routers[f"{module}#{call}"] = RouterProfile(module, call, num_paths, **fields)
    joint = {(a, b): tensors[f"joint.{i}"] for i, (a, b) in enumerate(header["joint"])}
    return Profile(
        header["model"],
        header["routers_of_model"],
        header["num_forwards"],
        header["window"],
        routers,
        joint,
    )


def digest_of_parts(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a header and tensors."""
    made = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.numpy().tobytes())
    return made.hexdigest()
