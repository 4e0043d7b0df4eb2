"""Checkpoints that say nothing of their config: which of some known ones it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from brt.errors import BrtError
from brt_models.checkpoints.fitting import assign
from brt_models.checkpoints.reading import read, read_beside
from brt_models.checkpoints.writing import write

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

_CONFIG = "config"


def save_published(
    model: nn.Module, path: str | PathLike[str], *, wrap: str, prefix: str = ""
) -> None:
    """Write what the authors' code reads, and beside it the config, a dataclass, for our own."""
    config: Any = model.config
    write(path, model.state_dict(), wrap=wrap, prefix=prefix, **{_CONFIG: asdict(config)})


def load_published(
    what: str,
    path: str | PathLike[str],
    make: Callable[[C], M],
    kind: type[C],
    candidates: Callable[[Mapping[str, Tensor]], Mapping[str, C]],
    config: C | None = None,
) -> M:
    """The model of a file, in eval mode and in float32.

    Its config is the one given, or the one that `save_published` wrote, or else the one of the
    ``candidates`` (by name, of the tensors) whose names and shapes these are. Raises `BrtError`
    with everything that does not fit; of the nearest candidate where none fits.
    """
    tensors = read(path)
    config = config or _config_in(path, kind, what)
    choices = candidates(tensors) if config is None else {"": config}
    name, model = nearest(tensors, make, choices)
    several = len(choices) > 1 and bool(model.state_dict().keys() & tensors.keys())
    among = f", nearest to {name} of {', '.join(choices)}," if several else ""
    assign(model, tensors, f"{what}: {path}{among}", torch.float32)
    return model.eval()


def nearest(
    tensors: Mapping[str, Tensor], make: Callable[[C], M], choices: Mapping[str, C]
) -> tuple[str, M]:
    """(the config whose model has most of these names and shapes, that model on the meta device).

    The first one where all are the same, or none: networks of one kind share some.
    """
    found: dict[str, tuple[float, M]] = {}
    for name, choice in choices.items():
        with torch.device("meta"):
            model = make(choice)
        own = model.state_dict()
        found[name] = _likeness(own, tensors), model
        if found[name][0] == 1 or not own.keys() & tensors.keys():
            return name, model
    name = max(found, key=lambda name: found[name][0])
    return name, found[name][1]


def num_classes(tensors: Mapping[str, Tensor], bias: str, default: int) -> int:
    """How many classes a checkpoint tells, by the bias of its last layer; else the default."""
    found = tensors.get(bias)
    return default if found is None or found.ndim != 1 else len(found)


def _likeness(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
    """How much of both is the same, 1 where all is."""
    same = sum(name in own and own[name].shape == t.shape for name, t in tensors.items())
    return same / max(len(own), len(tensors), 1)


def _config_in(path: str | PathLike[str], kind: type[C], what: str) -> C | None:
    fields = read_beside(path).get(_CONFIG)
    if fields is None:
        return None
    assert is_dataclass(kind)
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise BrtError(f"{what}: {path}: its config is none of {kind.__name__}: {error}") from error
