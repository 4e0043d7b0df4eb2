"""Whether tensors are those of a model, and making them so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from brt.errors import CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def assign(
    model: nn.Module, tensors: Mapping[str, Tensor], what: str, dtype: torch.dtype | None = None
) -> None:
    """Make ``tensors`` the parameters and buffers of a model, which may be on the meta device.

    Floats become ``dtype`` where one is given. ``what`` opens the message: "msdnet.load: a.pth".
    Raises `CheckpointError` with everything that does not fit, and changes nothing then.
    """
    wanted = model.state_dict()
    check_fit(what, wanted, tensors)
    given = {
        name: tensor.to(dtype if wanted[name].is_floating_point() else wanted[name].dtype)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(given, assign=True)


def check_fit(what: str, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless ``tensors`` are those wanted, by name, shape and dtype.

    Any dtype of floats does for floats, but none of 8 bits or fewer, which are scaled by something.
    """
    if wanted and tensors and not wanted.keys() & tensors.keys():
        refuse(
            what,
            [
                f"it is of another model: none of its {len(tensors)} names ({_some(tensors)}) is "
                f"among the {len(wanted)} of this one ({_some(wanted)})"
            ],
        )
    complaints = [f"missing: {name} {list(wanted[name].shape)}" for name in sorted(wanted)
                  if name not in tensors]  # fmt: skip
    complaints += [f"not of this model: {name}" for name in sorted(tensors) if name not in wanted]
    for name in sorted(wanted.keys() & tensors.keys()):
        found, own = tensors[name], wanted[name]
        if found.shape != own.shape:
            complaints.append(f"{name} is {list(found.shape)}, not {list(own.shape)}")
        floats = own.is_floating_point()
        if own.dtype != found.dtype and found.dtype not in (_FLOATS if floats else _INTEGERS):
            kind = "floats" if floats else str(own.dtype)
            complaints.append(f"{name} is {found.dtype}, which cannot be read as {kind}")
    refuse(what, complaints)


def refuse(what: str, complaints: Iterable[str]) -> None:
    """Raise `CheckpointError` with all complaints, where there are any."""
    lines = tuple(complaints)
    if lines:
        raise CheckpointError(what, lines)


def _some(names: Mapping[str, Tensor], count: int = 3) -> str:
    shown = [str(name) for name in sorted(names)[:count]]
    return ", ".join(shown) + (", ..." if len(names) > count else "")
