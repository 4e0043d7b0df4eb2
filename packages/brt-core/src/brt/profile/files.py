"""Profiles as files: safetensors, with everything that is no tensor as JSON in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from brt.errors import ProfileError
from brt.profile.data import Profile, RouterProfile
from brt.sealed_files import SealedFormat, digest

SCHEMA = 1
"""Raised whenever files of before can no longer be read as they are."""

_FORMAT = SealedFormat(
    name="brt-profile",
    schema=SCHEMA,
    key="profile",
    error=ProfileError,
    written_by="brt.profile(...).save(path)",
    otherwise="profile the model again, or load it with the brt that saved it",
)


def save_profile(profile: Profile, path: Path) -> None:
    """See `Profile.save`."""
    _FORMAT.save(path, *taken_apart(profile))


def load_profile(path: Path) -> Profile:
    """See `Profile.load`."""
    header, tensors = _FORMAT.load(path)
    return put_together(json.loads(header), tensors)


def digest_of(profile: Profile) -> str:
    """See `Profile.digest`."""
    return digest(*taken_apart(profile))


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
