"""Checkpoints of ClassSR: one state dict, or one for each branch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from os import PathLike

import torch

from brt.errors import BrtError
from brt_models import checkpoints
from brt_models.classsr.config import ClassSRConfig
from brt_models.classsr.network import ClassSR

Path = str | PathLike[str]

# A name that only checkpoints with branches of one kind have
_FIRST: dict[str, Callable[[], ClassSRConfig]] = {
    "net1.head_conv.0.weight": ClassSRConfig.fsrcnn,
    "net1.entry.weight": ClassSRConfig.carn,
    "net1.conv_first.weight": ClassSRConfig.srresnet,
    "net1.head.0.weight": ClassSRConfig.rcan,
}


def load(path: Path, config: ClassSRConfig | None = None) -> ClassSR:
    """The model of a checkpoint of the authors' code, in eval mode.

    Without a config it is one of the four published networks, told by its names and shapes.
    Nothing in the file is executed. Raises `BrtError` with everything that does not fit.
    """
    tensors = checkpoints.read(path)
    if config is None:
        config = _published(tensors.keys(), path)
    with torch.device("meta"):
        model = ClassSR(config)
    checkpoints.assign(model, tensors, f"classsr.load: {path}", torch.float32)
    return model.eval()


def load_branches(model: ClassSR, paths: Sequence[Path]) -> None:
    """Load one file for each branch, cheapest first, as the first stage of training made them.

    Raises `BrtError` with everything that does not fit in any of them, and changes nothing then.
    """
    nets = model.paths
    if len(paths) != len(nets):
        raise BrtError(f"classsr.load_branches: {len(nets)} branches, but {len(paths)} files")
    found = [checkpoints.read(path) for path in paths]
    own = {
        f"{i}.{name}": t for i, net in enumerate(nets, 1) for name, t in net.state_dict().items()
    }
    given = {f"{i}.{name}": t for i, state in enumerate(found, 1) for name, t in state.items()}
    checkpoints.check_fit("classsr.load_branches", own, given)
    for net, state in zip(nets, found, strict=True):
        net.load_state_dict(state)


def save(model: ClassSR, path: Path) -> None:
    """Write what the authors' code and `load` read: a state dict, nothing around it."""
    checkpoints.write(path, model.state_dict())


def _published(names: Collection[str], path: Path) -> ClassSRConfig:
    """The published network whose names these are."""
    for first, config in _FIRST.items():
        if first in names:
            return config()
    raise BrtError(
        f"classsr.load: {path} is no checkpoint of ClassSR: it has none of {', '.join(_FIRST)}, "
        f"but {', '.join(sorted(names)[:3])}, ..."
    )
