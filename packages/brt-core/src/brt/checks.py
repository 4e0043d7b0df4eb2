"""Checks of tensor values that never stop a device.

Metadata (ranks, dtypes, devices) is checked where it is used. Values are checked here: at the call
on the CPU; on CUDA a failed check sets a flag in device memory, and the next `check` raises it.
``BRT_CHECK``, read once at import: ``sync`` raises at the call on CUDA too, ``off`` checks nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from brt.errors import BrtError

_MODE = os.environ.get("BRT_CHECK", "")
if _MODE not in ("", "sync", "off"):
    raise BrtError(f"BRT_CHECK must be sync, off or unset, got {_MODE!r}")

_NUM_SLOTS = 256
# Slot 0 takes the writes of checks that passed, the last one is shared by messages beyond the rest.
_slot_of: dict[tuple[type[BrtError], str], int] = {}
_flags_of: dict[torch.device, Tensor] = {}


def wanted(values: Tensor) -> bool:
    """Tell whether the values of this tensor are to be checked: not while a graph is traced."""
    if torch.compiler.is_compiling() or _MODE == "off":
        return False
    # Fake, functional and distributed tensors are subclasses: they have no values to look at here.
    return type(values) in (Tensor, torch.nn.Parameter) and not values.is_meta


def check_values(
    ok: Tensor,
    message: str,
    *,
    detail: Callable[[], str] | None = None,
    error: type[BrtError] = BrtError,
) -> None:
    """Raise ``error(message)`` unless the 0-D boolean ``ok`` holds; on CUDA, at the next `check`.

    ``detail`` tells what only the values show (how many, where first); it is called where the error
    is raised at once. Keep ``message`` free of numbers that change from call to call: each distinct
    one takes a slot among the device's flags for the life of the process.
    """
    if not wanted(ok):
        return
    if ok.is_cuda and _MODE != "sync":
        _flag(ok, message, error)
    elif not ok:
        raise error(message if detail is None else f"{message}: {detail()}")


def check(device: torch.device | str | int | None = None) -> None:
    """Raise the value errors that CUDA work flagged since the last call; waits for that work.

    Looks at one device, or at all that ran a check, and clears their flags.
    """
    failed: list[tuple[type[BrtError], str]] = []
    for known in _known_devices(device):
        # A captured graph may be replaying on any stream, so the whole device is waited for.
        torch.cuda.synchronize(known)
        flags = _flags_of[known]
        slots = set(flags.nonzero().flatten().tolist()) - {0}
        flags.zero_()
        failed += [
            (error, f"{message} (on {known})")
            for (error, message), slot in _slot_of.items()
            if slot in slots
        ]
    if failed:
        raise failed[0][0]("; ".join(message for _, message in failed))


def _known_devices(device: torch.device | str | int | None) -> list[torch.device]:
    if device is None:
        return list(_flags_of)
    asked = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return [known for known in _flags_of if asked in (known, torch.device(known.type))]


def _flag(ok: Tensor, message: str, error: type[BrtError]) -> None:
    """Set the flag of ``message`` where ``ok`` is false.

    Every write is a constant, so streams that share the flags cannot undo each other's.
    """
    slot = _slot_of.setdefault((error, message), min(len(_slot_of) + 1, _NUM_SLOTS - 1))
    flags = _flags_of.get(ok.device)
    if flags is None:
        flags = _flags_of[ok.device] = _new_flags(ok.device)
    flags.index_fill_(0, torch.where(ok, 0, slot).view(1), 1)


def _new_flags(device: torch.device) -> Tensor:
    """Return cleared flags, made outside any CUDA graph that is being captured."""
    if not torch.cuda.is_current_stream_capturing():
        return torch.zeros(_NUM_SLOTS, dtype=torch.uint8, device=device)
    # Made by the capture they would lie in the graph's pool, and each replay would clear them.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        return torch.zeros(_NUM_SLOTS, dtype=torch.uint8, device=device)
